"""
What the rows of a person say that can be looked for once they are gone.

No value is shown by the `repr` of anything here.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import Any, Final

from sqlalchemy import Column, ColumnElement, Select, Text, select, type_coerce
from sqlalchemy.orm import Session
from sqlalchemy.types import TypeDecorator

from backend.errors import HoldfastError
from backend.privacy.declarations import OnErase, Personal
from backend.privacy.mapped_tables import MappedTable
from backend.privacy.words import OldValue, Words, is_below

__all__ = ["OldValue", "OldValues", "Words", "old_values"]

# Which categories say something of one person alone. Whole branches of Fides' vocabulary, without
# what many people share: where they live, how they behave, what they bought.
_OF_ONE: Final = (
    "user.name",
    "user.contact",
    "user.account.username",
    "user.government_id",
    "user.financial",
    "user.unique_id",
    "user.device",
)
_OF_MANY: Final = tuple(f"user.contact.address.{part}" for part in ("country", "city", "state"))
# Of these only what holds a digit is an identifier: "passport" and "bank transfer" are kinds.
_NUMBERED: Final = ("user.government_id", "user.financial", "user.unique_id", "user.device")
_FREE_TEXT: Final = "user.content"
# A shorter remark is made of many people: "late arrival".
_FREE_TEXT_MIN: Final = 12


@dataclass(frozen=True, slots=True)
class OldValues:
    """
    The texts of a person's rows in one table.

    Attributes:
        limit_reached: There are more rows than were read.
        closed: Encrypted cells that did not open, so that nobody knows what to look for.
    """

    values: tuple[OldValue, ...]
    limit_reached: bool
    closed: int


def old_values(
    session: Session,
    mapped: MappedTable,
    rows: ColumnElement[bool],
    limit: int,
    params: Mapping[str, Any] = MappingProxyType({}),
) -> OldValues:
    """
    Collect the distinct texts of *rows* that can be looked for after they are gone.

    Left out are hashes and search terms, what erasure keeps because it says nothing of anybody,
    and categories that say nothing of one person alone.

    Args:
        rows: Predicate over the table of *mapped*.
        limit: How many rows are read at most; they are in memory at once.
        params: Values of the parameters in *rows*.
    """
    columns = _columns(mapped)
    if not columns:
        return OldValues((), False, 0)
    openers = [opener(session, mapped.table.c[name]) for name in columns]
    found: dict[tuple[str, str], None] = {}
    closed = 0
    # Outside of the mapper: the person's objects may be loaded and changed already.
    result = session.execute(_statement(mapped, rows, limit), params).all()
    for row in result[:limit]:
        for cell, open_, category in zip(row, openers, columns.values(), strict=True):
            if cell is None:
                continue
            try:
                text = decoded(cell)
                found[decoded(open_(text)) if open_ else text, category] = None
            except CLOSED:
                closed += 1
    return OldValues(_distinctive(found), len(result) > limit, closed)


def _columns(mapped: MappedTable) -> dict[str, str]:
    return {
        name: rule.category
        for name, rule in mapped.personal_columns.items()
        if rule.exported and _tells(rule) and holds_text(mapped.table.c[name])
    }


@lru_cache(maxsize=128)
def _statement(mapped: MappedTable, rows: ColumnElement[bool], limit: int) -> Select[Any]:
    places = [mapped.table.c[name] for name in _columns(mapped)]
    return select(*map(raw, places)).where(rows).limit(limit + 1)


def _distinctive(found: Iterable[tuple[str, str]]) -> tuple[OldValue, ...]:
    return tuple(OldValue(text, category) for text, category in found if _is_of_one(text, category))


def _tells(rule: Personal) -> bool:
    category = rule.category
    if rule.on_erase is OnErase.KEEP or is_below(category, *_OF_MANY):
        return False
    return is_below(category, *_OF_ONE, _FREE_TEXT)


def _is_of_one(text: str, category: str) -> bool:
    if is_below(category, _FREE_TEXT):
        return len(text) >= _FREE_TEXT_MIN
    return not is_below(category, *_NUMBERED) or any(char.isdigit() for char in text)


# What the types of columns raise for a cell that does not open.
CLOSED: Final = (HoldfastError, ValueError, TypeError)


def holds_text(place: Column[Any]) -> bool:
    """Say whether a column's values are text once opened; encrypted ones are, by their type."""
    try:
        return issubclass(place.type.python_type, str)
    except NotImplementedError:
        return False


def raw(place: Column[Any]) -> ColumnElement[Any]:
    """Select a column as it is stored, with all that its type needs to open it later."""
    expression = (
        place.type.column_expression(place) if isinstance(place.type, TypeDecorator) else None
    )
    return type_coerce(place if expression is None else expression, Text)


def opener(session: Session, place: Column[Any]) -> Callable[[Any], Any] | None:
    """
    Return what opens the cells that `raw` selects; None if they are read as they are.

    Not the driver's part of a query, so that one damaged cell does not end the reading.
    """
    if isinstance(place.type, TypeDecorator):
        return place.type.result_processor(session.get_bind().dialect, None)
    return None


def decoded(cell: Any) -> str:
    """Return the text of a cell of any storage; of bytes what is UTF-8 in them."""
    match cell:
        case str():
            return cell
        case bytes() | bytearray() | memoryview():
            return bytes(cell).decode("utf-8", "replace")
        case _:
            return str(cell)
