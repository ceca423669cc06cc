"""
The database: one engine a process, and the only place that commits.

`session_scope()` writes, `session_scope(read_only=True)` does not. The FastAPI dependencies end
before the answer is sent, so a commit that fails cannot be answered with success.
"""

import logging
import os
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from sqlalchemy import Connection, Engine, create_engine, event, make_url
from sqlalchemy.exc import ArgumentError
from sqlalchemy.orm import Session

from backend.errors import ConfigurationError
from backend.settings import get_settings

log = logging.getLogger(__name__)
# How long a writer waits for another before it gives up.
BUSY_TIMEOUT_SECONDS: Final = 10
_READ_ONLY: Final = "holdfast_read_only"


def make_engine(url: str) -> Engine:
    """
    Open the database at *url* with the settings that our promises need.

    Raises:
        ConfigurationError: *url* cannot be read; it is not shown, for it may hold a password.
    """
    try:
        parsed = make_url(url)
    except ArgumentError:
        raise ConfigurationError("DATABASE_URL: not a database URL") from None
    match parsed.get_backend_name():
        case "sqlite":
            return _sqlite_engine(url, parsed.database)
        case "postgresql":
            return create_engine(
                url, pool_size=20, max_overflow=20, pool_pre_ping=True, hide_parameters=True
            )
        case other:
            raise ConfigurationError(f"DATABASE_URL: {other} is neither sqlite nor postgresql")


def _sqlite_engine(url: str, path: str | None) -> Engine:
    if not path or path == ":memory:":
        raise ConfigurationError("DATABASE_URL: Holdfast keeps data in a SQLite file, not memory")
    # Created here, so that it never exists with more rights than its owner's.
    os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
    engine = create_engine(
        url,
        # Parameters are personal data: they stay out of error messages.
        hide_parameters=True,
        pool_size=20,
        max_overflow=20,
        connect_args={"timeout": BUSY_TIMEOUT_SECONDS, "check_same_thread": False},
    )
    event.listen(engine, "connect", _prepare_sqlite)
    event.listen(engine, "begin", _begin_sqlite)
    return engine


def _prepare_sqlite(connection: sqlite3.Connection, _record: Any) -> None:
    # The driver's own BEGIN comes too late for reads and leaks savepoints: we send it ourselves.
    connection.isolation_level = None
    for pragma in (
        "journal_mode=WAL",
        "synchronous=FULL",  # A committed erasure survives a power cut.
        "foreign_keys=ON",
        "secure_delete=ON",  # Off, "deleted" text stays in the file.
    ):
        connection.execute(f"PRAGMA {pragma}")


def _begin_sqlite(connection: Connection) -> None:
    # A writer takes the lock at once: upgrading a read transaction fails instead of waiting.
    read_only = connection.get_execution_options().get(_READ_ONLY, False)
    connection.exec_driver_sql("BEGIN" if read_only else "BEGIN IMMEDIATE")


_lock = threading.Lock()
_engines: dict[str, Engine] = {}


def get_engine() -> Engine:
    """The engine of this process, made at first use."""
    url = get_settings().sqlalchemy_url
    with _lock:
        if url not in _engines:
            _engines[url] = make_engine(url)
        return _engines[url]


def dispose_engine() -> None:
    """Close all connections; the next use opens new ones."""
    with _lock:
        while _engines:
            _engines.popitem()[1].dispose()


@contextmanager
def session_scope(engine: Engine | None = None, *, read_only: bool = False) -> Iterator[Session]:
    """
    One transaction: committed when the block ends, rolled back when it raises.

    Args:
        engine: Another database than the process's own (a restore builds one beside it).
        read_only: Nothing is committed, and on SQLite no other writer waits.
    """
    engine = engine or get_engine()
    if read_only:
        engine = engine.execution_options(**{_READ_ONLY: True})
    with Session(engine, expire_on_commit=False) as session:
        yield session
        if read_only:
            session.rollback()
        else:
            session.commit()


def read_session() -> Iterator[Session]:
    """FastAPI dependency of endpoints that only read."""
    with session_scope(read_only=True) as session:
        yield session


def write_session() -> Iterator[Session]:
    """FastAPI dependency of endpoints that write; use with `scope="function"`."""
    with session_scope() as session:
        yield session


def sqlite_path(engine: Engine) -> Path:
    """The file of a SQLite engine."""
    return Path(str(engine.url.database)).absolute()
