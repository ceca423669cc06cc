"""Changing stored cells in batches: by key, and only where one still holds what was read."""

from collections.abc import Iterator, Sequence
from typing import Any, Final, cast

from sqlalchemy import Column, CursorResult, Engine, Text, bindparam, type_coerce, update

from backend.db_utils import session_scope
from backend.models import DATA_MAP

BATCH: Final = 500


def swap_in(column: Column[Any]) -> Any:
    """Return the statement that puts `new` in the place of `old` in the row `row`."""
    key, raw = DATA_MAP[column.table.name].key, type_coerce(column, Text)
    return (
        update(column.table)
        .where(key == bindparam("row"), raw == bindparam("old", type_=Text))
        .values({column.name: type_coerce(bindparam("new", type_=Text), Text)})
    )


def batches(engine: Engine | None, statement: Any) -> Iterator[Sequence[Any]]:
    """
    Yield the rows of *statement*, whose first column is the key, batch by batch.

    Each batch is read in a transaction of its own, so that no writer waits for the whole.
    """
    key = statement.selected_columns[0]
    part = statement.order_by(key).limit(BATCH)
    last: Any = None
    while True:
        with session_scope(engine, read_only=True) as session:
            rows = session.execute(part if last is None else part.where(key > last)).all()
        if not rows:
            return
        last = rows[-1][0]
        yield rows


def swap(engine: Engine | None, statement: Any, changes: list[dict[str, Any]]) -> int:
    """Carry out `swap_in` for *changes* in one transaction; return how many cells changed."""
    if not changes:
        return 0
    with session_scope(engine) as session:
        done = session.connection().execute(statement, changes)
        return cast("CursorResult[Any]", done).rowcount
