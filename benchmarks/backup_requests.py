"""How long a light request takes while long work goes on in the service, beside an idle one."""

import http.client
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any, Final

from benchmarks.backup_contenders import Source, in_installation
from benchmarks.processes import ROOT

ROUNDS: Final = 3
A_SECOND: Final = 50
IDLE_SECONDS: Final = 15
_WARM_UP_SECONDS: Final = 2
_START_SECONDS: Final = 60
_STOP_SECONDS: Final = 30


@dataclass
class Waits:
    """Milliseconds of the slowest hundredth and of the median request, a value per round."""

    p99: list[float] = field(default_factory=list)
    median: list[float] = field(default_factory=list)

    def add(self, taken: list[float]) -> None:
        self.p99.append(statistics.quantiles(taken, n=100, method="inclusive")[-1])
        self.median.append(statistics.median(taken))


def wait_times(
    source: Source,
    people: Mapping[str, Any] | None = None,
    *,
    busy: str = "backup",
    before_each: Callable[[], None] = lambda: None,
) -> dict[str, Waits]:
    """
    Ask one person's consents at a steady rate, `idle` and beside the work *busy*, in turn.

    Args:
        people: A person with consents, and tokens; made where they are not given.
        busy: `backup` or `retention`.
        before_each: Called before that work.
    """
    found = {"idle": Waits(), busy: Waits()}
    home, data = source.home, source.data
    people = people or in_installation(home, data, {"task": "sign_in"})
    with _serving(source) as port:
        order = {
            "port": port,
            "path": f"/security/data/consent/{people['user_id']}",
            "token": people["token"],
            "a_second": A_SECOND,
        }
        alone = order | {"seconds": _WARM_UP_SECONDS}
        home.run("backup_client.py", data=data, order=alone)
        for _ in range(ROUNDS):
            for state, more in (
                ("idle", {"seconds": IDLE_SECONDS}),
                (busy, {"admin_token": people["admin_token"], "work": busy}),
            ):
                if state == busy:
                    before_each()
                said = home.run("backup_client.py", data=data, order=order | more)
                found[state].add(said["milliseconds"])
    return found


@contextmanager
def _serving(source: Source) -> Iterator[int]:
    """
    Run the service on a free port, on every core, and end it by its own id.

    `benchmarks.processes.serving` holds a server to one core, and a backup would share it.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    environment = source.home.environment(source.data, PORT=str(port))
    with (source.home.folder / "server.log").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, ROOT / "main.py"],
            env=environment, cwd=source.home.folder, stdout=log, stderr=log,
        )  # fmt: skip
    try:
        _wait_until_healthy(process, port)
        yield port
    finally:
        process.terminate()
        try:
            process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_until_healthy(process: Any, port: int) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=_START_SECONDS)
        try:
            connection.request("GET", "/healthz")
            if connection.getresponse().status == HTTPStatus.OK:
                return
        except OSError:
            time.sleep(0.02)
        finally:
            connection.close()
    raise RuntimeError("the server did not become healthy")
