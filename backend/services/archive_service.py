"""Stored backups: their manifests, the database that one holds, and giving one to another key."""

import fcntl
import io
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO, Final
from uuid import UUID

from sqlalchemy import Engine, select

from backend.backup.archive import Stored
from backend.backup.database import Database, DumpedDatabase, count_rows, discard_if_possible
from backend.backup.manifest import (
    Manifest,
    archive_name,
    header_name,
    manifest_name,
    read_manifest,
    stored_ids,
)
from backend.backup.pgbackrest.database import ClusterDatabase
from backend.backup.postgres import PostgresDatabase
from backend.backup.sqlite import SqliteDatabase
from backend.crypto import keyring
from backend.crypto.files import HEADER_BYTES, Opener, PayloadKey, rewrap
from backend.crypto.keyring import RootKey
from backend.db_utils import get_engine, session_scope, sqlite_path
from backend.errors import (
    BackupDamagedError,
    ConflictError,
    CryptoError,
    HoldfastError,
    NotFoundError,
    RefusedError,
    SchemaMismatchError,
    UnknownKeyError,
)
from backend.models import DATA_MAP, Base
from backend.services import cluster_service
from backend.services.cluster_service import get_cluster_service, is_known
from backend.services.encryption_service import get_encryption_service
from backend.services.schema_service import get_schema_service
from backend.services.store_service import addresses, claimed_by_backups, signer, store
from backend.services.transfer_service import Progress, get_transfer_service, ignore, only_forward
from backend.settings import get_settings

LOCK_FILE: Final = "backup.lock"
_SAMPLE_ROWS: Final = 100
_RETRY_SECONDS: Final = 0.1

# Descriptors of the lock that this context holds, for processes that work for it.
_held: ContextVar[tuple[int, ...]] = ContextVar("held", default=())


class BackupKeyError(ConflictError):
    """A key that the backup needs is not configured: add it to `ENCRYPTION_KEYS_PREVIOUS`."""

    code = "unknown_key"


