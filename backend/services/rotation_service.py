"""
Rotation: everything that a previous key protects is sealed anew under the primary one.

Online and resumable: cells change in batches ordered by key, each only where it still holds what
was read, so that a writer's value is never overwritten; two runs at once do each other no harm.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any, cast
from uuid import UUID

import structlog
from sqlalchemy import (
    Column,
    ColumnElement,
    Engine,
    Text,
    bindparam,
    func,
    select,
    type_coerce,
    update,
)

from backend.crypto import keyring
from backend.crypto.blind_index import TERM_PREFIX, term_prefixes
from backend.crypto.columns import Encrypted
from backend.crypto.rows import row_label
from backend.crypto.values import TEXT_PREFIX, token_prefixes
from backend.db_utils import session_scope
from backend.errors import (
    BackupDamagedError,
    ConflictError,
    CryptoError,
    HoldfastError,
    NotFoundError,
)
from backend.models import BLIND_INDEXES, DATA_MAP, EncryptionKey, IndexedColumn
from backend.services.archive_service import get_archive_service
from backend.services.audit_service import Actor, get_audit_service
from backend.services.backup_service import get_backup_service
from backend.services.cells import batches, swap, swap_in
from backend.services.cluster_service import get_cluster_service
from backend.services.key_use_service import KeyUse, get_key_use_service
from backend.services.ledger_service import get_ledger_service
from backend.services.store_service import get_store_service

log = structlog.get_logger(__name__)

Progress = Callable[[int, int], None]


@dataclass(slots=True)
class Rotated:
    """What one run sealed anew, and what it could not open, by column or kind."""

    primary: str
    changed: dict[str, int] = field(default_factory=dict)
    failed: dict[str, int] = field(default_factory=dict)
    left: dict[str, KeyUse] = field(default_factory=dict)

    @property
    def finished(self) -> bool:
        return not any(use.total for use in self.left.values())


class RotationService:
    """Moves data to the primary key, and lets go of keys that nothing needs any more."""

    def rotate(self, actor: Actor, progress: Progress | None = None) -> Rotated:
        """
        Seal anew whatever a previous key protects: columns, blind indexes, ledger, backups.

        Manages its own transactions, one a batch, after one that records that it begins. Killed
        at any point, the next run goes on.

        Args:
            progress: Told how many cells are done, and of how many.
        """
        done = Rotated(keyring.current().primary.key_id.hex())
        with session_scope() as session:
            get_audit_service().record(
                session, "keys_rotated", actor, outcome="begun", primary=done.primary
            )
        self._rotate_rows(done, None, progress)
        with session_scope(read_only=True) as session:
            _add(done, "ledger", get_ledger_service().reseal(session), 0)
        self._rotate_backups(done)
        with session_scope() as session:
            uses = get_key_use_service().uses(session)
            done.left = {key: use for key, use in uses.items() if key != done.primary}
            get_audit_service().record(
                session, "keys_rotated", actor, primary=done.primary,
                changed=sum(done.changed.values()), failed=sum(done.failed.values()),
            )  # fmt: skip
        return done

    def rotate_rows(self, engine: Engine, configured: set[str]) -> None:
        """
        Seal anew the rows of a database that is being restored.

        Args:
            configured: Ids of the keys that this process has by itself. Others came with the
                backup: nothing needs them afterwards, and they are noted as disabled.

        Raises:
            BackupDamagedError: A value does not open.
        """
        done = Rotated(keyring.current().primary.key_id.hex())
        with session_scope(engine, read_only=True) as session:
            others = select(EncryptionKey.key_id).where(EncryptionKey.key_id != done.primary)
            if session.scalar(others.limit(1)) is None:
                # No other key ever sealed anything there: it need not be read whole to say so.
                return
        self._rotate_rows(done, engine, None)
        if done.failed:
            raise BackupDamagedError(f"{sum(done.failed.values())} values do not open")
        with session_scope(engine) as session:
            session.execute(
                update(EncryptionKey)
                .where(EncryptionKey.key_id.not_in(configured))
                .values(disabled_at=datetime.now(UTC))
            )

    def index_missing(self, engine: Engine | None) -> None:
        """Compute the index terms of rows that are older than their index; may be run again."""
        for indexed in BLIND_INDEXES:
            column, source = indexed.index_column, indexed.source
            key = DATA_MAP[column.table.name].key
            missing = select(key, source).where(column.is_(None), source.is_not(None))
            fill = (
                update(column.table)
                .where(key == bindparam("row"), column.is_(None))
                .values({column.name: bindparam("new")})
            )
            for rows in batches(engine, missing):
                terms = [{"row": row, "new": indexed.index.term(value)} for row, value in rows]
                swap(engine, fill, terms)

    def disable(self, key_id: str, actor: Actor) -> None:
        """
        Retire a key: it opens nothing any more, here and after a restart.

        Raises:
            NotFoundError: No data here was ever sealed with it.
            ConflictError: It is the primary key, or something still needs it.
        """
        if key_id == keyring.current().primary.key_id.hex():
            raise ConflictError("this is the primary key: put another one in its place first")
        with session_scope() as session:
            row = session.get(EncryptionKey, key_id)
            if row is None:
                raise NotFoundError(f"no data here was sealed with key {key_id}")
            use = get_key_use_service().uses(session)[key_id]
            if use.total:
                raise ConflictError(
                    f"key {key_id} still protects {use.words}: run `keys rotate` first"
                )
            row.disabled_at = row.disabled_at or datetime.now(UTC)
            get_audit_service().record(session, "key_disabled", actor, key=key_id)
        keyring.install(keyring.current().disabling([bytes.fromhex(key_id)]))

    def _rotate_rows(self, done: Rotated, engine: Engine | None, progress: Progress | None) -> None:
        columns = list(_encrypted_columns())
        total = sum(_left_in(column, engine) for column in columns)
        seen = 0
        for column in columns:
            for changed, failed in self._rotate_column(column, engine):
                _add(done, _name(column), changed, failed)
                seen += changed + failed
                if progress is not None:
                    progress(seen, max(total, seen))
        for indexed in BLIND_INDEXES:
            for changed, failed in self._rotate_index(indexed, engine):
                _add(done, _name(indexed.index_column), changed, failed)

    def _rotate_column(
        self, column: Column[Any], engine: Engine | None
    ) -> Iterator[tuple[int, int]]:
        """Seal the column's old cells anew; yield changed and failed counts per batch."""
        kind = cast("Encrypted", column.type)
        cipher, change = keyring.current().cipher(kind.scope), swap_in(column)
        for cells in batches(engine, _old_cells(column)):
            changes = []
            for row, token in cells:
                label = row_label(row) if kind.row_bound else b""
                try:
                    new = cipher.seal_text(cipher.open_text(token, label), label)
                except CryptoError as err:
                    # Left as it is, and told: what cannot be opened must not be lost.
                    log.error("cell_not_rotated", column=_name(column), code=err.code)
                else:
                    changes.append({"row": row, "old": token, "new": new})
            yield swap(engine, change, changes), len(cells) - len(changes)

    def _rotate_index(
        self, indexed: IndexedColumn, engine: Engine | None
    ) -> Iterator[tuple[int, int]]:
        """Compute old terms anew under the primary key; yield changed and failed per batch."""
        column, source = indexed.index_column, indexed.source
        cipher = keyring.current().cipher(cast("Encrypted", source.type).scope)
        prefixes = term_prefixes(keyring.current().primary)
        old = select(DATA_MAP[column.table.name].key, column, type_coerce(source, Text)).where(
            column.startswith(TERM_PREFIX),
            func.substr(column, 1, len(prefixes[0])).not_in(prefixes),
            source.is_not(None),
        )
        for rows in batches(engine, old):
            changes = []
            for row, term, token in rows:
                try:
                    new = indexed.index.term(cipher.open_text(token).decode())
                except CryptoError as err:
                    log.error("term_not_rotated", column=_name(column), code=err.code)
                else:
                    changes.append({"row": row, "old": term, "new": new})
            yield swap(engine, swap_in(column), changes), len(rows) - len(changes)

    def _rotate_backups(self, done: Rotated) -> None:
        for backup_id in get_archive_service().needing_other_than(done.primary):
            try:
                get_archive_service().rewrap(UUID(backup_id))
            except HoldfastError as err:
                log.error("backup_not_rotated", backup=backup_id, code=err.code)
                _add(done, "backups", 0, 1)
            else:
                _add(done, "backups", 1, 0)
        get_cluster_service().reseal()
        get_store_service().sign_notes_anew()
        try:
            get_backup_service().copy()
        except ConflictError:
            # A backup is being made: its end, or the scheduler, copies.
            get_store_service().sync_due.set()


