"""Alerts: once a day each, and told to the webhook signed, again and again, until it takes them."""

import base64
import traceback
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Final

import pytest
import structlog
from cryptography.exceptions import InvalidSignature
from sqlalchemy import select
from sqlalchemy.orm import Session

from backend.db_utils import session_scope
from backend.errors import RefusedError
from backend.logs import configure_logs
from backend.models import Alert, AlertKind
from backend.services import alert_service, webhook
from backend.services.alert_service import get_alert_service
from backend.services.scheduler_service import Job, SchedulerService
from backend.settings import get_settings
from tests.conftest import Service
from tests.ports import free_port
from tests.services.webhook_receiver import (
    CANARY,
    ELSEWHERE,
    SECRET,
    Clock,
    Receiver,
    checked,
    clock,
    receiver,
    set_webhook,
)

__all__ = ["clock", "receiver"]  # fixtures

KEY: Final = base64.b64decode(SECRET.removeprefix("whsec_"))
MAX_ATTEMPTS: Final = 10


def _raise(
    about: str = "retention", code: str = "boom", kind: AlertKind = AlertKind.JOB_FAILED
) -> None:
    with session_scope() as session:
        get_alert_service().raise_alert(session, kind, about, code)


def _alerts() -> list[Alert]:
    with session_scope(read_only=True) as session:
        return list(session.scalars(select(Alert).order_by(Alert.raised_at)))


def _tell() -> int:
    return get_alert_service().tell()


def test_the_same_is_raised_once_a_day_and_another_at_once(service: Service, clock: Clock) -> None:
    for _ in range(3):
        _raise()
        clock.advance(hours=1)
    assert len(_alerts()) == 1
    _raise(about="backup")
    _raise(code="bang")
    _raise(kind=AlertKind.JOB_LATE)
    assert len(_alerts()) == 4
    clock.advance(hours=21, seconds=1)
    _raise()
    assert len(_alerts()) == 5


def test_the_metrics_count_what_was_raised_within_a_day(service: Service, clock: Clock) -> None:
    _raise()
    clock.advance(hours=12)
    _raise(about="backup")
    _raise(kind=AlertKind.JOB_LATE)
    for hours, failed in ((0, 2), (13, 1)):
        clock.advance(hours=hours)
        with session_scope(read_only=True) as session:
            counts = get_alert_service().counts(session)
        wanted = {AlertKind.JOB_FAILED: failed, AlertKind.JOB_LATE: 1}
        assert counts == dict.fromkeys(AlertKind, 0) | wanted


@pytest.mark.parametrize("night", [timedelta(hours=23), timedelta(days=1, seconds=-2)])
def test_what_stands_night_after_night_is_raised_every_night(
    sqlite_service: Service, clock: Clock, night: timedelta
) -> None:
    _raise()
    clock.at += night
    _raise()
    assert len(_alerts()) == 2


