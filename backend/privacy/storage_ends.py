"""Storage ends: when the last of a person's rows of each table is due to go."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import date, datetime
from functools import lru_cache
from typing import Any

from sqlalchemy import ColumnElement, Select, and_, exists, func, not_, select
from sqlalchemy.orm import Session

from backend.privacy.clocks import Periods, anchor_of, end_of
from backend.privacy.data_map import DataMap
from backend.privacy.declarations import TableRole
from backend.privacy.mapped_tables import MappedTable
from backend.privacy.walk import Shape, Subjects, mentioned, of_shape, owned


@dataclass(frozen=True, slots=True)
class End:
    """
    The end of a person's rows of one table.

    Attributes:
        last: The day on which the last row with a date is due; `None` without such rows.
        undated: Whether there are rows that no period ends, for they have no date.
    """

    last: date | None = None
    undated: bool = False


@dataclass(frozen=True)
class _Question:
    """One statement about all tables; *parts* say whose clock each pair of its cells is about."""

    statement: Select[Any]
    parts: tuple[tuple[str, MappedTable], ...]


def ends(
    session: Session, data_map: DataMap, subjects: Subjects, periods: Periods
) -> dict[str, End]:
    """
    Return by table when the person's rows are due, in one statement for all tables.

    A table without a clock of its own or above it ends with the account, if there is one.
    """
    shape = subjects.shape
    asked = _question(data_map, subjects) if shape is None else _shaped(data_map, shape)
    cells = (
        iter(session.execute(asked.statement, subjects.params).one()) if asked.parts else iter(())
    )
    found: dict[str, End] = {}
    for name, clock in asked.parts:
        last, undated = next(cells), next(cells)
        before = found.get(name, End())
        days = [day for day in (before.last, _due_on(clock, last, periods)) if day]
        found[name] = End(max(days, default=None), before.undated or bool(undated))
    return found | _with_account(data_map, found)


@lru_cache(maxsize=64)
def _shaped(data_map: DataMap, shape: Shape) -> _Question:
    return _question(data_map, of_shape(data_map, shape))


def _question(data_map: DataMap, subjects: Subjects) -> _Question:
    columns: list[ColumnElement[Any]] = []
    parts: list[tuple[str, MappedTable]] = []
    for mapped in data_map.of_people:
        if (clock := mapped.clock) is not None:
            for rows in _rows(data_map, mapped, subjects):
                columns += _look(data_map, mapped, clock, rows)
                parts.append((mapped.name, clock))
    return _Question(select(*columns), tuple(parts))


def _with_account(data_map: DataMap, found: Mapping[str, End]) -> dict[str, End]:
    account = found.get(data_map.subject.name, End())
    return {
        mapped.name: account
        for mapped in data_map.of_people
        if mapped.rule.role is TableRole.OWNED and mapped.clock is None
    }


def _rows(
    data_map: DataMap, mapped: MappedTable, subjects: Subjects
) -> Iterator[ColumnElement[bool]]:
    yield from owned(data_map, mapped, subjects.rows)
    named = mentioned(data_map, mapped, subjects)
    if named is not None:
        yield named


def _look(
    data_map: DataMap, mapped: MappedTable, clock: MappedTable, rows: ColumnElement[bool]
) -> list[ColumnElement[Any]]:
    """Ask for the last date among the rows of *clock* that *rows* hang from, and for gaps."""
    while mapped is not clock and mapped.parent is not None:
        link = data_map.links(mapped)[0]
        rows = link.target_column.in_(select(link.column).where(rows))
        mapped = link.target
    anchor, retention = anchor_of(clock), clock.rule.retention
    only = retention.only if retention and retention.only else {}
    dated = and_(
        anchor.is_not(None), *(clock.table.c[name] == value for name, value in only.items())
    )
    return [
        select(func.max(anchor)).where(rows, dated).scalar_subquery(),
        exists().where(rows, not_(dated)),
    ]


def _due_on(clock: MappedTable, last: date | datetime | None, periods: Periods) -> date | None:
    """Return the day on which a row with the anchor *last* is due."""
    end = end_of(clock, last, periods)
    return end.date() if isinstance(end, datetime) else end
