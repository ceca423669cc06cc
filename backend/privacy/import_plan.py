"""
Which rows of an export come back: those that are missing, and this person's by their links.

Nothing is changed here. Keys that are taken are looked up a chunk at a time, and what the person
has now in a fixed number of statements a table.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from sqlalchemy import Column, ColumnElement, select, tuple_
from sqlalchemy.orm import Session

from backend.errors import ConflictError, SubjectErasedError
from backend.privacy.data_map import DataMap
from backend.privacy.declarations import TableRole
from backend.privacy.import_documents import ROWS_PER_CHUNK, Document, Key, Row, SentTable
from backend.privacy.import_values import ImportRefusedError
from backend.privacy.mapped_tables import ANONYMIZED_AT, MappedTable
from backend.privacy.walk import owned, reached

UID: Final = "uid"

# Says whether the person of the first `uid` came back as the second by an earlier import.
CameBack = Callable[[Any, Any], bool]


@dataclass(slots=True)
class Imported:
    """
    What became of the rows of one table.

    *incomplete* ones, among those restored, lack cells that the export had left out.
    """

    restored: int = 0
    unchanged: int = 0
    skipped: int = 0
    incomplete: int = 0


@dataclass
class Part:
    """
    One table's share of an import.

    Attributes:
        restore: The keys of the rows that come back.
        theirs: By column that others refer to, what it holds in the person's rows: those that
            are there, and those that come back.
        coming: The same, of rows that are not there yet.
        shares: Columns that refer to shared tables, and what they refer to.
    """

    sent: SentTable
    theirs: dict[str, set[Any]]
    coming: dict[str, set[Any]]
    shares: tuple[tuple[str, Column[Any]], ...]
    restore: set[Key] = field(default_factory=set)
    done: Imported = field(default_factory=Imported)

    @property
    def mapped(self) -> MappedTable:
        return self.sent.mapped

    def note(self, cells: Row, *, coming: bool = False) -> None:
        """Remember by what others may refer to this row."""
        for name, values in self.theirs.items():
            if (value := cells.get(name)) is not None:
                values.add(value)
                if coming:
                    self.coming[name].add(value)


@dataclass(frozen=True, slots=True)
class ImportPlan:
    """What comes back, and the person's `uid` as it was exported."""

    subject_id: Any
    exported_uid: Any
    parts: dict[str, Part]


def plan_import(
    session: Session, data_map: DataMap, document: Document, came_back: CameBack
) -> ImportPlan:
    """
    Decide about every row of *document*; lock the person's own until the transaction ends.

    Raises:
        ImportRefusedError: The rows do not hang together.
        ConflictError: The number is somebody else's now.
        SubjectErasedError: The person was made anonymous; their row cannot be filled again.
    """
    planner = _Planner(session, data_map, document)
    uid = planner.plan_subject(came_back)
    for mapped in _by_ownership(data_map):
        if mapped.name in planner.parts:
            planner.plan_owned(planner.parts[mapped.name])
    planner.skip_strangers()
    for mapped in data_map.children_first:
        if mapped.rule.role is TableRole.SHARED and mapped.name in planner.parts:
            planner.plan_shared(planner.parts[mapped.name])
    return ImportPlan(document.subject_id, uid, planner.parts)


def _by_ownership(data_map: DataMap) -> Iterator[MappedTable]:
    """Yield the owned tables, each after those that it leads to, as far as circles let it."""
    seen: set[str] = set()

    def visit(mapped: MappedTable) -> Iterator[MappedTable]:
        if mapped.name not in seen:
            seen.add(mapped.name)
            for link in data_map.links(mapped):
                yield from visit(link.target)
            if mapped.rule.role is TableRole.OWNED:
                yield mapped

    for mapped in data_map.of_people:
        yield from visit(mapped)


def rows_with(
    session: Session,
    columns: Sequence[Column[Any]],
    of: Sequence[Column[Any]],
    values: Sequence[Key],
) -> Iterator[Key]:
    """Yield *columns* of the rows that have one of *values* in the columns *of*."""
    if values:
        wanted = of[0].in_([v for (v,) in values]) if len(of) == 1 else tuple_(*of).in_(values)
        yield from map(tuple, session.execute(select(*columns).where(wanted)))


