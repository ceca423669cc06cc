"""What a data directory tells of its server: whether it runs, how it was started, its version."""

import os
import re
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from backend.errors import ConfigurationError, UnavailableError

_LOCK_FILE_LINES: Final = 8
# Set for one start by what did it.
_OF_ONE_START: Final = ("PG_GRANDPARENT_PID", "PGDATA", "NOTIFY_SOCKET", "INVOCATION_ID")


@dataclass(frozen=True, slots=True)
class Postmaster:
    """A running server; *state* is `starting`, `ready`, `standby` or `stopping`."""

    pid: int
    port: str
    socket_folder: str
    state: str


@dataclass(frozen=True, slots=True)
class RunOptions:
    """How a server was started, so that it can be started so again; without `-D`."""

    program: str
    arguments: Sequence[str] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    log: str = os.devnull


def postmaster_of(data: Path) -> Postmaster | None:
    """Return the server that runs on *data*, if one does; a lock file left over is none."""
    try:
        lines = (data / "postmaster.pid").read_text(errors="replace").splitlines()
        pid = int(lines[0])
        # The number alone may be another program's by now; a server sits in its directory.
        if not (Path("/proc") / str(pid) / "cwd").samefile(data):
            return None
    except (OSError, ValueError, IndexError):
        return None
    lines += [""] * (_LOCK_FILE_LINES - len(lines))
    return Postmaster(pid, lines[3], lines[4], lines[7].strip())


def is_starting(data: Path) -> bool:
    """Whether a program is about to run a server on *data*, which has no lock file yet."""
    return postmaster_of(data) is None and _runs(rb"", data) and postmaster_of(data) is None


def is_told(data: Path) -> bool:
    """Whether `pg_ctl` is at work on *data*."""
    return _runs(rb"\bpg_ctl\0.*", data)


def _runs(words: bytes, data: Path) -> bool:
    """Whether some program was started with *words* and `-D`, by itself or through a shell."""
    directory = re.escape(os.fsencode(data))
    command = re.compile(words + rb'-D[\0 ]"?' + directory + rb'["\0]', re.DOTALL)
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if command.search((process / "cmdline").read_bytes()):
                return True
    return False


def run_options(data: Path) -> RunOptions:
    """
    Find out how the server of *data* runs, or ran last.

    Raises:
        UnavailableError: It never ran, and PostgreSQL is not on this machine.
    """
    try:
        line = (data / "postmaster.opts").read_text(errors="surrogateescape").strip()
    except FileNotFoundError:
        return RunOptions(_find_server(version_of(data)))
    # PostgreSQL puts each argument between quotes, and escapes none.
    program, _, arguments = line.partition(' "')
    given = arguments.removesuffix('"').split('" "') if arguments else []
    server = postmaster_of(data)
    environment, log = _surroundings(server.pid) if server else ({}, os.devnull)
    return RunOptions(program, _without_directory(given), environment, log)


def version_of(data: Path) -> int:
    """
    Return the major version of a data directory.

    Raises:
        ConfigurationError: It is none.
    """
    try:
        return int((data / "PG_VERSION").read_text(encoding="ascii").partition(".")[0])
    except (OSError, ValueError):
        raise ConfigurationError(f"{data} is no data directory of PostgreSQL") from None


def _surroundings(pid: int) -> tuple[dict[str, str], str]:
    """Return the environment of a process, and the file that it complains to."""
    process = Path("/proc") / str(pid)
    try:
        entries = os.fsdecode((process / "environ").read_bytes()).split("\0")
        written_to = (process / "fd/2").resolve(strict=True)
    except OSError:
        return {}, os.devnull
    pairs = (entry.partition("=") for entry in entries if entry)
    environment = {name: value for name, _, value in pairs if name not in _OF_ONE_START}
    return environment, str(written_to) if written_to.is_file() else os.devnull


def _without_directory(arguments: list[str]) -> list[str]:
    """Drop `-D`: it may be relative to a folder that nobody knows any more."""
    kept = list(arguments)
    with suppress(ValueError):
        at = kept.index("-D")
        del kept[at : at + 2]
    return [argument for argument in kept if not argument.startswith("-D")]


def _find_server(version: int) -> str:
    usual = Path("/usr/lib/postgresql") / str(version) / "bin/postgres"
    found = str(usual) if usual.exists() else shutil.which("postgres")
    if found is None:
        raise UnavailableError(f"PostgreSQL {version} is not on this machine")
    return found
