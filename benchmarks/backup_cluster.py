"""PostgreSQL clusters of our own on loopback, with the durable settings that it comes with."""

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import psycopg

from benchmarks.processes import psutil

_NOBODY: Final = 65534
_START_SECONDS: Final = 300
_STOP_SECONDS: Final = 120
# pgBackRest needs an archive, which only a start can turn on. Whoever takes no part in it is not
# to pay for it: their log goes nowhere, at the cost of a process for each 16 MiB.
_ARCHIVING: Final = {"archive_mode": "on"}
NO_ARCHIVE: Final = "/bin/true"


@dataclass(frozen=True)
class Cluster:
    """A server that runs, its data folder, and who may read that."""

    data: Path
    port: int
    tools: Path
    user: Mapping[str, Any]
    environment: Mapping[str, str]
    process: subprocess.Popen[bytes]

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def folder(self) -> Path:
        """Holds the data folder and the socket; its owner may write there."""
        return self.data.parent

    def url(self, name: str) -> str:
        return f"postgresql://postgres@127.0.0.1:{self.port}/{name}"

    def run(self, statement: str, name: str = "postgres") -> list[tuple[Any, ...]]:
        with psycopg.connect(self.url(name), autocommit=True) as connection:
            cursor = connection.execute(statement.encode())
            return cursor.fetchall() if cursor.description else []

    def archive_with(self, command: str) -> None:
        """Have finished segments of the log archived by *command* from now on."""
        self.run(f"ALTER SYSTEM SET archive_command = '{command}'")
        self.run("SELECT pg_reload_conf()")

    def cpu_seconds(self) -> float:
        """CPU time so far of the server's processes: those that run, and those it has reaped."""
        first = psutil.Process(self.pid)
        total = 0.0
        for process in (first, *first.children(recursive=True)):
            with suppress(psutil.NoSuchProcess):
                times = process.cpu_times()
                total += times.user + times.system + times.children_user + times.children_system
        return total


@contextmanager
def new_cluster(
    tools: Path, environment_in: Callable[[Path], Mapping[str, str]]
) -> Iterator[Cluster]:
    """
    Make a cluster and run it; it and everything in its folder are gone at the end.

    Args:
        environment_in: Returns what `archive_command` is to find in its environment; is given
            the cluster's folder.
    """
    folder = Path(tempfile.mkdtemp(prefix="holdfast-pg-"))
    user = _owner(folder)
    try:
        data = folder / "data"
        subprocess.run(
            [tools / "initdb", "-D", data, "-U", "postgres", "-A", "trust", "--no-sync"],
            check=True, capture_output=True, cwd="/", **user,
        )  # fmt: skip
        (data / "postgresql.auto.conf").write_text(f"archive_command = '{NO_ARCHIVE}'\n")
        with running(data, tools, user, environment_in(folder), _ARCHIVING) as cluster:
            yield cluster
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def running(
    data: Path,
    tools: Path,
    user: Mapping[str, Any],
    environment: Mapping[str, str],
    more_options: Mapping[str, str],
) -> Iterator[Cluster]:
    """Run the cluster in *data* on a free port until the block ends; wait until it answers."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = {
        "listen_addresses": "127.0.0.1",
        "port": port,
        "unix_socket_directories": data.parent,
        **more_options,
    }
    with (data.parent / "server.log").open("ab") as log:
        process = subprocess.Popen(
            [tools / "postgres", "-D", data, *(f"--{name}={o}" for name, o in options.items())],
            stdout=log, stderr=log, cwd="/", env={**os.environ, **environment}, **user,
        )  # fmt: skip
    cluster = Cluster(data, port, tools, user, environment, process)
    try:
        _wait_for(cluster)
        yield cluster
    finally:
        # At once: who is connected is cut off, and the files are in order.
        process.send_signal(signal.SIGINT)
        try:
            process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _owner(folder: Path) -> Mapping[str, Any]:
    # PostgreSQL and pgBackRest refuse root.
    if os.getuid() != 0:
        return {}
    os.chown(folder, _NOBODY, _NOBODY)
    return {"user": _NOBODY, "group": _NOBODY, "extra_groups": []}


def _wait_for(cluster: Cluster) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while True:
        try:
            cluster.run("SELECT 1")
        except psycopg.OperationalError:
            if cluster.process.poll() is not None or time.monotonic() > deadline:
                said = (cluster.folder / "server.log").read_text(errors="replace")[-1_000:]
                raise RuntimeError(f"the PostgreSQL server did not start: {said}") from None
            time.sleep(0.02)
        else:
            return
