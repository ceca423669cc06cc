"""
The database: one engine a process, and the only place that commits.

`session_scope()` writes, `session_scope(read_only=True)` does not. The FastAPI dependencies end
before the answer is sent, so a commit that fails cannot be answered with success.
"""

import sqlite3
import threading
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from pathlib import Path
from typing import Final

from sqlalchemy import (
    URL,
    Connection,
    Engine,
    ExceptionContext,
    create_engine,
    event,
    make_url,
    select,
    table,
    text,
)
from sqlalchemy.exc import ArgumentError, DBAPIError
from sqlalchemy.orm import Session

from backend.errors import ConfigurationError, UnavailableError
from backend.folders import may_be_folder
from backend.settings import get_settings
from backend.sqlite_engine import READ_ONLY, open_file, sqlite_engine

# How long a writer waits for another before it gives up.
BUSY_TIMEOUT_SECONDS: Final = 10
# In seconds and milliseconds, of libpq: for a connection, and for what was sent to be received.
_PATIENCE: Final = {"connect_timeout": 10, "tcp_user_timeout": 30_000}


def make_engine(url: str) -> Engine:
    """
    Open the database at *url* with the settings that our promises need.

    Raises:
        ConfigurationError: *url* cannot be read; it is not shown, for it may hold a password.
    """
    parsed = _parse(url)
    if parsed.get_backend_name() == "sqlite":
        return sqlite_engine(url, str(parsed.database), BUSY_TIMEOUT_SECONDS)
    engine = create_engine(
        url,
        pool_size=20,
        max_overflow=20,
        pool_pre_ping=True,
        hide_parameters=True,
        # Without these a server that a cable or a firewall cuts off is waited for for many minutes.
        # What the address itself says, wins.
        connect_args={name: n for name, n in _PATIENCE.items() if name not in parsed.query},
    )
    event.listen(engine, "handle_error", _hide_row)
    return engine


def _hide_row(context: ExceptionContext) -> None:
    """Keep the first line of an error: PostgreSQL quotes the failing row in the next ones."""
    for err in (context.original_exception, context.sqlalchemy_exception):
        if err is not None and err.args and isinstance(err.args[0], str):
            err.args = (err.args[0].partition("\n")[0], *err.args[1:])


def _parse(url: str) -> URL:
    try:
        parsed = make_url(url)
        parsed.get_dialect().import_dbapi()
    except (ArgumentError, ValueError):
        raise ConfigurationError("DATABASE_URL: not a database URL") from None
    except ImportError:
        raise ConfigurationError("DATABASE_URL: a database with no driver here") from None
    name = parsed.get_backend_name()
    if name not in ("sqlite", "postgresql"):
        raise ConfigurationError(f"DATABASE_URL: {name} is neither sqlite nor postgresql")
    if name == "sqlite" and parsed.database in (None, "", ":memory:"):
        raise ConfigurationError("DATABASE_URL: Holdfast keeps data in a SQLite file, not memory")
    return parsed


_lock = threading.Lock()
_engines: dict[str, Engine] = {}


def get_engine() -> Engine:
    """The engine of this process, made at first use."""
    url = get_settings().sqlalchemy_url
    with _lock:
        if url not in _engines:
            _engines[url] = make_engine(url)
        return _engines[url]


def database_may_exist() -> bool:
    """
    Say whether there is a database to open; making its file would be a change already.

    Raises:
        ConfigurationError: There is none, and no folder for its file either.
    """
    settings = get_settings()
    url = _parse(settings.sqlalchemy_url)
    if url.get_backend_name() != "sqlite":
        return True
    path = Path(str(url.database)).absolute()
    # `DATA_DIR` is made, no other folder.
    there = path.parent.is_dir() or path.parent == settings.data_dir.absolute()
    if not there or not may_be_folder(path.parent):
        raise ConfigurationError(f"DATABASE_URL: {path.parent} is no folder that can be written")
    return path.exists()


def dispose_engine() -> None:
    """Close all connections; the next use opens new ones."""
    with _lock:
        while _engines:
            _engines.popitem()[1].dispose()


class _WriteGate:
    """Lets writers through, until one caller needs the database still."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._writers = 0
        self._closed = False

    def enter(self) -> None:
        with self._changed:
            if self._closed:
                raise UnavailableError("a restore is being put in place; try again in a moment")
            self._writers += 1

    def leave(self) -> None:
        with self._changed:
            self._writers -= 1
            self._changed.notify_all()

    @contextmanager
    def closed(self, timeout_seconds: float) -> Iterator[None]:
        with self._changed:
            if self._closed:
                raise UnavailableError("another restore is being put in place")
            self._closed = True
            drained = self._changed.wait_for(lambda: self._writers == 0, timeout_seconds)
        try:
            if not drained:
                raise UnavailableError("writers did not finish in time; nothing was changed")
            yield
        finally:
            with self._changed:
                self._closed = False


_gate = _WriteGate()


def writes_paused(timeout_seconds: float = 30) -> AbstractContextManager[None]:
    """Wait for this process's writers to finish and answer new ones with 503 meanwhile."""
    return _gate.closed(timeout_seconds)


