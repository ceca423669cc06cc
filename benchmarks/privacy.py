"""Access and erasure of one person, beside hand-written SQL for the same rows, on both engines."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from benchmarks import privacy_server
from benchmarks.processes import Home
from benchmarks.report import Aim, Figure, Report, Samples

_WORKER: Final = "privacy_worker.py"
_ENGINES: Final = {"postgresql": "PostgreSQL", "sqlite": "SQLite"}
# A stay is a row in five tables, and the person is one more.
_ROWS_A_STAY: Final = 5
_MILLISECONDS: Final = 1000
_SELECTS, _AUDITED, _DRIVER = "selects", "audited", "driver"
_ACCESS_AIM: Final = Aim(1.5, at_most=True)
_ERASURE_AIM: Final = Aim(2, at_most=True)
_GROWTH_AIM: Final = Aim(1.3, at_most=True)
_MEMORY_AIM: Final = Aim(64, at_most=True, of_ratio=False)
_PEERS: Final[dict[str, dict[str, tuple[str, Aim | None]]]] = {
    "access": {
        _SELECTS: ("hand-written SELECTs", _ACCESS_AIM),
        _AUDITED: ("with an audit row", None),
        _DRIVER: ("driver alone, unopened", None),
    },
    "delete": {"statements": ("hand-written SQL", _ERASURE_AIM)},
    "anonymize": {"statements": ("hand-written SQL", _ERASURE_AIM)},
}
# What a page or two more or less make is nothing to divide by.
_LEAST_MIB: Final = 0.1
# Fides 2.86.2 on PostgreSQL, measured in the course of this work on another machine: 21 rows, about
# 198,000 rows and 2,004 rows.
_FIDES: Final = {"access few": "0.61 s", "access many": "29 s", "delete some": "98 s"}


@dataclass(frozen=True)
class Scale:
    """How much is measured: rows of other people by engine, and stays and rounds of the person."""

    guests: dict[str, tuple[int, int]]
    few: int
    some: int
    many: int
    few_rounds: int
    some_rounds: int
    many_rounds: int


_WHOLE: Final = Scale(
    {"postgresql": (100_000, 10_000_000), "sqlite": (100_000, 1_000_000)},
    few=4, some=400, many=40_000, few_rounds=40, some_rounds=7, many_rounds=3,
)  # fmt: skip
# `QUICK=1 make bench WHAT=privacy`: to see that it works, not for its figures.
_QUICK: Final = Scale(
    {"postgresql": (10_000, 100_000), "sqlite": (10_000, 100_000)},
    few=4, some=400, many=4_000, few_rounds=10, some_rounds=3, many_rounds=1,
)  # fmt: skip

Found = dict[str, dict[str, Samples]]


def measure() -> Report:
    """Measure both engines, each in a small and in a large database."""
    quick = bool(os.environ.get("QUICK"))
    scale = _QUICK if quick else _WHOLE
    figures: list[Figure] = []
    notes: list[str] = []
    with tempfile.TemporaryDirectory(prefix="holdfast-bench-") as folder:
        for engine in _ENGINES:
            with _homes(engine, Path(folder)) as homes:
                if homes is None:
                    notes.append("left out: there is no PostgreSQL on this machine")
                    continue
                figures += _of_engine(engine, homes, scale)
    return Report(
        part="privacy-quick" if quick else "privacy",
        title="Access and erasure beside hand-written SQL",
        peer="the peer named",
        figures=figures,
        method=(
            "wall time, what is compared takes turns in each round: "
            f"{scale.few_rounds} rounds for access of few rows, {scale.some_rounds} for erasure of "
            f"some, {scale.many_rounds} for many"
        ),
        notes=[*notes, *_NOTES],
    )


_NOTES: Final = (
    (
        "access is the JSON export through the service, its audit row committed and every chunk "
        "consumed; the hand-written SELECTs open the same cells through the same column types on "
        "the same engine, then call `orjson` once; they are also shown with an audit row of their "
        "own, committed; the driver alone opens nothing"
    ),
    (
        "erasure is the service's, with its lock, plan, ledger entry, check and audit row; the "
        "hand-written statements, one per table, set the same columns of an equal person to the "
        "same things in one transaction with the same settings (`secure_delete`, durable commit); "
        "what both left is compared in each round"
    ),
    (
        "every person measured has users, bookings, payments, invoices, their lines and feedback; "
        "the payments and invoices are within the law's period, so deleting restricts these"
    ),
    (
        "the search after an erasure reads the whole database, so its time grows with that and is "
        "counted apart, in rows a second"
    ),
    "memory is the peak of a process of its own above what it held before, after a small one",
    (
        "Fides 2.86.2 was measured on another machine, with its server, worker and Redis; no ratio "
        "can be drawn"
    ),
)


@contextmanager
def _homes(engine: str, folder: Path) -> Iterator[dict[str, Home] | None]:
    """Give a home for the small and the large database; `None` where the engine is missing."""
    home = Home.make(folder)
    if engine == "sqlite":
        yield {"small": home, "large": home}
        return
    tools = privacy_server.programs()
    if tools is None:
        yield None
        return
    with privacy_server.running(tools) as server:
        yield {
            name: Home(folder, {**home.secrets, "DATABASE_URL": server.create(name)})
            for name in ("small", "large")
        }


def _of_engine(engine: str, homes: dict[str, Home], scale: Scale) -> list[Figure]:
    found: dict[str, Found] = {}
    memory: dict[str, Samples] = {}
    searched: dict[str, list[float]] = {}
    for name, guests in zip(homes, scale.guests[engine], strict=True):
        home, data = homes[name], f"{engine}-{name}"
        home.run(_WORKER, data=data, order={"task": "prepare", "rows": guests})
        found[name] = _times(home, data, scale)
        if name == "small":
            memory = _memory(home, data, scale)
            scan = {"task": "scan", "stays": scale.some, "rounds": scale.many_rounds}
            searched = home.run(_WORKER, data=data, order=scan)
    figures: list[Figure] = []
    for name, guests in zip(homes, scale.guests[engine], strict=True):
        figures += _beside_sql(engine, guests, found[name], scale)
    figures += _growth(engine, scale, found["small"], found["large"])
    figures += _of_memory(engine, scale, memory)
    ours, reading = (Samples(searched[who]) for who in ("holdfast", "reading"))
    name = f"Search of the whole database after an erasure, {_ENGINES[engine]}"
    return [*figures, Figure(name, "rows/s", ours, reading, against="reading alone, cells opened")]


def _times(home: Home, data: str, scale: Scale) -> Found:
    orders: dict[str, dict[str, Any]] = {
        "access few": {"stays": scale.few, "rounds": scale.few_rounds, "is_short": True},
        "access many": {"stays": scale.many, "rounds": scale.many_rounds, "is_short": False},
    }
    orders = {what: {"task": "access", **order} for what, order in orders.items()}
    for mode in ("delete", "anonymize"):
        erase = {"task": "erase", "mode": mode}
        orders[f"{mode} some"] = {**erase, "stays": scale.some, "rounds": scale.some_rounds}
        # What deleting shows of the larger database need not be shown twice in so many minutes.
        if mode == "delete" or data.endswith("small"):
            orders[f"{mode} many"] = {**erase, "stays": scale.many, "rounds": scale.many_rounds}
    return {
        what: {
            who: Samples([value * _MILLISECONDS for value in seconds])
            for who, seconds in home.run(_WORKER, data=data, order=order).items()
        }
        for what, order in orders.items()
    }


def _memory(home: Home, data: str, scale: Scale) -> dict[str, Samples]:
    return {
        act: Samples([max(_LEAST_MIB, home.run(_WORKER, data=data, order=order)["growth_mib"])])
        for act in ("export", "selects", "erase", "statements")
        for order in [{"task": "memory", "act": act, "stays": scale.many}]
    }


def _words(what: str, scale: Scale) -> str:
    act, size = what.split()
    verb = {"access": "Access of", "delete": "Deleting", "anonymize": "Anonymising"}[act]
    stays = {"few": scale.few, "some": scale.some, "many": scale.many}[size]
    return f"{verb} {stays * _ROWS_A_STAY + 1:,} rows"


def _beside_sql(engine: str, guests: int, found: Found, scale: Scale) -> Iterator[Figure]:
    for what, samples in found.items():
        name = f"{_words(what, scale)}, {_ENGINES[engine]} of {guests:,}"
        if engine == "postgresql" and guests == scale.guests[engine][0] and what in _FIDES:
            name += f" (Fides: {_FIDES[what]})"
        for peer, (label, aim) in _PEERS[what.split()[0]].items():
            if peer in samples:
                yield Figure(name, "ms", samples["holdfast"], samples[peer], aim, against=label)


def _growth(engine: str, scale: Scale, small: Found, large: Found) -> Iterator[Figure]:
    """Say what the same person costs in the larger database."""
    few, many = scale.guests[engine]
    for what in large:
        name = f"{_words(what, scale)}, {_ENGINES[engine]} of {many:,} beside {few:,}"
        for who, label in (("holdfast", "the smaller"), (_hand(what), "the same by hand")):
            aim = _GROWTH_AIM if who == "holdfast" else None
            yield Figure(name, "ms", large[what][who], small[what][who], aim, against=label)


def _hand(what: str) -> str:
    return _SELECTS if what.startswith("access") else "statements"


def _of_memory(engine: str, scale: Scale, memory: dict[str, Samples]) -> Iterator[Figure]:
    for ours, theirs, what in (
        ("export", "selects", "access many"),
        ("erase", "statements", "delete many"),
    ):
        yield Figure(
            f"Memory above idle, {_words(what, scale).lower()}, {_ENGINES[engine]}",
            "MiB",
            memory[ours],
            memory[theirs],
            _MEMORY_AIM,
            against="hand-written SQL",
        )
