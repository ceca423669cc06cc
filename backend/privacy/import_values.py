"""Cells of a JSON export, read back strictly into what their columns hold."""

import math
from collections.abc import Callable
from datetime import UTC, date, datetime
from decimal import Decimal
from enum import Enum
from typing import Any
from uuid import UUID

from sqlalchemy import BigInteger, Column, String
from sqlalchemy import Enum as ClosedSet

from backend.db_utils import is_storable
from backend.errors import RefusedError

ReadCell = Callable[[Any], Any]


class ImportRefusedError(RefusedError):
    """The document is no whole export of this service; nothing that was sent is repeated."""

    code = "import_refused"


def cell_reader(column: Column[Any]) -> ReadCell:
    """
    Return what turns the JSON values of *column* into its own; made once for all of its rows.

    It raises `ImportRefusedError` for a value that the column cannot have.
    """
    where = f"{column.table.name}.{column.name}"
    wanted, nullable = column.type.python_type, column.nullable
    from_text = wanted in (UUID, Decimal, date, datetime) or issubclass(wanted, Enum)

    def read(value: Any) -> Any:
        if value is None:
            if not nullable:
                raise ImportRefusedError(f"{where} must have a value")
            return None
        if from_text:
            try:
                value = _from_text(wanted, value)
            except (ValueError, ArithmeticError):
                raise ImportRefusedError(f"{where} cannot be read") from None
        elif type(value) is not wanted:
            # `True` is an int to isinstance, and no number to us.
            raise ImportRefusedError(f"{where} is of the wrong type")
        if not _fits(column, value):
            raise ImportRefusedError(f"{where} does not take this value")
        return value

    return read


def _from_text(wanted: type[Any], text: Any) -> Any:
    if not isinstance(text, str):
        raise ValueError("not text")  # noqa: TRY004 - caught with the parsers' own errors
    if wanted is datetime:
        moment = datetime.fromisoformat(text)
        if moment.tzinfo is None:
            raise ValueError("no zone")
        return moment.astimezone(UTC)
    found = date.fromisoformat(text) if wanted is date else wanted(text)
    # Each has one spelling in an export; the parsers take others, too.
    if not isinstance(found, Enum) and str(found) != text:
        raise ValueError("spelled otherwise")
    return found


def _fits(column: Column[Any], value: Any) -> bool:
    """Say whether every engine stores *value*: SQLite checks neither length nor range."""
    kind = column.type
    match value:
        case bool() | Enum():
            return True
        case str() if isinstance(kind, ClosedSet):
            return value in kind.enums
        case str():
            limit = kind.length if isinstance(kind, String) else None
            return is_storable(value) and (limit is None or len(value) <= limit)
        case int():
            limit = 2**63 if isinstance(kind, BigInteger) else 2**31
            return -limit <= value < limit
        case float() | Decimal():
            return math.isfinite(value)
        case _:
            return True
