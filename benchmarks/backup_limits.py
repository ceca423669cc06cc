"""What no backup can do without: each stage by itself, over the same bytes."""

import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import ClassVar, Final

from benchmarks.backup_cluster import Cluster
from benchmarks.backup_contenders import Source, checkpoint
from benchmarks.backup_meter import Place, make_durable
from benchmarks.backup_postgres_peers import LIVE, dumping, loading

_TRASH: Final = Path(os.devnull)
_FLOOR: Final = "floor"
_ONE_THREAD, _TWO_THREADS, _UNPACKED = "zstd -3 -T1", "zstd -3 -T2", "zstd -d"
_VACUUM: Final = "VACUUM INTO"
CHECKS: Final = "integrity and foreign keys"
_DURABLE: Final = "zstd -d to a durable file"
_DUMP, _LOAD, _ROWS = "pg_dump -Z0", "pg_restore -1, with indexes", "COPY, without indexes"

Stages = Mapping[str, Callable[[], object]]


class Limits(ABC):
    """
    Stages by themselves, over the bytes that a backup holds.

    *needed* names, by step, the stages that it cannot avoid: the slowest bounds it from below.
    *besides* are worth knowing next to them.
    """

    name = "the stages alone"
    programs: Sequence[str] = ("zstd",)
    needed: ClassVar[Mapping[str, Sequence[str]]]
    besides: ClassVar[Mapping[str, Sequence[str]]]

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.place = Place(folder)
        self.plain, self._packed = folder / "plain", folder / "packed"

    def begin(self) -> None:
        """Make what the stages read; not measured."""
        self.folder.mkdir()
        self.copy(self.plain)
        self._pack(2, self._packed)

    @abstractmethod
    def copy(self, target: Path) -> None:
        """Write the bytes that are compressed in a backup."""

    def stages(self) -> Stages:
        return {
            _ONE_THREAD: lambda: self._pack(1, _TRASH),
            _TWO_THREADS: lambda: self._pack(2, _TRASH),
            _UNPACKED: lambda: self.unpack(_TRASH),
        }

    def _pack(self, threads: int, target: Path) -> None:
        command = ["zstd", "-3", f"-T{threads}", "-q", "-c"]
        self.place.run(command, source=self.plain, target=target)

    def unpack(self, target: Path) -> None:
        self.place.run(["zstd", "-d", "-q", "-c"], source=self._packed, target=target)

    def clear(self) -> None:
        shutil.rmtree(self.folder)


class SqliteLimits(Limits):
    programs: Sequence[str] = ("sqlite3", "zstd")
    needed: ClassVar = {
        "create": (_TWO_THREADS, _VACUUM),
        "read": (_UNPACKED,),
        "verify": (CHECKS, _UNPACKED),
        "restore": (_UNPACKED,),
    }
    besides: ClassVar = {"create": (_ONE_THREAD,), "restore": (_DURABLE, CHECKS)}

    def __init__(self, source: Source) -> None:
        super().__init__(source.home.folder / f"{source.data}-limits")
        self._source = source

    def copy(self, target: Path) -> None:
        checkpoint(self._source)
        self.place.run(["sqlite3", self._source.file, f"VACUUM INTO '{target}'"])

    def stages(self) -> Stages:
        return {
            **super().stages(),
            _VACUUM: lambda: self.copy(self.folder / "copy"),
            _DURABLE: self._unpack_for_good,
            CHECKS: self._check,
        }

    def _unpack_for_good(self) -> None:
        target = self.folder / "unpacked"
        self.unpack(target)
        make_durable(target)

    def _check(self) -> None:
        checks = "PRAGMA integrity_check(1); PRAGMA foreign_key_check"
        if (said := self.place.run(["sqlite3", self.plain, checks])) != "ok\n":
            raise RuntimeError(f"the copied database is not sound: {said[:200]}")


class PostgresLimits(Limits):
    needed: ClassVar = {
        "create": (_TWO_THREADS, _DUMP),
        "read": (_UNPACKED,),
        "verify": (_LOAD, _UNPACKED),
        "restore": (_LOAD, _UNPACKED),
    }
    besides: ClassVar = {"create": (_ONE_THREAD,), "restore": (_ROWS,)}

    def __init__(self, source: Source, cluster: Cluster) -> None:
        super().__init__(source.home.folder / f"{source.data}-limits")
        self._cluster = cluster

    def copy(self, target: Path) -> None:
        self.place.run(dumping(self._cluster, LIVE), target=target)

    def stages(self) -> Stages:
        return {
            **super().stages(),
            _DUMP: lambda: self.copy(_TRASH),
            _ROWS: lambda: self._load("--section=pre-data", "--section=data"),
            _LOAD: self._load,
        }

    def _load(self, *sections: str) -> None:
        self._drop()
        self._cluster.run(f"CREATE DATABASE {_FLOOR} TEMPLATE template0")
        self.place.run(loading(self._cluster, _FLOOR, *sections), source=self.plain)

    def _drop(self) -> None:
        self._cluster.run(f"DROP DATABASE IF EXISTS {_FLOOR} WITH (FORCE)")

    def clear(self) -> None:
        super().clear()
        self._drop()
        self._cluster.run("CHECKPOINT")
