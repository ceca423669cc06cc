"""Loading bookings with everything that hangs from them, with and without encryption."""

import tempfile
from pathlib import Path
from typing import Final

from benchmarks.installation import BOOKINGS
from benchmarks.processes import Home
from benchmarks.report import Aim, Figure, Report, Samples

ROUNDS: Final = 3
_TASKS: Final = ("load", "load-plain")
# "Seconds, not minutes".
_SECONDS: Final = Aim(60, at_most=True, of_ratio=False)


def measure() -> Report:
    """Load a fresh installation each round, encrypted and in clear in turn."""
    found: dict[str, list[float]] = {task: [] for task in _TASKS}
    cpu: dict[str, list[float]] = {task: [] for task in _TASKS}
    with tempfile.TemporaryDirectory(prefix="holdfast-bench-") as folder:
        home = Home.make(Path(folder))
        for number in range(ROUNDS):
            for task in _TASKS:
                data = f"{task}-{number}"
                home.run("installation.py", "prepare", data=data)
                loaded = home.run("installation.py", task, data=data)
                found[task].append(loaded["seconds"])
                cpu[task].append(loaded["cpu_seconds"])
    return Report(
        part="loading",
        title=f"Loading {BOOKINGS:,} bookings",
        peer="the same rows in clear",
        figures=[
            _figure("Time", found, _SECONDS),
            _figure("CPU time", cpu, None),
        ],
        method=(
            f"{ROUNDS} rounds in turn, each into a fresh SQLite file and committed; generated "
            "bookings with their guests, payments, invoices and feedback"
        ),
    )


def _figure(name: str, found: dict[str, list[float]], aim: Aim | None) -> Figure:
    encrypted, clear = (Samples(found[task]) for task in _TASKS)
    return Figure(name, "s", encrypted, clear, aim)
