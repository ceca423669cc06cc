"""
Where backups lie. An object appears under its name whole or not at all, and is never replaced.
"""

import errno
import fcntl
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import BinaryIO, Final, Protocol

from backend.errors import (
    BackupDamagedError,
    ConfigurationError,
    ConflictError,
    NotFoundError,
    UnavailableError,
)
from backend.folders import make_private_folder, may_be_folder

_NAME: Final = re.compile(r"[a-z0-9][a-z0-9.-]{0,120}")
_PARTIAL: Final = ".partial-"
# What opening a link, or a socket, answers.
_NOT_PLAIN: Final = frozenset({errno.ELOOP, errno.ENXIO, errno.ENODEV})
_COPY_BYTES: Final = 1024 * 1024


class Store(Protocol):
    """Where backups lie: a folder here, or a bucket (`backend.backup.s3`)."""

    def location(self, name: str) -> str:
        """Say where *name* lies, for people."""

    def create(self, name: str) -> AbstractContextManager[BinaryIO]:
        """
        Write a new object: it appears under *name*, durably, when the block ends.

        Raises:
            ConflictError: *name* exists.
            UnavailableError: The store cannot be written; nothing is left behind.
        """

    def replace(self, name: str, data: bytes) -> None:
        """Put a small object, also in the place of one: the old one or the new one, never a mix."""

    def copy_from(self, name: str, source: "Store") -> None:
        """Copy an object of *source*, going on where an interrupted copy ended, if it can."""

    def open(self, name: str) -> AbstractContextManager[BinaryIO]:
        """
        Read an object.

        Raises:
            NotFoundError: No such object.
            BackupDamagedError: What lies there is no plain object.
        """

    def read(self, name: str, limit_bytes: int) -> bytes:
        """Read a small object whole, or its first *limit_bytes*."""

    def names(self, prefix: str, suffix: str) -> list[str]:
        """List the whole objects with this prefix and suffix, sorted."""

    def size(self, name: str) -> int:
        """Return how many bytes an object has."""

    def delete(self, name: str) -> None:
        """Remove an object; one that is gone already is no error."""

    def sweep(self) -> int:
        """Remove what killed writers left half-written; return how many."""


