"""What all who are compared have in common: the source, the steps; and ours among them."""

import json
import shutil
import sqlite3
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol, TypeVar

from benchmarks.backup_meter import Place, make_durable
from benchmarks.processes import BENCHMARKS, ROOT, Home

HOLDFAST: Final = "Holdfast"
_Tool = TypeVar("_Tool", bound="Tool")


@dataclass(frozen=True)
class Source:
    """The installation that is backed up: its engine, size, and rows by table."""

    home: Home
    data: str
    engine: str
    mib: float
    rows: Mapping[str, int]

    @property
    def folder(self) -> Path:
        return self.home.folder / self.data

    @property
    def file(self) -> Path:
        return self.folder / "holdfast.db"

    def require_rows(self, found: Mapping[str, int], whose: str) -> None:
        """
        Refuse a restore with other rows than the source's.

        Raises:
            RuntimeError: It has.
        """
        if dict(found) != dict(self.rows):
            raise RuntimeError(f"{whose} restored other rows: {found} instead of {self.rows}")

    def require_file(self, file: Path, whose: str) -> None:
        """`require_rows` of a SQLite file."""
        counts = (f"SELECT '{table}', count(*) FROM {table}" for table in self.rows)  # noqa: S608 - ours
        with closing(sqlite3.connect(file)) as connection:
            self.require_rows(dict(connection.execute(" UNION ALL ".join(counts))), whose)


def in_installation(home: Home, data: str, order: Mapping[str, Any]) -> dict[str, Any]:
    """Run a task of `backup_worker.py`; filling a large database takes minutes."""
    task = home.folder / "order.json"
    task.write_text(json.dumps(order), encoding="utf-8")
    place = Place(home.folder, home.environment(data))
    said = place.run([sys.executable, BENCHMARKS / "backup_worker.py"], source=task)
    answer: dict[str, Any] = json.loads(said)
    return answer


class Tool(Protocol):
    """Something measured, and the programs that it runs."""

    name: str
    programs: Sequence[str]


class Contender(Tool, Protocol):
    """Backs up, verifies and restores; each of the three returns when what it did is durable."""

    def begin(self) -> None:
        """Make what a first backup needs; not measured."""

    def create(self) -> None:
        """Back the source up."""

    def verify(self) -> None:
        """Check the backup as this tool does."""

    def restore(self) -> None:
        """Restore the backup."""

    def stored_bytes(self) -> int:
        """How large the backup is."""

    def check(self) -> None:
        """Raise `RuntimeError` unless what was restored is the source."""

    def clear(self) -> None:
        """Remove what the round left; the source is what it was before."""


def installed(tools: Iterable[_Tool]) -> tuple[list[_Tool], list[str]]:
    """Return those whose programs are there; also name those that are missing."""
    present, missing = [], []
    for one in tools:
        absent = [program for program in one.programs if shutil.which(program) is None]
        if absent:
            missing.append(f"left out: {one.name}, for want of {', '.join(absent)}")
        else:
            present.append(one)
    return present, missing


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    files = path.rglob("*") if path.is_dir() else (path,)
    return sum(file.stat().st_size for file in files if file.is_file())


class Holdfast:
    """
    Ours: `python db_cli.py backup …`, the start of Python and its imports included.

    Its `verify` proves a restore; `read` does what the peers' verification does.
    """

    name = HOLDFAST
    programs: Sequence[str] = ()

    def __init__(self, source: Source) -> None:
        self.source = source
        self._place = Place(source.home.folder, source.home.environment(source.data))
        self._backup_id = ""

    def begin(self) -> None:
        checkpoint(self.source)

    def create(self) -> None:
        self._backup_id = json.loads(self._command("create"))["id"]
        make_durable(self._store)

    def read(self) -> None:
        """Read the whole backup and check every tag, as one of `BACKUP_VERIFY=read` is."""
        task = {"task": "read", "backup_id": self._backup_id}
        in_installation(self.source.home, self.source.data, task)

    def verify(self) -> None:
        self._command("verify", self._backup_id)

    def restore(self) -> None:
        self._command("restore", self._backup_id, "--confirm")
        make_durable(self.source.folder)

    def start(self) -> None:
        """Do nothing but start and list: what every command takes."""
        self._command("list")

    def stored_bytes(self) -> int:
        return size_of(self._store)

    def check(self) -> None:
        self.source.require_file(self.source.file, self.name)

    def clear(self) -> None:
        # The next restore is again one over the database that was backed up.
        (kept,) = (self.source.folder / "previous").glob("*.db")
        for side in ("-wal", "-shm"):
            self.source.file.with_name(self.source.file.name + side).unlink(missing_ok=True)
        kept.replace(self.source.file)
        shutil.rmtree(self._store)

    @property
    def _store(self) -> Path:
        return self.source.folder / "backups"

    def _command(self, *words: str) -> str:
        return self._place.run([sys.executable, ROOT / "db_cli.py", "backup", *words, "--json"])


def checkpoint(source: Source) -> None:
    """Have the whole database in its file: peers read that alone."""
    if source.engine == "SQLite":
        with closing(sqlite3.connect(source.file)) as connection:
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
