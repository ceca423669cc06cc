"""Backups: making, listing and proving them."""

import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from contextvars import copy_context
from datetime import UTC, datetime
from functools import lru_cache
from threading import Thread
from typing import Final
from uuid import UUID, uuid4

import structlog
from sqlalchemy import update
from sqlalchemy.exc import SQLAlchemyError

from backend.backup.manifest import (
    Manifest,
    archive_name,
    delete_backup,
    escrow_name,
    finish_deletions,
    gone_ids,
)
from backend.backup.pgbackrest.says import Kind
from backend.backup.storage import Store
from backend.db_utils import is_storable, session_scope
from backend.errors import (
    BackupDamagedError,
    HoldfastError,
    RefusedError,
    SchemaMismatchError,
    UnavailableError,
)
from backend.models import BackupRecord, BackupStatus
from backend.services.abandoned_backups import drop_failed, forget_gone, settle_abandoned
from backend.services.archive_service import (
    BackupKeyError,
    database_for,
    databases,
    exclusive,
    get_archive_service,
)
from backend.services.audit_service import Actor, get_audit_service
from backend.services.catalogue_service import get_catalogue_service, record_of
from backend.services.checkpoint_service import get_checkpoint_service, is_checkpoint
from backend.services.cluster_service import is_used
from backend.services.dump_service import get_dump_service
from backend.services.ledger_service import get_ledger_service
from backend.services.store_service import Synced, get_store_service, signer, store
from backend.services.transfer_service import Progress, ignore
from backend.settings import BackupVerify, get_settings

log = structlog.get_logger(__name__)
MAX_LABEL_CHARS: Final = 100
_PROGRESS_SECONDS: Final = 1
_RECOVER_WAIT_SECONDS: Final = 2
_NEVER: Final = datetime.min.replace(tzinfo=UTC)


def _nobody(_record: BackupRecord) -> None:
    """Tell nobody."""


