"""An installation with several stores: folders that can go away and come back."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

import pytest

from backend.db_utils import session_scope
from backend.services.audit_service import COMMAND_LINE
from backend.services.catalogue_service import get_catalogue_service
from backend.services.pruning_service import get_pruning_service
from backend.services.scheduler_service import SchedulerService
from backend.services.setup_service import get_setup_service
from backend.services.store_service import get_store_service
from tests.backup.promises import wait_for_copies
from tests.conftest import Service, clear_caches

NAMES = ("first", "second", "third")


@dataclass(frozen=True)
class Folders:
    """The folders of an installation's stores, the first one first."""

    first: Path
    copies: tuple[Path, ...]

    @property
    def second(self) -> Path:
        return self.copies[0]

    @property
    def all(self) -> tuple[Path, ...]:
        return (self.first, *self.copies)


def use_stores(monkeypatch: pytest.MonkeyPatch, *urls: str | Path) -> None:
    """Start again with these stores; what an earlier test could not copy is not due here."""
    monkeypatch.setenv("BACKUP_URL", ",".join(map(str, urls)))
    get_store_service.cache_clear()
    clear_caches()
    get_setup_service().open()


def use_folders(monkeypatch: pytest.MonkeyPatch, parent: Path, count: int) -> Folders:
    first, *copies = (parent / name for name in NAMES[:count])
    use_stores(monkeypatch, first, *copies)
    return Folders(first, tuple(copies))


@pytest.fixture
def folders(
    sqlite_service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Folders]:
    yield use_folders(monkeypatch, tmp_path, 2)
    wait_for_copies()
    get_store_service().sync_due.clear()


def lose(folder: Path) -> None:
    """Have a store lost, with what is being copied there."""
    wait_for_copies()
    shutil.rmtree(folder)


def delete(backup_id: UUID) -> None:
    get_pruning_service().delete(backup_id, COMMAND_LINE)


def objects(folder: Path) -> dict[str, bytes]:
    """The plain files in a store, half-written ones too."""
    found = folder.iterdir() if folder.is_dir() else ()
    return {
        path.name: path.read_bytes() for path in found if path.is_file() and not path.is_symlink()
    }


def entries(folder: Path) -> set[str]:
    """The ledger's entries in a store."""
    return {name for name in objects(folder) if name.startswith("ledger-")}


def are_alike(folders: Folders) -> bool:
    """Whether all stores hold the same; a promise may be sealed twice, and so be spelled twice."""
    first, *copies = (
        {
            name: b"" if name.startswith("ledger-") else data
            for name, data in objects(folder).items()
        }
        for folder in folders.all
    )
    return all(copy == first for copy in copies)


@contextmanager
def away(folder: Path) -> Iterator[None]:
    """
    Have a store away, as a disk that is not mounted: something else lies in its place.

    What begins before, or meanwhile, is done before it goes, or comes back.
    """
    wait_for_copies()
    aside = folder.with_name(f"{folder.name}-aside")
    if folder.exists():
        folder.rename(aside)
    folder.write_text("no folder")
    try:
        yield
    finally:
        wait_for_copies()
        folder.unlink()
        if aside.exists():
            aside.rename(folder)


def tick() -> None:
    """Let the scheduler do what is due."""
    SchedulerService()._tick_safely()


def ids_of(folder: Path) -> set[str]:
    """The backups in a store."""
    return {name.split(".")[0] for name in objects(folder) if name.endswith(".manifest.json")}


def listed() -> list[UUID]:
    """The backups as the service lists them; none may be wrong."""
    with session_scope(read_only=True) as session:
        assert get_catalogue_service().breaks(session) == []
        return [record.id for record in get_catalogue_service().records(session)]