class LocalStore:
    """
    A folder, made at the first write: 0700, its files 0600, whatever the umask.

    Raises:
        ConfigurationError: Another scheme than a folder's.
    """

    def __init__(self, location: str) -> None:
        if "://" in location and not location.startswith("file://"):
            raise ConfigurationError("BACKUP_URL: a folder or s3://bucket/prefix, nothing else")
        self._folder = Path(location.removeprefix("file://")).absolute()

    def require_usable(self) -> None:
        """
        Make sure that the folder is there or can be made, and can be written.

        Raises:
            ConfigurationError: It cannot.
        """
        if not may_be_folder(self._folder):
            raise ConfigurationError(f"BACKUP_URL: {self._folder} cannot be a folder of ours")

    def location(self, name: str) -> str:
        return str(self._folder / name)

    @contextmanager
    def create(self, name: str) -> Iterator[BinaryIO]:
        final = self._path(name)
        try:
            with self._partial() as (partial, file):
                yield file
                file.flush()
                os.fsync(file.fileno())
                # A link fails where a rename would replace.
                try:
                    os.link(partial, final)
                except FileExistsError:
                    raise ConflictError(f"{name} is already stored") from None
        except OSError as err:
            raise _unwritable(err) from err

    def replace(self, name: str, data: bytes) -> None:
        final = self._path(name)
        try:
            with self._partial() as (partial, file):
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
                partial.rename(final)
        except OSError as err:
            raise _unwritable(err) from err

    @contextmanager
    def _partial(self) -> Iterator[tuple[Path, BinaryIO]]:
        """Open a new file under a name that no reader looks at; it is gone when the block ends."""
        try:
            make_private_folder(self._folder)
        except FileExistsError as err:
            # Something else lies there; `create` would take it for an object of its name.
            raise _unwritable(err) from err
        partial, file = self._begin_partial()
        try:
            with file:
                yield partial, file
        finally:
            partial.unlink(missing_ok=True)
        self._sync_folder()

    def _begin_partial(self) -> tuple[Path, BinaryIO]:
        while True:
            partial = self._folder / f"{_PARTIAL}{secrets.token_hex(8)}"
            descriptor = os.open(partial, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
            file = os.fdopen(descriptor, "wb")
            # Says to `sweep` that its writer lives; one may have come in between.
            fcntl.flock(file, fcntl.LOCK_EX)
            if os.fstat(descriptor).st_nlink:
                return partial, file
            file.close()

    def copy_from(self, name: str, source: Store) -> None:
        with source.open(name) as file, self.create(name) as copy:
            shutil.copyfileobj(file, copy, _COPY_BYTES)

    @contextmanager
    def open(self, name: str) -> Iterator[BinaryIO]:
        try:
            # O_NONBLOCK: a pipe put in the place of a backup must not block us for ever.
            descriptor = os.open(self._path(name), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        except FileNotFoundError:
            raise NotFoundError(f"{name} is not in the backup store") from None
        except OSError as err:
            if err.errno in _NOT_PLAIN:
                raise BackupDamagedError(f"{name} is no plain file: {err.strerror}") from None
            raise _unreadable(err) from err
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise BackupDamagedError(f"{name} is no plain file")
        with os.fdopen(descriptor, "rb") as file:
            yield file

    def read(self, name: str, limit_bytes: int) -> bytes:
        with self.open(name) as file:
            return file.read(limit_bytes)

    def names(self, prefix: str, suffix: str) -> list[str]:
        found = (name for name in self._entries() if _NAME.fullmatch(name))
        return sorted(n for n in found if n.startswith(prefix) and n.endswith(suffix))

    def _entries(self) -> list[str]:
        try:
            with os.scandir(self._folder) as entries:
                return [entry.name for entry in entries]
        except FileNotFoundError:
            return []
        except OSError as err:
            raise _unreadable(err) from err

    def size(self, name: str) -> int:
        with self.open(name) as file:
            return os.fstat(file.fileno()).st_size

    def delete(self, name: str) -> None:
        try:
            self._path(name).unlink()
            self._sync_folder()
        except (FileNotFoundError, IsADirectoryError):
            # A folder is none of ours.
            return
        except OSError as err:
            raise _unwritable(err) from err

    def sweep(self) -> int:
        partials = (name for name in self._entries() if name.startswith(_PARTIAL))
        return sum(self._remove_abandoned(self._folder / name) for name in partials)

    def _remove_abandoned(self, partial: Path) -> bool:
        """Remove a half-written file, unless its writer lives: the kernel keeps its lock."""
        try:
            # As in `open`: neither blocked by a pipe nor led elsewhere by a link.
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
            descriptor = os.open(partial, flags)
        except OSError as err:
            if err.errno in _NOT_PLAIN or err.errno == errno.ENOENT:
                return False
            raise _unreadable(err) from err
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            partial.unlink()
        except (FileNotFoundError, BlockingIOError, IsADirectoryError):
            return False
        except OSError as err:
            raise _unwritable(err) from err
        finally:
            os.close(descriptor)
        return True

    def _path(self, name: str) -> Path:
        if not _NAME.fullmatch(name):
            raise NotFoundError("this is no name of a stored object")
        return self._folder / name

    def _sync_folder(self) -> None:
        descriptor = os.open(self._folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _unwritable(err: OSError) -> UnavailableError:
    return UnavailableError(f"the backup store cannot be written: {err.strerror}")


def _unreadable(err: OSError) -> UnavailableError:
    return UnavailableError(f"the backup store cannot be read: {err.strerror}")
