"""Retention: which rows of a data type are due, which of those a legal hold keeps."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime

from sqlalchemy import ColumnElement, and_, false, func, not_, or_, select, true
from sqlalchemy.orm import Session

from backend.privacy.data_map import ANONYMIZED_AT, DataMap, MappedTable
from backend.privacy.erase import EraseMode, Periods, is_due, plan_erasure, rows_of
from backend.privacy.steps import (
    Outcome,
    Step,
    carry_out,
    descendants_first,
    digest,
    hanging_from,
)


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


def plan_retention(
    session: Session,
    data_map: DataMap,
    data_type: str,
    *,
    mode: EraseMode,
    periods: Periods,
    holds: Holds,
    now: datetime,
) -> RetentionPlan:
    """
    Decide what the policy of *data_type* does at *now*; change nothing.

    A due person is erased with everything of theirs, as on request; a due row of another table
    takes along the rows that hang from it.
    """
    mapped = data_map.by_data_type[data_type]
    due = _due(mapped, mode, periods[data_type].cutoff(now))
    held = _held(data_map, mapped, data_type, holds)
    rows = and_(due, not_(held))
    if mapped is data_map.subject:
        # Rows of a person may be held one by one: then the person stays whole.
        erasure = plan_erasure(session, data_map, rows, mode=mode, periods=periods, now=now)
        steps, plan_digest = erasure.steps, erasure.digest
    else:
        outcome = Outcome.DELETED if mode is EraseMode.DELETE else Outcome.ANONYMIZED
        steps = tuple(
            Step(child, outcome, hanging_from(child, mapped, rows))
            for child in descendants_first(data_map, mapped)
        )
        plan_digest = digest(session, steps)
    matched = Step(mapped, Outcome.RETAINED, due).count(session)
    affected = Step(mapped, Outcome.RETAINED, rows).count(session)
    return RetentionPlan(matched, matched - affected, affected, steps, plan_digest)


def carry_out_retention(
    session: Session, data_map: DataMap, plan: RetentionPlan, now: datetime
) -> None:
    """Carry out *plan* in the session's transaction."""
    # A predicate over people's rows would change while the people's own row is changed first;
    # the steps are children first, so each reads what it needs before its parent goes.
    carry_out(session, data_map, plan.steps, now)
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
    if data_type in holds.data_types:
        return true()
    held: list[ColumnElement[bool]] = []
    if holds.people:
        held.append(rows_of(mapped, data_map.subject.key.in_(holds.people)))
    if rows := holds.rows.get(data_type):
        held.append(mapped.key.in_(rows))
    if mapped is data_map.subject:
        held += _held_through_rows(data_map, holds)
    # A row whose link is cut belongs to nobody: `IN` over NULL must not swallow it.
    return func.coalesce(or_(*held), false()) if held else false()


def _held_through_rows(data_map: DataMap, holds: Holds) -> list[ColumnElement[bool]]:
    """People of whom a row, or a whole kind of rows, is held."""
    subject = data_map.subject
    found: list[ColumnElement[bool]] = []
    for data_type, mapped in data_map.by_data_type.items():
        if mapped is subject or mapped.link is None:
            continue
        ids = holds.rows.get(data_type)
        if data_type in holds.data_types:
            found.append(subject.key.in_(select(mapped.link).where(mapped.link.is_not(None))))
        elif ids:
            linked = select(mapped.link).where(mapped.key.in_(ids), mapped.link.is_not(None))
            found.append(subject.key.in_(linked))
    return found
