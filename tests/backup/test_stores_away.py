"""A copy that is away holds nobody up, and gets later what it missed."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from backend.db_utils import session_scope
from backend.models import BackupRecord
from backend.services.catalogue_service import get_catalogue_service
from backend.services.setup_service import get_setup_service
from backend.services.store_service import get_store_service, using_store
from tests.backup.promises import back_up, erase, is_there, restore, wait_for_copies
from tests.backup.s3_server import REGION, CuttableLine, S3Server, cuttable_line
from tests.backup.stores import (
    Folders,
    are_alike,
    away,
    delete,
    entries,
    folders,
    ids_of,
    listed,
    objects,
    tick,
    use_stores,
)
from tests.conftest import Run, Service
from tests.privacy.people import plant

__all__ = ["folders"]  # a fixture


def test_while_a_copy_is_away_everything_goes_on_and_a_tick_makes_up_for_it(
    folders: Folders,
) -> None:
    kept, gone = back_up(), back_up()
    jane = plant("A").id
    with away(folders.second):
        erase(jane)
        wait_for_copies()
        assert get_store_service().sync_due.is_set()
        tick()
        assert get_store_service().sync_due.is_set(), "it is away still"
    assert entries(folders.second) == set()
    tick()
    assert are_alike(folders)
    assert not get_store_service().sync_due.is_set()
    assert set(listed()) == {kept, gone}


def test_a_backup_that_is_made_while_a_copy_is_away_is_complete_and_copied_by_the_next_sync(
    folders: Folders, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    with away(folders.second):
        backup_id = back_up()
    assert listed() == [backup_id]
    assert objects(folders.second) == {}
    assert get_store_service().sync_due.is_set()
    # Else what was logged stands before the command's answer.
    capsys.readouterr()
    synced = run("backup", "sync", "--json").json
    # Three of the backup, and a checkpoint of the audit trail.
    assert (synced["copied"], synced["removed"], synced["failed"]) == (4, 0, [])
    assert are_alike(folders)
    assert run("backup", "sync", "--json").json["copied"] == 0


def test_a_backup_that_is_made_while_a_copy_is_away_is_copied_by_a_tick(folders: Folders) -> None:
    with away(folders.second):
        back_up()
    tick()
    assert are_alike(folders)


def test_what_a_process_that_has_ended_could_not_copy_is_copied_by_the_next_one(
    folders: Folders,
) -> None:
    jane = plant("A").id
    with away(folders.second):
        erase(jane)
    assert get_store_service().sync_due.is_set()
    get_store_service.cache_clear()
    get_setup_service().recover()
    tick()
    assert entries(folders.second) == entries(folders.first)


def test_a_backup_that_is_deleted_while_a_copy_is_away_does_not_come_back_with_it(
    folders: Folders,
) -> None:
    gone, kept = back_up(), back_up()
    with away(folders.second):
        delete(gone)
    tick()
    assert listed() == [kept]
    assert are_alike(folders)
    assert not [name for name in objects(folders.second) if name.startswith(f"{gone}.hfb")]


@pytest.fixture
def line(s3_server: S3Server) -> Iterator[CuttableLine]:
    with cuttable_line(s3_server.endpoint_url) as line:
        yield line


def test_a_bucket_far_away_holds_nobody_up_and_gets_its_copies_later(
    sqlite_service: Service, tmp_path: Path, s3_bucket: str, line: CuttableLine,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", line.url)
    monkeypatch.setenv("AWS_REGION", REGION)
    first, far = tmp_path / "first", f"s3://{s3_bucket}/far"
    use_stores(monkeypatch, first, far)
    gone, kept = back_up(), back_up()
    line.hang_up()
    delete(gone)
    erase(plant("A").id)
    latest = back_up()
    assert [record.id for record in _records()] == [latest, kept]
    wait_for_copies()
    assert get_store_service().sync_due.is_set()
    line.is_open = True
    tick()
    assert not get_store_service().sync_due.is_set()
    with using_store(far):
        assert [record.id for record in _records()] == [latest, kept]
        assert restore(latest, dry_run=True).backup_id == latest
    assert not is_there(2)


def _records() -> list[BackupRecord]:
    with session_scope(read_only=True) as session:
        return get_catalogue_service().records(session)


@pytest.fixture
def nowhere(monkeypatch: pytest.MonkeyPatch) -> str:
    """A bucket at an address where nobody listens."""
    pytest.importorskip("boto3", reason="boto3 is not installed: see requirements-parts.txt")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:1")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION"):
        monkeypatch.setenv(name, "nobody")
    return "s3://nowhere/at-all"


def test_over_the_command_line_a_sync_that_reached_not_all_stores_ends_with_an_error(
    folders: Folders, run: Run, nowhere: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BACKUP_URL", f"{folders.first},{nowhere},{folders.second}")
    assert run("backup", "create").code == 0, "it is made and lies in the first store"
    synced = run("backup", "sync")
    assert (nowhere in synced.out + synced.err, ids_of(folders.second)) == (
        True, ids_of(folders.first),
    )  # fmt: skip
    assert synced.code == 1


def test_a_copy_that_is_away_keeps_nobody_from_starting(folders: Folders, run: Run) -> None:
    backup_id = back_up()
    with away(folders.second):
        get_setup_service().prepare()
        assert run("backup", "restore", str(backup_id), "--confirm").code == 0
