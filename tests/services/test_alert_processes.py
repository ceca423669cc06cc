"""Alerts with several processes: each told by one, and told again when that one is killed."""

import os
import signal
import subprocess
import sys
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

from sqlalchemy import select

from backend.db_utils import session_scope
from backend.models import Alert, AlertKind
from backend.services.alert_service import AlertService, get_alert_service
from tests.conftest import Service
from tests.services.webhook_receiver import (
    Clock,
    Received,
    Receiver,
    clock,
    receiver,
)

__all__ = ["clock", "receiver"]  # fixtures

ROOT: Final = Path(__file__).resolve().parents[2]


def _raise(about: str) -> None:
    with session_scope() as session:
        get_alert_service().raise_alert(session, AlertKind.JOB_FAILED, about, "boom")


def _alerts() -> list[Alert]:
    with session_scope(read_only=True) as session:
        return list(session.scalars(select(Alert)))


def test_of_processes_that_tell_at_once_one_tells_each(
    service: Service, receiver: Receiver
) -> None:
    for number in range(10):
        _raise(about=f"job {number}")
    together = threading.Barrier(4)
    told: list[int] = []

    def tell() -> None:
        together.wait(timeout=60)
        told.append(AlertService().tell())

    threads = [threading.Thread(target=tell) for _ in range(together.parties)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(told) == 10
    sent = [received.id for received in receiver.received]
    assert sorted(sent) == sorted(str(alert.id) for alert in _alerts())


def test_a_slow_webhook_does_not_make_two_processes_tell_the_same(
    sqlite_service: Service, receiver: Receiver, clock: Clock
) -> None:
    for number in range(14):
        _raise(about=f"job {number}")

    def take_five_seconds(_received: Received) -> int:
        clock.advance(seconds=5)
        if len(receiver.received) == 13:
            AlertService().tell()
        return 204

    receiver.answer = take_five_seconds
    AlertService().tell()
    sent = [received.id for received in receiver.received]
    assert sorted(sent) == sorted(str(alert.id) for alert in _alerts())


def test_what_a_killed_process_was_telling_is_told_again_by_the_same_id(
    service: Service, receiver: Receiver, clock: Clock
) -> None:
    _raise("job")
    receiver.answer = receiver.hang
    code = "from backend.services.alert_service import AlertService; AlertService().tell()"
    process = subprocess.Popen(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    receiver.wait()
    process.send_signal(signal.SIGKILL)
    assert process.wait(timeout=60) == -signal.SIGKILL
    assert (_alerts()[0].attempts, _alerts()[0].sent_at) == (1, None)
    receiver.answer = lambda _received: 204
    assert AlertService().tell() == 0, "it might still be at it"
    clock.at = datetime.now(UTC) + timedelta(minutes=1)
    assert AlertService().tell() == 1
    first, second = receiver.received
    assert (first.id, first.body) == (second.id, second.body)
