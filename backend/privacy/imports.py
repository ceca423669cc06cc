"""
Import: rows of an export of ours come back, to the person they were taken from and nobody else.

A row that is still there stays as it is; one whose number is taken by what is no longer this
person's is skipped and counted. Consents and holds are evidence and do not come back this way.
What was erased comes back, too: to put a mistake right is the operator's to decide. The person is
a new one to the ledger then, with a new random `uid`, so no replay erases them again.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final
from uuid import uuid4

from sqlalchemy import Column, bindparam, insert, update
from sqlalchemy.exc import DataError, IntegrityError
from sqlalchemy.orm import Session

from backend.errors import ConflictError
from backend.privacy.data_map import DataMap
from backend.privacy.declarations import TableRole
from backend.privacy.import_documents import ROWS_PER_CHUNK, Key, Row, read_document
from backend.privacy.import_plan import (
    UID,
    CameBack,
    Imported,
    ImportPlan,
    Part,
    plan_import,
    rows_with,
)
from backend.privacy.import_values import ImportRefusedError
from backend.privacy.sql import reserve_numbers

_ROLE: Final = "role"


@dataclass(frozen=True, slots=True)
class Import:
    """
    Whose rows came back, and what became of each table's.

    Attributes:
        exported_uid: The person's `uid` in the export; it is another one now if *came_back*.
        came_back: The person's own row was missing, and is here again.
    """

    subject_id: Any
    exported_uid: Any
    came_back: bool
    tables: dict[str, Imported]


def import_rows(
    session: Session,
    data_map: DataMap,
    document: Mapping[str, Any],
    *,
    came_back: CameBack,
    dry_run: bool = False,
) -> Import:
    """
    Insert the rows of *document* that are missing, all or none; say what was done.

    Beside *document*, memory holds the keys of its rows and of the person's, and a chunk of rows.

    Args:
        came_back: Says whether the person of the first `uid`, exported, is the one who has the
            second now, by an earlier import.
        dry_run: Do it and undo it: only the database knows all of its own rules. Row numbers,
            which no rollback gives back, stay as they are.

    Raises:
        ImportRefusedError: Another format or version, unknown tables or columns, values of the
            wrong type, or rows that do not hang together.
        ConflictError: The number now belongs to somebody else, or a unique value is in use.
        SubjectErasedError: The person was made anonymous; their row cannot be filled again.
    """
    sent = read_document(document, data_map)
    try:
        with session.begin_nested() as savepoint:
            plan = plan_import(session, data_map, sent, came_back)
            _Restorer(session, data_map, plan).restore()
            if dry_run:
                savepoint.rollback()
    except IntegrityError:
        raise ConflictError("a value of the import breaks a rule of the database") from None
    except DataError:
        raise ImportRefusedError("a value of the import is none that the database takes") from None
    if not dry_run:
        for part in plan.parts.values():
            # Elsewhere the database gives out no numbers.
            if part.restore and part.mapped.table.autoincrement_column is not None:
                reserve_numbers(session, part.mapped.key, 0)
    subject = plan.parts[data_map.subject.name]
    done = {name: part.done for name, part in plan.parts.items()}
    return Import(plan.subject_id, plan.exported_uid, bool(subject.restore), done)


class _Restorer:
    """Inserts what the plan has come back, parents first."""

    def __init__(self, session: Session, data_map: DataMap, plan: ImportPlan) -> None:
        self._session = session
        self._data_map = data_map
        self._parts = plan.parts
        # Links to rows that are not there yet: by table and column, the key and the value.
        self._later: dict[tuple[str, str], list[tuple[Key, Any]]] = defaultdict(list)

    def restore(self) -> None:
        for mapped in self._data_map.of_people:
            if (part := self._parts.get(mapped.name)) is not None:
                self._restore_table(part)
        for (name, column), links in self._later.items():
            self._link(self._parts[name], column, links)

    def _restore_table(self, part: Part) -> None:
        table = part.mapped.table
        # Erased and registered again is another person to the ledger: a new random uid.
        fresh = {UID: uuid4(), _ROLE: "user"} if part.mapped is self._data_map.subject else {}
        fresh = {name: value for name, value in fresh.items() if name in table.c}
        for chunk in part.sent.chunks():
            # All are read, so that what is not restored must be right, too.
            rows = [(key, part.sent.read(key, raw)) for key, raw in chunk]
            new = [(key, row | fresh) for key, row in rows if key in part.restore]
            if new:
                self._cut_foreign_links(part, new)
                self._session.execute(insert(table), [row for _key, row in new])

    def _cut_foreign_links(self, part: Part, new: list[tuple[Key, Row]]) -> None:
        """Clear references to rows that are not the person's, so that nothing hangs on others."""
        links = list(self._foreign_columns(part))
        known = {
            (column.name, target): self._known(column, target, (row for _key, row in new))
            for column, target in links
        }
        for key, row in new:
            for column, target in links:
                name = str(column.name)
                if (value := row[name]) is None:
                    continue
                above = self._parts.get(str(target.table.name))
                if value not in known[name, target]:
                    row[name] = None if column.nullable else value
                elif above is not None and value in above.coming[str(target.name)]:
                    self._later[part.mapped.name, name].append((key, value))
                    row[name] = None
            for name, values in part.coming.items():
                values.discard(row.get(name))

    def _foreign_columns(self, part: Part) -> Iterator[tuple[Column[Any], Column[Any]]]:
        for column in part.mapped.exported_columns:
            for foreign in column.foreign_keys:
                yield column, foreign.column

    def _known(self, column: Column[Any], target: Column[Any], rows: Iterable[Row]) -> set[Any]:
        """Return what a row may refer to by *column*: the person's own rows, and price lists."""
        name = str(target.table.name)
        if (above := self._parts.get(name)) is not None:
            return above.theirs[str(target.name)]
        if self._data_map[name].rule.role is not TableRole.REFERENCE:
            return set()
        values = [(v,) for v in {row[str(column.name)] for row in rows} if v is not None]
        return {value for (value,) in rows_with(self._session, [target], [target], values)}

    def _link(self, part: Part, column: str, links: list[tuple[Key, Any]]) -> None:
        """Set links to rows that were inserted after their own."""
        keys = part.mapped.keys
        where = [key == bindparam(f"key_{n}") for n, key in enumerate(keys)]
        statement = update(part.mapped.table).where(*where).values({column: bindparam("link")})
        for at in range(0, len(links), ROWS_PER_CHUNK):
            self._session.execute(
                statement,
                [
                    {"link": value} | {f"key_{n}": cell for n, cell in enumerate(key)}
                    for key, value in links[at : at + ROWS_PER_CHUNK]
                ],
            )
