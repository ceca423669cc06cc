"""Clocks: from what and until when rows are kept, as conditions of the database."""

from collections.abc import Mapping
from datetime import date, datetime
from typing import Any

from sqlalchemy import BindParameter, Column, ColumnElement, Date, Select, bindparam, func, select

from backend.privacy.data_map import DataMap
from backend.privacy.mapped_tables import MappedTable
from backend.privacy.periods import Period
from backend.privacy.steps import Step

Periods = Mapping[str, Period]


def clock_of(mapped: MappedTable) -> MappedTable:
    """Return the table whose retention period the rows of *mapped* follow."""
    if mapped.clock is None:
        raise ValueError(f"{mapped.name} is kept by a law without a retention period")
    return mapped.clock


def data_type_of(clock: MappedTable) -> str:
    if clock.rule.retention is None:
        raise ValueError(f"{clock.name} has no clock of its own")
    return clock.rule.retention.data_type


def anchor_of(clock: MappedTable) -> Column[Any]:
    """Return the column from which the rows of *clock* are counted."""
    if clock.rule.retention is None:
        raise ValueError(f"{clock.name} has no clock of its own")
    return clock.table.c[clock.rule.retention.anchor]


def is_due(clock: MappedTable, cutoff: date | BindParameter[Any]) -> ColumnElement[bool]:
    """
    Return the predicate for rows of *clock* whose anchor has reached *cutoff*; see `cutoff_of`.

    A row without an anchor is never due.
    """
    anchor = anchor_of(clock)
    return anchor < cutoff if isinstance(anchor.type, Date) else anchor <= cutoff


def cutoff_of(clock: MappedTable, period: Period, now: datetime) -> date:
    """
    Return the last instant that is due at *now*; of anchors that are days, the first that is not.

    A day counts from its end, so that nothing that happened on it leaves early.
    """
    of_days = isinstance(anchor_of(clock).type, Date)
    return period.cutoff_day(now) if of_days else period.cutoff(now)


def cutoff_param(clock: MappedTable) -> BindParameter[Any]:
    """Return the parameter that stands for the cutoff of *clock*; see `cutoffs`."""
    return bindparam(f"walk_cutoff_{data_type_of(clock)}", type_=anchor_of(clock).type)


def cutoffs(data_map: DataMap, periods: Periods, now: datetime) -> dict[str, Any]:
    """Return the values of every `cutoff_param` at *now*."""
    return {
        str(cutoff_param(clock).key): cutoff_of(clock, periods[data_type], now)
        for data_type, clock in data_map.by_data_type.items()
    }


def last_anchor(step: Step) -> Select[Any]:
    """Select the newest anchor of the rows of *step*."""
    clock = clock_of(step.mapped)
    statement = select(func.max(anchor_of(clock))).select_from(step.mapped.table)
    at = step.mapped
    while at is not clock and at.parent is not None and at.link is not None:
        (key,) = at.link.foreign_keys
        statement = statement.join(at.parent.table, at.link == key.column)
        at = at.parent
    return statement.where(step.rows)


def end_of(
    clock: MappedTable, last: date | datetime | None, periods: Periods
) -> date | datetime | None:
    """
    Return when a row of *clock* with the anchor *last* is due.

    A date counts from its end: see `is_due`. Where the calendar ends first, its last day.
    """
    if last is None:
        return None
    period = periods[data_type_of(clock)]
    try:
        return period.end(last) if isinstance(last, datetime) else period.end_of_day(last)
    except (OverflowError, ValueError):
        return date.max
