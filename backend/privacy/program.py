"""
The program of an erasure: its steps, and the statements that count before and look afterwards.

It depends on the data map, the mode and the shape of the person, not on who they are, so it is
built once for all people of one shape.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

from sqlalchemy import ColumnElement, Select, bindparam, exists, literal, not_, or_, select

from backend.privacy.clocks import anchor_of, clock_of, cutoff_param, is_due
from backend.privacy.data_map import DataMap
from backend.privacy.declarations import EraseMode
from backend.privacy.mapped_tables import MappedTable
from backend.privacy.sharing import let_go, shared_tables
from backend.privacy.steps import Outcome, Step
from backend.privacy.walk import Shape, Subjects, mentioned, names, of_shape, owned

PEOPLE_PARAM: Final = "walk_people"


@dataclass(frozen=True)
class Program:
    """
    What is done for people of one shape.

    Attributes:
        steps: Children first.
        of_circles: Steps whose rows must be found before anything changes.
        shared: Shared rows to which *steps* cut references, one a table; what becomes of them
            depends on what else is there.
        tally: One row: how many rows each of *steps* and *shared* has.
        left: One row: how many rows of the tables *left_in* still speak of the people afterwards.
    """

    steps: tuple[Step, ...]
    of_circles: tuple[Step, ...]
    shared: tuple[Step, ...]
    tally: Select[Any]
    left: Select[Any] | None
    left_in: tuple[str, ...]


def program_of(data_map: DataMap, subjects: Subjects, mode: EraseMode) -> Program:
    """Return the program for *subjects*."""
    if subjects.shape is None:
        return _program(data_map, subjects, mode)
    return _shaped(data_map, subjects.shape, mode)


@lru_cache(maxsize=64)
def _shaped(data_map: DataMap, shape: Shape, mode: EraseMode) -> Program:
    return _program(data_map, of_shape(data_map, shape), mode)


def _program(data_map: DataMap, subjects: Subjects, mode: EraseMode) -> Program:
    steps: list[Step] = []
    of_circles: list[Step] = []
    for mapped in data_map.children_first:
        # What leads through a circle is taken apart in no order that would keep the way.
        to = of_circles if data_map.leads_through_circle(mapped) else steps
        for rows in owned(data_map, mapped, subjects.rows):
            to.extend(_steps(mapped, rows, mode))
        if (named := mentioned(data_map, mapped, subjects)) is not None:
            to.append(Step(mapped, Outcome.REDACTED, named))
    left = list(_left(data_map, subjects, mode))
    shared = [
        Step(mapped, Outcome.SHARED, loose)
        for mapped in shared_tables(data_map)
        if (loose := let_go(data_map, mapped, steps)) is not None
    ]
    return Program(
        tuple(steps),
        tuple(of_circles),
        tuple(shared),
        _counting([*steps, *shared]),
        _counting([step for _, step in left]) if left else None,
        tuple(name for name, _ in left),
    )


def _steps(mapped: MappedTable, rows: ColumnElement[bool], mode: EraseMode) -> Iterator[Step]:
    gone = mode is EraseMode.DELETE or mapped.rule.always_delete
    if mapped.statute is not None:
        clock = clock_of(mapped)
        due = is_due(clock, cutoff_param(clock))
        kept = _as_its_clock(mapped, clock, or_(not_(due), anchor_of(clock).is_(None)))
        yield Step(mapped, Outcome.RETAINED, rows & kept)
        # Also what has no row of *clock* above it, being the person's by another link.
        rows &= not_(kept)
    yield Step(mapped, Outcome.DELETED if gone else Outcome.ANONYMIZED, rows)


def _left(data_map: DataMap, subjects: Subjects, mode: EraseMode) -> Iterator[tuple[str, Step]]:
    """Yield what must be empty afterwards, with its table's name."""
    key = data_map.subject.key
    people = key.in_(bindparam(PEOPLE_PARAM, expanding=True, type_=key.type))
    for mapped in data_map.of_people:
        stays = mapped is data_map.subject and mode is EraseMode.ANONYMIZE
        ways = () if subjects.rows is None or stays else owned(data_map, mapped, people)
        # Whoever has the same telephone in a row of their own is somebody else.
        named = None if mapped is data_map.subject else names(mapped, subjects)
        for rows in (*ways, *([] if named is None else [named])):
            yield mapped.name, Step(mapped, Outcome.DELETED, rows)


def _counting(steps: list[Step]) -> Select[Any]:
    # Counts, not EXISTS: for what is not there PostgreSQL would plan to read whole tables, since
    # it expects to meet a first row soon.
    return select(*(step.total.scalar_subquery().label(f"n{at}") for at, step in enumerate(steps)))


def _as_its_clock(
    mapped: MappedTable, clock: MappedTable, rows: ColumnElement[bool]
) -> ColumnElement[bool]:
    """
    Return the predicate for rows of *mapped* whose ancestor *clock* is among *rows*.

    Asked row by row: as a list, SQLite would read the *clock* rows of everybody.
    """
    if mapped is clock:
        return rows
    if mapped.parent is None or mapped.link is None:
        raise ValueError(f"{mapped.name} does not hang from {clock.name}")
    above = _as_its_clock(mapped.parent, clock, rows)
    (key,) = mapped.link.foreign_keys
    return exists(
        select(literal(1)).where(key.column == mapped.link, above).correlate(mapped.table)
    )
