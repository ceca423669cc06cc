"""What the service and the bare app are asked for at once, and what came of it."""

import json
import shutil
import sqlite3
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from typing import Any, Final
from urllib.parse import urlencode

from benchmarks.client import HEADERS
from benchmarks.processes import BENCHMARKS, ROOT, Home, Server, serving

HOLDFAST: Final = "holdfast"
BARE: Final = "bare"
SCRIPTS: Final = {HOLDFAST: ROOT / "main.py", BARE: BENCHMARKS / "bare_app.py"}
CONNECTIONS: Final = (1, 16, 64)
WORKERS: Final = (1, 2)
SIGN_IN, READ, WRITE = "sign-in", "consent read", "consent write"
EXPORT, SEALED = "small export", "small export, encrypted"
# How many read while as many as may be sign in.
READERS: Final = 4
READ_ALONE: Final = "consent read alone"
READ_BESIDE: Final = "consent read while others sign in"
_WARM_UP_SECONDS: Final = 1.0
# Until all workers are there, and what the start left to do is done.
_SETTLE_SECONDS: Final = 5.0
_PATIENCE_SECONDS: Final = 30


@dataclass(frozen=True)
class Person:
    """Somebody with stays and consents, who has signed in to one of the apps."""

    user_id: int
    email: str
    password: str
    token: str


Request = dict[str, Any]
# Resident MiB by workers and app.
Memory = dict[int, dict[str, float]]


def _sign_in(person: Person) -> Request:
    form = {"username": person.email, "password": person.password}
    return {"method": "POST", "path": "/auth/token", "form": form}


def _read(person: Person) -> Request:
    path = f"/security/data/consent/{person.user_id}"
    return {"method": "GET", "path": path, "token": person.token}


def _write(person: Person) -> Request:
    body = {"purpose": "marketing", "granted": True}
    return _read(person) | {"method": "POST", "json": body}


def _export(person: Person, *, encrypt: bool = False) -> Request:
    body = {"user_id": person.user_id, "format": "json", "encrypt": encrypt}
    path = "/security/data/export"
    return {"method": "POST", "path": path, "token": person.token, "json": body}


def _sealed_export(person: Person) -> Request:
    return _export(person, encrypt=True)


# Writing comes last: it makes what is read and exported longer.
REQUESTS: Final[Mapping[str, Callable[[Person], Request]]] = {
    SIGN_IN: _sign_in,
    READ: _read,
    EXPORT: _export,
    SEALED: _sealed_export,
    WRITE: _write,
}


@dataclass(frozen=True)
class Cell:
    """What was asked for, over how many connections, of how many workers."""

    what: str
    connections: int
    workers: int


@dataclass
class Load:
    """
    The figures of every cell and app, one a round.

    Attributes:
        found: By cell, app and kind: `per_cpu`, `per_second`, `p50` and `p99` in milliseconds.
        client: Shares of a core that the client took.
    """

    found: dict[Cell, dict[str, dict[str, list[float]]]] = field(default_factory=dict)
    client: list[float] = field(default_factory=list)

    def keep(self, cell: Cell, app: str, spent: Mapping[str, float], cpu: float | None) -> None:
        """
        Keep what one run of the client found.

        Args:
            cpu: Seconds that the server spent; `None` where others took part of them.

        Raises:
            RuntimeError: Some requests failed: the figures would say nothing.
        """
        if spent["failures"]:
            raise RuntimeError(f"{app}: {spent['failures']} of {spent['answers']} failed, {cell}")
        kinds = self.found.setdefault(cell, {}).setdefault(app, {})
        values = {
            "per_second": spent["answers"] / spent["seconds"],
            "p50": spent["p50_ms"],
            "p99": spent["p99_ms"],
        }
        if cpu is not None:
            values["per_cpu"] = spent["answers"] / cpu
        for kind, value in values.items():
            kinds.setdefault(kind, []).append(value)
        self.client.append(spent["cpu_seconds"] / spent["seconds"])


@dataclass(frozen=True)
class _Side:
    """One app that runs, and the people who have signed in to it."""

    home: Home
    app: str
    server: Server
    people: list[Person]

    def ask(self, what: str, connections: int, seconds: float) -> tuple[dict[str, Any], float]:
        """Return what the client found, and the CPU time that the server spent on it."""
        order = {
            "port": self.server.port,
            "connections": connections,
            "seconds": seconds,
            "requests": [REQUESTS[what](person) for person in self.people],
        }
        before = self.server.cpu_seconds()
        spent = self.home.run("client.py", data=self.app, order=order)
        return spent, self.server.cpu_seconds() - before


def run(home: Home, made: Mapping[str, Any], *, rounds: int, seconds: float) -> tuple[Load, Memory]:
    """Ask both apps in turn for everything, over few and many connections."""
    load = Load()
    memory: Memory = {}
    for workers in WORKERS:
        with _both(home, made, workers) as sides:
            _compare(sides)
            for cell in _cells(workers):
                _measure(load, cell, sides, rounds, seconds)
            _beside(load, workers, sides, rounds, seconds)
            memory[workers] = {side.app: side.server.memory_mib()["rss"] for side in sides}
    return load, memory


