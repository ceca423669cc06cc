"""Copies under attack: what is wrong in one store does not spread, and no act is done twice."""

import os
import shutil
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import UUID, uuid4

import pytest

from backend.backup.storage import LocalStore, Store
from backend.crypto.keyring import RootKey, parse_key
from backend.db_utils import session_scope
from backend.errors import BackupDamagedError, HoldfastError
from backend.models import LedgerKind, User
from backend.privacy.declarations import EraseMode
from backend.services.audit_service import COMMAND_LINE
from backend.services.backup_service import get_backup_service
from backend.services.catalogue_service import get_catalogue_service
from backend.services.checkpoint_service import is_checkpoint
from backend.services.compliance_service import get_compliance_service
from backend.services.ledger_service import get_ledger_service
from backend.services.pruning_service import get_pruning_service
from backend.services.reference_service import reference_to
from backend.services.rotation_service import get_rotation_service
from backend.services.setup_service import get_setup_service
from backend.services.store_service import get_store_service, using_store
from tests.backup.promises import back_up, erase, is_there, wait_for_copies
from tests.backup.stores import Folders, are_alike, away, entries, lose, objects, use_folders
from tests.conftest import KEY, OTHER_KEY, Service, clear_caches

OLD_ID = RootKey(parse_key(KEY)).key_id.hex()
JANE = "jane@example.com"


@pytest.fixture
def folders(
    sqlite_service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Folders]:
    yield use_folders(monkeypatch, tmp_path, 2)
    get_store_service().sync_due.clear()


def _configure(monkeypatch: pytest.MonkeyPatch, key: str, previous: str = "") -> None:
    monkeypatch.setenv("ENCRYPTION_KEY", key)
    monkeypatch.setenv("ENCRYPTION_KEYS_PREVIOUS", previous)
    clear_caches()
    get_setup_service().open()


def _person(email: str) -> int:
    with session_scope() as session:
        user = User(email=email, created_at=datetime.now(UTC), last_activity_at=datetime.now(UTC))
        session.add(user)
        session.flush()
        return user.id


def _delete(backup_id: UUID) -> None:
    get_pruning_service().delete(backup_id, COMMAND_LINE)


def _breaks() -> list[str]:
    with session_scope(read_only=True) as session:
        return [each.backup_id for each in get_catalogue_service().breaks(session)]


def _proves(folder: Path, backup_id: UUID) -> bool:
    with using_store(str(folder)):
        try:
            return bool(get_backup_service().verify(backup_id, COMMAND_LINE).verified_at)
        except BackupDamagedError:
            return False


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("part", ["manifest.json", "key", "hfb"])
@pytest.mark.parametrize("where", ["first", "second"])
def test_damage_in_one_store_does_not_spread_to_another(
    folders: Folders, part: str, where: str
) -> None:
    backup_id = back_up()
    whole = {"first": folders.second, "second": folders.first}[where]
    _flip(getattr(folders, where) / f"{backup_id}.{part}")
    before = objects(whole)
    get_backup_service().copy()
    assert objects(whole) == before
    assert _proves(whole, backup_id)


