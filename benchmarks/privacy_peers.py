"""
What ours is measured beside: the SQL that somebody would write by hand for one person.

The statements are spelled out once, before anything is measured. They do none of what makes ours
safe: no lock, plan, ledger, audit trail, check of what is left, or search for what leads where.
"""

# ruff: noqa: S608 - Names of the model and a number, nothing of a stranger's.

from collections.abc import Sequence
from datetime import UTC, date, datetime
from typing import Any, Final

import orjson
from sqlalchemy import Column, select, text

from backend.db_utils import get_engine
from backend.models import DATA_MAP
from backend.privacy.declarations import EraseMode

Row = dict[str, Any]
_ROWS_PER_READ: Final = 1_000
_JSON_OPTIONS: Final = orjson.OPT_UTC_Z
_MONTH: Final = {
    ("sqlite", date): "strftime('%Y-%m-01', {0})",
    ("sqlite", datetime): "strftime('%Y-%m-01 00:00:00.000000', {0})",
    ("postgresql", date): "CAST(date_trunc('month', {0}) AS DATE)",
    ("postgresql", datetime): "date_trunc('month', {0} AT TIME ZONE 'UTC') AT TIME ZONE 'UTC'",
}
_RANDOM: Final = {
    ("sqlite", True): "lower(hex(randomblob(16)))",
    ("sqlite", False): "lower(hex(randomblob(16)))",
    ("postgresql", True): "replace(CAST(gen_random_uuid() AS TEXT), '-', '')",
    ("postgresql", False): "gen_random_uuid()",
}


class Selects:
    """One SELECT per table through SQLAlchemy Core, encrypted columns opened, and one `orjson`."""

    def __init__(self, user_id: int) -> None:
        self._statements = {
            mapped.name: select(*mapped.exported_columns).where(text(of_person(mapped, user_id)))
            for mapped in DATA_MAP.of_people
        }
        self._names = {
            mapped.name: [str(column.name) for column in mapped.exported_columns]
            for mapped in DATA_MAP.of_people
        }

    def __call__(self) -> bytes:
        with get_engine().connect() as connection:
            found = {
                name: [
                    dict(zip(self._names[name], row, strict=True))
                    for row in connection.execute(statement)
                ]
                for name, statement in self._statements.items()
            }
        return orjson.dumps(found, option=_JSON_OPTIONS)


class Driver:
    """The limit: the same rows from the driver alone, encrypted columns left closed."""

    def __init__(self, user_id: int) -> None:
        self._statements = {
            mapped.name: (
                f"SELECT {', '.join(str(c.name) for c in mapped.exported_columns)} "
                f"FROM {mapped.name} WHERE {of_person(mapped, user_id)}"
            )
            for mapped in DATA_MAP.of_people
        }

    def __call__(self) -> bytes:
        connection: Any = get_engine().raw_connection()
        try:
            cursor = connection.cursor()
            found = {
                name: cursor.execute(statement).fetchall()
                for name, statement in self._statements.items()
            }
            return orjson.dumps(found, option=_JSON_OPTIONS)
        finally:
            connection.close()


class Statements:
    """One UPDATE or DELETE per table, in one transaction with the service's own settings."""

    def __init__(self, user_id: int, mode: EraseMode) -> None:
        dialect = get_engine().dialect.name
        found = [
            _erasing(dialect, mapped, user_id, mode) for mapped in reversed(DATA_MAP.of_people)
        ]
        self._statements = [statement for statement in found if statement]

    def __call__(self) -> None:
        with get_engine().begin() as connection:
            for statement in self._statements:
                connection.exec_driver_sql(statement)


def read_everything() -> None:
    """Read every row of every table, encrypted columns opened, and look at nothing."""
    with get_engine().connect() as connection:
        for mapped in DATA_MAP.tables:
            statement = select(mapped.table).execution_options(yield_per=_ROWS_PER_READ)
            for part in connection.execute(statement).partitions():
                list(part)


def count_everything() -> int:
    """Return how many rows all tables have."""
    with get_engine().connect() as connection:
        return sum(
            connection.exec_driver_sql(f"SELECT count(*) FROM {mapped.name}").scalar_one()
            for mapped in DATA_MAP.tables
        )


def of_person(mapped: Any, user_id: int) -> str:
    """Write the condition for a person's rows of one table."""
    if mapped.rule.role == "shared":
        mine = f"SELECT billing_address_id FROM bookings WHERE user_id = {user_id}"
        return f"id IN ({mine})"
    if mapped.parent is None:
        return f"id = {user_id}"
    if mapped.parent.parent is None:
        return f"{mapped.link.name} = {user_id}"
    above = f"SELECT id FROM {mapped.parent.name} WHERE {of_person(mapped.parent, user_id)}"
    return f"{mapped.link.name} IN ({above})"


def _erasing(dialect: str, mapped: Any, user_id: int, mode: EraseMode) -> str:
    """Write the statement; empty where the law keeps each column of the table as it is."""
    if mapped.rule.role == "shared":
        # Nobody who is measured has an address that others may need.
        return ""
    where = of_person(mapped, user_id)
    # Every planted payment and invoice is younger than the law's period.
    is_kept = mapped.statute is not None
    if not is_kept and (mode is EraseMode.DELETE or mapped.rule.always_delete):
        return f"DELETE FROM {mapped.name} WHERE {where}"
    changes = [
        f"{name} = {_erased(dialect, mapped.table.c[name], rule)}"
        for name, rule in mapped.personal_columns.items()
        if rule.on_erase != "keep" and not (is_kept and rule.statutory)
    ]
    mark = "restricted_at" if is_kept else "anonymized_at"
    if mark in mapped.table.c:
        changes.append(f"{mark} = '{datetime.now(UTC):%Y-%m-%d %H:%M:%S.%f}'")
    return f"UPDATE {mapped.name} SET {', '.join(changes)} WHERE {where}" if changes else ""


def _erased(dialect: str, column: Column[Any], rule: Any) -> str:
    kind = column.type.python_type
    match str(rule.on_erase):
        case "month":
            return _MONTH[dialect, kind].format(column.name)
        case "random":
            return _RANDOM[dialect, kind is str]
        case "constant":
            return str(rule.constant).upper()
        case _:
            return "NULL"


def fingerprint(tables: Sequence[str], first: int, last: int) -> dict[str, tuple[int, ...]]:
    """
    Return, per column, how many rows from *first* to *last* fill it and with how many values.

    Of two people who had equal rows, equal numbers say that the same became of both.
    """
    found: dict[str, tuple[int, ...]] = {}
    with get_engine().connect() as connection:
        for table in tables:
            names = [str(column.name) for column in DATA_MAP[table].table.columns]
            counts = ", ".join(f"count({n}), count(DISTINCT {n})" for n in names)
            row = connection.exec_driver_sql(
                f"SELECT count(*), {counts} FROM {table} WHERE id BETWEEN {first} AND {last}"
            ).one()
            found[table] = (row[0],)
            for place, name in enumerate(names):
                found[f"{table}.{name}"] = (row[1 + 2 * place], row[2 + 2 * place])
    return found
