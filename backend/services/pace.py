"""How fast long work goes on beside others: how much at a time, and how long to rest between."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from sqlalchemy import Engine


class Pace:
    """
    How many rows a batch takes, and how long to rest before the next.

    A batch is over in a fraction of a second, for others wait for what it has locked. One that
    takes twice as long a row as the fastest says that others are at work: they get as long.
    """

    MOST: Final = 20_000
    _FIRST: Final = 250
    _LEAST: Final = 50
    _SECONDS: Final = 0.15
    # In which whoever waits for SQLite's one lock may take it.
    _GAP_SECONDS: Final = 0.002
    _MOST_REST_SECONDS: Final = 1.0

    def __init__(self, engine: Engine) -> None:
        self._gap = self._GAP_SECONDS if engine.dialect.name == "sqlite" else 0.0
        self.limit = self._FIRST
        self._rest = 0.0
        self._fastest = float("inf")
        self._rows = 0

    @contextmanager
    def batch(self) -> Iterator[None]:
        """Rest if that is due, and take the time of the batch in the block."""
        time.sleep(self._rest)
        started, self._rows = time.monotonic(), 0
        yield
        if self._rows:
            self._note(time.monotonic() - started)

    def did(self, rows: int) -> None:
        """Say how many rows the batch had."""
        self._rows = rows

    def _note(self, seconds: float) -> None:
        each = seconds / self._rows
        self._fastest = min(self._fastest, each)
        # A batch costs something by itself: small ones say little.
        busy = each > 2 * self._fastest and self._rows >= self._LEAST
        self._rest = min(seconds, self._MOST_REST_SECONDS) if busy else self._gap
        # Not more than twice as many at once.
        wanted = min(int(self._SECONDS / each), 2 * self.limit, self.MOST)
        self.limit = max(self._LEAST, wanted)
