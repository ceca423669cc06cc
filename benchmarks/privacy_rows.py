"""
Rows of people, made inside the database: millions of them in minutes.

Every stay is one row in each table of `STAY_TABLES`; other people's stays also have a companion,
and an address to which their invoices go. Each encrypted column holds one sealed
value, the same in every row: opening it costs what opening any other costs. People who are
planted with equal numbers of stays have equal rows but for keys and unique columns.
"""

# ruff: noqa: S608 - Names and values of our own, none of them a stranger's.

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import date, datetime
from typing import Any, Final

from sqlalchemy import Column, Connection, Dialect, String, Uuid

from backend.crypto.columns import Encrypted
from backend.db_utils import make_engine
from backend.models import DATA_MAP
from backend.settings import get_settings

STAY_TABLES: Final = ("bookings", "payments", "invoices", "invoice_lines", "feedback")
# Guests who are not measured come a few times.
_STAYS_EACH: Final = 5
_FIRST_GUEST: Final = 1_000
# Above every row of the guests.
_FIRST_PLANTED: Final = 100_000_000
_ROOM_EACH: Final = 1_000_000
# Within the period for which the law keeps payments and invoices, 2555 days.
_DAYS: Final = 2_000
_TEXT: Final = "what a guest or the house has written"
_UNSET: Final = ("anonymized_at", "restricted_at")
_ADDRESSES: Final = "billing_addresses"
_COMPANIONS: Final = "companions"
# The number of the row is `n`, also of what it hangs from.
_NUMBERED: Final = ("id", "booking_id", "invoice_id")


@dataclass(frozen=True)
class People:
    """People in a row, with as many stays each; stay `n` is row `n` of every table."""

    first: int
    count: int
    first_stay: int
    stays_each: int
    in_company: bool = False

    @property
    def stays(self) -> int:
        return self.count * self.stays_each

    @property
    def rows(self) -> int:
        if self.in_company:
            return 2 * self.count + self.stays * (1 + len(STAY_TABLES))
        return self.count + self.stays * len(STAY_TABLES)


