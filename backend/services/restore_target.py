"""Where a backup is restored to for a look: the place, and a note of it for the next start."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError

from backend.backup.database import DumpedDatabase
from backend.backup.sqlite import SqliteDatabase
from backend.db_utils import make_engine
from backend.errors import ConfigurationError, RefusedError
from backend.services.archive_service import database_of
from backend.settings import get_settings

_NOTE: Final = "restoring-to"


def database_at(target: str) -> DumpedDatabase:
    """Open the place for a database that does not exist yet."""
    database = _place(target)
    database.refuse_existing()
    return database


@contextmanager
def noted(target: str) -> Iterator[None]:
    """Note where else than beside the live database something is built, for the next start."""
    note = _note()
    # The address of a database may hold a password.
    with os.fdopen(os.open(note, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600), "w") as file:
        file.write(target if "://" in target else str(Path(target).absolute()))
        file.flush()
        os.fsync(file.fileno())
    try:
        yield
    finally:
        note.unlink(missing_ok=True)


def _place(target: str) -> DumpedDatabase:
    return _opened(target) if "://" in target else SqliteDatabase(Path(target).absolute())


def _opened(target: str) -> DumpedDatabase:
    try:
        url = make_url(target)
        # One that is named in the query the driver would use in the place of every other.
        if not url.database or "dbname" in url.query:
            raise RefusedError("the address must name the database, in its path")
        if url.get_backend_name() == "sqlite":
            # Not by an engine, which makes the file.
            return SqliteDatabase(Path(url.database).absolute())
        return database_of(make_engine(target))
    except (ArgumentError, ConfigurationError, ValueError):
        # Its text names the setting that this is not.
        raise RefusedError("this is no address of a database") from None


def _note() -> Path:
    return get_settings().data_dir / _NOTE


def is_noted() -> bool:
    """Whether something is being built beside a target, or was when its process was killed."""
    return _note().exists()


def sweep_noted() -> int:
    """Remove what a killed process left beside its target; return how many."""
    left = _place(_note().read_text()).sweep()
    _note().unlink(missing_ok=True)
    return left
