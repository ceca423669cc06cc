"""
PostgreSQL: `pg_dump` and `pg_restore` on pipes, a new database beside, two renames to swap.

The old database is kept under another name. The role needs CREATEDB.
"""

import os
import re
import secrets
import shutil
import subprocess
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import IO, Final

from sqlalchemy import URL, Engine, text
from sqlalchemy.exc import DBAPIError, OperationalError

from backend.backup.database import Snapshot, moment_of, stamp
from backend.db_utils import make_engine
from backend.errors import BackupDamagedError, UnavailableError

_READ_BYTES: Final = 1024 * 1024
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

    engine_name = "postgresql"

    def __init__(self, live: Engine) -> None:
        self._live = live
        self._url = live.url
        self._name = str(live.url.database)

    @contextmanager
    def snapshot(self, tables: Iterable[str]) -> Iterator[Snapshot]:
        with self._live.connect().execution_options(
            isolation_level="REPEATABLE READ", postgresql_readonly=True
        ) as connection:
            exported = connection.execute(text("SELECT pg_export_snapshot()")).scalar_one()
            counts = {
                table: int(connection.execute(text(f'SELECT count(*) FROM "{table}"')).scalar_one())  # noqa: S608 - names of our own tables
                for table in tables
            }
            revision = connection.execute(
                text("SELECT version_num FROM alembic_version")
            ).scalar_one()
            dump = self._dump(str(exported), self._tool("pg_dump"))
            yield Snapshot(counts, str(revision), dump)

    def _dump(self, snapshot: str, pg_dump: str) -> Iterator[bytes]:
        command = [pg_dump, "-Fc", "-Z0", "--no-owner", "--no-privileges", f"--snapshot={snapshot}"]
        with subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=self._environment(self._name),
        ) as process:
            errors = _Collector(process.stderr)
            try:
                if process.stdout is not None:
                    yield from iter(lambda: process.stdout.read(_READ_BYTES), b"")  # type: ignore[union-attr] # set above
            except BaseException:
                # The reader gave up: the dump must not go on.
                process.kill()
                raise
            # Checked before the archive's last chunk: a failed dump can never be opened.
            if process.wait() != 0:
                raise UnavailableError(f"pg_dump failed: {errors.first_line()}")

    def rebuild(self, dump: Iterator[bytes]) -> Engine:
        name = f"{self._name[: _MAX_NAME_BYTES - 20]}{_SCRATCH}{secrets.token_hex(4)}"
        pg_restore = self._tool("pg_restore")
        self._administer(f"CREATE DATABASE {_quote(name)} TEMPLATE template0")
        built = make_engine(self._url_of(name).render_as_string(hide_password=False))
        try:
            self._fill(name, pg_restore, dump)
        except BaseException:
            self.discard(built)
            raise
        return built

    def _fill(self, name: str, pg_restore: str, dump: Iterator[bytes]) -> None:
        command = [pg_restore, "--exit-on-error", "--single-transaction", "--no-owner"]
        with subprocess.Popen(
            [*command, "--no-privileges", "-d", name],
            stdin=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=self._environment(name),
        ) as process:
            try:
                if process.stdin is not None:
                    for chunk in dump:
                        process.stdin.write(chunk)
                    process.stdin.close()
            except BrokenPipeError:
                process.wait()
            except BaseException:
                process.kill()
                raise
            if process.wait() != 0:
                # Its words may quote rows: only the status is told.
                raise BackupDamagedError(f"pg_restore failed with status {process.returncode}")

    def check(self, built: Engine) -> None:
        # PostgreSQL checks foreign keys as it creates them; what is left is that it answers.
        with built.connect() as connection:
            connection.execute(text("SELECT 1"))

    def swap(self, built: Engine, at: datetime) -> str:
        scratch = str(built.url.database)
        kept = self._kept_prefix + stamp(at)
        built.dispose()
        admin = self._admin_engine()
        try:
            self._rename_both(admin, scratch, kept)
        finally:
            # The live engine notices by itself that its connections were ended.
            admin.dispose()
        return kept

    def _rename_both(self, admin: Engine, scratch: str, kept: str) -> None:
        """
        Rename live to *kept* and *scratch* to live, in one transaction.

        Connections are ended first. One that slips in before the rename has its lock makes
        PostgreSQL refuse, with nothing changed; closing the database to connections instead
        would leave it closed if this process were killed.
        """
        live = _quote(self._name)
        for attempt in range(1, _SWAP_ATTEMPTS + 1):
            try:
                with admin.begin() as connection:
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

    def forget_previous(self, before: datetime) -> int:
        gone = 0
        for name in self._names():
            with suppress(ValueError):
                if moment_of(name.removeprefix(self._kept_prefix)) < before:
                    self._administer(f"DROP DATABASE IF EXISTS {_quote(name)} WITH (FORCE)")
                    gone += 1
        return gone

    def _names(self) -> list[str]:
        with self._live.connect() as connection:
            return list(connection.execute(text("SELECT datname FROM pg_database")).scalars())

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
            engine = make_engine(self._url_of(name).render_as_string(hide_password=False))
            try:
                engine.connect().close()
            except OperationalError:
                engine.dispose()
                continue
            return engine
        raise UnavailableError("no database of the server but this one can be reached")

    def _url_of(self, name: str) -> URL:
        return self._url.set(database=name)

    def _environment(self, name: str) -> dict[str, str]:
        # The password goes by environment: a command line is readable to everybody.
        options = {
            "PGHOST": self._url.query.get("host") or self._url.host,
            "PGPORT": self._url.port,
            "PGUSER": self._url.username,
            "PGPASSWORD": self._url.password,
            "PGSSLMODE": self._url.query.get("sslmode"),
            "PGDATABASE": name,
        }
        given = {key: str(value) for key, value in options.items() if value}
        return {**os.environ, **given}

    def _tool(self, name: str) -> str:
        """
        Find the newest *name* on this machine that is not older than the server.

        Raises:
            UnavailableError: None is.
        """
        with self._live.connect() as connection:
            server = connection.execute(text("SHOW server_version_num")).scalar_one()
        wanted = int(server) // 10_000
        found = [Path("/usr/lib/postgresql") / str(wanted) / "bin" / name]
        found += sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"), reverse=True)
        on_path = shutil.which(name)
        candidates = [str(path) for path in found if path.exists()]
        for candidate in ([on_path] if on_path else []) + candidates:
            answer = subprocess.run(
                [candidate, "--version"], capture_output=True, text=True, check=False
            )
            version = re.search(r"(\d+)", answer.stdout)
            if version and int(version[1]) >= wanted:
                return candidate
        raise UnavailableError(f"{name} {wanted} or newer is needed and was not found on PATH")


class _Collector:
    """Reads a process's stderr beside it, so that a full pipe cannot block it."""

    def __init__(self, stream: IO[bytes] | None) -> None:
        self._lines: list[bytes] = []
        self._thread = threading.Thread(target=self._read, args=(stream,), daemon=True)
        self._thread.start()

    def _read(self, stream: IO[bytes] | None) -> None:
        for line in stream or ():
            if len(self._lines) < 10:  # noqa: PLR2004 - enough to tell
                self._lines.append(line)

    def first_line(self) -> str:
        self._thread.join(timeout=5)
        return self._lines[0].decode(errors="replace").strip()[:200] if self._lines else "no words"


def _quote(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'
