"""
The data map: whose every column is, why it is held, for how long, what erasure does to it.

Columns and tables declare themselves where they are defined (`backend.privacy.declarations`);
`DataMap.of` reads the declarations of a whole `MetaData` and refuses one with a gap. Everything
else that Holdfast does with personal data is derived from the result.
"""

from collections import Counter
from collections.abc import Iterator
from functools import cached_property
from typing import Any, Final

from sqlalchemy import Column, ForeignKeyConstraint, MetaData, Table
from sqlalchemy.schema import sort_tables_and_constraints

from backend.privacy.declarations import KEY, TableRole, TableRule
from backend.privacy.map_rules import check, declared
from backend.privacy.mapped_tables import DataMapError, Link, MappedTable

_OF_PEOPLE: Final = (TableRole.SUBJECT, TableRole.OWNED, TableRole.SHARED)


class DataMap:
    """
    All tables of one database, each with its declarations.

    `tables` are parents first; iterate `children_first` to take rows apart without breaking a
    foreign key.
    """

    def __init__(self, tables: tuple[MappedTable, ...]) -> None:
        self.tables = tables
        self._by_name = {mapped.name: mapped for mapped in tables}
        of_subjects = [t for t in tables if t.rule.role is TableRole.SUBJECT]
        if len(of_subjects) != 1:
            names = ", ".join(t.name for t in of_subjects) or "none"
            raise DataMapError(f"one table's rows are the people, and here it is: {names}")
        (self.subject,) = of_subjects
        kinds = Counter(t.rule.retention.data_type for t in tables if t.rule.retention)
        if twice := [kind for kind, count in kinds.items() if count > 1]:
            raise DataMapError(f"one table has a data type, and several have: {', '.join(twice)}")

    @classmethod
    def of(cls, metadata: MetaData) -> "DataMap":
        """
        Read the declarations of *metadata*.

        Raises:
            DataMapError: A table or column is not declared, or a rule breaks a constraint.
        """
        mapped: dict[str, MappedTable] = {}

        def read(table: Table, below: tuple[str, ...] = ()) -> MappedTable:
            if table.name in mapped:
                return mapped[table.name]
            if table.name in below:
                raise DataMapError(f"table {table.name} leads to the person in a circle only")
            rule = table.info.get(KEY)
            if not isinstance(rule, TableRule):
                raise DataMapError(f"table {table.name} is not declared in the data map")
            link = parent = None
            if rule.owned_by:
                link, target = _link(table, rule.owned_by[0])
                parent = read(target.table, (*below, table.name))
            columns = {str(column.name): declared(column) for column in table.columns}
            mapped[table.name] = MappedTable(table, rule, columns, link, parent)
            return mapped[table.name]

        data_map = cls(tuple(read(table) for table in _parents_first(metadata)))
        for one in data_map.tables:
            check(one, data_map)
        return data_map

    def __getitem__(self, name: str) -> MappedTable:
        return self._by_name[name]

    @cached_property
    def of_people(self) -> tuple[MappedTable, ...]:
        """The tables that hold people's data, parents first."""
        return tuple(t for t in self.tables if t.rule.role in _OF_PEOPLE)

    @property
    def children_first(self) -> Iterator[MappedTable]:
        return reversed(self.of_people)

    @cached_property
    def by_data_type(self) -> dict[str, MappedTable]:
        """The tables with a clock of their own, by the data type of their policy."""
        return {t.rule.retention.data_type: t for t in self.of_people if t.rule.retention}

    @cached_property
    def carried_over(self) -> tuple[MappedTable, ...]:
        """The tables whose live rows outlive a restore."""
        return tuple(t for t in self.tables if t.rule.carried_over)

    def references_to(self, target: MappedTable) -> Iterator[tuple[MappedTable, Column[Any]]]:
        """Yield every foreign-key column of people's tables that points to *target*."""
        for mapped in self.of_people:
            for column in mapped.table.columns:
                if any(key.column.table is target.table for key in column.foreign_keys):
                    yield mapped, column

    def links(self, mapped: MappedTable) -> tuple[Link, ...]:
        """The ways from *mapped* towards the person; the first that is not NULL decides."""
        found = (_link(mapped.table, name) for name in mapped.rule.owned_by)
        return tuple(
            Link(column, self._by_name[str(target.table.name)], target) for column, target in found
        )

    def circle(self, mapped: MappedTable) -> frozenset[str]:
        """The tables that lead to *mapped* and to which it leads; empty without a circle."""
        return self._circles[mapped.name]

    def leads_through_circle(self, mapped: MappedTable) -> bool:
        """Say whether *mapped* is in a circle or leads into one."""
        return any(self._circles[name] for name in (mapped.name, *self._beyond[mapped.name]))

    @cached_property
    def _beyond(self) -> dict[str, set[str]]:
        beyond = {one.name: {link.target.name for link in self.links(one)} for one in self.tables}
        for _ in self.tables:
            for name, reached in beyond.items():
                beyond[name] = reached.union(*(beyond[other] for other in reached))
        return beyond

    @cached_property
    def _circles(self) -> dict[str, frozenset[str]]:
        beyond = self._beyond
        return {
            name: frozenset(other for other in reached if name in beyond[other])
            if name in reached
            else frozenset()
            for name, reached in beyond.items()
        }


def _link(table: Table, name: str) -> tuple[Column[Any], Column[Any]]:
    column = table.c.get(name)
    targets = [] if column is None else [key.column for key in column.foreign_keys]
    if column is None or len(targets) != 1:
        raise DataMapError(f"table {table.name}: {name} leads to no one table")
    return column, targets[0]


def _parents_first(metadata: MetaData) -> list[Table]:
    """
    Sort tables so that what a row needs or belongs to comes before it.

    Erasure takes rows apart the other way round: whose a row is must still show when its turn
    comes. In a circle, the first link of a table counts; other links that may be NULL give way.
    """
    owners = {
        table.name: {
            name: key.column.table.name
            for name in getattr(table.info.get(KEY), "owned_by", ())
            if name in table.c
            for key in table.c[name].foreign_keys
        }
        for table in metadata.tables.values()
    }

    def leads(start: str, end: str) -> bool:
        seen: set[str] = set()
        ahead = [start]
        while ahead:
            if (here := ahead.pop()) not in seen:
                seen.add(here)
                ahead += owners[here].values()
        return end in seen

    def may_be_broken(key: ForeignKeyConstraint) -> bool | None:
        if not all(column.nullable for column in key.columns):
            return False
        to = owners[key.table.name]
        mine = {column.name for column in key.columns} & to.keys()
        in_circle = leads(key.referred_table.name, key.table.name)
        return False if mine & {*[*to][:1]} or (mine and not in_circle) else None

    # By name first: the order must not depend on the order of imports.
    tables = sorted(metadata.tables.values(), key=lambda table: table.name)
    ordered = sort_tables_and_constraints(tables, filter_fn=may_be_broken)  # type: ignore[no-untyped-call] # It has none.
    return [table for table, _keys in ordered if table is not None]
