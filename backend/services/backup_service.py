"""Backups: making, listing, proving and deleting them."""

from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import Final
from uuid import UUID, uuid4

import structlog
from sqlalchemy import select
from sqlalchemy.orm import Session

from backend.backup.archive import (
    Manifest,
    archive_name,
    delete_backup,
    newest_digest,
    stored_ids,
    write_archive,
    write_manifest,
)
from backend.backup.rewrap import finish_rewraps
from backend.crypto import keyring
from backend.crypto.files import Sealer
from backend.db_utils import is_storable, session_scope
from backend.errors import (
    BackupDamagedError,
    ConflictError,
    HoldfastError,
    NotFoundError,
    RefusedError,
)
from backend.models import BackupRecord, BackupStatus, Base, EncryptionKey
from backend.services.archive_service import (
    BackupKeyError,
    exclusive,
    get_archive_service,
    live_database,
    signer,
)
from backend.services.audit_service import Actor, get_audit_service
from backend.services.encryption_service import get_encryption_service
from backend.services.ledger_service import store
from backend.settings import get_settings

log = structlog.get_logger(__name__)
MAX_LABEL_CHARS: Final = 100


class BackupService:
    """Makes backups in the store and keeps records of them."""

    def create(self, actor: Actor, label: str | None = None) -> BackupRecord:
        """
        Back up the database; return when it is stored, durably and whole.

        Manages its own transactions: the record must exist before the first byte does.

        Raises:
            RefusedError: *label* is too long, or no text.
            ConflictError: Another backup or restore is running.
            UnavailableError: The store or the dump tool fails; the record says `failed`.
        """
        if label is not None and not (len(label) <= MAX_LABEL_CHARS and is_storable(label)):
            raise RefusedError(f"a label is text of at most {MAX_LABEL_CHARS} characters")
        with exclusive():
            backup_id = uuid4()
            record = self._begin(backup_id, label)
            try:
                manifest = self._write(record)
            except BaseException as err:
                self._fail(backup_id, actor, err)
                raise
            return self._finish(manifest, actor)

    def list(self, session: Session) -> list[BackupRecord]:
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
                found.append(_record_of(get_archive_service().manifest(backup_id)))
        return sorted(found, key=lambda record: record.created_at, reverse=True)

    def get(self, session: Session, backup_id: UUID) -> BackupRecord:
        """
        Return one record.

        Raises:
            NotFoundError: No such backup.
        """
        record = session.get(BackupRecord, backup_id)
        if record is None or record.status is BackupStatus.COMPLETE:
            manifest = get_archive_service().manifest(backup_id)
            return record or _record_of(manifest)
        return record

    def delete(self, session: Session, backup_id: UUID, actor: Actor) -> None:
        """
        Delete a backup.

        Raises:
            NotFoundError: No such backup.
            ConflictError: It is the only complete one.
        """
        stored, record = stored_ids(store()), session.get(BackupRecord, backup_id)
        if record is None and str(backup_id) not in stored:
            raise NotFoundError(f"no backup has the id {backup_id}")
        if stored == [str(backup_id)]:
            raise ConflictError("this is the only backup: make another one first")
        # Its manifest is not read: a damaged backup can be deleted too.
        delete_backup(store(), str(backup_id))
        if record is not None:
            session.delete(record)
        get_audit_service().record(session, "backup_deleted", actor, backup=backup_id)

    def verify(self, backup_id: UUID, actor: Actor) -> BackupRecord:
        """
        Prove that a backup restores: rebuild it beside the live database, check it, drop it.

        Raises:
            NotFoundError: No such backup.
            BackupDamagedError: It does not restore to what its manifest says.
            UnknownKeyError: Its key is not configured.
        """
        with exclusive():
            manifest = get_archive_service().manifest(backup_id)
            database = live_database()
            with get_archive_service().rebuilt(database, manifest):
                pass
        with session_scope() as session:
            record = session.merge(self.get(session, backup_id))
            record.verified_at = datetime.now(UTC)
            get_audit_service().record(session, "backup_verified", actor, backup=backup_id)
        return record

    def prune(
        self, session: Session, actor: Actor, *, dry_run: bool, now: datetime | None = None
    ) -> Sequence[UUID]:
        """
        Delete what is older than `BACKUP_MAX_AGE_DAYS`; return the backups concerned.

        That age is what erased people are told, so it beats every reason to keep a backup. It
        counts for old databases that a restore has kept aside, too.
        """
        before = (now or datetime.now(UTC)) - timedelta(days=get_settings().backup_max_age_days)
        expired = [r.id for r in self.list(session) if r.created_at < before]
        if dry_run:
            return expired
        for backup_id in expired:
            delete_backup(store(), str(backup_id))
            if record := session.get(BackupRecord, backup_id):
                session.delete(record)
        forgotten = live_database().forget_previous(before)
        if expired or forgotten:
            get_audit_service().record(
                session, "backups_pruned", actor, backups=len(expired), previous=forgotten
            )
        return expired

    def recover(self) -> int:
        """
        Clear up after a process that was killed: its record is `failed`, its files are gone.

        Returns:
            How many things were left behind; 0 where a backup is still running elsewhere.
        """
        with suppress(ConflictError), exclusive():
            left = store().sweep() + finish_rewraps(store()) + live_database().sweep()
            with session_scope() as session:
                running = select(BackupRecord).where(BackupRecord.status == BackupStatus.RUNNING)
                for record in session.scalars(running):
                    record.status, record.error = BackupStatus.FAILED, "interrupted"
                    delete_backup(store(), str(record.id))
                    left += 1
            return left
        return 0

    def _begin(self, backup_id: UUID, label: str | None) -> BackupRecord:
        with session_scope() as session:
            record = BackupRecord(
                id=backup_id,
                label=label,
                status=BackupStatus.RUNNING,
                location=store().location(archive_name(str(backup_id))),
                created_at=datetime.now(UTC),
            )
            session.add(record)
        return record

    def _write(self, record: BackupRecord) -> Manifest:
        backup_id = str(record.id)
        previous = []
        for stored in stored_ids(store()):
            # One that is damaged is found by its own verification.
            with suppress(BackupDamagedError, BackupKeyError):
                previous.append(get_archive_service().manifest(UUID(stored)))
        with session_scope(read_only=True) as session:
            in_use = select(EncryptionKey.key_id).where(EncryptionKey.disabled_at.is_(None))
            row_keys = sorted(session.scalars(in_use))
        tables = [table.name for table in Base.metadata.sorted_tables]
        sealer = Sealer(
            {"kind": "backup", "backup": backup_id},
            [get_encryption_service().file_lock()],
            now=record.created_at,
        )
        with live_database().snapshot(tables) as snapshot:
            with store().create(archive_name(backup_id)) as file:
                written = write_archive(file, snapshot.dump, sealer.seal)
            key_id = keyring.current().primary.key_id.hex()
            manifest = Manifest(
                id=backup_id,
                label=record.label,
                created_at=record.created_at.isoformat(),
                engine=live_database().engine_name,
                schema_revision=snapshot.schema_revision,
                tables=dict(snapshot.tables),
                key_id=key_id,
                plain_bytes=written.plain_bytes,
                size_bytes=written.size_bytes,
                sha256=written.sha256,
                previous=newest_digest(store(), previous),
                row_keys=row_keys,
            )
        write_manifest(store(), manifest, signer(key_id))
        return manifest

    def _fail(self, backup_id: UUID, actor: Actor, err: BaseException) -> None:
        code = err.code if isinstance(err, HoldfastError) else type(err).__name__
        log.error("backup_failed", backup=str(backup_id), code=code)
        delete_backup(store(), str(backup_id))
        with session_scope() as session:
            if record := session.get(BackupRecord, backup_id):
                record.status, record.error = BackupStatus.FAILED, code
            get_audit_service().record(
                session, "backup_created", actor, outcome=code, backup=backup_id
            )

    def _finish(self, manifest: Manifest, actor: Actor) -> BackupRecord:
        with session_scope() as session:
            record = session.merge(_record_of(manifest))
            get_audit_service().record(session, "backup_created", actor, backup=manifest.id)
        return record


def _record_of(manifest: Manifest) -> BackupRecord:
    return BackupRecord(
        id=UUID(manifest.id),
        label=manifest.label,
        status=BackupStatus.COMPLETE,
        size_bytes=manifest.size_bytes,
        sha256=manifest.sha256,
        location=store().location(archive_name(manifest.id)),
        created_at=datetime.fromisoformat(manifest.created_at),
    )


@lru_cache(maxsize=1)
def get_backup_service() -> BackupService:
    return BackupService()
