"""
What a table is made of beyond its columns' names, as the database says it and as the model does.

Both sides give a `Shape`; `facts` spells one so that two sides of one meaning are equal. CHECK
constraints count as equal by name, columns and literals: PostgreSQL words the rest anew.
"""

import re
import warnings
from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, Final

from sqlalchemy import (
    CheckConstraint,
    Column,
    Connection,
    Dialect,
    Index,
    Inspector,
    Table,
    UniqueConstraint,
    inspect,
    text,
)
from sqlalchemy.engine.reflection import ObjectKind
from sqlalchemy.exc import SAWarning
from sqlalchemy.types import NullType, TypeEngine

_SQLITE_UNIQUE: Final = text("""
    SELECT lower(m.name), i.name, i.partial, c.name
    FROM main.sqlite_master AS m, pragma_index_list(m.name, 'main') AS i,
        pragma_index_info(i.name, 'main') AS c
    WHERE m.type = 'table' AND i."unique" AND i.origin <> 'pk' ORDER BY 1, 2
""")
_SQLITE_REFERENCES: Final = text("""
    SELECT lower(m.name), f.id, f."table", f.on_delete, f."from", f."to"
    FROM main.sqlite_master AS m, pragma_foreign_key_list(m.name, 'main') AS f
    WHERE m.type = 'table' ORDER BY 1, 2, f.seq
""")
# What copies, redirects or hides rows behind a statement's back, or refuses an UPDATE.
_SQLITE_EXTRAS: Final = text("""
    SELECT lower(tbl_name), 'trigger ' || name FROM main.sqlite_master WHERE type = 'trigger'
""")
_POSTGRESQL_EXTRAS: Final = text("""
    SELECT tgrelid, 'trigger ' || tgname FROM pg_catalog.pg_trigger WHERE NOT tgisinternal
    UNION ALL
    SELECT ev_class, 'rule ' || rulename FROM pg_catalog.pg_rewrite WHERE rulename <> '_RETURN'
    UNION ALL
    SELECT conrelid, 'exclusion ' || conname FROM pg_catalog.pg_constraint WHERE contype = 'x'
    UNION ALL
    SELECT oid, 'row security' FROM pg_catalog.pg_class WHERE relrowsecurity
""")

_FAMILIES: Final = {
    name: family
    for family, names in {
        "text": ("TEXT", "VARCHAR", "CHAR", "NVARCHAR", "NCHAR", "CLOB"),
        "integer": ("INTEGER", "BIGINT", "SMALLINT"),
        "number": ("FLOAT", "REAL", "DOUBLE", "DOUBLE PRECISION", "NUMERIC", "DECIMAL"),
        "bytes": ("BLOB", "BYTEA", "BINARY", "VARBINARY"),
        "json": ("JSON", "JSONB"),
    }.items()
    for name in names
}
_AS_DDL: Final = {"literal_binds": True, "include_table": False}
_TOKEN: Final = re.compile(r"""'(?:[^']|'')*'|"(?:[^"]|"")+"|[\w.]+""")
_CAST: Final = re.compile(r"""::\s*(?:\w+ with(?:out)? time zone|"[^"]+"|\w+)""")


@dataclass(frozen=True, slots=True)
class Shape:
    """One side's account of a table, in that side's spelling."""

    columns: Collection[tuple[str, TypeEngine[Any], bool, bool]]  # May be NULL? Is computed?
    key: Collection[str]
    unique: Collection[tuple[Collection[str | None], str]]  # The columns, and what limits it.
    references: Collection[tuple[Collection[str], str, Collection[str], str | None]]
    checks: Collection[tuple[str | None, str]]
    extras: Collection[str] = ()


def fold(name: str, dialect: Dialect) -> str:
    """Bring *name* to the form in which *dialect* compares names: SQLite's ignore ASCII case."""
    return name.encode().lower().decode() if dialect.name == "sqlite" else str(name)


