"""Exports as somebody reads them who has only the export and its published rules."""

import csv
import io
import zipfile
from typing import Any

from backend.db_utils import session_scope
from backend.models import DATA_MAP
from backend.privacy.export import ExportFormat
from backend.privacy.export_schema import schema
from backend.services.compliance_service import get_compliance_service
from backend.services.subject_service import Who
from tests.privacy.people import ADMINISTRATOR

Rows = list[dict[str, Any]]
_FORMULA = "=+-@\uff1d\uff0b\uff0d\uff20'"


def export(
    who: int | Who, format_: str = "json", *, encrypt: bool = False, passphrase: str | None = None
) -> bytes:
    with session_scope() as session:
        chunks = get_compliance_service().export(
            session, ADMINISTRATOR, who, ExportFormat(format_), encrypt=encrypt,
            passphrase=passphrase,
        )  # fmt: skip
    return b"".join(chunks)


def members(data: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        assert archive.testzip() is None
        return {name: archive.read(name) for name in archive.namelist()}


def lines(data: bytes) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(data.decode("utf-8-sig"), newline="")))


def text_of(cell: str) -> str:
    """Take the signs away that stand against formulas."""
    if cell == "'":
        return ""
    found = ""
    for place, sign in enumerate(cell):
        first = place == 0
        follows = cell[place + 1 :].lstrip(" \xa0")[:1]
        escaped = sign == "'" and follows and follows in _FORMULA + ("\t\r\n\0" if first else "")
        if not (escaped and (first or cell[place - 1] in ',;|\t\r\n"')):
            found += sign
    return found


def value_of(cell: str, kind: dict[str, Any]) -> Any:
    """Read a cell of a column of which the schema says *kind*."""
    types = kind.get("type", "string")
    if cell == "":
        return None
    if "integer" in types:
        return int(cell)
    return cell == "true" if "boolean" in types else text_of(cell)


def columns_of(table: str) -> dict[str, Any]:
    tables = schema(DATA_MAP)["properties"]["data"]["properties"]
    columns: dict[str, Any] = tables[table]["items"]["properties"]
    return columns


def tables_of_zip(data: bytes) -> dict[str, Rows]:
    """The CSV files of a zip as the rows that the JSON has."""
    found = {}
    for name, content in members(data).items():
        if name.startswith("tables/"):
            table = name.removeprefix("tables/").removesuffix(".csv")
            kinds = columns_of(table)
            found[table] = [
                {column: value_of(cell, kinds[column]) for column, cell in line.items()}
                for line in lines(content)
            ]
    return found


def tables_of_csv(data: bytes) -> dict[str, Rows]:
    """The flat CSV as the rows that the JSON has; a table without rows is not in it."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for line in lines(data):
        table, field = line["data_type"], line["field"]
        row = found.setdefault(table, {}).setdefault(line["record"], {})
        row[field] = value_of(line["value"], columns_of(table)[field])
    return {table: list(rows.values()) for table, rows in found.items()}
