"""
Restore: a backup comes back without breaking a promise that was made since.

The backup is rebuilt beside the live database and proven; control tables are carried over from
the live one; erasures, withdrawals and retention are applied again; only then are the two swapped.
"""

from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any, Final
from uuid import UUID

import structlog
from sqlalchemy import Engine, Integer, delete, func, insert, select, update
from sqlalchemy.orm import Session

from backend.crypto import keyring
from backend.db_utils import (
    empty_wal_after_commit,
    forget_copies,
    get_engine,
    session_scope,
    snapshot_scope,
    writes_paused,
)
from backend.errors import RefusedError
from backend.models import DATA_MAP, DataConsent, Installation, User
from backend.privacy.mapped_tables import MappedTable
from backend.privacy.sql import last_number, reserve_numbers
from backend.services.archive_service import exclusive, get_archive_service, live_database
from backend.services.audit_service import Actor, get_audit_service
from backend.services.column_service import get_column_service
from backend.services.encryption_service import get_encryption_service
from backend.services.erasure_service import get_erasure_service
from backend.services.ledger_service import Replayed, get_ledger_service
from backend.services.retention_service import get_retention_service
from backend.services.rotation_service import get_rotation_service

log = structlog.get_logger(__name__)
_ROWS_PER_COPY: Final = 500


@dataclass(frozen=True, slots=True)
class Reapplied:
    """What was done again: people erased, consent events, rows restricted, rows retired."""

    erasures: int
    consents: int
    restrictions: int
    retention: int


@dataclass(frozen=True, slots=True)
class TableChange:
    """Rows of one table in the live database, and in what replaces it."""

    live: int
    restored: int


@dataclass(frozen=True, slots=True)
class Restored:
    """A restore, done or tried; *previous* says where the old database is kept."""

    backup_id: UUID
    dry_run: bool
    reapplied: Reapplied
    tables: dict[str, TableChange]
    previous: str | None


