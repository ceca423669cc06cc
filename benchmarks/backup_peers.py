"""Who is compared on SQLite: restic, borg, and a pipe of `zstd` and `age`."""

import os
import re
import secrets
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from benchmarks.backup_contenders import Source, checkpoint, size_of
from benchmarks.backup_meter import Command, Place, make_durable

_TRASH: Final = Path(os.devnull)


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
