"""
Export: everything that is held about one person, read from the data map and streamed.

The formats are one reading of the same rows: `json`, `csv` (one table: data type, record, field,
value) and `zip` (the JSON, one CSV per table, and a page that a person can read). The zip can be
locked with a passphrase for 7-Zip and alike (AES-256, WinZip AE-2).
"""

import csv
import io
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime
from enum import StrEnum
from pathlib import Path
from typing import Any, Final

import orjson
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from backend.privacy import archives
from backend.privacy.data_map import DataMap, MappedTable
from backend.privacy.erase import Periods, rows_of

FORMAT_NAME: Final = "holdfast-export"
FORMAT_VERSION: Final = 1
_ROWS_PER_READ: Final = 500
_JSON_OPTIONS: Final = orjson.OPT_UTC_Z
_TEMPLATES: Final = Path(__file__).parent.parent / "web" / "templates"
# A spreadsheet would run such a cell as a formula (OWASP, CSV injection).
_FORMULA_START: Final = ("=", "+", "-", "@", "\t", "\r")

Row = dict[str, Any]


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


@dataclass(frozen=True, slots=True)
class ExportRequest:
    """Whose export, made when, and what goes into it beside the rows."""

    subject_id: int
    generated_at: datetime
    consents: Mapping[str, Any]
    notice: Mapping[str, Any]


def export(
    session: Session,
    data_map: DataMap,
    request: ExportRequest,
    format_: ExportFormat,
    zip_passphrase: str | None = None,
) -> Iterator[bytes]:
    """
    Yield the export as bytes; memory does not grow with the number of rows.

    Args:
        zip_passphrase: Locks a zip; one that `archives.takes_passphrase` accepts.
    """
    match format_:
        case ExportFormat.JSON:
            return _json(session, data_map, request)
        case ExportFormat.CSV:
            return _csv(session, data_map, request)
        case ExportFormat.ZIP:
            members = _members(session, data_map, request)
            return archives.archive(members, request.generated_at, zip_passphrase)


def rows(session: Session, mapped: MappedTable, data_map: DataMap, subject: int) -> Iterator[Row]:
    """Yield the person's rows of one table, encrypted columns in plain, by primary key."""
    statement = (
        select(*mapped.exported_columns)
        .where(rows_of(mapped, data_map.subject.key == subject))
        .order_by(mapped.key)
        .execution_options(yield_per=_ROWS_PER_READ)
    )
    # Plain names: SQLAlchemy's own kind of name is no key for JSON.
    names = [str(column.name) for column in mapped.exported_columns]
    for row in session.execute(statement):
        yield dict(zip(names, row, strict=True))


def notice(data_map: DataMap, periods: Periods) -> dict[str, Any]:
    """Return what GDPR art. 15(1) asks to be told, table by table, from the data map."""
    return {
        mapped.name: {
            "purpose": mapped.rule.purpose,
            "lawful_basis": mapped.rule.basis,
            "source": mapped.rule.source,
            "categories": sorted({rule.category for rule in mapped.personal_columns.values()}),
            "kept_for": _kept_for(mapped, periods),
            "kept_by_law": mapped.statute,
        }
        for mapped in data_map.of_people
    }


def _kept_for(mapped: MappedTable, periods: Periods) -> str:
    clock = mapped.clock
    if clock is None or clock.rule.retention is None:
        return "as long as the account"
    retention = clock.rule.retention
    return f"{periods[retention.data_type].words} from {retention.anchor.replace('_', ' ')}"


