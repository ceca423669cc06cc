"""
Programs of PostgreSQL and pgBackRest, run as the account that owns a cluster.

They get of our environment only where programs lie and what the time zone is: the account may
read the environment of its own processes, and the keys of the service are not for it to know.
"""

import os
import re
import secrets
import shutil
import signal
import subprocess
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO, Final

from backend.errors import ConfigurationError, UnavailableError

_PASSED_ON: Final = ("PATH", "TZ")
_READ_BYTES: Final = 64 * 1024
_ERROR_BYTES: Final = 64 * 1024
_SAID_CHARS: Final = 200
_LEAVE_SECONDS: Final = 10
# Of pgBackRest a warning may come first; PostgreSQL's programs name themselves instead.
_TOLD: Final = re.compile(r"ERROR: \[\d{3}\]: |FATAL: |[a-z_]+: error: ")


@dataclass(frozen=True, slots=True)
class Account:
    """A user of the system, by number."""

    uid: int
    gid: int

    @classmethod
    def owning(cls, folder: Path) -> "Account":
        """
        Return who owns *folder*.

        Raises:
            ConfigurationError: It cannot be read, or we may not act as its owner.
        """
        try:
            found = folder.stat()
        except OSError as err:
            raise ConfigurationError(f"{folder} cannot be used: {err.strerror}") from None
        if found.st_uid == 0:
            raise ConfigurationError(f"{folder} belongs to root, and PostgreSQL never runs as root")
        if os.geteuid() not in (0, found.st_uid):
            raise ConfigurationError(f"only root and the owner of {folder} can drive its cluster")
        return cls(found.st_uid, found.st_gid)

    def make_folder(self, path: Path, *, exist_ok: bool = False) -> None:
        """
        Make a folder that the account alone may enter.

        Raises:
            UnavailableError: The disk is full or gone, or the folder may not be made.
        """
        try:
            path.mkdir(mode=0o700, exist_ok=exist_ok)
            if not path.is_symlink() and path.stat().st_uid != self.uid:
                os.chown(path, self.uid, self.gid, follow_symlinks=False)
        except OSError as err:
            raise UnavailableError(f"{path} cannot be made: {err.strerror}") from err

    def write(self, path: Path, data: bytes) -> None:
        """
        Write a file that the account alone may read: the old one or the new one, never a mix.

        Raises:
            UnavailableError: The disk is full or gone.
        """
        partial = path.with_name(f".{path.name}-{secrets.token_hex(4)}")
        try:
            flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW
            with os.fdopen(os.open(partial, flags, 0o600), "wb") as file:
                if os.geteuid() == 0:
                    os.fchown(file.fileno(), self.uid, self.gid)
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
            sync_folder(path.parent)
        except OSError as err:
            partial.unlink(missing_ok=True)
            raise UnavailableError(f"{path} cannot be written: {err.strerror}") from err

    def copy_tree(self, source: Path, into: Path) -> None:
        """
        Copy what is in a folder of the account into another one, durably.

        Raises:
            UnavailableError: There is no room for it.
        """
        # Where the file system can share blocks between files, it costs next to nothing.
        copy = ["cp", "-a", "--reflink=auto", "-T", "--", str(source), str(into)]
        for command in (copy, ["sync", "-f", str(into)]):
            done = self.run(command)
            if done.code != 0:
                raise UnavailableError(f"{source} cannot be copied: {done.said()}")

    def start(
        self,
        command: Sequence[str],
        *,
        environment: Mapping[str, str] | None = None,
        last_signal: str = "TERM",
        out: int | IO[bytes] = subprocess.PIPE,
    ) -> "subprocess.Popen[bytes]":
        """
        Start a program as the account; it gets *last_signal* should this thread be killed.

        Raises:
            UnavailableError: It is not on this machine.
        """
        if shutil.which(command[0]) is None:
            raise UnavailableError(f"{Path(command[0]).name} is not on this machine")
        as_root = os.geteuid() == 0
        try:
            return subprocess.Popen(
                [*_tied_to_us(last_signal), *command],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.PIPE if out == subprocess.PIPE else subprocess.STDOUT,
                env=plain_environment() if environment is None else dict(environment),
                # The account may not be able to enter our folder.
                cwd="/",
                # A Ctrl-C is for us: we end it in good order.
                start_new_session=True,
                user=self.uid if as_root else None,
                group=self.gid if as_root else None,
                extra_groups=[] if as_root else None,
            )
        except OSError as err:
            raise UnavailableError(f"{command[0]} cannot be run: {err.strerror}") from None

    def run(
        self,
        command: Sequence[str],
        *,
        environment: Mapping[str, str] | None = None,
        take: Callable[[bytes], object] | None = None,
        limit_bytes: int = 16 * 1024 * 1024,
    ) -> "Outcome":
        """
        Run a program to its end, and end it if we are interrupted.

        Args:
            take: Gets the output as it comes; without it the output is in what is returned.
            limit_bytes: How much of it that may be.

        Raises:
            UnavailableError: It is not on this machine, or does not stop talking.
        """
        output = bytearray()

        def keep(data: bytes) -> None:
            output.extend(data)
            if len(output) > limit_bytes:
                raise UnavailableError(f"{Path(command[0]).name} answers more than is sensible")

        with self.start(command, environment=environment) as process:
            try:
                errors = _pump(process, take or keep)
            except BaseException:
                _end(process)
                raise
        return Outcome(process.returncode, bytes(output), errors)


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a program ended, what it printed, and what it complained about."""

    code: int
    output: bytes
    errors: str

    def said(self, secret: str = "") -> str:
        """Return the first line of its complaint, without *secret* and what cannot be printed."""
        lines = [line for line in self.errors.splitlines() if line.strip()]
        line = next((found for found in lines if _TOLD.match(found)), (lines or ["no words"])[0])
        line = _TOLD.sub("", line).strip()
        clean = line.replace(secret, "***") if secret else line
        return "".join(c for c in clean if c.isprintable() and c != "\N{REPLACEMENT CHARACTER}")[
            :_SAID_CHARS
        ]


def sync_folder(folder: Path) -> None:
    """Make the names in *folder* durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def plain_environment() -> dict[str, str]:
    """Return what a program gets to know of our environment."""
    passed_on = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
    # What the programs say is parsed, so it must be said in English.
    return {**passed_on, "LC_ALL": "C"}


