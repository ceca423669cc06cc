"""Telling an encrypted value its row: the key of the row is bound as associated data."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any
from uuid import UUID

from sqlalchemy import (
    BindParameter,
    Column,
    Connection,
    Engine,
    FromClause,
    Insert,
    Table,
    Update,
    event,
)
from sqlalchemy.exc import InvalidRequestError


@dataclass(frozen=True, slots=True)
class RowValue:
    """A value on its way into the database, with the row that it is for."""

    value: Any = field(repr=False)
    row: bytes


def row_key(table: FromClause) -> Column[Any]:
    """
    Return the one column that tells the rows of *table* apart.

    Raises:
        InvalidRequestError: There is none, or several.
    """
    keys = list(table.primary_key)
    if len(keys) != 1:
        raise InvalidRequestError("a row-bound column needs a single primary key in its table")
    return keys[0]  # type: ignore[return-value] # An alias has columns of its own kind.


def row_label(key: Any) -> bytes:
    """Spell a row's key as it is bound: UUIDs as 32 hexadecimal digits."""
    match key:
        case UUID():
            return key.hex.encode()
        case bool():
            raise InvalidRequestError("a flag is no key of a row")
        case int():
            return str(key).encode()
        case str() if key and " " not in key:
            return key.encode()
        case _:
            raise InvalidRequestError(f"a {type(key).__name__} is no key of a row")


@lru_cache(maxsize=256)
def _bound_columns(table: Table) -> tuple[str, ...]:
    return tuple(c.key for c in table.columns if getattr(c.type, "row_bound", False))


@event.listens_for(Engine, "before_execute", retval=True)
def _tell_rows(
    _connection: Connection,
    clause: Any,
    many: Sequence[Mapping[str, Any]],
    one: Mapping[str, Any],
    _options: Mapping[str, Any],
) -> tuple[Any, Any, Any]:
    """Put the row's key beside each value of a row-bound column, before the value is sealed."""
    if isinstance(clause, Insert | Update) and isinstance(clause.table, Table):
        names = _bound_columns(clause.table)
        if names:
            key = row_key(clause.table)
            many = [_told(row, names, key, clause) for row in many]
            one = _told(one, names, key, clause) if one else one
            if isinstance(clause, Insert) and (values := _values(clause)):
                clause = clause.values(_told(values, names, key, clause))
    return clause, many, one


def _values(clause: Insert) -> dict[str, Any]:
    """Return what `insert(…).values(…)` was given as plain values."""
    given: Mapping[Any, Any] = clause._values or {}  # noqa: SLF001 - SQLAlchemy has no other way to ask
    return {
        getattr(column, "key", str(column)): bound.value
        for column, bound in given.items()
        if isinstance(bound, BindParameter)
    }


def _told(
    row: Mapping[str, Any], names: tuple[str, ...], key: Column[Any], clause: Insert | Update
) -> Mapping[str, Any]:
    told = dict(row)
    if isinstance(clause, Insert):
        if told.get(key.key) is None and key.default is not None and key.default.is_callable:
            # SQLAlchemy would make it later than we need it; and in every row, for all rows of
            # one insert have the same columns.
            told[key.key] = key.default.arg(None)  # type: ignore[attr-defined] # A callable one.
        number = told.get(key.key)
    else:
        # What the ORM calls the key of the row that it updates.
        number = told.get(f"{key.table.name}_{key.name}")
    if number is not None:
        label = row_label(number)
        for name in names:
            if told.get(name) is not None:
                told[name] = RowValue(told[name], label)
    return told
