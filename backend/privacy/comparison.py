"""Which rows one database has and another has not, by their keys, in constant memory."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import String, collate, select
from sqlalchemy.orm import Session

from backend.privacy.mapped_tables import MappedTable

_ROWS_PER_READ: Final = 2000


@dataclass(frozen=True, slots=True)
class TableChange:
    """
    Rows of one table in the live database and in what replaces it.

    Attributes:
        lost: Live rows that are not in the other.
        regained: Rows of the other that are not live.
    """

    live: int
    restored: int
    lost: int
    regained: int


def compare(live: Session, restored: Session, mapped: MappedTable) -> TableChange:
    """Compare the keys of one table in two databases of the same engine."""
    ours, theirs = _keys(live, mapped), _keys(restored, mapped)
    here, there = next(ours, None), next(theirs, None)
    count, other, lost, regained = 0, 0, 0, 0
    while here is not None or there is not None:
        is_lost = there is None or (here is not None and here < there)
        is_regained = here is None or (there is not None and there < here)
        lost += is_lost
        regained += is_regained
        if not is_regained:
            count, here = count + 1, next(ours, None)
        if not is_lost:
            other, there = other + 1, next(theirs, None)
    return TableChange(count, other, lost, regained)


def _keys(session: Session, mapped: MappedTable) -> Iterator[tuple[Any, ...]]:
    """Yield the keys in the order in which Python compares them."""
    by_bytes = {"postgresql": "C", "sqlite": "BINARY"}[session.get_bind().dialect.name]
    order = [collate(key, by_bytes) if isinstance(key.type, String) else key for key in mapped.keys]
    keys = select(*mapped.keys).order_by(*order).execution_options(yield_per=_ROWS_PER_READ)
    yield from (tuple(row) for row in session.execute(keys))
