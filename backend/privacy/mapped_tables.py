"""One table of the data map: what it declares, and how it leads to a person."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

from sqlalchemy import Column, Table

from backend.privacy.declarations import (
    Identity,
    NotPersonal,
    Personal,
    TableRole,
    TableRule,
)

ANONYMIZED_AT: Final = "anonymized_at"
RESTRICTED_AT: Final = "restricted_at"


class DataMapError(Exception):
    """The declarations have a gap or contradict the schema; found at import, never later."""


@dataclass(frozen=True, eq=False)
class MappedTable:
    """One table with its declarations; *parent* is one hop nearer to the person, by *link*."""

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
    def keys(self) -> tuple[Column[Any], ...]:
        """The primary-key columns."""
        return tuple(self.table.primary_key.columns)

    @cached_property
    def key(self) -> Column[Any]:
        """The primary-key column of a table that has a single one."""
        (column,) = self.keys
        return column

    @cached_property
    def personal_columns(self) -> dict[str, Personal]:
        return {name: c for name, c in self.columns.items() if isinstance(c, Personal)}

    @cached_property
    def third_party_columns(self) -> frozenset[str]:
        """The columns that speak of the person whom the row names, not of its owner."""
        return frozenset(name for name, c in self.personal_columns.items() if c.third_party)

    @cached_property
    def identities(self) -> dict[Identity, Column[Any]]:
        """The columns by which the person is found whom a row names."""
        return {
            rule.identity: self.table.c[name]
            for name, rule in self.personal_columns.items()
            if rule.identity is not None
        }

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


@dataclass(frozen=True, slots=True)
class Link:
    """One way from a table towards the person: *column* holds what *target* holds there."""

    column: Column[Any]
    target: MappedTable
    target_column: Column[Any]
