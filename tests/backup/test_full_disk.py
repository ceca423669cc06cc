"""A disk that takes no more: each act is refused, changes and leaves nothing, and works later."""

from collections.abc import Callable
from pathlib import Path
from typing import Final

import pytest
from fastapi.testclient import TestClient
from sqlalchemy.exc import OperationalError

from backend.backup.storage import LocalStore
from backend.db_utils import session_scope
from backend.errors import HoldfastError, UnavailableError
from backend.models import BackupStatus
from backend.privacy.declarations import EraseMode
from backend.services.audit_service import COMMAND_LINE
from backend.services.backup_service import get_backup_service
from backend.services.catalogue_service import get_catalogue_service
from backend.services.compliance_service import get_compliance_service
from backend.services.restore_service import get_restore_service
from backend.services.retention_service import get_retention_service
from backend.services.rotation_service import get_rotation_service
from backend.services.sample_service import get_sample_service
from backend.services.setup_service import get_setup_service
from main import create_app
from tests.backup.small_disks import room
from tests.conftest import ADMIN, KEY, OTHER_KEY, PASSWORD, Run, Service, clear_caches
from tests.privacy.people import dump, retire, without

# Room for the log of a small transaction, and for no copy of the database.
ROOM: Final = 160 * 1024
RECORDS: Final = ("audit_events", "backup_records")


@pytest.fixture
def filled(sqlite_service: Service) -> Service:
    with session_scope() as session:
        get_sample_service().load(session, COMMAND_LINE, count=900, guests=90)
    # Closed, SQLite moves its log into the file and starts a new one.
    clear_caches()
    get_setup_service().open()
    assert (sqlite_service.folder / "holdfast.db").stat().st_size > 2 * ROOM
    return sqlite_service


def files(service: Service) -> set[str]:
    """What lies there, without SQLite's own side files."""
    found = {path.relative_to(service.folder).as_posix() for path in service.folder.rglob("*")}
    return {name for name in found if not name.endswith(("-wal", "-shm"))} - {"backup.lock"}


def refused(act: Callable[[], object], service: Service) -> HoldfastError:
    before, there = without(dump(), {}, *RECORDS), files(service)
    with room(ROOM), pytest.raises(HoldfastError) as refusal:
        act()
    assert without(dump(), {}, *RECORDS) == before
    assert files(service) == there
    return refusal.value


def backup() -> None:
    get_backup_service().create(COMMAND_LINE)


def test_retention_ends_whole_batches_and_the_next_run_the_rest(filled: Service) -> None:
    def gone() -> int:
        return sum(row["anonymized_at"] is not None for row in dump()["bookings"].values())

    service = get_retention_service()
    due = service.apply(COMMAND_LINE, dry_run=True, data_type="booking")
    with room(ROOM), pytest.raises(OperationalError):
        service.apply(COMMAND_LINE, dry_run=False, data_type="booking", plan_digest=due.plan_digest)
    with session_scope(read_only=True) as session:
        ((failed,), _) = service.logs(session, 10, 0, data_type="booking")
    # What the log says is what went: whole batches, and not all of them.
    assert failed.affected == gone() < due.affected
    assert retire().affected >= due.affected - failed.affected
    assert gone() == due.affected


def test_a_backup_leaves_nothing_behind(filled: Service) -> None:
    (filled.folder / "backups").mkdir(mode=0o700)
    assert refused(backup, filled).status == 503
    with session_scope(read_only=True) as session:
        (failed,) = get_catalogue_service().records(session)
        assert (failed.status, failed.error) == (BackupStatus.FAILED, "unavailable")
    backup()
    with session_scope(read_only=True) as session:
        assert get_catalogue_service().records(session)[0].status is BackupStatus.COMPLETE


def test_a_restore_leaves_the_live_database_as_it_was(filled: Service) -> None:
    backup_id = get_backup_service().create(COMMAND_LINE).id

    def restore() -> None:
        get_restore_service().restore(backup_id, COMMAND_LINE, dry_run=False, confirm=True)

    assert refused(restore, filled).status == 503
    restore()


def test_an_erasure_changes_nothing_and_promises_nothing(filled: Service) -> None:
    (filled.folder / "backups").mkdir(mode=0o700)

    def erase() -> None:
        with session_scope() as session:
            get_compliance_service().erase(
                session, COMMAND_LINE, 2, EraseMode.DELETE, reason="art. 17", dry_run=False
            )

    before = dump()
    with room(0), pytest.raises(UnavailableError):
        erase()
    assert dump() == before
    assert LocalStore(str(filled.folder / "backups")).names("", "") == []
    erase()


def test_over_http_it_is_told_as_not_available_now(filled: Service) -> None:
    with TestClient(create_app(), raise_server_exceptions=False) as client:
        form = {"username": ADMIN, "password": PASSWORD}
        token = client.post("/auth/token", data=form).json()["access_token"]
        header = {"Authorization": f"Bearer {token}"}
        body = {"purpose": "marketing", "granted": True, "evidence": "form"}
        before = without(dump(), {}, *RECORDS)
        with room(0):
            answer = client.post("/security/data/consent/2", json=body, headers=header)
        with room(ROOM):
            made = client.post("/security/backup/create", headers=header)
        assert (answer.status_code, made.status_code) == (503, 503)
        assert without(dump(), {}, *RECORDS) == before
        later = client.post("/security/data/consent/2", json=body, headers=header)
        assert later.status_code == 201


def test_a_rotation_that_was_stopped_goes_on_later(
    filled: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    backup_id = get_backup_service().create(COMMAND_LINE).id
    monkeypatch.setenv("ENCRYPTION_KEY", OTHER_KEY)
    monkeypatch.setenv("ENCRYPTION_KEYS_PREVIOUS", KEY)
    clear_caches()
    get_setup_service().open()
    with room(ROOM), pytest.raises(OperationalError):
        get_rotation_service().rotate(COMMAND_LINE)
    assert get_rotation_service().rotate(COMMAND_LINE).finished
    get_backup_service().verify(backup_id, COMMAND_LINE)


def test_an_export_to_a_file_leaves_no_half_of_it(
    filled: Service, run: Run, tmp_path: Path
) -> None:
    target = tmp_path / "out" / "export.json"
    target.parent.mkdir()
    with room(512):
        assert run("export", "2", "-o", target).code != 0
    assert list(target.parent.iterdir()) == []
    assert run("export", "2", "-o", target).code == 0
    assert target.exists()
