"""What declarations must keep to: a rule that the schema cannot follow is refused at import."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import (
    Column,
    Date,
    DateTime,
    Enum,
    PrimaryKeyConstraint,
    String,
    UniqueConstraint,
    Uuid,
)
from sqlalchemy.types import TypeDecorator

from backend.privacy.declarations import KEY, NotPersonal, OnErase, Personal, TableRole
from backend.privacy.mapped_tables import ANONYMIZED_AT, DataMapError, MappedTable

if TYPE_CHECKING:
    from backend.privacy.data_map import DataMap

# 128 bits as hexadecimal digits.
RANDOM_ID_CHARS: Final = 32


def declared(column: Column[Any]) -> Personal | NotPersonal:
    """
    Return what *column* says of itself.

    Raises:
        DataMapError: Nothing, or what its type or constraints do not allow.
    """
    rule = column.info.get(KEY)
    where = f"{column.table.name}.{column.name}"
    if isinstance(rule, NotPersonal):
        return rule
    if not isinstance(rule, Personal):
        raise DataMapError(f"column {where} is declared neither personal nor not personal")
    kind = _kind(column)
    match rule.on_erase:
        case OnErase.NULL if not column.nullable:
            raise DataMapError(f"{where} is NOT NULL and cannot be erased to NULL")
        case OnErase.CONSTANT if not _takes(column, kind, rule.constant):
            raise DataMapError(f"{where} cannot be erased to its constant")
        case OnErase.MONTH if not isinstance(kind, Date | DateTime):
            raise DataMapError(f"{where} is no date and cannot be coarsened to a month")
        case OnErase.RANDOM if isinstance(kind, Enum) or not _holds_random_id(kind):
            raise DataMapError(f"{where} cannot hold a random id")
    return rule


def check(mapped: MappedTable, data_map: "DataMap") -> None:
    """
    Refuse a table whose rules its columns, or those of other tables, cannot follow.

    Raises:
        DataMapError: Names the table and what is wrong.
    """
    rule, columns = mapped.rule, mapped.table.c
    if rule.retention is not None and rule.retention.anchor not in columns:
        raise DataMapError(f"table {mapped.name} has no column {rule.retention.anchor}")
    if rule.statute is not None and mapped.clock is None:
        raise DataMapError(f"table {mapped.name}: a law keeps it, and no period says how long")
    if rule.role in (TableRole.REFERENCE, TableRole.CONTROL):
        _check_nobodys(mapped, data_map)
        return
    if not mapped.keys:
        raise DataMapError(f"table {mapped.name} has no primary key to tell its rows apart")
    stays = rule.role is not TableRole.SHARED and not rule.always_delete
    if stays and ANONYMIZED_AT not in columns:
        raise DataMapError(f"table {mapped.name} has no column {ANONYMIZED_AT} to mark its rows")
    _check_third_parties(mapped)
    _check_links(mapped, data_map)
    _check_references(mapped, data_map)
    for together in _unique_sets(mapped):
        _check_unique(mapped, together)


def _check_nobodys(mapped: MappedTable, data_map: "DataMap") -> None:
    if mapped.personal_columns:
        raise DataMapError(f"table {mapped.name} belongs to nobody and has personal columns")
    for other in data_map.of_people:
        for column in mapped.table.columns:
            if any(key.column.table is other.table for key in column.foreign_keys):
                raise DataMapError(f"{mapped.name}.{column.name} is nobody's and refers to people")


def _check_third_parties(mapped: MappedTable) -> None:
    """Refuse columns about a person who could not be found, and the other way round."""
    if mapped.rule.role is TableRole.SUBJECT:
        if mapped.third_party_columns:
            raise DataMapError(f"table {mapped.name} is about its own people only")
        return
    if mapped.third_party_columns and not mapped.identities:
        raise DataMapError(f"table {mapped.name} does not say by what a third party is found")
    for column in mapped.identities.values():
        where, told = f"{mapped.name}.{column.name}", mapped.personal_columns[column.name]
        if not told.third_party:
            raise DataMapError(f"{where} finds nobody but the row's owner")
        if told.on_erase is OnErase.KEEP or told.statutory:
            raise DataMapError(f"{where} would still name whoever is erased")


def _check_links(mapped: MappedTable, data_map: "DataMap") -> None:
    circle = data_map.circle(mapped)
    for link in data_map.links(mapped):
        if link.target.rule.role not in (TableRole.SUBJECT, TableRole.OWNED):
            raise DataMapError(f"table {mapped.name}: {link.column.name} leads to nobody")
        told = mapped.columns[link.column.name]
        leaves = isinstance(told, Personal) and told.on_erase is OnErase.NULL and not told.statutory
        where = f"{mapped.name}.{link.column.name}"
        if len(mapped.rule.owned_by) > 1 and not leaves and not _is_deleted(mapped):
            raise DataMapError(f"{where} would stay, and with it the row be whosever it leads to")
        if mapped.statute is not None and link.target.statute is None and not leaves:
            raise DataMapError(f"{where} would keep what a law does not, or take away what it does")
        if circle and link.target.name in circle and link.target.keys != (link.target_column,):
            raise DataMapError(
                f"table {mapped.name}: in a circle, {link.column.name} must lead to a single "
                "primary key"
            )
    if circle and len(mapped.keys) != 1:
        raise DataMapError(f"table {mapped.name} is in a circle and has no single primary key")


def _is_deleted(mapped: MappedTable) -> bool:
    return mapped.rule.always_delete and mapped.statute is None


def _check_references(mapped: MappedTable, data_map: "DataMap") -> None:
    """Refuse references to people's rows that could neither be cut nor go with their row."""
    for other, column in data_map.references_to(mapped):
        where, rule = f"{other.name}.{column.name}", other.columns[column.name]
        keys = [key.constraint for key in column.foreign_keys]
        if len(keys) != 1 or keys[0] is None or len(keys[0].columns) != 1:
            raise DataMapError(f"{where} is part of a reference by several columns, or of several")
        if mapped.rule.role is TableRole.SHARED and _leads_back(mapped, other, data_map):
            raise DataMapError(f"{where} makes a circle of shared rows, which would never go")
        if mapped.rule.role is TableRole.SHARED:
            if [key.column for key in column.foreign_keys] != list(mapped.keys):
                raise DataMapError(f"{where} must refer to the single primary key of shared rows")
            if not (isinstance(rule, Personal) and rule.on_erase is OnErase.NULL):
                raise DataMapError(f"{where} refers to shared rows and must be erased to NULL")
        elif not column.nullable and other.rule.owned_by[:1] != (column.name,):
            raise DataMapError(f"{where} is NOT NULL and would keep rows of {mapped.name}")
        for key in column.foreign_keys:
            target = mapped.columns[key.column.name]
            if isinstance(target, Personal) and target.on_erase is not OnErase.KEEP:
                _check_personal_target(mapped, where, f"{mapped.name}.{key.column.name}")


