"""
Retention periods: ISO 8601 durations of whole days or calendar units.

7 x 365 days are two days short of seven years, so `P7Y` is counted by the calendar. Where the
calendar has no such day (29 February), the next month's start counts: data never leaves early,
and what comes later never leaves sooner.
"""

import calendar
import re
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from typing import Final, Self, TypeVar

from backend.errors import RefusedError

_ISO: Final = re.compile(r"P(?:(\d{1,4})Y)?(?:(\d{1,5})M)?(?:(\d{1,5})W)?(?:(\d{1,6})D)?", re.ASCII)
# A century: a longer period is a typing error.
_MAX_DAYS: Final = 36_500
_MAX_MONTHS: Final = 1_200

Moment = TypeVar("Moment", date, datetime)


@dataclass(frozen=True, slots=True)
class Period:
    """A length of time in calendar months and days."""

    months: int
    days: int

    @classmethod
    def of_days(cls, days: int) -> Self:
        return cls._checked(0, days, f"{days} days")

    @classmethod
    def parse(cls, text: str) -> Self:
        """
        Read an ISO 8601 duration of years, months, weeks and days, as `P7Y` or `P2555D`.

        Raises:
            RefusedError: It is none, is empty, or is longer than a century.
        """
        match = _ISO.fullmatch(text)
        if match is None:
            raise RefusedError(
                "a retention period is an ISO 8601 duration in whole days, as P7Y or P2555D"
            )
        years, months, weeks, days = (int(part or 0) for part in match.groups())
        return cls._checked(12 * years + months, 7 * weeks + days, text)

    @classmethod
    def _checked(cls, months: int, days: int, text: str) -> Self:
        # Each part of its own limit: together they come to a century at most.
        if not 0 < months * _MAX_DAYS + days * _MAX_MONTHS <= _MAX_DAYS * _MAX_MONTHS:
            raise RefusedError(f"a retention period is between 1 day and 100 years, not {text}")
        return cls(months, days)

    def __str__(self) -> str:
        years, months = divmod(self.months, 12)
        parts = ((years, "Y"), (months, "M"), (self.days, "D"))
        return "P" + "".join(f"{count}{unit}" for count, unit in parts if count)

    @property
    def words(self) -> str:
        """The period as a person reads it, as `7 years` or `1 year and 6 months`."""
        years, months = divmod(self.months, 12)
        parts = ((years, "year"), (months, "month"), (self.days, "day"))
        return " and ".join(f"{n} {unit}{'s' if n > 1 else ''}" for n, unit in parts if n)

    def cutoff(self, now: datetime) -> datetime:
        """Return the latest anchor that is due at *now*: the last whose `end` is not after it."""
        shifted, fits = _shift(now - timedelta(days=self.days), -self.months)
        return shifted if fits else shifted - timedelta(microseconds=1)

    def end(self, anchor: Moment) -> Moment:
        """Return when a row with this *anchor* becomes due, to the same exactness."""
        return _shift(anchor, self.months)[0] + timedelta(days=self.days)


def _shift(moment: Moment, months: int) -> tuple[Moment, bool]:
    """
    Move *moment* by calendar months and say whether that month has its day.

    Where it has not, the start of the month after it stands in.
    """
    year, month = divmod(moment.year * 12 + moment.month - 1 + months, 12)
    if moment.day <= calendar.monthrange(year, month + 1)[1]:
        return moment.replace(year=year, month=month + 1), True
    if isinstance(moment, datetime):
        moment = moment.replace(hour=0, minute=0, second=0, microsecond=0)
    return moment.replace(year=year, month=month + 2, day=1), False
