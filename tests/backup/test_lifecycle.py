"""A backup is looked at when it is made, proven again and again, and taken up where it is found."""

import threading
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import delete, select, text

from backend.db_utils import get_engine, session_scope
from backend.errors import BackupDamagedError, HoldfastError
from backend.models import BackupRecord, BackupStatus
from backend.services.audit_service import COMMAND_LINE
from backend.services.backup_service import get_backup_service
from backend.services.catalogue_service import get_catalogue_service
from backend.services.pruning_service import get_pruning_service
from backend.services.restore_service import get_restore_service
from backend.services.setup_service import get_setup_service
from tests.backup.lives import (
    WHOLE,
    Configure,
    acts,
    after_writing,
    configured,
    create,
    flip,
    parts_of,
    record,
    records,
)
from tests.backup.small_disks import room
from tests.backup.test_full_disk import ROOM, filled
from tests.conftest import Service, clear_caches, set_environment

__all__ = ["after_writing", "configured", "filled"]  # fixtures


# Looking at what was made


@pytest.mark.parametrize("verify", ["off", "read", "restore"])
def test_only_a_restore_proves_a_new_backup(
    sqlite_service: Service, configured: Configure, verify: str
) -> None:
    configured(backup_verify=verify)
    made = get_backup_service().create(COMMAND_LINE)
    assert (made.status, made.error) == (BackupStatus.COMPLETE, None)
    assert (made.verified_at is not None) == (verify == "restore")
    assert acts("backup_verified") == ["done"] * (verify == "restore")


@pytest.mark.parametrize(
    "verify",
    [
        "read",
        "restore",
    ],
)
def test_a_disk_that_keeps_other_bytes_than_it_was_given_is_found_out_at_once(
    sqlite_service: Service, configured: Configure, after_writing: Any, verify: str
) -> None:
    configured(backup_verify=verify)
    after_writing(lambda made: flip(sqlite_service.folder / "backups" / f"{made.id}.hfb"))
    with pytest.raises(BackupDamagedError):
        create()
    (found,) = records()
    assert (found.status, found.error) == (BackupStatus.COMPLETE, "backup_damaged")
    assert found.verified_at is None
    assert acts("backup_verified") == ["backup_damaged"]


def test_without_anything_to_look_at_it_damage_is_found_later(
    sqlite_service: Service, configured: Configure, after_writing: Any
) -> None:
    configured(backup_verify="off")
    after_writing(lambda made: flip(sqlite_service.folder / "backups" / f"{made.id}.hfb"))
    backup_id = create()
    assert record(backup_id).error is None
    with pytest.raises(BackupDamagedError):
        get_backup_service().verify(backup_id, COMMAND_LINE)
    assert record(backup_id).error == "backup_damaged"


def test_for_want_of_room_a_backup_stands_and_is_not_proven(
    filled: Service,
    configured: Configure,
    after_writing: Any,
) -> None:
    configured(backup_verify="restore")
    full = room(ROOM)
    after_writing(lambda _made: full.__enter__())
    try:
        made = get_backup_service().create(COMMAND_LINE)
    finally:
        full.__exit__(None, None, None)
    assert (made.status, made.verified_at, made.error) == (BackupStatus.COMPLETE, None, None)
    assert acts("backup_verified") == ["unavailable"]
    assert get_backup_service().verify(made.id, COMMAND_LINE).verified_at is not None


@pytest.mark.parametrize("part", ["key", "manifest.json"])
def test_a_part_that_is_missing_or_changed_is_damage(sqlite_service: Service, part: str) -> None:
    changed, missing = create(), create()
    flip(sqlite_service.folder / "backups" / f"{changed}.{part}")
    assert _refusal(changed).code == "backup_damaged"
    assert record(changed).error == "backup_damaged"
    (sqlite_service.folder / "backups" / f"{missing}.{part}").unlink()
    code = "not_found" if part == "manifest.json" else "backup_damaged"
    assert _refusal(missing).code == code
    assert [each.id for each in records()] == [missing, changed][part == "manifest.json" :]


def test_a_manifest_without_its_archive_is_damage(sqlite_service: Service) -> None:
    backup_id = create()
    (sqlite_service.folder / "backups" / f"{backup_id}.hfb").unlink()
    assert _refusal(backup_id).code == "backup_damaged"
    assert record(backup_id).error == "backup_damaged"


def _refusal(backup_id: UUID) -> HoldfastError:
    with pytest.raises(HoldfastError) as refusal:
        get_backup_service().verify(backup_id, COMMAND_LINE)
    return refusal.value


def test_a_proof_that_failed_for_a_moment_can_be_made_up_for(sqlite_service: Service) -> None:
    backup_id = create()
    archive = sqlite_service.folder / "backups" / f"{backup_id}.hfb"
    whole = archive.read_bytes()
    archive.write_bytes(whole[:-1])
    assert _refusal(backup_id).code == "backup_damaged"
    archive.write_bytes(whole)
    proven = get_backup_service().verify(backup_id, COMMAND_LINE)
    assert (proven.error, proven.verified_at is not None) == (None, True)


