"""What a person may ask for: everything that is held about them, and its erasure."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import Any
from uuid import UUID, uuid4

from sqlalchemy.orm import Session

from backend.crypto.files import Lock, PassphraseLock, Sealer
from backend.db_utils import empty_wal_after_commit, snapshot_scope
from backend.errors import (
    ForbiddenError,
    RefusedError,
    StalePlanError,
)
from backend.models import DATA_MAP, LedgerKind, User
from backend.privacy import archives
from backend.privacy.erase import (
    EraseMode,
    ErasurePlan,
    carry_out_erasure,
    plan_erasure,
)
from backend.privacy.export import (
    ExportContainer,
    ExportFormat,
    ExportRequest,
    export,
    notice,
)
from backend.privacy.imports import Imported, import_rows
from backend.services.audit_service import Actor, get_audit_service
from backend.services.consent_service import ConsentRecord, get_consent_service
from backend.services.encryption_service import get_encryption_service
from backend.services.ledger_service import get_ledger_service
from backend.services.retention_service import get_retention_service
from backend.services.subject_service import get_subject_service
from backend.settings import get_settings

PASSPHRASE_MIN = 12
_RIGHTS = (
    "You may have this data corrected, erased, restricted or handed over, you may object to its "
    "use and withdraw a consent at any time, and you may complain to a data protection authority. "
    "No decision about you is made by automated means alone."
)


@dataclass(frozen=True, slots=True)
class Erasure:
    """An erasure, done or planned."""

    erasure_id: UUID
    dry_run: bool
    plan: ErasurePlan
    backup_expires_at: datetime = field(
        default_factory=lambda: (
            datetime.now(UTC) + timedelta(days=get_settings().backup_max_age_days)
        )
    )


class ComplianceService:
    """Export, import and erasure."""

    # Access

    def export(
        self,
        session: Session,
        actor: Actor,
        user_id: int,
        format_: ExportFormat,
        *,
        encrypt: bool = False,
        passphrase: str | None = None,
        container: ExportContainer = ExportContainer.HOLDFAST,
    ) -> Iterator[bytes]:
        """
        Return the export as a stream; the audit row is written before the first byte.

        Args:
            passphrase: Encrypts so that the person can open it; without one, *encrypt* uses the
                service's own key. At least `PASSPHRASE_MIN` characters.
            container: `zip` locks the members of a zip with the passphrase, for 7-Zip and alike.

        Raises:
            SubjectNotFoundError: Nobody has this id.
            RefusedError: The passphrase is too short or without `encrypt`, or the container does
                not fit format, encryption or passphrase.
        """
        _require_fitting_lock(format_, encrypt, passphrase, container)
        user = get_subject_service().require(session, user_id)
        now = datetime.now(UTC)
        get_audit_service().record(
            session, "export", actor, subject=user.uid, format=format_, encrypted=encrypt,
            **({"container": container} if container is ExportContainer.ZIP else {}),
        )  # fmt: skip
        if container is ExportContainer.ZIP:
            return self._export_chunks(user_id, format_, now, zip_passphrase=passphrase)
        chunks = self._export_chunks(user_id, format_, now)
        if not encrypt:
            return chunks
        lock: Lock = (
            get_encryption_service().file_lock()
            if passphrase is None
            else PassphraseLock(passphrase)
        )
        meta = {"kind": "export", "format": format_.value}
        return Sealer(meta, [lock], now=now).seal(chunks)

    def _export_chunks(
        self,
        user_id: int,
        format_: ExportFormat,
        now: datetime,
        *,
        zip_passphrase: str | None = None,
    ) -> Iterator[bytes]:
        """Read in a transaction of its own: the request's has ended when the stream begins."""
        with snapshot_scope() as session:
            consent = get_consent_service().of(session, user_id)
            request = ExportRequest(user_id, now, _consent_document(consent), self._notice(session))
            yield from export(session, DATA_MAP, request, format_, zip_passphrase)

    def _notice(self, session: Session) -> dict[str, Any]:
        settings = get_settings()
        periods = get_retention_service().periods(session)
        return {
            "controller": {
                "name": settings.controller_name,
                "contact": settings.controller_contact,
            },
            "rights": _RIGHTS,
            "backups_expire_after_days": settings.backup_max_age_days,
            "tables": notice(DATA_MAP, periods),
        }

    def import_(
        self,
        session: Session,
        actor: Actor,
        document: Mapping[str, Any],
        user_id: int | None,
        *,
        dry_run: bool,
    ) -> tuple[int, dict[str, Imported]]:
        """
        Bring rows of an export back to their person; see `backend.privacy.imports`.

        Raises:
            ForbiddenError: The export is another person's than *user_id*.
            HoldfastError: As `import_rows`.
        """
        subject = document.get("subject")
        claimed = subject.get("user_id") if isinstance(subject, dict) else None
        if user_id is not None and claimed != user_id:
            raise ForbiddenError("the export is another person's")
        with session.begin_nested() as savepoint:
            found, done = import_rows(session, DATA_MAP, document, dry_run=dry_run)
            if dry_run:
                savepoint.rollback()
        user = session.get(User, found)
        get_audit_service().record(
            session, "import", actor, outcome="dry_run" if dry_run else "done",
            subject=user.uid if user else None,
            restored=sum(table.restored for table in done.values()),
        )  # fmt: skip
        return found, done

    # Erasure

    def erase(
        self,
        session: Session,
        actor: Actor,
        user_id: int,
        mode: EraseMode,
        *,
        reason: str,
        dry_run: bool,
        plan_digest: str | None = None,
    ) -> Erasure:
        """
        Erase a person in the session's transaction, or say what that would do.

        The ledger's object is durable before the first row changes, so that neither a crash nor
        a restore can bring the person back.

        Args:
            reason: Kind of request, for the audit trail; it must not name the person.
            plan_digest: Of a dry run; refused when the plan has changed since.

        Raises:
            SubjectNotFoundError: Nobody has this id.
            LegalHoldError: A hold keeps them; names the holds.
            ConflictError: They are the last admin.
            StalePlanError: The plan is not the one of the dry run.
        """
        user = get_subject_service().require_erasable(session, user_id)
        plan = self._plan(session, user_id, mode)
        if plan_digest is not None and plan_digest != plan.digest:
            raise StalePlanError(
                "the person's data has changed since the dry run", plan_digest=plan.digest
            )
        erasure_id, uid = uuid4(), user.uid
        if not dry_run:
            kind = LedgerKind.ERASE if mode is EraseMode.DELETE else LedgerKind.ANONYMIZE
            entry = get_ledger_service().enter(session, kind, uid, actor, at=datetime.now(UTC))
            erasure_id = entry.id
            try:
                self._carry_out(session, user_id, plan)
            except BaseException:
                get_ledger_service().withdraw_object(entry)
                raise
            empty_wal_after_commit(session)
        get_audit_service().record(
            session, "erasure", actor, outcome="dry_run" if dry_run else "done", subject=uid,
            mode=mode, erasure=erasure_id, reason=reason,
        )  # fmt: skip
        return Erasure(erasure_id, dry_run, plan)

    def erase_again(self, session: Session, user_id: int, mode: EraseMode) -> None:
        """Erase as the ledger says, in a database that has not seen it yet."""
        self._carry_out(session, user_id, self._plan(session, user_id, mode))

    def _plan(self, session: Session, user_id: int, mode: EraseMode) -> ErasurePlan:
        return plan_erasure(
            session,
            DATA_MAP,
            DATA_MAP.subject.key == user_id,
            mode=mode,
            periods=get_retention_service().periods(session),
            now=datetime.now(UTC),
        )

    def _carry_out(self, session: Session, user_id: int, plan: ErasurePlan) -> None:
        subjects = DATA_MAP.subject.key == user_id
        carry_out_erasure(session, DATA_MAP, plan, subjects, datetime.now(UTC))


