"""Which rows one database has and another has not, by their keys, in constant memory."""

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from sqlalchemy import String, collate, select
from sqlalchemy.orm import Session

from backend.privacy.mapped_tables import MappedTable

_ROWS_PER_READ: Final = 1000
Row = TypeVar("Row")
Rows = Iterator[Sequence[Row]]


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
    count, other, lost, regained = 0, 0, 0, 0
    for here, there in windows(_keys(live, mapped), _keys(restored, mapped), lambda key: key):
        count += len(here)
        other += len(there)
        if here != there:
            lost += len(set(here).difference(there))
            regained += len(set(there).difference(here))
    return TableChange(count, other, lost, regained)


def windows(
    ours: Rows[Row], theirs: Rows[Row], key: Callable[[Row], Any]
) -> Iterator[tuple[Sequence[Row], Sequence[Row]]]:
    """
    Cut two streams of rows at the same keys: what has one key is in the same pair.

    Args:
        key: By it both are in order, within their parts and from one to the next.
    """
    here, there = next(ours, ()), next(theirs, ())
    while here or there:
        end = min(key(part[-1]) for part in (here, there) if part)
        mine, other = (bisect_right(part, end, key=key) for part in (here, there))
        yield here[:mine], there[:other]
        here, there = here[mine:] or next(ours, ()), there[other:] or next(theirs, ())


def _keys(session: Session, mapped: MappedTable) -> Rows[Any]:
    """Yield the keys in the order in which Python compares them."""
    by_bytes = {"postgresql": "C", "sqlite": "BINARY"}[session.get_bind().dialect.name]
    order = [collate(key, by_bytes) if isinstance(key.type, String) else key for key in mapped.keys]
    keys = select(*mapped.keys).order_by(*order).execution_options(yield_per=_ROWS_PER_READ)
    if len(mapped.keys) == 1:
        # By themselves: a million tuples are what would take the time.
        yield from session.scalars(keys).partitions()
        return
    for part in session.execute(keys).partitions():
        yield [tuple(row) for row in part]
