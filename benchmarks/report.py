"""Results of one part: figures against a peer and an aim, kept as JSON, a table and a chart."""

import json
import os
import platform
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from benchmarks.chart import Bar, draw

RESULTS: Final = Path(__file__).resolve().parent / "results"


@dataclass(frozen=True)
class Samples:
    """One figure as measured in each round."""

    values: Sequence[float]

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    def __str__(self) -> str:
        return f"{_short(self.median)} [{_short(min(self.values))}-{_short(max(self.values))}]"

    def document(self) -> dict[str, Any]:
        return {"median": self.median, "rounds": list(self.values)}


@dataclass(frozen=True)
class Aim:
    """What a ratio to the peer, or else the figure itself, must reach."""

    limit: float
    at_most: bool
    of_ratio: bool = True

    def is_met(self, figure: "Figure") -> bool:
        value = figure.ratio if self.of_ratio else figure.holdfast.median
        return value <= self.limit if self.at_most else value >= self.limit

    def words(self, unit: str) -> str:
        bound = "at most" if self.at_most else "at least"
        return f"{bound} {self.limit:g}" + (" times" if self.of_ratio else f" {unit}")


@dataclass(frozen=True)
class Figure:
    """
    One measured thing, here and at the peer, in rounds that alternated.

    *against* names this figure's peer where a report has more than one.
    """

    name: str
    unit: str
    holdfast: Samples
    peer: Samples
    aim: Aim | None = None
    against: str = ""

    @property
    def ratio(self) -> float:
        return self.holdfast.median / self.peer.median

    @property
    def round_ratios(self) -> list[float]:
        return [h / p for h, p in zip(self.holdfast.values, self.peer.values, strict=True)]

    @property
    def verdict(self) -> str:
        if self.aim is None:
            return ""
        return "met" if self.aim.is_met(self) else "not met"

    def row(self) -> list[str]:
        aim = self.aim.words(self.unit) if self.aim else ""
        ratio = f"{self.ratio:.2f}"
        name = f"{self.name}, {self.unit}"
        peer = f"{self.against}: {self.peer}" if self.against else str(self.peer)
        return [name, str(self.holdfast), peer, ratio, aim, self.verdict]

    def document(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "unit": self.unit,
            "against": self.against or None,
            "holdfast": self.holdfast.document(),
            "peer": self.peer.document(),
            "ratio": self.ratio,
            "aim": self.aim and self.aim.words(self.unit),
            "verdict": self.verdict or None,
        }

    def bar(self) -> Bar:
        return Bar(
            label=self.against or self.name,
            # Figures with peers of their own stand together under what was measured.
            section=f"{self.name}, {self.unit}" if self.against else "",
            ratio=self.ratio,
            low=min(self.round_ratios),
            high=max(self.round_ratios),
            values=self._values(),
            aim=self.aim.limit if self.aim and self.aim.of_ratio else None,
            met=self.aim.is_met(self) if self.aim else None,
        )

    def _values(self) -> str:
        both = f"{_short(self.holdfast.median)} : {_short(self.peer.median)}"
        if not self.against:
            both += f" {self.unit}"
        # An aim of the figure itself has no place on a scale of ratios.
        if self.aim and not self.aim.of_ratio:
            both += f", {self.aim.words(self.unit)}"
        return both


@dataclass(frozen=True)
class Report:
    """Everything that one part of the benchmarks found out."""

    part: str
    title: str
    peer: str
    figures: Sequence[Figure]
    method: str
    notes: Sequence[str] = field(default=())

    def write(self) -> str:
        """Keep the results as files and return the table."""
        RESULTS.mkdir(exist_ok=True)
        document = {
            "part": self.part,
            "machine": machine(),
            "method": self.method,
            "peer": self.peer,
            "figures": [figure.document() for figure in self.figures],
            "notes": list(self.notes),
        }
        text = self._markdown()
        json_text = json.dumps(document, indent=2) + "\n"
        (RESULTS / f"{self.part}.json").write_text(json_text, encoding="utf-8")
        (RESULTS / f"{self.part}.md").write_text(text, encoding="utf-8")
        chart = draw(self.title, self.peer, [figure.bar() for figure in self.figures])
        (RESULTS / f"{self.part}.svg").write_text(chart, encoding="utf-8")
        return text

    def _markdown(self) -> str:
        head = ["figure", "Holdfast", self.peer, "ratio", "aim", ""]
        rows = [head, ["---"] * len(head), *(figure.row() for figure in self.figures)]
        table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
        told = "\n".join(f"- {note}" for note in [self.method, *self.notes])
        place = ", ".join(machine().values())
        return (
            f"# {self.title}\n\n{table}\n\nMedian [least-most] of all rounds.\n{told}\n\n{place}\n"
        )


def machine() -> dict[str, str]:
    """Say what a reader needs to judge the figures by, and nothing that names the machine."""
    return {
        "system": f"{platform.system()} on {platform.machine()}",
        "cores": f"{os.cpu_count()} cores",
        "python": f"Python {platform.python_version()}",
        "date": datetime.now(UTC).date().isoformat(),
    }


def _short(value: float) -> str:
    """Three significant digits; whole numbers from a hundred on."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
