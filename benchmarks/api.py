"""The service against a bare FastAPI and SQLAlchemy app: start, memory, requests."""

import shutil
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any, Final

from benchmarks.processes import BENCHMARKS, ROOT, Home, Server, serving
from benchmarks.report import Aim, Figure, Report, Samples

ROUNDS: Final = 5
CONNECTIONS: Final = 16
SECONDS: Final = 3.0
_WARM_UP_SECONDS: Final = 1.0
# Until what the start left to do is done.
_SETTLE_SECONDS: Final = 1.0
_HOLDFAST: Final = "holdfast"
_BARE: Final = "bare"
_SCRIPTS: Final = {_HOLDFAST: ROOT / "main.py", _BARE: BENCHMARKS / "bare_app.py"}
_START_AND_MEMORY: Final = Aim(1.5, at_most=True)
_REQUESTS: Final = Aim(0.7, at_most=False)

Found = dict[str, dict[str, list[float]]]


def measure() -> Report:
    """Measure both apps in alternating rounds on one machine."""
    with tempfile.TemporaryDirectory(prefix="holdfast-bench-") as folder:
        home = Home.make(Path(folder))
        person = home.run("installation.py", "consents", data=_HOLDFAST)
        # The same rows in a file of its own, so that neither app waits for the other.
        (home.folder / _BARE).mkdir()
        shutil.copy(home.folder / _HOLDFAST / "holdfast.db", home.folder / _BARE)
        found: Found = defaultdict(lambda: defaultdict(list))
        _measure_starts(home, found)
        _measure_requests(home, person, found)
    return _report(found)


def _serving(home: Home, app: str) -> Any:
    url = f"sqlite:///{home.folder / app / 'holdfast.db'}"
    return serving(home, _SCRIPTS[app], app, DATABASE_URL=url)


def _measure_starts(home: Home, found: Found) -> None:
    for number in range(ROUNDS + 1):
        for app in _SCRIPTS:
            with _serving(home, app) as server:
                time.sleep(_SETTLE_SECONDS)
                # The first start compiles modules and fills the system's cache.
                if number:
                    _keep_start(server, found[app])


def _keep_start(server: Server, found: dict[str, list[float]]) -> None:
    found["start"].append(server.start_seconds * 1000)
    found["start_cpu"].append(server.start_cpu_seconds * 1000)
    for kind, mib in server.memory_mib().items():
        found[kind].append(mib)


def _measure_requests(home: Home, person: dict[str, Any], found: Found) -> None:
    path, token = f"/security/data/consent/{person['user_id']}", person["token"]
    with _serving(home, _HOLDFAST) as holdfast, _serving(home, _BARE) as bare:
        servers = {_HOLDFAST: holdfast, _BARE: bare}
        if holdfast.get(path, token) != bare.get(path, token):
            raise RuntimeError("the two apps give different answers: they cannot be compared")
        order = {"path": path, "token": token, "connections": CONNECTIONS}
        for number in range(ROUNDS + 1):
            seconds = SECONDS if number else _WARM_UP_SECONDS
            for app, server in servers.items():
                before = server.cpu_seconds()
                spent = home.run(
                    "client.py", data=app, order=order | {"port": server.port, "seconds": seconds}
                )
                cpu = server.cpu_seconds() - before
                if number:
                    found[app]["per_cpu"].append(spent["requests"] / cpu)
                    found[app]["per_second"].append(spent["requests"] / spent["seconds"])
                    found[app]["client"].append(spent["cpu_seconds"] / spent["seconds"])
        for app, server in servers.items():
            found[app]["rss_used"].append(server.memory_mib()["rss"])


def _report(found: Found) -> Report:
    figures = [
        ("Start to healthy", "ms", "start", _START_AND_MEMORY),
        ("CPU time of the start", "ms", "start_cpu", None),
        ("Idle memory, resident", "MiB", "rss", _START_AND_MEMORY),
        ("Idle memory, proportional", "MiB", "pss", None),
        ("Memory after all requests, resident", "MiB", "rss_used", None),
        ("GET consent per CPU-second", "requests", "per_cpu", _REQUESTS),
        ("GET consent per second", "requests", "per_second", _REQUESTS),
    ]
    busiest = max(found[_HOLDFAST]["client"] + found[_BARE]["client"])
    return Report(
        part="api",
        title="The service beside a bare app",
        peer="bare FastAPI + SQLAlchemy",
        figures=[
            Figure(name, unit, Samples(found[_HOLDFAST][key]), Samples(found[_BARE][key]), aim)
            for name, unit, key, aim in figures
            # Not every system tells proportional memory.
            if found[_HOLDFAST][key]
        ],
        method=(
            f"{ROUNDS} rounds, the two apps in turn; requests over {CONNECTIONS} connections for "
            f"{SECONDS:g} s a round; one process and one core each, the same rows, token, server "
            "settings and answer; Holdfast as in production, with its log"
        ),
        notes=[
            "CPU-seconds are the server's own, so other work on the machine changes them least",
            f"the load client used at most {busiest:.0%} of a core, so it was not the limit",
        ],
    )