def _require_fitting_lock(
    format_: ExportFormat, encrypt: bool, passphrase: str | None, container: ExportContainer
) -> None:
    if passphrase is not None:
        if not encrypt:
            raise RefusedError("a passphrase is for an encrypted export: set encrypt to true")
        if len(passphrase) < PASSPHRASE_MIN:
            raise RefusedError(f"the passphrase has at least {PASSPHRASE_MIN} characters")
    if container is not ExportContainer.ZIP:
        return
    if format_ is not ExportFormat.ZIP:
        raise RefusedError("the container zip is for the format zip")
    if not encrypt:
        raise RefusedError("the container zip is for an encrypted export: set encrypt to true")
    if passphrase is None:
        raise RefusedError("the container zip opens with a passphrase: give one")
    if not archives.takes_passphrase(passphrase):
        raise RefusedError(
            f"the passphrase of a container zip has at most {archives.PASSPHRASE_MAX} characters, "
            "printable ASCII only: archivers disagree about others"
        )


def _consent_document(record: ConsentRecord) -> dict[str, Any]:
    return {
        "user_id": record.user_id,
        "purposes": {
            name: {"granted": s.granted, "since": s.since, "notice_version": s.notice_version}
            for name, s in record.purposes.items()
        },
        "history": [
            {
                "purpose": event.purpose,
                "granted": event.granted,
                "notice_version": event.notice_version,
                "method": event.method,
                "recorded_at": event.recorded_at,
            }
            for event in record.history
        ],
    }


@lru_cache(maxsize=1)
def get_compliance_service() -> ComplianceService:
    return ComplianceService()
