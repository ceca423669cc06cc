"""Retention: which rows of a data type are due, which a legal hold keeps, and their end."""

import hashlib
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any, Final

from sqlalchemy import (
    BigInteger,
    ColumnElement,
    Integer,
    and_,
    bindparam,
    cast,
    false,
    func,
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
    hanging_from,
    look,
)
from backend.privacy.walk import Subjects, rows_of

_MOST_PEOPLE: Final = 500
_AFTER_PARAM: Final = "walk_after"
_UNTIL_PARAM: Final = "walk_until"
# Primes below 2**31: products of two smaller numbers fit in what engines count with.
_PRIMES: Final = (2_147_483_647, 2_147_483_629)
_FACTORS: Final = (1_327_217_885, 1_103_515_245)


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
        rows: All rows of its table.
        open_rows: Those that the policy may still touch: not what is anonymous already.
        due_soon: How many more are due until the moment that was asked for.
        digest: Of the keys of the rows that it touches; what hangs from these goes with them.
    """

    rows: int
    open_rows: int
    matched: int
    held: int
    due_soon: int
    digest: str

    @property
    def affected(self) -> int:
        return self.matched - self.held


def plan_retention(
    session: Session, data_map: DataMap, clockwork: Clockwork, soon: datetime | None = None
) -> RetentionPlan:
    """
    Count what is due, in one pass over the table; change nothing.

    Args:
        soon: Also count what becomes due until then.
    """
    mapped = data_map.by_data_type[clockwork.data_type]
    due, held = _due(mapped, clockwork), _held(data_map, mapped, clockwork)
    going = and_(due, not_(held))
    # Who is due and untold will have been told by then, or soon after.
    later = _due(mapped, replace(clockwork, now=soon or clockwork.now, only=None))
    open_rows = and_(true(), *_of_policy(mapped, clockwork.mode))
    counts = [
        func.count(), *(func.count().filter(rows) for rows in (open_rows, due, going, later))
    ]  # fmt: skip
    mark = _mark(mapped, session.get_bind().dialect.name)
    found = session.execute(
        select(*counts, *([] if mark is None else [mark.filter(going)])).select_from(mapped.table)
    ).one()
    rows, still_open, matched, affected, in_time = found[:5]
    said = f"{mapped.name} {affected}"
    if affected:
        said += f" {_keys_digest(session, mapped, going) if mark is None else found[5]}"
    digest = hashlib.sha256(said.encode()).hexdigest()
    return RetentionPlan(rows, still_open, matched, matched - affected, in_time - matched, digest)


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
        # Itself, and what goes with its rows.
        self._hanging = tuple(descendants_first(data_map, self._mapped))
        self._last: tuple[Any, ...] | None = None
        self._steps: tuple[Step, ...] = ()
        # For which holds, and whether for a first batch, the steps were built.
        self._built: tuple[Holds, bool] | None = None

    def run(self, session: Session, holds: Holds, limit: int) -> int | None:
        """
        Carry out the next *limit* rows in the session's transaction.

        Returns:
            How many rows of the policy's table met their end; `None` where none is left.

        Raises:
            IncompleteErasureError: A writer changed what is due meanwhile; the caller must roll
                back, and may try again.
        """
        of_people = self._mapped is self._data_map.subject
        if of_people:
            # They are named one by one, many times in a statement; engines take so many names.
            limit = min(limit, _MOST_PEOPLE)
        rows = self._rows(holds)
        keys = self._next_keys(session, rows, limit, all_of_them=of_people)
        if not keys:
            return None
        if of_people:
            self._erase_people(session, [key for (key,) in keys])
        else:
            self._end_rows(session, holds, rows, keys)
        # What the session has seen of these rows is no more.
        session.expire_all()
        self._last = keys[-1][: len(self._mapped.keys)]
        return len(keys) if of_people else int(keys[-1][-1])

    def _rows(self, holds: Holds) -> ColumnElement[bool]:
        """Return the predicate for what is due and was not looked at yet."""
        mapped, clockwork = self._mapped, replace(self._clockwork, holds=holds)
        rows = [_due(mapped, clockwork), not_(_held(self._data_map, mapped, clockwork))]
        if self._last is not None:
            rows.append(_compared(mapped, _AFTER_PARAM, operator.gt))
        return and_(*rows)

    def _next_keys(
        self, session: Session, rows: ColumnElement[bool], limit: int, *, all_of_them: bool
    ) -> list[tuple[Any, ...]]:
        """Return the keys of the batch, or its last one with their number behind it."""
        mapped = self._mapped
        batch = select(*mapped.keys).where(rows).order_by(*mapped.keys).limit(limit)
        if all_of_them or len(self._hanging) > 1:
            # What takes several statements must find the same rows with each.
            batch = batch.with_for_update(of=mapped.table)
        params = _key_params(_AFTER_PARAM, self._last)
        if all_of_them:
            return [tuple(row) for row in session.execute(batch, params)]
        found = batch.subquery()
        if isinstance(mapped.key.type, Integer) and len(mapped.keys) == 1:
            # Cheaper; not every type that has an order has a greatest value.
            (greatest,) = found.c
            until, count = session.execute(select(func.max(greatest), func.count()), params).one()
            return [(until, count)] if count else []
        last = select(*found.c, func.count().over()).order_by(*(key.desc() for key in found.c))
        return [tuple(row) for row in session.execute(last.limit(1), params)]

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

    def _end_rows(
        self,
        session: Session,
        holds: Holds,
        rows: ColumnElement[bool],
        keys: Sequence[tuple[Any, ...]],
    ) -> None:
        (*until, count) = keys[-1]
        if self._built != (built := (holds, self._last is None)):
            self._steps, self._built = self._end(rows), built
        params = _key_params(_AFTER_PARAM, self._last)
        params |= _key_params(_UNTIL_PARAM, until)
        steps = self._steps
        if any(True for _ in shared_tables(self._data_map)):
            steps = (*steps, *shared_steps(session, self._data_map, steps, params))
        # Its own rows are those that were counted, whatever others have done since.
        expected = {step: count for step in steps if step.mapped is self._mapped}
        carry_out(session, self._data_map, steps, self._clockwork.now, params, expected)

    def _end(self, rows: ColumnElement[bool]) -> tuple[Step, ...]:
        """Return the steps of a batch, children first."""
        mapped = self._mapped
        deletes = self._clockwork.mode is EraseMode.DELETE
        outcome = Outcome.DELETED if deletes else Outcome.ANONYMIZED
        batch = and_(rows, _compared(mapped, _UNTIL_PARAM, operator.le))
        return tuple(
            Step(child, outcome, hanging_from(child, mapped, batch)) for child in self._hanging
        )


def _compared(
    mapped: MappedTable, name: str, compare: Callable[[Any, Any], Any]
) -> ColumnElement[bool]:
    """Return how the key of a row compares with the parameter called *name*."""
    params = [
        bindparam(f"{name}_{at}", type_=key.type, required=True)
        for at, key in enumerate(mapped.keys)
    ]
    if len(params) == 1:
        return and_(compare(mapped.key, params[0]))
    return and_(compare(tuple_(*mapped.keys), tuple_(*params)))


def _key_params(name: str, key: Sequence[Any] | None) -> dict[str, Any]:
    return {} if key is None else {f"{name}_{at}": part for at, part in enumerate(key)}


def _mark(mapped: MappedTable, engine: str) -> Any:
    """
    Return a sum that differs where other rows are counted, cheap enough for ten million.

    It tells a plan that has changed from one that has not; nobody gains by making two alike.
    """
    if len(mapped.keys) > 1 or not isinstance(mapped.key.type, Integer):
        return None
    key = cast(mapped.key, BigInteger)
    if engine == "postgresql" and not isinstance(mapped.key.type, BigInteger):
        # It folds to 32 bits, which tells numbers of so many apart.
        return func.sum(func.hashint8extended(key, 0))
    one, other = (key % p * f % p for p, f in zip(_PRIMES, _FACTORS, strict=True))
    # Bits of two: sums of multiples alone are equal wherever the sums of the keys are.
    return func.sum(one + one.bitwise_and(other))


def _keys_digest(session: Session, mapped: MappedTable, rows: ColumnElement[bool]) -> str:
    return look(session, Step(mapped, Outcome.DELETED, rows)).digest


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
    if mapped is data_map.subject:
        held += _people_of_held(data_map, holds)
    # A row whose link is cut belongs to nobody: `IN` over NULL must not swallow it.
    return func.coalesce(or_(*held), false()) if held else false()


def _people_of_held(data_map: DataMap, holds: Holds) -> Iterator[ColumnElement[bool]]:
    """Yield who owns a held row, or a row that a held one refers to, by whatever way."""
    for other in data_map.of_people:
        if other.rule.retention is None or other is data_map.subject:
            continue
        theirs = _held_itself(data_map, other, other.rule.retention.data_type, holds)
        if not theirs:
            continue
        yield from _owners(data_map, other, or_(*theirs))
        for link in data_map.links(other):
            referred = link.target_column.in_(select(link.column).where(or_(*theirs)))
            yield from _owners(data_map, link.target, referred)


def _owners(
    data_map: DataMap, mapped: MappedTable, rows: ColumnElement[bool]
) -> Iterator[ColumnElement[bool]]:
    """Yield the people to whom *rows* of *mapped* lead, one predicate for each way."""
    if mapped is data_map.subject:
        yield rows
    elif not data_map.circle(mapped):
        for link in data_map.links(mapped):
            above = link.target_column.in_(select(link.column).where(rows))
            yield from _owners(data_map, link.target, above)


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
