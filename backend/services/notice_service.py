"""Notices to inactive people: whom to tell before their account ends, and who was told."""

from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import Final
from uuid import UUID, uuid4

from sqlalchemy import ColumnElement, delete, false, insert, or_, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from backend.db_utils import session_scope
from backend.errors import ConflictError, NotFoundError
from backend.models import DATA_MAP, InactivityNotice, Role, User
from backend.privacy.declarations import EraseMode
from backend.privacy.due import Clockwork, due_rows
from backend.services.audit_service import Actor, get_audit_service
from backend.services.policy_service import get_policy_service
from backend.settings import get_settings

_ROWS: Final = 1_000
_LONG_AGO: Final = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class Notice:
    """Somebody to be told, and at which address; `None` where there is none."""

    id: UUID
    user_id: int
    email: str | None
    ends_at: datetime
    queued_at: datetime
    sent_at: datetime | None


class NoticeService:
    """A queue that a sender of mail drains; with `RETENTION_NOTICE_DAYS=0` nobody is told."""

    def bring_up(self, now: datetime) -> None:
        """
        Queue who becomes due within the days of notice, and drop who was active since.

        Manages its own transactions, of so many people each.
        """
        ahead = timedelta(days=get_settings().retention_notice_days)
        if not ahead:
            return
        with session_scope() as session:
            soon = _due(session, now + ahead)
            kept = select(User.id).where(User.id == InactivityNotice.user_id, soon)
            # Queued in the future by a clock that was ahead, they would never be told long enough.
            never = InactivityNotice.queued_at > now
            session.execute(
                delete(InactivityNotice).where(
                    or_(never, ~kept.correlate(InactivityNotice).exists())
                )
            )
        last: int | None = 0
        while last is not None:
            # Another run has queued some of them, or somebody was erased: look again.
            with suppress(IntegrityError), session_scope() as session:
                last = _queue(session, soon, last, now, now + ahead)

    def told(self, data_type: str, now: datetime) -> ColumnElement[bool] | None:
        """Return the predicate for people who were told long enough ago; `None`: all may go."""
        ahead = timedelta(days=get_settings().retention_notice_days)
        if not ahead or DATA_MAP.by_data_type[data_type] is not DATA_MAP.subject:
            return None
        told = select(InactivityNotice.user_id).where(
            InactivityNotice.queued_at <= now - ahead,
            # Fewer days since do not break what was told.
            InactivityNotice.ends_at <= now,
        )
        return DATA_MAP.subject.key.in_(told)

    def count_as_told(self, restored: Session, uids: Collection[UUID]) -> None:
        """Let retention end those again who have gone since the backup: they were told then."""
        gone = restored.scalars(
            select(User.id).where(
                User.uid.in_(uids),
                User.role == Role.USER,
                User.id.not_in(select(InactivityNotice.user_id)),
            )
        )
        rows = [
            {"id": uuid4(), "user_id": user_id}
            | dict.fromkeys(("ends_at", "queued_at", "sent_at"), _LONG_AGO)
            for user_id in gone
        ]
        if rows:
            restored.execute(insert(InactivityNotice), rows)

    def waiting(self, session: Session, actor: Actor, limit: int) -> Sequence[Notice]:
        """Who is still to be told, those first who wait longest; whose was read is recorded."""
        rows = session.execute(
            select(InactivityNotice, User.email, User.uid)
            .join(User, User.id == InactivityNotice.user_id)
            .where(InactivityNotice.sent_at.is_(None))
            .order_by(
                # Who has no address is told in another way, and stands in nobody's.
                User.email.is_(None),
                InactivityNotice.queued_at,
                InactivityNotice.id,
            )
            .limit(limit)
        ).all()
        for notice, _, uid in rows:
            get_audit_service().record(session, "notice_read", actor, subject=uid, notice=notice.id)
        return [
            Notice(n.id, n.user_id, email, n.ends_at, n.queued_at, n.sent_at)
            for n, email, _ in rows
        ]

    def sent(self, session: Session, actor: Actor, notice_id: UUID) -> None:
        """
        Note that somebody was told.

        Raises:
            NotFoundError: No such notice, or the person was active since.
            ConflictError: They were told before.
        """
        # Of two senders at once, one.
        noted = (
            update(InactivityNotice)
            .where(InactivityNotice.id == notice_id, InactivityNotice.sent_at.is_(None))
            .values(sent_at=datetime.now(UTC))
            .returning(InactivityNotice.user_id)
        )
        user_id = session.scalar(noted)
        if user_id is None and session.get(InactivityNotice, notice_id) is None:
            raise NotFoundError(f"no notice has the id {notice_id}")
        if user_id is None:
            raise ConflictError(f"notice {notice_id} was sent before")
        person = session.get_one(User, user_id)
        get_audit_service().record(
            session, "notice_sent", actor, subject=person.uid, notice=notice_id
        )

    def cancel(self, session: Session, user_id: int) -> None:
        """Drop the notice of somebody who was active."""
        session.execute(delete(InactivityNotice).where(InactivityNotice.user_id == user_id))


def _due(session: Session, at: datetime) -> ColumnElement[bool]:
    """Return the predicate for people who are due at that time; nobody where the policy is off."""
    policy = next(
        policy
        for policy in get_policy_service().policies(session)
        if DATA_MAP.by_data_type[policy.data_type] is DATA_MAP.subject
    )
    if not policy.enabled:
        return false()
    periods = get_policy_service().periods(session)
    mode = EraseMode(policy.action.value)
    return due_rows(DATA_MAP, Clockwork(policy.data_type, mode, periods, now=at))


def _queue(
    session: Session, soon: ColumnElement[bool], last: int, now: datetime, ends_at: datetime
) -> int | None:
    """Queue the next people after number *last*; return the last of them, or `None`."""
    told = select(InactivityNotice.id).where(InactivityNotice.user_id == User.id)
    found = session.scalars(
        select(User.id)
        .where(soon, User.id > last, ~told.correlate(User).exists())
        .order_by(User.id)
        .limit(_ROWS)
        # Whoever signs in meanwhile cancels what is queued here.
        .with_for_update()
    ).all()
    if not found:
        return None
    rows = [
        {"id": uuid4(), "user_id": user_id, "ends_at": ends_at, "queued_at": now}
        for user_id in found
    ]
    session.execute(insert(InactivityNotice), rows)
    return found[-1]


@lru_cache(maxsize=1)
def get_notice_service() -> NoticeService:
    return NoticeService()