@contextmanager
def session_scope(engine: Engine | None = None, *, read_only: bool = False) -> Iterator[Session]:
    """
    One transaction: committed when the block ends, rolled back when it raises.

    Args:
        engine: Another database than the process's own (a restore builds one beside it).
        read_only: Nothing is committed, and on SQLite no other writer waits.
    """
    if read_only:
        reader = (engine or get_engine()).execution_options(**{READ_ONLY: True})
        with Session(reader, expire_on_commit=False) as session:
            yield session
        return
    gated = engine is None
    if gated:
        _gate.enter()
    try:
        with Session(engine or get_engine(), expire_on_commit=False) as session:
            yield session
            session.commit()
    finally:
        if gated:
            _gate.leave()


def takes_writes(session: Session) -> bool:
    """Say whether the server lets anybody write: a standby does not, nor some with a full disk."""
    if session.get_bind().dialect.name != "postgresql":
        return True
    return bool(session.scalar(text("SELECT current_setting('transaction_read_only') = 'off'")))


def is_read_only(session: Session) -> bool:
    """Say whether nothing of *session* will be committed."""
    return bool(session.get_bind().get_execution_options().get(READ_ONLY))


@contextmanager
def snapshot_scope() -> Iterator[Session]:
    """Read one consistent state, however long it takes; SQLite's read transactions are that."""
    with session_scope(read_only=True) as session:
        if session.get_bind().dialect.name == "postgresql":
            session.connection(execution_options={"isolation_level": "REPEATABLE READ"})
        read_to_the_end(session)
        yield session


def read_to_the_end(session: Session) -> None:
    """
    Have cursors of this transaction planned for all of their rows.

    PostgreSQL plans for the first tenth, and would walk a whole table in the order of its key.
    """
    if session.get_bind().dialect.name == "postgresql":
        session.execute(text("SET LOCAL cursor_tuple_fraction = 1.0"))


@contextmanager
def reading_any_text(session: Session) -> Iterator[None]:
    """
    Read text that is no UTF-8 with half surrogates in it.

    SQLite keeps whatever it was given, and a query would fail at that row.
    """
    connection = session.connection().connection.driver_connection
    if not isinstance(connection, sqlite3.Connection):
        yield
        return
    connection.text_factory = lambda raw: raw.decode(errors="surrogateescape")
    try:
        yield
    finally:
        connection.text_factory = str


def read_session() -> Iterator[Session]:
    """FastAPI dependency of endpoints that only read."""
    with session_scope(read_only=True) as session:
        yield session


def empty_wal_after_commit(session: Session) -> None:
    """
    Have SQLite's write-ahead log moved into the file and emptied once *session* has committed.

    Until then the log still holds the pages as they were before an erasure.
    """
    engine = session.get_bind()
    if isinstance(engine, Engine) and engine.dialect.name == "sqlite":
        event.listen(session, "after_commit", lambda _session: empty_wal(engine), once=True)


def empty_wal(engine: Engine, timeout_seconds: float = 0.1) -> None:
    """Move SQLite's write-ahead log into the file and empty it; a long reader keeps it."""
    if engine.dialect.name == "sqlite":
        with closing(open_file(sqlite_path(engine), timeout_seconds)) as connection:
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")


def forget_copies(engine: Engine, tables: Iterable[str]) -> list[str]:
    """
    Have the engine drop what it keeps of the old rows of *tables* beside them.

    SQLite: whoever still read when they were erased has kept the pages in the log. PostgreSQL:
    the planner's statistics hold values of plain columns until they are made anew.

    Returns:
        The tables that somebody else had locked, or that are not ours to analyse.
    """
    empty_wal(engine, timeout_seconds=2)
    left = []
    if engine.dialect.name == "postgresql":
        for table in sorted(tables):
            try:
                with engine.begin() as connection:
                    _forget_statistics(connection, table)
            except DBAPIError:
                left.append(table)
    return left


def _forget_statistics(connection: Connection, name: str) -> None:
    quote = connection.dialect.identifier_preparer.quote
    # Whoever writes at this moment does not wait for us.
    connection.exec_driver_sql("SET LOCAL lock_timeout = '1s'")
    connection.exec_driver_sql(f"ANALYZE {quote(name)}")
    if connection.execute(select(text("1")).select_from(table(name)).limit(1)).first() is not None:
        return
    # ANALYZE leaves the statistics of an empty table as they are; a change of type, were it to
    # the same one, drops a column's, and rewrites nothing.
    columns = text(
        "SELECT a.attname, format_type(a.atttypid, a.atttypmod)"
        " FROM pg_attribute a JOIN pg_stats s ON s.attname = a.attname"
        " WHERE a.attrelid = to_regclass(quote_ident(:name))"
        " AND s.tablename = :name AND s.schemaname = current_schema()"
    )
    kept = connection.execute(columns, {"name": name}).all()
    if kept:
        changes = ", ".join(f"ALTER COLUMN {quote(column)} TYPE {kind}" for column, kind in kept)
        connection.exec_driver_sql(f"ALTER TABLE {quote(name)} {changes}")


def use_write_ahead_log(engine: Engine) -> None:
    """Have readers and one writer not wait for each other, also in a file restored by hand."""
    if engine.dialect.name == "sqlite":
        with closing(open_file(sqlite_path(engine))) as connection:
            connection.execute("PRAGMA journal_mode=WAL")


def is_storable(text: str) -> bool:
    """Say whether every engine takes *text*: PostgreSQL has no NUL, UTF-8 no lone surrogate."""
    return "\0" not in text and not any("\ud800" <= char <= "\udfff" for char in text)


def sqlite_path(engine: Engine) -> Path:
    """The file of a SQLite engine."""
    return Path(str(engine.url.database)).absolute()