def _pump(process: "subprocess.Popen[bytes]", take: Callable[[bytes], object]) -> str:
    """Hand on what *process* prints until it ends; return the beginning of its complaints."""
    errors = bytearray()

    def collect() -> None:
        # Read to the end, for a full pipe would block the process.
        while process.stderr and (data := process.stderr.read1(_READ_BYTES)):  # type: ignore[attr-defined] # a buffered reader
            errors.extend(data[: _ERROR_BYTES - len(errors)])

    thread = threading.Thread(target=collect, daemon=True)
    thread.start()
    if process.stdout is not None:
        while data := process.stdout.read1(_READ_BYTES):  # type: ignore[attr-defined] # a buffered reader
            take(data)
    process.wait()
    thread.join(timeout=_LEAVE_SECONDS)
    return errors.decode(errors="replace")


def _end(process: "subprocess.Popen[bytes]") -> None:
    """End a program, and those that it has started itself."""
    for last in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, last)
        with suppress(subprocess.TimeoutExpired):
            process.wait(_LEAVE_SECONDS)
            return


@lru_cache(maxsize=4)
def _tied_to_us(last_signal: str) -> tuple[str, ...]:
    """
    Return what to put before a command so that it does not outlive us.

    A restore that goes on alone would write into a folder that the next start clears away. Python
    could ask the kernel for this only between fork and exec, where a program with threads must
    not run Python.
    """
    found = shutil.which("setpriv")
    if found is None:
        return ()
    prefix = (found, "--pdeathsig", last_signal, "--")
    tried = subprocess.run([*prefix, "true"], capture_output=True, check=False)
    return prefix if tried.returncode == 0 else ()