def _json(session: Session, data_map: DataMap, request: ExportRequest) -> Iterator[bytes]:
    head = {
        "format": FORMAT_NAME,
        "version": FORMAT_VERSION,
        "subject": {"user_id": request.subject_id},
        "generated_at": request.generated_at,
    }
    # The head's closing brace is left open for what follows.
    yield _dump(head)[:-1] + b',"data":{'
    counts: dict[str, int] = {}
    for position, mapped in enumerate(data_map.of_people):
        yield (b"," if position else b"") + _dump(mapped.name) + b":["
        counts[mapped.name] = 0
        for row in rows(session, mapped, data_map, request.subject_id):
            yield (b"," if counts[mapped.name] else b"") + _dump(row)
            counts[mapped.name] += 1
        yield b"]"
    tail = {"consents": request.consents, "notice": request.notice, "counts": counts}
    yield b"}," + _dump(tail)[1:]


def _dump(value: Any) -> bytes:
    return orjson.dumps(value, option=_JSON_OPTIONS)


def _csv(session: Session, data_map: DataMap, request: ExportRequest) -> Iterator[bytes]:
    yield _line(("data_type", "record", "field", "value"))
    for mapped in data_map.of_people:
        for row in rows(session, mapped, data_map, request.subject_id):
            record = row[mapped.key.name]
            for field, value in row.items():
                yield _line((mapped.name, record, field, value))


def _table_csv(
    session: Session, data_map: DataMap, request: ExportRequest, mapped: MappedTable
) -> Iterator[bytes]:
    yield _line(column.name for column in mapped.exported_columns)
    for row in rows(session, mapped, data_map, request.subject_id):
        yield _line(row.values())


def _line(values: Iterable[Any]) -> bytes:
    """Write one line of RFC 4180 CSV whose cells no spreadsheet runs."""
    buffer = io.StringIO()
    csv.writer(buffer).writerow([_cell(value) for value in values])
    return buffer.getvalue().encode()


def _cell(value: Any) -> str:
    text = plain(value)
    is_text = isinstance(value, str)
    return f"'{text}" if is_text and text.startswith(_FORMULA_START) else text


def plain(value: Any) -> str:
    """Spell one value as the JSON does, without quotes; NULL is empty."""
    match value:
        case None:
            return ""
        case bool():
            return "true" if value else "false"
        case datetime():
            return value.astimezone(UTC).isoformat().replace("+00:00", "Z")
        case date():
            return value.isoformat()
        case _:
            return str(value)


def _told(value: Any) -> str:
    """Spell one value for a reader."""
    match value:
        case bool():
            return "yes" if value else "no"
        case datetime():
            return f"{value.astimezone(UTC):%Y-%m-%d %H:%M} UTC"
        case _:
            return plain(value)


def _named(field: str) -> str:
    """Name a column for a reader: money is stored in the currency's smallest unit."""
    return field.removesuffix("_minor").replace("_", " ") + (
        " (in the smallest unit, as cents)" if field.endswith("_minor") else ""
    )


def _members(
    session: Session, data_map: DataMap, request: ExportRequest
) -> Iterator[archives.Member]:
    """Yield name and content of each file in a zip; a name says nothing of the person."""
    yield "index.html", _page(session, data_map, request)
    yield "export.json", _json(session, data_map, request)
    for mapped in data_map.of_people:
        yield f"tables/{mapped.name}.csv", _table_csv(session, data_map, request, mapped)


def _page(session: Session, data_map: DataMap, request: ExportRequest) -> Iterator[bytes]:
    """Render the page for the person; rows are read while it is written."""
    # Late: few processes write a page, and all would pay for it at their start.
    from jinja2 import Environment, FileSystemLoader, select_autoescape

    environment = Environment(loader=FileSystemLoader(_TEMPLATES), autoescape=select_autoescape())
    environment.filters |= {"told": _told, "named": _named}

    def count(mapped: MappedTable) -> int:
        mine = rows_of(mapped, data_map.subject.key == request.subject_id)
        return session.scalar(select(func.count()).select_from(mapped.table).where(mine)) or 0

    def read(mapped: MappedTable) -> Iterator[Row]:
        return rows(session, mapped, data_map, request.subject_id)

    template = environment.get_template("export.html")
    for text in template.generate(
        request=request, tables=data_map.of_people, count=count, rows=read
    ):
        yield text.encode()
