"""The audit trail: who did what, to whom by reference, when, and how it ended."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any, Final
from uuid import UUID

import orjson
from sqlalchemy import select
from sqlalchemy.orm import Session

from backend.crypto import chain
from backend.db_utils import reading_any_text
from backend.errors import SubjectNotFoundError
from backend.models import AuditEvent, Role, User
from backend.services.chain_service import SERVICE, StoredEvent, get_chain_service
from backend.services.reference_service import reference_to


@dataclass(frozen=True, slots=True)
class Actor:
    """Who acts: a signed-in person, the command line, or the scheduler."""

    name: str
    role: Role
    user_id: int | None = None
    token_id: str | None = None
    request_id: str | None = None
    uid: UUID | None = None

    @property
    def is_admin(self) -> bool:
        return self.role is Role.ADMIN

    def ref(self, session: Session) -> str:
        """Say who acts, without a name: a person by their reference."""
        return self.name if self.uid is None else reference_to(session, self.uid)

    def during(self, request_id: str | None) -> "Actor":
        return replace(self, request_id=request_id)


# Whoever runs the command line reads the database and the key anyway.
COMMAND_LINE: Final = Actor("command line", Role.ADMIN)
SCHEDULER: Final = Actor("scheduler", Role.ADMIN)
ANYONE: Final = Actor("anonymous", Role.USER)
# Acts that were cut short, and are finished by a start or a restore.
ITSELF: Final = Actor(SERVICE, Role.ADMIN)


@dataclass(frozen=True, slots=True)
class Sought:
    """
    Which events are sought; what is `None` does not matter.

    Attributes:
        user_id: Whom they concern, where the person has an account still.
        subject_ref: Whom they concern, by the reference that outlives the account; `user_id` wins.
        by_user_id: Who acted.
        since: The first instant.
        until: The first instant that is too late.
        before: Only events with a lower number: the next page.
    """

    user_id: int | None = None
    subject_ref: str | None = None
    by_user_id: int | None = None
    action: str | None = None
    outcome: str | None = None
    since: datetime | None = None
    until: datetime | None = None
    before: int | None = None


@dataclass(frozen=True, slots=True)
class Event:
    """
    One event.

    Attributes:
        damaged: The row is none that was ever written: what of it can be read.
    """

    id: int
    at: datetime | None
    action: str
    outcome: str
    actor_ref: str
    subject_ref: str | None
    request_id: str | None
    detail: Mapping[str, Any] = field(repr=False)
    damaged: bool = False


class AuditService:
    """Writes audit rows in the transaction of the act, so that neither exists alone."""

    def read(self, session: Session, actor: Actor, sought: Sought, limit: int) -> Sequence[Event]:
        """
        Return events, newest first; that they were read is an event too.

        A row that somebody has damaged hides none of the others.

        Raises:
            SubjectNotFoundError: No account has this number.
        """
        subject = self._reference(session, sought.user_id) or sought.subject_ref
        same = {
            AuditEvent.subject_ref: subject,
            AuditEvent.actor_ref: self._reference(session, sought.by_user_id),
            AuditEvent.action: sought.action,
            AuditEvent.outcome: sought.outcome,
        }
        wanted = [column == value for column, value in same.items() if value is not None]
        if sought.since is not None:
            wanted.append(AuditEvent.at >= sought.since)
        if sought.until is not None:
            wanted.append(AuditEvent.at < sought.until)
        if sought.before is not None:
            wanted.append(AuditEvent.id < sought.before)
        with reading_any_text(session):
            rows = get_chain_service().newest(session, wanted, limit)
        self.record(session, "audit_read", actor, subject=subject, events=len(rows))
        return [_shown(row) for row in rows]

    def _reference(self, session: Session, user_id: int | None) -> str | None:
        if user_id is None:
            return None
        uid = session.scalar(select(User.uid).where(User.id == user_id))
        if uid is None:
            raise SubjectNotFoundError(f"no person has the id {user_id}")
        return reference_to(session, uid)

    def record(
        self,
        session: Session,
        action: str,
        actor: Actor,
        *,
        outcome: str = "done",
        subject: UUID | str | None = None,
        **detail: object,
    ) -> None:
        """
        Add one event; it is written with the session's commit, or the commit fails.

        Args:
            subject: `uid` of the person concerned, of which only a keyed reference is stored, or
                that reference.
            detail: Counts and ids, never personal data.
        """
        values = chain.Event(
            id=0,
            at=datetime.now(UTC),
            action=action,
            outcome=outcome,
            actor_ref=actor.ref(session),
            subject_ref=reference_to(session, subject) if isinstance(subject, UUID) else subject,
            request_id=actor.request_id,
            detail=orjson.dumps(detail, default=str).decode() if detail else None,
        )
        get_chain_service().add(session, values)


def _shown(stored: StoredEvent) -> Event:
    if stored.event is not None:
        with suppress(orjson.JSONDecodeError):
            detail = orjson.loads(stored.event.detail or "{}")
            if isinstance(detail, dict):
                return Event(*stored.event[:7], detail)
    _, _, action, outcome, actor, subject, request, *_ = map(_legible, stored.raw)
    return Event(
        stored.id, stored.at, action or "", outcome or "", actor or "", subject, request, {},
        damaged=True,
    )  # fmt: skip


def _legible(raw: object) -> str | None:
    if isinstance(raw, bytes):
        return raw.decode(errors="replace")
    # Half a surrogate is what was no UTF-8, and no answer can hold one.
    return None if raw is None else str(raw).encode(errors="replace").decode()


@lru_cache(maxsize=1)
def get_audit_service() -> AuditService:
    return AuditService()
