"""Retention: which rows of a data type are due, which of those a legal hold keeps."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime

from sqlalchemy import ColumnElement, and_, false, func, not_, or_, select, true
from sqlalchemy.orm import Session

from backend.privacy.clocks import Periods, is_due
from backend.privacy.data_map import DataMap
from backend.privacy.declarations import EraseMode
from backend.privacy.erase import plan_erasure
from backend.privacy.mapped_tables import ANONYMIZED_AT, MappedTable
from backend.privacy.sharing import shared_steps
from backend.privacy.steps import (
    Outcome,
    Params,
    Step,
    carry_out,
    descendants_first,
    digest,
    hanging_from,
    look,
)
from backend.privacy.walk import Subjects, rows_of


@dataclass(frozen=True, slots=True)
class Holds:
    """What legal holds keep: whole people, whole data types, single rows by data type."""

    people: frozenset[int] = frozenset()
    data_types: frozenset[str] = frozenset()
    rows: Mapping[str, frozenset[int]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class RetentionPlan:
    """What one policy does now: due rows, held rows, rows it touches, steps and their digest."""

    matched: int
    held: int
    affected: int
    steps: tuple[Step, ...]
    digest: str
    params: Params = field(default_factory=dict)


def plan_retention(
    session: Session,
    data_map: DataMap,
    data_type: str,
    *,
    mode: EraseMode,
    periods: Periods,
    holds: Holds,
    now: datetime,
    lock: bool = False,
) -> RetentionPlan:
    """
    Decide what the policy of *data_type* does at *now*; change nothing.

    Args:
        lock: Keep other writers from the due rows until the transaction ends, so that what is
            carried out is what was planned.

    A due person is erased with everything of theirs, as on request; a due row of another table
    takes along the rows that hang from it.
    """
    params: Params = {}
    mapped = data_map.by_data_type[data_type]
    due = _due(mapped, mode, periods[data_type].cutoff(now))
    held = _held(data_map, mapped, data_type, holds)
    rows = and_(due, not_(held))
    if lock:
        for _ in session.execute(
            select(mapped.key).where(rows).with_for_update().execution_options(yield_per=10_000)
        ):
            pass
    if mapped is data_map.subject:
        # Rows of a person may be held one by one: then the person stays whole.
        people = Subjects.where(data_map, rows)
        erasure = plan_erasure(session, data_map, people, mode=mode, periods=periods, now=now)
        planned, params = erasure.steps, erasure.params
    else:
        outcome = Outcome.DELETED if mode is EraseMode.DELETE else Outcome.ANONYMIZED
        hanging = [
            Step(child, outcome, hanging_from(child, mapped, rows))
            for child in descendants_first(data_map, mapped)
        ]
        hanging += shared_steps(session, data_map, hanging, params)
        planned = tuple(look(session, step) for step in hanging)
    matched = Step(mapped, Outcome.RETAINED, due).count(session)
    affected = Step(mapped, Outcome.RETAINED, rows).count(session)
    steps = tuple(one.step for one in planned)
    return RetentionPlan(matched, matched - affected, affected, steps, digest(planned), params)


def carry_out_retention(
    session: Session, data_map: DataMap, plan: RetentionPlan, now: datetime
) -> None:
    """Carry out *plan* in the session's transaction."""
    # A predicate over people's rows would change while the people's own row is changed first;
    # the steps are children first, so each reads what it needs before its parent goes.
    carry_out(session, data_map, plan.steps, now, plan.params)
    session.expire_all()


def _due(mapped: MappedTable, mode: EraseMode, cutoff: datetime) -> ColumnElement[bool]:
    retention = mapped.rule.retention
    due = [is_due(mapped, cutoff)]
    if retention is not None and retention.only:
        due += [mapped.table.c[name] == value for name, value in retention.only.items()]
    if mode is EraseMode.ANONYMIZE:
        # What is anonymous once is not touched again.
        due.append(mapped.table.c[ANONYMIZED_AT].is_(None))
    return and_(*due)


def _held(
    data_map: DataMap, mapped: MappedTable, data_type: str, holds: Holds
) -> ColumnElement[bool]:
    held = _held_itself(data_map, mapped, data_type, holds)
    # A row that a held one refers to stays too: deleting it would change the held row. So a
    # person stays whole as long as one row of theirs is held.
    for other, column in data_map.references_to(mapped):
        if other.rule.retention is not None and other is not mapped:
            theirs = _held_itself(data_map, other, other.rule.retention.data_type, holds)
            held += [mapped.key.in_(select(column).where(or_(*theirs)))] if theirs else []
    # A row whose link is cut belongs to nobody: `IN` over NULL must not swallow it.
    return func.coalesce(or_(*held), false()) if held else false()


def _held_itself(
    data_map: DataMap, mapped: MappedTable, data_type: str, holds: Holds
) -> list[ColumnElement[bool]]:
    """Rows that a hold names: by their data type, their person or their number."""
    held: list[ColumnElement[bool]] = []
    if data_type in holds.data_types:
        held.append(true())
    if holds.people:
        held.append(rows_of(data_map, mapped, data_map.subject.key.in_(holds.people)))
    if rows := holds.rows.get(data_type):
        held.append(mapped.key.in_(rows))
    return held
