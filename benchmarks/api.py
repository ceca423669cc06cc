"""The service against a bare FastAPI and SQLAlchemy app: start, memory, requests."""

import json
import os
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from benchmarks import api_load
from benchmarks.api_load import BARE, HOLDFAST, SCRIPTS, Cell, Load
from benchmarks.processes import Home, Server, serving
from benchmarks.report import RESULTS, Aim, Figure, Report, Samples

# Until what the start left to do is done.
_SETTLE_SECONDS: Final = 1.0
_START_AND_MEMORY: Final = Aim(1.5, at_most=True)
_REQUESTS: Final = Aim(0.7, at_most=False)
_WAITING: Final = Aim(2, at_most=True)
_NO_WORSE: Final = Aim(1, at_most=True)
_PEER: Final = "bare FastAPI + SQLAlchemy"
_KINDS: Final = {
    "per_cpu": "per CPU-second",
    "per_second": "per second",
    "p50": "p50 ms",
    "p99": "p99 ms",
}

Found = dict[str, dict[str, list[float]]]


@dataclass(frozen=True)
class Scale:
    """How often and how long is measured."""

    starts: int
    rounds: int
    seconds: float


_WHOLE: Final = Scale(starts=5, rounds=3, seconds=1.5)
# `QUICK=1 make bench WHAT=api`: to see that it works, not for its figures.
_QUICK: Final = Scale(starts=1, rounds=1, seconds=0.5)


@dataclass(frozen=True)
class ApiReport(Report):
    """A report with a second table: every request over few and many connections."""

    load: Load = field(default_factory=Load)

    def write(self) -> str:
        super().write()
        markdown, document = (RESULTS / f"{self.part}.{kind}" for kind in ("md", "json"))
        text = markdown.read_text(encoding="utf-8") + "\n" + _table(self.load)
        markdown.write_text(text, encoding="utf-8")
        whole = json.loads(document.read_text(encoding="utf-8"))
        whole["requests"] = [
            {"what": cell.what, "connections": cell.connections, "workers": cell.workers, **apps}
            for cell, apps in self.load.found.items()
        ]
        document.write_text(json.dumps(whole, indent=2) + "\n", encoding="utf-8")
        return text


def measure() -> Report:
    """Measure both apps in alternating rounds on one machine."""
    quick = bool(os.environ.get("QUICK"))
    scale = _QUICK if quick else _WHOLE
    with tempfile.TemporaryDirectory(prefix="holdfast-bench-") as folder:
        home = Home.make(Path(folder))
        made = home.run("installation.py", "people", data=HOLDFAST)
        api_load.bare_copy(home)
        found: Found = defaultdict(lambda: defaultdict(list))
        _measure_starts(home, found, scale.starts)
        load, memory = api_load.run(home, made, rounds=scale.rounds, seconds=scale.seconds)
        for app in SCRIPTS:
            found[app]["rss_used"].append(memory[1][app])
    return ApiReport(
        part="api-quick" if quick else "api",
        title="The service beside a bare app",
        peer=_PEER,
        figures=[*_start_figures(found), *_load_figures(load)],
        method=(
            f"{scale.starts} starts, and {scale.rounds} rounds of {scale.seconds:g} s a cell, the "
            "two apps in turn; one core for each worker, the same rows, server settings and "
            "answers, each person with a token of their own; Holdfast as in production, with its "
            "log, behind a proxy that ends TLS"
        ),
        notes=_notes(load),
        load=load,
    )


def _notes(load: Load) -> list[str]:
    return [
        "CPU-seconds are the server's own, so other work on the machine changes them least",
        f"the load client used at most {max(load.client):.0%} of a core, so it was not the limit",
        "what is under way at the end of a round is waited for and counted",
        (
            f"{api_load.READERS} connections read while {api_load.CONNECTIONS[-1]} sign in; a "
            "password hash is argon2id with 19 MiB and two passes in both apps"
        ),
        (
            "the encrypt call is the export with `encrypt`: sealed with the service's key, in the "
            "bare app by one AES-GCM call"
        ),
    ]


def _measure_starts(home: Home, found: Found, starts: int) -> None:
    for number in range(starts + 1):
        for app, script in SCRIPTS.items():
            with serving(home, script, app, cores=1, **api_load.settings(home, app)) as server:
                time.sleep(_SETTLE_SECONDS)
                # The first start compiles modules and fills the system's cache.
                if number:
                    _keep_start(server, found[app])


def _keep_start(server: Server, found: dict[str, list[float]]) -> None:
    found["start"].append(server.start_seconds * 1000)
    found["start_cpu"].append(server.start_cpu_seconds * 1000)
    for kind, mib in server.memory_mib().items():
        found[kind].append(mib)


def _start_figures(found: Found) -> Iterator[Figure]:
    for name, unit, key, aim in (
        ("Start to healthy", "ms", "start", _START_AND_MEMORY),
        ("CPU time of the start", "ms", "start_cpu", None),
        ("Idle memory, resident", "MiB", "rss", _START_AND_MEMORY),
        ("Idle memory, proportional", "MiB", "pss", None),
        ("Memory after all requests, resident", "MiB", "rss_used", None),
    ):
        # Not every system tells proportional memory.
        if found[HOLDFAST][key]:
            yield Figure(name, unit, Samples(found[HOLDFAST][key]), Samples(found[BARE][key]), aim)


def _load_figures(load: Load) -> Iterator[Figure]:
    """Say what has an aim; the second table has the rest."""
    for workers in api_load.WORKERS:
        for what in api_load.REQUESTS:
            cell = Cell(what, 16, workers)
            yield _figure(load, cell, "per_cpu", "requests per CPU-second", _REQUESTS)
    for workers in api_load.WORKERS:
        for what in api_load.REQUESTS:
            yield _figure(load, Cell(what, 64, workers), "p99", "p99 in ms", _WAITING)
    for workers in api_load.WORKERS:
        beside = Cell(api_load.READ_BESIDE, api_load.READERS, workers)
        yield _figure(load, beside, "p99", "p99 in ms", _NO_WORSE)


def _figure(load: Load, cell: Cell, kind: str, unit: str, aim: Aim) -> Figure:
    ours, bare = (Samples(load.found[cell][app][kind]) for app in SCRIPTS)
    return Figure(_name(cell), unit, ours, bare, aim)


def _name(cell: Cell) -> str:
    what = cell.what[0].upper() + cell.what[1:]
    return f"{what}, {cell.connections} connections, {_workers(cell)}"


def _workers(cell: Cell) -> str:
    return f"{cell.workers} worker{'s' if cell.workers > 1 else ''}"


def _table(load: Load) -> str:
    head = ["request", "connections", "workers"]
    head += [f"{words}{who}" for words in _KINDS.values() for who in ("", ", bare")]
    rows = [head, ["---"] * len(head)]
    for cell, apps in load.found.items():
        values = [_median(apps[app].get(kind)) for kind in _KINDS for app in SCRIPTS]
        rows.append([cell.what, str(cell.connections), str(cell.workers), *values])
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return f"## Every request\n\nMedians.\n\n{table}\n"


def _median(values: list[float] | None) -> str:
    if values is None:
        return ""
    value = Samples(values).median
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
