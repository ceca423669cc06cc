"""
SQLite as our promises need it: one writer at a time in line, and no other file than the one that
was opened.
"""

import os
import sqlite3
import threading
from functools import partial
from pathlib import Path
from typing import Any, Final, cast

from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.exc import OperationalError

from backend.errors import ConfigurationError, UnavailableError

# An engine's execution option: what it begins is not committed.
READ_ONLY: Final = "holdfast_read_only"
_TURN: Final = "holdfast_turn"
_FILE: Final = "holdfast_file"


def sqlite_engine(url: str, path: str, busy_seconds: float) -> Engine:
    """
    Open the file at *path*, making it where there is none.

    Args:
        busy_seconds: How long a writer waits for another.

    Raises:
        ConfigurationError: It cannot be made or opened.
    """
    try:
        # Created here, so that it never exists with more rights than its owner's.
        os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
    except OSError as err:
        raise ConfigurationError(f"DATABASE_URL: {path}: {err.strerror}") from None
    engine = create_engine(
        url,
        # Parameters are personal data: they stay out of error messages.
        hide_parameters=True,
        pool_size=20,
        max_overflow=20,
        creator=lambda: open_file(Path(path), busy_seconds),
    )
    event.listen(engine, "connect", partial(_prepare, path))
    turn = threading.Lock()
    event.listen(engine, "begin", partial(_begin, turn, path, busy_seconds))
    for end in ("commit", "rollback"):
        event.listen(engine, end, partial(_transaction_ended, turn))
    event.listen(engine, "checkin", _end_transaction)
    for end in ("checkin", "invalidate"):
        event.listen(engine, end, lambda _connection, record, *_: _end_turn(turn, record.info))
    return engine


def open_file(path: Path, timeout_seconds: float = 5) -> sqlite3.Connection:
    """
    Open a file that is there: one that is gone must not be begun anew, empty.

    Raises:
        sqlite3.OperationalError: It is not.
    """
    address = f"{path.absolute().as_uri()}?mode=rw"
    return sqlite3.connect(address, uri=True, timeout=timeout_seconds, check_same_thread=False)


def _prepare(path: str, connection: sqlite3.Connection, record: Any) -> None:
    record.info[_FILE] = _file(path)
    # The driver's own BEGIN comes too late for reads and leaks savepoints: we send it ourselves.
    connection.isolation_level = None
    if not connection.execute("PRAGMA page_count").fetchone()[0]:
        # Of a new file only: another program's must stay as it is until we know it to be ours.
        connection.execute("PRAGMA journal_mode=WAL")
    for pragma in (
        "synchronous=FULL",  # A committed erasure survives a power cut.
        "foreign_keys=ON",
        "secure_delete=ON",  # Off, "deleted" text stays in the file.
    ):
        connection.execute(f"PRAGMA {pragma}")


def _file(path: str) -> tuple[int, int] | None:
    """Say which file lies at *path*, if any."""
    try:
        found = Path(path).stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _begin(turn: threading.Lock, path: str, busy_seconds: float, connection: Connection) -> None:
    if connection.info[_FILE] is None or connection.info[_FILE] != _file(path):
        # An open file that was deleted still takes whatever is written, and loses it all.
        connection.invalidate()
        raise OperationalError(None, None, sqlite3.OperationalError("the file is gone"))
    if connection.get_execution_options().get(READ_ONLY, False):
        # By the driver itself: it takes no lock, so it cannot fail, and costs a twentieth.
        cast("sqlite3.Connection", connection.connection.driver_connection).execute("BEGIN")
        return
    # SQLite lets writers ask again and again, at longer and longer intervals: some wait for seconds
    # while others come and go. Those of this process wait for each other here.
    if not turn.acquire(timeout=busy_seconds):
        raise UnavailableError("other writers take too long")
    connection.info[_TURN] = True
    # A writer takes the lock at once: upgrading a read transaction fails instead of waiting.
    connection.exec_driver_sql("BEGIN IMMEDIATE")


def _transaction_ended(turn: threading.Lock, connection: Connection) -> None:
    # One that was invalidated has given its turn back, and has nothing to be asked for any more.
    if not connection.invalidated:
        _end_turn(turn, connection.info)


def _end_turn(turn: threading.Lock, info: dict[str, Any]) -> None:
    if info.pop(_TURN, False):
        turn.release()


def _end_transaction(connection: sqlite3.Connection | None, _record: Any) -> None:
    # After a COMMIT that the database refused, SQLAlchemy gives the connection back as it is:
    # with its transaction open and its lock held.
    if connection is not None and connection.in_transaction:
        connection.rollback()
