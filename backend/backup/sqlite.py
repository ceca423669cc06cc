"""
SQLite: `VACUUM INTO` for the snapshot, the online backup API for the swap.

`VACUUM INTO` leaves out free pages, in which the backup API would copy erased text. A file is
never renamed over the live one: other processes would go on writing to the old file.
"""

import os
import secrets
import shutil
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO, Final

from sqlalchemy import Engine

from backend.backup.database import Snapshot, Still, moment_of, stamp
from backend.backup.priority import step_back
from backend.db_utils import make_engine, sqlite_path
from backend.errors import BackupDamagedError, ConflictError, RefusedError, UnavailableError

_COPY_BYTES: Final = 1024 * 1024
_SWAP_WAIT_SECONDS: Final = 30
_SWAP_STEPS: Final = 4
# How long a swap's log waits for readers of what was before; it does not depend on them.
_READERS_SECONDS: Final = 0.1
_SCRATCH_PREFIX: Final = ".holdfast-scratch-"
_PENDING_PREFIX: Final = ".holdfast-kept-"
_SIDE_FILES: Final = ("", "-wal", "-shm", "-journal")


class SqliteDatabase:
    """The SQLite file of a live engine."""

    engine_name: Final = "sqlite"

    def __init__(self, path: Path) -> None:
        self._path = path

    @contextmanager
    def lock(self) -> Iterator[None]:
        # The file is on this machine, and so is everybody who may use it: see `exclusive`.
        yield

    @contextmanager
    def snapshot(self, tables: Iterable[str]) -> Iterator[Snapshot]:
        copy = self._new_scratch_file()
        try:
            with _as_unavailable(), ThreadPoolExecutor(1, initializer=step_back) as aside:
                counts, revision = aside.submit(self._copy, copy, tables).result()
            file = copy.open("rb")
        finally:
            # Read on through the descriptor: after a crash no plain copy is left on the disk.
            _unlink(copy)
        with file:
            size = os.fstat(file.fileno()).st_size
            yield Snapshot(counts, revision, file, size, lambda: None)

    def _copy(self, copy: Path, tables: Iterable[str]) -> tuple[dict[str, int], str]:
        """Copy the file, without its free pages; return the copy's rows per table and revision."""
        with closing(sqlite3.connect(self._path, timeout=_SWAP_WAIT_SECONDS)) as source:
            # The copy loses its name before anybody could ask for it after a power cut.
            source.execute("PRAGMA synchronous=OFF")
            source.execute("VACUUM INTO ?", (str(copy),))
        with closing(sqlite3.connect(copy)) as reader:
            counts = {
                table: int(reader.execute(f'SELECT count(*) FROM "{table}"').fetchone()[0])  # noqa: S608 - names of our own tables
                for table in tables
            }
            revision = reader.execute("SELECT version_num FROM alembic_version").fetchone()[0]
        return counts, str(revision)

    def rebuild(self, fill: Callable[[BinaryIO], None]) -> Engine:
        scratch = self._new_scratch_file()
        try:
            with _as_unavailable(), scratch.open("wb") as file:
                fill(file)
        except BaseException:
            _unlink(scratch)
            raise
        return make_engine(f"sqlite:///{scratch}")

    def check(self, built: Engine) -> None:
        def first_row(question: str) -> Any:
            with closing(sqlite3.connect(sqlite_path(built))) as connection:
                return connection.execute(question).fetchone()

        questions = ("PRAGMA integrity_check(1)", "PRAGMA foreign_key_check")
        try:
            with ThreadPoolExecutor(initializer=step_back) as pool:
                sound, broken = pool.map(first_row, questions)
        except sqlite3.DatabaseError:
            sound, broken = None, None
        if sound != ("ok",) or broken:
            raise BackupDamagedError("the restored database is not sound")

    def refuse_existing(self) -> None:
        for suffix in _SIDE_FILES:
            # SQLite would replay a log of an earlier file of this name into the new one.
            path = self._path.with_name(self._path.name + suffix)
            if path.exists() or path.is_symlink():
                raise RefusedError(f"{path} exists already")
        if not self._path.parent.is_dir():
            raise RefusedError(f"{self._path.parent} is no folder")

    def publish(self, built: Engine) -> str:
        built.dispose()
        scratch = sqlite_path(built)
        with _as_unavailable(), closing(sqlite3.connect(scratch)) as connection:
            # What is still in its log must be in the file that gets the name.
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        try:
            # A link fails where a rename would replace.
            os.link(scratch, self._path)
        except FileExistsError:
            raise ConflictError(f"{self._path} exists already") from None
        return str(self._path)

    def swap(self, built: Engine, at: datetime, still: Still) -> str:
        built.dispose()
        kept = self._previous / f"{self._path.stem}-{stamp(at)}.db"
        kept.parent.mkdir(mode=0o700, exist_ok=True)
        copy, mark = self._new_scratch_file(), 1 + secrets.randbelow(2**31 - 1)
        pending = self._path.with_name(f"{_PENDING_PREFIX}{mark}-{stamp(at)}")
        keeper = _Keeper(self._path, copy, pending, still)
        scratch = sqlite_path(built)
        self._match_page_size(scratch, mark)
        with _as_unavailable():
            try:
                with (
                    closing(sqlite3.connect(scratch, isolation_level=None)) as source,
                    closing(sqlite3.connect(self._path, timeout=1)) as target,
                ):
                    # With a read transaction open the copy cannot restart half way.
                    source.execute("BEGIN")
                    # The keeper is to be asked while some pages are still to come.
                    pages = source.execute("PRAGMA page_count").fetchone()[0] // _SWAP_STEPS
                    source.backup(target, pages=max(1, pages), progress=keeper, sleep=0.05)
                    source.execute("ROLLBACK")
            finally:
                _unlink(copy)
                # Whatever has happened: the file itself says whether it was swapped.
                self._settle_swap(pending)
            self.discard(built)
        # All of the new database is in the log: it would lie on the disk twice.
        with (
            suppress(sqlite3.OperationalError),
            closing(sqlite3.connect(self._path, timeout=_READERS_SECONDS)) as live,
        ):
            live.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        return str(kept)

    def _settle_swap(self, pending: Path) -> bool:
        """Keep what a swap has copied aside if it did take place, and drop it if it did not."""
        mark, _, stamped = pending.name.removeprefix(_PENDING_PREFIX).partition("-")
        with closing(sqlite3.connect(self._path)) as live:
            swapped = str(live.execute("PRAGMA user_version").fetchone()[0]) == mark
        if not pending.exists():
            return False
        if swapped:
            pending.rename(self._previous / f"{self._path.stem}-{stamped}.db")
        else:
            _unlink(pending)
        return True

    def discard(self, built: Engine) -> None:
        built.dispose()
        _unlink(sqlite_path(built))

    def previous(self) -> list[datetime]:
        return list(self._kept())

    def reopen(self, moment: datetime) -> Engine:
        kept = self._kept()[moment]

        def copy(target: BinaryIO) -> None:
            with kept.open("rb") as source:
                shutil.copyfileobj(source, target, _COPY_BYTES)

        return self.rebuild(copy)

    def forget_previous(self, before: datetime) -> int:
        old = [path for moment, path in self._kept().items() if moment < before]
        for path in old:
            _unlink(path)
        return len(old)

    def _kept(self) -> dict[datetime, Path]:
        found = {}
        for path in self._previous.glob(f"{self._path.stem}-*.db"):
            with suppress(ValueError):
                found[moment_of(path.stem.removeprefix(f"{self._path.stem}-"))] = path
        return found

    @property
    def _previous(self) -> Path:
        return self._path.parent / "previous"

    def sweep(self) -> int:
        left = [
            path
            for path in self._path.parent.glob(f"{_SCRATCH_PREFIX}*")
            if not path.name.endswith(_SIDE_FILES[1:])
        ]
        for path in left:
            _unlink(path)
        pending = list(self._path.parent.glob(f"{_PENDING_PREFIX}*"))
        for path in pending:
            self._settle_swap(path)
        return len(left) + len(pending)

    def _new_scratch_file(self) -> Path:
        # On the database's own file system, and 0600 before anything is in it.
        path = self._path.parent / f"{_SCRATCH_PREFIX}{secrets.token_hex(8)}"
        try:
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
        except OSError as err:
            raise UnavailableError(f"no room beside the database: {err.strerror}") from err
        return path

    def _match_page_size(self, scratch: Path, mark: int) -> None:
        """
        The backup API copies pages, so both files must agree on their size.

        The *mark* is copied with them: by it a swap that was killed is known to have been one.
        """
        with (
            closing(sqlite3.connect(self._path)) as live,
            closing(sqlite3.connect(scratch, isolation_level=None)) as built,
        ):
            wanted = live.execute("PRAGMA page_size").fetchone()[0]
            built.execute("PRAGMA journal_mode=DELETE")
            if built.execute("PRAGMA page_size").fetchone()[0] != wanted:
                built.execute(f"PRAGMA page_size={wanted}")
                built.execute("VACUUM")
            built.execute(f"PRAGMA user_version={mark}")
            built.execute("PRAGMA journal_mode=WAL")


