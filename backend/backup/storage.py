"""
Where backups lie. An object appears under its name whole or not at all, and is never replaced.
"""

import os
import re
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, Final

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


class LocalStore:
    """
    A folder, made at the first write: 0700, its files 0600, whatever the umask.

    Raises:
        ConfigurationError: Another scheme than a folder's, or no folder lies there.
    """

    def __init__(self, location: str) -> None:
        if "://" in location and not location.startswith("file://"):
            raise ConfigurationError("BACKUP_URL: only a folder is supported, not this scheme")
        self._folder = Path(location.removeprefix("file://")).absolute()
        if not may_be_folder(self._folder):
            raise ConfigurationError(f"BACKUP_URL: {self._folder} cannot be a folder of ours")

    def location(self, name: str) -> str:
        return str(self._folder / name)

    @contextmanager
    def create(self, name: str) -> Iterator[BinaryIO]:
        """
        Write a new object: it appears under *name* when the block ends, after fsync.

        Raises:
            ConflictError: *name* exists.
            UnavailableError: The disk is full or gone; nothing is left behind.
        """
        final = self._path(name)
        partial = self._folder / f"{_PARTIAL}{secrets.token_hex(8)}"
        try:
            make_private_folder(self._folder)
        except OSError as err:
            raise UnavailableError(f"the backup store cannot be made: {err.strerror}") from err
        try:
            descriptor = os.open(partial, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
            try:
                with os.fdopen(descriptor, "wb") as file:
                    yield file
                    file.flush()
                    os.fsync(file.fileno())
                # A link fails where a rename would replace.
                os.link(partial, final)
            finally:
                partial.unlink(missing_ok=True)
            self._sync_folder()
        except FileExistsError:
            raise ConflictError(f"{name} is already stored") from None
        except OSError as err:
            raise UnavailableError(f"the backup store cannot be written: {err.strerror}") from err

    def replace(self, name: str, data: bytes) -> None:
        """
        Put *data* in the place of a small object: it is the old one or the new one, never a mix.

        Raises:
            UnavailableError: The disk is full or gone; the old object stays.
        """
        final = self._path(name)
        partial = self._folder / f"{_PARTIAL}{secrets.token_hex(8)}"
        try:
            descriptor = os.open(partial, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(final)
            self._sync_folder()
        except OSError as err:
            partial.unlink(missing_ok=True)
            raise UnavailableError(f"the backup store cannot be written: {err.strerror}") from err

    def overwrite_head(self, name: str, data: bytes) -> None:
        """Write *data* over the beginning of an object; a kill may leave a mix: see `archive`."""
        try:
            descriptor = os.open(self._path(name), os.O_WRONLY | os.O_NOFOLLOW)
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        except OSError as err:
            raise UnavailableError(f"the backup store cannot be written: {err.strerror}") from err

    @contextmanager
    def open(self, name: str) -> Iterator[BinaryIO]:
        """
        Read an object.

        Raises:
            NotFoundError: No such object.
            BackupDamagedError: A link, device or pipe lies in its place.
        """
        try:
            # O_NONBLOCK: a pipe put in the place of a backup must not block us for ever.
            descriptor = os.open(self._path(name), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        except FileNotFoundError:
            raise NotFoundError(f"{name} is not in the backup store") from None
        except OSError as err:
            raise BackupDamagedError(f"{name} is no plain file: {err.strerror}") from None
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise BackupDamagedError(f"{name} is no plain file")
        with os.fdopen(descriptor, "rb") as file:
            yield file

    def read(self, name: str, limit_bytes: int) -> bytes:
        """Read a small object whole."""
        with self.open(name) as file:
            return file.read(limit_bytes)

    def names(self, prefix: str, suffix: str) -> list[str]:
        """
        List the whole objects with this prefix and suffix, sorted.

        Raises:
            UnavailableError: The folder is there and cannot be read.
        """
        try:
            with os.scandir(self._folder) as entries:
                found = [entry.name for entry in entries]
        except FileNotFoundError:
            return []
        except OSError as err:
            raise UnavailableError(f"the backup store cannot be read: {err.strerror}") from err
        return sorted(n for n in found if n.startswith(prefix) and n.endswith(suffix))

    def size(self, name: str) -> int:
        with self.open(name) as file:
            return os.fstat(file.fileno()).st_size

    def delete(self, name: str) -> None:
        """Remove an object; one that is gone already is no error."""
        with suppress(FileNotFoundError):
            self._path(name).unlink()
            self._sync_folder()

    def sweep(self) -> int:
        """Remove what killed writers left half-written; return how many."""
        left = self.names(_PARTIAL, "")
        for name in left:
            (self._folder / name).unlink(missing_ok=True)
        return len(left)

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
