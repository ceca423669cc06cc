"""How far a backup is: in its record while it runs, and for a caller who does not wait."""

import time
from threading import Thread
from threading import enumerate as enumerate_threads
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import select
from sqlalchemy.exc import OperationalError

from backend.db_utils import get_engine, session_scope
from backend.models import BackupRecord, BackupStatus
from backend.services import backup_service
from backend.services.audit_service import COMMAND_LINE
from backend.services.backup_service import get_backup_service
from tests.backup.aftermath import fill, leftovers
from tests.backup.small_disks import room
from tests.conftest import Service
from tests.privacy.people import many_rows

Headers = dict[str, str]


def test_the_record_says_how_far_it_is_while_it_runs(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Now and then is too seldom for so few rows.
    monkeypatch.setattr(backup_service, "_PROGRESS_SECONDS", 0)
    fill(20)
    many_rows(2, 30_000, "long words " * 20)
    seen: list[int] = []
    told: list[tuple[int, int]] = []

    def look() -> None:
        running = select(BackupRecord.bytes_done).where(BackupRecord.status == BackupStatus.RUNNING)
        with session_scope(read_only=True) as session:
            seen.extend(done or 0 for done in session.scalars(running))

    class LookedAt(backup_service._Recorder):
        def __call__(self, done: int, total: int) -> None:
            super().__call__(done, total)
            look()

    monkeypatch.setattr(backup_service, "_Recorder", LookedAt)
    record = get_backup_service().create(
        COMMAND_LINE,
        begun=lambda _: look(),
        progress=lambda done, total: told.append((done, total)),
    )
    assert seen == sorted(seen)
    assert seen[0] == 0
    assert record.bytes_done is not None
    assert 0 < seen[-1] <= record.bytes_done
    # What the command line draws its bar from.
    assert told == sorted(told)
    assert {total for _, total in told} == {told[0][1]}
    assert told[-1][0] <= record.bytes_done


@pytest.mark.parametrize("service", ["postgresql"], indirect=True)
def test_a_proof_never_goes_back(service: Service) -> None:
    fill(20)
    many_rows(2, 12_000, "long words " * 20)
    backup_id = get_backup_service().create(COMMAND_LINE).id
    told: list[int] = []
    get_backup_service().verify(
        backup_id, COMMAND_LINE, progress=lambda done, _total: told.append(done)
    )
    assert told == sorted(told)


def ended(client: TestClient, admin: Headers, made: dict[str, Any]) -> dict[str, Any]:
    """Wait until a backup is not running any more, and return it."""
    end = time.monotonic() + 60
    while made["status"] == "running":
        assert time.monotonic() < end
        time.sleep(0.02)
        made = client.get(f"/security/backup/{made['id']}", headers=admin).json()
    # It still looks at the backup, and copies it.
    for thread in enumerate_threads():
        if thread.name == "backup":
            thread.join(60)
    return made


def test_who_does_not_wait_is_told_at_once_and_finds_out_later(
    client: TestClient, admin: Headers, service: Service
) -> None:
    answer = client.post("/security/backup/create", json={"wait": False}, headers=admin)
    assert (answer.status_code, answer.json()["status"]) == (201, "running")
    made = ended(client, admin, answer.json())
    assert (made["status"], made["error"]) == ("complete", None)
    assert made["bytes_done"] > made["size_bytes"] > 0


def test_who_does_not_wait_finds_out_that_it_failed(
    client: TestClient, admin: Headers, service: Service
) -> None:
    fill(900)
    # Closed, SQLite moves its log into the file and starts a new one, which has room to grow.
    get_engine().dispose()
    with room(160 * 1024):
        answer = client.post("/security/backup/create", json={"wait": False}, headers=admin)
        assert (answer.status_code, answer.json()["status"]) == (201, "running")
        made = ended(client, admin, answer.json())
    assert (made["status"], made["error"]) == ("failed", "unavailable")
    assert leftovers(service) == []


def test_who_does_not_wait_is_told_what_keeps_it_from_beginning(sqlite_service: Service) -> None:
    told: list[Exception] = []

    def start() -> None:
        try:
            get_backup_service().start(COMMAND_LINE)
        except OperationalError as err:
            told.append(err)

    # No record can be written. In a thread, for who is told nothing would wait for ever.
    waiting = Thread(target=start, daemon=True)
    with room(0):
        waiting.start()
        waiting.join(timeout=60)
    assert len(told) == 1