class _Planner:
    """The state of one planning: what is theirs, what waits for its owner, what is needed."""

    def __init__(self, session: Session, data_map: DataMap, document: Document) -> None:
        self._session = session
        self._data_map = data_map
        self._number = document.subject_id
        self._person = data_map.subject.key == document.subject_id
        self.parts = {name: _part(data_map, sent) for name, sent in document.tables.items()}
        # By table, column and value: the rows that are the person's if that one is.
        self._waiting: dict[Key, list[tuple[Part, Key, Row]]] = defaultdict(list)
        # Rows of shared tables that restored rows refer to, by table, column and value.
        self._needed: set[Key] = set()

    def plan_subject(self, came_back: CameBack) -> Any:
        part = self.parts[self._data_map.subject.name]
        found = [item for chunk in part.sent.chunks() for item in chunk]
        if [key for key, _row in found] != [(self._number,)] or part.sent.redacted:
            raise ImportRefusedError("the export does not hold exactly its subject's own row")
        ((key, raw),) = found
        row = part.sent.read(key, raw)
        if row[ANONYMIZED_AT] is not None:
            raise ImportRefusedError("the export is of a row that is about nobody")
        columns = part.mapped.table.c
        statement = select(columns[UID], columns[ANONYMIZED_AT]).where(self._person)
        present = self._session.execute(statement.with_for_update()).one_or_none()
        if present is None:
            self._adopt(part, key, row)
        elif present[1] is not None:
            raise SubjectErasedError(f"user {self._number} was made anonymous")
        elif present[0] != row[UID] and not came_back(row[UID], present[0]):
            raise ConflictError(f"user {self._number} is now another person")
        else:
            self._note_theirs(part, [self._person])
            part.done.unchanged += 1
        return row[UID]

    def plan_owned(self, part: Part) -> None:
        sent, keys = part.sent, part.mapped.keys
        mine = self._note_theirs(part, owned(self._data_map, part.mapped, self._person))
        names = _telling(part)
        for chunk in sent.chunks():
            others = [key for key, _row in chunk if key not in mine]
            taken = set(rows_with(self._session, keys, keys, others))
            for key, raw in chunk:
                if key in mine:
                    part.done.unchanged += 1
                elif key in taken or not sent.may_return(key):
                    part.done.skipped += 1
                else:
                    self._place(part, key, sent.read(key, raw, names))

    def plan_shared(self, part: Part) -> None:
        """Of shared rows come back those that are missing and that restored rows refer to."""
        sent, columns = part.sent, part.mapped.exported_columns
        way = reached(self._data_map, part.mapped, self._person)
        mine = self._note_theirs(part, [] if way is None else [way])
        for chunk in sent.chunks():
            others = [key for key, _row in chunk if key not in mine]
            there: dict[Key, Row] = {}
            for cells in rows_with(self._session, columns, part.mapped.keys, others):
                live = {str(c.name): cell for c, cell in zip(columns, cells, strict=True)}
                there[tuple(live[name] for name in sent.key_names)] = live
            for key, raw in chunk:
                if key in mine:
                    part.done.unchanged += 1
                elif not sent.may_return(key):
                    part.done.skipped += 1
                else:
                    self._share(part, key, sent.read(key, raw), there.get(key))

    def _share(self, part: Part, key: Key, row: Row, live: Row | None) -> None:
        if live is None and any(
            (part.mapped.name, n, row.get(n)) in self._needed for n in part.theirs
        ):
            self._adopt(part, key, row)
        elif live is not None and _is_same(part.mapped, row, live):
            # Others need it still; what was the person's there may be so again.
            part.note(live)
            part.done.unchanged += 1
        else:
            part.done.skipped += 1

    def skip_strangers(self) -> None:
        """Count the rows whose owner has not turned up: they are somebody else's."""
        for rows in self._waiting.values():
            for part, _key, _cells in rows:
                part.done.skipped += 1
        self._waiting.clear()

    def _note_theirs(self, part: Part, ways: Iterable[ColumnElement[bool]]) -> set[Key]:
        """Note the rows of the person that are there now; return their keys."""
        found: set[Key] = set()
        width = len(part.mapped.keys)
        columns = [part.mapped.table.c[name] for name in part.theirs]
        for way in ways:
            statement = select(*part.mapped.keys, *columns).where(way)
            result = self._session.execute(statement.execution_options(yield_per=ROWS_PER_CHUNK))
            for row in result:
                found.add(tuple(row[:width]))
                part.note(dict(zip(part.theirs, row[width:], strict=True)))
        return found

    def _place(self, part: Part, key: Key, cells: Row) -> None:
        """Give a row to the person, or have it wait for the row that decides whose it is."""
        for link in self._data_map.links(part.mapped):
            value = cells[str(link.column.name)]
            if value is None:
                continue
            name, target = link.target.name, str(link.target_column.name)
            above = self.parts.get(name)
            if above is not None and value in above.theirs[target]:
                self._adopt(part, key, cells)
            else:
                self._waiting[name, target, value].append((part, key, cells))
            return
        part.done.skipped += 1

    def _adopt(self, part: Part, key: Key, cells: Row) -> None:
        """Have a row come back, and with it those that waited for it."""
        adopted = [(part, key, cells)]
        while adopted:
            part, key, cells = adopted.pop()
            part.restore.add(key)
            part.done.restored += 1
            part.done.incomplete += key in part.sent.redacted
            part.note(cells, coming=True)
            for name in part.theirs:
                adopted += self._waiting.pop((part.mapped.name, name, cells.get(name)), ())
            for column, target in part.shares:
                self._needed.add((str(target.table.name), str(target.name), cells[column]))


def _part(data_map: DataMap, sent: SentTable) -> Part:
    referred = {
        str(foreign.column.name)
        for other, column in data_map.references_to(sent.mapped)
        for foreign in column.foreign_keys
        if foreign.column.table is sent.mapped.table
    }
    shares = tuple(
        (str(column.name), foreign.column)
        for column in sent.mapped.exported_columns
        for foreign in column.foreign_keys
        if data_map[str(foreign.column.table.name)].rule.role is TableRole.SHARED
    )
    return Part(sent, {n: set() for n in referred}, {n: set() for n in referred}, shares)


def _telling(part: Part) -> tuple[str, ...]:
    """The columns that tell whose a row is, and what it hangs together with."""
    return tuple(
        str(column.name)
        for column in part.mapped.exported_columns
        if column.primary_key or column.foreign_keys or column.name in part.theirs
    )


def _is_same(mapped: MappedTable, row: Row, live: Row) -> bool:
    """Compare all but what is about third parties, which an export may lack."""
    return all(row[name] == live[name] for name in row if name not in mapped.third_party_columns)
