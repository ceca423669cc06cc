"""Trying everything that reads a backup, and seeing that each refuses it alike."""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final
from uuid import UUID

import pytest
from sqlalchemy import select

from backend.backup.manifest import archive_name
from backend.db_utils import session_scope
from backend.errors import HoldfastError
from backend.models import AuditEvent, BackupRecord
from backend.services.archive_service import get_archive_service, live_database
from backend.services.audit_service import COMMAND_LINE
from backend.services.backup_service import get_backup_service
from backend.services.catalogue_service import get_catalogue_service
from backend.services.restore_service import get_restore_service
from tests.conftest import Service
from tests.privacy.people import dump, without

Damage = Callable[[Path], object]
DAMAGED: Final = "backup_damaged"


def create() -> UUID:
    return get_backup_service().create(COMMAND_LINE).id


def verify(backup_id: UUID) -> BackupRecord:
    return get_backup_service().verify(backup_id, COMMAND_LINE)


def restore(backup_id: UUID, *, dry_run: bool = False) -> None:
    get_restore_service().restore(backup_id, COMMAND_LINE, dry_run=dry_run, confirm=not dry_run)


def listed() -> list[BackupRecord]:
    with session_scope(read_only=True) as session:
        return get_catalogue_service().records(session)


def object_of(service: Service, backup_id: UUID, name: Callable[[str], str] = archive_name) -> Path:
    """Where one of a backup's objects lies."""
    return service.folder / "backups" / name(str(backup_id))


@contextmanager
def damaged(path: Path, damage: Damage) -> Iterator[None]:
    """Damage an object, and make it good again."""
    whole = path.read_bytes()
    damage(path)
    try:
        yield
    finally:
        path.write_bytes(whole)


def digest_of_rows() -> str:
    """One digest over every row of every table, but for the records of trying."""
    rows = without(dump(), {}, "audit_events", "backup_records")
    return hashlib.sha256(repr(sorted(rows.items())).encode()).hexdigest()


def code_of(act: Callable[[], object]) -> str:
    """The code with which *act* is refused."""
    with pytest.raises(HoldfastError) as refusal:
        act()
    return refusal.value.code


def error_of(backup_id: UUID) -> str | None:
    """What the record says is wrong with a backup."""
    with session_scope(read_only=True) as session:
        return session.get_one(BackupRecord, backup_id).error


def _audited() -> list[tuple[str, str]]:
    with session_scope(read_only=True) as session:
        events = session.scalars(select(AuditEvent).order_by(AuditEvent.id))
        return [(event.action, event.outcome) for event in events]


def refused(service: Service, backup_id: UUID, *, readable: bool = True) -> str:
    """
    Try to restore, to prove and to read through; return the code of the refusal.

    The live database and its folder stay as they were, each refusal is in the audit trail, and
    damage in the backup's record.

    Args:
        readable: Whether there is a manifest to begin with, and so something to read through.
    """
    before, files, first = digest_of_rows(), sorted(service.folder.rglob("*")), len(_audited())
    codes = [
        code_of(lambda: restore(backup_id)),
        code_of(lambda: restore(backup_id, dry_run=True)),
        code_of(lambda: verify(backup_id)),
    ]
    assert _audited()[first:] == list(
        zip(("restore", "restore", "backup_verified"), codes, strict=True)
    )
    assert error_of(backup_id) == (DAMAGED if codes[0] == DAMAGED else None)
    if service.engine == "sqlite":
        beside = str(service.folder / "beside.db")
        codes.append(
            code_of(lambda: get_restore_service().restore_to(backup_id, COMMAND_LINE, beside))
        )
    if readable:
        manifest = get_archive_service().manifest(backup_id)
        codes.append(code_of(lambda: get_archive_service().read_through(manifest)))
    assert digest_of_rows() == before
    assert sorted(service.folder.rglob("*")) == files
    assert live_database().sweep() == 0
    (code,) = set(codes)
    return code
