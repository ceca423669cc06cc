"""What every engine spells differently: a month's first day, a random id, row numbers."""

from typing import Any, cast

from sqlalchemy import Column, CursorResult, Date, String, func, select, text
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.orm import Session
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.elements import ColumnElement
from sqlalchemy.sql.functions import FunctionElement
from sqlalchemy.types import TypeDecorator


class month_start(FunctionElement[Any]):  # noqa: N801 - reads as the SQL function it is
    """The first instant of a date's month, in the same type."""

    inherit_cache = True

    def __init__(self, column: ColumnElement[Any]) -> None:
        super().__init__(column)
        self.type = column.type


class random_id(FunctionElement[Any]):  # noqa: N801 - reads as the SQL function it is
    """A new random id of 122 bits or more for each row, derived from nothing."""

    inherit_cache = True

    def __init__(self, column: ColumnElement[Any]) -> None:
        super().__init__()
        self.type = column.type


def _is_date(element: FunctionElement[Any]) -> bool:
    kind = element.type.impl if isinstance(element.type, TypeDecorator) else element.type
    return isinstance(kind, Date)


@compiles(month_start, "sqlite")
def _month_sqlite(element: month_start, compiler: SQLCompiler, **kw: Any) -> str:
    column = compiler.process(element.clauses, **kw)
    # The form in which the driver stores times; '%Y' would need doubling in no paramstyle here.
    form = "%Y-%m-01" if _is_date(element) else "%Y-%m-01 00:00:00.000000"
    return f"strftime('{form}', {column})"


@compiles(month_start, "postgresql")
def _month_postgresql(element: month_start, compiler: SQLCompiler, **kw: Any) -> str:
    column = compiler.process(element.clauses, **kw)
    if _is_date(element):
        return f"CAST(date_trunc('month', {column}) AS DATE)"
    return f"date_trunc('month', {column} AT TIME ZONE 'UTC') AT TIME ZONE 'UTC'"


@compiles(random_id, "sqlite")
def _random_sqlite(_element: random_id, _compiler: SQLCompiler, **_kw: Any) -> str:
    return "lower(hex(randomblob(16)))"


@compiles(random_id, "postgresql")
def _random_postgresql(element: random_id, _compiler: SQLCompiler, **_kw: Any) -> str:
    if isinstance(element.type, String):
        return "replace(CAST(gen_random_uuid() AS TEXT), '-', '')"
    return "gen_random_uuid()"


def last_number(session: Session, key: Column[Any]) -> int:
    """Return the highest row number that the table of *key* ever gave out; 0 for none."""
    table = key.table.name
    if session.get_bind().dialect.name == "sqlite":
        query = text("SELECT seq FROM sqlite_sequence WHERE name = :name")
        found = session.execute(query, {"name": table}).scalar()
    else:
        sequence = func.pg_get_serial_sequence(table, key.name).op("::")(text("regclass"))
        found = session.scalar(select(func.pg_sequence_last_value(sequence)))
    return int(found or 0)


def reserve_numbers(session: Session, key: Column[Any], highest: int) -> None:
    """Have the table of *key* give out only numbers above *highest* and above its own rows'."""
    highest = max(highest, session.scalar(select(func.max(key))) or 0)
    if not highest:
        return
    table = key.table.name
    if session.get_bind().dialect.name != "sqlite":
        sequence = func.pg_get_serial_sequence(table, key.name)
        session.execute(select(func.setval(sequence, max(highest, last_number(session, key)))))
        return
    known = {"name": table, "seq": highest}
    raise_it = text("UPDATE sqlite_sequence SET seq = max(seq, :seq) WHERE name = :name")
    if not cast("CursorResult[Any]", session.execute(raise_it, known)).rowcount:
        session.execute(text("INSERT INTO sqlite_sequence (name, seq) VALUES (:name, :seq)"), known)
