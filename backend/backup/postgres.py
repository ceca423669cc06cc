"""
PostgreSQL: `pg_dump` and `pg_restore` on pipes, a new database beside, two renames to swap.

The old database is kept under another name. The role needs CREATEDB.
"""

import re
import secrets
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from typing import Any, BinaryIO, Final

from sqlalchemy import URL, Engine, Row, text
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError

from backend.backup.database import Snapshot, Still, moment_of, stamp
from backend.backup.postgres_programs import Programs
from backend.db_utils import make_engine
from backend.errors import ConflictError, RefusedError, UnavailableError

_TRY_LOCK: Final = text("SELECT pg_try_advisory_lock(hashtextextended(:name, 0))")
_UNLOCK: Final = text("SELECT pg_advisory_unlock(hashtextextended(:name, 0))")
_SCRATCH: Final = "_restore_"
_KEPT: Final = "_before_"
_STAMP_CHARS: Final = 21
_SWAP_ATTEMPTS: Final = 10
_END_OTHERS: Final = text(
    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
    "WHERE datname IN (:live, :scratch) AND pid <> pg_backend_pid()"
)
_MAX_NAME_BYTES: Final = 63


class PostgresDatabase:
    """The PostgreSQL database of a live engine."""

    engine_name: Final = "postgresql"

    def __init__(self, live: Engine) -> None:
        self._live = live
        self._url = live.url
        self._name = str(live.url.database)
        self._programs = Programs(live.url, self._server_version)

    @contextmanager
    def lock(self) -> Iterator[None]:
        # In another database of the server: a swap ends all connections to this one.
        admin = self._admin_engine()
        try:
            with admin.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
                taken = connection.execute(_TRY_LOCK, {"name": f"holdfast {self._name}"}).scalar()
                if not taken:
                    raise ConflictError("another backup or restore is running")
                try:
                    yield
                finally:
                    # The server notices only a moment later that a connection has ended.
                    with suppress(DBAPIError):
                        connection.execute(_UNLOCK, {"name": f"holdfast {self._name}"})
        finally:
            admin.dispose()

    @contextmanager
    def snapshot(self, tables: Iterable[str]) -> Iterator[Snapshot]:
        with (
            _as_unavailable(),
            self._live.connect().execution_options(
                isolation_level="REPEATABLE READ", postgresql_readonly=True
            ) as connection,
        ):
            exported = connection.execute(text("SELECT pg_export_snapshot()")).scalar_one()
            counts = {
                table: int(connection.execute(text(f'SELECT count(*) FROM "{table}"')).scalar_one())  # noqa: S608 - names of our own tables
                for table in tables
            }
            revision = connection.execute(
                text("SELECT version_num FROM alembic_version")
            ).scalar_one()
            size = int(
                connection.execute(text("SELECT pg_database_size(current_database())")).scalar_one()
            )
            with self._programs.dump(self._name, str(exported)) as (source, require_whole):
                yield Snapshot(counts, str(revision), source, size, require_whole)

    def rebuild(self, fill: Callable[[BinaryIO], None]) -> Engine:
        # Found first: without it nothing has to be made.
        self._programs.find("pg_restore")
        built = self._scratch_of("template0")
        try:
            self._programs.fill(str(built.url.database), fill)
        except BaseException:
            self.discard(built)
            raise
        return built

    def reopen(self, moment: datetime) -> Engine:
        return self._scratch_of(self._kept()[moment])

    def _scratch_of(self, template: str) -> Engine:
        name = f"{self._name[: _MAX_NAME_BYTES - 20]}{_SCRATCH}{secrets.token_hex(4)}"
        self._administer(f"CREATE DATABASE {_quote(name)} TEMPLATE {_quote(template)}")
        return make_engine(self._url_of(name).render_as_string(hide_password=False))

    def check(self, built: Engine) -> None:
        # PostgreSQL checks foreign keys as it creates them; what is left is that it answers.
        with built.connect() as connection:
            connection.execute(text("SELECT 1"))

    def refuse_existing(self) -> None:
        if self._name in self._names():
            raise RefusedError(f"the database {self._name} exists already")

    def publish(self, built: Engine) -> str:
        scratch = str(built.url.database)
        built.dispose()
        if self._name in self._names():
            raise ConflictError(f"the database {self._name} exists already")
        self._administer(f"ALTER DATABASE {_quote(scratch)} RENAME TO {_quote(self._name)}")
        return self._name

    def swap(self, built: Engine, at: datetime, still: Still) -> str:
        scratch = str(built.url.database)
        kept = self._kept_prefix + stamp(at)
        built.dispose()
        admin = self._admin_engine()
        try:
            self._rename_both(admin, scratch, kept, still)
        finally:
            # The live engine notices by itself that its connections were ended.
            admin.dispose()
        return kept

    def _rename_both(self, admin: Engine, scratch: str, kept: str, still: Still) -> None:
        """
        Rename live to *kept* and *scratch* to live, in one transaction.

        Connections are ended first. One that slips in before the rename has its lock makes
        PostgreSQL refuse, with nothing changed; closing the database to connections instead
        would leave it closed if this process were killed.
        """
        live = _quote(self._name)
        for attempt in range(1, _SWAP_ATTEMPTS + 1):
            try:
                with still(), admin.begin() as connection:
                    connection.execute(_END_OTHERS, {"live": self._name, "scratch": scratch})
                    connection.execute(text(f"ALTER DATABASE {live} RENAME TO {_quote(kept)}"))
                    connection.execute(text(f"ALTER DATABASE {_quote(scratch)} RENAME TO {live}"))
            except OperationalError as err:
                if attempt == _SWAP_ATTEMPTS:
                    raise UnavailableError("the database was busy; nothing was changed") from err
            else:
                return

    def discard(self, built: Engine) -> None:
        name = str(built.url.database)
        built.dispose()
        self._administer(f"DROP DATABASE IF EXISTS {_quote(name)} WITH (FORCE)")

    @property
    def _kept_prefix(self) -> str:
        return f"{self._name[: _MAX_NAME_BYTES - len(_KEPT) - _STAMP_CHARS]}{_KEPT}"

    def previous(self) -> list[datetime]:
        return list(self._kept())

    def forget_previous(self, before: datetime) -> int:
        old = [name for moment, name in self._kept().items() if moment < before]
        for name in old:
            self._administer(f"DROP DATABASE IF EXISTS {_quote(name)} WITH (FORCE)")
        return len(old)

    def _kept(self) -> dict[datetime, str]:
        found = {}
        for name in self._names():
            with suppress(ValueError):
                found[moment_of(name.removeprefix(self._kept_prefix))] = name
        return found

    def _names(self) -> list[str]:
        return [str(row[0]) for row in self._ask("SELECT datname FROM pg_database")]

    def _ask(self, statement: str) -> Sequence[Row[Any]]:
        """Ask the server, in whichever database of it can be reached."""
        admin = self._admin_engine()
        try:
            with admin.connect() as connection:
                return connection.execute(text(statement)).all()
        finally:
            admin.dispose()

    def sweep(self) -> int:
        pattern = re.compile(
            re.escape(self._name[: _MAX_NAME_BYTES - 20]) + _SCRATCH + "[0-9a-f]{8}"
        )
        left = [name for name in self._names() if pattern.fullmatch(name)]
        for name in left:
            self._administer(f"DROP DATABASE IF EXISTS {_quote(name)} WITH (FORCE)")
        return len(left)

    def _administer(self, statement: str) -> None:
        admin = self._admin_engine()
        try:
            with admin.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
                connection.execute(text(statement))
        except DBAPIError as err:
            reason = str(err.orig).splitlines()[0]
            raise UnavailableError(f"PostgreSQL refused: {reason}") from err
        finally:
            admin.dispose()

    def _admin_engine(self) -> Engine:
        """Connect to another database of the server: one cannot rename the one it is in."""
        for name in ("postgres", "template1"):
            if name == self._name:
                continue
            engine = make_engine(self._url_of(name).render_as_string(hide_password=False))
            try:
                engine.connect().close()
            except OperationalError:
                engine.dispose()
                continue
            return engine
        raise UnavailableError("no database of the server but this one can be reached")

    def _server_version(self) -> int:
        ((version,),) = self._ask("SHOW server_version_num")
        return int(version) // 10_000

    def _url_of(self, name: str) -> URL:
        return self._url.set(database=name)


@contextmanager
def _as_unavailable() -> Iterator[None]:
    """Tell a server that was stopped, or does not answer, as what it is."""
    try:
        yield
    except (OperationalError, InterfaceError) as err:
        reason = str(err.orig).splitlines()[0]
        raise UnavailableError(f"PostgreSQL does not answer: {reason}") from err


def _quote(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'
