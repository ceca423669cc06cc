"""
Erasure: what becomes of every row of a person, as a plan and as an act.

What a law keeps stays, restricted: its other personal columns are erased and its link to the
person is cut. Everything else is deleted or made anonymous.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import date, datetime
from typing import Any

from sqlalchemy import and_, not_, select
from sqlalchemy.orm import Session

from backend.privacy.clocks import Periods, clock_of, cutoffs, end_of, last_anchor
from backend.privacy.data_map import DataMap
from backend.privacy.declarations import EraseMode
from backend.privacy.program import PEOPLE_PARAM, program_of
from backend.privacy.sharing import shared_steps
from backend.privacy.steps import (
    IncompleteErasureError,
    Outcome,
    Params,
    Planned,
    Step,
    carry_out,
    digest,
    look,
)
from backend.privacy.walk import KEY_PARAM, Subjects, frozen


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
    steps: tuple[Planned, ...]
    retained: tuple[Retained, ...]
    digest: str
    tables: tuple[str, ...]
    params: Params = field(repr=False)

    @property
    def counts(self) -> dict[str, dict[Outcome, int]]:
        """Rows per table, parents first, and outcome."""
        counts = {name: dict.fromkeys(Outcome, 0) for name in self.tables}
        for planned in self.steps:
            counts[planned.step.mapped.name][planned.step.outcome] += planned.rows
        return counts


def plan_erasure(
    session: Session,
    data_map: DataMap,
    subjects: Subjects,
    *,
    mode: EraseMode,
    periods: Periods,
    now: datetime,
) -> ErasurePlan:
    """
    Decide the end of every row that speaks of *subjects*; change nothing.

    Args:
        periods: Retention period per data type; it says until when the law keeps a row.
    """
    program = program_of(data_map, subjects, mode)
    params = {**subjects.params, **cutoffs(data_map, periods, now)}
    tally = session.execute(program.tally, params).one()
    steps = [
        Step(one.mapped, one.outcome, frozen(session, one.mapped, one.rows, params))
        for one in program.of_circles
    ]
    planned = [look(session, step) for step in steps]
    for step, rows in zip(program.steps, tally, strict=False):
        planned.append(look(session, step, params, expected=rows))
        steps.append(step)
    if steps[: len(program.of_circles)] or any(tally[len(program.steps) :]):
        ends = list(shared_steps(session, data_map, steps, params))
        planned = [_of_what_stays(session, one, ends, params) for one in planned]
        planned += [look(session, step) for step in ends]
    # Children first; the people's own rows last, for what names them may be read from these.
    order = {mapped.name: at for at, mapped in enumerate(data_map.children_first)}
    order[data_map.subject.name] = len(order)
    planned.sort(key=lambda one: order[one.step.mapped.name])
    retained = tuple(
        Retained(
            one.step.mapped.name,
            one.rows,
            one.step.mapped.statute or "",
            end_of(
                clock_of(one.step.mapped), session.scalar(last_anchor(one.step), params), periods
            ),
        )
        for one in planned
        if one.rows and one.step.outcome is Outcome.RETAINED
    )
    tables = tuple(mapped.name for mapped in data_map.of_people)
    return ErasurePlan(mode, tuple(planned), retained, digest(planned), tables, params)


def _of_what_stays(
    session: Session, planned: Planned, ends: Sequence[Step], params: Params
) -> Planned:
    """Have a shared row that goes not be redacted, too."""
    step = planned.step
    gone = [one.rows for one in ends if (one.mapped, one.outcome) == (step.mapped, Outcome.DELETED)]
    if step.outcome is not Outcome.REDACTED or not planned.rows or not gone:
        return planned
    rows = and_(step.rows, not_(gone[0]))
    return look(session, Step(step.mapped, step.outcome, rows), params)


def _retained(session: Session, planned: Planned, periods: Periods, params: Params) -> Retained:
    mapped = planned.step.mapped
    last = session.scalar(last_anchor(planned.step), params)
    until = end_of(clock_of(mapped), last, periods)
    return Retained(mapped.name, planned.rows, mapped.statute or "", until)


def carry_out_erasure(
    session: Session,
    data_map: DataMap,
    plan: ErasurePlan,
    subjects: Subjects,
    now: datetime,
) -> None:
    """
    Carry out *plan* in the session's transaction.

    Raises:
        ConstraintError: As `carry_out`; the caller must roll back.
        IncompleteErasureError: A row still speaks of the person; the caller must roll back.
    """
    session.flush()
    program = program_of(data_map, subjects, plan.mode)
    params = {**plan.params, PEOPLE_PARAM: _keys_of_people(session, data_map, subjects)}
    # Where nothing is to be done, nothing is: a table costs a statement only if it holds a row.
    expected = {one.step: one.rows for one in plan.steps if one.rows}
    carry_out(session, data_map, expected, now, params, expected)
    session.expire_all()
    if program.left is not None:
        left = session.execute(program.left, params).one()
        for name, rows in zip(program.left_in, left, strict=True):
            if rows:
                raise IncompleteErasureError(f"rows of {name} still lead to the person")


def _keys_of_people(session: Session, data_map: DataMap, subjects: Subjects) -> list[Any]:
    if subjects.rows is None:
        return []
    if KEY_PARAM in subjects.params:
        return [subjects.params[KEY_PARAM]]
    return list(session.scalars(select(data_map.subject.key).where(subjects.rows)))
