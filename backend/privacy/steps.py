"""
Steps: which rows of which table meet which end, and carrying that out.

Erasure and retention are both a list of steps, children first. Counting, the digest of a plan
and the act itself all read the same predicate, so that a dry run is the plan of the real run.
"""

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from functools import cached_property, lru_cache
from types import MappingProxyType
from typing import Any, Final, cast

from sqlalchemy import (
    ColumnElement,
    CursorResult,
    Delete,
    Select,
    Update,
    bindparam,
    delete,
    func,
    literal,
    null,
    select,
    update,
)
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.orm import Session

from backend.db_utils import read_to_the_end
from backend.errors import ConflictError, HoldfastError
from backend.privacy.data_map import DataMap
from backend.privacy.declarations import OnErase, Personal
from backend.privacy.mapped_tables import ANONYMIZED_AT, RESTRICTED_AT, MappedTable
from backend.privacy.sql import month_start, random_id

Params = Mapping[str, Any]

_KEYS_PER_READ: Final = 10_000
_NONE: Final[Params] = MappingProxyType({})
# Named as no column is.
_NOW: Final = "walk_now"
# PL/pgSQL's RAISE EXCEPTION (PostgreSQL, appendix A).
_RAISED_BY_TRIGGER: Final = "P0001"
_SQLITE_RULE: Final = re.compile(r"(UNIQUE|CHECK|NOT NULL|FOREIGN KEY) constraint")


class ConstraintError(ConflictError):
    """A rule of the database stands in the way, so nothing was changed."""

    code = "constraint"


class IncompleteErasureError(HoldfastError):
    """Not exactly the planned rows met their end, so it was undone whole."""

    code = "incomplete_erasure"


class Outcome(StrEnum):
    """What becomes of a row."""

    DELETED = "deleted"
    ANONYMIZED = "anonymized"
    RETAINED = "retained"  # A law keeps it, restricted, with what the law asks for.
    REDACTED = "redacted"  # Somebody else's row, in which it no longer names the person.
    SHARED = "shared"  # Others still need it, so it stays as it is.


@dataclass(frozen=True, eq=False)
class Step:
    """The rows of one table that meet one outcome; its statements are built once."""

    mapped: MappedTable
    outcome: Outcome
    rows: ColumnElement[bool]

    @cached_property
    def total(self) -> Select[Any]:
        return select(func.count()).select_from(self.mapped.table).where(self.rows)

    @cached_property
    def keys(self) -> Select[Any]:
        return select(*self.mapped.keys).where(self.rows).order_by(*self.mapped.keys)

    def count(self, session: Session, params: Params = _NONE) -> int:
        return session.scalar(self.total, params) or 0


@dataclass(frozen=True, slots=True)
class Planned:
    """A step that was looked at: how many rows, and the SHA-256 of their keys, as hex."""

    step: Step
    rows: int
    digest: str


def look(
    session: Session, step: Step, params: Params = _NONE, *, expected: int | None = None
) -> Planned:
    """
    Read the keys of the rows that *step* is for; nothing is changed.

    Args:
        expected: How many there are, where that is known: a few are read at once, none not at all.
    """
    hasher = hashlib.sha256(f"{step.mapped.name} {step.outcome}:".encode())
    found = 0
    if expected != 0:
        many = expected is None or expected > _KEYS_PER_READ
        options = {"yield_per": _KEYS_PER_READ} if many else {}
        if many:
            read_to_the_end(session)
        result = session.execute(step.keys, params, execution_options=options)
        for part in result.partitions(_KEYS_PER_READ):
            found += len(part)
            # Quoted: a key of text may hold whatever would stand between two.
            hasher.update("".join([repr([*map(str, key)]) for key in part]).encode())
    return Planned(step, found, hasher.hexdigest())


