"""What tests of the life of backups have in common: making them, aging them, looking at them."""

from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Final
from uuid import UUID

import pytest
from sqlalchemy import select

from backend.backup.manifest import Manifest
from backend.db_utils import session_scope
from backend.models import AuditEvent, BackupRecord, BackupStatus
from backend.services.audit_service import COMMAND_LINE
from backend.services.backup_service import get_backup_service
from backend.services.catalogue_service import get_catalogue_service
from backend.services.dump_service import DumpService
from backend.services.pruning_service import get_pruning_service
from backend.services.setup_service import get_setup_service
from tests.backup.promises import wait_for_copies
from tests.conftest import clear_caches

Headers = dict[str, str]
Configure = Callable[..., None]
Happen = Callable[[Manifest], None]
PATH: Final = "/security/backup"
ABSENT: Final = UUID("11111111-2222-3333-4444-555555555555")
WHOLE: Final = ["hfb", "key", "manifest.json"]
# What no engine does otherwise is shown on the one that starts sooner.
SQLITE = pytest.mark.parametrize("service", ["sqlite"], indirect=True)


@pytest.fixture
def configured(monkeypatch: pytest.MonkeyPatch) -> Configure:
    """Start again with these settings."""

    def start(**settings: object) -> None:
        for name, value in settings.items():
            monkeypatch.setenv(name.upper(), str(value))
        clear_caches()
        get_setup_service().open()

    return start


@pytest.fixture
def after_writing(monkeypatch: pytest.MonkeyPatch) -> Callable[[Happen], None]:
    """Have something happen once a backup is written, and before it is looked at."""

    def arrange(happen: Happen) -> None:
        write = DumpService.write

        def written(*arguments: Any, **options: Any) -> Manifest:
            manifest = write(*arguments, **options)
            happen(manifest)
            return manifest

        monkeypatch.setattr(DumpService, "write", written)

    return arrange


def create() -> UUID:
    """Make a backup, and wait until nothing is being copied any more."""
    backup_id = get_backup_service().create(COMMAND_LINE).id
    wait_for_copies()
    return backup_id


def aged(*ages: float, now: datetime) -> list[UUID]:
    """Make a backup of each age in days, the oldest first; return them as *ages* are."""
    made = {age: create() for age in sorted(ages, reverse=True)}
    for age, backup_id in made.items():
        change(backup_id, created_at=now - timedelta(days=age))
    return [made[age] for age in ages]


def failed() -> UUID:
    """A backup whose process was killed before its first byte."""

    def die(_record: BackupRecord) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        get_backup_service().create(COMMAND_LINE, begun=die)
    assert records()[0].status is BackupStatus.RUNNING
    assert get_backup_service().recover() == 1
    found = records()[0]
    assert (found.status, found.error) == (BackupStatus.FAILED, "interrupted")
    return found.id


def change(backup_id: UUID, **values: object) -> None:
    """Change what the database knows of a backup."""
    with session_scope() as session:
        found = session.get_one(BackupRecord, backup_id)
        for name, value in values.items():
            setattr(found, name, value)


def records() -> list[BackupRecord]:
    """What is listed, newest first."""
    with session_scope(read_only=True) as session:
        return get_catalogue_service().records(session)


def listed() -> list[UUID]:
    return [each.id for each in records()]


def record(backup_id: UUID) -> BackupRecord:
    return next(each for each in records() if each.id == backup_id)


def remove(backup_id: UUID) -> None:
    get_pruning_service().delete(backup_id, COMMAND_LINE)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*"))


def parts_of(backup_id: UUID, folder: Path) -> list[str]:
    """What lies there of a backup, without the note that it was deleted."""
    found = (name.removeprefix(f"{backup_id}.") for name in names(folder))
    return [name for name in found if name in {*WHOLE, "zst.gpg"}]


def flip(path: Path) -> None:
    """Change one bit."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def acts(action: str) -> list[str]:
    """The outcomes of an action in the audit trail, oldest first."""
    with session_scope(read_only=True) as session:
        found = select(AuditEvent.outcome).where(AuditEvent.action == action)
        return list(session.scalars(found.order_by(AuditEvent.id)))
