"""What commands cost: wall and CPU time until what they wrote is durable, and the most memory."""

import os
import resource
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Final, Protocol, Self

from benchmarks.processes import MIB, psutil

# Often enough to see a second's peak, and rare enough to cost a hundredth of a core.
_LOOK_SECONDS: Final = 0.15
_FIRST_LOOK_SECONDS: Final = 0.01
# A tool that hangs must not hang the measurement.
_PATIENCE_SECONDS: Final = 900
_SAID_BYTES: Final = 2_000
_PEAK: Final = "VmHWM:"

Command = Sequence[str | Path]


class Watched(Protocol):
    """A server whose processes are none of a tool's own."""

    @property
    def pid(self) -> int:
        """Of the one that has started all the others."""

    def cpu_seconds(self) -> float:
        """CPU time so far of all of its processes."""


@dataclass(frozen=True)
class Cost:
    """
    What one step took.

    CPU seconds are those of the step's processes and of the servers. Memory is that of the
    step's processes: of the largest one, and of all together with shared pages counted once.
    """

    seconds: float
    cpu_seconds: float
    largest_mib: float
    together_mib: float

    def document(self) -> dict[str, float]:
        return asdict(self)


@dataclass(frozen=True)
class Place:
    """Where commands run: folder, environment, and user where that is another than ours."""

    folder: Path
    environment: Mapping[str, str] = field(default_factory=dict)
    user: Mapping[str, Any] = field(default_factory=dict)

    def run(
        self, *commands: Command, source: Path | None = None, target: Path | None = None
    ) -> str:
        """
        Run commands, each reading what the one before writes, to their end.

        Args:
            source: What the first reads; nothing by default.
            target: A file for what the last writes; by default it is returned.

        Raises:
            RuntimeError: One of them failed; says what they wrote to stderr.
        """
        started: list[subprocess.Popen[bytes]] = []
        with ExitStack() as files:
            errors = files.enter_context(tempfile.TemporaryFile())
            into = files.enter_context(target.open("wb")) if target else subprocess.PIPE
            given: Any = files.enter_context(source.open("rb")) if source else subprocess.DEVNULL
            try:
                for command in commands:
                    out = into if command is commands[-1] else subprocess.PIPE
                    started.append(self._start(command, given, out, errors))
                    if len(started) > 1:
                        # Only the reader may hold it, or its end would go unnoticed.
                        given.close()
                    given = started[-1].stdout
                said = started[-1].communicate(timeout=_PATIENCE_SECONDS)[0] or b""
                codes = [process.wait(_PATIENCE_SECONDS) for process in started]
            except BaseException:
                for process in started:
                    _end(process)
                raise
            errors.seek(0)
            if any(codes):
                words = errors.read(_SAID_BYTES).decode(errors="replace")
                raise RuntimeError(f"{commands[0][0]} and what reads it ended as {codes}: {words}")
        return said.decode()

    def _start(
        self, command: Command, given: Any, out: int | IO[bytes], errors: IO[bytes]
    ) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            command,
            stdin=given,
            stdout=out,
            stderr=errors,
            cwd=self.folder,
            env={"PATH": os.environ.get("PATH", ""), "LC_ALL": "C.UTF-8", **self.environment},
            # A group of its own, so that what it has started can be ended with it.
            start_new_session=True,
            **self.user,
        )


def _end(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def make_durable(path: Path) -> None:
    """Have a file, or everything in a folder, on the disk, as whoever says "done" must."""
    inside = [*path.rglob("*")] if path.is_dir() else [path]
    for one in (*inside, path if path.is_dir() else path.parent):
        if one.is_symlink() or not (one.is_file() or one.is_dir()):
            continue
        descriptor = os.open(one, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def spend(step: Callable[[], object], servers: Sequence[Watched] = ()) -> Cost:
    """
    Take one step; *servers* may grow meanwhile by those that it starts.

    What earlier steps left for the disk is written first, so that this one does not wait for it.
    """
    os.sync()
    cpu, started = _cpu_seconds(servers), time.perf_counter()
    with _Watch(servers) as watch:
        step()
        seconds = time.perf_counter() - started
    return Cost(seconds, _cpu_seconds(servers) - cpu, watch.largest_mib, watch.together_mib)


def _cpu_seconds(servers: Sequence[Watched]) -> float:
    # Of children that have ended and theirs; servers go on, so they are asked.
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    return ended.ru_utime + ended.ru_stime + sum(server.cpu_seconds() for server in servers)


class _Watch:
    """Looks at the memory of this process's descendants but those of the servers."""

    def __init__(self, servers: Sequence[Watched]) -> None:
        self.largest_mib = 0.0
        self.together_mib = 0.0
        self._servers = servers
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look_on)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ended.set()
        self._thread.join()

    def _look_on(self) -> None:
        pause = _FIRST_LOOK_SECONDS
        while not self._ended.wait(pause):
            self._look()
            pause = min(pause * 2, _LOOK_SECONDS)

    def _look(self) -> None:
        servers = {server.pid for server in self._servers}
        together = 0.0
        for process in psutil.Process().children():
            if process.pid in servers:
                continue
            with suppress(psutil.NoSuchProcess):
                for one in (process, *process.children(recursive=True)):
                    together += self._size_mib(one)
        self.together_mib = max(self.together_mib, together)

    def _size_mib(self, process: Any) -> float:
        """Note the largest; return the size with shared pages divided among their users."""
        with suppress(psutil.NoSuchProcess, psutil.AccessDenied, OSError):
            resident = process.memory_info().rss / MIB
            self.largest_mib = max(self.largest_mib, _peak_mib(process.pid) or resident)
            return float(getattr(process.memory_full_info(), "pss", 0)) / MIB or float(resident)
        return 0.0


def _peak_mib(pid: int) -> float:
    """The most that a process has held so far; 0 where the system does not say."""
    status = Path(f"/proc/{pid}/status")
    lines = status.read_text("ascii", "replace").splitlines() if status.exists() else []
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith(_PEAK)), 0.0)
