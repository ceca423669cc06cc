"""Who is compared, on SQLite: ours through its command line, restic, borg, and a pipe."""

import json
import os
import re
import secrets
import shutil
import sqlite3
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol, TypeVar

from benchmarks.backup_meter import Command, Place, make_durable
from benchmarks.processes import ROOT, Home

HOLDFAST: Final = "Holdfast"
_Tool = TypeVar("_Tool", bound="Tool")
_TRASH: Final = Path(os.devnull)


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
    """Ours: `python db_cli.py backup …`, the start of Python and its imports included."""

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


class _Peer:
    """A tool with a folder of its own, new in each round."""

    name: str
    programs: Sequence[str]

    def __init__(self, source: Source) -> None:
        self.source = source
        words = re.sub(r"\W+", "-", self.name).strip("-")
        self.folder = source.home.folder / f"{source.data}-{words}"
        self.restored = self.folder / "restored"
        self.place = Place(self.folder)

    def begin(self) -> None:
        checkpoint(self.source)
        self.folder.mkdir()
        self.restored.mkdir()

    def check(self) -> None:
        (file,) = (path for path in self.restored.rglob("*.db"))
        self.source.require_file(file, self.name)

    def clear(self) -> None:
        shutil.rmtree(self.folder)


class Restic(_Peer):
    """A repository of version 2 with compression `auto`, which is zstd at its level 3 or so."""

    name = "restic"
    programs: Sequence[str] = ("restic",)

    def begin(self) -> None:
        super().begin()
        self._repository = self.folder / "repository"
        environment = {
            "RESTIC_REPOSITORY": str(self._repository),
            "RESTIC_PASSWORD": secrets.token_urlsafe(),
            "RESTIC_CACHE_DIR": str(self.folder / "cache"),
        }
        self.place = Place(self.folder, environment)
        self.place.run(["restic", "init", "--repository-version", "2"])

    def create(self) -> None:
        self.place.run(["restic", "backup", "--compression", "auto", self.source.file])
        make_durable(self._repository)

    def verify(self) -> None:
        self.place.run(["restic", "check", "--read-data"])

    def restore(self) -> None:
        self.place.run(["restic", "restore", "latest", "--target", self.restored])
        make_durable(self.restored)

    def stored_bytes(self) -> int:
        return size_of(self._repository)


class Borg(_Peer):
    name = "borg"
    programs: Sequence[str] = ("borg",)

    def begin(self) -> None:
        super().begin()
        self._repository = self.folder / "repository"
        environment = {
            "BORG_REPO": str(self._repository),
            "BORG_PASSPHRASE": secrets.token_urlsafe(),
            "BORG_BASE_DIR": str(self.folder / "base"),
        }
        self.place = Place(self.folder, environment)
        # Of its two ways to authenticate, the faster one here.
        self.place.run(["borg", "init", "--encryption", "repokey-blake2"])

    def create(self) -> None:
        self.place.run(["borg", "create", "--compression", "zstd,3", "::one", self.source.file])
        make_durable(self._repository)

    def verify(self) -> None:
        self.place.run(["borg", "check", "--verify-data"])

    def restore(self) -> None:
        Place(self.restored, self.place.environment).run(["borg", "extract", "::one"])
        make_durable(self.restored)

    def stored_bytes(self) -> int:
        return size_of(self._repository)


class Pipe(_Peer):
    """`zstd -3` and `age`, with what copies the database before them."""

    programs: Sequence[str] = ("sqlite3", "zstd", "age", "age-keygen")

    def __init__(self, source: Source, threads: int) -> None:
        self.name = f"{self._copier}, zstd -T{threads}, age"
        self._threads = threads
        super().__init__(source)

    _copier = ".backup"

    def begin(self) -> None:
        super().begin()
        self._key, self._stored = self.folder / "key", self.folder / "stored"
        self.place.run(["age-keygen", "-o", self._key])
        self._recipient = self.place.run(["age-keygen", "-y", self._key]).strip()

    def create(self) -> None:
        # It cannot write to a pipe.
        copy = self.folder / "copy"
        self.place.run(["sqlite3", self.source.file, f".backup '{copy}'"])
        self.store(source=copy)
        copy.unlink()

    def verify(self) -> None:
        self.place.run(*self.opened(), target=_TRASH)

    def restore(self) -> None:
        target = self.restored / "holdfast.db"
        self.place.run(*self.opened(), target=target)
        make_durable(target)

    def store(self, *dump: Command, source: Path | None = None) -> None:
        """Store what *dump* writes, or else what is in *source*."""
        ways = (["zstd", "-3", f"-T{self._threads}", "-q", "-c"], ["age", "-r", self._recipient])
        self.place.run(*dump, *ways, source=source, target=self._stored)
        make_durable(self._stored)

    def opened(self) -> list[Command]:
        """Spell the commands that write what was stored."""
        return [["age", "-d", "-i", self._key, self._stored], ["zstd", "-d", "-q", "-c"]]

    def stored_bytes(self) -> int:
        return self._stored.stat().st_size


def checkpoint(source: Source) -> None:
    """Have the whole database in its file: peers read that alone."""
    if source.engine == "SQLite":
        with closing(sqlite3.connect(source.file)) as connection:
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
