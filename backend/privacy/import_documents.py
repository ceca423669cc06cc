"""An export that comes back: its form, checked against the data map before a row is looked at."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Final

from backend.privacy.data_map import DataMap
from backend.privacy.declarations import Personal
from backend.privacy.export import FORMAT_NAME, FORMAT_VERSION
from backend.privacy.export_schema import schema
from backend.privacy.import_values import ImportRefusedError, ReadCell, cell_reader
from backend.privacy.mapped_tables import MappedTable

ROWS_PER_CHUNK: Final = 1_000

Row = dict[str, Any]
Key = tuple[Any, ...]


@dataclass
class SentTable:
    """The rows of one table as they were sent, and which of their cells were left out."""

    mapped: MappedTable
    rows: Sequence[Mapping[str, Any]]
    redacted: dict[Key, frozenset[str]] = field(default_factory=dict)

    @cached_property
    def _readers(self) -> dict[str, ReadCell]:
        return {str(column.name): cell_reader(column) for column in self.mapped.exported_columns}

    @cached_property
    def key_names(self) -> tuple[str, ...]:
        return tuple(str(column.name) for column in self.mapped.keys)

    def key_of(self, row: Mapping[str, Any]) -> Key:
        """
        Read the primary key of *row*.

        Raises:
            ImportRefusedError: The row has other columns than the table, or no such key.
        """
        if row.keys() != self._readers.keys():
            raise ImportRefusedError(
                f"a row of {self.mapped.name} has other columns than the table"
            )
        return self.read_key(row)

    def read_key(self, cells: Mapping[str, Any]) -> Key:
        return tuple(self._readers[name](cells[name]) for name in self.key_names)

    def chunks(self) -> Iterator[list[tuple[Key, Mapping[str, Any]]]]:
        """Yield the rows with their keys, a bounded number at a time."""
        for at in range(0, len(self.rows), ROWS_PER_CHUNK):
            yield [(self.key_of(row), row) for row in self.rows[at : at + ROWS_PER_CHUNK]]

    def read(self, key: Key, row: Mapping[str, Any], names: Sequence[str] | None = None) -> Row:
        """
        Read the cells of *row*, or those of the columns *names*.

        Raises:
            ImportRefusedError: A cell has a value that its column cannot have, or is said to
                have been left out and was not.
        """
        hidden = self.redacted.get(key)
        if hidden is None:
            readers = self._readers
            return {name: readers[name](row[name]) for name in names or readers}
        if any(row[name] is not None for name in hidden):
            raise ImportRefusedError(f"a cell of {self.mapped.name} is redacted and has a value")
        return {
            name: None if name in hidden else self._readers[name](row[name])
            for name in names or self._readers
        }

    def may_return(self, key: Key) -> bool:
        """Say whether the row can stand without the cells that were left out of it."""
        columns = self.mapped.table.c
        return all(
            # What is redacted for the sake of its owner is a row of somebody else.
            name in self.mapped.third_party_columns and columns[name].nullable
            for name in self.redacted.get(key, ())
        )

    def require_unambiguous(self) -> None:
        """
        Refuse two rows with one key, and redactions of rows that were not sent.

        Raises:
            ImportRefusedError: There are some.
        """
        keys: set[Key] = set()
        for chunk in self.chunks():
            keys.update(key for key, _row in chunk)
        if len(keys) != len(self.rows):
            raise ImportRefusedError(f"two rows of {self.mapped.name} have the same key")
        if not keys.issuperset(self.redacted):
            raise ImportRefusedError(f"a redaction of {self.mapped.name} is of no row of it")


@dataclass(frozen=True, slots=True)
class Document:
    """A whole export: whose, and the tables that can come back."""

    subject_id: Any
    tables: Mapping[str, SentTable]


def parse(text: bytes) -> Row:
    """
    Read the text of a JSON export, strictly: what other readers take in two ways is refused.

    Raises:
        ImportRefusedError: It is no JSON object, has a name twice, or a number that is none.
    """
    try:
        found = json.loads(text, object_pairs_hook=_distinct, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        raise ImportRefusedError("this is no JSON export") from None
    if not isinstance(found, dict):
        raise ImportRefusedError("this is no JSON export")
    return found


def _distinct(pairs: list[tuple[str, Any]]) -> Row:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ImportRefusedError("the export has the same name twice in one place")
    return found


def _refuse_constant(_text: str) -> None:
    raise ImportRefusedError("the export holds a number that is none")


def read_document(document: Mapping[str, Any], data_map: DataMap) -> Document:
    """
    Check the form of *document*; its cells are read later, a chunk of rows at a time.

    Raises:
        ImportRefusedError: Another format or version, nobody's, unknown tables or redactions, or
            rows that cannot be told apart.
    """
    version = document.get("version")
    if (
        document.get("format") != FORMAT_NAME
        or type(version) is not int
        or version != FORMAT_VERSION
    ):
        raise ImportRefusedError(f"not a {FORMAT_NAME} of version {FORMAT_VERSION}")
    # Not by name: what was sent is not repeated.
    if unknown := document.keys() - schema(data_map)["properties"].keys():
        raise ImportRefusedError(f"{len(unknown)} of its members are not known here")
    match document:
        case {"subject": {"user_id": number}, "data": dict(rows)}:
            pass
        case _:
            raise ImportRefusedError("the export lacks its subject or its data")
    if number is None:
        raise ImportRefusedError(
            "the export is of somebody without an account: its rows are other people's"
        )
    people = {mapped.name: mapped for mapped in data_map.of_people}
    if unknown := rows.keys() - people.keys():
        raise ImportRefusedError(f"{len(unknown)} of its tables are not known here")
    for found in rows.values():
        if not isinstance(found, list) or not all(isinstance(row, dict) for row in found):
            raise ImportRefusedError("a table of the export is no list of rows")
    tables = {name: SentTable(mapped, rows.get(name, [])) for name, mapped in people.items()}
    _note_redactions(document.get("redactions", []), tables)
    # Consents, holds and queued requests are evidence of their own: they do not come back.
    coming = {n: table for n, table in tables.items() if not table.mapped.rule.carried_over}
    for table in coming.values():
        table.require_unambiguous()
    return Document(cell_reader(data_map.subject.key)(number), coming)


def _note_redactions(found: Any, tables: Mapping[str, SentTable]) -> None:
    """Tell each table which of its cells were left out, as the export lists them."""
    if not isinstance(found, list):
        raise ImportRefusedError("the redactions of the export are no list")
    for one in found:
        match one:
            case {"table": str(name), "row": dict(row), "columns": [*columns]} if name in tables:
                _note_redaction(tables[name], row, columns)
            case _:
                raise ImportRefusedError("a redaction of the export cannot be read")


def _note_redaction(table: SentTable, row: Row, columns: list[Any]) -> None:
    where = f"a redaction of {table.mapped.name}"
    if row.keys() != set(table.key_names):
        raise ImportRefusedError(f"{where} does not say which row")
    hideable = {
        str(column.name)
        for column in table.mapped.exported_columns
        if isinstance(table.mapped.columns[column.name], Personal) and not column.primary_key
    }
    if not columns or not all(isinstance(name, str) and name in hideable for name in columns):
        raise ImportRefusedError(f"{where} is of columns that are never redacted")
    key = table.read_key(row)
    if key in table.redacted:
        raise ImportRefusedError(f"{where} is there twice")
    table.redacted[key] = frozenset(columns)
