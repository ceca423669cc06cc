"""When work that is due every day at one local time was due last, and is due next."""

from datetime import UTC, datetime, time, timedelta
from zoneinfo import ZoneInfo


def last_due(now: datetime, at: time, zone: ZoneInfo) -> datetime:
    """
    Return the newest instant, not after *now*, at which local clocks showed *at*.

    A time that a change of clocks skips counts an hour later; one that it repeats counts once.
    """
    today = now.astimezone(zone).date()
    # Of tomorrow too: clocks that are put back across midnight show today once more.
    for days in (-1, 0, 1, 2):
        local = datetime.combine(today - timedelta(days=days), at, zone)
        if local.astimezone(UTC) <= now:
            return local.astimezone(UTC)
    raise ValueError("no day has a due time")


def next_due(now: datetime, at: time, zone: ZoneInfo) -> datetime:
    """Return the first instant after *now* at which local clocks show *at*; see `last_due`."""
    today = now.astimezone(zone).date()
    for days in (0, 1, 2):
        local = datetime.combine(today + timedelta(days=days), at, zone)
        if local.astimezone(UTC) > now:
            return local.astimezone(UTC)
    raise ValueError("no day has a due time")
