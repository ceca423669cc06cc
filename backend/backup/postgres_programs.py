"""PostgreSQL's own programs: `pg_dump` and `pg_restore` on pipes, with no password to be seen."""

import os
import re
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, BinaryIO, Final, cast

from sqlalchemy import URL

from backend.backup.priority import step_back
from backend.errors import BackupDamagedError, HoldfastError, UnavailableError

_PIPE_BYTES: Final = 1024 * 1024
# Nothing of a scratch database has to survive a crash, and what comes after is flushed with it.
_LOAD_OPTIONS: Final = "-c synchronous_commit=off -c maintenance_work_mem=256MB"
# The table of contents of some thirty thousand tables, indexes and keys.
_HEAD_BYTES: Final = 16 * 1024 * 1024
# What a server says that was stopped, is full, or lets nobody in.
_NOT_THE_DUMP: Final = re.compile(
    rb"terminating connection|server closed the connection|connection to server|the database system"
    rb"|No space left|could not (extend|write|fsync)|out of (shared )?memory|too many connections"
)
# Where programs and files lie, in which language they speak; and what libpq is told this way.
_PASSED_ON: Final = ("PATH", "HOME", "LANG", "LC_", "LD_LIBRARY_PATH", "TZ", "KRB5", "PG")
_JOBS: Final = min(4, os.cpu_count() or 1)


class Programs:
    """
    Runs the programs for one server.

    Args:
        version: Asks the server for its major version.
    """

    def __init__(self, url: URL, version: Callable[[], int]) -> None:
        self._url = url
        self._version = version

    def find(self, name: str) -> str:
        """
        Find the newest *name* on this machine that is not older than the server.

        Raises:
            UnavailableError: None is.
        """
        wanted = self._version()
        found = [Path("/usr/lib/postgresql") / str(wanted) / "bin" / name]
        found += sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"), reverse=True)
        on_path = shutil.which(name)
        candidates = [str(path) for path in found if path.exists()]
        for candidate in ([on_path] if on_path else []) + candidates:
            try:
                answer = subprocess.run(
                    [candidate, "--version"], capture_output=True, text=True, check=False
                )
            except OSError:
                # It is there and cannot be run.
                continue
            version = re.search(r"(\d+)", answer.stdout)
            if version and int(version[1]) >= wanted:
                return candidate
        raise UnavailableError(f"{name} {wanted} or newer is needed and was not found on PATH")

    @contextmanager
    def dump(self, name: str, snapshot: str) -> Iterator[tuple[BinaryIO, Callable[[], None]]]:
        """Dump a database as an exported snapshot sees it; see `Snapshot` for what is yielded."""
        command = [
            self.find("pg_dump"),
            "-Fc",
            "-Z0",
            "--no-owner",
            "--no-privileges",
            f"--snapshot={snapshot}",
        ]
        with subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=self._environment(name),
            pipesize=_PIPE_BYTES,
        ) as process:
            errors = _Collector(process.stderr)
            step_back(process.pid)

            def require_whole() -> None:
                # Checked before the archive's last chunk: a failed dump can never be opened.
                if process.wait() != 0:
                    raise UnavailableError(f"pg_dump failed: {errors.first_line()}")

            try:
                yield cast("BinaryIO", process.stdout), require_whole
            except BaseException:
                # The reader gave up: the dump must not go on.
                process.kill()
                raise

    def fill(self, name: str, fill: Callable[[BinaryIO], None]) -> None:
        """
        Load the rows from the stream, then build indexes and keys on several connections.

        Args:
            name: A database with nothing in it.
            fill: Writes the dump to the file that it is given; it is called twice.

        Raises:
            BackupDamagedError: It is no dump, or does not fit together.
        """
        pg_restore = self.find("pg_restore")
        self._load(name, [pg_restore, "--section=pre-data", "--section=data"], fill)
        with _head(fill) as path:
            command = [pg_restore, "--section=post-data", f"--jobs={_JOBS}", path]
            self._load(name, command, keep_open=[int(Path(path).name)])

    def _load(
        self,
        name: str,
        command: list[str],
        fill: Callable[[BinaryIO], None] | None = None,
        keep_open: Sequence[int] = (),
    ) -> None:
        options = ["--exit-on-error", "--no-owner", "--no-privileges", "-d", name]
        with subprocess.Popen(
            [command[0], *options, *command[1:]],
            stdin=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=self._environment(name) | {"PGOPTIONS": _LOAD_OPTIONS, "LC_ALL": "C"},
            pipesize=_PIPE_BYTES,
            pass_fds=keep_open,
        ) as process:
            errors = _Collector(process.stderr)
            try:
                with cast("BinaryIO", process.stdin) as stdin:
                    if fill is not None:
                        fill(stdin)
            except BrokenPipeError:
                # What it did not read was not looked at either.
                process.wait()
                raise _load_error(process.returncode, errors) from None
            except BaseException:
                process.kill()
                raise
            if process.wait() != 0:
                raise _load_error(process.returncode, errors)

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
        # Not our keys, and not what else we were told.
        passed_on = {
            name: value for name, value in os.environ.items() if name.startswith(_PASSED_ON)
        }
        return passed_on | given


def _load_error(status: int, errors: "_Collector") -> HoldfastError:
    """Tell what is wrong with the dump from what has nothing to do with it."""
    # Its words may quote rows: only the status is told.
    if status < 0 or errors.match(_NOT_THE_DUMP):
        return UnavailableError(f"pg_restore was ended from outside (status {status})")
    return BackupDamagedError(f"pg_restore failed with status {status}")


@contextmanager
def _head(fill: Callable[[BinaryIO], None]) -> Iterator[str]:
    """
    Keep the beginning of a dump, where its table of contents is, in memory; yield its path.

    `pg_restore` runs several jobs from a file only, and what follows the rows needs no rows.
    """
    reader, writer = os.pipe()
    memory = os.memfd_create("dump")
    keeper = threading.Thread(target=_keep_head, args=(reader, memory))
    keeper.start()
    try:
        with suppress(BrokenPipeError), os.fdopen(writer, "wb") as pipe:
            fill(pipe)
        keeper.join()
        yield f"/proc/self/fd/{memory}"
    finally:
        keeper.join()
        os.close(memory)


def _keep_head(reader: int, memory: int) -> None:
    """Read no more than the head: then whoever writes is told that nobody reads."""
    with os.fdopen(reader, "rb") as pipe, os.fdopen(os.dup(memory), "wb") as head:
        left = _HEAD_BYTES
        while left > 0 and (data := pipe.read(min(left, _PIPE_BYTES))):
            head.write(data)
            left -= len(data)


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

    def match(self, words: re.Pattern[bytes]) -> bool:
        self._thread.join(timeout=5)
        return any(words.search(line) for line in self._lines)

    def first_line(self) -> str:
        self._thread.join(timeout=5)
        return self._lines[0].decode(errors="replace").strip()[:200] if self._lines else "no words"
