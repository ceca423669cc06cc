"""
The walk: which rows speak of a person, table by table, as predicates.

A row is *owned* when its links lead to the person, by paths of any depth and through circles;
it *mentions* the person when its identity columns name them, on somebody else's row; a *shared*
row is one that owned rows refer to. Every predicate is one set-based condition, whatever the
number of rows.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from types import MappingProxyType
from typing import Any, Final

from sqlalchemy import (
    BinaryExpression,
    BindParameter,
    Column,
    ColumnElement,
    CreateTableAs,
    Select,
    String,
    Text,
    and_,
    bindparam,
    cast,
    event,
    false,
    func,
    insert,
    literal,
    not_,
    or_,
    select,
    text,
    tuple_,
    union_all,
)
from sqlalchemy.orm import Session
from sqlalchemy.sql import operators

from backend.privacy.data_map import DataMap
from backend.privacy.declarations import Identity, TableRole
from backend.privacy.mapped_tables import Link, MappedTable

Terms = Collection[str] | Select[Any] | BindParameter[Any]

# Parameters must not be named as columns are.
KEY_PARAM: Final = "walk_key"
_KEYS_PARAM: Final = "walk_keys"
_TABLES: Final = "walk_tables"


@dataclass(frozen=True, slots=True)
class Shape:
    """
    Whether a person has a row of their own, and by what others' rows may name them.

    Attributes:
        many: They are several; what names them is read from their rows.
    """

    has_row: bool
    identities: tuple[Identity, ...]
    many: bool = False


@dataclass(frozen=True, slots=True)
class Subjects:
    """
    The people of an act.

    Attributes:
        rows: Predicate over the subject table; `None` for somebody who has no row there.
        terms: What the identity columns hold where they name these people.
        params: Values of the parameters in *rows* and *terms*.
        shape: What *rows* and *terms* are made from, where they are the same for every person of
            that shape: statements over them are then built once.
    """

    rows: ColumnElement[bool] | None
    terms: Mapping[Identity, Terms] = field(default_factory=dict)
    params: Mapping[str, Any] = field(default_factory=dict, repr=False)
    shape: Shape | None = None

    @classmethod
    def one(
        cls, data_map: DataMap, key: object | None, terms: Mapping[Identity, Collection[str]]
    ) -> "Subjects":
        """
        One person.

        Args:
            key: Of their row; `None` for somebody who has none.
            terms: What identity columns hold where they name this person, under every key.
        """
        shape = Shape(key is not None, tuple(sorted(terms)))
        params: dict[str, Any] = {_term_param(each): list(terms[each]) for each in terms}
        if key is not None:
            params[KEY_PARAM] = key
        return replace(of_shape(data_map, shape), params=params)

    @classmethod
    def many(cls, data_map: DataMap, keys: Collection[object]) -> "Subjects":
        """Several people, by the keys of their rows; statements over them are built once."""
        shape = Shape(has_row=True, identities=(), many=True)
        return replace(of_shape(data_map, shape), params={_KEYS_PARAM: list(keys)})

    @classmethod
    def where(cls, data_map: DataMap, rows: ColumnElement[bool]) -> "Subjects":
        """All people of the subject table whom *rows* selects, and how their rows name them."""
        terms = {
            identity: select(column).where(rows, column.is_not(None))
            for identity, column in data_map.subject.identities.items()
        }
        return cls(rows, terms)


def _term_param(identity: Identity) -> str:
    return f"walk_{identity}"


@lru_cache(maxsize=64)
def of_shape(data_map: DataMap, shape: Shape) -> Subjects:
    """Return anybody of *shape*, for statements that are built once; without `params`."""
    key = data_map.subject.key
    if shape.many:
        several = key.in_(bindparam(_KEYS_PARAM, expanding=True, type_=key.type))
        return replace(Subjects.where(data_map, several), shape=shape)
    rows = key == bindparam(KEY_PARAM, type_=key.type) if shape.has_row else None
    terms: dict[Identity, Terms] = {
        each: bindparam(_term_param(each), expanding=True, type_=String())
        for each in shape.identities
    }
    return Subjects(rows, terms, shape=shape)


def owned(
    data_map: DataMap, mapped: MappedTable, subjects: ColumnElement[bool] | None
) -> tuple[ColumnElement[bool], ...]:
    """
    Return the predicates for the rows of *mapped* that belong to *subjects*, one for each way.

    They never overlap. One condition with OR would make PostgreSQL read the whole table.
    """
    if subjects is None or mapped.rule.role not in (TableRole.SUBJECT, TableRole.OWNED):
        return ()
    if mapped is data_map.subject:
        return (subjects,)
    if data_map.circle(mapped):
        return (_owned_in_circle(data_map, mapped, subjects),)
    ways: list[ColumnElement[bool]] = []
    before: list[ColumnElement[bool]] = []
    for link in data_map.links(mapped):
        ways += [
            and_(*before, _leads_to(link, above))
            for above in owned(data_map, link.target, subjects)
        ]
        before.append(link.column.is_(None))
    return tuple(ways)


def _leads_to(link: Link, above: ColumnElement[bool]) -> ColumnElement[bool]:
    """Return the predicate for rows whose *link* leads to a row that *above* selects."""
    if isinstance(above, BinaryExpression) and above.left is link.target_column:
        # What is asked of the key there may be asked of the link here.
        if above.operator is operators.eq:
            return link.column == above.right
        if above.operator is operators.in_op and isinstance(above.right, BindParameter):
            return link.column.in_(above.right)
    return link.column.in_(select(link.target_column).where(above))


def rows_of(
    data_map: DataMap, mapped: MappedTable, subjects: ColumnElement[bool]
) -> ColumnElement[bool]:
    """Return one predicate for the rows of *mapped* that belong to *subjects*; never NULL."""
    return func.coalesce(or_(false(), *owned(data_map, mapped, subjects)), false())


def mentioned(
    data_map: DataMap, mapped: MappedTable, subjects: Subjects
) -> ColumnElement[bool] | None:
    """Return the predicate for rows that name *subjects* and are not theirs; `None` if none can."""
    named = names(mapped, subjects)
    if mapped is data_map.subject or named is None:
        return None
    if subjects.rows is None or mapped.rule.role is TableRole.SHARED:
        return named
    return and_(named, not_(rows_of(data_map, mapped, subjects.rows)))


def names(mapped: MappedTable, subjects: Subjects) -> ColumnElement[bool] | None:
    """
    Return the predicate for rows whose identity columns name *subjects*.

    A telephone may be a family's: it names somebody only where the row has no e-mail address.
    """
    identities = mapped.identities
    found = [
        column.in_(terms) if identity is Identity.EMAIL or Identity.EMAIL not in identities
        else and_(column.in_(terms), identities[Identity.EMAIL].is_(None))
        for identity, column in identities.items()
        if (terms := subjects.terms.get(identity)) is not None
        and (not isinstance(terms, Collection) or terms)
    ]  # fmt: skip
    return or_(*found) if found else None


def reached(
    data_map: DataMap, mapped: MappedTable, subjects: ColumnElement[bool] | None
) -> ColumnElement[bool] | None:
    """Return the predicate for rows of the shared table *mapped* that *subjects*' rows refer to."""
    found = []
    for other, column in data_map.references_to(mapped):
        (key,) = column.foreign_keys
        if other.rule.role is TableRole.SHARED:
            above = reached(data_map, other, subjects)
            ways = [] if above is None else [above]
        else:
            ways = list(owned(data_map, other, subjects))
        found += [key.column.in_(select(column).where(way, column.is_not(None))) for way in ways]
    return or_(*found) if found else None


