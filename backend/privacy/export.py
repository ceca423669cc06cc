"""
Export: everything that is held about one person, read from the data map and streamed.

The formats are one reading of the same rows: `json`, `csv` (one table: data type, record, field,
value) and `zip` (the JSON, one CSV per table, and a page that a person can read). The zip can be
locked with a passphrase for 7-Zip and alike (AES-256, WinZip AE-2).
"""

from collections.abc import Generator, Iterable, Iterator
from contextlib import closing
from decimal import Decimal
from enum import StrEnum
from itertools import islice
from typing import Any, Final

import orjson
from sqlalchemy.orm import Session

from backend.privacy import archives
from backend.privacy.data_map import DataMap
from backend.privacy.export_csv import flat_csv, table_csv
from backend.privacy.export_page import page
from backend.privacy.export_request import ExportRequest
from backend.privacy.notice import notice
from backend.privacy.reading import Read, Reader, Row

FORMAT_NAME: Final = "holdfast-export"
FORMAT_VERSION: Final = 1
_JSON_OPTIONS: Final = orjson.OPT_UTC_Z
# One call of orjson for each row would cost as much as the rows.
_ROWS_PER_CHUNK: Final = 100


class ExportFormat(StrEnum):
    JSON = "json"
    CSV = "csv"
    ZIP = "zip"

    @property
    def media_type(self) -> str:
        return {"json": "application/json", "csv": "text/csv", "zip": "application/zip"}[self]


class ExportContainer(StrEnum):
    """What an encrypted export is wrapped in."""

    HOLDFAST = "holdfast"
    ZIP = "zip"


def export(
    session: Session,
    data_map: DataMap,
    request: ExportRequest,
    format_: ExportFormat,
    zip_passphrase: str | None = None,
) -> Generator[bytes]:
    """
    Yield the export as bytes; memory does not grow with the number of rows.

    Args:
        zip_passphrase: Locks a zip; one that `archives.takes_passphrase` accepts.
    """
    with closing(Reader(session, data_map, request.subjects)) as reader:
        match format_:
            case ExportFormat.JSON:
                yield from _json(session, data_map, request, reader)
            case ExportFormat.CSV:
                yield from flat_csv(reader)
            case ExportFormat.ZIP:
                members = _members(session, data_map, request, reader)
                yield from archives.archive(members, request.generated_at, zip_passphrase)


def _members(
    session: Session, data_map: DataMap, request: ExportRequest, reader: Reader
) -> Iterator[archives.Member]:
    """Yield name and content of each file in a zip; a name says nothing of the person."""
    yield "index.html", page(session, data_map, request, reader)
    yield "export.json", _json(session, data_map, request, reader)
    for mapped in reader.tables:
        yield f"tables/{mapped.name}.csv", table_csv(reader, mapped)


def _json(
    session: Session, data_map: DataMap, request: ExportRequest, reader: Reader
) -> Iterator[bytes]:
    head = {
        "format": FORMAT_NAME,
        "version": FORMAT_VERSION,
        "subject": request.subject,
        "generated_at": request.generated_at,
    }
    # The head's closing brace is left open for what follows.
    yield _dump(head)[:-1] + b',"data":{'
    counts: dict[str, int] = {}
    redacted: set[str] = set()
    for position, mapped in enumerate(reader.tables):
        yield (b"," if position else b"") + _dump(mapped.name) + b":"
        found = _rows(reader.rows(mapped), mapped.name, redacted)
        counts[mapped.name] = yield from _list(found)
    yield b'},"redactions":'
    yield from _list(_redactions(reader, redacted))
    tail = {
        "consents": request.consents,
        "requests": request.requests,
        "notice": notice(session, data_map, request.subjects, request.terms, counts=counts,
                         consented=request.consented, now=request.generated_at),
        "counts": counts,
    }  # fmt: skip
    yield b"," + _dump(tail)[1:]


def _rows(found: Iterable[Read], table: str, redacted: set[str]) -> Iterator[Row]:
    """Yield the rows; note the table among the *redacted* ones when a cell was left out."""
    for one in found:
        if one.redacted:
            redacted.add(table)
        yield one.row


def _list(items: Iterable[Any]) -> Generator[bytes, None, int]:
    """Yield *items* as a JSON list; return how many there were."""
    yield b"["
    written, rest = 0, iter(items)
    while part := list(islice(rest, _ROWS_PER_CHUNK)):
        # Without the list's own brackets.
        yield (b"," if written else b"") + _dump(part)[1:-1]
        written += len(part)
    yield b"]"
    return written


def _redactions(reader: Reader, tables: set[str]) -> Iterator[Row]:
    """Yield which cells were left out of the rows, and why; read again, so nothing is kept."""
    for mapped in reader.tables:
        if mapped.name in tables:
            for one in reader.rows(mapped):
                if one.redacted:
                    key = {str(column.name): one.row[column.name] for column in mapped.keys}
                    yield {"table": mapped.name, "row": key, "columns": one.redacted,
                           "ground": f"GDPR art. 15(4): {one.ground}"}  # fmt: skip


def _dump(value: Any) -> bytes:
    return orjson.dumps(value, default=_spelled, option=_JSON_OPTIONS)


def _spelled(value: Any) -> str:
    if isinstance(value, Decimal):
        return str(value)  # As text: a number of JSON may lose its last digits.
    raise TypeError(type(value).__name__)
