"""Carrying the bytes of a backup, in a process of its own where there are many of them."""

import base64
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, Final, Self

import structlog

from backend import errors
from backend.backup.archive import Report, Stored, Written, read_archive, write_archive
from backend.backup.stores import StoreAddress, open_store
from backend.crypto.files import PayloadKey
from backend.errors import HoldfastError, UnavailableError
from backend.services import transfer_worker
from backend.services.transfer_worker import READ_BYTES, WHOLE
from backend.settings import Settings

log = structlog.get_logger(__name__)
_ROOT: Final = Path(__file__).resolve().parents[2]
# A process takes longer to start than this takes to carry.
SMALL_BYTES: Final = 8 * 1024 * 1024
_END_SECONDS: Final = 10


# How much is done, and of about how much.
Progress = Callable[[int, int], None]


def ignore(_done: int, _total: int) -> None:
    """Report nothing."""


def only_forward(progress: Progress) -> Progress:
    """Some engines read a dump twice; that is told once."""
    most = 0

    def tell(done: int, total: int) -> None:
        nonlocal most
        if done > most:
            most = done
            progress(done, total)

    return tell


class TransferService:
    """Writes and reads archives; see `backend.backup.archive` for what they are."""

    def write(
        self,
        address: StoreAddress,
        name: str,
        source: BinaryIO,
        key: PayloadKey,
        *,
        size_bytes: int,
        require_whole: Callable[[], None],
        report: Report,
        keep_open: tuple[int, ...] = (),
    ) -> Written:
        """
        Store what *source* yields under *name*.

        Args:
            size_bytes: About how much it is.
            require_whole: Called at its end and before the archive's: raises unless all came.
            report: Told how many bytes were taken, now and then.
            keep_open: Descriptors of locks that last as long as the process that carries.

        Raises:
            UnavailableError: The store cannot be written, or the process was ended.
        """
        if size_bytes < SMALL_BYTES:

            def plain() -> Iterator[bytes]:
                yield from iter(lambda: source.read(READ_BYTES), b"")
                require_whole()

            return write_archive(open_store(address), name, plain(), key, report)
        job = {"kind": "write", "name": name}
        with _Worker(job, address, key, source, keep_open) as worker:
            done = worker.result(report, require_whole)
        try:
            return Written(done["plain"], done["size"], done["sha256"])
        except KeyError:
            raise _nonsense() from None

    def read(
        self,
        address: StoreAddress,
        stored: Stored,
        target: BinaryIO,
        key: PayloadKey,
        *,
        report: Report,
        keep_open: tuple[int, ...] = (),
    ) -> None:
        """
        Write to *target* what was backed up. Only when this returns was all of it right.

        Raises:
            BackupDamagedError: It is not what the manifest says.
            CryptoError: The payload does not open.
            BrokenPipeError: Who reads *target* takes no more.
            UnavailableError: The store cannot be read, or the process was ended.
        """
        if stored.plain_bytes < SMALL_BYTES:
            read_archive(open_store(address), stored, key, target.write, report)
            target.flush()
            return
        job = {"kind": "read", "stored": asdict(stored)}
        with _Worker(job, address, key, target, keep_open) as worker:
            worker.result(report, lambda: None)


class _Worker:
    """The process that does one job; it ends with the block."""

    def __init__(
        self,
        job: dict[str, Any],
        address: StoreAddress,
        key: PayloadKey,
        file: BinaryIO,
        keep_open: tuple[int, ...],
    ) -> None:
        descriptor = file.fileno()
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", transfer_worker.__name__],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=_ROOT,
                pass_fds=(descriptor, *keep_open), env=_environment(),
            )  # fmt: skip
        except OSError as err:
            raise UnavailableError(
                f"the process that carries the backup cannot be started: {err.strerror}"
            ) from err
        # Over the pipe: what a process is started with, everybody can read.
        self._tell(
            json.dumps(
                job
                | {
                    "descriptor": descriptor,
                    "store": asdict(address),
                    "data_key": base64.b64encode(key.data_key).decode(),
                    "context": base64.b64encode(key.context).decode(),
                }
            )
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(BrokenPipeError):
            self._process.stdin.close()  # type: ignore[union-attr] # it is a pipe
        try:
            self._process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()  # type: ignore[union-attr] # it is a pipe

    def result(self, report: Report, require_whole: Callable[[], None]) -> dict[str, Any]:
        """Wait for the end of the job, answering what the worker asks."""
        failed: BaseException | None = None
        for line in self._process.stdout or ():
            said = _parse(line)
            if "bytes" in said:
                report(said["bytes"])
            elif "eof" in said:
                try:
                    require_whole()
                except HoldfastError as err:
                    failed = err
                self._tell("failed" if failed else WHOLE)
            elif "done" in said:
                return said["done"] or {}
            elif failed is None:
                failed = _as_error(said)
        raise failed or UnavailableError("the process that carries the backup was ended")

    def _tell(self, line: str) -> None:
        # One that died already is noticed by what it does not answer.
        with suppress(BrokenPipeError):
            print(line, file=self._process.stdin, flush=True)


def _environment() -> dict[str, str]:
    """Ours without our keys and passwords; what S3 clients read stays."""
    ours = {name.upper() for name in Settings.model_fields if not name.startswith("aws_")}
    kept = {name: value for name, value in os.environ.items() if name.upper() not in ours}
    return kept | {"PYTHONPATH": str(_ROOT)}


def _parse(line: str) -> dict[str, Any]:
    """Read what the process says; a library there may talk, too."""
    try:
        said = json.loads(line)
    except ValueError:
        raise _nonsense() from None
    if not isinstance(said, dict):
        raise _nonsense()
    return said


def _nonsense() -> UnavailableError:
    return UnavailableError("the process that carries the backup talks nonsense")


def _as_error(said: dict[str, Any]) -> Exception:
    if "broken_pipe" in said:
        return BrokenPipeError()
    if not {"error", "detail"} <= said.keys():
        return _nonsense()
    kind = getattr(errors, said["error"], UnavailableError)
    return kind(said["detail"])


@lru_cache(maxsize=1)
def get_transfer_service() -> TransferService:
    return TransferService()