class RestoreService:
    """Puts a backup in the place of the live database."""

    def restore(self, backup_id: UUID, actor: Actor, *, dry_run: bool, confirm: bool) -> Restored:
        """
        Restore a backup, or say what that would change.

        Raises:
            RefusedError: Neither a dry run nor confirmed.
            NotFoundError: No such backup.
            BackupDamagedError: It is not what its manifest says; the live data are untouched.
            SchemaMismatchError: It was written by a newer version or on another engine.
            ConflictError: Another backup or restore is running.
        """
        if not dry_run and not confirm:
            raise RefusedError("a restore replaces the live database: set confirm to true")
        with exclusive():
            manifest = get_archive_service().manifest(backup_id)
            database = live_database()
            configured = {key.key_id.hex() for key in keyring.current().keys}
            with get_archive_service().rebuilt(database, manifest) as built:
                # Keys that the backup brought along are not configured: nothing may need them.
                get_rotation_service().rotate_rows(built, configured)
                get_rotation_service().index_missing(built)
                if dry_run:
                    restored = self._prepare(built, backup_id, actor, previous=None)
                else:
                    with writes_paused():
                        restored = self._put_in_place(built, backup_id, actor)
            if not dry_run:
                self._apply_late_entries()
                with session_scope(read_only=True) as session:
                    get_column_service().apply(session)
        with session_scope() as session:
            get_audit_service().record(
                session, "restore", actor, outcome="dry_run" if dry_run else "done",
                backup=backup_id, erasures=restored.reapplied.erasures,
            )  # fmt: skip
        return restored

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

    def _put_in_place(self, built: Engine, backup_id: UUID, actor: Actor) -> Restored:
        prepared = self._prepare(built, backup_id, actor, previous=None)
        kept = live_database().swap(built, datetime.now(UTC))
        log.warning("restored", backup=str(backup_id), previous=kept)
        return Restored(backup_id, False, prepared.reapplied, prepared.tables, kept)

    def _prepare(
        self, built: Engine, backup_id: UUID, actor: Actor, *, previous: str | None
    ) -> Restored:
        """Keep every promise in *built* that was made in the live database since."""
        with snapshot_scope() as live, session_scope(built) as restored:
            get_encryption_service().check(restored)
            get_encryption_service().note_primary(restored)
            consents = self._carry_over(live, restored)
            _advance_row_numbers(live, restored)
            self._carry_over_accounts(live, restored)
            restricted = _restricted_rows(restored)
            replayed = self.recover(restored)
            restricted = _restricted_rows(restored) - restricted
            run = get_retention_service().apply(restored, actor, dry_run=False)
            tables = {
                mapped.name: TableChange(_count(live, mapped), _count(restored, mapped))
                for mapped in DATA_MAP.of_people
            }
        reapplied = Reapplied(
            replayed.erasures, consents + replayed.consents, restricted, run.affected
        )
        return Restored(backup_id, True, reapplied, tables, previous)

    def _apply_late_entries(self) -> None:
        """Another process may have erased somebody while the swap was prepared."""
        with session_scope(read_only=True) as session:
            unfinished = get_ledger_service().unfinished(session)
        if unfinished:
            self.finish_ledger()

    def _carry_over(self, live: Session, restored: Session) -> int:
        """
        Replace the backup's control rows by the live ones; return how many consents are new.

        Only where both are the same installation: on a new machine the backup's are all there is.
        """
        ours, theirs = (s.scalars(select(Installation)).one() for s in (live, restored))
        if ours.id != theirs.id:
            return 0
        # A backup of before the first certificate has no key for them.
        theirs.signing_key = ours.signing_key
        saved = set(restored.scalars(select(DataConsent.id)))
        there, here = (set(s.scalars(select(User.id))) for s in (restored, live))
        for mapped in DATA_MAP.carried_over:
            _make_room(restored, mapped, sorted(there & here))
            rows = live.execute(select(mapped.table).execution_options(yield_per=_ROWS_PER_COPY))
            for part in rows.mappings().partitions(_ROWS_PER_COPY):
                mine = [dict(row) for row in part if _has_its_person(mapped, row, there)]
                if mine:
                    restored.execute(insert(mapped.table), mine)
        return sum(key not in saved for key in restored.scalars(select(DataConsent.id)))

    def _carry_over_accounts(self, live: Session, restored: Session) -> None:
        """Keep rights and passwords as they are now: a restore must not bring back old ones."""
        columns = (User.uid, User.password_hash, User.role, User.is_active, User.tokens_valid_after)
        before = {row.uid: tuple(row) for row in restored.execute(select(*columns))}
        for row in live.execute(select(*columns).where(User.anonymized_at.is_(None))):
            if row.uid in before and before[row.uid] != tuple(row):
                values = dict(zip([c.key for c in columns[1:]], tuple(row)[1:], strict=True))
                restored.execute(update(User).where(User.uid == row.uid).values(values))


def _make_room(restored: Session, mapped: MappedTable, people: list[int]) -> None:
    """Delete the backup's rows that live ones replace: not those of people whom it alone knows."""
    if mapped.link is None:
        restored.execute(delete(mapped.table))
        return
    restored.execute(delete(mapped.table).where(mapped.link.is_(None)))
    for at in range(0, len(people), _ROWS_PER_COPY):
        part = people[at : at + _ROWS_PER_COPY]
        restored.execute(delete(mapped.table).where(mapped.link.in_(part)))


def _has_its_person(mapped: MappedTable, row: Any, people: set[int]) -> bool:
    """Whether the person whose row this is exists; rows of people's own need theirs."""
    owner = None if mapped.link is None else row[mapped.link.name]
    return owner is None or owner in people


def _restricted_rows(session: Session) -> int:
    return sum(
        session.scalar(
            select(func.count()).select_from(m.table).where(m.table.c.restricted_at.is_not(None))
        )
        or 0
        for m in DATA_MAP.of_people
        if "restricted_at" in m.table.c
    )


def _count(session: Session, mapped: MappedTable) -> int:
    return session.scalar(select(func.count()).select_from(mapped.table)) or 0


def _advance_row_numbers(live: Session, restored: Session) -> None:
    """Make sure that no row number of the live database is given out again."""
    for mapped in DATA_MAP.tables:
        if isinstance(mapped.table.primary_key.columns[0].type, Integer):
            reserve_numbers(restored, mapped.key, last_number(live, mapped.key))


@lru_cache(maxsize=1)
def get_restore_service() -> RestoreService:
    return RestoreService()
