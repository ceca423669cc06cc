"""Alerts: what a person has to look at; to the log, the metrics, and a webhook."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import Any, Final, cast
from uuid import UUID

import orjson
import structlog
from sqlalchemy import CursorResult, func, or_, select, update
from sqlalchemy.orm import Session

from backend.crypto.webhooks import signed_headers
from backend.db_utils import session_scope
from backend.models import Alert, AlertKind
from backend.services.webhook import WebhookError, post
from backend.settings import get_settings

log = structlog.get_logger(__name__)
_DAY: Final = timedelta(days=1)
# The same is not said again for so long: a night's runs, and not the next night's, which may come
# 23 hours later.
_ONCE_IN: Final = timedelta(hours=20)
_MAX_ATTEMPTS: Final = 10
_BACKOFF: Final = timedelta(minutes=1)
_AT_ONCE: Final = 20


@dataclass(frozen=True, slots=True)
class _Message:
    """What the webhook is told, and after how many attempts."""

    id: UUID
    kind: AlertKind
    about: str
    code: str
    raised_at: datetime
    attempts: int


class AlertService:
    """Raises alerts in the transaction that found their reason, and tells the webhook later."""

    def raise_alert(self, session: Session, kind: AlertKind, about: str, code: str) -> None:
        """
        Raise an alert, unless the same was raised within a day.

        Args:
            about: Name of a job or data type, or number of a record: no personal data.
            code: Of the failure.
        """
        now = datetime.now(UTC)
        same = select(Alert.id).where(
            Alert.kind == kind,
            Alert.about == about,
            Alert.code == code,
            Alert.raised_at > now - _ONCE_IN,
        )
        if session.scalar(same.limit(1)) is None:
            log.error("alert", kind=kind, about=about, code=code)
            session.add(Alert(kind=kind, about=about, code=code, raised_at=now))

    def newest(self, session: Session, limit: int) -> Sequence[Alert]:
        """The newest alerts first."""
        return session.scalars(select(Alert).order_by(Alert.raised_at.desc()).limit(limit)).all()

    def counts(self, session: Session) -> dict[AlertKind, int]:
        """How many of each kind were raised within a day."""
        found = session.execute(
            select(Alert.kind, func.count())
            .where(Alert.raised_at > datetime.now(UTC) - _DAY)
            .group_by(Alert.kind)
        )
        counts = dict.fromkeys(AlertKind, 0)
        for kind, count in found:
            counts[kind] = count
        return counts

    def tell(self) -> int:
        """Tell the webhook what it was not told; return how many it has taken."""
        if get_settings().alert_webhook_url is None:
            return 0
        told = 0
        for _ in range(_AT_ONCE):
            # One at a time: a slow webhook must not let the claims of the next ones run out.
            if (message := self._claim()) is None:
                break
            told += self._tell_one(message)
        return told

    def _claim(self) -> _Message | None:
        """Take what is due; of two processes one gets it, and a killed one's turn comes again."""
        now = datetime.now(UTC)
        with session_scope() as session:
            due = session.scalars(
                select(Alert)
                .where(
                    Alert.sent_at.is_(None),
                    Alert.attempts < _MAX_ATTEMPTS,
                    Alert.raised_at > now - 2 * _DAY,
                    or_(Alert.retry_at.is_(None), Alert.retry_at <= now),
                )
                .order_by(Alert.raised_at)
                .limit(_AT_ONCE)
            ).all()
            # Another process may have taken the first ones since they were read.
            taken = (self._take(session, alert, now) for alert in due)
            return next(filter(None, taken), None)

    def _take(self, session: Session, alert: Alert, now: datetime) -> _Message | None:
        taken = session.execute(
            update(Alert)
            .where(Alert.id == alert.id, Alert.attempts == alert.attempts)
            .values(attempts=alert.attempts + 1, retry_at=now + _BACKOFF * 2**alert.attempts)
            .execution_options(synchronize_session=False)
        )
        if cast("CursorResult[Any]", taken).rowcount != 1:
            return None
        return _Message(
            alert.id, alert.kind, alert.about, alert.code, alert.raised_at, alert.attempts + 1
        )

    def _tell_one(self, message: _Message) -> bool:
        settings, error = get_settings(), None
        body = orjson.dumps(
            {
                "type": f"holdfast.{message.kind}",
                "timestamp": message.raised_at,
                "data": {"id": message.id, "about": message.about, "code": message.code},
            }
        )
        url, secret = settings.alert_webhook_url, settings.alert_webhook_secret
        if url is None or secret is None:
            return False
        headers = signed_headers(
            secret.get_secret_value(), str(message.id), datetime.now(UTC), body
        )
        try:
            allow = settings.alert_webhook_allow_private
            post(url.get_secret_value(), body, headers, allow_private=allow)
        except WebhookError as err:
            error = err.reason
            given_up = message.attempts >= _MAX_ATTEMPTS
            log.warning("webhook_failed", alert=str(message.id), reason=error, given_up=given_up)
        with session_scope() as session:
            session.execute(
                update(Alert)
                # What another process has delivered meanwhile stays so.
                .where(Alert.id == message.id, Alert.sent_at.is_(None))
                .values(sent_at=None if error else datetime.now(UTC), error=error)
            )
        return error is None


@lru_cache(maxsize=1)
def get_alert_service() -> AlertService:
    return AlertService()
