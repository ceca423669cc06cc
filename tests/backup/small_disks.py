"""Disks that take no more: a limit of this process, and real file systems of a few megabytes."""

import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

_BALLAST = "ballast"


@contextmanager
def room(size: int) -> Iterator[None]:
    """No file may grow beyond *size* bytes: the kernel refuses, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@dataclass(frozen=True)
class SmallDisk:
    """A file system of a few megabytes, whose free room can be set."""

    folder: Path

    def leave(self, size: int) -> None:
        """Leave free about *size* bytes, by a file that takes the rest."""
        ballast = self.folder / _BALLAST
        ballast.unlink(missing_ok=True)
        free = shutil.disk_usage(self.folder).free
        with ballast.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, free - size)

    def empty(self) -> None:
        """Make room."""
        (self.folder / _BALLAST).unlink(missing_ok=True)

    def files(self) -> set[str]:
        """What lies there, without the ballast and SQLite's own side files."""
        paths = (path for path in self.folder.rglob("*") if not path.is_dir())
        found = {path.relative_to(self.folder).as_posix() for path in paths}
        return {name for name in found if not name.endswith(("-wal", "-shm"))} - {_BALLAST}


@contextmanager
def small_disk(folder: Path, megabytes: int) -> Iterator[SmallDisk]:
    """Mount a file system at *folder*, which must be there; skip the test where that cannot be."""
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("only root on Linux can mount a small file system")
    options = f"size={megabytes}m,mode=0700"
    mount = ["mount", "-t", "tmpfs", "-o", options, "holdfast", str(folder)]
    done = subprocess.run(mount, capture_output=True, check=False)
    if done.returncode != 0:
        pytest.skip("this machine lets nobody mount a small file system")
    try:
        yield SmallDisk(folder)
    finally:
        # Lazily: a connection of another test may still have a file open there.
        subprocess.run(["umount", "--lazy", folder], check=True)
