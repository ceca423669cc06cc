"""What was measured of backups, as figures beside each peer and each limit, and as a table."""

import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from benchmarks.backup_contenders import HOLDFAST
from benchmarks.backup_limits import CHECKS, Limits
from benchmarks.backup_meter import Cost
from benchmarks.backup_requests import Waits
from benchmarks.report import RESULTS, Aim, Figure, Report, Samples

# In this order.
STEPS: Final = ("create", "read", "verify", "restore")
PEER_STEPS: Final = ("create", "verify", "restore")
STAGE, START = "stage", "start"
_AHEAD: Final = Aim(1, at_most=True)
_NO_WORSE: Final = Aim(1, at_most=False)
_NEAR_LIMIT: Final = Aim(0.85, at_most=False)
_TWICE: Final = Aim(2, at_most=True)
_SMALL: Final = Aim(100, at_most=True, of_ratio=False)

_CLOCK_SECONDS: Final = 0.01
_LEAST_MIB: Final = 0.1

# Step of ours, how its figures read, and what of a peer's does as much.
_COMPARED: Final = (
    ("create", "Create", "create"),
    ("read", "Read whole and check tags", "verify"),
    ("verify", "Prove that it restores", "restore"),
    ("restore", "Restore", "restore"),
)

# By round: a slow peer may have fewer.
Rounds = dict[int, Cost]


@dataclass
class Found:
    """
    What one engine's rounds found out.

    Attributes:
        costs: By contender (or limit) and step.
        stored_mib: By contender; of the last round.
    """

    engine: str
    mib: float
    limits: Limits | None
    costs: dict[str, dict[str, Rounds]] = field(default_factory=dict)
    stored_mib: dict[str, float] = field(default_factory=dict)

    @property
    def peers(self) -> list[str]:
        return [name for name in self.stored_mib if name != HOLDFAST]

    def keep(self, name: str, step: str, number: int, cost: Cost) -> None:
        self.costs.setdefault(name, {}).setdefault(step, {})[number] = cost

    def pair(self, step: str, of: str, *theirs: tuple[str, str]) -> tuple[Samples, Samples]:
        """
        Return one kind of cost of our *step*, and of a peer's steps together, in common rounds.

        Args:
            theirs: Who did what.
        """
        ours = self.costs[HOLDFAST][step]
        others = [self.costs[name][their_step] for name, their_step in theirs]
        common = sorted(set(ours).intersection(*others))
        return (
            Samples([getattr(ours[number], of) for number in common]),
            Samples([sum(getattr(one[number], of) for one in others) for number in common]),
        )

    def rates(self, seconds: Samples) -> Samples:
        """MiB of the database for each second."""
        # What takes less than the clock's step is not to be divided by.
        return Samples([self.mib / max(value, _CLOCK_SECONDS) for value in seconds.values])

    def median(self, name: str, step: str, of: str = "seconds") -> float:
        return float(statistics.median(getattr(c, of) for c in self.costs[name][step].values()))


@dataclass(frozen=True)
class BackupReport(Report):
    """A report with a second table: every tool by itself."""

    found: Sequence[Found] = ()

    def write(self) -> str:
        super().write()
        markdown, document = (RESULTS / f"{self.part}.{kind}" for kind in ("md", "json"))
        text = markdown.read_text(encoding="utf-8") + "\n" + _table(self.found)
        markdown.write_text(text, encoding="utf-8")
        whole = json.loads(document.read_text(encoding="utf-8"))
        whole["tools"] = [*_documents(self.found)]
        document.write_text(json.dumps(whole, indent=2) + "\n", encoding="utf-8")
        return text


def figures(found: Found) -> Iterator[Figure]:
    """Compare ours with every peer and every limit on one engine."""
    place = f"{found.engine} of {found.mib:,.0f} MiB"
    for step, words, their_step in _COMPARED:
        checks = [(CHECKS, STAGE)] if step == "verify" and CHECKS in found.costs else []
        for peer in found.peers:
            label = f"{peer}, checks" if checks else peer
            ours, theirs = found.pair(step, "seconds", (peer, their_step), *checks)
            yield Figure(f"{words}, {place}", "s", ours, theirs, _AHEAD, label)
        for peer in found.peers:
            label = f"{peer}, checks" if checks else peer
            cpu = found.pair(step, "cpu_seconds", (peer, their_step), *checks)
            ours, theirs = map(found.rates, cpu)
            name = f"{words}, {found.engine}, of CPU time"
            yield Figure(name, "MiB per CPU-second", ours, theirs, _NO_WORSE, label)
    for peer in found.peers:
        ours, theirs = found.pair("verify", "seconds", (peer, "verify"))
        yield Figure(f"Prove, where the peer reads, {place}", "s", ours, theirs, None, peer)
    for peer in found.peers:
        ours, theirs = (Samples([found.stored_mib[name]]) for name in (HOLDFAST, peer))
        yield Figure(f"Stored, {found.engine}", "MiB", ours, theirs, None, peer)
    yield from _memory(found)
    yield from _beside_limits(found)


