"""
What a backup needs of a database engine: a consistent snapshot, a copy built beside, a swap.

Dumps of two engines do it, `backend.backup.sqlite` and `backend.backup.postgres`, and pgBackRest,
`backend.backup.pgbackrest.database`.
"""

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import BinaryIO, Final, Protocol

import structlog
from sqlalchemy import Engine, inspect, text

from backend.errors import HoldfastError

# Entered by a swap once it lets nobody else write to the live database, or to have it so; raises
# where somebody has written, and then there is no swap.
Still = Callable[[], AbstractContextManager[None]]

log = structlog.get_logger(__name__)
_STAMP: Final = "%Y%m%dt%H%M%S%f"


def stamp(moment: datetime) -> str:
    """Spell when a swap took place, for the name of the database it keeps aside."""
    return moment.astimezone(UTC).strftime(_STAMP)


def moment_of(stamped: str) -> datetime:
    """
    Read a `stamp` back.

    Raises:
        ValueError: It is none.
    """
    return datetime.strptime(stamped, _STAMP).replace(tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """
    One consistent state: rows per table, schema revision, and its dump.

    Attributes:
        source: Yields the dump; it is read to its end once.
        size_bytes: About how much that is.
        require_whole: Raises `UnavailableError` unless all of it came.
    """

    tables: Mapping[str, int]
    schema_revision: str
    source: BinaryIO
    size_bytes: int
    require_whole: Callable[[], None]


class Database(Protocol):
    """A live database that can be replaced by one that was built beside it."""

    @property
    def engine_name(self) -> str:
        """What makes its backups, as manifests name it."""

    def lock(self) -> AbstractContextManager[None]:
        """
        Be the only one, of all machines, to back up or restore this database.

        Raises:
            ConflictError: Another one is at it.
        """

    def check(self, built: Engine) -> None:
        """Raise `BackupDamagedError` unless *built* is sound in itself."""

    def swap(self, built: Engine, at: datetime, still: Still) -> str:
        """Put *built* in the place of the live one, at once or not at all; say where the old is."""

    def discard(self, built: Engine) -> None:
        """Remove a built database; one that was swapped in is no more there, and no error."""

    def previous(self) -> list[datetime]:
        """When the old databases that are still kept aside were."""

    def reopen(self, moment: datetime) -> Engine:
        """Build a copy of the old database that was kept aside at *moment*, beside the live one."""

    def forget_previous(self, before: datetime) -> int:
        """Remove old databases that swaps before *before* have kept aside; return how many."""

    def sweep(self) -> int:
        """Remove what a killed restore left; return how many."""


class DumpedDatabase(Database, Protocol):
    """A database that our own backups dump, and that is built from a dump."""

    def snapshot(self, tables: Iterable[str]) -> AbstractContextManager[Snapshot]:
        """Open a snapshot; it is released when the block ends."""

    def rebuild(self, fill: Callable[[BinaryIO], None]) -> Engine:
        """
        Build a database beside the live one; on an error nothing is left.

        Args:
            fill: Writes the dump to the file that it is given; it may be called again.
        """

    def refuse_existing(self) -> None:
        """Raise `RefusedError` where there is a database already under the name that is ours."""

    def publish(self, built: Engine) -> str:
        """
        Give a built database the name that is ours, where there is none yet; say where it is.

        Raises:
            ConflictError: There is one.
        """


def discard_if_possible(database: Database, built: Engine) -> None:
    """Discard after an act that is done, or has failed, whatever comes of this: a start sweeps."""
    try:
        database.discard(built)
    except HoldfastError as err:
        log.error("not_discarded", code=err.code)


def count_rows(engine: Engine, tables: Iterable[str]) -> dict[str, int]:
    """Return the number of rows per table; a table that is not there is left out."""
    present = set(inspect(engine).get_table_names())
    with engine.connect() as connection:
        quote = engine.dialect.identifier_preparer.quote
        return {
            table: connection.execute(text(f"SELECT count(*) FROM {quote(table)}")).scalar_one()  # noqa: S608 - names of our own tables
            for table in tables
            if table in present
        }