def digest(planned: Iterable[Planned]) -> str:
    """
    Return the SHA-256 of a plan: every table, outcome and primary key in it, as hex.

    A row that comes, goes or changes its outcome gives another digest.
    """
    return hashlib.sha256("".join(one.digest for one in planned).encode()).hexdigest()


def carry_out(
    session: Session,
    data_map: DataMap,
    steps: Iterable[Step],
    now: datetime,
    params: Params = _NONE,
    expected: Mapping[Step, int] | None = None,
) -> None:
    """
    Carry out *steps* in their order: a fixed number of statements per table, never one per row.

    Args:
        expected: How many rows each step has, where it was counted before.

    Raises:
        ConstraintError: A rule of the database that the data map does not know forbids it.
        IncompleteErasureError: A step met another number of rows.
    """
    # The month: the instant would tie the anonymous rows of one person together.
    month = now.replace(day=1, hour=0, minute=0, second=0, microsecond=0)
    values, expected = {**params, _NOW: month}, expected or {}
    for step in steps:
        changed = None
        try:
            for statement in _statements(data_map, step):
                changed = cast("CursorResult[Any]", session.execute(statement, values)).rowcount
        except DBAPIError as err:
            if (rule := _rule(err)) is None:
                raise
            raise ConstraintError(
                f"{rule} forbids that rows of {step.mapped.name} are {step.outcome}"
            ) from None
        if changed is not None and changed != expected.get(step, changed):
            raise IncompleteErasureError(
                f"other rows of {step.mapped.name} were {step.outcome} than was planned"
            )


def _rule(err: DBAPIError) -> str | None:
    """Name the rule that was broken, if one was: an engine's own words may quote the row."""
    diagnosis = getattr(err.orig, "diag", None)
    if name := getattr(diagnosis, "constraint_name", None):
        return f"the constraint {name}"
    if getattr(diagnosis, "sqlstate", None) == _RAISED_BY_TRIGGER:
        return "a trigger of the database"
    if not isinstance(err, IntegrityError):
        return None
    named = _SQLITE_RULE.match(str(err.orig))
    return f"a {named[0]}" if named else "a rule of the database"


@lru_cache(maxsize=512)
def _statements(data_map: DataMap, step: Step) -> tuple[Update | Delete, ...]:
    table = step.mapped.table
    if step.outcome is Outcome.DELETED:
        return (*_unlinking(data_map, step), delete(table).where(step.rows))
    values = _erased_values(step.mapped, step.outcome)
    return (update(table).where(step.rows).values(values),) if values else ()


def _unlinking(data_map: DataMap, step: Step) -> Iterator[Update]:
    """Clear the references that other rows hold to the rows about to go."""
    for other, column in data_map.references_to(step.mapped):
        # By its only link a row belongs to the person, and has had a step of its own before.
        if not column.nullable or other.rule.owned_by == (column.name,):
            continue
        (key,) = column.foreign_keys
        going = select(key.column).where(step.rows)
        yield update(other.table).where(column.in_(going)).values({column.name: null()})


def _erased_values(mapped: MappedTable, outcome: Outcome) -> dict[str, Any]:
    """Return what each column becomes, by the data map's rules."""
    if outcome is Outcome.SHARED:
        return {}
    values: dict[str, Any] = {
        name: _erased_value(mapped.table.c[name], rule)
        for name, rule in mapped.personal_columns.items()
        if rule.on_erase is not OnErase.KEEP
        and (rule.third_party or outcome is not Outcome.REDACTED)
        and not (rule.statutory and outcome is Outcome.RETAINED)
    }
    marks = {Outcome.ANONYMIZED: ANONYMIZED_AT, Outcome.RETAINED: RESTRICTED_AT}
    mark = marks.get(outcome)
    # The row itself need not be marked: a child is kept as its parent is.
    if mark is not None and mark in mapped.table.c:
        values[mark] = bindparam(_NOW, type_=mapped.table.c[mark].type)
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
    (key,) = mapped.link.foreign_keys
    return mapped.link.in_(select(key.column).where(parent_rows))