def test_the_webhook_is_told_what_a_receiver_can_check_and_nothing_of_anybody(
    service: Service, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_webhook(monkeypatch, receiver.url, SECRET)

    def fail(_session: Session) -> None:
        raise RefusedError("a message that names jane@example.com")

    runner = SchedulerService()
    vars(runner)["_jobs"] = (Job("job", lambda settings: settings.retention_time, run=fail),)
    today = datetime.now(UTC)
    assert runner.tick(today) == []
    assert runner.tick(today + timedelta(days=1)) == ["job"]
    # The clock has jumped a day, so the run may be late as well.
    alert = next(alert for alert in _alerts() if alert.kind is AlertKind.JOB_FAILED)
    assert _tell() == len(_alerts()) == len(receiver.received)
    (received,) = (one for one in receiver.received if one.id == str(alert.id))
    assert received.headers["content-type"] == "application/json"
    body = checked(received, KEY)
    assert datetime.fromisoformat(body.pop("timestamp")) == alert.raised_at
    assert body == {
        "type": "holdfast.job_failed",
        "data": {"id": str(alert.id), "about": "job", "code": "refused"},
    }
    for changed in (
        replace(received, body=received.body.replace(b"refused", b"granted")),
        replace(received, headers={**received.headers, "webhook-id": "another"}),
    ):
        with pytest.raises(InvalidSignature):
            checked(changed, KEY)
    assert _tell() == 0
    assert len(receiver.received) == len(_alerts()), "what was taken is not sent again"


def _refuse(_receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    set_webhook(monkeypatch, f"http://127.0.0.1:{free_port()}/{CANARY}")


def _hang(receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webhook, "_SECONDS", 0.2)
    receiver.answer = receiver.hang


def _status(status: int | None) -> Callable[[Receiver, pytest.MonkeyPatch], None]:
    def break_(receiver: Receiver, _monkeypatch: pytest.MonkeyPatch) -> None:
        receiver.answer = lambda _received: status

    return break_


BROKEN: Final = {
    "status_500": _status(500),
    "status_404": _status(404),
    "status_302": _status(302),
    "status_307": _status(307),
    "RemoteDisconnected": _status(None),
    "ConnectionRefusedError": _refuse,
    "TimeoutError": _hang,
}


@pytest.mark.parametrize("error", BROKEN)
def test_what_was_not_taken_is_told_again_after_longer_and_longer_pauses(
    service: Service, receiver: Receiver, clock: Clock, monkeypatch: pytest.MonkeyPatch, error: str
) -> None:
    # Of those that answer, none is given up: it may take its time.
    monkeypatch.setattr(webhook, "_SECONDS", 60)
    BROKEN[error](receiver, monkeypatch)
    _raise()
    for attempt in range(1, 4):
        assert _tell() == 0
        (alert,) = _alerts()
        assert (alert.attempts, alert.error, alert.sent_at) == (attempt, error, None)
        clock.advance(minutes=2 ** (attempt - 1), seconds=-1)
        assert _tell() == 0
        assert _alerts()[0].attempts == attempt, "the pause is not over"
        clock.advance(seconds=1)
    receiver.answer = lambda _received: 200
    monkeypatch.setattr(webhook, "_SECONDS", 60)
    set_webhook(monkeypatch, receiver.url)
    assert _tell() == 1
    (alert,) = _alerts()
    assert (alert.attempts, alert.error, alert.sent_at) == (4, None, clock.at)
    assert ELSEWHERE not in {received.path for received in receiver.received}
    # A receiver knows the same alert again, and each attempt is fresh.
    assert len({(received.id, received.body) for received in receiver.received}) == 1
    checked(receiver.received[-1], KEY, clock.at)


def test_it_is_given_up_after_ten_attempts_and_others_are_told_all_the_same(
    service: Service, receiver: Receiver, clock: Clock
) -> None:
    _raise()
    bad = str(_alerts()[0].id)
    receiver.answer = lambda received: 500 if received.id == bad else 204
    for attempt in range(MAX_ATTEMPTS):
        _raise(about=f"job {attempt}")
        assert _tell() == 1
        clock.advance(minutes=2**attempt)
    assert clock.at - _alerts()[0].raised_at < timedelta(days=1), "not given up for its age"
    assert _tell() == 0
    assert [received.id for received in receiver.received].count(bad) == MAX_ATTEMPTS


@pytest.mark.parametrize(("age", "told"), [(-1, 1), (0, 0)])
def test_what_is_two_days_old_is_no_news(
    service: Service, receiver: Receiver, clock: Clock, age: int, told: int
) -> None:
    _raise()
    clock.advance(days=2, seconds=age)
    assert _tell() == told == len(receiver.received)


def test_without_a_webhook_nothing_is_told_or_counted(
    service: Service, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ALERT_WEBHOOK_URL")
    get_settings.cache_clear()
    _raise()
    assert (_tell(), _alerts()[0].attempts, receiver.received) == (0, 0, [])
    set_webhook(monkeypatch, receiver.url)
    assert _tell() == 1


@pytest.mark.parametrize("error", BROKEN)
def test_neither_address_nor_secret_is_written_anywhere(
    sqlite_service: Service,
    receiver: Receiver,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    error: str,
) -> None:
    monkeypatch.setattr(webhook, "_SECONDS", 0.2)
    # A logger keeps the level that it was first used with, which may be another test's.
    monkeypatch.setattr(alert_service, "log", structlog.get_logger(alert_service.__name__))
    configure_logs(get_settings())
    BROKEN[error](receiver, monkeypatch)
    _raise()
    assert _tell() == 0
    url = get_settings().alert_webhook_url
    assert url is not None
    assert CANARY in url.get_secret_value()
    with pytest.raises(webhook.WebhookError) as refusal:
        webhook.post(url.get_secret_value(), b"", {}, allow_private=True)
    said = "".join(capfd.readouterr()) + caplog.text
    assert "webhook_failed" in said
    with session_scope(read_only=True) as session:
        rows = str(session.execute(select(Alert.__table__)).all())
    told = "".join(traceback.format_exception(refusal.value))
    for text in (said, rows, told, repr(refusal.value), repr(get_settings()), str(get_settings())):
        assert CANARY not in text
        assert SECRET not in text
