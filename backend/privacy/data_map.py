"""
The data map: whose every column is, why it is held, for how long, what erasure does to it.

Columns and tables declare themselves where they are defined (`personal`, `not_personal`,
`subject_table`, `owned_table`, `control_table`, all for SQLAlchemy's `info`); `DataMap.of` reads
the declarations of a whole `MetaData` and refuses one with a gap. Everything else that Holdfast
does with personal data is derived from the result.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import Any, Final

from sqlalchemy import (
    Column,
    Date,
    DateTime,
    Index,
    MetaData,
    PrimaryKeyConstraint,
    String,
    Table,
    UniqueConstraint,
    Uuid,
)
from sqlalchemy.types import TypeDecorator

_KEY: Final = "privacy"
ANONYMIZED_AT: Final = "anonymized_at"
RESTRICTED_AT: Final = "restricted_at"
# 128 bits as hexadecimal digits.
RANDOM_ID_CHARS: Final = 32


class DataMapError(Exception):
    """The declarations have a gap or contradict the schema; found at import, never later."""


class OnErase(StrEnum):
    """What anonymising does to a personal column."""

    NULL = "null"
    MONTH = "month"  # A date is coarsened to the first of its month.
    RANDOM = "random"  # UNIQUE NOT NULL forces a value: a new random one, derived from nothing.
    CONSTANT = "constant"
    KEEP = "keep"  # Says nothing of anybody once the row's identifiers are gone.


@dataclass(frozen=True, slots=True)
class Personal:
    """
    A column that says something of a person.

    *category* is in Fides' vocabulary (fideslang data categories). *exported* is false for what
    an access request must not hand out: hashes and search terms. *statutory* columns stay while
    a law keeps their row.
    """

    category: str
    on_erase: OnErase
    exported: bool
    statutory: bool
    constant: Any


@dataclass(frozen=True, slots=True)
class NotPersonal:
    """A column that says nothing of a person, and why."""

    reason: str


class TableRole(StrEnum):
    SUBJECT = "subject"
    OWNED = "owned"
    CONTROL = "control"


@dataclass(frozen=True, slots=True)
class Retention:
    """
    The clock of a table: rows of *data_type* are counted from the column *anchor*.

    *only* restricts it to rows in which the named columns have the named values.
    """

    data_type: str
    anchor: str
    only: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class TableRule:
    """What a table declares of itself; see `subject_table`, `owned_table`, `control_table`."""

    role: TableRole
    purpose: str
    basis: str = ""
    source: str = ""
    owned_by: str | None = None
    retention: Retention | None = None
    statute: str | None = None
    always_delete: bool = False
    carried_over: bool = False


def personal(
    category: str,
    on_erase: OnErase = OnErase.NULL,
    *,
    exported: bool = True,
    statutory: bool = False,
    constant: Any = None,
) -> dict[str, Any]:
    """Declare a personal column; see `Personal`."""
    return {_KEY: Personal(category, on_erase, exported, statutory, constant)}


def not_personal(reason: str) -> dict[str, Any]:
    """Declare a column that says nothing of a person, and why."""
    return {_KEY: NotPersonal(reason)}


def subject_table(*, purpose: str, basis: str, source: str, retention: Retention) -> dict[str, Any]:
    """Declare the table whose rows are the people."""
    return {_KEY: TableRule(TableRole.SUBJECT, purpose, basis, source, retention=retention)}


def owned_table(
    *,
    by: str,
    purpose: str,
    basis: str,
    source: str,
    retention: Retention | None = None,
    statute: str | None = None,
    always_delete: bool = False,
    carried_over: bool = False,
) -> dict[str, Any]:
    """
    Declare a table whose rows belong to one person.

    Args:
        by: The foreign-key column that leads to the person, at once or through its parent.
        retention: The table's own clock; without one its rows follow their parent's.
        statute: The ground on which a law keeps these rows after an erasure, until retention
            ends. A child of such a table is kept with its parent.
        always_delete: Nothing of a row is worth keeping without the person, so anonymising
            deletes it.
        carried_over: Rows outlive a restore: the live ones replace the backup's.
    """
    return {
        _KEY: TableRule(
            TableRole.OWNED,
            purpose,
            basis,
            source,
            by,
            retention,
            statute,
            always_delete,
            carried_over,
        )
    }


def control_table(purpose: str, *, carried_over: bool = True) -> dict[str, Any]:
    """Declare a table of the service's own records, which no person owns."""
    return {_KEY: TableRule(TableRole.CONTROL, purpose, carried_over=carried_over)}


