"""Retention in batches, beside hand-written SQL in batches of the same size, on both engines."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from benchmarks import privacy_server
from benchmarks.backup_contenders import Source
from benchmarks.backup_requests import wait_times
from benchmarks.processes import Home
from benchmarks.report import Aim, Figure, Report, Samples

_WORKER: Final = "retention_worker.py"
_ENGINES: Final = {"postgresql": "PostgreSQL", "sqlite": "SQLite"}
_ACTS: Final = {"delete": "Deleting", "anonymize": "Anonymising"}
_SPEED_AIM: Final = Aim(0.8, at_most=False)
_COUNT_AIM: Final = Aim(1, at_most=True)
_GROWTH_AIM: Final = Aim(1.3, at_most=True)
_MEMORY_AIM: Final = Aim(16, at_most=True, of_ratio=False)
_WAIT_AIM: Final = Aim(2, at_most=True)
_SETTINGS: Final = {"SCHEDULER_ENABLED": "false", "RETENTION_FEEDBACK_DAYS": "1"}
# Large enough for a run to take seconds, so that some hundred requests fall into it.
_ROWS_BESIDE_REQUESTS: Final = {"postgresql": 400_000, "sqlite": 200_000}
# Beside it, a page or two more or less is nothing to divide by.
_LEAST_MIB: Final = 0.1


@dataclass(frozen=True)
class Scale:
    """How many rows are due, by engine, and in how many rounds each."""

    rows: dict[str, dict[int, int]]
    count_rounds: int


_WHOLE: Final = Scale(
    {
        "postgresql": {100_000: 5, 1_000_000: 3, 10_000_000: 1},
        "sqlite": {100_000: 5, 1_000_000: 3},
    },
    count_rounds=5,
)
# `QUICK=1 make bench WHAT=retention`: to see that it works, not for its figures.
_QUICK: Final = Scale({"postgresql": {20_000: 1}, "sqlite": {20_000: 1}}, count_rounds=2)

# By act, number of rows and who.
Found = dict[tuple[str, int, bool], list[dict[str, Any]]]


def measure() -> Report:
    """Measure both engines."""
    quick = bool(os.environ.get("QUICK"))
    scale = _QUICK if quick else _WHOLE
    figures: list[Figure] = []
    notes: list[str] = []
    with tempfile.TemporaryDirectory(prefix="holdfast-bench-") as folder:
        for engine in _ENGINES:
            with _home(engine, Path(folder)) as home:
                if home is None:
                    notes.append("left out: there is no PostgreSQL on this machine")
                    continue
                figures += _of_engine(engine, home, scale)
    return Report(
        part="retention-quick" if quick else "retention",
        title="Retention beside hand-written SQL",
        peer="the peer named",
        figures=figures,
        method="wall time, what is compared takes turns in each round, over tables filled anew",
        notes=[*notes, *_NOTES],
    )


_NOTES: Final = (
    (
        "the rows are feedback with three sealed columns and four indexes, all of them due; "
        "anonymising empties the sealed columns and coarsens the date"
    ),
    (
        "ours plans again, looks at the legal holds in every batch, writes how far it is into the "
        "log with it, chooses how large a batch is by the time it takes (at most 20,000 rows) and "
        "leaves a gap of two milliseconds on SQLite; the hand-written SQL ends 20,000 rows a "
        "transaction in the order of their keys, with the same settings and nothing else"
    ),
    "a dry run counts all, due and held rows, takes a digest of keys, and commits an audit row",
    "memory is the peak of the process above what it held before",
    (
        "requests: GET of one person's consents, 50 a second on one connection, idle and while "
        "retention is applied through the API; the service and the client share the cores"
    ),
)


@contextmanager
def _home(engine: str, folder: Path) -> Iterator[Home | None]:
    home = Home.make(folder)
    home = replace(home, secrets={**home.secrets, **_SETTINGS})
    if engine == "sqlite":
        yield home
    elif (tools := privacy_server.programs()) is None:
        yield None
    else:
        with privacy_server.running(tools) as server:
            yield replace(home, secrets={**home.secrets, "DATABASE_URL": server.create("live")})


def _of_engine(engine: str, home: Home, scale: Scale) -> Iterator[Figure]:
    name = _ENGINES[engine]
    people = home.run(_WORKER, data=engine, order={"task": "prepare"})
    found: Found = {}
    for act in _ACTS:
        acting = replace(home, secrets={**home.secrets, "RETENTION_FEEDBACK_ACTION": act})
        for rows, rounds in scale.rows[engine].items():
            for number in range(rounds):
                for by_hand in (False, True) if number % 2 == 0 else (True, False):
                    order = {"task": "retire", "rows": rows, "by_hand": by_hand}
                    once = acting.run(_WORKER, data=engine, order=order)
                    if once["rows"] != rows:
                        raise RuntimeError(f"{once['rows']} rows met their end instead of {rows}")
                    found.setdefault((act, rows, by_hand), []).append(once)
    for act, words in _ACTS.items():
        for rows in scale.rows[engine]:
            ours, theirs = (_speed(found[act, rows, by_hand]) for by_hand in (False, True))
            title = f"{words} {rows:,} rows, {name}"
            yield Figure(title, "rows/s", ours, theirs, _SPEED_AIM, against="hand-written SQL")
        yield from _growth(f"{words}, {name}", [*scale.rows[engine]], found, act)
    most = max(scale.rows[engine])
    growth = Samples([max(_LEAST_MIB, one["growth_mib"]) for one in found["delete", most, False]])
    theirs = Samples([max(_LEAST_MIB, one["growth_mib"]) for one in found["delete", most, True]])
    title = f"Memory above idle, deleting {most:,} rows, {name}"
    yield Figure(title, "MiB", growth, theirs, _MEMORY_AIM, against="hand-written SQL")
    order = {"task": "count", "rows": most, "rounds": scale.count_rounds}
    counted = home.run(_WORKER, data=engine, order=order)
    yield Figure(
        f"Dry run over {most:,} due rows, {name}", "s",
        Samples(counted["holdfast"]), Samples(counted["counting"]), _COUNT_AIM,
        against="the counting query",
    )  # fmt: skip
    yield from _waits(engine, home, people)


def _speed(rounds: list[dict[str, Any]]) -> Samples:
    return Samples([one["rows"] / one["seconds"] for one in rounds])


def _growth(title: str, sizes: list[int], found: Found, act: str) -> Iterator[Figure]:
    """Say what a row costs in the largest run beside one in the smallest."""
    few, many = min(sizes), max(sizes)
    if few == many:
        return
    # As many rounds of the one as there are of the other.
    rounds = min(len(found[act, rows, False]) for rows in (few, many))
    large, small = (
        Samples([1e6 * one["seconds"] / one["rows"] for one in found[act, rows, False][-rounds:]])
        for rows in (many, few)
    )
    yield Figure(
        f"{title}, a row of {many:,}", "µs", large, small, _GROWTH_AIM,
        against=f"a row of {few:,}",
    )  # fmt: skip


def _waits(engine: str, home: Home, people: dict[str, Any]) -> Iterator[Figure]:
    rows = _ROWS_BESIDE_REQUESTS[engine]

    def fill() -> None:
        home.run(_WORKER, data=engine, order={"task": "fill", "rows": rows})

    source = Source(home, engine, engine, 0, {})
    waits = wait_times(source, people, busy="retention", before_each=fill)
    idle, busy = waits["idle"], waits["retention"]
    title = f"GET consent while {rows:,} rows are deleted, {_ENGINES[engine]}"
    for what, ours, alone, aim in (
        ("99th percentile", busy.p99, idle.p99, _WAIT_AIM),
        ("median", busy.median, idle.median, None),
    ):
        yield Figure(f"{title}, {what}", "ms", Samples(ours), Samples(alone), aim, against="idle")
