"""
Retention periods: ISO 8601 durations of whole days or calendar units.

7 x 365 days are two days short of seven years, so `P7Y` is counted by the calendar. Where the
calendar has no such day (29 February), the next month's start counts: data never leaves early,
and what comes later never leaves sooner. Books are often kept from the end of their year on: a
period may be counted from there, in UTC.
"""

import calendar
import re
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from typing import Final, Self, TypeVar

from backend.errors import RefusedError

_ISO: Final = re.compile(r"P(?:(\d{1,4})Y)?(?:(\d{1,5})M)?(?:(\d{1,5})W)?(?:(\d{1,6})D)?", re.ASCII)
# A century: a longer period is a typing error.
_MAX_DAYS: Final = 36_500
_MAX_MONTHS: Final = 1_200
# What databases tell apart.
_INSTANT: Final = timedelta(microseconds=1)

Moment = TypeVar("Moment", date, datetime)


@dataclass(frozen=True, slots=True)
class Period:
    """
    A length of time in calendar months and days.

    Attributes:
        year_end: It begins when the year ends in which the anchor lies.
    """

    months: int
    days: int
    year_end: bool = False

    @classmethod
    def of_days(cls, days: int, *, year_end: bool = False) -> Self:
        return cls._checked(0, days, f"{days} days", year_end)

    @classmethod
    def parse(cls, text: str, *, year_end: bool = False) -> Self:
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
        return cls._checked(12 * years + months, 7 * weeks + days, text, year_end)

    @classmethod
    def _checked(cls, months: int, days: int, text: str, year_end: bool) -> Self:
        # Each part of its own limit: together they come to a century at most.
        if not 0 < months * _MAX_DAYS + days * _MAX_MONTHS <= _MAX_DAYS * _MAX_MONTHS:
            raise RefusedError(f"a retention period is between 1 day and 100 years, not {text}")
        return cls(months, days, year_end)

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

    def since(self, anchor: str) -> str:
        """Say when it ends that begins with what is called *anchor*."""
        return f"{self.words} from {'the end of the year of ' if self.year_end else ''}{anchor}"

    @property
    def shortest_days(self) -> int:
        """The fewest days that it can take, wherever it begins."""
        if not self.months:
            return self.days
        # Every month of four years in which a leap year is left out: 2100 is none.
        begins = (date(2096 + month // 12, 1 + month % 12, 1) for month in range(48))
        return min((_shift(begin, self.months)[0] - begin).days for begin in begins) + self.days

    def cutoff(self, now: datetime) -> datetime:
        """Return the latest anchor that is due at *now*: the last whose `end` is not after it."""
        now = _in_utc(now)
        shifted, fits = _shift(now - timedelta(days=self.days), -self.months)
        latest = shifted if fits else shifted - _INSTANT
        return _year_of(latest) - _INSTANT if self.year_end else latest

    def cutoff_day(self, now: datetime) -> date:
        """Return the first day that is not due at *now*, of anchors that are days."""
        limit = self.cutoff(now)
        # A day is over when the next one begins, and a year with its last day.
        return (limit + _INSTANT).date() if self.year_end else limit.date()

    def end(self, anchor: datetime) -> datetime:
        """Return when a row with this *anchor* becomes due, to the same exactness."""
        begin = _in_utc(anchor)
        if self.year_end:
            begin = _year_of(begin)
            begin = begin.replace(year=begin.year + 1)
        return _shift(begin, self.months)[0] + timedelta(days=self.days)

    def end_of_day(self, anchor: date) -> date:
        """Return the day on which a row becomes due whose *anchor* is a day: that counts whole."""
        begin = date(anchor.year + 1, 1, 1) if self.year_end else anchor + timedelta(days=1)
        return _shift(begin, self.months)[0] + timedelta(days=self.days)


def _in_utc(moment: datetime) -> datetime:
    if moment.tzinfo is None:
        raise ValueError("a time without a zone is not a point in time")
    return moment.astimezone(UTC)


def _year_of(moment: datetime) -> datetime:
    """Return the beginning of the year of *moment*."""
    return moment.replace(month=1, day=1, hour=0, minute=0, second=0, microsecond=0)


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
