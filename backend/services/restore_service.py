"""
Restore: a backup comes back without breaking a promise that was made since.

The backup is rebuilt beside the live database and proven; control tables are carried over from
the live one; erasures, withdrawals and retention are applied again; only then are the two swapped.
"""

from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from functools import lru_cache, partial
from typing import Final
from uuid import UUID

import structlog
from sqlalchemy import Engine, func, select
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from backend.backup.database import Database
from backend.backup.manifest import Break, Manifest
from backend.backup.postgres import PostgresDatabase
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
    ConflictError,
    HoldfastError,
    NotFoundError,
    RefusedError,
)
from backend.models import DATA_MAP, SignIn
from backend.privacy.comparison import compare
from backend.services.archive_service import (
    database_for,
    databases,
    exclusive,
    get_archive_service,
)
from backend.services.audit_service import Actor
from backend.services.carry_over_service import get_carry_over_service
from backend.services.catalogue_service import get_catalogue_service, record_of
from backend.services.chain_service import StoredEvent
from backend.services.checkpoint_service import get_checkpoint_service
from backend.services.column_service import get_column_service
from backend.services.encryption_service import get_encryption_service
from backend.services.erasure_service import get_erasure_service
from backend.services.ledger_service import Replayed, get_ledger_service
from backend.services.restore_records import (
    failures_recorded,
    is_live,
    last_event,
    record_lost,
    record_restore,
    record_unfinished,
    unwritten_since,
)
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
        with exclusive(), failures_recorded(actor, backup_id):
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
            self._finish(restored, actor)
            return replace(restored, breaks=breaks)

    def undo(self, actor: Actor, *, dry_run: bool, confirm: bool) -> Restored:
        """
        Put the database back that the last restore has kept aside; the present one is kept too.

        It is proven, and every promise made since is kept, as for a backup.

        Raises:
            NotFoundError: No database was kept aside.
            HoldfastError: As `restore`.
        """
        _require_word(dry_run=dry_run, confirm=confirm)
        with exclusive(), failures_recorded(actor, None):
            kept_aside = ((moment, one) for one in databases() for moment in one.previous())
            kept, database = max(kept_aside, key=lambda each: each[0], default=(None, None))
            if kept is None or database is None:
                raise NotFoundError("no restore has kept a database aside")
            with get_archive_service().reopened(database, kept) as (built, revision, tables):
                origin = Origin(kept, revision, tables)
                restored = self._use(
                    database, built, origin, actor, dry_run=dry_run, confirm_empty=True
                )
            self._finish(restored, actor)
            return restored

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
            before = last_event()
            restored = self._prepare(built, origin, actor)
            if restored.emptied and not confirm_empty:
                raise EmptyingError(
                    "the restore would leave these tables without a row: "
                    f"{', '.join(restored.emptied)}; set confirm_empty to true if that is meant",
                    tables=restored.emptied,
                )
            restored = replace(restored, dry_run=False)
            record_restore(actor, restored, "done", built=built)
            kept, failed = _swap(database, built, before)
            log.warning("restored", backup=str(origin.backup_id), previous=kept)
        restored = replace(restored, previous=kept)
        if failed is not None:
            record_unfinished(actor, restored, "swap", failed)
        elif isinstance(database, PostgresDatabase):
            record_lost(actor, restored, before)
        return restored

    def _finish(self, restored: Restored, actor: Actor) -> None:
        """
        Do in the new database what could not be done before it was the live one.

        It is restored, and its record says so: what fails here does not change that, and the next
        start does it again.
        """
        if restored.dry_run:
            record_restore(actor, restored, "dry_run")
            return
        steps = (self._apply_late_entries, _read_plain_columns, _mirror_ledger)
        for step in steps:
            try:
                step()
            except (HoldfastError, SQLAlchemyError) as err:
                record_unfinished(actor, restored, step.__name__.strip("_"), err)
        get_checkpoint_service().make_if_possible()

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
        with exclusive(), noted(target), failures_recorded(actor, backup_id):
            manifest = self._manifest(backup_id)
            with get_archive_service().rebuilt(database, manifest, progress) as built:
                _bring_up(built)
                restored = self._prepare(built, Origin.of(manifest), actor)
                # People's data lie there from then on: not without a record.
                record_restore(actor, restored, "beside")
                return replace(restored, dry_run=False, target=database.publish(built))

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
            is_same = get_carry_over_service().is_same(live, restored)
            retired = get_retention_service().apply_again(restored, actor, runs_lost=not is_same)
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


def _swap(
    database: Database, built: Engine, before: StoredEvent | None
) -> tuple[str | None, Exception | None]:
    """Swap; return where the old database is, or what failed when *built* was already in place."""
    mark = last_event(built)
    try:
        return database.swap(built, datetime.now(UTC), partial(unwritten_since, before)), None
    except (HoldfastError, SQLAlchemyError) as err:
        with suppress(HoldfastError, SQLAlchemyError):
            if mark is not None and is_live(mark):
                return None, err
        raise


def _read_plain_columns() -> None:
    with session_scope(read_only=True) as session:
        get_column_service().apply(session)


def _mirror_ledger() -> None:
    with session_scope(read_only=True) as session:
        get_ledger_service().mirror(session)


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


@lru_cache(maxsize=1)
def get_restore_service() -> RestoreService:
    return RestoreService()
