"""
CSV that a spreadsheet opens without running anything, and from which every value can be read back.

RFC 4180 in UTF-8, with one rule more for the cells:

- NULL is an empty cell, the empty text is a single `'`.
- In a text, a `'` is put before whatever a spreadsheet may take for a formula (`_FORMULA`), and
  before a `'`: at the beginning, and after every character at which a spreadsheet with the settings
  of another country may begin a new cell (`_BREAKS`). At the beginning it is put before a tab, a
  line break and NUL, too. Spaces in between make no difference.
- To read a text back: `'` alone is the empty text; else take one `'` away at each of these places
  where it stands before one of these characters.
- Every other value is spelled as in the JSON, without its quotes.
"""

import csv
import io
import re
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, date, datetime
from typing import Any, Final

from backend.privacy.mapped_tables import MappedTable
from backend.privacy.reading import Reader

# Excel takes UTF-8 without this mark for the machine's old code page; LibreOffice reads both.
BYTE_ORDER_MARK: Final = "\ufeff".encode()
# Source: OWASP, CSV injection. The wide ones count in Japanese settings.
_FORMULA: Final = "=+\\-@\uff1d\uff0b\uff0d\uff20'"
# Source: the same, and ASVS 5, 1.2.10 for NUL.
_FIRST: Final = rf"{_FORMULA}\t\r\n\0"
# A semicolon separates cells where the comma is the decimal sign; a quote may end such a cell.
_BREAKS: Final = ',;|\t\r\n"'
_UNSAFE: Final = re.compile(rf"\A(?=[ \xa0]*[{_FIRST}])|(?<=[{_BREAKS}])(?=[ \xa0]*[{_FORMULA}])")
# Most texts have none of these, and searching for one is many times faster.
_MAYBE_UNSAFE: Final = re.compile(rf"[{_FIRST}]")
_LINES_PER_CHUNK: Final = 2_000


def flat_csv(reader: Reader) -> Iterator[bytes]:
    """
    Yield all tables as one: a line for each value, with its table, row and column.

    It is for programs, so it begins with its header and not with a mark for Excel.
    """
    return _lines(_flat(reader))


def table_csv(reader: Reader, mapped: MappedTable) -> Iterator[bytes]:
    """Yield one table, whose columns are the model's."""
    yield BYTE_ORDER_MARK
    yield from _lines(_table(reader, mapped))


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


def _flat(reader: Reader) -> Iterator[Sequence[str]]:
    yield ("data_type", "record", "field", "value")
    for mapped in reader.tables:
        keys = [str(column.name) for column in mapped.keys]
        for one in reader.rows(mapped):
            record = _text(",".join([plain(one.row[key]) for key in keys]))
            for field, value in one.row.items():
                yield (mapped.name, record, field, _cell(value))


def _table(reader: Reader, mapped: MappedTable) -> Iterator[Sequence[str]]:
    yield [str(column.name) for column in mapped.exported_columns]
    for one in reader.rows(mapped):
        yield [_cell(value) for value in one.row.values()]


def _lines(rows: Iterable[Sequence[str]]) -> Iterator[bytes]:
    buffer = io.StringIO()
    writer = csv.writer(buffer)
    for number, row in enumerate(rows, start=1):
        writer.writerow(row)
        if number % _LINES_PER_CHUNK == 0:
            yield buffer.getvalue().encode()
            buffer.seek(0)
            buffer.truncate()
    yield buffer.getvalue().encode()


def _cell(value: Any) -> str:
    return _text(value) if isinstance(value, str) else plain(value)


def _text(text: str) -> str:
    if not text:
        return "'"
    return _UNSAFE.sub("'", text) if _MAYBE_UNSAFE.search(text) else text
