"""What a person may ask for: everything that is held about them, and its erasure."""

from collections.abc import Callable, Generator, Mapping
from contextlib import closing
from datetime import UTC, datetime
from functools import lru_cache, partial
from time import monotonic
from typing import Any
from uuid import UUID

import orjson
from sqlalchemy import bindparam, select
from sqlalchemy.orm import Session

from backend.crypto.files import Lock, PassphraseLock, Sealer
from backend.db_utils import session_scope, snapshot_scope
from backend.errors import ForbiddenError, RefusedError, SubjectNotFoundError
from backend.models import DATA_MAP, AuditEvent, User
from backend.privacy import archives
from backend.privacy.declarations import EraseMode
from backend.privacy.export import ExportContainer, ExportFormat, export
from backend.privacy.export_request import ExportRequest
from backend.privacy.import_plan import Imported
from backend.privacy.imports import import_rows
from backend.privacy.notice import Terms
from backend.services.audit_service import Actor, get_audit_service
from backend.services.consent_service import ConsentRecord, get_consent_service
from backend.services.encryption_service import get_encryption_service
from backend.services.erasure_service import Erasure, get_erasure_service
from backend.services.hold_service import get_hold_service
from backend.services.policy_service import get_policy_service
from backend.services.reference_service import reference_to
from backend.services.subject_service import Subject, Who, get_subject_service
from backend.settings import get_settings

PASSPHRASE_MIN = 12
# How often a download makes sure that its person has not been erased since it began.
_STILL_THERE_SECONDS = 1.0
_REQUESTS = ("export", "import", "erasure", "erasure_queued")
_events = AuditEvent.__table__.c
_ASKED = (
    select(_events.at, _events.action, _events.outcome)
    .where(_events.subject_ref == bindparam("ref"), _events.action.in_(_REQUESTS))
    .order_by(_events.at, _events.id)
)