class ArchiveService:
    """Reads what the store holds, and proves it."""

    def manifest(self, backup_id: UUID) -> Manifest:
        """
        Read and authenticate a manifest; see `read_manifest`.

        Raises:
            NotFoundError: No such backup.
            BackupKeyError: Its key is not configured.
        """
        try:
            return read_manifest(store(), str(backup_id), signer)
        except NotFoundError:
            # Which objects a backup is made of is the store's business.
            raise NotFoundError(f"no backup has the id {backup_id}") from None
        except UnknownKeyError as err:
            raise BackupKeyError(err.detail) from None

    def manifests(self) -> dict[str, Manifest | HoldfastError]:
        """Return every backup's manifest, or what is wrong with it, by id."""
        found: dict[str, Manifest | HoldfastError] = {}
        for backup_id in stored_ids(store()):
            try:
                found[backup_id] = self.manifest(UUID(backup_id))
            except NotFoundError:
                # Deleted by another process meanwhile.
                continue
            except (BackupDamagedError, BackupKeyError, SchemaMismatchError) as err:
                found[backup_id] = err
        return found

    def newest(self, before: datetime | None = None) -> Manifest | None:
        """Return the newest backup whose manifest can be read, or the newest of *before*."""
        read = (each for each in self.manifests().values() if isinstance(each, Manifest))
        found = [each for each in read if before is None or each.moment < before]
        return max(found, key=lambda manifest: manifest.moment, default=None)

    def require_readable(self) -> None:
        """
        Refuse a store of which no backup can be read, before anything is made.

        Raises:
            NotFoundError: It has none.
            BackupKeyError: No configured key is one of theirs.
            HoldfastError: What else is wrong with the first of them.
        """
        keys = get_encryption_service().find()
        if keys is None or not stored_ids(store()):
            raise NotFoundError("there is no backup in the store")
        with keyring.using(keys):
            found = list(self.manifests().values())
        wrong = [each for each in found if isinstance(each, HoldfastError)]
        if len(wrong) == len(found):
            raise wrong[0]

    def read_through(self, manifest: Manifest, progress: Progress = ignore) -> None:
        """
        Read a backup to its end, writing nothing: every tag, checksum and digest.

        Raises:
            BackupDamagedError: One of them is not right.
            BackupKeyError: Its key is not configured.
        """
        if manifest.engine == cluster_service.ENGINE:
            cluster = get_cluster_service().database()
            cluster.read_through(manifest.repository_label or "", manifest.sha256)
            return
        with Path(os.devnull).open("wb") as nowhere, as_damage():
            self._fill(nowhere, manifest, self.key(manifest)[0], progress)

    @contextmanager
    def rebuilt(
        self,
        database: DumpedDatabase | ClusterDatabase,
        manifest: Manifest,
        progress: Progress = ignore,
        *,
        target_time: datetime | None = None,
    ) -> Iterator[Engine]:
        """
        Build the database of *manifest* beside the live one, migrate and prove it; drop it in the
        end.

        Within the block this thread also opens what keys sealed that the backup brings along.

        Args:
            target_time: Recover what was committed up to then, where pgBackRest made the backup.

        Raises:
            SchemaMismatchError: It was made on another engine, or by a newer version.
            BackupDamagedError: Digest, soundness, row counts or encrypted values are not right.
            BackupKeyError: A key that it needs is not configured.
            RefusedError: It cannot reach *target_time*.
        """
        if manifest.engine != database.engine_name:
            raise SchemaMismatchError(
                f"the backup is of {manifest.engine}, the database is {database.engine_name}"
            )
        get_schema_service().require_known(manifest.schema_revision)
        with as_damage():
            key, inner_keys = self.key(manifest)
            if isinstance(database, ClusterDatabase):
                built = database.restore(
                    manifest.repository_label or "",
                    manifest.sha256,
                    target_time,
                    lambda percent: progress(int(percent), 100),
                )
            elif target_time is not None:
                raise RefusedError("the backup holds one moment; only pgBackRest reaches others")
            else:
                forward = only_forward(progress)
                built = database.rebuild(lambda target: self._fill(target, manifest, key, forward))
        try:
            with keyring.using(keyring.current().with_more(inner_keys)):
                with as_damage():
                    database.check(built)
                    if count_rows(built, manifest.tables) != manifest.tables:
                        raise BackupDamagedError("the rows are not those that the manifest counts")
                    _fit(built)
                yield built
        finally:
            discard_if_possible(database, built)

    @contextmanager
    def reopened(
        self, database: Database, moment: datetime
    ) -> Iterator[tuple[Engine, str, dict[str, int]]]:
        """
        Copy the database that a swap at *moment* kept aside, migrate and prove it; drop it in the
        end.

        Yields:
            It, the revision that it had, and its rows per table.

        Raises:
            BackupDamagedError: It is not sound.
            BackupKeyError: It needs a key that is not configured any more.
        """
        built = database.reopen(moment)
        try:
            with as_damage():
                database.check(built)
                revision = get_schema_service().revision(built) or ""
                tables = count_rows(built, [table.name for table in Base.metadata.sorted_tables])
                _fit(built)
            yield built, revision, tables
        finally:
            discard_if_possible(database, built)

    def key(self, manifest: Manifest) -> tuple[PayloadKey, list[RootKey]]:
        """
        Return what opens the archive, and the keys that it brings along for its rows.

        Raises:
            BackupDamagedError: Its header was changed, or is another backup's.
            UnknownKeyError: Its key is not configured.
        """
        opener = Opener(io.BytesIO(self._header(manifest)), get_encryption_service().file_lock())
        if opener.meta.get("backup") != manifest.id:
            raise BackupDamagedError("another backup lies under this name")
        return opener.payload, opener.inner_keys

    def stored(self, manifest: Manifest) -> Stored:
        """Say where the archive of *manifest* lies."""
        return Stored(
            archive_name(manifest.id),
            manifest.payload_offset,
            manifest.plain_bytes,
            manifest.sha256,
        )

    def _header(self, manifest: Manifest) -> bytes:
        try:
            header = store().read(header_name(manifest.id), HEADER_BYTES + 1)
        except NotFoundError:
            if not manifest.payload_offset:
                raise BackupDamagedError("the header of the backup is missing") from None
            # The first format: it is where the archive begins, unless it was given to another key.
            return store().read(archive_name(manifest.id), HEADER_BYTES)
        if len(header) > HEADER_BYTES:
            raise BackupDamagedError("the header of the backup is longer than one")
        return header

    def _fill(
        self, target: BinaryIO, manifest: Manifest, key: PayloadKey, progress: Progress
    ) -> None:
        get_transfer_service().read(
            addresses()[0],
            self.stored(manifest),
            target,
            key,
            report=lambda done: progress(done, manifest.plain_bytes),
            keep_open=lock_descriptors(),
        )

    def needing_other_than(self, key_id: str) -> Sequence[str]:
        """The ids of backups that say they need another key than *key_id*."""
        return [one for one, needed in claimed_by_backups().items() if needed - {key_id}]

    def rewrap(self, backup_id: UUID) -> None:
        """
        Give a backup to the primary key: its header and its manifest are replaced, no more.

        Killed between the two, both still open with the keys that are configured.

        Raises:
            BackupDamagedError: It is not what its manifest says.
            BackupKeyError: Its present key is not configured.
            ConflictError: Another backup or restore is running.
        """
        key_id = keyring.current().primary.key_id.hex()
        lock = get_encryption_service().file_lock()
        with exclusive(), as_damage():
            manifest = self.manifest(backup_id)
            self.key(manifest)
            others = {manifest.key_id, *manifest.row_keys} - {key_id}
            inner = [keyring.current().find(bytes.fromhex(other)) for other in sorted(others)]
            header = rewrap(self._header(manifest), lock, inner)
            changed = replace(manifest, key_id=key_id, row_keys=[key_id])
            store().replace(header_name(manifest.id), header)
            store().replace(manifest_name(manifest.id), changed.document(signer(key_id)))


