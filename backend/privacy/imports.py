"""
Import: rows of an export of ours come back, to the person they were taken from and nobody else.

A row that is still there stays as it is; one whose number is taken by what is no longer this
person's is skipped and counted. Consents and holds are evidence and do not come back this way.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime
from enum import Enum
from typing import Any, Final
from uuid import UUID, uuid4

from sqlalchemy import BigInteger, Column, String, insert, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from backend.db_utils import is_storable
from backend.errors import ConflictError, RefusedError, SubjectErasedError
from backend.privacy.data_map import ANONYMIZED_AT, DataMap, MappedTable, TableRole
from backend.privacy.export import FORMAT_NAME, FORMAT_VERSION
from backend.privacy.sql import reserve_numbers

_UID: Final = "uid"


@dataclass(slots=True)
class Imported:
    """What became of the rows of one table."""

    restored: int = 0
    unchanged: int = 0
    skipped: int = 0


class ImportRefusedError(RefusedError):
    """The document is no whole export of this service."""

    code = "import_refused"


def import_rows(
    session: Session, data_map: DataMap, document: Mapping[str, Any], *, dry_run: bool = False
) -> tuple[int, dict[str, Imported]]:
    """
    Insert the rows of *document* that are missing; return the person's id and what was done.

    Args:
        dry_run: The caller rolls back; row numbers, which no rollback gives back, stay as they are.

    Raises:
        ImportRefusedError: Another format or version, unknown tables or columns, values of the
            wrong type, or rows that do not hang together.
        ConflictError: The id now belongs to somebody else, or a unique value is in use.
        SubjectErasedError: The person was made anonymous; their row cannot be filled again.
    """
    subject_id, tables = _read(document, data_map)
    known: dict[str, set[int]] = {}
    done = {mapped.name: Imported() for mapped in _importable(data_map)}
    try:
        with session.begin_nested():
            for mapped in _importable(data_map):
                found = [_decode_row(mapped, row) for row in tables.get(mapped.name, [])]
                if mapped is data_map.subject:
                    _import_subject(session, mapped, subject_id, found, done[mapped.name])
                    known[mapped.name] = {subject_id}
                else:
                    known[mapped.name] = _import_owned(
                        session, mapped, found, known, done[mapped.name]
                    )
                if done[mapped.name].restored and not dry_run:
                    reserve_numbers(session, mapped.key, 0)
    except IntegrityError:
        raise ConflictError("a value of the import breaks a rule of the database") from None
    return subject_id, done


def _importable(data_map: DataMap) -> Iterator[MappedTable]:
    return (mapped for mapped in data_map.of_people if not mapped.rule.carried_over)


def _read(
    document: Mapping[str, Any], data_map: DataMap
) -> tuple[int, dict[str, list[dict[str, Any]]]]:
    if (document.get("format"), document.get("version")) != (FORMAT_NAME, FORMAT_VERSION):
        raise ImportRefusedError(f"not a {FORMAT_NAME} of version {FORMAT_VERSION}")
    match document:
        case {"subject": {"user_id": int(subject_id)}, "data": dict(tables)}:
            pass
        case _:
            raise ImportRefusedError("the export lacks its subject or its data")
    if unknown := set(tables) - {mapped.name for mapped in data_map.of_people}:
        # Not by name: what was sent is not repeated.
        raise ImportRefusedError(f"{len(unknown)} of its tables are not known here")
    for rows in tables.values():
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise ImportRefusedError("a table of the export is no list of rows")
    return subject_id, tables


def _decode_row(mapped: MappedTable, row: Mapping[str, Any]) -> dict[str, Any]:
    columns = {column.name: column for column in mapped.exported_columns}
    if set(row) != set(columns):
        raise ImportRefusedError(f"a row of {mapped.name} has other columns than the table")
    return {name: _decode(columns[name], value) for name, value in row.items()}


def _decode(column: Column[Any], value: Any) -> Any:
    """Turn a JSON value into what *column* holds, strictly."""
    where = f"{column.table.name}.{column.name}"
    if value is None:
        if not column.nullable:
            raise ImportRefusedError(f"{where} must have a value")
        return None
    wanted = column.type.python_type
    try:
        if wanted in (UUID, date, datetime) or issubclass(wanted, Enum):
            return _from_text(wanted, value)
    except (ValueError, OverflowError):
        raise ImportRefusedError(f"{where} cannot be read") from None
    # `True` is an int to isinstance, and no number to us.
    if type(value) is not wanted:
        raise ImportRefusedError(f"{where} is of the wrong type")
    if not _fits(column, value):
        raise ImportRefusedError(f"{where} does not take this value")
    return value


def _from_text(wanted: type[Any], text: Any) -> Any:
    if not isinstance(text, str):
        raise ValueError("not text")  # noqa: TRY004 - caught with the parsers' own errors
    if wanted is datetime:
        moment = datetime.fromisoformat(text)
        if moment.tzinfo is None:
            raise ValueError("no zone")
        return moment.astimezone(UTC)
    return date.fromisoformat(text) if wanted is date else wanted(text)


def _fits(column: Column[Any], value: Any) -> bool:
    """Say whether every engine stores *value*: SQLite checks neither length nor range."""
    kind = column.type
    match value:
        case str():
            limit = kind.length if isinstance(kind, String) else None
            return is_storable(value) and (limit is None or len(value) <= limit)
        case int():
            limit = 2**63 if isinstance(kind, BigInteger) else 2**31
            return -limit <= value < limit
        case _:
            return True


def _import_subject(
    session: Session,
    mapped: MappedTable,
    subject_id: int,
    found: list[dict[str, Any]],
    done: Imported,
) -> None:
    if len(found) != 1 or found[0][mapped.key.name] != subject_id:
        raise ImportRefusedError("the export does not hold exactly its subject's own row")
    (row,) = found
    columns = mapped.table.c
    present = session.execute(
        select(columns[_UID], columns[ANONYMIZED_AT]).where(mapped.key == subject_id)
    ).one_or_none()
    if present is None:
        # Erased and registered again is another person to the ledger: a new random uid.
        session.execute(insert(mapped.table), [row | {_UID: uuid4(), "role": "user"}])
        done.restored += 1
    elif present[1] is not None:
        raise SubjectErasedError(f"user {subject_id} was made anonymous")
    elif present[0] != row[_UID]:
        raise ConflictError(f"user {subject_id} is now another person")
    else:
        done.unchanged += 1


def _import_owned(
    session: Session,
    mapped: MappedTable,
    found: list[dict[str, Any]],
    known: Mapping[str, set[int]],
    done: Imported,
) -> set[int]:
    """Insert the missing rows; return the numbers of all that are the person's now."""
    parent, link = mapped.parent, mapped.link
    if mapped.rule.role is not TableRole.OWNED or parent is None or link is None:
        raise ValueError(f"{mapped.name} belongs to nobody")
    mine: set[int] = set()
    new = []
    for row in found:
        key = row[mapped.key.name]
        owner = session.execute(select(link).where(mapped.key == key)).one_or_none()
        if owner is not None and owner[0] in known[parent.name]:
            done.unchanged += 1
        elif owner is not None or row[link.name] not in known[parent.name]:
            done.skipped += 1
            continue
        else:
            new.append(row | _cut_foreign_links(mapped, row, known))
        mine.add(key)
    if new:
        session.execute(insert(mapped.table), new)
        done.restored += len(new)
    return mine


def _cut_foreign_links(
    mapped: MappedTable, row: Mapping[str, Any], known: Mapping[str, set[int]]
) -> dict[str, Any]:
    """Clear references to rows that are not the person's, so that nothing is hung on others."""
    cut: dict[str, Any] = {}
    for column in mapped.table.columns:
        for foreign_key in column.foreign_keys:
            target = known.get(foreign_key.column.table.name, set())
            if column is not mapped.link and row[column.name] not in target:
                cut[column.name] = None
    return cut