class ComplianceService:
    """Export, import and erasure."""

    # Access

    def export(
        self,
        session: Session,
        actor: Actor,
        who: int | Who,
        format_: ExportFormat,
        *,
        encrypt: bool = False,
        passphrase: str | None = None,
        container: ExportContainer = ExportContainer.HOLDFAST,
    ) -> Generator[bytes]:
        """
        Return the export as a stream; the audit row is written before the first byte.

        Args:
            passphrase: Encrypts so that the person can open it; without one, *encrypt* uses the
                service's own key. At least `PASSPHRASE_MIN` characters.
            container: `zip` locks the members of a zip with the passphrase, for 7-Zip and alike.

        Raises:
            SubjectNotFoundError: Nobody is named so.
            RefusedError: The passphrase is too short or without `encrypt`, or the container does
                not fit format, encryption or passphrase.
        """
        _require_fitting_lock(format_, encrypt, passphrase, container)
        named = Who(who) if isinstance(who, int) else who
        subject = get_subject_service().find(session, named)
        now = datetime.now(UTC)
        get_audit_service().record(
            session, "export", actor, subject=subject.ref, format=format_, encrypted=encrypt,
            **({"container": container} if container is ExportContainer.ZIP else {}),
        )  # fmt: skip
        if container is ExportContainer.ZIP:
            return self._export_chunks(subject, format_, now, zip_passphrase=passphrase)
        chunks = self._export_chunks(subject, format_, now)
        if not encrypt:
            return chunks
        lock: Lock = (
            get_encryption_service().file_lock()
            if passphrase is None
            else PassphraseLock(passphrase)
        )
        meta = {"kind": "export", "format": format_.value}
        return _sealed(partial(Sealer, meta, [lock], now=now), chunks)

    def _export_chunks(
        self,
        subject: Subject,
        format_: ExportFormat,
        now: datetime,
        *,
        zip_passphrase: str | None = None,
    ) -> Generator[bytes]:
        """Read in a transaction of its own: the request's has ended when the stream begins."""
        with snapshot_scope() as session:
            number = subject.number
            consent = None if number is None else get_consent_service().of(session, number)
            request = ExportRequest(
                subject={"user_id": number},
                subjects=subject.rows,
                generated_at=now,
                consents=_consent_document(consent),
                requests=self._requests(session, subject),
                terms=self._terms(session, number),
            )
            checked = monotonic()
            with closing(export(session, DATA_MAP, request, format_, zip_passphrase)) as chunks:
                for chunk in chunks:
                    yield chunk
                    if monotonic() - checked > _STILL_THERE_SECONDS:
                        self._refuse_if_erased_meanwhile(subject)
                        checked = monotonic()

    def _refuse_if_erased_meanwhile(self, subject: Subject) -> None:
        """
        End a download whose person was erased since it began.

        Raises:
            SubjectErasedError: They were; what was sent is no whole file.
            SubjectNotFoundError: As above, and nothing is left of them.
        """
        with session_scope(read_only=True) as session:
            if subject.number is not None:
                get_subject_service().require(session, subject.number)
            elif not any(get_subject_service().mentions(session, subject)):
                raise SubjectNotFoundError("nobody is named so any more")

    def _requests(self, session: Session, subject: Subject) -> list[dict[str, Any]]:
        """What was asked about the person and done with their data, from the audit trail."""
        found = session.execute(_ASKED, {"ref": subject.ref})
        return [{"at": at, "action": action, "outcome": outcome} for at, action, outcome in found]

    def _terms(self, session: Session, user_id: int | None) -> Terms:
        settings = get_settings()
        policies = get_policy_service().policies(session)
        holds = [] if user_id is None else get_hold_service().on_person(session, user_id)
        return Terms(
            controller=settings.controller_name,
            contact=settings.controller_contact,
            backups_expire_after_days=settings.backup_max_age_days,
            periods={policy.data_type: policy.period for policy in policies},
            by_hand=frozenset(policy.data_type for policy in policies if not policy.enabled),
            held=frozenset(hold.data_type for hold in holds),
        )

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

        The trail says who came back as whom, so that the same export is known the next time.

        Raises:
            ForbiddenError: The export is another person's than *user_id*.
            HoldfastError: As `import_rows`.
        """
        subject = document.get("subject")
        claimed = subject.get("user_id") if isinstance(subject, dict) else None
        # One that is nobody's is refused for that.
        if user_id is not None and claimed not in (user_id, None):
            raise ForbiddenError("the export is another person's")

        def came_back(exported: UUID, present: UUID) -> bool:
            return self._came_back(session, exported, present)

        done = import_rows(session, DATA_MAP, document, came_back=came_back, dry_run=dry_run)
        user = session.get(User, done.subject_id)
        was = {"was": reference_to(session, done.exported_uid)} if done.came_back else {}
        get_audit_service().record(
            session, "import", actor, outcome="dry_run" if dry_run else "done",
            subject=user.uid if user else done.exported_uid,
            restored=sum(table.restored for table in done.tables.values()), **was,
        )  # fmt: skip
        return done.subject_id, done.tables

    def _came_back(self, session: Session, exported: UUID, present: UUID) -> bool:
        """Say whether an import, or several, made the person *present* of the one *exported*."""
        wanted = reference_to(session, exported)
        ref: str | None = reference_to(session, present)
        while ref is not None and ref != wanted:
            events = select(AuditEvent.detail).where(
                AuditEvent.action == "import",
                AuditEvent.outcome == "done",
                AuditEvent.subject_ref == ref,
            )
            told = (orjson.loads(detail or "{}") for detail in session.scalars(events))
            ref = next((event["was"] for event in told if "was" in event), None)
        return ref is not None

    # Erasure

    def erase(
        self,
        session: Session,
        actor: Actor,
        who: int | Who,
        mode: EraseMode,
        *,
        reason: str,
        dry_run: bool,
        plan_digest: str | None = None,
    ) -> Erasure:
        """Erase a person, by number or as *who* says; see `ErasureService.erase`."""
        named = Who(who) if isinstance(who, int) else who
        return get_erasure_service().erase(
            session, actor, named, mode, reason=reason, dry_run=dry_run, plan_digest=plan_digest
        )


def _sealed(make: Callable[[], Sealer], chunks: Generator[bytes]) -> Generator[bytes]:
    # Closed with what is made from it: else a caller who hangs up leaves its transaction open.
    with closing(chunks):
        # Here, when no transaction is open: a passphrase takes long to stretch.
        yield from make().seal(chunks)


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


def _consent_document(record: ConsentRecord | None) -> dict[str, Any]:
    """Spell the consents as they are exported; nobody asks one who has no account for any."""
    if record is None:
        return {"user_id": None, "purposes": {}, "history": []}
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
