"""Retention: which rows of a data type are due, which a legal hold keeps, and their end."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import lru_cache
from typing import Any, Final

from sqlalchemy import (
    BigInteger,
    BindParameter,
    ColumnElement,
    Integer,
    and_,
    bindparam,
    cast,
    false,
    func,
    literal,
    not_,
    or_,
    select,
    true,
    tuple_,
)
from sqlalchemy.orm import Session

from backend.privacy.clocks import Periods, cutoff_of, is_due
from backend.privacy.data_map import DataMap
from backend.privacy.declarations import EraseMode
from backend.privacy.erase import plan_erasure
from backend.privacy.mapped_tables import ANONYMIZED_AT, MappedTable
from backend.privacy.sharing import shared_steps, shared_tables
from backend.privacy.steps import (
    Outcome,
    Step,
    carry_out,
    descendants_first,
    look,
)
from backend.privacy.walk import Subjects, rows_of

_BATCH_PARAM: Final = "walk_batch"
# A prime below 2**31: products of two smaller numbers fit in what engines count with.
_PRIME: Final = 2_147_483_647
_FACTORS: Final = (1_103_515_245, 1_299_709)


@dataclass(frozen=True, slots=True)
class Holds:
    """What legal holds keep: whole people, whole data types, single rows by data type."""

    people: frozenset[int] = frozenset()
    data_types: frozenset[str] = frozenset()
    rows: Mapping[str, frozenset[int]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Clockwork:
    """
    What decides which rows of one data type are due.

    Attributes:
        only: What else has to be true of a row.
    """

    data_type: str
    mode: EraseMode
    periods: Periods
    now: datetime
    holds: Holds = Holds()
    only: ColumnElement[bool] | None = None


@dataclass(frozen=True, slots=True)
class RetentionPlan:
    """
    What one policy does now.

    Attributes:
        rows: All rows of its table, or 0 where nothing is due.
        digest: Of the keys of the rows that it touches; what hangs from these goes with them.
    """

    rows: int
    matched: int
    held: int
    digest: str

    @property
    def affected(self) -> int:
        return self.matched - self.held


def plan_retention(session: Session, data_map: DataMap, clockwork: Clockwork) -> RetentionPlan:
    """Count what is due, in one pass over the table; change nothing."""
    mapped = data_map.by_data_type[clockwork.data_type]
    due, held = _due(mapped, clockwork), _held(data_map, mapped, clockwork)
    going = not_(held)
    marks = _marks(mapped)
    counts = [func.count().filter(going), *(mark.filter(going) for mark in marks)]
    matched, affected, *sums = session.execute(
        select(func.count(), *counts).select_from(mapped.table).where(due)
    ).one()
    if affected and not marks:
        sums = [look(session, Step(mapped, Outcome.DELETED, and_(due, going))).digest]
    rows = session.scalar(select(func.count()).select_from(mapped.table)) if affected else 0
    said = f"{mapped.name} {affected} {[str(one) for one in sums if affected]}"
    digest = hashlib.sha256(said.encode()).hexdigest()
    return RetentionPlan(rows or 0, matched, matched - affected, digest)


def due_rows(data_map: DataMap, clockwork: Clockwork) -> ColumnElement[bool]:
    """Return the predicate for the rows that are due, held or not."""
    return _due(data_map.by_data_type[clockwork.data_type], clockwork)


def count_due_by(
    session: Session, data_map: DataMap, clockwork: Clockwork, moments: Sequence[datetime]
) -> list[int]:
    """Return how many rows are due at each of *moments*, in one pass over the table."""
    mapped = data_map.by_data_type[clockwork.data_type]
    period = clockwork.periods[clockwork.data_type]
    anchors = [is_due(mapped, cutoff_of(mapped, period, moment)) for moment in moments]
    counts = [func.count().filter(anchor) for anchor in anchors]
    return list(
        session.execute(
            select(*counts).select_from(mapped.table).where(*_of_policy(mapped, clockwork.mode))
        ).one()
    )


class RetentionBatches:
    """
    Carries out one policy, so many rows at a time, in the order of their keys.

    Each batch looks again at what is due and what is held: what was planned may have changed.
    """

    def __init__(self, data_map: DataMap, clockwork: Clockwork) -> None:
        self._data_map = data_map
        self._clockwork = clockwork
        self._mapped = data_map.by_data_type[clockwork.data_type]
        self._last: tuple[Any, ...] | None = None

    def run(self, session: Session, holds: Holds, limit: int) -> int | None:
        """
        Carry out the next *limit* rows in the session's transaction.

        Returns:
            How many rows of the policy's table met their end; `None` where none is left.
        """
        keys = self._next_keys(session, holds, limit)
        if not keys:
            return None
        if self._mapped is self._data_map.subject:
            self._erase_people(session, [key for (key,) in keys])
        else:
            self._end_rows(session, keys)
        # What the session has seen of these rows is no more.
        session.expire_all()
        self._last = keys[-1]
        return len(keys)

    def _next_keys(self, session: Session, holds: Holds, limit: int) -> list[tuple[Any, ...]]:
        mapped, clockwork = self._mapped, replace(self._clockwork, holds=holds)
        rows = [_due(mapped, clockwork), not_(_held(self._data_map, mapped, clockwork))]
        if self._last is not None:
            rows.append(_above(mapped, self._last))
        found = select(*mapped.keys).where(*rows).order_by(*mapped.keys).limit(limit)
        # Other writers keep off until the batch is done, so that it ends what it has looked at.
        return [tuple(row) for row in session.execute(found.with_for_update(of=mapped.table))]

    def _erase_people(self, session: Session, keys: Sequence[Any]) -> None:
        plan = plan_erasure(
            session,
            self._data_map,
            Subjects.many(self._data_map, keys),
            mode=self._clockwork.mode,
            periods=self._clockwork.periods,
            now=self._clockwork.now,
        )
        steps = [one.step for one in plan.steps if one.rows]
        carry_out(session, self._data_map, steps, self._clockwork.now, plan.params)

    def _end_rows(self, session: Session, keys: Sequence[tuple[Any, ...]]) -> None:
        steps = _hanging(self._data_map, self._mapped, self._clockwork.mode)
        params = {_BATCH_PARAM: keys if len(self._mapped.keys) > 1 else [key for (key,) in keys]}
        if any(True for _ in shared_tables(self._data_map)):
            steps = (*steps, *shared_steps(session, self._data_map, steps, params))
        carry_out(session, self._data_map, steps, self._clockwork.now, params)


@lru_cache(maxsize=64)
def _hanging(data_map: DataMap, mapped: MappedTable, mode: EraseMode) -> tuple[Step, ...]:
    """Return the steps for one batch of *mapped*, children first; they are built once."""
    outcome = Outcome.DELETED if mode is EraseMode.DELETE else Outcome.ANONYMIZED
    batch: BindParameter[Any] = bindparam(_BATCH_PARAM, expanding=True)

    def rows(at: MappedTable) -> ColumnElement[bool]:
        if at is mapped:
            return tuple_(*at.keys).in_(batch) if len(at.keys) > 1 else at.key.in_(batch)
        if at.parent is None or at.link is None:
            raise ValueError(f"{at.name} does not hang from {mapped.name}")
        (key,) = at.link.foreign_keys
        if at.parent is mapped and len(mapped.keys) == 1 and key.column is mapped.key:
            return at.link.in_(batch)
        return at.link.in_(select(key.column).where(rows(at.parent)))

    return tuple(Step(at, outcome, rows(at)) for at in descendants_first(data_map, mapped))


def _above(mapped: MappedTable, last: tuple[Any, ...]) -> ColumnElement[bool]:
    if len(mapped.keys) == 1:
        return and_(mapped.key > last[0])
    typed = [literal(value, key.type) for key, value in zip(mapped.keys, last, strict=True)]
    above: ColumnElement[bool] = tuple_(*mapped.keys) > tuple_(*typed)
    return above


def _marks(mapped: MappedTable) -> list[Any]:
    """
    Return sums that differ where other rows are counted, cheap enough for ten million.

    They tell a plan that has changed from one that has not; nobody gains by making two alike.
    """
    if len(mapped.keys) > 1 or not isinstance(mapped.key.type, Integer):
        return []
    key = cast(mapped.key, BigInteger)
    mixed = [func.sum((key % _PRIME) * factor % _PRIME) for factor in _FACTORS]
    return [func.min(key), func.max(key), *mixed]


def _due(mapped: MappedTable, clockwork: Clockwork) -> ColumnElement[bool]:
    period = clockwork.periods[clockwork.data_type]
    due = is_due(mapped, cutoff_of(mapped, period, clockwork.now))
    only = [] if clockwork.only is None else [clockwork.only]
    return and_(due, *_of_policy(mapped, clockwork.mode), *only)


def _of_policy(mapped: MappedTable, mode: EraseMode) -> list[ColumnElement[bool]]:
    """Return what else than time makes rows the policy's."""
    rows: list[ColumnElement[bool]] = []
    retention = mapped.rule.retention
    if retention is not None and retention.only:
        rows += [mapped.table.c[name] == value for name, value in retention.only.items()]
    if mode is EraseMode.ANONYMIZE:
        # What is anonymous once is not touched again.
        rows.append(mapped.table.c[ANONYMIZED_AT].is_(None))
    return rows


def _held(data_map: DataMap, mapped: MappedTable, clockwork: Clockwork) -> ColumnElement[bool]:
    holds = clockwork.holds
    held = _held_itself(data_map, mapped, clockwork.data_type, holds)
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
