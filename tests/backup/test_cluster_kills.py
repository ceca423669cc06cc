"""Restores and backups of a cluster, killed: one whole cluster runs, and no backup is half one."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Final

import pytest

from backend.backup.pgbackrest.says import Kind
from backend.db_utils import dispose_engine
from backend.models import BackupStatus
from backend.services.cluster_service import get_cluster_service
from tests.backup.cluster_installations import Installation, hotels, installation, rename
from tests.backup.clusters import are_gone
from tests.backup.commands import Commands, running_commands
from tests.backup.lives import records

__all__ = ["installation"]

At = Callable[[Installation], object]


def _beside(installation: Installation, pattern: str) -> list[Path]:
    return list(installation.site.folder.glob(pattern))


def _files_come_back(at: Installation) -> object:
    return _beside(at, "data-restore-*/base/*/*")


def _it_recovers(at: Installation) -> object:
    return _beside(at, "data-restore-*/postmaster.pid")


def _the_server_is_stopped(at: Installation) -> object:
    return at.site.cluster.postmaster() is None


def _the_old_one_is_aside(at: Installation) -> object:
    return _beside(at, "data-before-*")


MOMENTS: Final = (
    _files_come_back, _it_recovers, _the_server_is_stopped, _the_old_one_is_aside
)  # fmt: skip


TRIES: Final = 5


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    with running_commands(tmp_path_factory.mktemp("commands")) as commands:
        yield commands


def test_a_killed_restore_leaves_one_whole_cluster_that_the_next_start_runs(
    installation: Installation, commands: Commands
) -> None:
    restore = ("backup", "restore", str(installation.backups[Kind.FULL]), "--confirm")
    for at in MOMENTS:
        # A busy machine may look again only when it has ended.
        assert any(_is_killed(installation, commands, restore, at) for _ in range(TRIES))
    rename("live")
    commands.run(*restore)
    dispose_engine()
    assert hotels() == {"in full"}


def _is_killed(
    installation: Installation, commands: Commands, restore: tuple[str, ...], at: At
) -> bool:
    """Kill a restore once *at* holds, and look; whether it was still running."""
    rename("live")
    dispose_engine()
    process = installation.site.cluster.postmaster()
    kept = len(_beside(installation, "data-before-*"))
    ended = commands.kill(*restore, at=partial(at, installation))
    begun = _beside(installation, "data-holdfast/swap.json") != []
    aside = len(_beside(installation, "data-before-*")) > kept
    commands.run("init")
    assert are_gone(installation.site)
    assert _beside(installation, "data-restore-*") == []
    assert _beside(installation, "data-holdfast/run-*") == []
    assert _beside(installation, "data-holdfast/swap.json") == []
    swapped = hotels() == {"in full"}
    assert swapped or hotels() == {"live"}
    # Before the swap nothing has changed, and the server was not even stopped.
    if not begun and not aside:
        assert (swapped, installation.site.cluster.postmaster()) == (False, process)
    if aside:
        assert swapped
    assert len(_beside(installation, "data-before-*")) == kept + swapped
    return ended.killed


def test_a_backup_killed_before_its_manifest_leaves_nothing_in_the_repository(
    installation: Installation, commands: Commands
) -> None:
    before, repository = records(), get_cluster_service().database().repository
    sets, headers = repository.sets(), len(_beside(installation, "service/backups/*.key"))
    # Its header lies in the store then, and its manifest has no name yet.
    ended = commands.end("backup", "create", "--type", "incr", at_path=("link", "link"))
    assert ended.killed
    assert len(_beside(installation, "service/backups/*.key")) == headers + 1
    assert len(repository.sets()) == len(sets) + 1
    assert "recovered" in commands.run("init").said
    assert repository.sets() == sets
    failed, *others = records()
    assert (failed.status, failed.error) == (BackupStatus.FAILED, "interrupted")
    assert [each.id for each in others] == [each.id for each in before]
