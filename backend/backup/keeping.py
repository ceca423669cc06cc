"""Keep rules: which backups stay when there are more of them than anybody needs."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import Final
from uuid import UUID
from zoneinfo import ZoneInfo

_PERIODS: Final[dict[str, Callable[[datetime], object]]] = {
    "last": lambda local: local,
    "daily": lambda local: local.date(),
    # ISO 8601 weeks: they begin on Monday and belong to the year of their Thursday.
    "weekly": lambda local: local.isocalendar()[:2],
    "monthly": lambda local: (local.year, local.month),
    "yearly": lambda local: local.year,
}


@dataclass(frozen=True, slots=True)
class KeepRules:
    """How many backups to keep: the last ones, and the newest of so many days, weeks and so on."""

    last: int = 0
    daily: int = 0
    weekly: int = 0
    monthly: int = 0
    yearly: int = 0

    @property
    def any(self) -> bool:
        return any(getattr(self, name) for name in _PERIODS)


def kept(
    backups: Iterable[tuple[UUID, datetime]], rules: KeepRules, zone: ZoneInfo
) -> dict[UUID, list[str]]:
    """
    Return the backups that a rule keeps, with the rules that do.

    Of a period the newest backup counts; a period without one is not counted. Periods are those
    of *zone*.
    """
    newest_first = sorted(backups, key=lambda backup: backup[1], reverse=True)
    found: dict[UUID, list[str]] = {}
    for name, period_of in _PERIODS.items():
        seen: set[object] = set()
        for key, moment in newest_first:
            period = (period_of(moment.astimezone(zone)), key if name == "last" else None)
            if period not in seen and len(seen) < getattr(rules, name):
                found.setdefault(key, []).append(name)
            seen.add(period)
    return found
