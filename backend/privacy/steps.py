"""
Steps: which rows of which table meet which end, and carrying that out.

Erasure and retention are both a list of steps, children first. Counting, the digest of a plan
and the act itself all read the same predicate, so that a dry run is the plan of the real run.
"""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Select,
    delete,
    func,
    literal,
    null,
    select,
    update,
)
from sqlalchemy.orm import Session

from backend.privacy.data_map import (
    ANONYMIZED_AT,
    RESTRICTED_AT,
    DataMap,
    MappedTable,
    OnErase,
    Personal,
)
from backend.privacy.sql import month_start, random_id


class Outcome(StrEnum):
    """What becomes of a row."""

    DELETED = "deleted"
    ANONYMIZED = "anonymized"
    RETAINED = "retained"


@dataclass(frozen=True, slots=True)
class Step:
    """The rows of one table that meet one outcome."""

    mapped: MappedTable
    outcome: Outcome
    rows: ColumnElement[bool]

    def count(self, session: Session) -> int:
        statement = select(func.count()).select_from(self.mapped.table).where(self.rows)
        return session.scalar(statement) or 0


def digest(session: Session, steps: Iterable[Step]) -> str:
    """
    Return the SHA-256 of a plan: every table, outcome and primary key in it, as hex.

    A row that comes, goes or changes its outcome gives another digest.
    """
    hasher = hashlib.sha256()
    for step in steps:
        hasher.update(f"{step.mapped.name} {step.outcome}:".encode())
        keys = select(step.mapped.key).where(step.rows).order_by(step.mapped.key)
        for key in session.scalars(keys.execution_options(yield_per=10_000)):
            hasher.update(f"{key},".encode())
    return hasher.hexdigest()


def carry_out(session: Session, data_map: DataMap, steps: Iterable[Step], now: datetime) -> None:
    """Carry out *steps* in their order: one statement per table, never one per row."""
    for step in steps:
        if step.outcome is Outcome.DELETED:
            _unlink(session, data_map, step)
            session.execute(delete(step.mapped.table).where(step.rows))
        elif values := _erased_values(step.mapped, step.outcome, now):
            session.execute(update(step.mapped.table).where(step.rows).values(values))


def _unlink(session: Session, data_map: DataMap, step: Step) -> None:
    """Clear the references that other rows hold to the rows about to go."""
    going: Select[Any] = select(step.mapped.key).where(step.rows)
    for other, column in data_map.references_to(step.mapped):
        # A row that belongs to the person through this column has had its own step before.
        if column is not other.link or other.parent is not step.mapped:
            session.execute(
                update(other.table).where(column.in_(going)).values({column.name: null()}),
            )


def _erased_values(mapped: MappedTable, outcome: Outcome, now: datetime) -> dict[str, Any]:
    """Return what each column becomes, by the data map's rules."""
    values: dict[str, Any] = {}
    for name, rule in mapped.personal_columns.items():
        if outcome is Outcome.RETAINED and rule.statutory:
            continue
        if rule.on_erase is not OnErase.KEEP:
            values[name] = _erased_value(mapped.table.c[name], rule)
    if outcome is Outcome.ANONYMIZED:
        values[ANONYMIZED_AT] = now
    # The row itself need not be marked: a child is kept as its parent is.
    elif RESTRICTED_AT in mapped.table.c:
        values[RESTRICTED_AT] = now
    return values


def _erased_value(column: ColumnElement[Any], rule: Personal) -> ColumnElement[Any]:
    match rule.on_erase:
        case OnErase.MONTH:
            return month_start(column)
        case OnErase.RANDOM:
            return random_id(column)
        case OnErase.CONSTANT:
            return literal(rule.constant, column.type)
        case _:
            return null()


def descendants_first(data_map: DataMap, mapped: MappedTable) -> Iterator[MappedTable]:
    """Yield the tables whose rows hang from rows of *mapped*, deepest first, *mapped* last."""
    for candidate in data_map.children_first:
        ancestor: MappedTable | None = candidate
        while ancestor is not None and ancestor is not mapped:
            ancestor = ancestor.parent
        if ancestor is not None:
            yield candidate


def hanging_from(
    mapped: MappedTable, root: MappedTable, rows: ColumnElement[bool]
) -> ColumnElement[bool]:
    """Return the predicate for rows of *mapped* that lead to *rows* of its ancestor *root*."""
    if mapped is root:
        return rows
    if mapped.parent is None or mapped.link is None:
        raise ValueError(f"{mapped.name} does not hang from {root.name}")
    parent_rows = hanging_from(mapped.parent, root, rows)
    return mapped.link.in_(select(mapped.parent.key).where(parent_rows))
