"""Making, proving and pruning backups, killed at any act: whole or none, and cleared up after."""

import shutil
from pathlib import Path
from typing import Final
from uuid import UUID

import pytest

from backend.db_utils import session_scope
from backend.models import BackupStatus
from backend.services.audit_service import COMMAND_LINE
from backend.services.backup_service import get_backup_service
from backend.services.catalogue_service import get_catalogue_service
from tests.backup.aftermath import (
    fill,
    leftovers,
    listed_are_whole,
    people,
    records,
    running_without_manifest,
    settle,
    start_again,
    while_it_is_built,
)
from tests.backup.commands import WAYS, Commands, commands, killed_at_random
from tests.conftest import Service

STORED: Final = 4
IN_EVERY_WAY: Final = pytest.mark.parametrize(("service", "carried"), WAYS, indirect=["service"])


__all__ = ["commands"]  # a fixture


@pytest.fixture
def filled(service: Service) -> Service:
    fill()
    return service


@IN_EVERY_WAY
def test_a_killed_backup_is_whole_or_none_and_the_next_start_clears_up(
    filled: Service, commands: Commands, *, carried: bool
) -> None:
    before, failed = people(), 0
    for _ in killed_at_random(commands, "backup", "create", carried=carried):
        settle(filled)
        listed_are_whole()
        failed += len(running_without_manifest())
        start_again(filled)
        assert_failed(failed)
        assert people() == before
    # Its header lies in the store then, and it has no manifest yet.
    ended = commands.end("backup", "create", at_path=("link", "link"), carried=carried)
    assert ended.killed
    settle(filled)
    assert leftovers(filled) != []
    assert records()[0].status is BackupStatus.RUNNING
    assert "recovered" in commands.run("init").said
    assert leftovers(filled) == []
    assert_failed(failed + 1)
    assert "recovered" not in commands.run("init").said
    commands.run("backup", "create", carried=carried)
    assert records()[0].status is BackupStatus.COMPLETE


def assert_failed(number: int) -> None:
    """So many of the listed backups are failed, for they were interrupted; the others are whole."""
    others = listed_are_whole()
    assert [(r.status, r.error) for r in others] == [(BackupStatus.FAILED, "interrupted")] * number


@IN_EVERY_WAY
def test_a_killed_proof_leaves_the_backup_as_it_was_and_nothing_beside(
    filled: Service, commands: Commands, *, carried: bool
) -> None:
    backup_id = str(get_backup_service().create(COMMAND_LINE).id)
    before = people()
    for _ in killed_at_random(commands, "backup", "verify", backup_id, carried=carried):
        start_again(filled)
        assert listed_are_whole() == []
        assert records()[0].error is None
        assert people() == before
    proof = ("backup", "verify", backup_id)
    assert commands.end(*proof, **while_it_is_built(filled), carried=carried).killed
    settle(filled)
    assert leftovers(filled) != []
    assert "recovered" in commands.run("init").said
    assert leftovers(filled) == []
    commands.run(*proof, carried=carried)


class Shelf:
    """Backups that can be put back once they were deleted."""

    def __init__(self, service: Service, aside: Path) -> None:
        self.store = service.folder / "backups"
        self.ids = [get_backup_service().create(COMMAND_LINE).id for _ in range(STORED)]
        self._aside = shutil.copytree(self.store, aside / "stored")

    def restock(self) -> None:
        shutil.rmtree(self.store)
        shutil.copytree(self._aside, self.store)
        get_catalogue_service().adopt()
        assert self.whole() == self.ids

    def whole(self) -> list[UUID]:
        """The backups that are listed, oldest first; they are read to their end."""
        assert listed_are_whole() == []
        return [record.id for record in reversed(records())]

    def noted(self) -> set[UUID]:
        """Those that a note says are deleted."""
        return {UUID(path.name.split(".")[0]) for path in self.store.glob("*.gone.json")}


@pytest.mark.parametrize(
    ("service", "act"),
    [("sqlite", "prune"), ("sqlite", "delete"), ("postgresql", "prune")],
    indirect=["service"],
)
def test_a_backup_that_was_being_deleted_is_whole_or_gone(
    filled: Service, commands: Commands, tmp_path: Path, act: str
) -> None:
    shelf = Shelf(filled, tmp_path)
    going = shelf.ids[:-1] if act == "prune" else shelf.ids[:1]
    arguments = ["backup", act] + ([str(going[0])] if act == "delete" else [])
    for _ in killed_at_random(commands, *arguments, BACKUP_KEEP_LAST="1"):
        settle(filled)
        there, noted = set(shelf.whole()), shelf.noted()
        assert set(shelf.ids) - there <= noted <= set(going)
        start_again(filled)
        # One that was noted as gone, and had not begun to go, is gone now.
        assert set(shelf.whole()) == there - noted
        with session_scope(read_only=True) as session:
            assert get_catalogue_service().breaks(session) == []
        shelf.restock()
    # The note gets its name, its first one goes, and so does the manifest; the archive does not.
    path = ("rename", "unlink", "unlink", "unlink")
    ended = commands.end(*arguments, at_path=path, BACKUP_KEEP_LAST="1")
    assert ended.killed
    assert leftovers(filled) != []
    assert "recovered" in commands.run("init").said
    assert leftovers(filled) == []
    commands.end(*arguments, BACKUP_KEEP_LAST="1")
    assert shelf.whole() == [each for each in shelf.ids if each not in going]
