"""
What runs inside a Holdfast process of its own to measure rotation.

Reads one JSON object (`task`, `bookings`) and writes another. `fill` loads bookings; `rotate`
rotates to the primary key; `update` is the limit: it visits the same cells in the same batches,
and writes text of the same length, but seals nothing.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, Final

from sqlalchemy import Column, Text, bindparam, select, type_coerce, update

from backend.crypto.columns import Encrypted
from backend.db_utils import session_scope
from backend.models import BLIND_INDEXES, DATA_MAP
from backend.services.audit_service import COMMAND_LINE
from backend.services.rotation_service import get_rotation_service
from backend.services.sample_service import get_sample_service
from backend.services.setup_service import get_setup_service

# As many rows as a rotation commits at once.
_BATCH: Final = 500


def fill(order: dict[str, Any]) -> int:
    get_setup_service().prepare()
    with session_scope() as session:
        get_sample_service().load(session, COMMAND_LINE, count=order["bookings"])
    return 0


def rotate(_order: dict[str, Any]) -> int:
    get_setup_service().open()
    rotated = get_rotation_service().rotate(COMMAND_LINE)
    if rotated.failed or not rotated.finished:
        raise RuntimeError("the rotation left something under the old key")
    return sum(rotated.changed.values())


def update_only(_order: dict[str, Any]) -> int:
    get_setup_service().open()
    return sum(_rewrite(column) for column in _columns())


def _columns() -> Iterator[Column[Any]]:
    for mapped in DATA_MAP.tables:
        yield from (c for c in mapped.table.columns if isinstance(c.type, Encrypted))
    yield from (indexed.index_column for indexed in BLIND_INDEXES)


def _rewrite(column: Column[Any]) -> int:
    key, raw = DATA_MAP[column.table.name].key, type_coerce(column, Text)
    cells = select(key, raw).where(raw.is_not(None)).order_by(key).limit(_BATCH)
    change = (
        update(column.table)
        .where(key == bindparam("row"), raw == bindparam("old", type_=Text))
        .values({column.name: type_coerce(bindparam("new", type_=Text), Text)})
    )
    written, last = 0, None
    while True:
        with session_scope(read_only=True) as session:
            found = session.execute(cells if last is None else cells.where(key > last)).all()
        if not found:
            return written
        last = found[-1][0]
        with session_scope() as session:
            changes = [{"row": row, "old": old, "new": old[::-1]} for row, old in found]
            session.connection().execute(change, changes)
        written += len(found)


_TASKS: Final[dict[str, Callable[[dict[str, Any]], int]]] = {
    "fill": fill,
    "rotate": rotate,
    "update": update_only,
}


def main() -> None:
    order = json.load(sys.stdin)
    cpu, started = time.process_time(), time.perf_counter()
    cells = _TASKS[order["task"]](order)
    spent = {"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - cpu}
    json.dump({"cells": cells, **spent}, sys.stdout)


if __name__ == "__main__":
    main()