class BackupService:
    """Makes backups in the store and keeps records of them."""

    def create(
        self,
        actor: Actor,
        label: str | None = None,
        *,
        kind: Kind = Kind.FULL,
        progress: Progress = ignore,
        begun: Callable[[BackupRecord], None] = _nobody,
    ) -> BackupRecord:
        """
        Back up the database; return when it is stored, durably and whole, and looked at again.

        Manages its own transactions: record and event must exist before the first byte does.

        Args:
            kind: Other than full where pgBackRest makes it.
            progress: Told how many bytes are done, and of about how many.
            begun: Given the record once it says `running`.

        Raises:
            RefusedError: *label* is too long, or no text.
            ConflictError: Another backup or restore is running.
            UnavailableError: The store or the dump tool fails; the record says `failed`.
            BackupDamagedError: What was stored does not restore; the record says so.
        """
        if label is not None and not (len(label) <= MAX_LABEL_CHARS and is_storable(label)):
            raise RefusedError(f"a label is text of at most {MAX_LABEL_CHARS} characters")
        if kind is not Kind.FULL and not is_used():
            raise RefusedError("every backup is full: only BACKUP_ENGINE=pgbackrest makes others")
        with exclusive():
            settle_abandoned()
            drop_failed()
            record = self._begin(label, actor)
            begun(record)
            try:
                manifest = get_dump_service().write(record, kind, _Recorder(record.id, progress))
            except BaseException as err:
                self._fail(record.id, actor, err)
                raise
            self._finish(manifest, actor)
            self._look_at(manifest, actor)
            self._add_escrow(manifest, actor)
            get_checkpoint_service().make_if_possible()
            self._copy()
            with session_scope(read_only=True) as session:
                return session.get_one(BackupRecord, record.id)

    def _look_at(self, manifest: Manifest, actor: Actor) -> None:
        """Look at a new backup as `BACKUP_VERIFY` says; only damage is an error of the backup."""
        wanted = get_settings().backup_verify
        try:
            if wanted is BackupVerify.READ:
                get_archive_service().read_through(manifest)
            elif wanted is BackupVerify.RESTORE:
                self._prove(manifest, actor)
        except BackupDamagedError as err:
            if wanted is BackupVerify.READ:
                self._note_proof(UUID(manifest.id), actor, err.code)
            raise
        except HoldfastError as err:
            # For want of room, say. The record says that it is not proven.
            log.warning("backup_not_looked_at", backup=manifest.id, code=err.code)

    def _add_escrow(self, manifest: Manifest, actor: Actor) -> None:
        """Add the copy for the holder of `BACKUP_GPG_RECIPIENT`; without it, the backup stands."""
        recipient = get_settings().backup_gpg_recipient
        if recipient is None or manifest.repository_label is not None:
            return
        outcome = "done"
        try:
            with store().create(escrow_name(manifest.id)) as out:
                get_dump_service().wrap_copy(manifest, recipient, out)
        except HoldfastError as err:
            log.error("escrow_failed", backup=manifest.id, code=err.code)
            outcome = err.code
        with session_scope() as session:
            get_audit_service().record(
                session, "backup_escrowed", actor, outcome=outcome, backup=manifest.id
            )

    def start(
        self, actor: Actor, label: str | None = None, *, kind: Kind = Kind.FULL
    ) -> BackupRecord:
        """Begin a backup and return its record, `running`; how it ends, the record will say."""
        begun: Future[BackupRecord] = Future()

        def work() -> None:
            try:
                self.create(actor, label, kind=kind, begun=begun.set_result)
            except Exception as err:  # noqa: BLE001 - the edge of the thread
                if not begun.done():
                    begun.set_exception(err)
                elif not isinstance(err, HoldfastError):
                    # Of what is known, its record and the log tell.
                    log.error("backup_thread_failed", error=type(err).__name__)

        # With the request's id in what it logs.
        Thread(target=copy_context().run, args=(work,), name="backup").start()
        return begun.result()

    def verify(self, backup_id: UUID, actor: Actor, *, progress: Progress = ignore) -> BackupRecord:
        """
        Prove that a backup restores: rebuild it beside the live database, check it, drop it.

        Raises:
            NotFoundError: No such backup.
            BackupDamagedError: It does not restore to what its manifest says.
            UnknownKeyError: Its key is not configured.
        """
        with exclusive():
            try:
                manifest = get_catalogue_service().manifest(backup_id)
            except (BackupDamagedError, BackupKeyError, SchemaMismatchError) as err:
                self._note_proof(backup_id, actor, err.code)
                raise
            self._prove(manifest, actor, progress)
        with session_scope(read_only=True) as session:
            return session.get_one(BackupRecord, backup_id)

    def prove_next(self, actor: Actor) -> list[UUID]:
        """
        Prove the newest backup, unless it is proven, and of the others the one whose proof is the
        oldest.

        Raises:
            HoldfastError: One cannot be proven; the others were looked at all the same.
        """
        with session_scope(read_only=True) as session:
            records = get_catalogue_service().records(session)
        good = [r for r in records if r.status is BackupStatus.COMPLETE and r.error is None]
        newest = [record for record in good[:1] if record.verified_at is None]
        others = sorted(
            (record for record in good if record not in newest),
            key=lambda record: record.verified_at or _NEVER,
        )
        due = [record.id for record in newest + others[:1]]
        failed: HoldfastError | None = None
        for backup_id in due:
            try:
                self.verify(backup_id, actor)
            except HoldfastError as err:
                failed = err
        if failed is not None:
            raise failed
        return due

    def copy(self) -> Synced:
        """
        Make all stores hold the same; see `StoreService.sync`.

        Raises:
            ConflictError: A backup or restore is running; it is followed by this.
        """
        with exclusive():
            settle_abandoned()
            return self._copy()

    def _copy(self) -> Synced:
        with session_scope(read_only=True) as session:
            get_ledger_service().mirror(session)
        return get_store_service().sync(_unsettled, _is_ours)

    def recover(self) -> int:
        """
        Clear up after a process that was killed: its record is `failed`, its files are gone.

        Returns:
            How many things were left behind.

        Raises:
            ConflictError: A backup is still running elsewhere.
            UnavailableError: The store cannot be reached.
        """
        # A process that was killed a moment ago may still have one that ends by itself.
        with exclusive(_RECOVER_WAIT_SECONDS):
            left = store().sweep() + sum(each.sweep() for each in databases()) + settle_abandoned()
            drop_failed()
            left += finish_deletions(store(), gone_ids(store(), signer))
            get_catalogue_service().adopt()
            forget_gone()
            return left

    def _begin(self, label: str | None, actor: Actor) -> BackupRecord:
        backup_id = uuid4()
        with session_scope() as session:
            record = BackupRecord(
                id=backup_id,
                label=label,
                status=BackupStatus.RUNNING,
                location=store().location(archive_name(str(backup_id))),
                created_at=datetime.now(UTC),
                kind="full",
                bytes_done=0,
            )
            session.add(record)
            get_audit_service().record(
                session, "backup_created", actor, outcome="begun", backup=backup_id
            )
        return record

    def _finish(self, manifest: Manifest, actor: Actor) -> None:
        with session_scope() as session:
            session.merge(record_of(manifest))
            get_audit_service().record(session, "backup_created", actor, backup=manifest.id)

    def _fail(self, backup_id: UUID, actor: Actor, err: BaseException) -> None:
        code = _code(err)
        log.error("backup_failed", backup=str(backup_id), code=code)
        # Whatever fails here is done by the next start, or the next backup.
        with suppress(HoldfastError):
            delete_backup(store(), str(backup_id))
            # What carried it may have been killed, too.
            store().sweep()
        with suppress(UnavailableError, SQLAlchemyError), session_scope() as session:
            record = session.get_one(BackupRecord, backup_id)
            record.status, record.error = BackupStatus.FAILED, code
            get_audit_service().record(
                session, "backup_created", actor, outcome=code, backup=backup_id
            )
        with suppress(HoldfastError, SQLAlchemyError):
            drop_failed()

    def _prove(self, manifest: Manifest, actor: Actor, progress: Progress = ignore) -> None:
        try:
            with get_archive_service().rebuilt(database_for(manifest), manifest, progress):
                pass
        except HoldfastError as err:
            self._note_proof(UUID(manifest.id), actor, err.code)
            raise
        self._note_proof(UUID(manifest.id), actor, None)

    def _note_proof(self, backup_id: UUID, actor: Actor, failure: str | None) -> None:
        if failure:
            tell = log.error if failure == BackupDamagedError.code else log.warning
            tell("backup_not_proven", backup=str(backup_id), code=failure)
        with session_scope() as session:
            record = session.get(BackupRecord, backup_id)
            if record is None and failure is None:
                record = session.merge(record_of(get_archive_service().manifest(backup_id)))
            if record is not None and failure in (None, BackupDamagedError.code):
                record.error = failure
                record.verified_at = None if failure else datetime.now(UTC)
            get_audit_service().record(
                session, "backup_verified", actor, outcome=failure or "done", backup=backup_id
            )


def _is_ours(where: Store, name: str) -> bool:
    if is_checkpoint(name):
        return get_checkpoint_service().is_ours(where, name)
    return get_ledger_service().is_ours(where, name)


def _unsettled() -> set[str]:
    with session_scope(read_only=True) as session:
        return get_ledger_service().unfinished(session)


class _Recorder:
    """Writes into the record how far a backup is, now and then."""

    def __init__(self, backup_id: UUID, progress: Progress) -> None:
        self._backup_id, self._progress = backup_id, progress
        self._next = time.monotonic() + _PROGRESS_SECONDS

    def __call__(self, done: int, total: int) -> None:
        self._progress(done, total)
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + _PROGRESS_SECONDS
            # A busy database must not stop its backup.
            with suppress(SQLAlchemyError, UnavailableError), session_scope() as session:
                mine = update(BackupRecord).where(BackupRecord.id == self._backup_id)
                session.execute(mine.values(bytes_done=done))


def _code(err: BaseException) -> str:
    return err.code if isinstance(err, HoldfastError) else type(err).__name__


@lru_cache(maxsize=1)
def get_backup_service() -> BackupService:
    return BackupService()
