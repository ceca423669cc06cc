"""The tables and columns that the live database has, declared or not, as its catalogue says."""

from dataclasses import dataclass
from typing import Final

from sqlalchemy import text as sql
from sqlalchemy.orm import Session

_SQLITE_TABLES: Final = sql("SELECT name FROM sqlite_master WHERE type = 'table' ORDER BY rowid")
# Hidden columns of kind 1 are arguments of a virtual table and hold nothing.
_SQLITE_COLUMNS: Final = sql(
    "SELECT name, type = 'BLOB', 0 FROM pragma_table_xinfo(:name) WHERE hidden <> 1 ORDER BY cid"
)
# Partitions are read through their parent; a materialised view is a copy.
_POSTGRES_TABLES: Final = sql(
    """
    SELECT c.relname, n.nspname, n.nspname = current_schema()
    FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
    WHERE c.relkind IN ('r', 'p', 'f', 'm') AND NOT c.relispartition
      AND n.nspname <> 'information_schema' AND n.nspname !~ '^pg_'
    ORDER BY c.oid
    """
)
# All that may hold text: flags, times and spans of time do not.
_POSTGRES_COLUMNS: Final = sql(
    """
    SELECT a.attname, t.typname = 'bytea', t.typcategory = 'N' OR t.typname = 'uuid'
    FROM pg_attribute a JOIN pg_type t ON t.oid = a.atttypid
      JOIN pg_class c ON c.oid = a.attrelid JOIN pg_namespace n ON n.oid = c.relnamespace
    WHERE n.nspname = :schema AND c.relname = :name AND a.attnum > 0 AND NOT a.attisdropped
      AND t.typcategory NOT IN ('B', 'D', 'T')
    ORDER BY a.attnum
    """
)


@dataclass(frozen=True, slots=True)
class LiveTable:
    """A table as it is; *is_ours* says that it lies in the schema which the data map is about."""

    name: str
    schema: str | None
    is_ours: bool

    @property
    def label(self) -> str:
        return self.name if self.is_ours else f"{self.schema}.{self.name}"


@dataclass(frozen=True, slots=True)
class LiveColumn:
    """A column that may hold text; SQLite says nothing of what one holds."""

    name: str
    is_binary: bool
    is_number: bool


def live_tables(session: Session) -> list[LiveTable]:
    """List all tables but the database's own; of SQLite those too, for they hold copies."""
    if session.get_bind().dialect.name == "sqlite":
        return [LiveTable(name, None, True) for name in session.scalars(_SQLITE_TABLES)]
    return [LiveTable(*row) for row in session.execute(_POSTGRES_TABLES)]


def live_columns(session: Session, table: LiveTable) -> list[LiveColumn]:
    """List the columns of *table* that may hold text."""
    statement = _SQLITE_COLUMNS if table.schema is None else _POSTGRES_COLUMNS
    asked = {"name": table.name} | ({} if table.schema is None else {"schema": table.schema})
    return [LiveColumn(*row) for row in session.execute(statement, asked)]
