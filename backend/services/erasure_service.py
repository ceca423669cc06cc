"""Erasure: from the plan to the proof, and again in a database that has not seen it."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import Any, Final
from uuid import UUID, uuid4

import orjson
import structlog
from sqlalchemy import delete
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from backend.db_utils import (
    empty_wal_after_commit,
    forget_copies,
    get_engine,
    session_scope,
)
from backend.errors import ConflictError, HoldfastError, StalePlanError
from backend.models import (
    DATA_MAP,
    ErasureRecord,
    ErasureStatus,
    LedgerEntry,
    LedgerKind,
    PlannedErasure,
)
from backend.privacy.catalogue import unknown
from backend.privacy.declarations import EraseMode
from backend.privacy.erase import (
    ErasurePlan,
    carry_out_erasure,
    plan_erasure,
)
from backend.privacy.old_values import old_values
from backend.privacy.scan import scan
from backend.privacy.steps import ConstraintError, IncompleteErasureError, Outcome
from backend.privacy.words import OldValue, Words
from backend.services.audit_service import ITSELF, Actor, get_audit_service
from backend.services.certificate_service import get_certificate_service
from backend.services.ledger_service import MODES, get_ledger_service
from backend.services.mention_service import get_mention_service
from backend.services.policy_service import get_policy_service
from backend.services.subject_service import Subject, Who, get_subject_service
from backend.settings import get_settings

Tables = Mapping[str, Mapping[Outcome, int]]

log = structlog.get_logger(__name__)
_ATTEMPTS: Final = 3
# Enough to look for afterwards: a person's own texts, and a sample of what hangs from them.
_ROWS_LOOKED_FOR: Final = 50
_PLANS_KEPT: Final = timedelta(days=30)


class UnmappedError(ConflictError):
    """The database holds what the data map does not know, so nobody can say what is theirs."""

    code = "unmapped_data"


@dataclass(frozen=True, slots=True)
class Erasure:
    """
    An erasure, done or planned.

    Attributes:
        not_reached: What was left out, and why where the name alone does not say it.
        words: What the scan afterwards looks for; it never leaves the process.
        sampled: Tables of which the scan looks for the values of some rows only.
    """

    erasure_id: UUID
    dry_run: bool
    plan: ErasurePlan
    not_reached: tuple[str, ...]
    backup_expires_at: datetime
    words: Words | None = field(default=None, repr=False)
    sampled: tuple[str, ...] = ()

    @property
    def status(self) -> str:
        if self.dry_run:
            return "planned"
        return ErasureStatus.PARTIAL if self.not_reached else ErasureStatus.COMPLETE


class ErasureService:
    """Plans, carries out, proves and repeats erasures."""

    def erase(
        self,
        session: Session,
        actor: Actor,
        who: Who,
        mode: EraseMode,
        *,
        reason: str,
        dry_run: bool,
        plan_digest: str | None = None,
    ) -> Erasure:
        """
        Erase a person in the session's transaction, or say what that would do.

        The ledger's object is durable before the first row changes, so that neither a crash nor
        a restore can bring the person back. Once committed, `prove` what was done.

        Args:
            reason: Kind of request, for the audit trail; it must not name the person.
            plan_digest: Of a dry run; refused when the plan has changed since.

        Raises:
            UnmappedError: The database holds columns that the data map does not know.
            SubjectNotFoundError: Nobody is named so.
            LegalHoldError: A hold keeps them; names the holds.
            ConflictError: They are the last admin, or a rule of the database forbids it.
            StalePlanError: The plan is not the one of the dry run; says what has changed.
        """
        subject = get_subject_service().find_erasable(session, who)
        plan = self._plan(session, subject, mode)
        # After the plan: what it has read, nobody can add columns to until the transaction ends.
        not_reached = (
            *_refuse_unmapped(session),
            *(f"{name}: a telephone that several people have"
              for name in get_subject_service().doubtful(session, subject)),
        )  # fmt: skip
        if plan_digest is not None and plan_digest != plan.digest:
            raise self._stale(session, subject, plan, plan_digest)
        now = datetime.now(UTC)
        expires_at = now + timedelta(days=get_settings().backup_max_age_days)
        erasure_id, words, entry = uuid4(), None, None
        sampled: tuple[str, ...] = ()
        if dry_run:
            self._try_out(session, subject, plan)
            self._remember(session, subject, plan, now)
        else:
            words, sampled = _words(session, plan)
            kind = LedgerKind.ERASE if mode is EraseMode.DELETE else LedgerKind.ANONYMIZE
            entry = get_ledger_service().enter(
                session, kind, subject.ref, actor, at=now, identity_refs=subject.identity_refs
            )
            erasure_id = entry.id
            try:
                plan = self._carry_out(session, subject, plan, fixed=plan_digest is not None)
            except BaseException:
                get_ledger_service().withdraw_object(entry)
                raise
            empty_wal_after_commit(session)
        done = Erasure(erasure_id, dry_run, plan, not_reached, expires_at, words, sampled)
        if entry is not None:
            session.execute(delete(PlannedErasure).where(PlannedErasure.subject_ref == subject.ref))
            statement = _statement(session, entry, plan.counts, plan, not_reached)
            session.add(_record(entry, ErasureStatus(done.status), statement))
        get_audit_service().record(
            session, "erasure", actor, outcome="dry_run" if dry_run else "done",
            subject=subject.ref, mode=mode, erasure=erasure_id, reason=reason,
        )  # fmt: skip
        return done

    def prove(self, erasure: Erasure) -> None:
        """
        Look for what is left of a committed erasure's person, and issue its certificate.

        Apart from the erasure: it reads the whole database, and nobody should wait for it.
        """
        if erasure.words is None:
            return
        try:
            with session_scope(read_only=True) as session:
                # One that was begun before the act was committed may hold the person, too.
                backups = get_certificate_service().backups_there(session)
            found = scan(get_engine(), DATA_MAP, erasure.words)
            with session_scope() as session:
                record = session.get_one(ErasureRecord, erasure.erasure_id)
                get_certificate_service().name_backups(record, backups)
                status = get_certificate_service().issue(
                    session, record, found, sampled=erasure.sampled
                )
            changed = [n for n, c in erasure.plan.counts.items() if any(c.values())]
            left = forget_copies(get_engine(), changed)
        except (HoldfastError, SQLAlchemyError) as err:
            # The certificate will say that the scan did not end.
            log.error("scan_failed", erasure=str(erasure.erasure_id), error=type(err).__name__)
            return
        if left:
            log.warning("statistics_kept", tables=left)
        if status is not ErasureStatus.COMPLETE:
            log.warning(
                "erasure_partial", erasure=str(erasure.erasure_id), not_reached=erasure.not_reached,
                found={f"{one.table}.{one.column}": one.cells for one in found.found},
            )  # fmt: skip

    def erase_again(
        self, session: Session, entries: Sequence[LedgerEntry], people: Mapping[str, int]
    ) -> int:
        """
        Erase as the ledger says, in a database that has not seen it yet; return how many acts.

        Args:
            people: The numbers of those who are there, by reference.
        """
        now, there, done = datetime.now(UTC), dict(people), set()
        for entry in entries:
            if (user_id := there.pop(entry.subject_ref, None)) is not None:
                subject = get_subject_service().find(session, Who(user_id))
                plan = self._plan(session, subject, MODES[entry.kind])
                carry_out_erasure(session, DATA_MAP, plan, subject.rows, now)
                done.add(entry.id)
                if session.get(ErasureRecord, entry.id) is None:
                    done_again = _statement(session, entry, plan.counts, plan)
                    self._record_again(session, entry, done_again)
        redacted = get_mention_service().redact_again(session, entries, now)
        for entry in entries:
            if entry.id in redacted and session.get(ErasureRecord, entry.id) is None:
                tables = {
                    name: {Outcome.REDACTED: rows} for name, rows in redacted[entry.id].items()
                }
                self._record_again(session, entry, _statement(session, entry, tables, None))
        return len(done | redacted.keys())

    def _record_again(
        self, session: Session, entry: LedgerEntry, statement: dict[str, Any]
    ) -> None:
        record = _record(entry, ErasureStatus.COMPLETE, statement)
        session.add(record)
        get_audit_service().record(
            session, "erasure", ITSELF, outcome="applied_again",
            subject=entry.subject_ref, mode=MODES[entry.kind], erasure=entry.id,
        )  # fmt: skip
        get_certificate_service().issue(session, record, None, state="applied_again")

    def _plan(self, session: Session, subject: Subject, mode: EraseMode) -> ErasurePlan:
        return plan_erasure(
            session,
            DATA_MAP,
            subject.rows,
            mode=mode,
            periods=get_policy_service().periods(session),
            now=datetime.now(UTC),
        )

    def _carry_out(
        self, session: Session, subject: Subject, plan: ErasurePlan, *, fixed: bool
    ) -> ErasurePlan:
        """Carry *plan* out; where others wrote meanwhile, look again, unless it is *fixed*."""
        for _ in range(_ATTEMPTS):
            try:
                with session.begin_nested():
                    carry_out_erasure(session, DATA_MAP, plan, subject.rows, datetime.now(UTC))
            except (IncompleteErasureError, ConstraintError):
                again = self._plan(session, subject, plan.mode)
                if again.digest == plan.digest:
                    raise
                if fixed:
                    raise self._stale(session, subject, again, plan.digest) from None
                plan = again
            else:
                return plan
        raise ConflictError("others keep writing rows of this person: try again")

    def _try_out(self, session: Session, subject: Subject, plan: ErasurePlan) -> None:
        """Do it and undo it: only the database knows all of its own rules."""
        with session.begin_nested() as savepoint:
            carry_out_erasure(session, DATA_MAP, plan, subject.rows, datetime.now(UTC))
            savepoint.rollback()
        session.expire_all()

    def _remember(
        self, session: Session, subject: Subject, plan: ErasurePlan, now: datetime
    ) -> None:
        """Keep what a dry run found, to say later what has changed since."""
        session.execute(delete(PlannedErasure).where(PlannedErasure.planned_at < now - _PLANS_KEPT))
        key = {"plan_digest": plan.digest, "subject_ref": subject.ref}
        if session.get(PlannedErasure, key) is None:
            tables = orjson.dumps(_by_step(plan)).decode()
            session.add(PlannedErasure(**key, tables=tables, planned_at=now))

    def _stale(
        self, session: Session, subject: Subject, plan: ErasurePlan, before: str
    ) -> StalePlanError:
        known = session.get(PlannedErasure, {"plan_digest": before, "subject_ref": subject.ref})
        old = {} if known is None else orjson.loads(known.tables)
        new = _by_step(plan)
        changed = [
            {"table": step.partition(" ")[0], "outcome": step.partition(" ")[2],
             "planned": old.get(step, [0])[0], "now": new.get(step, [0])[0]}
            for step in dict.fromkeys([*old, *new])
            if old.get(step) != new.get(step)
        ]  # fmt: skip
        return StalePlanError(
            "the person's data has changed since the dry run"
            if known is not None
            else "this is the digest of no dry run for this person",
            plan_digest=plan.digest,
            changed=changed if known is not None else [],
        )


def _refuse_unmapped(session: Session) -> tuple[str, ...]:
    """Refuse to act on a database that holds what nobody declared; return what is left out."""
    ignored = get_settings().ignored_tables
    found = unknown(session, DATA_MAP)
    not_declared = [name for name in found if name not in ignored]
    if not_declared:
        raise UnmappedError(
            "the database holds tables or columns that the data map does not know",
            unmapped=not_declared,
        )
    return found


def _words(session: Session, plan: ErasurePlan) -> tuple[Words, tuple[str, ...]]:
    """Collect what the scan looks for, while it can be read; name tables with more than that."""
    values: list[OldValue] = []
    sampled: list[str] = []
    for planned in plan.steps:
        step = planned.step
        # What a row says of a third party is looked for where that is the person erased.
        others = step.mapped.third_party_columns and step.outcome is not Outcome.REDACTED
        if not planned.rows or step.outcome is Outcome.SHARED or others:
            continue
        old = old_values(session, step.mapped, step.rows, _ROWS_LOOKED_FOR, plan.params)
        values += old.values
        if old.limit_reached or old.closed:
            sampled.append(step.mapped.name)
    return Words(values), tuple(dict.fromkeys(sampled))


def _by_step(plan: ErasurePlan) -> dict[str, list[Any]]:
    """Rows and digest per table and outcome; several steps of one kind are told together."""
    told: dict[str, list[Any]] = {}
    for planned in plan.steps:
        if planned.rows:
            known = told.setdefault(f"{planned.step.mapped.name} {planned.step.outcome}", [0, ""])
            known[0] += planned.rows
            known[1] += planned.digest
    return told


def _statement(
    session: Session,
    entry: LedgerEntry,
    tables: Tables,
    plan: ErasurePlan | None,
    not_reached: Sequence[str] = (),
) -> dict[str, Any]:
    """Say what was done, naming nobody: no reference either, which would tie two acts together."""
    backups = get_certificate_service().backups_there(session)
    # One that is finished after a crash may find backups that were made since.
    last = max([entry.recorded_at, *(each["created_at"] for each in backups)])
    expires_at = last + timedelta(days=get_settings().backup_max_age_days)
    return {
        "erasure_id": entry.id,
        "controller": get_settings().controller_name,
        "mode": MODES[entry.kind],
        "erased_at": entry.recorded_at,
        "plan_digest": plan and plan.digest,
        "tables": {
            name: {str(outcome): counts.get(outcome, 0) for outcome in Outcome}
            for name, counts in tables.items()
            if any(counts.values())
        },
        "retained": [asdict(kept) for kept in plan.retained] if plan else [],
        "not_reached": not_reached,
        "backups": backups,
        "backups_expire_at": expires_at,
    }


def _record(entry: LedgerEntry, status: ErasureStatus, statement: dict[str, Any]) -> ErasureRecord:
    return ErasureRecord(
        id=entry.id,
        subject_ref=entry.subject_ref,
        status=status,
        statement=orjson.dumps(statement, option=orjson.OPT_UTC_Z).decode(),
        erased_at=entry.recorded_at,
    )


@lru_cache(maxsize=1)
def get_erasure_service() -> ErasureService:
    return ErasureService()
