"""
The scan after an erasure: what is left of a person's old values in any text of the database.

It reads the live catalogue, not only the data map, so that a table or column which nobody
declared is searched too. It tells places and counts, never what stands there.

It does not find a value that was compressed, hashed, or encoded as base64, nor what lies outside
of tables: free pages, statistics of the planner, large objects.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from sqlalchemy import (
    ColumnElement,
    Engine,
    LargeBinary,
    Text,
    case,
    cast,
    column,
    func,
    select,
    table,
    type_coerce,
)
from sqlalchemy import text as sql
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.orm import Session
from sqlalchemy.sql import quoted_name
from sqlalchemy.types import NullType

from backend.db_utils import session_scope
from backend.errors import HoldfastError
from backend.privacy.data_map import DataMap
from backend.privacy.declarations import Personal
from backend.privacy.live_tables import LiveColumn, LiveTable, live_columns, live_tables
from backend.privacy.mapped_tables import MappedTable
from backend.privacy.old_values import CLOSED, decoded, holds_text, opener, raw
from backend.privacy.words import Words, normalise

_BATCH_ROWS: Final = 1_000
# Cells of bytes may be files.
_BATCH_FILES: Final = 20
# What an encrypted value begins with: in a column that the map does not know, nothing opens it.
_SEALED: Final = "enc1."


@dataclass(frozen=True, slots=True)
class Found:
    """How many cells of one column hold an old value in a place where it has no business."""

    table: str
    column: str
    cells: int


@dataclass(frozen=True, slots=True)
class Unread:
    """
    What could not be read, and the error's code.

    Without a *column* it is the rest of the table from where the error came, else *cells* of it.
    """

    table: str
    why: str
    column: str = ""
    cells: int = 0


@dataclass(frozen=True, slots=True)
class Scan:
    """
    What a scan read and found.

    Attributes:
        cells: How many cells that are not NULL were read.
        namesakes: Cells that hold an old value as somebody's own: another guest's same name, a
            shared landline, an invoice that the law keeps.
        skipped_words: Values too short to look for.
    """

    cells: int
    tables: int
    found: tuple[Found, ...]
    namesakes: int
    unread: tuple[Unread, ...]
    skipped_words: int

    @property
    def clean(self) -> bool:
        """Nothing was found, and everything was read."""
        return not self.found and not self.unread


@dataclass(frozen=True, slots=True)
class _Source:
    """One column to read: how it is selected and opened, and what the data map says of it."""

    name: str
    expression: ColumnElement[Any]
    is_mapped: bool
    is_binary: bool
    category: str | None
    open: Callable[[Any], Any] | None


@dataclass
class _Tally:
    cells: int = 0
    tables: int = 0
    namesakes: int = 0
    found: Counter[tuple[str, str]] = field(default_factory=Counter)
    closed: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    unread: list[Unread] = field(default_factory=list)


def scan(engine: Engine, data_map: DataMap, words: Words) -> Scan:
    """
    Look for *words* in every text of every table of the database, mapped or not.

    Encrypted columns that the map knows are opened. Memory does not grow with the tables; each
    table is read in a transaction of its own, so that SQLite's log is not kept for the whole scan.
    """
    tally = _Tally()
    with session_scope(engine, read_only=True) as session:
        tables = live_tables(session)
    known = {mapped.name: mapped for mapped in data_map.tables}
    there = {table.name for table in tables if table.is_ours}
    tally.unread += [Unread(name, "missing") for name in known if name not in there]
    for live in tables:
        try:
            with session_scope(engine, read_only=True) as session:
                _scan_table(session, live, known.get(live.name), words, tally)
            tally.tables += 1
        # A ValueError is a driver's: a cell in a wrong encoding. Their messages quote the row.
        except (SQLAlchemyError, ValueError) as err:
            tally.unread.append(Unread(live.label, _why(err)))
    closed = (Unread(name, why, at, n) for (name, at, why), n in sorted(tally.closed.items()))
    found = (Found(name, at, n) for (name, at), n in sorted(tally.found.items()))
    return Scan(
        cells=tally.cells,
        tables=tally.tables,
        found=tuple(found),
        namesakes=tally.namesakes,
        unread=(*tally.unread, *closed),
        skipped_words=words.skipped,
    )


def _why(err: Exception) -> str:
    """Return the code of *err*, never its message."""
    if isinstance(err, HoldfastError):
        return err.code
    original = err.orig if isinstance(err, DBAPIError) and err.orig is not None else err
    code = getattr(original, "sqlstate", None) or getattr(original, "sqlite_errorname", None)
    return str(code or type(original).__name__)


def _scan_table(
    session: Session, live: LiveTable, mapped: MappedTable | None, words: Words, tally: _Tally
) -> None:
    """Read one table whole and count in *tally*."""
    if live.schema is not None:
        # Where a policy hides rows from this user, PostgreSQL now raises instead of hiding them.
        session.execute(sql("SET LOCAL row_security = off"))
    schema = None if live.is_ours else quoted_name(str(live.schema), True)
    place = table(quoted_name(live.name, True), schema=schema)
    if session.execute(select(sql("1")).select_from(place).limit(1)).first() is None:
        return
    # Another schema may have a table of the same name.
    sources = _sources(session, live, mapped if live.is_ours else None)
    if not sources:
        return
    batch = _BATCH_FILES if any(source.is_binary for source in sources) else _BATCH_ROWS
    statement = select(*(s.expression.label(f"c{n}") for n, s in enumerate(sources)))
    statement = statement.select_from(mapped.table if mapped and live.is_ours else place)
    result = session.execute(statement.execution_options(yield_per=batch))
    for rows in result.partitions():
        for source, cells in zip(sources, zip(*rows, strict=True), strict=True):
            _look(live.label, source, cells, words, tally)


def _sources(session: Session, live: LiveTable, mapped: MappedTable | None) -> list[_Source]:
    """Say how each column of a table that may hold text is read."""
    sources = []
    for one in live_columns(session, live):
        if mapped is None or one.name not in mapped.columns:
            place: ColumnElement[Any] = column(quoted_name(one.name, True))
            expression = _as_text(session, place, one)
            sources.append(_Source(one.name, expression, False, one.is_binary, None, None))
        elif not one.is_number:
            sources.append(_mapped_source(session, mapped, one))
    return sources


def _mapped_source(session: Session, mapped: MappedTable, one: LiveColumn) -> _Source:
    place, rule = mapped.table.c[one.name], mapped.columns[one.name]
    expression, open_ = raw(place), None
    if holds_text(place):
        open_ = opener(session, place)
    elif session.get_bind().dialect.name == "sqlite":
        # Numbers stay behind; text that somebody put among them does not.
        expression = case((func.typeof(expression).in_(("text", "blob")), expression))
    expression = _as_text(session, expression, one)
    category = rule.category if isinstance(rule, Personal) else None
    return _Source(one.name, expression, True, one.is_binary, category, open_)


def _as_text(
    session: Session, expression: ColumnElement[Any], one: LiveColumn
) -> ColumnElement[Any]:
    if session.get_bind().dialect.name == "sqlite":
        # Any column may hold any type there. As bytes, text in a wrong encoding is read as well.
        return type_coerce(cast(expression, LargeBinary), NullType)
    return type_coerce(expression, NullType) if one.is_binary else cast(expression, Text)


def _look(name: str, source: _Source, cells: Sequence[Any], words: Words, tally: _Tally) -> None:
    """Search a batch of cells of one column at once, and one by one only where that hits."""
    texts = [decoded(cell) for cell in cells if cell is not None]
    tally.cells += len(texts)
    if source.open is not None:
        texts = [_opened(name, source, text, tally) for text in texts]
    whole = normalise("\0".join(texts))
    if not source.is_mapped and _SEALED in whole:
        sealed = sum(text.startswith(_SEALED) for text in texts)
        tally.closed[name, source.name, "sealed"] += sealed
    foreign, kin = words.finders(source.category)
    if not foreign.is_in(whole) and not kin.is_in(whole):
        return
    for text in map(normalise, texts):
        if foreign.is_in(text):
            tally.found[name, source.name] += 1
        elif kin.is_in(text):
            tally.namesakes += 1


def _opened(name: str, source: _Source, text: str, tally: _Tally) -> str:
    try:
        return decoded(source.open(text)) if source.open is not None else text
    except CLOSED as err:
        tally.closed[name, source.name, _why(err)] += 1
        # What does not open may be plain text in a place for tokens.
        return text
