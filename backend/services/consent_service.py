"""Consent: an append-only history, whose newest event per purpose is the state."""

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import Final, NamedTuple
from uuid import UUID, uuid4

from sqlalchemy import bindparam, insert, select
from sqlalchemy.orm import Session

from backend.db_utils import session_scope
from backend.errors import ForbiddenError, RefusedError
from backend.models import DataConsent, LedgerKind
from backend.services.audit_service import Actor, get_audit_service
from backend.services.ledger_service import get_ledger_service
from backend.services.reference_service import reference_to
from backend.services.subject_service import get_subject_service
from backend.settings import get_settings


class UnknownPurposeError(RefusedError):
    """The purpose is not one that this service asks consent for."""

    code = "unknown_purpose"


@dataclass(frozen=True, slots=True)
class ConsentState:
    """Whether consent is given for one purpose, since when, and to which notice."""

    granted: bool = False
    since: datetime | None = None
    notice_version: str | None = None


class ConsentEvent(NamedTuple):
    """One decision; the evidence for it stays sealed."""

    id: UUID
    purpose: str
    granted: bool
    notice_version: str | None
    method: str
    recorded_at: datetime


@dataclass(frozen=True, slots=True)
class ConsentRecord:
    """A person's consent: the state per purpose, and every event, oldest first."""

    user_id: int
    purposes: dict[str, ConsentState]
    history: list[ConsentEvent]


class ConsentService:
    """Records what people agree to and tells what stands."""

    def record(
        self,
        session: Session,
        actor: Actor,
        user_id: int,
        *,
        purpose: str,
        granted: bool,
        notice_version: str | None = None,
        evidence: str | None = None,
    ) -> ConsentEvent:
        """
        Add an event to a person's consent history.

        Args:
            evidence: Where an admin records what a person said elsewhere (a signed form, a call).

        Raises:
            UnknownPurposeError: *purpose* is not in `CONSENT_PURPOSES`.
            ForbiddenError: An admin records another's consent without evidence.
        """
        purposes = get_settings().purposes
        if purpose not in purposes:
            raise UnknownPurposeError(f"purpose is one of {', '.join(purposes)}")
        if actor.user_id != user_id and not evidence:
            # GDPR art. 4(11): consent is the person's own act.
            raise ForbiddenError("consent for another person needs evidence of their own act")
        # Locked, so that two events of one person have an order.
        uid = get_subject_service().uid_of(session, user_id, lock=True)
        sought = {"user_id": user_id, "purpose": purpose}
        last = session.connection().execute(_LAST, sought).one_or_none()
        now = datetime.now(UTC)
        if last is not None and last.recorded_at >= now:
            # A clock set back must not let an older event be the newest.
            now = last.recorded_at + timedelta(microseconds=1)
        event = ConsentEvent(
            id=uuid4(),
            purpose=purpose,
            granted=granted,
            notice_version=notice_version,
            method="self" if actor.user_id == user_id else "admin",
            recorded_at=now,
        )
        if not granted and last is not None and last.granted:
            ref = reference_to(session, uid)
            entry = get_ledger_service().enter(
                session, LedgerKind.WITHDRAW_CONSENT, ref, actor, at=now, purpose=purpose
            )
            event = event._replace(id=entry.id)
        values = {**event._asdict(), "user_id": user_id, "evidence": evidence}
        session.connection().execute(_NEW, values)
        get_audit_service().record(
            session, "consent", actor, subject=uid, purpose=purpose, granted=granted
        )
        return event

    def show(self, actor: Actor, user_id: int) -> ConsentRecord:
        """
        Return a person's consent to *actor*; that somebody else has seen it is recorded.

        Manages its own transaction.

        Raises:
            SubjectNotFoundError: Nobody has this id.
        """
        own = actor.user_id == user_id
        with session_scope(read_only=own) as session:
            found = self.of(session, user_id)
            if not own:
                uid = get_subject_service().uid_of(session, user_id)
                get_audit_service().record(session, "consent_read", actor, subject=uid)
        return found

    def of(self, session: Session, user_id: int) -> ConsentRecord:
        """
        Return a person's consent; a purpose without an event is not granted.

        Raises:
            SubjectNotFoundError: Nobody has this id.
        """
        found = session.connection().execute(_EVENTS, {"user_id": user_id})
        history = [ConsentEvent._make(row) for row in found]
        if not history:
            get_subject_service().uid_of(session, user_id)
        states = {purpose: ConsentState() for purpose in get_settings().purposes}
        history.reverse()
        for event in history:
            known = states.get(event.purpose)
            since = event.recorded_at
            if known is not None and known.since and known.granted == event.granted:
                since = known.since
            states[event.purpose] = ConsentState(event.granted, since, event.notice_version)
        return ConsentRecord(user_id, states, history)


# Built once, and past the mapper: reading consent is what applications ask for most.
_events = DataConsent.__table__.c
_EVENTS: Final = (
    select(*(_events[name] for name in ConsentEvent._fields))
    .where(_events.user_id == bindparam("user_id"))
    .order_by(_events.recorded_at.desc(), _events.id.desc())
)
_NEW: Final = insert(DataConsent)
_LAST: Final = (
    select(_events.recorded_at, _events.granted)
    .where(_events.user_id == bindparam("user_id"), _events.purpose == bindparam("purpose"))
    .order_by(_events.recorded_at.desc(), _events.id.desc())
    .limit(1)
)


@lru_cache(maxsize=1)
def get_consent_service() -> ConsentService:
    return ConsentService()
