"""The real commands as processes, which can be looked at, stopped and killed at any act."""

import json
import os
import random
import re
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest

ROOT: Final = Path(__file__).resolve().parents[2]
WORKER: Final = "transfer_worker"
# So often an act is killed by chance on each of `WAYS`, and once more surely. Each run of the suite
# has other points; `KILLS=20` makes twenty on each engine in one run.
KILLS: Final = int(os.environ.get("KILLS", "2"))
# On which engine, and whether the bytes are carried by a process of their own.
WAYS: Final = [("sqlite", False), ("postgresql", True)]
# Bounds what never comes; how long a busy machine takes decides nothing.
_PATIENCE_SECONDS: Final = 60


@dataclass(frozen=True)
class Ended:
    """How a command ended: its exit code, or the signal as a negative number; and its words."""

    code: int
    said: str
    seconds: float

    @property
    def killed(self) -> bool:
        return self.code == -signal.SIGKILL

    @property
    def acts(self) -> int:
        """How many acts it did, where they were counted."""
        found = re.search(r"^acts: (\d+)$", self.said, re.MULTILINE)
        assert found, self.said
        return int(found[1])


@dataclass
class Commands:
    """Runs `db_cli.py`, one command at a time."""

    _process: "subprocess.Popen[str]"
    _output: Path
    _started: float = 0

    def run(self, *arguments: str, **how: Any) -> Ended:
        """Run a command to its end, which must be good."""
        ended = self.end(*arguments, **how)
        assert ended.code == 0, ended
        return ended

    def end(self, *arguments: str, **how: Any) -> Ended:
        """Run a command to whatever end."""
        self.start(*arguments, **how)
        return self.wait()

    def start(
        self,
        *arguments: str,
        carried: bool | None = None,
        at_act: int = 0,
        at_path: tuple[str, ...] = (),
        watched: bool = False,
        **environment: str,
    ) -> int:
        """
        Start a command and return its process id.

        Args:
            carried: Whether the bytes of every backup are carried by a process of their own; by
                default it is as always.
            at_act: Kill it before this act of it; see `command_starter`.
            at_path: Kill it before the last of these acts, which come one after the other.
            watched: Count its acts.
        """
        assert self._process.stdin is not None
        command = {
            "environment": {**os.environ, "LOG_LEVEL": "INFO", **environment},
            "arguments": arguments,
            "output": str(self._output),
            "carried": carried,
            "at_act": at_act,
            "at_path": at_path,
            "watched": bool(watched or at_act or at_path),
        }
        print(json.dumps(command), file=self._process.stdin, flush=True)
        self._started = time.perf_counter()
        return self.answer()

    def wait(self) -> Ended:
        """Wait for the end of what was started."""
        code = os.waitstatus_to_exitcode(self.answer())
        seconds = time.perf_counter() - self._started
        return Ended(code, self._output.read_text(errors="replace"), seconds)

    def kill(
        self, *arguments: str, after: float = 60, at: Callable[[], object] | None = None, **how: Any
    ) -> Ended:
        """
        Kill a command after so many seconds or, if that is earlier, once *at* holds.

        A busy machine may look only when the command has ended, so nothing may hang on where it
        was killed, or whether; `at_path` kills it at a known point.
        """
        process = self.start(*arguments, **how)
        end = time.perf_counter() + after
        while time.perf_counter() < end and is_running(process) and not (at and at()):
            time.sleep(0.0005)
        if is_running(process):
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        return self.wait()

    def answer(self) -> int:
        assert self._process.stdout is not None
        return int(self._process.stdout.readline())


@contextmanager
def running_commands(folder: Path) -> Iterator[Commands]:
    """Start what commands are forked from, in an empty folder: no `.env` may reach them."""
    with subprocess.Popen(
        [sys.executable, "-m", "tests.backup.command_starter"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=folder,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)},
    ) as process:  # fmt: skip
        commands = Commands(process, folder / "output")
        # It has imported everything: what follows is the command alone.
        assert commands.answer() == 0
        yield commands
        assert process.stdin is not None
        process.stdin.close()


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    with running_commands(tmp_path_factory.mktemp("commands")) as commands:
        yield commands


def children(process: int) -> list[int]:
    """The processes that a process has started and that still run."""
    found = []
    with suppress(FileNotFoundError, ProcessLookupError):
        for task in Path(f"/proc/{process}/task").iterdir():
            found += [int(child) for child in (task / "children").read_text().split()]
    return found


def wait_for_child(process: int, program: str) -> int:
    """Wait until a process has started *program*; return its process id, with it stopped."""
    end = time.monotonic() + _PATIENCE_SECONDS
    while time.monotonic() < end:
        for child in children(process):
            with suppress(FileNotFoundError, ProcessLookupError):
                if program in Path(f"/proc/{child}/cmdline").read_text():
                    os.kill(child, signal.SIGSTOP)
                    return child
        time.sleep(0.0005)
    raise AssertionError(f"{program} was never started")


def wait_until(holds: Callable[[], object]) -> None:
    end = time.monotonic() + _PATIENCE_SECONDS
    while not holds():
        assert time.monotonic() < end, "it never came to be"
        time.sleep(0.002)


def is_running(process: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def killed_at_random(commands: Commands, *arguments: str, **how: Any) -> Iterator[Ended]:
    """
    Kill a command again and again, before acts and at times that chance gives.

    It is run whole once before, for how much there is of it. The seed of chance is printed, and
    `KILL_SEED` sets it.
    """
    seed = os.environ.get("KILL_SEED") or secrets.token_hex(4)
    sys.stdout.write(f"KILL_SEED={seed}\n")
    chance = random.Random(seed)  # noqa: S311 - nothing secret
    whole = commands.run(*arguments, watched=True, **how)
    for number in range(KILLS):
        if number % 2:
            yield commands.kill(*arguments, after=chance.uniform(0, whole.seconds), **how)
        else:
            yield commands.end(*arguments, at_act=chance.randint(1, whole.acts), **how)
