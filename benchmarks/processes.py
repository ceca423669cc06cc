"""Processes under measurement: their environment, their start, what they use, and their end."""

import base64
import http.client
import importlib
import json
import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from benchmarks.client import HEADERS

ROOT: Final = Path(__file__).resolve().parent.parent
BENCHMARKS: Final = ROOT / "benchmarks"
MIB: Final = 1024 * 1024
_START_SECONDS: Final = 60
_STOP_SECONDS: Final = 10
_TASK_SECONDS: Final = 900
# Loaded by name, because `make lint` checks types where only requirements-dev.txt is installed.
psutil: Any = importlib.import_module("psutil")


@dataclass(frozen=True)
class Home:
    """A folder with everything that the processes of one measurement share."""

    folder: Path
    secrets: Mapping[str, str]

    @classmethod
    def make(cls, folder: Path) -> "Home":
        return cls(
            folder,
            {
                "ENCRYPTION_KEY": base64.b64encode(os.urandom(32)).decode(),
                "JWT_SECRET_KEY": secrets.token_urlsafe(48),
            },
        )

    def environment(self, data: str, **settings: str) -> dict[str, str]:
        """Return settings for the installation *data*; none of the caller's own are passed on."""
        return {
            "PATH": os.environ.get("PATH", ""),
            "PYTHONPATH": str(ROOT),
            # As behind a proxy on this machine, for which the client stands.
            "APP_ENV": "production",
            "TRUSTED_PROXIES": "127.0.0.1",
            "DATA_DIR": str(self.folder / data),
            **self.secrets,
            **settings,
        }

    def run(self, script: str, *arguments: str, data: str, order: object = None) -> dict[str, Any]:
        """Run one of our scripts to its end and return the JSON object that it writes."""
        done = subprocess.run(
            [sys.executable, BENCHMARKS / script, *arguments],
            input=json.dumps(order),
            env=self.environment(data),
            # Not where the caller's `.env` may lie.
            cwd=self.folder,
            stdout=subprocess.PIPE,
            timeout=_TASK_SECONDS,
            text=True,
            check=True,
        )
        answer: dict[str, Any] = json.loads(done.stdout)
        return answer


@dataclass(frozen=True)
class Server:
    """A running service, and what it took to start."""

    port: int
    start_seconds: float
    start_cpu_seconds: float
    _process: Any

    def cpu_seconds(self) -> float:
        """CPU time so far, in user and kernel mode, of all threads of it and its workers."""
        return sum(_cpu_seconds(process) for process in self._all())

    def memory_mib(self) -> dict[str, float]:
        """Resident memory, and with shared pages divided among their users where that is told."""
        sizes = {"rss": sum(each.memory_info().rss for each in self._all()) / MIB}
        try:
            full = [each.memory_full_info() for each in self._all()]
        except psutil.AccessDenied:
            return sizes
        if all(hasattr(each, "pss") for each in full):
            sizes["pss"] = sum(each.pss for each in full) / MIB
        return sizes

    def _all(self) -> list[Any]:
        return [self._process, *self._process.children(recursive=True)]

    def get(self, path: str, token: str = "") -> Any:
        """Return the JSON of one answer."""
        return json.loads(_get(self.port, path, token))


@contextmanager
def serving(
    home: Home, script: Path, data: str, *, cores: int = 1, **settings: str
) -> Iterator[Server]:
    """Start *script* on a free port, wait until it is healthy, and end it by its own id."""
    port = _free_port()
    environment = home.environment(data, PORT=str(port), **settings)
    with (home.folder / "server.log").open("ab") as log:
        started = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, script], env=environment, cwd=home.folder, stdout=log, stderr=log
        )
        try:
            watched = psutil.Process(process.pid)
            _hold_to(watched, cores)
            _wait_until_healthy(process, port)
            seconds = time.perf_counter() - started
            yield Server(port, seconds, _cpu_seconds(watched), watched)
        finally:
            process.terminate()
            try:
                process.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _cpu_seconds(process: Any) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def _hold_to(process: Any, cores: int) -> None:
    # Python runs one thread at a time: spread over cores, its threads wait for each other in one
    # of two rhythms, and rounds of the same work differed by 1.6 times. macOS has no such call.
    if hasattr(process, "cpu_affinity"):
        process.cpu_affinity(process.cpu_affinity()[:cores])


def _wait_until_healthy(process: subprocess.Popen[bytes], port: int) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"the server ended with exit code {process.returncode}")
        try:
            _get(port, "/healthz")
        except OSError:
            time.sleep(0.005)
        else:
            return
    raise TimeoutError("the server did not become healthy")


def _get(port: int, path: str, token: str = "") -> bytes:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=_STOP_SECONDS)
    try:
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        connection.request("GET", path, headers=HEADERS | headers)
        answer = connection.getresponse()
        body = answer.read()
    finally:
        connection.close()
    if answer.status != http.HTTPStatus.OK:
        raise RuntimeError(f"GET {path} was answered {answer.status}")
    return body


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port
