"""
Erasure: what becomes of every row of a person, as a plan and as an act.

What a law keeps stays, restricted: its other personal columns are erased and its link to the
person is cut. Everything else is deleted or made anonymous.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from enum import StrEnum
from typing import Any

from sqlalchemy import Column, ColumnElement, Date, func, not_, or_, select
from sqlalchemy.orm import Session

from backend.errors import HoldfastError
from backend.privacy.data_map import DataMap, MappedTable
from backend.privacy.periods import Period
from backend.privacy.steps import Outcome, Step, carry_out, digest, hanging_from

Periods = Mapping[str, Period]


class EraseMode(StrEnum):
    DELETE = "delete"
    ANONYMIZE = "anonymize"


class IncompleteErasureError(HoldfastError):
    """Rows of the person were left after an erasure, so it was undone whole."""

    code = "incomplete_erasure"


@dataclass(frozen=True, slots=True)
class Retained:
    """Rows that a law keeps: how many, on what ground, and until when the last of them."""

    table: str
    rows: int
    ground: str
    until: date | datetime | None


@dataclass(frozen=True, slots=True)
class ErasurePlan:
    """What an erasure does: the counts per table, what stays and why, and its digest."""

    mode: EraseMode
    steps: tuple[Step, ...]
    counts: dict[str, dict[Outcome, int]]
    retained: tuple[Retained, ...]
    digest: str


def plan_erasure(
    session: Session,
    data_map: DataMap,
    subjects: ColumnElement[bool],
    *,
    mode: EraseMode,
    periods: Periods,
    now: datetime,
) -> ErasurePlan:
    """
    Decide the end of every row of the people that *subjects* selects; change nothing.

    Args:
        subjects: Predicate over the subject table.
        periods: Retention period per data type; it says until when the law keeps a row.
    """
    steps = tuple(_steps(data_map, subjects, mode, periods, now))
    counts: dict[str, dict[Outcome, int]] = {}
    retained = []
    for step in steps:
        rows = step.count(session)
        counts.setdefault(step.mapped.name, dict.fromkeys(Outcome, 0))[step.outcome] = rows
        if rows and step.outcome is Outcome.RETAINED:
            retained.append(
                Retained(
                    step.mapped.name,
                    rows,
                    step.mapped.statute or "",
                    _until(session, step, periods),
                )
            )
    parents_first = {mapped.name: counts[mapped.name] for mapped in data_map.of_people}
    return ErasurePlan(mode, steps, parents_first, tuple(retained), digest(session, steps))


def carry_out_erasure(
    session: Session,
    data_map: DataMap,
    plan: ErasurePlan,
    subjects: ColumnElement[bool],
    now: datetime,
) -> None:
    """
    Carry out *plan* in the session's transaction.

    Raises:
        IncompleteErasureError: A row still leads to the person; the caller must roll back.
    """
    session.flush()
    people = list(session.scalars(select(data_map.subject.key).where(subjects)))
    carry_out(session, data_map, plan.steps, now)
    session.expire_all()
    for mapped in data_map.of_people:
        left = Step(mapped, Outcome.DELETED, rows_of(mapped, data_map.subject.key.in_(people)))
        expected = (
            len(people) if mapped is data_map.subject and plan.mode is EraseMode.ANONYMIZE else 0
        )
        if left.count(session) != expected:
            raise IncompleteErasureError(f"rows of {mapped.name} still lead to the person")


def rows_of(mapped: MappedTable, subjects: ColumnElement[bool]) -> ColumnElement[bool]:
    """Return the predicate for the rows of *mapped* that belong to *subjects*."""
    root = mapped
    while root.parent is not None:
        root = root.parent
    return hanging_from(mapped, root, subjects)


def _steps(
    data_map: DataMap,
    subjects: ColumnElement[bool],
    mode: EraseMode,
    periods: Periods,
    now: datetime,
) -> list[Step]:
    steps = []
    for mapped in data_map.children_first:
        rows = rows_of(mapped, subjects)
        gone = mode is EraseMode.DELETE or mapped.rule.always_delete
        outcome = Outcome.DELETED if gone else Outcome.ANONYMIZED
        if mapped.statute is not None:
            clock = _clock(mapped)
            due = is_due(clock, periods[_data_type(clock)].cutoff(now))
            kept = or_(not_(due), anchor_of(clock).is_(None))
            steps.append(Step(mapped, Outcome.RETAINED, rows & hanging_from(mapped, clock, kept)))
            rows &= hanging_from(mapped, clock, due)
        steps.append(Step(mapped, outcome, rows))
    return steps


def _clock(mapped: MappedTable) -> MappedTable:
    if mapped.clock is None:
        raise ValueError(f"{mapped.name} is kept by a law without a retention period")
    return mapped.clock


def _data_type(clock: MappedTable) -> str:
    if clock.rule.retention is None:
        raise ValueError(f"{clock.name} has no clock of its own")
    return clock.rule.retention.data_type


def is_due(clock: MappedTable, cutoff: datetime) -> ColumnElement[bool]:
    """
    Return the predicate for rows of *clock* whose anchor has reached *cutoff*.

    A row without an anchor is never due. A date counts from its end, so that nothing that
    happened on that day leaves early.
    """
    anchor = anchor_of(clock)
    return anchor < cutoff.date() if isinstance(anchor.type, Date) else anchor <= cutoff


def anchor_of(clock: MappedTable) -> Column[Any]:
    """Return the column from which the rows of *clock* are counted."""
    if clock.rule.retention is None:
        raise ValueError(f"{clock.name} has no clock of its own")
    return clock.table.c[clock.rule.retention.anchor]


def _until(session: Session, step: Step, periods: Periods) -> date | datetime | None:
    """Return when the last of these rows may go."""
    clock = _clock(step.mapped)
    statement = select(func.max(anchor_of(clock))).select_from(step.mapped.table)
    if step.mapped is not clock and step.mapped.link is not None:
        statement = statement.join(clock.table, step.mapped.link == clock.key)
    last: date | datetime | None = session.scalar(statement.where(step.rows))
    if last is None:
        return None
    if not isinstance(last, datetime):
        last += timedelta(days=1)
    return periods[_data_type(clock)].end(last)