def _leads_back(mapped: MappedTable, other: MappedTable, data_map: "DataMap") -> bool:
    """Say whether shared rows of *mapped* lead to *other* by references between shared rows."""
    seen: set[str] = set()
    ahead = [other]
    while ahead:
        if (here := ahead.pop()).name not in seen:
            seen.add(here.name)
            ahead += [
                one for one, _ in data_map.references_to(here) if one.rule.role is TableRole.SHARED
            ]
    return other.rule.role is TableRole.SHARED and mapped.name in seen


def _check_personal_target(mapped: MappedTable, where: str, target: str) -> None:
    # Rows that are always deleted are never changed, so nothing that refers to them breaks.
    if not mapped.rule.always_delete and mapped.rule.role is not TableRole.SHARED:
        raise DataMapError(f"{where} refers to {target}, which erasure changes")


def _check_unique(mapped: MappedTable, together: tuple[Column[Any], ...]) -> None:
    """Refuse rules that would give two anonymous rows the same unique values."""
    rules = [mapped.columns[column.name] for column in together]
    changed = [
        rule.on_erase
        for rule in rules
        if isinstance(rule, Personal) and rule.on_erase is not OnErase.KEEP
    ]
    # NULL differs from NULL, and random from everything; what is not changed is unique already.
    if changed and not {OnErase.NULL, OnErase.RANDOM} & set(changed):
        names = ", ".join(f"{mapped.name}.{column.name}" for column in together)
        raise DataMapError(f"{names} must be unique and could not be once it is erased")


def _unique_sets(mapped: MappedTable) -> Iterator[tuple[Column[Any], ...]]:
    for part in mapped.table.constraints:
        if isinstance(part, PrimaryKeyConstraint | UniqueConstraint):
            yield tuple(part.columns)
    yield from (tuple(index.columns) for index in mapped.table.indexes if index.unique)
    yield from ((column,) for column in mapped.table.columns if column.unique)


def _kind(column: Column[Any]) -> object:
    return column.type.impl if isinstance(column.type, TypeDecorator) else column.type


def _takes(column: Column[Any], kind: object, constant: Any) -> bool:
    """Say whether every row of *column* may hold *constant*, as far as its type tells."""
    if not isinstance(constant, column.type.python_type):
        return False
    if isinstance(kind, Enum):
        return constant in (kind.enum_class or kind.enums)
    return not isinstance(kind, String) or kind.length is None or len(constant) <= kind.length


def _holds_random_id(kind: object) -> bool:
    if isinstance(kind, String):
        return (kind.length or RANDOM_ID_CHARS) >= RANDOM_ID_CHARS
    return isinstance(kind, Uuid)