@dataclass(frozen=True)
class MappedTable:
    """One table with its declarations; *parent* is one hop nearer to the person."""

    table: Table
    rule: TableRule
    columns: Mapping[str, Personal | NotPersonal]
    link: Column[Any] | None = None
    parent: "MappedTable | None" = None

    @property
    def name(self) -> str:
        # A plain str: SQLAlchemy's own kind of name is no key for JSON.
        return str(self.table.name)

    @cached_property
    def key(self) -> Column[Any]:
        """The single primary-key column."""
        (column,) = self.table.primary_key.columns
        return column

    @cached_property
    def personal_columns(self) -> dict[str, Personal]:
        return {name: c for name, c in self.columns.items() if isinstance(c, Personal)}

    @cached_property
    def exported_columns(self) -> tuple[Column[Any], ...]:
        """All columns of a row but hashes and search terms, in the model's order."""
        return tuple(
            self.table.c[name]
            for name, rule in self.columns.items()
            if isinstance(rule, NotPersonal) or rule.exported
        )

    @property
    def clock(self) -> "MappedTable | None":
        """The table whose retention period these rows follow: itself or an ancestor."""
        if self.rule.retention is not None or self.parent is None:
            return self if self.rule.retention is not None else None
        return None if self.parent.rule.role is TableRole.SUBJECT else self.parent.clock

    @property
    def statute(self) -> str | None:
        """The ground on which a law keeps these rows: their own or an ancestor's."""
        if self.rule.statute is not None or self.parent is None:
            return self.rule.statute
        return self.parent.statute


class DataMap:
    """
    All tables of one database, each with its declarations.

    `tables` are parents first; iterate `children_first` to take rows apart without breaking a
    foreign key.
    """

    def __init__(self, tables: tuple[MappedTable, ...]) -> None:
        self.tables = tables
        self._by_name = {mapped.name: mapped for mapped in tables}
        (self.subject,) = (t for t in tables if t.rule.role is TableRole.SUBJECT)

    @classmethod
    def of(cls, metadata: MetaData) -> "DataMap":
        """
        Read the declarations of *metadata*.

        Raises:
            DataMapError: A table or column is not declared, or a rule breaks a constraint.
        """
        mapped: dict[str, MappedTable] = {}
        for table in metadata.sorted_tables:
            rule = table.info.get(_KEY)
            if not isinstance(rule, TableRule):
                raise DataMapError(f"table {table.name} is not declared in the data map")
            columns = {column.name: _declared(column) for column in table.columns}
            if rule.owned_by is None:
                mapped[table.name] = MappedTable(table, rule, columns)
                continue
            link = table.c.get(rule.owned_by)
            parents = [] if link is None else [key.column.table.name for key in link.foreign_keys]
            if len(parents) != 1:
                raise DataMapError(f"table {table.name}: {rule.owned_by} leads to no one table")
            mapped[table.name] = MappedTable(table, rule, columns, link, mapped[parents[0]])
        for one in mapped.values():
            _check(one)
        return cls(tuple(mapped.values()))

    def __getitem__(self, name: str) -> MappedTable:
        return self._by_name[name]

    @cached_property
    def of_people(self) -> tuple[MappedTable, ...]:
        """The tables that hold people's rows, the people's own first."""
        return tuple(t for t in self.tables if t.rule.role is not TableRole.CONTROL)

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


def _check(mapped: MappedTable) -> None:
    """Refuse a table whose rules its columns cannot follow."""
    rule, columns = mapped.rule, mapped.table.c
    if rule.retention is not None and rule.retention.anchor not in columns:
        raise DataMapError(f"table {mapped.name} has no column {rule.retention.anchor}")
    if rule.statute is not None and mapped.clock is None:
        raise DataMapError(f"table {mapped.name}: a law keeps it, and no period says how long")
    stays = rule.role is not TableRole.CONTROL and not rule.always_delete
    if stays and ANONYMIZED_AT not in columns:
        raise DataMapError(f"table {mapped.name} has no column {ANONYMIZED_AT} to mark its rows")


def _declared(column: Column[Any]) -> Personal | NotPersonal:
    rule = column.info.get(_KEY)
    where = f"{column.table.name}.{column.name}"
    if isinstance(rule, NotPersonal):
        return rule
    if not isinstance(rule, Personal):
        raise DataMapError(f"column {where} is declared neither personal nor not personal")
    if rule.on_erase is OnErase.NULL and not column.nullable:
        raise DataMapError(f"{where} is NOT NULL and cannot be erased to NULL")
    if rule.on_erase is OnErase.CONSTANT and (_is_unique(column) or rule.constant is None):
        raise DataMapError(f"{where} cannot be erased to one constant")
    kind = column.type.impl if isinstance(column.type, TypeDecorator) else column.type
    if rule.on_erase is OnErase.MONTH and not isinstance(kind, Date | DateTime):
        raise DataMapError(f"{where} is no date and cannot be coarsened to a month")
    if rule.on_erase is OnErase.RANDOM and not _holds_random_id(kind):
        raise DataMapError(f"{where} cannot hold a random id")
    return rule


def _is_unique(column: Column[Any]) -> bool:
    sets = [
        part.columns
        for part in (*column.table.constraints, *column.table.indexes)
        if isinstance(part, PrimaryKeyConstraint | UniqueConstraint)
        or (isinstance(part, Index) and part.unique)
    ]
    return bool(column.unique) or any(list(columns) == [column] for columns in sets)


def _holds_random_id(kind: object) -> bool:
    if isinstance(kind, String):
        return (kind.length or RANDOM_ID_CHARS) >= RANDOM_ID_CHARS
    return isinstance(kind, Uuid)
