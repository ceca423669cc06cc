"""A real file system that is full: 503, nothing changed, nothing left, and it works with room."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import pytest
from fastapi.testclient import TestClient
from httpx2 import Response

from backend.errors import UnavailableError
from backend.models import BackupStatus
from backend.services import transfer_service
from backend.services.audit_service import COMMAND_LINE
from backend.services.backup_service import get_backup_service
from backend.services.restore_service import get_restore_service
from backend.services.setup_service import get_setup_service
from main import create_app
from tests.backup.aftermath import fill, hotels, listed_are_whole, people, records, rename
from tests.backup.small_disks import SmallDisk, small_disk
from tests.conftest import ADMIN, PASSWORD, Service, clear_caches

KIB: Final = 1024
# Of the size of the database: room for nothing, for a record of the act, for a copy, and so on.
SHARES: Final = (0, 0.3, 0.9, 1.6, 2.1, 3.1, 4.5)


@pytest.fixture
def disk(folder: Path) -> Iterator[SmallDisk]:
    """The disk that the installation's folder is on."""
    with small_disk(folder, 16) as disk:
        yield disk


@pytest.fixture
def filled(disk: SmallDisk, sqlite_service: Service) -> Service:
    """An installation on a small disk, its store included."""
    fill(400)
    return sqlite_service


@pytest.fixture
def client(filled: Service) -> Iterator[TestClient]:
    with TestClient(create_app(), raise_server_exceptions=False) as client:
        form = {"username": ADMIN, "password": PASSWORD}
        token = client.post("/auth/token", data=form).json()["access_token"]
        client.headers["Authorization"] = f"Bearer {token}"
        yield client


def until_there_is_room(disk: SmallDisk, act: Callable[[], Response], wanted: int) -> None:
    """Do *act* with more and more room; as long as it is refused, nothing may change."""
    size = (disk.folder / "holdfast.db").stat().st_size
    before, files = people(), disk.files()
    refused = 0
    for share in SHARES:
        disk.leave(int(size * share))
        answer = act()
        if answer.status_code == wanted:
            break
        assert (share, answer.status_code, answer.json()["code"]) == (share, 503, "unavailable")
        assert answer.headers["Retry-After"]
        assert (people(), disk.files() - kept(disk)) == (before, files)
        refused += 1
    assert answer.status_code == wanted
    assert refused >= 3
    disk.empty()


def kept(disk: SmallDisk) -> set[str]:
    """The old databases that restores have kept aside."""
    return {name for name in disk.files() if name.startswith("previous/")}


def test_a_backup_is_refused_until_there_is_room(
    disk: SmallDisk, filled: Service, client: TestClient
) -> None:
    get_backup_service().create(COMMAND_LINE)
    until_there_is_room(disk, lambda: client.post("/security/backup/create"), 201)
    assert {record.status for record in listed_are_whole()} == {BackupStatus.FAILED}
    assert {record.error for record in listed_are_whole()} == {"unavailable"}


def test_a_restore_is_refused_until_there_is_room(
    disk: SmallDisk, filled: Service, client: TestClient
) -> None:
    backup_id = get_backup_service().create(COMMAND_LINE).id
    rename("live")
    body = {"backup_id": str(backup_id), "confirm": True}
    until_there_is_room(disk, lambda: client.post("/security/backup/restore", json=body), 200)
    assert hotels() == {"saved"}


def test_a_restore_that_found_no_room_keeps_no_database_aside(
    disk: SmallDisk, filled: Service, client: TestClient
) -> None:
    body = {"backup_id": str(get_backup_service().create(COMMAND_LINE).id), "confirm": True}
    size = (filled.folder / "holdfast.db").stat().st_size
    # What is built fits, and the copy of the old one does; the new pages do not.
    for share in (2.1, 2.3, 2.5):
        disk.leave(int(size * share))
        assert client.post("/security/backup/restore", json=body).status_code == 503
    assert kept(disk) == set()


def test_a_proof_is_refused_until_there_is_room_and_the_backup_is_not_called_damaged(
    disk: SmallDisk, filled: Service, client: TestClient
) -> None:
    backup_id = get_backup_service().create(COMMAND_LINE).id
    path = f"/security/backup/{backup_id}/verify"
    until_there_is_room(disk, lambda: client.post(path), 200)
    (record,) = records()
    assert (record.error, record.verified_at is None) == (None, False)


@pytest.mark.parametrize("carried", [False, True], ids=["itself", "carried"])
def test_a_store_that_is_full_keeps_what_it_has(
    sqlite_service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, carried: bool
) -> None:
    if carried:
        monkeypatch.setattr(transfer_service, "SMALL_BYTES", 0)
    fill(900)
    with small_disk(tmp_path, 4) as disk:
        monkeypatch.setenv("BACKUP_URL", str(disk.folder / "store"))
        clear_caches()
        get_setup_service().open()
        first = get_backup_service().create(COMMAND_LINE).id
        files = disk.files()
        # Nothing fits; then the header; then a part of the archive.
        for left in (0, 8 * KIB, 32 * KIB):
            disk.leave(left)
            with pytest.raises(UnavailableError, match="No space left on device"):
                get_backup_service().create(COMMAND_LINE)
            assert disk.files() == files
            assert (records()[0].status, records()[0].error) == (BackupStatus.FAILED, "unavailable")
        disk.empty()
        get_backup_service().create(COMMAND_LINE)
        get_backup_service().verify(first, COMMAND_LINE)
        assert len(listed_are_whole()) == 3


def test_a_place_to_look_at_a_backup_that_is_full_is_left_empty(
    sqlite_service: Service, tmp_path: Path
) -> None:
    fill(900)
    backup_id = get_backup_service().create(COMMAND_LINE).id
    with small_disk(tmp_path, 8) as disk:
        for left in (0, 100 * KIB, 300 * KIB):
            disk.leave(left)
            with pytest.raises(UnavailableError):
                get_restore_service().restore_to(
                    backup_id, COMMAND_LINE, str(disk.folder / "look.db")
                )
            assert list(disk.folder.iterdir()) == [disk.folder / "ballast"]
        disk.empty()
        get_restore_service().restore_to(backup_id, COMMAND_LINE, str(disk.folder / "look.db"))
        assert disk.files() == {"look.db"}
