"""
Restore: a backup comes back without breaking a promise that was made since.

The backup is rebuilt beside the live database and proven; control tables are carried over from
the live one; erasures, withdrawals and retention are applied again; only then are the two swapped.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime
from functools import lru_cache
from typing import Final
from uuid import UUID

import structlog
from sqlalchemy import Engine, func, select
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from backend.backup.database import Database
from backend.backup.manifest import Break, Manifest
from backend.crypto import keyring
from backend.db_utils import (
    empty_wal_after_commit,
    forget_copies,
    get_engine,
    session_scope,
    snapshot_scope,
    writes_paused,
)
from backend.errors import (
    BackupDamagedError,
    ConflictError,
    HoldfastError,
    NotFoundError,
    RefusedError,
    UnavailableError,
)
from backend.models import DATA_MAP, BackupRecord, SignIn
from backend.privacy.comparison import compare
from backend.services.archive_service import (
    database_for,
    databases,
    exclusive,
    get_archive_service,
)
from backend.services.audit_service import Actor, get_audit_service
from backend.services.carry_over_service import get_carry_over_service
from backend.services.catalogue_service import get_catalogue_service, record_of
from backend.services.chain_service import StoredEvent, get_chain_service
from backend.services.checkpoint_service import get_checkpoint_service
from backend.services.column_service import get_column_service
from backend.services.encryption_service import get_encryption_service
from backend.services.erasure_service import get_erasure_service
from backend.services.ledger_service import Replayed, get_ledger_service
from backend.services.restore_target import database_at, is_noted, noted, sweep_noted
from backend.services.restored import Origin, Reapplied, Restored
from backend.services.retention_service import get_retention_service
from backend.services.rotation_service import get_rotation_service
from backend.services.schema_service import get_schema_service
from backend.services.trail_service import get_trail_service
from backend.services.transfer_service import Progress, ignore

log = structlog.get_logger(__name__)
_WAIT_SECONDS: Final = 2


class EmptyingError(ConflictError):
    """The restore would empty tables that have rows, and that was not confirmed."""

    code = "would_empty"


class RestoreService:
    """Puts a backup in the place of the live database, or beside it for a look."""

    def restore(
        self,
        backup_id: UUID | None,
        actor: Actor,
        *,
        dry_run: bool,
        confirm: bool,
        confirm_empty: bool = False,
        target_time: datetime | None = None,
        progress: Progress = ignore,
    ) -> Restored:
        """
        Restore a backup, or say what that would change.

        Args:
            backup_id: `None` for the newest one.
            confirm_empty: Also where tables that have rows now would have none.
            target_time: Restore what was committed up to then, from a backup of pgBackRest.
            progress: Told how many bytes are done, and of how many.

        Raises:
            RefusedError: Neither a dry run nor confirmed.
            NotFoundError: No such backup.
            BackupDamagedError: It is not what its manifest says; the live data are untouched.
            SchemaMismatchError: It was written by a newer version or on another engine.
            ConflictError: Another backup or restore is running, or the backup is not complete.
        """
        _require_word(dry_run=dry_run, confirm=confirm)
        breaks = _breaks()
        with exclusive(), _recorded(actor, backup_id, dry_run=dry_run) as note:
            if backup_id is None:
                _refuse_doubt(breaks)
            manifest = self._manifest(backup_id, target_time)
            database = database_for(manifest)
            with get_archive_service().rebuilt(
                database, manifest, progress, target_time=target_time
            ) as built:
                restored = self._use(
                    database,
                    built,
                    Origin.of(manifest),
                    actor,
                    dry_run=dry_run,
                    confirm_empty=confirm_empty,
                )
            return self._finished(replace(restored, breaks=breaks), note)

    def undo(self, actor: Actor, *, dry_run: bool, confirm: bool) -> Restored:
        """
        Put the database back that the last restore has kept aside; the present one is kept too.

        It is proven, and every promise made since is kept, as for a backup.

        Raises:
            NotFoundError: No database was kept aside.
            HoldfastError: As `restore`.
        """
        _require_word(dry_run=dry_run, confirm=confirm)
        with exclusive(), _recorded(actor, None, dry_run=dry_run) as note:
            kept_aside = ((moment, one) for one in databases() for moment in one.previous())
            kept, database = max(kept_aside, key=lambda each: each[0], default=(None, None))
            if kept is None or database is None:
                raise NotFoundError("no restore has kept a database aside")
            with get_archive_service().reopened(database, kept) as (built, revision, tables):
                origin = Origin(kept, revision, tables)
                restored = self._use(
                    database, built, origin, actor, dry_run=dry_run, confirm_empty=True
                )
            return self._finished(restored, note)

    def _use(
        self,
        database: Database,
        built: Engine,
        origin: Origin,
        actor: Actor,
        *,
        dry_run: bool,
        confirm_empty: bool,
    ) -> Restored:
        _bring_up(built)
        if dry_run:
            return self._prepare(built, origin, actor)
        with writes_paused():
            before = _last_event()
            restored = self._prepare(built, origin, actor)
            if restored.emptied and not confirm_empty:
                raise EmptyingError(
                    "the restore would leave these tables without a row: "
                    f"{', '.join(restored.emptied)}; set confirm_empty to true if that is meant",
                    tables=restored.emptied,
                )
            if _last_event() != before:
                # Only this process's writers wait; what others did meanwhile would be lost.
                raise ConflictError(
                    "another process has written meanwhile, and nothing was restored: stop the "
                    "others, or try again"
                )
            kept = database.swap(built, datetime.now(UTC))
            log.warning("restored", backup=str(origin.backup_id), previous=kept)
        return replace(restored, dry_run=False, previous=kept)

    def _finished(self, restored: Restored, note: Callable[[Restored], None]) -> Restored:
        """Do in the new database what could not be done before it was the live one."""
        if not restored.dry_run:
            self._apply_late_entries()
            with session_scope(read_only=True) as session:
                get_column_service().apply(session)
                get_ledger_service().mirror(session)
        note(restored)
        return restored

    def restore_to(
        self,
        backup_id: UUID | None,
        actor: Actor,
        target: str,
        *,
        progress: Progress = ignore,
    ) -> Restored:
        """
        Restore a backup beside the live database, for a look; the live one stays as it is.

        Every promise is kept there too: nobody who was erased is back.

        Args:
            target: A SQLite file or database URL that does not exist yet.

        Raises:
            RefusedError: It exists, or is no such address.
            HoldfastError: As `restore`.
        """
        database = database_at(target)
        with exclusive(), noted(target), _recorded(actor, backup_id, dry_run=False) as note:
            manifest = self._manifest(backup_id)
            with get_archive_service().rebuilt(database, manifest, progress) as built:
                _bring_up(built)
                restored = self._prepare(built, Origin.of(manifest), actor)
                restored = replace(restored, dry_run=False, target=database.publish(built))
            note(restored)
        return restored

    def sweep_target(self) -> int:
        """Remove what a killed `restore_to` left beside its target; return how many."""
        if not is_noted():
            return 0
        with exclusive(_WAIT_SECONDS):
            return sweep_noted()

    def _manifest(self, backup_id: UUID | None, before: datetime | None = None) -> Manifest:
        if backup_id is not None:
            return get_catalogue_service().manifest(backup_id)
        newest = get_archive_service().newest(before)
        if newest is None:
            raise NotFoundError("there is no backup in the store")
        return newest

    def recover(self, session: Session) -> Replayed:
        """Finish acts of the ledger that a killed process, or a database restored by other
        means, left undone."""
        replayed = get_ledger_service().replay(session, get_erasure_service().erase_again)
        get_ledger_service().mirror(session)
        empty_wal_after_commit(session)
        return replayed

    def finish_ledger(self) -> Replayed:
        """`recover` the live database in a transaction of its own, and forget what was erased."""
        with session_scope() as session:
            replayed = self.recover(session)
        if replayed.erasures:
            tables = [mapped.name for mapped in DATA_MAP.of_people]
            if left := forget_copies(get_engine(), tables):
                log.warning("statistics_kept", tables=left)
        return replayed

    def _prepare(self, built: Engine, origin: Origin, actor: Actor) -> Restored:
        """Keep every promise in *built* that was made in the live database since."""
        with snapshot_scope() as live, session_scope(built) as restored:
            get_encryption_service().check(restored)
            get_encryption_service().note_primary(restored)
            consents = get_carry_over_service().carry_over(live, restored)
            get_trail_service().resume(live, restored, actor)
            if origin.manifest is not None:
                # When it was taken, its own record was still running.
                restored.merge(record_of(origin.manifest))
            restricted = _restricted_rows(restored)
            replayed = get_ledger_service().replay(restored, get_erasure_service().erase_again)
            empty_wal_after_commit(restored)
            restricted = _restricted_rows(restored) - restricted
            retired = get_retention_service().apply_again(restored, actor)
            empty_wal_after_commit(restored)
            restored.flush()
            tables = {m.name: compare(live, restored, m) for m in DATA_MAP.of_people}
        return Restored(
            origin.backup_id,
            origin.created_at,
            True,
            Reapplied(replayed.erasures, consents + replayed.consents, restricted, retired),
            tables,
            [
                name
                for name, each in tables.items()
                if each.live
                and not each.restored
                and not origin.tables.get(name)
                # Whoever is signed out by it signs in again.
                and name != SignIn.__tablename__
            ],
            get_schema_service().missing_in(origin.schema_revision),
        )

    def _apply_late_entries(self) -> None:
        """Another process may have erased somebody while the swap was prepared."""
        with session_scope(read_only=True) as session:
            unfinished = get_ledger_service().unfinished(session)
        if unfinished:
            self.finish_ledger()


def _last_event() -> StoredEvent | None:
    with session_scope(read_only=True) as session:
        return get_chain_service().head(session)


def _require_word(*, dry_run: bool, confirm: bool) -> None:
    if not dry_run and not confirm:
        raise RefusedError("a restore replaces the live database: set confirm to true")


def _breaks() -> list[Break]:
    with session_scope(read_only=True) as session:
        return get_catalogue_service().breaks(session)


def _refuse_doubt(breaks: list[Break]) -> None:
    """Do not take an older backup for the newest, because that one was taken away."""
    if breaks:
        said = "; ".join(f"{each.backup_id} {each.why}" for each in breaks[:3])
        raise ConflictError(f"which backup is the newest is in doubt ({said}): name one by its id")


def _bring_up(built: Engine) -> None:
    """Let nothing in *built* need keys that this process does not have by itself."""
    configured = {key.key_id.hex() for key in keyring.configured().keys}
    get_rotation_service().rotate_rows(built, configured)
    get_rotation_service().index_missing(built)


def _restricted_rows(session: Session) -> int:
    return sum(
        session.scalar(
            select(func.count()).select_from(m.table).where(m.table.c.restricted_at.is_not(None))
        )
        or 0
        for m in DATA_MAP.of_people
        if "restricted_at" in m.table.c
    )


@contextmanager
def _recorded(
    actor: Actor, backup_id: UUID | None, *, dry_run: bool
) -> Iterator[Callable[[Restored], None]]:
    """Write down how the restore in the block ended, also when it was refused."""
    done: list[Restored] = []
    try:
        yield done.append
    except NotFoundError:
        # Nothing was tried.
        raise
    except (HoldfastError, SQLAlchemyError) as err:
        code = err.code if isinstance(err, HoldfastError) else type(err).__name__
        with suppress(SQLAlchemyError, UnavailableError):
            _record(actor, backup_id, code, None)
        raise
    for restored in done:
        outcome = "dry_run" if dry_run else "beside" if restored.target else "done"
        _record(actor, restored.backup_id, outcome, restored)
        if outcome == "done":
            get_checkpoint_service().make_if_possible()


def _record(actor: Actor, backup_id: UUID | None, outcome: str, restored: Restored | None) -> None:
    erasures = restored and restored.reapplied.erasures
    with session_scope() as session:
        if outcome == BackupDamagedError.code and backup_id is not None:
            record = session.get(BackupRecord, backup_id)
            if record is not None:
                record.error, record.verified_at = outcome, None
        get_audit_service().record(
            session, "restore", actor, outcome=outcome, backup=backup_id, erasures=erasures
        )


@lru_cache(maxsize=1)
def get_restore_service() -> RestoreService:
    return RestoreService()