# Proving again


def test_the_one_with_the_oldest_proof_is_proven_again(sqlite_service: Service) -> None:
    first, second = create(), create()
    for backup_id in (second, first):
        get_backup_service().verify(backup_id, COMMAND_LINE)
    before = {each.id: each.verified_at for each in records()}
    assert get_backup_service().prove_next(COMMAND_LINE) == [second]
    after = {each.id: each.verified_at for each in records()}
    assert {each for each in after if after[each] != before[each]} == {second}
    assert get_backup_service().prove_next(COMMAND_LINE) == [first]


def test_a_newest_that_is_not_proven_does_not_keep_the_others_from_it(
    sqlite_service: Service,
) -> None:
    first, second = create(), create()
    for backup_id in (second, first):
        get_backup_service().verify(backup_id, COMMAND_LINE)
    newest = create()
    assert get_backup_service().prove_next(COMMAND_LINE) == [newest, second]


def test_damage_is_told_after_all_were_looked_at(sqlite_service: Service) -> None:
    old, newest = create(), create()
    get_backup_service().verify(old, COMMAND_LINE)
    flip(sqlite_service.folder / "backups" / f"{newest}.hfb")
    with pytest.raises(BackupDamagedError):
        get_backup_service().prove_next(COMMAND_LINE)
    assert record(newest).error == "backup_damaged"
    # A damaged one is not proven again and again.
    assert get_backup_service().prove_next(COMMAND_LINE) == [old]


def test_without_a_backup_there_is_nothing_to_prove(sqlite_service: Service) -> None:
    assert get_backup_service().prove_next(COMMAND_LINE) == []


# Taking up what is there


def test_backups_that_the_database_does_not_know_are_listed_and_taken_up(
    sqlite_service: Service,
) -> None:
    made = [create(), create()]
    get_backup_service().verify(made[0], COMMAND_LINE)
    with session_scope() as session:
        before = {each.id: each.sha256 for each in records()}
        session.execute(delete(BackupRecord))
    assert [each.id for each in records()] == made[::-1]
    get_setup_service().prepare()
    with session_scope(read_only=True) as session:
        found = {each.id: each for each in session.scalars(select(BackupRecord))}
    assert {key: each.sha256 for key, each in found.items()} == before
    for each in found.values():
        # Whether it restores, nobody remembers.
        assert (each.status, each.verified_at) == (BackupStatus.COMPLETE, None)
        assert each.bytes_done
    with session_scope(read_only=True) as session:
        assert get_catalogue_service().breaks(session) == []


def test_on_a_new_machine_the_backup_that_was_restored_stays(
    sqlite_service: Service, configured: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "store"
    configured(backup_url=folder)
    backup_id = create()
    set_environment(monkeypatch, tmp_path / "new", None)
    monkeypatch.setenv("BACKUP_URL", str(folder))
    clear_caches()
    get_setup_service().prepare()
    get_restore_service().restore(backup_id, COMMAND_LINE, dry_run=False, confirm=True)
    get_setup_service().prepare()
    assert parts_of(backup_id, folder) == WHOLE
    assert record(backup_id).status is BackupStatus.COMPLETE


def test_a_backup_whose_process_was_killed_behind_its_manifest_is_one(
    sqlite_service: Service, after_writing: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(get_backup_service(), "_finish", die)
        with pytest.raises(KeyboardInterrupt):
            create()
    get_setup_service().prepare()
    (found,) = records()
    assert found.status is BackupStatus.COMPLETE
    assert get_backup_service().verify(found.id, COMMAND_LINE).verified_at is not None


def test_a_manifest_that_was_changed_does_not_keep_the_service_from_starting(
    sqlite_service: Service,
) -> None:
    backup_id = create()
    with session_scope() as session:
        session.get_one(BackupRecord, backup_id).status = BackupStatus.RUNNING
    flip(sqlite_service.folder / "backups" / f"{backup_id}.manifest.json")
    get_setup_service().prepare()
    assert create()


def test_a_deletion_whose_record_could_not_be_written_is_made_up_for(
    sqlite_service: Service,
) -> None:
    old, kept = create(), create()
    get_backup_service().verify(old, COMMAND_LINE)
    get_backup_service().verify(kept, COMMAND_LINE)
    with suppress(KeyboardInterrupt), session_scope() as session:
        get_pruning_service().delete(kept, COMMAND_LINE)
        raise KeyboardInterrupt
    get_setup_service().prepare()
    with session_scope(read_only=True) as session:
        assert get_catalogue_service().age(session).newest_proven == record(old).created_at


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_backup_that_cannot_begin_is_told_to_who_does_not_wait(sqlite_service: Service) -> None:
    with get_engine().begin() as connection:
        connection.execute(text("DROP TABLE backup_records"))
    raised: list[BaseException] = []

    def start() -> None:
        try:
            get_backup_service().start(COMMAND_LINE)
        except BaseException as err:  # noqa: BLE001 - looked at below
            raised.append(err)

    caller = threading.Thread(target=start, daemon=True)
    caller.start()
    caller.join(timeout=60)
    assert len(raised) == 1