@contextmanager
def as_damage() -> Iterator[None]:
    """Tell what is wrong with the file as what it means for the backup."""
    try:
        yield
    except UnknownKeyError as err:
        raise BackupKeyError(err.detail) from None
    except CryptoError as err:
        raise BackupDamagedError(f"the backup is damaged: {err.detail}") from None


def live_database() -> DumpedDatabase:
    """The database of this process, as backups see it."""
    return database_of(get_engine())


def database_for(manifest: Manifest) -> DumpedDatabase | ClusterDatabase:
    """The live database, as what made *manifest* restores it."""
    if manifest.engine == cluster_service.ENGINE:
        return get_cluster_service().database()
    return live_database()


def databases() -> list[Database]:
    """The live database in every way in which it may have been restored."""
    return [live_database(), *([get_cluster_service().database()] if is_known() else [])]


def kept_aside() -> list[datetime]:
    """When the old databases were that restores have kept aside and that are still there."""
    return [moment for each in databases() for moment in each.previous()]


def database_of(engine: Engine) -> DumpedDatabase:
    """A database as backups see it."""
    if engine.dialect.name == "sqlite":
        return SqliteDatabase(sqlite_path(engine))
    return PostgresDatabase(engine)


@contextmanager
def exclusive(wait_seconds: float = 0) -> Iterator[None]:
    """
    Let one backup, verification or restore run at a time.

    Raises:
        ConflictError: Another one is running.
    """
    engine = get_engine()
    beside = sqlite_path(engine).parent if engine.dialect.name == "sqlite" else None
    # Beside the file that it is about: its users may have other working folders.
    path = (beside or get_settings().data_dir) / LOCK_FILE
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    # The kernel drops the lock with the last process that holds it, so none is left behind.
    descriptor = os.open(path, os.O_CREAT | os.O_RDWR, 0o600)
    token = _held.set((descriptor,))
    try:
        _take(descriptor, time.monotonic() + wait_seconds)
        with live_database().lock():
            yield
    finally:
        _held.reset(token)
        os.close(descriptor)


def lock_descriptors() -> tuple[int, ...]:
    """Descriptors of the lock that `exclusive` holds here, for processes that work for it."""
    return _held.get()


def _take(descriptor: int, deadline: float) -> None:
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise ConflictError("another backup or restore is running") from None
            time.sleep(_RETRY_SECONDS)
        else:
            return


def _fit(built: Engine) -> None:
    """Bring a proven database to today's schema, and see that its sealed values open."""
    # Only then do today's models fit it.
    get_schema_service().upgrade(built)
    _open_sample(built)


def _open_sample(built: Engine) -> None:
    """Open the newest encrypted values of every table of people."""
    with session_scope(built, read_only=True) as session:
        for mapped in DATA_MAP.of_people:
            newest = select(*mapped.table.columns).order_by(*(key.desc() for key in mapped.keys))
            session.execute(newest.limit(_SAMPLE_ROWS)).all()


@lru_cache(maxsize=1)
def get_archive_service() -> ArchiveService:
    return ArchiveService()
