"""Stored backups: their manifests, the database that one holds, and giving one to another key."""

import fcntl
import hashlib
import hmac
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import BinaryIO, Final, cast
from uuid import UUID

from sqlalchemy import Engine, select

from backend.backup.archive import (
    DigestingReader,
    Manifest,
    archive_name,
    claimed_keys,
    decompress,
    read_manifest,
)
from backend.backup.database import Database, count_rows
from backend.backup.postgres import PostgresDatabase
from backend.backup.rewrap import finish_rewraps, rewrap_backup
from backend.backup.sqlite import SqliteDatabase
from backend.crypto import keyring
from backend.crypto.files import HEADER_BYTES, Opener, rewrap
from backend.db_utils import get_engine, session_scope
from backend.errors import (
    BackupDamagedError,
    ConflictError,
    CryptoError,
    SchemaMismatchError,
    UnknownKeyError,
)
from backend.models import DATA_MAP, BackupRecord
from backend.services.encryption_service import get_encryption_service
from backend.services.ledger_service import store
from backend.services.schema_service import get_schema_service
from backend.settings import get_settings

LOCK_FILE: Final = "backup.lock"
_SAMPLE_ROWS: Final = 100


class BackupKeyError(ConflictError):
    """A key that the backup needs is not configured: add it to `ENCRYPTION_KEYS_PREVIOUS`."""

    code = "unknown_key"


class ArchiveService:
    """Reads what the store holds, and proves it."""

    def manifest(self, backup_id: UUID) -> Manifest:
        """
        Read and authenticate a manifest; see `read_manifest`.

        Raises:
            BackupKeyError: Its key is not configured.
        """
        try:
            return read_manifest(store(), str(backup_id), signer)
        except UnknownKeyError as err:
            raise BackupKeyError(err.detail) from None

    @contextmanager
    def rebuilt(self, database: Database, manifest: Manifest) -> Iterator[Engine]:
        """
        Build the database of *manifest* beside the live one, migrate and prove it; drop it in the
        end.

        Within the block this thread also opens what keys sealed that the backup brings along.

        Raises:
            SchemaMismatchError: It was made on another engine, or by a newer version.
            BackupDamagedError: Digest, soundness, row counts or encrypted values are not right.
            BackupKeyError: A key that it needs is not configured.
        """
        if manifest.engine != database.engine_name:
            raise SchemaMismatchError(
                f"the backup is of {manifest.engine}, the database is {database.engine_name}"
            )
        get_schema_service().require_known(manifest.schema_revision)
        finish_rewraps(store())
        with _as_damage(), store().open(archive_name(manifest.id)) as file:
            reader = DigestingReader(file, manifest)
            opener = Opener(cast("BinaryIO", reader), get_encryption_service().file_lock())
            if opener.meta.get("backup") != manifest.id:
                raise BackupDamagedError("another backup lies under this name")
            built = database.rebuild(decompress(opener.chunks(), manifest.plain_bytes))
            stored_whole = reader.is_whole()
        try:
            with keyring.using(keyring.current().with_more(opener.inner_keys)):
                with _as_damage():
                    if not stored_whole:
                        raise BackupDamagedError(
                            "the stored backup is not the one its manifest names"
                        )
                    database.check(built)
                    if count_rows(built, manifest.tables) != manifest.tables:
                        raise BackupDamagedError("the rows are not those that the manifest counts")
                    # Only then do today's models fit it.
                    get_schema_service().upgrade(built)
                    _open_sample(built)
                yield built
        finally:
            # After a swap there is nothing left to discard, and that is no error.
            database.discard(built)

    def needing_other_than(self, key_id: str) -> Sequence[str]:
        """The ids of backups that say they need another key than *key_id*."""
        return [one for one, needed in claimed_keys(store()).items() if needed - {key_id}]

    def rewrap(self, backup_id: UUID) -> None:
        """
        Give a backup to the primary key; its payload is read and not rewritten.

        Raises:
            BackupDamagedError: It is not what its manifest says.
            BackupKeyError: Its present key is not configured.
            ConflictError: Another backup or restore is running.
        """
        key_id = keyring.current().primary.key_id.hex()
        lock = get_encryption_service().file_lock()
        with exclusive(), _as_damage():
            finish_rewraps(store())
            before = self.manifest(backup_id)
            others = {before.key_id, *before.row_keys} - {key_id}
            inner = [keyring.current().find(bytes.fromhex(other)) for other in sorted(others)]
            manifest = rewrap_backup(
                store(),
                before,
                lambda header: rewrap(header, lock, inner),
                header_bytes=HEADER_BYTES,
                key_id=key_id,
                sign=signer(key_id),
            )
            with session_scope() as session:
                if record := session.get(BackupRecord, backup_id):
                    record.sha256 = manifest.sha256


@contextmanager
def _as_damage() -> Iterator[None]:
    """Tell what is wrong with the file as what it means for the backup."""
    try:
        yield
    except UnknownKeyError as err:
        raise BackupKeyError(err.detail) from None
    except CryptoError as err:
        raise BackupDamagedError(f"the backup is damaged: {err.detail}") from None


def live_database() -> Database:
    """The database of this process, as backups see it."""
    engine = get_engine()
    if engine.dialect.name == "sqlite":
        return SqliteDatabase(engine)
    return PostgresDatabase(engine)


@contextmanager
def exclusive() -> Iterator[None]:
    """
    Let one backup, verification or restore run at a time on this machine.

    Raises:
        ConflictError: Another one is running.
    """
    path = get_settings().data_dir / LOCK_FILE
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    # The kernel drops the lock with its process, so a crash cannot leave it behind.
    descriptor = os.open(path, os.O_CREAT | os.O_RDWR, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise ConflictError("another backup or restore is running") from None
    finally:
        os.close(descriptor)


def signer(key_id: str) -> Callable[[bytes], str]:
    try:
        key = keyring.current().find(bytes.fromhex(key_id))
    except ValueError:
        raise BackupDamagedError("the manifest of the backup was changed") from None
    secret = key.derive("backup manifest")
    return lambda body: hmac.new(secret, body, hashlib.sha256).hexdigest()


def _open_sample(built: Engine) -> None:
    """Open the newest encrypted values of every table of people."""
    with session_scope(built, read_only=True) as session:
        for mapped in DATA_MAP.of_people:
            newest = select(*mapped.table.columns).order_by(*(key.desc() for key in mapped.keys))
            session.execute(newest.limit(_SAMPLE_ROWS)).all()


@lru_cache(maxsize=1)
def get_archive_service() -> ArchiveService:
    return ArchiveService()
