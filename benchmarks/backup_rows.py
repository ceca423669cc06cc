"""
A database of a wanted size, in minutes: real rows by the sample service, then copies of them.

A copy has row numbers, search terms, references and hashes of its own, and takes its sealed cells
from other rows in another order, so that what is sealed repeats at distances that zstd at level 3
does not look back to.
"""

# ruff: noqa: S608 - Names and values of our own, none of them a stranger's.

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import Column, Connection, Uuid, text

from backend.crypto.columns import Encrypted
from backend.db_utils import make_engine, session_scope
from backend.models import DATA_MAP
from backend.services.audit_service import COMMAND_LINE
from backend.services.sample_service import get_sample_service
from backend.settings import get_settings
from benchmarks.processes import MIB

# Parents first.
TABLES: Final = (
    "users", "billing_addresses", "bookings", "companions", "payments", "invoices",
    "invoice_lines", "feedback",
)  # fmt: skip
_BOOKINGS: Final = 40_000
_FEW_BOOKINGS: Final = 16_000
# Below this, whole copies of the large sample would miss the wanted size by too much.
_SMALL_MIB: Final = 256
# Primes, so that a copy's sealed cells come from everywhere in the sample.
_STEP, _SHIFT = 7_919, 104_729
_HASH: Final = "'$argon2id$v=19$m=19456,t=2,p=1$' || "


@dataclass(frozen=True)
class _Sample:
    """The rows that are copied: up to which number each table has them."""

    last: dict[str, int]


def fill(wanted_mib: int) -> dict[str, int]:
    """
    Fill the prepared, empty installation until its database is *wanted_mib* large, or a bit more.

    Returns:
        Rows by table.
    """
    count = _BOOKINGS if wanted_mib >= _SMALL_MIB else _FEW_BOOKINGS
    with session_scope() as session:
        get_sample_service().load(session, COMMAND_LINE, count=count)
    with unmeasured() as connection:
        sample = _Sample({table: _last(connection, table) for table in TABLES})
        before, number = 0, 0
        # As much again as the last copy added must still fit.
        while (size := size_bytes(connection)) + (size - before) // 2 < wanted_mib * MIB:
            before, number = size, number + 1
            for table in TABLES:
                connection.exec_driver_sql(_copy(connection, table, number, sample))
            connection.commit()
            _hasten(connection)
        _advance_numbers(connection)
    settle()
    with unmeasured() as connection:
        return count_rows(connection)


@contextmanager
def unmeasured(*, autocommit: bool = False) -> Iterator[Connection]:
    """Open a connection for work that is not measured and need not last if it is cut off."""
    engine = make_engine(get_settings().sqlalchemy_url)
    try:
        with engine.connect() as connection:
            if autocommit and engine.dialect.name == "postgresql":
                connection.execution_options(isolation_level="AUTOCOMMIT")
            elif not autocommit:
                _hasten(connection)
            yield connection
            connection.commit()
    finally:
        engine.dispose()


def size_bytes(connection: Connection) -> int:
    """Return how large the database is, indexes and all."""
    if connection.dialect.name == "postgresql":
        question = "SELECT pg_database_size(current_database())"
    else:
        question = "SELECT page_count * page_size FROM pragma_page_count, pragma_page_size"
    return int(connection.execute(text(question)).scalar_one())


def count_rows(connection: Connection) -> dict[str, int]:
    counts = (f"SELECT '{table}', count(*) FROM {table}" for table in TABLES)
    rows = connection.exec_driver_sql(" UNION ALL ".join(counts))
    return {str(table): int(count) for table, count in rows}


def settle() -> None:
    """Leave nothing behind that the first measurement would pay for."""
    with unmeasured(autocommit=True) as connection:
        if connection.dialect.name == "postgresql":
            connection.exec_driver_sql("VACUUM ANALYZE")
            connection.exec_driver_sql("CHECKPOINT")
            return
        # SQLite empties its log outside a transaction only.
        raw: Any = connection.connection.driver_connection
        raw.execute("COMMIT") if raw.in_transaction else None
        raw.execute("PRAGMA wal_checkpoint(TRUNCATE)")


def _hasten(connection: Connection) -> None:
    if connection.dialect.name == "postgresql":
        # The rows fit together as they are made: no reference need be looked up.
        connection.exec_driver_sql("SET LOCAL session_replication_role = replica")
        return
    raw: Any = connection.connection.driver_connection
    if not raw.in_transaction:
        for pragma in ("foreign_keys=OFF", "synchronous=OFF", "cache_size=-262144"):
            raw.execute(f"PRAGMA {pragma}")


def _last(connection: Connection, table: str) -> int:
    return int(connection.exec_driver_sql(f"SELECT max(id) FROM {table}").scalar_one())


def _copy(connection: Connection, table: str, number: int, sample: _Sample) -> str:
    """Spell the statement that adds copy *number* of one table's sample."""
    last, multiplier = sample.last[table], _STEP + 2 * number
    cells = {
        column.name: _cell(column, connection, number, sample)
        for column in DATA_MAP[table].table.columns
    }
    names, values = ", ".join(cells), ", ".join(cells.values())
    # psycopg takes a single one for a parameter.
    modulo = "%%" if connection.dialect.name == "postgresql" else "%"
    return (
        f"INSERT INTO {table} ({names}) SELECT {values} FROM {table} AS a JOIN {table} AS b "
        f"ON b.id = 1 + (a.id * {multiplier} + {number} * {_SHIFT}) {modulo} {last} "
        # The first account is the admin's, whom nobody copies.
        f"WHERE a.id <= {last}" + (" AND a.id > 1" if table == "users" else "") + " ORDER BY a.id"
    )


def _cell(column: Column[Any], connection: Connection, number: int, sample: _Sample) -> str:
    """Spell what a column of copy *number* holds; `a` is the row that is copied."""
    name, last = column.name, sample.last
    if name == "id":
        return f"a.id + {number * last[column.table.name]}"
    if column.foreign_keys:
        (key,) = column.foreign_keys
        return f"a.{name} + {number * last[key.column.table.name]}"
    if isinstance(column.type, Encrypted):
        return f"b.{name}"
    if name == "role":
        return "'user'"
    return _own_cell(column, connection, number) or f"a.{name}"


def _own_cell(column: Column[Any], connection: Connection, number: int) -> str | None:
    """Spell what no two people share; `None` for any other column."""
    if column.name == "password_hash":
        return _HASH + _random(connection)
    if isinstance(column.type, Uuid):
        return _random(connection, is_uuid=True)
    # A search term stays NULL where there is nothing to search.
    if column.name.endswith("_index"):
        return f"CASE WHEN a.{column.name} IS NOT NULL THEN '1.' || {_random(connection)} END"
    return f"a.{column.name} || '-' || {number}" if column.unique else None


def _random(connection: Connection, *, is_uuid: bool = False) -> str:
    if connection.dialect.name == "sqlite":
        return "lower(hex(randomblob(16)))"
    return "gen_random_uuid()" if is_uuid else "md5(random()::text)"


def _advance_numbers(connection: Connection) -> None:
    """Have the next real row take a number above the copies'; SQLite sees to it by itself."""
    if connection.dialect.name == "postgresql":
        for table in TABLES:
            connection.exec_driver_sql(
                f"SELECT setval(pg_get_serial_sequence('{table}', 'id'), max(id)) FROM {table}"
            )