def printable(name: str) -> str:
    """Escape what a terminal or a log would obey: any character may stand in a quoted name."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)


def facts(
    shape: Shape, where: str, common: Collection[str], dialect: Dialect
) -> dict[tuple[str, str], str]:
    """
    Spell *shape* as values by place and subject; `""` where being there is all.

    Args:
        where: How the table is shown.
        common: The folded columns that both sides have; of others there is no type to compare.
    """
    return {
        (printable(place), printable(subject)): value
        for place, subject, value in _facts(shape, where, common, dialect)
    }


def _facts(
    shape: Shape, where: str, common: Collection[str], dialect: Dialect
) -> Iterator[tuple[str, str, str]]:
    def listed(names: Collection[str | None]) -> str:
        return ", ".join("an expression" if n is None else fold(n, dialect) for n in names)

    for name, kind, nullable, computed in shape.columns:
        if (column := fold(name, dialect)) in common:
            place = f"{where}.{column}"
            yield place, "the type", _family(kind, dialect)
            yield place, "NULL", "allowed" if nullable else "refused"
            yield place, "the value", "computed" if computed else "stored"
    yield where, "the primary key", f"({listed(shape.key)})"
    for names, limit in shape.unique:
        # Which column comes first changes nothing.
        inside = listed(sorted(names, key=lambda name: fold(name or "", dialect)))
        yield where, f"the uniqueness of ({inside}){limit}", ""
    for names, target, target_names, on_delete in shape.references:
        place = f"{where}.{listed(names)}" if len(names) == 1 else where
        act = f" ON DELETE {on_delete}" if on_delete not in (None, "NO ACTION") else ""
        of = "" if len(names) == 1 else f" of ({listed(names)})"
        to = f"{fold(target, dialect)} ({listed(target_names)})"
        yield place, f"the foreign key{of} to {to}{act}", ""
    every = {fold(name, dialect) for name, *_rest in shape.columns}
    for check_name, condition in shape.checks:
        name = fold(check_name or "without a name", dialect)
        check = f"the CHECK {name} of ({_gist(condition, every, dialect)})"
        # The compiler doubles them for some drivers.
        yield where, re.sub("%+", "%", check), ""
    for extra in shape.extras:
        yield where, f"the {extra}", ""


def _family(kind: TypeEngine[Any], dialect: Dialect) -> str:
    if isinstance(kind, NullType):
        return "of no known kind"
    name, opening, size = kind.compile(dialect=dialect).partition("(")
    name = name.strip().upper()
    return _FAMILIES.get(name, name.lower()) + (f" {opening}{size}" if opening else "")


def _gist(condition: str, columns: Collection[str], dialect: Dialect) -> str:
    """Name the columns and literals of *condition*."""
    found = set()
    for token in _TOKEN.findall(_CAST.sub("", condition)):
        name = fold(token.strip('"'), dialect)
        if name in columns:
            found.add(name)
        elif token[0] == "'" or token[0].isdigit():
            # PostgreSQL quotes some numbers.
            found.add(token.strip("'-"))
    return ", ".join(sorted(found))


def declared_shape(table: Table, dialect: Dialect) -> Shape:
    """Read the shape that the model gives *table*."""
    unique: list[UniqueConstraint | Index] = [index for index in table.indexes if index.unique]
    unique += [part for part in table.constraints if isinstance(part, UniqueConstraint)]
    return Shape(
        columns=[(c.name, c.type, bool(c.nullable), c.computed is not None) for c in table.c],
        key=table.primary_key.columns.keys(),
        unique=[
            (_unique_columns(part), _limit(part.dialect_options[dialect.name])) for part in unique
        ],
        references=[
            (
                [element.parent.name for element in key.elements],
                key.elements[0].target_fullname.rpartition(".")[0],
                [element.target_fullname.rpartition(".")[2] for element in key.elements],
                key.ondelete,
            )
            for key in table.foreign_key_constraints
        ],
        checks=[
            (
                dialect.identifier_preparer.format_constraint(part),
                str(part.sqltext.compile(dialect=dialect, compile_kwargs=_AS_DDL)),
            )
            for part in table.constraints
            if isinstance(part, CheckConstraint)
        ],
    )


def _unique_columns(part: UniqueConstraint | Index) -> list[str | None]:
    if isinstance(part, UniqueConstraint):
        return list(part.columns.keys())
    return [one.name if isinstance(one, Column) else None for one in part.expressions]


def _limit(options: Mapping[str, Any]) -> str:
    """Say which rows or values a uniqueness is about, where it is not all rows' values."""
    some = " among some rows" if options.get("where") is not None else ""
    return some + (", NULL counting as a value" if options.get("nulls_not_distinct") else "")


