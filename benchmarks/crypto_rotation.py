"""Rotating every encrypted cell to a new key, beside an update of the same rows alone."""

import base64
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any, Final

from benchmarks.processes import Home
from benchmarks.report import Figure, Samples

# Generated bookings with about 10,000, 100,000 and 1,000,000 cells, and rounds for each.
SIZES: Final = {1_029: 5, 10_288: 3, 102_881: 1}
_TASKS: Final = ("rotate", "update")
_PEER: Final = "plain UPDATE"


def measure() -> tuple[list[Figure], list[str]]:
    """Return the figures; there is no peer that could be missing."""
    figures: list[Figure] = []
    with tempfile.TemporaryDirectory(prefix="holdfast-bench-") as folder:
        old = Home.make(Path(folder))
        new = Home(
            old.folder,
            {
                **old.secrets,
                "ENCRYPTION_KEY": base64.b64encode(os.urandom(32)).decode(),
                "ENCRYPTION_KEYS_PREVIOUS": old.secrets["ENCRYPTION_KEY"],
            },
        )
        for bookings, rounds in SIZES.items():
            order = {"task": "fill", "bookings": bookings}
            old.run("rotation_worker.py", data="filled", order=order)
            figures += _figures([_round(new) for _ in range(rounds)])
            shutil.rmtree(old.folder / "filled")
    return figures, []


def _round(home: Home) -> dict[str, Any]:
    """Let both go through a copy of their own of the filled installation."""
    found = {}
    for task in _TASKS:
        shutil.copytree(home.folder / "filled", home.folder / task)
        found[task] = home.run("rotation_worker.py", data=task, order={"task": task})
        shutil.rmtree(home.folder / task)
    if found["rotate"]["cells"] != found["update"]["cells"]:
        raise RuntimeError("the two did not write the same cells")
    return found


def _figures(rounds: list[dict[str, Any]]) -> list[Figure]:
    cells = rounds[0]["rotate"]["cells"]
    ours, peer = (
        {
            kind: Samples([cells / found[task][kind] for found in rounds])
            for kind in ("seconds", "cpu_seconds")
        }
        for task in _TASKS
    )
    return [
        Figure(
            f"Rotation of {cells:,} cells",
            f"cells per {words}",
            ours[kind],
            peer[kind],
            against=_PEER,
        )
        for kind, words in (("seconds", "second"), ("cpu_seconds", "CPU-second"))
    ]
