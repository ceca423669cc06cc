"""Several stores: the first one is written, the others have copies, and any of them may be lost."""

import shutil
import stat
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from backend.crypto import keyring
from backend.crypto.keyring import RootKey, parse_key
from backend.db_utils import session_scope
from backend.errors import HoldfastError
from backend.models import BackupStatus
from backend.services.audit_service import COMMAND_LINE
from backend.services.backup_service import get_backup_service
from backend.services.catalogue_service import get_catalogue_service
from backend.services.consent_service import get_consent_service
from backend.services.rotation_service import get_rotation_service
from backend.services.setup_service import get_setup_service
from backend.services.store_service import get_store_service, using_store
from tests.backup.commands import Commands, running_commands
from tests.backup.promises import (
    back_up,
    consent,
    erase,
    has_consent,
    is_there,
    restore,
    wait_for_copies,
)
from tests.backup.stores import (
    Folders,
    are_alike,
    away,
    delete,
    entries,
    folders,
    ids_of,
    listed,
    lose,
    objects,
    use_folders,
    use_stores,
)
from tests.conftest import KEY, OTHER_KEY, Service, clear_caches
from tests.privacy.people import plant

OLD_ID = RootKey(parse_key(KEY)).key_id.hex()
BIG_BYTES = 32 * 1024 * 1024


__all__ = ["folders"]  # a fixture


def test_a_backup_is_in_every_store_and_each_alone_restores_it(
    sqlite_service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = use_folders(monkeypatch, tmp_path, 3)
    jane = plant("A")
    backup_id = back_up()
    erase(jane.id)
    wait_for_copies()
    assert are_alike(folders)
    # Three of the backup, the entry, and a checkpoint of the audit trail.
    assert len(objects(folders.first)) == 5
    for folder in folders.all:
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o600}
        with using_store(str(folder)):
            verified = get_backup_service().verify(backup_id, COMMAND_LINE)
            assert verified.verified_at is not None
            assert restore(None, dry_run=True).reapplied.erasures == 1


def test_a_promise_is_in_every_store_once_it_is_made_and_not_before(
    folders: Folders,
) -> None:
    jane = plant("A").id
    consent(jane, granted=True)
    with session_scope() as session:
        get_consent_service().record(
            session, COMMAND_LINE, jane, purpose="marketing", granted=False, evidence="a form"
        )
        assert len(entries(folders.first)) == 1
        # Without the clearing up before it, which would wait for this very transaction.
        get_backup_service()._copy()
        assert entries(folders.second) == set()
    wait_for_copies()
    assert entries(folders.second) == entries(folders.first)


class _TakenBackError(Exception):
    """What makes a caller take an act back."""


def _take_back(user_id: int) -> None:
    def act() -> None:
        with session_scope() as session:
            get_consent_service().record(
                session,
                COMMAND_LINE,
                user_id,
                purpose="marketing",
                granted=False,
                evidence="a form",
            )
            raise _TakenBackError

    with pytest.raises(_TakenBackError):
        act()


def test_what_was_taken_back_is_in_no_copy_until_the_next_start_has_settled_it(
    folders: Folders,
) -> None:
    jane = plant("A").id
    consent(jane, granted=True)
    _take_back(jane)
    get_backup_service().copy()
    assert (len(entries(folders.first)), entries(folders.second)) == (1, set())
    # Nobody can tell it from an act whose process was killed after its commit was asked for.
    get_setup_service().recover()
    get_backup_service().copy()
    assert (has_consent(jane), entries(folders.second)) == (False, entries(folders.first))


def test_a_lost_first_store_is_healed_by_a_copy_and_empties_none(folders: Folders) -> None:
    jane = plant("A").id
    backup_id = back_up()
    erase(jane)
    wait_for_copies()
    assert are_alike(folders)
    before = objects(folders.second)
    lose(folders.first)
    assert ids_of(folders.first) == set()
    get_backup_service().copy()
    assert are_alike(folders)
    assert objects(folders.second) == before
    assert listed() == [backup_id]


def test_a_backup_that_is_made_after_the_first_store_was_lost_heals_it_too(
    folders: Folders,
) -> None:
    old = back_up()
    lose(folders.first)
    new = back_up()
    assert ids_of(folders.first) == ids_of(folders.second) == {str(old), str(new)}
    assert listed() == [new, old]