def _encrypted_columns() -> Iterator[Column[Any]]:
    for mapped in DATA_MAP.tables:
        yield from (c for c in mapped.table.columns if isinstance(c.type, Encrypted))


def _old_cells(column: Column[Any]) -> Any:
    """Select keys and tokens of cells that the primary key did not seal, by key."""
    key, raw = DATA_MAP[column.table.name].key, type_coerce(column, Text)
    return select(key, raw).where(_is_old(raw))


def _is_old(raw: ColumnElement[Any]) -> ColumnElement[bool]:
    prefixes = token_prefixes(keyring.current().primary.key_id)
    head = func.substr(raw, 1, len(prefixes[0]))
    return raw.startswith(TEXT_PREFIX) & head.not_in(prefixes)


def _left_in(column: Column[Any], engine: Engine | None) -> int:
    statement = select(func.count()).select_from(column.table)
    with session_scope(engine, read_only=True) as session:
        return session.scalar(statement.where(_is_old(type_coerce(column, Text)))) or 0


def _name(column: Column[Any]) -> str:
    return f"{column.table.name}.{column.name}"


def _add(done: Rotated, what: str, changed: int, failed: int) -> None:
    if changed:
        done.changed[what] = done.changed.get(what, 0) + changed
    if failed:
        done.failed[what] = done.failed.get(what, 0) + failed


@lru_cache(maxsize=1)
def get_rotation_service() -> RotationService:
    return RotationService()