def waiting(engine: str, waits: Mapping[str, Waits]) -> Iterator[Figure]:
    """Compare how long a light request takes during a backup and when the service is idle."""
    for name, of, aim in (("99th percentile", "p99", _TWICE), ("median", "median", None)):
        during, idle = (Samples(getattr(waits[state], of)) for state in ("backup", "idle"))
        words = f"GET consent during a backup, {name}, {engine}"
        yield Figure(words, "ms", during, idle, aim, "idle")


def _memory(found: Found) -> Iterator[Figure]:
    for step, _words, their_step in _COMPARED:
        # The others' are in the second table.
        for peer in found.peers[:1]:
            for of, words in (("largest_mib", "largest process"), ("together_mib", "all of them")):
                name = f"Memory, {step}, {found.engine}, {words}"
                ours, theirs = map(_seen, found.pair(step, of, (peer, their_step)))
                yield Figure(name, "MiB", ours, theirs, _SMALL, peer)


def _seen(memory: Samples) -> Samples:
    # Who has ended before the first look was not seen, and is not to be divided by.
    return Samples([max(value, _LEAST_MIB) for value in memory.values])


def _beside_limits(found: Found) -> Iterator[Figure]:
    """Say which share of each limit's speed is reached; the slowest that is needed is the aim."""
    if found.limits is None:
        return
    for step, needed in found.limits.needed.items():
        name = f"Stages of {step}, {found.engine}"
        slowest = max(needed, key=lambda stage: found.median(stage, STAGE))
        for stage in (*needed, *found.limits.besides.get(step, ())):
            ours, limit = map(found.rates, found.pair(step, "seconds", (stage, STAGE)))
            aim = _NEAR_LIMIT if stage == slowest else None
            yield Figure(name, "MiB/s", ours, limit, aim, stage)


def _table(found: Sequence[Found]) -> str:
    head = ["engine", "step", "tool", "s", "MiB/s", "CPU-s", "MiB per CPU-s"]
    head += ["largest MiB", "together MiB", "stored MiB", "rounds"]
    rows = [head, ["---"] * len(head)]
    for one in found:
        steps = sorted(
            ((step, name) for name, steps in one.costs.items() for step in steps),
            key=lambda both: [*STEPS, START, STAGE].index(both[0]),
        )
        rows += [_row(one, name, step) for step, name in steps]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return f"## Every tool by itself\n\nMedians.\n\n{table}\n"


def _row(found: Found, name: str, step: str) -> list[str]:
    kinds = ("seconds", "cpu_seconds", "largest_mib", "together_mib")
    seconds, cpu, largest, together = (found.median(name, step, of) for of in kinds)
    rates = [f"{rate:,.0f}" for rate in found.rates(Samples([seconds, cpu])).values]
    stored = found.stored_mib.get(name) if step == "create" else None
    # Nothing of the database passes through a mere start.
    per_second, per_cpu_second = ("", "") if step == START else rates
    return [
        found.engine, step, name, f"{seconds:.2f}", per_second, f"{cpu:.2f}", per_cpu_second,
        f"{largest:.0f}", f"{together:.0f}", "" if stored is None else f"{stored:,.0f}",
        str(len(found.costs[name][step])),
    ]  # fmt: skip


def _documents(found: Sequence[Found]) -> Iterator[Mapping[str, Any]]:
    for one in found:
        for name, steps in one.costs.items():
            yield {
                "engine": one.engine,
                "database_mib": one.mib,
                "tool": name,
                "stored_mib": one.stored_mib.get(name),
                "steps": {
                    step: [cost.document() for cost in rounds.values()]
                    for step, rounds in steps.items()
                },
            }
