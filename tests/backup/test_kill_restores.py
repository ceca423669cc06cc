"""A restore killed at any act: the old database or the new one, whole, and cleared up after."""

import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Final

import pytest

from backend.db_utils import get_engine, sqlite_path
from backend.services.audit_service import COMMAND_LINE
from backend.services.backup_service import get_backup_service
from tests.backup.aftermath import (
    BOOKINGS,
    bookings_in,
    fill,
    hotels,
    kept_databases,
    leftovers,
    people,
    rename,
    settle,
    start_again,
    while_it_is_built,
)
from tests.backup.commands import WAYS, Commands, commands, killed_at_random
from tests.conftest import Service

SWAP: Final = {
    # The old file is kept aside under its name, some of the new pages are written; it has ended.
    "sqlite": ("rename", "page", "page", "execute"),
    # Both databases have other names in a transaction that is to be committed; it has ended.
    "postgresql": ("ALTER", "ALTER", "do_commit", "DROP"),
}


__all__ = ["commands"]  # a fixture


@pytest.fixture
def filled(service: Service) -> Service:
    fill()
    return service


def backup() -> str:
    return str(get_backup_service().create(COMMAND_LINE).id)


def assert_sound(service: Service) -> None:
    """Nothing is torn; PostgreSQL would have refused it itself."""
    if service.engine == "sqlite":
        with closing(sqlite3.connect(sqlite_path(get_engine()))) as connection:
            assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
            assert connection.execute("PRAGMA foreign_key_check").fetchall() == []


@pytest.mark.parametrize(("service", "carried"), WAYS, indirect=["service"])
def test_a_killed_restore_leaves_the_old_database_or_the_new_one_whole(
    filled: Service, commands: Commands, *, carried: bool
) -> None:
    restore = ("backup", "restore", backup(), "--confirm")
    kept, new = kept_databases(filled), people()
    for _ in killed_at_random(commands, *restore, carried=carried):
        settle(filled)
        (found,) = hotels()
        assert_sound(filled)
        if found == "saved":
            assert people() == new
            rename("live")
            old = people()
        else:
            assert people() == old
        start_again(filled)
        assert people() == old
    assert commands.end(*restore, **while_it_is_built(filled), carried=carried).killed
    settle(filled)
    assert leftovers(filled) != []
    assert people() == old
    assert "recovered" in commands.run("init").said
    assert leftovers(filled) == []
    commands.run(*restore, carried=carried)
    assert people() == new
    counts = [bookings_in(url) for url in kept_databases(filled) - kept]
    assert set(counts) == {BOOKINGS}, "a cut copy is kept as if it were the old database"


def test_a_restore_killed_in_its_swap_has_swapped_or_has_not(
    filled: Service, commands: Commands
) -> None:
    restore = ("backup", "restore", backup(), "--confirm")
    new = people()
    acts = SWAP[filled.engine]
    for number in range(len(acts) - 1, len(acts) + 1):
        rename("live")
        old = people()
        assert commands.end(*restore, at_path=acts[:number]).killed
        settle(filled)
        assert people() == (new if number == len(acts) else old)
        assert_sound(filled)
        start_again(filled)


def test_a_swap_that_was_killed_keeps_no_database_aside(
    sqlite_service: Service, commands: Commands
) -> None:
    restore = ("backup", "restore", backup(), "--confirm")
    assert commands.end(*restore, at_path=SWAP["sqlite"][:-1]).killed
    commands.run("init")
    assert kept_databases(sqlite_service) == set()


def test_a_start_that_is_killed_while_it_clears_up_is_made_up_for_by_the_next(
    sqlite_service: Service, commands: Commands
) -> None:
    fill()
    restore = ("backup", "restore", backup(), "--confirm")
    # It is built, and promises are kept in it that are not committed.
    assert commands.end(*restore, at_path=("write", "DELETE", "do_commit")).killed
    assert list(sqlite_service.folder.glob(".holdfast-scratch-*-journal")) != []
    assert commands.end("init", at_path=("unlink", "unlink")).killed
    commands.run("init")
    assert leftovers(sqlite_service) == []


def test_a_restore_to_a_file_that_was_killed_leaves_no_copy_of_peoples_data_there(
    sqlite_service: Service, commands: Commands, tmp_path: Path
) -> None:
    fill()
    backup_id, target = backup(), tmp_path / "elsewhere" / "look.db"
    target.parent.mkdir()
    command = ("backup", "restore", backup_id, "--to", str(target))
    # The first note says where it will be, and the second write fills it.
    assert commands.end(*command, at_path=("write", "write", "DELETE")).killed
    assert any(target.parent.iterdir())
    assert not target.exists()
    commands.run("init")
    assert list(target.parent.iterdir()) == []


def test_a_backup_that_was_restored_on_another_machine_stays_in_the_store(
    sqlite_service: Service, commands: Commands, tmp_path: Path
) -> None:
    fill()
    backup()
    store = str(sqlite_service.folder / "backups")
    there = {path.name for path in Path(store).iterdir()}
    elsewhere = {"DATA_DIR": str(tmp_path / "new"), "BACKUP_URL": store}
    commands.run("backup", "restore", "--from", store, "--confirm", **elsewhere)
    commands.run("init", **elsewhere)
    commands.run("backup", "create", **elsewhere)
    assert there <= {path.name for path in Path(store).iterdir()}