@contextmanager
def _as_unavailable() -> Iterator[None]:
    """Tell a disk that is full, or a file that is locked for too long, as what it is."""
    try:
        yield
    except OSError as err:
        raise UnavailableError(f"the disk takes no more: {err.strerror}") from err
    except sqlite3.OperationalError as err:
        # Its words name no row: they say what the file system or the lock did.
        raise UnavailableError(f"SQLite cannot go on: {err}") from err


class _Keeper:
    """
    Copies the live file aside once the swap holds its write lock; whole or not at all.

    The backup API locks the target at its first step and keeps the lock to the end, so every
    write that was acknowledged is in the kept file, and none falls between.
    """

    def __init__(self, live: Path, copy: Path, kept: Path, still: Still) -> None:
        self._live, self._copy, self._kept, self._still = live, copy, kept, still
        self._deadline, self._done = time.monotonic() + _SWAP_WAIT_SECONDS, False

    def __call__(self, _status: int, _remaining: int, total: int) -> None:
        if self._done:
            return
        if total == 0:
            if time.monotonic() > self._deadline:
                raise UnavailableError("the database was busy for too long; nothing was changed")
            return
        with (
            self._still(),
            closing(sqlite3.connect(self._live)) as source,
            closing(sqlite3.connect(self._copy)) as target,
        ):
            source.backup(target)
        with self._copy.open("rb") as file:
            os.fsync(file.fileno())
        self._copy.rename(self._kept)
        self._done = True


def _unlink(path: Path) -> None:
    # Itself last: by it the others are found.
    for suffix in reversed(_SIDE_FILES):
        path.with_name(path.name + suffix).unlink(missing_ok=True)