def guests(rows: int) -> People:
    """Return other people who have *rows* rows together, or a few less."""
    one = People(_FIRST_GUEST, 1, 1, _STAYS_EACH, in_company=True)
    return replace(one, count=rows // one.rows)


def person(place: int, stays: int) -> People:
    """Return one person to be measured; people in other places have other rows."""
    first = _FIRST_PLANTED + place * _ROOM_EACH
    return People(first, 1, first, stays)


@contextmanager
def unmeasured(*, autocommit: bool = False) -> Iterator[Connection]:
    """Open a connection of its own, for work that is not measured."""
    engine = make_engine(get_settings().sqlalchemy_url)
    try:
        with engine.connect() as connection:
            if autocommit and engine.dialect.name == "postgresql":
                connection.execution_options(isolation_level="AUTOCOMMIT")
            elif engine.dialect.name == "postgresql":
                # The rows fit together as they are made: none of two million need be looked up.
                connection.exec_driver_sql("SET LOCAL session_replication_role = replica")
            yield connection
            connection.commit()
    finally:
        engine.dispose()


def fill(people: People) -> None:
    """Put *people* into the empty tables, and tell PostgreSQL's planner."""
    with unmeasured() as connection:
        if connection.dialect.name == "postgresql":
            tables = ", ".join((*STAY_TABLES, _COMPANIONS, _ADDRESSES))
            connection.exec_driver_sql(f"TRUNCATE {tables}")
        _insert(connection, people)
    settle()


def fill_feedback(count: int) -> None:
    """Have *count* rows of feedback and no others, of days before yesterday."""
    with unmeasured() as connection:
        if connection.dialect.name == "postgresql":
            connection.exec_driver_sql("TRUNCATE feedback")
        else:
            connection.exec_driver_sql("DELETE FROM feedback")
        days = _day(connection.dialect, datetime, "n", earlier=2)
        cells = {"submitted_at": days, "booking_id": "NULL"}
        statement = _statement(connection.dialect, "feedback", 1, count, cells)
        connection.exec_driver_sql(statement)
    settle()


def plant(planted: Sequence[People]) -> None:
    """Add people to be measured."""
    with unmeasured() as connection:
        for one in planted:
            _insert(connection, one)
    settle()


def clear() -> None:
    """Take every planted row away, so that the database is what it was."""
    with unmeasured() as connection:
        for table in (*reversed(STAY_TABLES), "users"):
            connection.exec_driver_sql(f"DELETE FROM {table} WHERE id >= {_FIRST_PLANTED}")


def settle() -> None:
    """Leave nothing behind that the next measurement would pay for."""
    with unmeasured(autocommit=True) as connection:
        if connection.dialect.name == "postgresql":
            connection.exec_driver_sql("VACUUM ANALYZE")
    checkpoint()


def checkpoint() -> None:
    """Have both sides begin with an empty log."""
    with unmeasured(autocommit=True) as connection:
        if connection.dialect.name == "postgresql":
            connection.exec_driver_sql("CHECKPOINT")
        else:
            # SQLite does so outside a transaction only.
            raw: Any = connection.connection.driver_connection
            raw.execute("COMMIT") if raw.in_transaction else None
            raw.execute("PRAGMA wal_checkpoint(TRUNCATE)")


def _insert(connection: Connection, people: People) -> None:
    of_stays: tuple[str, ...] = STAY_TABLES
    last = people.first + people.count - 1
    if people.in_company:
        of_stays += (_COMPANIONS,)
        statement = _statement(connection.dialect, _ADDRESSES, people.first, last, {})
        connection.exec_driver_sql(statement)
    connection.exec_driver_sql(_statement(connection.dialect, "users", people.first, last, {}))
    last = people.first_stay + people.stays - 1
    owner = f"({people.first} + (n - {people.first_stay}) / {people.stays_each})"
    cells = {"user_id": owner} | ({"billing_address_id": owner} if people.in_company else {})
    for table in of_stays:
        statement = _statement(connection.dialect, table, people.first_stay, last, cells)
        connection.exec_driver_sql(statement)


def _statement(
    dialect: Dialect, table: str, first: int, last: int, given: Mapping[str, str]
) -> str:
    cells = {
        column.name: cell
        for column in DATA_MAP[table].table.columns
        if (cell := given.get(column.name) or _cell(column, dialect, f"(n - {first})")) is not None
    }
    if dialect.name == "postgresql":
        source = f"generate_series({first}, {last}) AS series(n)"
        begin = ""
    else:
        source = "series"
        begin = (
            f"WITH RECURSIVE series(n) AS (SELECT {first} UNION ALL "
            f"SELECT n + 1 FROM series WHERE n < {last}) "
        )
    names, values = ", ".join(cells), ", ".join(cells.values())
    return f"{begin}INSERT INTO {table} ({names}) SELECT {values} FROM {source}"


def _cell(column: Column[Any], dialect: Dialect, position: str) -> str | None:
    """Spell what a column holds in row `n`; `None` where it stays NULL."""
    if column.name in _NUMBERED:
        return "n"
    if isinstance(column.type, Encrypted):
        return _sealed(column.type, dialect)
    if column.name in _UNSET or column.foreign_keys:
        return None
    # A search term, too, belongs to one person.
    if column.unique or column.name.endswith("_index"):
        return _unique(column, dialect)
    return _plain(column, dialect, position)


def _plain(column: Column[Any], dialect: Dialect, position: str) -> str:
    kind = column.type.python_type
    if kind in (date, datetime):
        # `check_in` before `check_out`.
        return _day(dialect, kind, position, earlier=3 if column.name == "check_in" else 0)
    if column.name == "role":
        return "'user'"
    if kind is str:
        length = column.type.length if isinstance(column.type, String) else None
        return f"'{'standard'[:length]}'"
    return "TRUE" if kind is bool else "1"


def _sealed(kind: Encrypted, dialect: Dialect) -> str | None:
    # Bound to their row, they could not be the same in each.
    if kind.row_bound:
        return None
    plain = date(1931, 3, 14) if kind.python_type is date else _TEXT
    return f"'{kind.bind_processor(dialect)(plain)}'"


def _unique(column: Column[Any], dialect: Dialect) -> str:
    if not isinstance(column.type, Uuid):
        return "'N' || n"
    is_postgresql = dialect.name == "postgresql"
    return "gen_random_uuid()" if is_postgresql else "lower(hex(randomblob(16)))"


def _day(dialect: Dialect, kind: type[date], position: str, *, earlier: int) -> str:
    if dialect.name == "postgresql":
        day = f"(CURRENT_DATE - mod({position}, {_DAYS}) - {earlier})"
        return f"({day} + TIME '12:30')::timestamptz" if kind is datetime else day
    form = "%Y-%m-%d 12:30:00.000000" if kind is datetime else "%Y-%m-%d"
    return f"strftime('{form}', 'now', '-' || ({position} % {_DAYS} + {earlier}) || ' days')"
