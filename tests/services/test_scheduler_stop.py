"""Stopping the scheduler: within two seconds, whatever its thread waits for."""

import threading
from typing import Final

import pytest

from backend.db_utils import session_scope
from backend.models import AlertKind
from backend.services import scheduler_service, webhook
from backend.services.alert_service import get_alert_service
from backend.services.scheduler_service import SchedulerService
from tests.conftest import Service
from tests.services.webhook_receiver import (
    Receiver,
    receiver,
)

__all__ = ["receiver"]  # fixtures

# Bounds a thread that does not end; how long a good one takes decides nothing.
_PATIENCE_SECONDS: Final = 60


def _hanging(
    receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> tuple[SchedulerService, threading.Thread]:
    """A scheduler of which the thread waits for the webhook, until it is released."""
    monkeypatch.setattr(webhook, "_SECONDS", _PATIENCE_SECONDS)
    receiver.answer = receiver.hang
    with session_scope() as session:
        get_alert_service().raise_alert(session, AlertKind.JOB_FAILED, "job", "boom")
    runner = SchedulerService()
    vars(runner)["_jobs"] = ()
    runner.start()
    receiver.wait()
    thread = runner._thread
    assert thread is not None
    return runner, thread


def test_stopping_takes_two_seconds_at_most_while_the_webhook_hangs(
    sqlite_service: Service, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert scheduler_service._STOP_SECONDS == 2
    runner, thread = _hanging(receiver, monkeypatch)
    runner.stop()
    assert thread.is_alive(), "nobody has waited for it"
    assert not runner.is_running
    receiver.released.set()
    thread.join(_PATIENCE_SECONDS)
    assert not thread.is_alive(), "and it ends when the webhook has answered"


def test_a_scheduler_that_was_stopped_ends_although_another_was_started(
    sqlite_service: Service, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner, thread = _hanging(receiver, monkeypatch)
    runner.stop()
    runner.start()
    second = runner._thread
    assert second not in (None, thread)
    receiver.released.set()
    thread.join(_PATIENCE_SECONDS)
    ended = not thread.is_alive()
    runner.stop()
    assert ended
    assert second is not None
    second.join(_PATIENCE_SECONDS)
    assert not second.is_alive()
