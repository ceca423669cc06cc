"""Reading what is held about a person, with what is about somebody else left out."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property, lru_cache
from typing import Any, Final

from sqlalchemy import ColumnElement, Select, and_, false, func, not_, select
from sqlalchemy.orm import Session

from backend.privacy.data_map import DataMap
from backend.privacy.declarations import Personal, TableRole
from backend.privacy.mapped_tables import MappedTable
from backend.privacy.walk import Shape, Subjects, mentioned, names, of_shape, owned, reached

_ROWS_PER_READ: Final = 500

Row = dict[str, Any]


class Ground(StrEnum):
    """Why a cell is not handed out (GDPR art. 15(4))."""

    THIRD_PARTY = "it is about another person whom the row names"
    OWNER = "it is about the person whose row it is"


@dataclass(frozen=True, slots=True)
class Read:
    """One row, and which of its columns were left out: they read as NULL."""

    row: Row
    redacted: tuple[str, ...] = ()
    ground: Ground | None = None


class Reader:
    """Reads one person's rows, table by table; what is empty costs nothing after the first look."""

    def __init__(self, session: Session, data_map: DataMap, subjects: Subjects) -> None:
        # Past the session, which costs a third of a small statement.
        self._connection = session.connection()
        self._params = subjects.params
        self._results = ExitStack()
        self._selects = (
            _selects(data_map, subjects)
            if subjects.shape is None
            else _shaped(data_map, subjects.shape)
        )
        self.tables = data_map.of_people

    @cached_property
    def counts(self) -> dict[str, int]:
        """How many rows each table has."""
        return {
            name: sum(self._rows_by_way[way] for way in ways)
            for name, ways in self._selects.ways.items()
        }

    def rows(self, mapped: MappedTable) -> Iterator[Read]:
        """Yield every row of one table that speaks of the person, encrypted columns in plain."""
        keys = [str(column.name) for column in mapped.exported_columns]
        for way in self._selects.ways[mapped.name]:
            expected = self._rows_by_way[way]
            # A cursor of the server takes three round trips: for many rows only.
            many = {"yield_per": _ROWS_PER_READ} if expected > _ROWS_PER_READ else {}
            if not expected:
                continue
            result = self._results.enter_context(
                self._connection.execute(way.statement, self._params, execution_options=many)
            )
            if not way.hidden:
                for row in result:
                    yield Read(dict(zip(keys, row, strict=True)))
                continue
            for *cells, is_named in result:
                found = dict(zip(keys, cells, strict=True))
                gone = () if is_named else tuple(n for n in way.hidden if found[n] is not None)
                yield Read(found | dict.fromkeys(gone), gone, way.ground if gone else None)

    def close(self) -> None:
        """
        Let go of the rows that were not read to their end, whoever still holds them.

        Their connection must not go back to its pool with a statement that goes on.
        """
        self._results.close()

    @cached_property
    def _rows_by_way(self) -> dict["_Way", int]:
        tally = self._connection.execute(self._selects.tally, self._params).one()
        ways = [way for ways in self._selects.ways.values() for way in ways]
        return dict(zip(ways, tally, strict=True))


@dataclass(frozen=True, eq=False)
class _Way:
    """Rows of a table that are read alike, and which of their columns are about somebody else."""

    statement: Select[Any]
    total: Select[Any]
    hidden: tuple[str, ...]
    ground: Ground


@dataclass(frozen=True)
class _Selects:
    """The ways of every table, and one row that says how many rows each has."""

    ways: Mapping[str, tuple[_Way, ...]]
    tally: Select[Any]


@lru_cache(maxsize=32)
def _shaped(data_map: DataMap, shape: Shape) -> _Selects:
    return _selects(data_map, of_shape(data_map, shape))


def _selects(data_map: DataMap, subjects: Subjects) -> _Selects:
    ways = {
        mapped.name: tuple(
            _way(mapped, rows, subjects, own=own) for rows, own in _rows(data_map, mapped, subjects)
        )
        for mapped in data_map.of_people
    }
    totals = [way.total.scalar_subquery() for of_table in ways.values() for way in of_table]
    return _Selects(ways, select(*(t.label(f"n{at}") for at, t in enumerate(totals))))


def _rows(
    data_map: DataMap, mapped: MappedTable, subjects: Subjects
) -> Iterator[tuple[ColumnElement[bool], bool]]:
    """Yield the predicates for the rows to read, and whether these are the person's own."""
    for rows in owned(data_map, mapped, subjects.rows):
        yield rows, True
    is_shared = mapped.rule.role is TableRole.SHARED
    shared = reached(data_map, mapped, subjects.rows) if is_shared else None
    if shared is not None:
        yield shared, True
    naming = mentioned(data_map, mapped, subjects)
    if naming is not None and shared is not None:
        naming = and_(naming, not_(func.coalesce(shared, false())))
    if naming is not None:
        yield naming, False


def _way(mapped: MappedTable, rows: ColumnElement[bool], subjects: Subjects, *, own: bool) -> _Way:
    hidden = tuple(
        str(column.name)
        for column in mapped.exported_columns
        if isinstance(rule := mapped.columns[column.name], Personal) and rule.third_party is own
    )
    named = names(mapped, subjects) if own else None
    is_named = false() if named is None else func.coalesce(named, false())
    columns = [*mapped.exported_columns, *([is_named.label("named")] if hidden else [])]
    return _Way(
        select(*columns).where(rows).order_by(*mapped.keys),
        select(func.count()).select_from(mapped.table).where(rows),
        hidden,
        Ground.THIRD_PARTY if own else Ground.OWNER,
    )