def test_of_three_stores_any_one_heals_the_others(
    sqlite_service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = use_folders(monkeypatch, tmp_path, 3)
    backup_id = back_up()
    for lost in (folders.first, folders.second):
        lose(lost)
    get_backup_service().copy()
    assert listed() == [backup_id]
    get_backup_service().copy()
    assert are_alike(folders)


def test_a_deleted_backup_does_not_come_back_with_an_old_copy(folders: Folders) -> None:
    gone, kept = back_up(), back_up()
    old = folders.second.with_name("old")
    shutil.copytree(folders.second, old)
    delete(gone)
    assert str(gone) not in ids_of(folders.first) | ids_of(folders.second)
    lose(folders.second)
    old.rename(folders.second)
    synced = get_backup_service().copy()
    assert (synced.removed, listed()) == (1, [kept])
    assert are_alike(folders)


def test_a_store_that_is_named_twice_is_one(
    sqlite_service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "store"
    use_stores(monkeypatch, folder, folder, f"file://{folder}", f"{folder}/")
    gone, kept = back_up(), back_up()
    erase(plant("A").id)
    delete(gone)
    synced = get_backup_service().copy()
    assert (synced.copied, synced.failed, listed()) == (0, [], [kept])
    assert len(entries(folder)) == 1
    assert not get_store_service().sync_due.is_set()


def _only(monkeypatch: pytest.MonkeyPatch, key: str, previous: str = "") -> None:
    monkeypatch.setenv("ENCRYPTION_KEY", key)
    monkeypatch.setenv("ENCRYPTION_KEYS_PREVIOUS", previous)
    clear_caches()
    get_setup_service().open()


def test_a_rotation_reaches_the_copies_and_the_old_key_may_go(
    folders: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    jane = plant("A")
    backup_id = back_up()
    erase(jane.id)
    wait_for_copies()
    assert are_alike(folders)
    _only(monkeypatch, OTHER_KEY, KEY)
    rotated = get_rotation_service().rotate(COMMAND_LINE)
    assert (rotated.finished, rotated.failed) == (True, {})
    get_rotation_service().disable(OLD_ID, COMMAND_LINE)
    _only(monkeypatch, OTHER_KEY)
    lose(folders.first)
    with using_store(str(folders.second)):
        assert restore(backup_id).reapplied.erasures == 1
    assert not is_there(jane.id)
    assert keyring.current().primary.key_id.hex() != OLD_ID


def test_a_key_that_a_copy_still_needs_may_not_go(
    folders: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    backup_id = back_up()
    _only(monkeypatch, OTHER_KEY, KEY)
    with away(folders.second), pytest.raises(HoldfastError):
        get_rotation_service().disable(OLD_ID, COMMAND_LINE)
    aside = folders.second.with_name("old")
    shutil.copytree(folders.second, aside)
    get_rotation_service().rotate(COMMAND_LINE)
    # A copy of before the rotation is put in the place of the one that followed it.
    lose(folders.second)
    aside.rename(folders.second)
    with pytest.raises(HoldfastError, match="1 backups"):
        get_rotation_service().disable(OLD_ID, COMMAND_LINE)
    get_rotation_service().rotate(COMMAND_LINE)
    get_rotation_service().disable(OLD_ID, COMMAND_LINE)
    assert are_alike(folders)
    with session_scope(read_only=True) as session:
        assert get_catalogue_service().get(session, backup_id).status is BackupStatus.COMPLETE


def test_copying_beside_acts_loses_and_invents_none(folders: Folders) -> None:
    people = [plant(letter).id for letter in "ABCDEF"]
    back_up()

    def copy() -> None:
        for _ in range(10):
            get_backup_service().copy()

    with ThreadPoolExecutor(2) as threads:
        copying = threads.submit(copy)
        for person in people[:3]:
            erase(person)
        for person in people[3:]:
            consent(person, granted=True)
            _take_back(person)
            consent(person, granted=False)
        copying.result()
    wait_for_copies()
    # One that was swept away while it was being copied is made up for, as a tick does it.
    assert get_backup_service().copy().failed == []
    assert len(entries(folders.second)) == 6
    assert len(entries(folders.first)) == 9
    assert entries(folders.second) < entries(folders.first)


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    with running_commands(tmp_path_factory.mktemp("commands")) as commands:
        yield commands


def _kill_a_sync(folders: Folders, commands: Commands) -> None:
    """Kill a sync while it writes a large archive into the copy."""
    with away(folders.second):
        backup_id = back_up()
    with (folders.first / f"{backup_id}.zst.gpg").open("wb") as large:
        large.truncate(BIG_BYTES)
    # It is written in many pieces; the others are one each, and the manifest is the last.
    assert commands.end("backup", "sync", at_path=("write",) * 16).killed
    (partial,) = folders.second.glob(".partial-*")
    assert 0 < partial.stat().st_size < BIG_BYTES
    assert str(backup_id) not in ids_of(folders.second)


def test_a_sync_that_was_killed_half_way_goes_on(folders: Folders, commands: Commands) -> None:
    _kill_a_sync(folders, commands)
    assert get_backup_service().copy().failed == []
    for folder in folders.all:
        assert len([name for name in objects(folder) if not name.startswith(".")]) == 5
    assert ids_of(folders.second) == ids_of(folders.first)


def test_what_a_killed_sync_left_in_a_copy_is_removed(folders: Folders, commands: Commands) -> None:
    _kill_a_sync(folders, commands)
    get_setup_service().recover()
    get_backup_service().copy()
    assert are_alike(folders)