def live_shapes(
    connection: Connection, tables: Mapping[Hashable, tuple[str | None, str]]
) -> dict[Hashable, Shape]:
    """Read the shapes that the database gives *tables*: schema, as the model has it, and name."""
    sqlite = connection.dialect.name == "sqlite"
    extras = _by_key(connection.execute(_SQLITE_EXTRAS if sqlite else _POSTGRESQL_EXTRAS))
    with warnings.catch_warnings():
        # A type or an index that SQLAlchemy cannot read is no model's: it shows as a difference.
        warnings.simplefilter("ignore", SAWarning)
        reflected = _Reflected(inspect(connection), tables.values())
    found = {
        key: replace(reflected.shape(place), extras=extras.get(key, ()))
        for key, place in tables.items()
    }
    return _with_sqlite_keys(connection, found) if sqlite else found


def _by_key(rows: Iterable[Any]) -> dict[Hashable, list[Any]]:
    """Group rows of two by the first."""
    found: dict[Hashable, list[Any]] = {}
    for key, what in rows:
        found.setdefault(key, []).append(what)
    return found


class _Reflected:
    """What SQLAlchemy's inspector says of many tables, asked once for each kind of thing."""

    def __init__(self, inspector: Inspector, places: Iterable[tuple[str | None, str]]) -> None:
        self._columns: dict[Any, Any] = {}
        self._keys: dict[Any, Any] = {}
        self._indexes: dict[Any, Any] = {}
        self._references: dict[Any, Any] = {}
        self._checks: dict[Any, Any] = {}
        for schema, names in _by_key(places).items():
            asked: Any = {"schema": schema, "filter_names": names, "kind": ObjectKind.ANY}
            self._columns |= inspector.get_multi_columns(**asked)
            self._keys |= inspector.get_multi_pk_constraint(**asked)
            self._indexes |= inspector.get_multi_indexes(**asked)
            self._references |= inspector.get_multi_foreign_keys(**asked)
            self._checks |= inspector.get_multi_check_constraints(**asked)

    def shape(self, place: tuple[str | None, str]) -> Shape:
        return Shape(
            columns=[
                (c["name"], c["type"], c["nullable"], "computed" in c) for c in self._columns[place]
            ],
            key=self._keys[place]["constrained_columns"],
            unique=[
                (index["column_names"], _limit(_without_engine(index.get("dialect_options", {}))))
                for index in self._indexes[place]
                if index["unique"]
            ],
            references=[
                (
                    key["constrained_columns"],
                    ".".join(filter(None, (key["referred_schema"], key["referred_table"]))),
                    key["referred_columns"],
                    key["options"].get("ondelete"),
                )
                for key in self._references[place]
            ],
            checks=[(check["name"], check["sqltext"]) for check in self._checks[place]],
        )


def _without_engine(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name.partition("_")[2]: value for name, value in options.items()}


def _with_sqlite_keys(
    connection: Connection, shapes: Mapping[Hashable, Shape]
) -> dict[Hashable, Shape]:
    """Take uniqueness and foreign keys from SQLite itself: SQLAlchemy parses them from DDL."""
    unique: dict[Hashable, list[Any]] = {}
    references: dict[Hashable, list[Any]] = {}
    for index, rows in groupby(connection.execute(_SQLITE_UNIQUE), key=lambda row: row[:3]):
        limit = _limit({"where": index[2] or None})
        unique.setdefault(index[0], []).append(([row[3] for row in rows], limit))
    for key, rows in groupby(connection.execute(_SQLITE_REFERENCES), key=lambda row: row[:4]):
        pairs = [row[4:] for row in rows]
        # Without columns, the reference is to the other table's primary key.
        target = shapes.get(fold(key[2], connection.dialect))
        named = [to for _from, to in pairs if to is not None] or (target.key if target else [])
        entry = ([from_ for from_, _to in pairs], key[2], named, key[3])
        references.setdefault(key[0], []).append(entry)
    return {
        key: replace(shape, unique=unique.get(key, ()), references=references.get(key, ()))
        for key, shape in shapes.items()
    }
