"""One backup, proof or restore at a time: in threads, in processes, and on several machines."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Event
from uuid import UUID

import pytest
from fastapi.testclient import TestClient

from backend.errors import ConflictError
from backend.models import BackupRecord, BackupStatus
from backend.services.audit_service import COMMAND_LINE
from backend.services.backup_service import get_backup_service
from backend.services.restore_service import get_restore_service
from backend.services.setup_service import get_setup_service
from tests.backup.aftermath import leftovers, listed_are_whole, records
from tests.backup.commands import Commands, running_commands
from tests.conftest import Service

Headers = dict[str, str]


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    with running_commands(tmp_path_factory.mktemp("commands")) as commands:
        yield commands


@contextmanager
def a_backup_running() -> Iterator[None]:
    """A backup that has begun, and goes on when the block ends."""
    begun, go_on = Event(), Event()

    def hold(_record: BackupRecord) -> None:
        begun.set()
        assert go_on.wait(600)

    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(get_backup_service().create, COMMAND_LINE, begun=hold)
        assert begun.wait(60)
        try:
            yield
        finally:
            go_on.set()
    assert running.result().status is BackupStatus.COMPLETE


def create(_backup_id: UUID) -> object:
    return get_backup_service().create(COMMAND_LINE)


def start(_backup_id: UUID) -> object:
    return get_backup_service().start(COMMAND_LINE)


def verify(backup_id: UUID) -> object:
    return get_backup_service().verify(backup_id, COMMAND_LINE)


def restore(backup_id: UUID) -> object:
    return get_restore_service().restore(backup_id, COMMAND_LINE, dry_run=False, confirm=True)


def copy(_backup_id: UUID) -> object:
    return get_backup_service().copy()


ACTS = (create, start, verify, restore, copy)


def test_beside_one_every_other_act_is_told_and_the_one_goes_on(service: Service) -> None:
    backup_id = get_backup_service().create(COMMAND_LINE).id
    with a_backup_running():
        for act in ACTS:
            with pytest.raises(ConflictError, match="another backup or restore is running"):
                act(backup_id)
    assert [record.status for record in records()] == [BackupStatus.COMPLETE] * 2
    assert listed_are_whole() == []


def test_over_http_the_second_one_is_a_409(client: TestClient, admin: Headers) -> None:
    backup_id = str(get_backup_service().create(COMMAND_LINE).id)
    posts = [
        ("/security/backup/create", {}),
        ("/security/backup/create", {"wait": False}),
        (f"/security/backup/{backup_id}/verify", None),
        ("/security/backup/restore", {"backup_id": backup_id, "confirm": True}),
        ("/security/backup/restore", {"backup_id": backup_id, "dry_run": True}),
    ]
    with a_backup_running():
        answers = [client.post(path, json=body, headers=admin) for path, body in posts]
    assert {(each.status_code, each.json()["code"]) for each in answers} == {(409, "conflict")}


@pytest.mark.parametrize(
    ("service", "elsewhere"),
    [
        ("sqlite", False),
        ("sqlite", True),
        ("postgresql", True),
    ],
    indirect=["service"],
)
def test_another_process_is_told_and_does_no_harm(
    service: Service, commands: Commands, tmp_path: Path, *, elsewhere: bool
) -> None:
    # PostgreSQL's clients may be on many machines; SQLite's may have many working folders.
    environment = {
        "DATA_DIR": str(tmp_path if elsewhere else service.folder),
        "DATABASE_URL": service.url,
        "BACKUP_URL": str(service.folder / "backups"),
    }
    with a_backup_running():
        refused = commands.end("backup", "create", **environment)
        # It must not take the running one for one that was killed; that takes two seconds.
        started = commands.end("init", **environment) if elsewhere else refused
    assert (refused.code, "another backup or restore is running" in refused.said) == (2, True)
    assert "recovered" not in started.said
    assert [record.status for record in records()] == [BackupStatus.COMPLETE]
    assert listed_are_whole() == []
    assert leftovers(service) == []
    commands.run("backup", "create", **environment)


def test_a_start_beside_a_running_one_clears_up_once_that_has_ended(
    sqlite_service: Service,
) -> None:
    abandoned = sqlite_service.folder / ".holdfast-scratch-0123456789abcdef"
    with a_backup_running():
        abandoned.touch()
        get_setup_service().prepare()
        assert abandoned.exists()
    # What the scheduler does every few seconds.
    get_setup_service().recover_if_due()
    assert leftovers(sqlite_service) == []


def test_the_one_that_ends_first_lets_the_next_one_in(service: Service) -> None:
    done, told = [], []

    def attempt(_number: int) -> None:
        try:
            done.append(get_backup_service().create(COMMAND_LINE).id)
        except ConflictError as err:
            told.append(err)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(attempt, range(12)))
    assert done
    assert len(done) + len(told) == 12
    assert {record.id for record in records()} == set(done)
    assert listed_are_whole() == []
