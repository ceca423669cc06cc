"""Stopping the scheduler: within two seconds, whatever its thread waits for."""

import time

from backend.db_utils import session_scope
from backend.models import AlertKind
from backend.services.alert_service import get_alert_service
from backend.services.scheduler_service import SchedulerService
from tests.conftest import Service
from tests.services.webhook_receiver import (
    Receiver,
    receiver,
)

__all__ = ["receiver"]  # fixtures


def _hanging(receiver: Receiver) -> SchedulerService:
    """A scheduler of which the thread waits for the webhook."""
    receiver.answer = receiver.hang
    with session_scope() as session:
        get_alert_service().raise_alert(session, AlertKind.JOB_FAILED, "job", "boom")
    runner = SchedulerService()
    vars(runner)["_jobs"] = ()
    runner.start()
    receiver.wait()
    assert runner.is_running
    return runner


def test_stopping_takes_two_seconds_at_most_while_the_webhook_hangs(
    sqlite_service: Service, receiver: Receiver
) -> None:
    runner = _hanging(receiver)
    thread = runner._thread
    begun = time.monotonic()
    runner.stop()
    assert time.monotonic() - begun < 2.5
    assert not runner.is_running
    receiver.released.set()
    assert thread is not None
    thread.join(timeout=10)
    assert not thread.is_alive(), "and it ends when the webhook has answered"


def test_a_scheduler_that_was_stopped_ends_although_another_was_started(
    sqlite_service: Service, receiver: Receiver
) -> None:
    runner = _hanging(receiver)
    thread = runner._thread
    runner.stop()
    runner.start()
    receiver.released.set()
    assert thread is not None
    thread.join(timeout=2)
    ended = not thread.is_alive()
    runner.stop()
    thread.join(timeout=10)
    assert ended
