"""CPU time of calls that take turns, so that whatever else the machine does meets all of them."""

import gc
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import repeat
from typing import Final

from benchmarks.report import Samples

Call = Callable[[], object]

# Long beside the clock's step, short beside the machine's moods.
_BATCH_SECONDS: Final = 0.02
# glibc's limit for what it learns to keep instead of giving back (M_MMAP_THRESHOLD, mallopt(3)).
_KEPT_BYTES: Final = 32 * 1024 * 1024 - 64 * 1024
_NANOSECONDS: Final = 1_000_000_000


def alternate(calls: Mapping[str, Call], *, rounds: int) -> dict[str, Samples]:
    """
    Time each call in every round.

    Returns:
        CPU microseconds per call, and one sample per round, after a round that warms up.
    """
    # In a process that never freed a large block, each 1 MiB is fetched from the system anew and
    # page faults are most of what is measured; a service is past that after its first request.
    block = bytearray(_KEPT_BYTES)
    del block
    counts = {name: _batch(call) for name, call in calls.items()}
    found: dict[str, list[float]] = {name: [] for name in calls}
    with _without_collector():
        for _ in range(rounds):
            for name, call in calls.items():
                found[name].append(_spend(call, counts[name]) / counts[name] / 1000)
            # What the round left behind is nobody's work.
            gc.collect()
    return {name: Samples(samples) for name, samples in found.items()}


def cpu_seconds(call: Call) -> float:
    """CPU time of one call, of all threads of this process."""
    with _without_collector():
        return _spend(call, 1) / _NANOSECONDS


def _batch(call: Call) -> int:
    count = 1
    while (spent := _spend(call, count)) < _BATCH_SECONDS * _NANOSECONDS:
        count = max(count * 2, int(count * _BATCH_SECONDS * _NANOSECONDS / max(spent, 1)))
    return count


def _spend(call: Call, count: int) -> int:
    started = time.process_time_ns()
    for _ in repeat(None, count):
        call()
    return time.process_time_ns() - started


@contextmanager
def _without_collector() -> Iterator[None]:
    # As `timeit` does: a collection would be charged to whoever happens to be at work.
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