def test_a_damaged_header_does_not_reach_a_copy_with_a_rotation(
    folders: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    backup_id = back_up()
    old = folders.second.with_name("old")
    shutil.copytree(folders.second, old)
    _configure(monkeypatch, OTHER_KEY, KEY)
    get_rotation_service().rotate(COMMAND_LINE)
    # As it is where the copy was away during the rotation.
    lose(folders.second)
    old.rename(folders.second)
    (folders.first / f"{backup_id}.key").write_bytes(os.urandom(4096))
    get_backup_service().copy()
    assert _proves(folders.second, backup_id)


def test_a_forged_promise_in_a_copy_does_not_stop_the_installation(folders: Folders) -> None:
    jane = _person(JANE)
    back_up()
    (folders.second / f"ledger-{uuid4()}.enc").write_bytes(os.urandom(200))
    get_backup_service().copy()
    get_setup_service().prepare()
    assert is_there(jane)


def _folder(path: Path) -> None:
    path.mkdir()


def _link(path: Path) -> None:
    path.symlink_to(path.parent)


def _pipe(path: Path) -> None:
    os.mkfifo(path)


@pytest.mark.parametrize("put", [_folder, _link, _pipe])
@pytest.mark.parametrize("where", ["first", "second"])
def test_one_thing_that_is_no_object_does_not_keep_the_others_from_being_copied(
    folders: Folders, put: Callable[[Path], None], where: str
) -> None:
    jane = _person(JANE)
    back_up()
    put(getattr(folders, where) / "a-thing")
    backup_id = back_up()
    erase(jane)
    get_backup_service().copy()
    assert f"{backup_id}.manifest.json" in objects(folders.second)
    assert entries(folders.second) == entries(folders.first)


def test_what_is_none_of_ours_is_not_carried_off_site(folders: Folders) -> None:
    back_up()
    # As where DATA_DIR is the first store, or somebody had a look at a backup there.
    for name in ("encryption.key", "look.db"):
        (folders.first / name).write_bytes(b"in plain")
    get_backup_service().copy()
    assert {name.split(".")[0] for name in objects(folders.second)}.isdisjoint(
        {"encryption", "look"}
    )


@pytest.mark.parametrize("forge", [lambda note: note.replace(b'"mac": "', b'"mac": "0'), bytes])
def test_a_note_that_was_forged_deletes_nothing(
    folders: Folders, forge: Callable[[bytes], bytes]
) -> None:
    gone, kept = back_up(), back_up()
    _delete(gone)
    note = (folders.first / f"{gone}.gone.json").read_bytes()
    # Changed, or as it is: the note of another backup.
    (folders.second / f"{kept}.gone.json").write_bytes(forge(note))
    get_backup_service().copy()
    for folder in folders.all:
        assert _proves(folder, kept)


class _TakenBackError(Exception):
    """What makes a caller take an act back."""


def test_an_erasure_that_is_taken_back_is_in_no_copy(folders: Folders) -> None:
    jane = _person(JANE)

    def erase_and_fail() -> None:
        with session_scope() as session:
            get_compliance_service().erase(
                session, COMMAND_LINE, jane, EraseMode.DELETE, reason="request", dry_run=False
            )
            raise _TakenBackError

    with pytest.raises(_TakenBackError):
        erase_and_fail()
    wait_for_copies()
    assert is_there(jane)
    assert entries(folders.second) == set()


def test_an_erasure_that_is_refused_during_a_sync_is_not_carried_out_after_all(
    sqlite_service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = use_folders(monkeypatch, tmp_path, 3)
    jane = sqlite_service.user(JANE)
    with away(folders.second):
        back_up()
    begun, go_on, copy_from = threading.Event(), threading.Event(), LocalStore.copy_from

    def copy_slowly(store: LocalStore, name: str, source: Store) -> None:
        begun.set()
        assert go_on.wait(60)
        copy_from(store, name, source)

    # It is at the second store, and has not looked at the third one yet.
    monkeypatch.setattr(LocalStore, "copy_from", copy_slowly)
    copying = threading.Thread(target=get_backup_service().copy)
    copying.start()
    assert begun.wait(60)
    with session_scope() as session:
        ref = reference_to(session, session.get_one(User, jane).uid)
        entry = get_ledger_service().enter(
            session, LedgerKind.ERASE, ref, COMMAND_LINE, at=datetime.now(UTC)
        )
        # The database takes its time, and refuses.
        go_on.set()
        copying.join()
        get_ledger_service().withdraw_object(entry)
        session.rollback()
    get_backup_service().copy()
    get_setup_service().recover()
    assert is_there(jane)
    assert all(entries(folder) == set() for folder in folders.all)


def test_a_delete_that_was_killed_in_a_copy_is_finished(folders: Folders) -> None:
    gone, _kept = back_up(), back_up()
    archive = objects(folders.second)[f"{gone}.hfb"]
    _delete(gone)
    # The manifest goes first: then the process was killed.
    (folders.second / f"{gone}.hfb").write_bytes(archive)
    get_setup_service().recover()
    get_backup_service().copy()
    assert are_alike(folders), "people who were erased since are still in it"


def test_notes_of_deleted_backups_are_believed_after_a_rotation_whichever_store_is_lost(
    folders: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone, _kept = back_up(), back_up()
    _delete(gone)
    _configure(monkeypatch, OTHER_KEY, KEY)
    get_rotation_service().rotate(COMMAND_LINE)
    get_rotation_service().disable(OLD_ID, COMMAND_LINE)
    _configure(monkeypatch, OTHER_KEY)
    assert _breaks() == []
    lose(folders.first)
    get_backup_service().copy()
    assert _breaks() == []


def test_notes_that_nobody_needs_any_more_do_not_come_back_from_a_copy(folders: Folders) -> None:
    gone, _kept = back_up(), back_up()
    _delete(gone)
    later = datetime.now(UTC) + timedelta(days=91)
    get_pruning_service().prune(COMMAND_LINE, dry_run=False, now=later)
    get_backup_service().copy()
    left = [name for folder in folders.all for name in objects(folder)]
    assert [name for name in left if not is_checkpoint(name)] == []


def test_a_first_store_that_cannot_be_written_deletes_nothing_anywhere(folders: Folders) -> None:
    gone, _kept = back_up(), back_up()
    before = [objects(folder) for folder in folders.all]
    aside = folders.first.with_name("aside")
    folders.first.rename(aside)
    folders.first.write_text("no folder")
    with pytest.raises(HoldfastError):
        _delete(gone)
    folders.first.unlink()
    aside.rename(folders.first)
    assert [objects(folder) for folder in folders.all] == before
    assert _breaks() == []