def _cells(workers: int) -> Iterator[Cell]:
    for what in REQUESTS:
        for connections in CONNECTIONS:
            yield Cell(what, connections, workers)


@contextmanager
def _both(home: Home, made: Mapping[str, Any], workers: int) -> Iterator[list[_Side]]:
    """Start both apps, each on a copy of the rows of its own."""
    with ExitStack() as stack:
        sides = []
        for app, script in SCRIPTS.items():
            data = f"{app}-{workers}"
            shutil.copytree(home.folder / app, home.folder / data)
            server = stack.enter_context(
                serving(home, script, data, cores=workers, **settings(home, data, workers))
            )
            sides.append((app, server))
        time.sleep(_SETTLE_SECONDS)
        yield [_Side(home, app, server, _people(server, made)) for app, server in sides]


def settings(home: Home, data: str, workers: int = 1) -> dict[str, str]:
    """Return what both apps are started with, each on the rows below *data*."""
    return {
        "DATABASE_URL": f"sqlite:///{home.folder / data / 'holdfast.db'}",
        "WORKERS": str(workers),
    }


def _people(server: Server, made: Mapping[str, Any]) -> list[Person]:
    password = made["password"]
    return [
        Person(**each, password=password, token=_token(server.port, each["email"], password))
        for each in made["people"]
    ]


def _token(port: int, email: str, password: str) -> str:
    form = urlencode({"username": email, "password": password}).encode()
    answer = _post(port, "/auth/token", form)
    token: str = answer["access_token"]
    return token


def _post(port: int, path: str, body: bytes, **headers: str) -> Any:
    url = f"http://127.0.0.1:{port}{path}"
    request = urllib.request.Request(url, body, {**HEADERS, **headers})
    with urllib.request.urlopen(request, timeout=_PATIENCE_SECONDS) as answer:  # noqa: S310 - loopback
        return json.load(answer)


def _compare(sides: list[_Side]) -> None:
    """Refuse to measure apps that give different answers."""
    ours, bare = sides
    read = [side.server.get(_read(p)["path"], p.token) for side in sides for p in side.people[:1]]
    held, held_bare = _counts(ours), _counts(bare)
    # Holdfast also hands out what it knows of the person's sign-ins.
    if read[0] != read[1] or not held.items() >= held_bare.items():
        raise RuntimeError("the two apps give different answers: they cannot be compared")


def _counts(side: _Side) -> dict[str, int]:
    """How many rows of each table an export has."""
    person = side.people[0]
    request = _export(person)
    headers = {"Authorization": f"Bearer {person.token}", "Content-Type": "application/json"}
    body = json.dumps(request["json"]).encode()
    answer = _post(side.server.port, request["path"], body, **headers)
    return {table: rows for table, rows in answer["counts"].items() if rows}


def _measure(load: Load, cell: Cell, sides: list[_Side], rounds: int, seconds: float) -> None:
    for number in range(rounds + 1):
        for side in sides:
            warming_up = number == 0
            if warming_up and cell.connections != CONNECTIONS[0]:
                # Warm from the cell before.
                continue
            length = min(seconds, _WARM_UP_SECONDS) if warming_up else seconds
            spent, cpu = side.ask(cell.what, cell.connections, length)
            if not warming_up:
                load.keep(cell, side.app, spent, cpu)


def _beside(load: Load, workers: int, sides: list[_Side], rounds: int, seconds: float) -> None:
    """Read alone, then while others sign in over as many connections as there may be."""
    alone, beside = (Cell(what, READERS, workers) for what in (READ_ALONE, READ_BESIDE))
    for _ in range(rounds):
        for side in sides:
            load.keep(alone, side.app, *side.ask(READ, READERS, seconds))
            with ThreadPoolExecutor(max_workers=1) as pool:
                others = pool.submit(side.ask, SIGN_IN, CONNECTIONS[-1], 2 * seconds)
                # Until they wait for each other.
                time.sleep(seconds / 2)
                spent, _shared = side.ask(READ, READERS, seconds)
                load.keep(beside, side.app, spent, None)
                if others.result()[0]["failures"]:
                    raise RuntimeError(f"{side.app}: sign-ins failed while others read")


def bare_copy(home: Home) -> None:
    """Give the bare app the same rows, in clear and in a file of its own."""
    folder = home.folder / BARE
    folder.mkdir()
    file = folder / "holdfast.db"
    rows = sqlite3.connect(home.folder / HOLDFAST / "holdfast.db")
    with closing(rows), closing(sqlite3.connect(file)) as copy:
        rows.backup(copy)
    home.run("installation.py", "in-clear", data=HOLDFAST, order={"file": str(file)})
