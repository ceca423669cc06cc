"""
Encrypting a column that holds plain values, in batches and beside running writers.

The column's type is changed in the model first; until this has run, reading a plain value in it
is refused. While it runs, and only then, both kinds are read.
"""

from collections.abc import Callable
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any, Final, cast

import structlog
from sqlalchemy import Column, Text, func, not_, select, type_coerce
from sqlalchemy.orm import Session

from backend.crypto import keyring
from backend.crypto.codecs import CODECS, UnencodableError
from backend.crypto.columns import Encrypted, allow_plaintext
from backend.crypto.rows import row_label
from backend.crypto.values import TEXT_PREFIX
from backend.db_utils import session_scope
from backend.errors import RefusedError
from backend.models import DATA_MAP, ColumnMigration
from backend.services.audit_service import Actor, get_audit_service
from backend.services.cells import batches, swap, swap_in

log = structlog.get_logger(__name__)
_PASSES: Final = 3

Progress = Callable[[int, int], None]


class ColumnService:
    """Declares, carries out and ends the encryption of a column."""

    def apply(self, session: Session) -> None:
        """Read plain values in this process where the database says that they may stand."""
        rows = session.execute(
            select(ColumnMigration.table_name, ColumnMigration.column_name).where(
                ColumnMigration.finished_at.is_(None)
            )
        )
        allow_plaintext((table, column) for table, column in rows)

    def encrypt(
        self, table: str, column: str, actor: Actor, progress: Progress | None = None
    ) -> int:
        """
        Encrypt the plain values of a column; return how many are left in plain.

        Left are values that writers put there meanwhile, and those that are not what the column is
        declared to hold.

        Manages its own transactions. Killed at any point, the next run goes on. Other processes
        read plain values once they have been restarted after the declaration.

        Args:
            progress: Told how many values are done, and of how many.

        Raises:
            RefusedError: The model does not declare this column as encrypted text.
        """
        found = self._require(table, column)
        with session_scope() as session:
            session.merge(
                ColumnMigration(
                    table_name=table,
                    column_name=column,
                    started_by=actor.ref(session),
                    started_at=datetime.now(UTC),
                    finished_at=None,
                )
            )
            get_audit_service().record(
                session, "column_encryption", actor, column=f"{table}.{column}"
            )
        with session_scope(read_only=True) as session:
            self.apply(session)
        done, total = 0, self._left(found)
        for _ in range(_PASSES):
            # Processes that were not restarted yet may write plain values meanwhile.
            done += self._encrypt_once(found, done, total, progress)
            if not self._left(found):
                break
        left = self._left(found)
        if not left:
            self._finish(table, column)
        return left

    def _encrypt_once(
        self, column: Column[Any], done: int, total: int, progress: Progress | None
    ) -> int:
        key, raw = DATA_MAP[column.table.name].key, type_coerce(column, Text)
        kind = cast("Encrypted", column.type)
        codec, cipher = CODECS[kind.codec], keyring.current().cipher(kind.scope)
        change, changed = swap_in(column), 0
        for cells in batches(None, select(key, raw).where(_is_plain(raw))):
            changes = []
            for row, text in cells:
                label = row_label(row) if kind.row_bound else b""
                try:
                    plain = codec.encode(codec.decode(text.encode()))
                except (ValueError, ArithmeticError, UnencodableError):
                    # Not what the column is declared to hold: sealed, nobody could read it.
                    log.error("cell_not_encrypted", column=f"{column.table.name}.{column.name}")
                else:
                    new = cipher.seal_text(plain, label)
                    changes.append({"row": row, "old": text, "new": new})
            changed += swap(None, change, changes)
            if progress is not None:
                progress(done + changed, max(total, done + changed))
        return changed

    def _finish(self, table: str, column: str) -> None:
        with session_scope() as session:
            row = session.get_one(ColumnMigration, (table, column))
            row.finished_at = datetime.now(UTC)
            session.flush()
            self.apply(session)

    def _left(self, column: Column[Any]) -> int:
        statement = select(func.count()).select_from(column.table)
        with session_scope(read_only=True) as session:
            plain = _is_plain(type_coerce(column, Text))
            return session.scalar(statement.where(plain)) or 0

    def _require(self, table: str, column: str) -> Column[Any]:
        mapped = next((mapped for mapped in DATA_MAP.tables if mapped.name == table), None)
        found = None if mapped is None else mapped.table.c.get(column)
        if found is None or not isinstance(found.type, Encrypted) or found.type.codec == "bytes":
            raise RefusedError("the model declares no encrypted text column of this name")
        return found


def _is_plain(raw: Any) -> Any:
    return raw.is_not(None) & not_(raw.startswith(TEXT_PREFIX))


@lru_cache(maxsize=1)
def get_column_service() -> ColumnService:
    return ColumnService()
