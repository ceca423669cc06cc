"""Notices to inactive people: whom to tell before their account ends, and who was told."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import Final
from uuid import UUID, uuid4

from sqlalchemy import ColumnElement, delete, insert, select
from sqlalchemy.orm import Session

from backend.errors import ConflictError, NotFoundError
from backend.models import DATA_MAP, InactivityNotice, User
from backend.privacy.declarations import EraseMode
from backend.privacy.due import Clockwork, due_rows
from backend.services.audit_service import Actor, get_audit_service
from backend.services.policy_service import get_policy_service
from backend.settings import get_settings

_ROWS: Final = 1_000


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

    def bring_up(self, session: Session, now: datetime) -> None:
        """Queue who becomes due within the days of notice, and drop who was active since."""
        ahead = timedelta(days=get_settings().retention_notice_days)
        subject = DATA_MAP.subject
        policy = next(
            policy
            for policy in get_policy_service().policies(session)
            if DATA_MAP.by_data_type[policy.data_type] is subject
        )
        if not ahead or not policy.enabled:
            return
        clockwork = Clockwork(
            policy.data_type,
            EraseMode(policy.action.value),
            get_policy_service().periods(session),
            now=now + ahead,
        )
        soon = due_rows(DATA_MAP, clockwork)
        told = select(InactivityNotice.user_id)
        session.execute(
            delete(InactivityNotice).where(
                InactivityNotice.user_id.not_in(select(User.id).where(soon))
            )
        )
        new = select(User.id, User.last_activity_at).where(soon, User.id.not_in(told))
        while found := session.execute(new.limit(_ROWS)).all():
            rows = [
                {
                    "id": uuid4(),
                    "user_id": row.id,
                    "ends_at": max(policy.period.end(row.last_activity_at), now + ahead),
                    "queued_at": now,
                }
                for row in found
            ]
            session.execute(insert(InactivityNotice), rows)

    def told(self, data_type: str, now: datetime) -> ColumnElement[bool] | None:
        """Return the predicate for people who were told long enough ago; `None`: all may go."""
        ahead = timedelta(days=get_settings().retention_notice_days)
        if not ahead or DATA_MAP.by_data_type[data_type] is not DATA_MAP.subject:
            return None
        told = select(InactivityNotice.user_id).where(InactivityNotice.queued_at <= now - ahead)
        return DATA_MAP.subject.key.in_(told)

    def waiting(self, session: Session, limit: int) -> Sequence[Notice]:
        """Who is still to be told, those first who wait longest."""
        rows = session.execute(
            select(InactivityNotice, User.email)
            .join(User, User.id == InactivityNotice.user_id)
            .where(InactivityNotice.sent_at.is_(None))
            .order_by(InactivityNotice.queued_at, InactivityNotice.id)
            .limit(limit)
        )
        return [
            Notice(n.id, n.user_id, email, n.ends_at, n.queued_at, n.sent_at) for n, email in rows
        ]

    def sent(self, session: Session, actor: Actor, notice_id: UUID) -> None:
        """
        Note that somebody was told.

        Raises:
            NotFoundError: No such notice, or the person was active since.
            ConflictError: They were told before.
        """
        notice = session.get(InactivityNotice, notice_id)
        if notice is None:
            raise NotFoundError(f"no notice has the id {notice_id}")
        if notice.sent_at is not None:
            raise ConflictError(f"notice {notice_id} was sent before")
        notice.sent_at = datetime.now(UTC)
        person = session.get_one(User, notice.user_id)
        get_audit_service().record(
            session, "notice_sent", actor, subject=person.uid, notice=notice_id
        )

    def cancel(self, session: Session, user_id: int) -> None:
        """Drop the notice of somebody who was active."""
        session.execute(delete(InactivityNotice).where(InactivityNotice.user_id == user_id))


@lru_cache(maxsize=1)
def get_notice_service() -> NoticeService:
    return NoticeService()
