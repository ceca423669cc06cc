"""
The live database against the data map: what it holds that no declaration covers.

`unknown` is asked before every erasure, so it is one cheap statement. `drift` also compares what
decides whether an erasure can do what the map says.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import bindparam, text
from sqlalchemy.orm import Session

from backend.privacy.data_map import DataMap
from backend.privacy.mapped_tables import MappedTable
from backend.privacy.shapes import declared_shape, facts, fold, live_shapes, printable

# Alembic's own: one revision number, nothing of anybody.
_NOT_OURS: Final = "alembic_version"
_ONLY_LIVE: Final = "is in the database and not in the data map"
_ONLY_MAPPED: Final = "is in the data map and not in the database"

# A virtual table stands for the shadow tables that it keeps its content in. Only a known one is
# asked for its columns: the module of another need not be loaded here. pragma_table_list sees
# temporary and attached databases too, hence the condition on its schema.
_SQLITE: Final = text("""
    SELECT NULL, l.name, TRUE, lower(l.name), (
        SELECT json_group_array(x.name) FROM pragma_table_xinfo(
            CASE WHEN l.type = 'table' OR lower(l.name) IN :known THEN l.name END, 'main') AS x)
    FROM pragma_table_list AS l
    WHERE l.schema = 'main' AND l.type IN ('table', 'virtual')
        AND l.name NOT LIKE 'sqlite~_%' ESCAPE '~'
""").bindparams(bindparam("known", expanding=True))

# A partition holds no column that its table has not; a table that only inherits may.
_POSTGRESQL: Final = text("""
    SELECT n.nspname, c.relname, pg_catalog.pg_table_is_visible(c.oid), c.oid, ARRAY(
        SELECT a.attname::text FROM pg_catalog.pg_attribute AS a
        WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped)
    FROM pg_catalog.pg_class AS c
    JOIN pg_catalog.pg_namespace AS n ON n.oid = c.relnamespace
    WHERE c.relkind IN ('r', 'p', 'f', 'm') AND NOT c.relispartition
        AND n.nspname <> 'information_schema' AND n.nspname NOT LIKE 'pg~_%' ESCAPE '~'
        AND NOT EXISTS (
            SELECT FROM pg_catalog.pg_depend AS d
            WHERE d.classid = 'pg_catalog.pg_class'::pg_catalog.regclass AND d.objid = c.oid
                AND d.deptype = 'e')
""")


@dataclass(frozen=True, slots=True, order=True)
class Drift:
    """One difference: the table or column, and a plain sentence about it."""

    where: str
    what: str


@dataclass(frozen=True, slots=True)
class _Live:
    """A table of the database; *columns* are its own spellings by folded name."""

    name: str
    key: Any
    shown: str
    columns: Mapping[str, str]
    mapped: MappedTable | None
    unknown: tuple[str, ...]


def unknown(session: Session, data_map: DataMap) -> tuple[str, ...]:
    """
    Name what the live database holds and *data_map* does not know, in one statement.

    Views hold nothing of their own and are left out; so are Alembic's table, temporary tables
    and, on PostgreSQL, the tables of extensions.

    Returns:
        `table.column`, or `table` for a whole one; on PostgreSQL with the schema before it, where
        that is not the one in which the map's tables are.
    """
    return tuple(sorted(name for live in _live(session, data_map) for name in live.unknown))


def drift(session: Session, data_map: DataMap) -> tuple[Drift, ...]:
    """
    Say in what the live database and *data_map* differ, as far as it may change an erasure.

    Beyond `unknown`: what the database lacks; types and lengths, NULL, computed columns; keys,
    uniqueness and CHECK constraints; triggers and what else acts behind a statement's back.
    """
    connection, tables = session.connection(), _live(session, data_map)
    dialect = connection.dialect
    found = {Drift(name, _ONLY_LIVE) for live in tables for name in live.unknown}
    present = {live.mapped.table: live for live in tables if live.mapped is not None}
    shapes = live_shapes(
        connection, {live.key: (t.schema, live.name) for t, live in present.items()}
    )
    for table in (mapped.table for mapped in data_map.tables):
        if table not in present:
            found.add(Drift(printable(table.fullname), _ONLY_MAPPED))
            continue
        live = present[table]
        names = {fold(column.name, dialect) for column in table.columns}
        lacking = names - live.columns.keys()
        found |= {Drift(f"{live.shown}.{printable(name)}", _ONLY_MAPPED) for name in lacking}
        common = names - lacking
        found |= _differences(
            facts(shapes[live.key], live.shown, common, dialect),
            facts(declared_shape(table, dialect), live.shown, common, dialect),
        )
    return tuple(sorted(found))


def _differences(
    live: Mapping[tuple[str, str], str], mapped: Mapping[tuple[str, str], str]
) -> set[Drift]:
    found = set()
    for place in live.keys() | mapped.keys():
        where, what = place
        if place not in mapped:
            found.add(Drift(where, f"{what} {_ONLY_LIVE}"))
        elif place not in live:
            found.add(Drift(where, f"{what} {_ONLY_MAPPED}"))
        elif live[place] != mapped[place]:
            say = f"{what} is {live[place]} in the database and {mapped[place]} in the data map"
            found.add(Drift(where, say))
    return found


def _live(session: Session, data_map: DataMap) -> list[_Live]:
    dialect = session.get_bind().dialect
    known = {(t.table.schema, fold(t.table.name, dialect)): t for t in data_map.tables}
    if dialect.name == "sqlite":
        rows = session.execute(_SQLITE, {"known": [name for _schema, name in known]}).all()
    else:
        rows = session.execute(_POSTGRESQL).all()
    homes = {row[0] for row in rows if row[2] and (None, fold(row[1], dialect)) in known}
    found = []
    for schema, name, visible, key, columns in rows:
        if visible and name == _NOT_OURS:
            continue
        folded, at_home = fold(name, dialect), visible and (schema is None or schema in homes)
        shown = printable(name if at_home else f"{schema}.{name}")
        mapped = known.get((schema, folded))
        if visible:
            mapped = known.get((None, folded), mapped)
        spelled = json.loads(columns) if isinstance(columns, str) else columns
        by_folded = {fold(column, dialect): column for column in spelled}
        new: tuple[str, ...] = (shown,)
        if mapped is not None:
            declared = {fold(column, dialect) for column in mapped.columns}
            new = tuple(
                f"{shown}.{printable(column)}"
                for folded, column in by_folded.items()
                if folded not in declared
            )
        found.append(_Live(name, key, shown, by_folded, mapped, new))
    return found