def frozen(
    session: Session,
    mapped: MappedTable,
    rows: ColumnElement[bool],
    params: Mapping[str, Any] = MappingProxyType({}),
) -> ColumnElement[bool]:
    """
    Return a predicate for the rows that *rows* selects now, whatever becomes of their links.

    Their keys are kept in a temporary table of the connection.
    """
    if _TABLES not in session.info:
        event.listen(session, "before_commit", _forget)
    names_ = session.info.setdefault(_TABLES, [])
    place = "temp" if session.get_bind().dialect.name == "sqlite" else "pg_temp"
    name = f"holdfast_walk_{len(names_) + 1}"
    names_.append(f"{place}.{name}")
    session.execute(text(f"DROP TABLE IF EXISTS {place}.{name}"))
    # Made empty and filled afterwards: a definition takes no parameters.
    made = CreateTableAs(select(*mapped.keys).where(false()), name, temporary=True)
    session.execute(made)
    columns = list(made.table.c)
    session.execute(
        insert(made.table).from_select(columns, select(*mapped.keys).where(rows)), params
    )
    if len(mapped.keys) == 1:
        return mapped.key.in_(select(*columns))
    return tuple_(*mapped.keys).in_(select(*columns))


def _forget(session: Session) -> None:
    """Drop what `frozen` kept: a connection goes back to its pool with its temporary tables."""
    if not session.in_nested_transaction():
        for name in session.info[_TABLES]:
            session.execute(text(f"DROP TABLE IF EXISTS {name}"))
        session.info[_TABLES].clear()


def _owned_in_circle(
    data_map: DataMap, mapped: MappedTable, subjects: ColumnElement[bool]
) -> ColumnElement[bool]:
    """Follow links round a circle to its end, in one recursive query."""
    circle = data_map.circle(mapped)
    members = {name: data_map[name] for name in sorted(circle)}
    # A table that leads to itself keeps its own type, and with it its index.
    plain = len(members) == 1

    def spelled(column: Column[Any]) -> ColumnElement[Any]:
        return column if plain else cast(column, Text)

    starts, edges = [], []
    for name, member in members.items():
        before: list[ColumnElement[bool]] = []
        for link in data_map.links(member):
            if link.target.name in circle:
                edges.append(
                    select(
                        literal(name).label("child"),
                        spelled(member.key).label("row"),
                        literal(link.target.name).label("parent"),
                        spelled(link.column).label("ref"),
                    ).where(*before, link.column.is_not(None))
                )
            else:
                for above in owned(data_map, link.target, subjects):
                    up = link.column.in_(select(link.target_column).where(above))
                    starts.append(
                        select(literal(name).label("member"), spelled(member.key).label("row"))
                        .where(*before, up)
                    )  # fmt: skip
            before.append(link.column.is_(None))
    edge = union_all(*edges).subquery() if len(edges) > 1 else edges[0].subquery()
    start = starts[0]
    if len(starts) > 1:
        # A recursive query may be one UNION only.
        each = union_all(*starts).subquery()
        start = select(each.c.member, each.c.row)
    found = start.cte(recursive=True)
    found = found.union(
        select(edge.c.child, edge.c.row).join(
            found, and_(edge.c.parent == found.c.member, edge.c.ref == found.c.row)
        )
    )
    return spelled(mapped.key).in_(select(found.c.row).where(found.c.member == mapped.name))
