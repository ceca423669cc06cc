"""Shared rows: they go, whatever the mode, when nobody else and no law refers to them any more."""

from collections.abc import Iterator, Sequence

from sqlalchemy import (
    Column,
    ColumnElement,
    and_,
    exists,
    false,
    func,
    not_,
    or_,
    select,
    union_all,
)
from sqlalchemy.orm import Session

from backend.privacy.data_map import DataMap
from backend.privacy.declarations import TableRole
from backend.privacy.mapped_tables import MappedTable
from backend.privacy.steps import Outcome, Params, Step
from backend.privacy.walk import frozen


def shared_tables(data_map: DataMap) -> Iterator[MappedTable]:
    return (one for one in data_map.children_first if one.rule.role is TableRole.SHARED)


def let_go(
    data_map: DataMap, mapped: MappedTable, steps: Sequence[Step]
) -> ColumnElement[bool] | None:
    """Return the predicate for rows of *mapped* to which *steps* cut references."""
    cut = [
        select(column).where(step.rows, column.is_not(None))
        for other, column in data_map.references_to(mapped)
        for step in _cutting(steps, other, column)
    ]
    if not cut:
        return None
    # A union: OR over several lists would make PostgreSQL read the whole table.
    return mapped.key.in_(union_all(*cut) if len(cut) > 1 else cut[0])


def shared_steps(
    session: Session, data_map: DataMap, steps: Sequence[Step], params: Params
) -> Iterator[Step]:
    """
    Yield what becomes of the shared rows to which *steps* cut references.

    Found now: once the links are cut, nothing leads there any more.
    """
    known = list(steps)
    for mapped in shared_tables(data_map):
        rows = let_go(data_map, mapped, known)
        if rows is None or not Step(mapped, Outcome.SHARED, rows).count(session, params):
            continue
        stays = or_(
            false(),
            *(
                exists().where(column == mapped.key, not_(_cut(known, other, column)))
                for other, column in data_map.references_to(mapped)
            ),
        )
        for outcome, held in ((Outcome.SHARED, stays), (Outcome.DELETED, not_(stays))):
            step = Step(mapped, outcome, frozen(session, mapped, and_(rows, held), params))
            # A shared row that goes cuts its references to others.
            known.append(step)
            yield step


def _cutting(steps: Sequence[Step], other: MappedTable, column: Column[object]) -> Iterator[Step]:
    for step in steps:
        if step.mapped is other and _cuts(step, column):
            yield step


def _cuts(step: Step, column: Column[object]) -> bool:
    if step.outcome is Outcome.RETAINED:
        return not step.mapped.personal_columns[str(column.name)].statutory
    return step.outcome in (Outcome.DELETED, Outcome.ANONYMIZED)


def _cut(steps: Sequence[Step], other: MappedTable, column: Column[object]) -> ColumnElement[bool]:
    rows = [step.rows for step in _cutting(steps, other, column)]
    return func.coalesce(or_(false(), *rows), false())
