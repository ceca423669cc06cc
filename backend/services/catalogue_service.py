"""The catalogue of backups: what the store holds, and what this database knows of it."""

from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import Final
from uuid import UUID

from sqlalchemy import select
from sqlalchemy.orm import Session

from backend.backup.manifest import (
    Break,
    Manifest,
    archive_name,
    breaks,
    gone_ids,
    stored_ids,
)
from backend.db_utils import session_scope
from backend.errors import BackupDamagedError, ConflictError, HoldfastError, NotFoundError
from backend.models import BackupRecord, BackupStatus
from backend.services.archive_service import BackupKeyError, get_archive_service
from backend.services.store_service import signer, store
from backend.settings import get_settings

MISSING: Final = "missing"


@dataclass(frozen=True, slots=True)
class Age:
    """When the newest backup was made, and the newest of those that were proven to restore."""

    newest: datetime | None
    newest_proven: datetime | None


class CatalogueService:
    """Reads the store, which is the truth, and keeps its records here like it."""

    def records(self, session: Session) -> list[BackupRecord]:
        """
        All backups, newest first: those in the store, and those running or failed.

        The store is the truth. A record whose backup is gone is left out, and one that this
        database does not know (it was restored from before) is taken from the manifest.
        """
        records = {record.id: record for record in session.scalars(select(BackupRecord))}
        stored = {UUID(backup_id) for backup_id in stored_ids(store())}
        found = [
            record
            for record in records.values()
            if record.status is not BackupStatus.COMPLETE or record.id in stored
        ]
        for backup_id in stored - set(records):
            with suppress(HoldfastError):
                found.append(record_of(get_archive_service().manifest(backup_id)))
        return sorted(found, key=lambda record: record.created_at, reverse=True)

    def breaks(self, session: Session) -> list[Break]:
        """
        Say which backups are not what they should be: changed, replaced, or taken away.

        By the chain of the manifests, and by the records of this database.
        """
        manifests, gone = get_archive_service().manifests(), gone_ids(store(), signer)
        oldest = datetime.now(UTC) - timedelta(days=get_settings().backup_max_age_days)
        good = [each for each in manifests.values() if isinstance(each, Manifest)]
        found = {each.backup_id: each for each in breaks(good, gone, oldest)}
        for backup_id, wrong in manifests.items():
            if not isinstance(wrong, Manifest):
                found[backup_id] = Break(backup_id, wrong.detail)
        complete = select(BackupRecord.id, BackupRecord.location).where(
            BackupRecord.status == BackupStatus.COMPLETE, BackupRecord.created_at > oldest
        )
        for key, location in session.execute(complete):
            record_id = str(key)
            # One that lay in another store, on a machine that was lost, is not missed in this one.
            was_here = location == store().location(archive_name(record_id))
            if was_here and record_id not in manifests and record_id not in gone:
                found[record_id] = Break(record_id, "is missing, and was not deleted by us")
        return sorted(found.values(), key=lambda each: each.backup_id)

    def age(self, session: Session) -> Age:
        """Say how old the newest backups are, from the records alone: it is asked often."""
        complete = select(BackupRecord.created_at, BackupRecord.verified_at).where(
            BackupRecord.status == BackupStatus.COMPLETE, BackupRecord.error.is_(None)
        )
        rows = session.execute(complete).all()
        return Age(
            max((row.created_at for row in rows), default=None),
            max((row.created_at for row in rows if row.verified_at), default=None),
        )

    def get(self, session: Session, backup_id: UUID) -> BackupRecord:
        """
        Return one record.

        Raises:
            NotFoundError: No such backup.
        """
        record = session.get(BackupRecord, backup_id)
        if record is None or record.status is BackupStatus.COMPLETE:
            manifest = get_archive_service().manifest(backup_id)
            return record or record_of(manifest)
        return record

    def manifest(self, backup_id: UUID) -> Manifest:
        """
        Return the manifest of a backup that can be proven or restored.

        Raises:
            NotFoundError: No such backup.
            ConflictError: It failed, or is still being made.
        """
        with session_scope(read_only=True) as session:
            record = session.get(BackupRecord, backup_id)
        if record is not None and record.status is not BackupStatus.COMPLETE:
            raise ConflictError(f"backup {backup_id} is not complete: {record.status}")
        return get_archive_service().manifest(backup_id)

    def adopt(self) -> None:
        """Take up records of backups that the store has and this database knows nothing good of."""
        with session_scope() as session:
            complete = select(BackupRecord.id).where(BackupRecord.status == BackupStatus.COMPLETE)
            known = set(map(str, session.scalars(complete)))
            for backup_id in set(stored_ids(store())) - known:
                with suppress(NotFoundError, BackupDamagedError, BackupKeyError):
                    record = record_of(get_archive_service().manifest(UUID(backup_id)))
                    record.error = None
                    session.merge(record)
            self._mark_missing(session)

    def _mark_missing(self, session: Session) -> None:
        """Count no backup as good that the store has lost, nor as lost what is back."""
        stored = set(map(UUID, stored_ids(store())))
        complete = select(BackupRecord).where(BackupRecord.status == BackupStatus.COMPLETE)
        for record in session.scalars(complete):
            if record.id not in stored:
                record.error = record.error or MISSING
            elif record.error == MISSING:
                record.error = None


def record_of(manifest: Manifest) -> BackupRecord:
    """The record that a manifest gives."""
    return BackupRecord(
        id=UUID(manifest.id),
        label=manifest.label,
        status=BackupStatus.COMPLETE,
        size_bytes=manifest.size_bytes,
        sha256=manifest.sha256,
        location=store().location(archive_name(manifest.id)),
        created_at=manifest.moment,
        kind=manifest.kind,
        bytes_done=manifest.plain_bytes,
    )


@lru_cache(maxsize=1)
def get_catalogue_service() -> CatalogueService:
    return CatalogueService()
