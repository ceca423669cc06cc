"""Due times: in every zone, what was due last and what is due next are neighbours."""

from datetime import UTC, datetime, time, timedelta
from itertools import pairwise
from typing import Final
from zoneinfo import ZoneInfo, available_timezones

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from backend.services.job_times import last_due, next_due

BERLIN: Final = ZoneInfo("Europe/Berlin")
INSTANT: Final = timedelta(microseconds=1)
ZONES: Final = st.sampled_from(sorted(available_timezones())).map(ZoneInfo)
TIMES: Final = st.times().map(lambda at: at.replace(second=0, microsecond=0, fold=0))


def _moments(first_year: int) -> st.SearchStrategy[datetime]:
    return st.datetimes(
        datetime(first_year, 1, 1),  # noqa: DTZ001 - hypothesis adds the zone
        datetime(2100, 1, 1),  # noqa: DTZ001 - the same
        timezones=st.just(UTC),
    )


def _utc(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


def _check_neighbours(now: datetime, at: time, zone: ZoneInfo) -> None:
    last, following = last_due(now, at, zone), next_due(now, at, zone)
    assert last <= now < following
    # What is due next becomes what was due last at that very instant, and at none before.
    assert last_due(following, at, zone) == following
    assert last_due(following - INSTANT, at, zone) == last
    assert next_due(last, at, zone) == following
    assert next_due(last - INSTANT, at, zone) == last


# Since 2012 no zone's clocks are put back across midnight to before it.
@given(now=_moments(2012), at=TIMES, zone=ZONES)
@example(now=_utc("2026-03-29T01:00:00"), at=time(2, 30), zone=BERLIN)
@example(now=_utc("2026-10-25T00:30:00"), at=time(2, 30), zone=BERLIN)
@example(now=_utc("2026-10-25T01:00:00"), at=time(2, 30), zone=BERLIN)
@example(now=_utc("2026-04-05T15:00:00"), at=time(1, 45), zone=ZoneInfo("Australia/Lord_Howe"))
@example(now=_utc("2026-10-25T01:00:00"), at=time(23, 30), zone=ZoneInfo("America/Nuuk"))
def test_the_next_due_time_is_the_inverse_of_the_last(
    now: datetime, at: time, zone: ZoneInfo
) -> None:
    _check_neighbours(now, at, zone)


@given(now=_moments(2012), at=TIMES, zone=ZONES)
def test_a_due_time_is_what_local_clocks_show_or_skip(
    now: datetime, at: time, zone: ZoneInfo
) -> None:
    due = last_due(now, at, zone)
    shown = due.astimezone(zone)
    assert shown.fold == 0, "of a time that comes twice, the first"
    if shown.time() != at:
        # It was skipped: clocks showed less than it, and a moment later more.
        before = (due - timedelta(days=1)).astimezone(zone)
        assert shown.utcoffset() != before.utcoffset()
        assert shown.replace(tzinfo=None) > datetime.combine(shown.date(), at)


@pytest.mark.parametrize(
    ("now", "at", "due"),
    [
        # An instant at which it is due is not before itself.
        ("2026-01-15T00:59:59", "02:00", "2026-01-15T01:00:00"),
        ("2026-01-15T01:00:00", "02:00", "2026-01-16T01:00:00"),
        # 2026-03-29, 02:00 to 03:00 does not exist: 02:30 is taken an hour later, at 03:30.
        ("2026-03-28T01:30:00", "02:30", "2026-03-29T01:30:00"),
        ("2026-03-29T01:30:00", "02:30", "2026-03-30T00:30:00"),
        # 2026-10-25, 02:00 to 03:00 comes twice: the first counts.
        ("2026-10-24T12:00:00", "02:30", "2026-10-25T00:30:00"),
        ("2026-10-25T00:30:00", "02:30", "2026-10-26T01:30:00"),
        # Late in the evening, local and UTC dates differ.
        ("2026-07-14T22:30:00", "00:15", "2026-07-15T22:15:00"),
    ],
)
def test_what_is_due_next_follows_local_clocks(now: str, at: str, due: str) -> None:
    assert next_due(_utc(now), time.fromisoformat(at), BERLIN) == _utc(due)


@pytest.mark.parametrize("at", ["00:00", "02:30", "03:00", "23:59"])
@pytest.mark.parametrize("zone", ["Europe/Berlin", "America/Santiago", "Pacific/Apia", "Asia/Gaza"])
def test_a_year_has_a_due_time_every_day(zone: str, at: str) -> None:
    due = [_utc("2026-01-01T12:00:00")]
    for _ in range(366):
        due.append(next_due(due[-1], time.fromisoformat(at), ZoneInfo(zone)))
    days = [moment.astimezone(ZoneInfo(zone)).date() for moment in due[1:]]
    assert {later - earlier for earlier, later in pairwise(days)} == {timedelta(days=1)}


def test_clocks_put_back_across_midnight_do_not_make_yesterday_due_again() -> None:
    # 2010-11-07 in St. John's: at 00:01 clocks were put back to 23:01 of the day before.
    zone, midnight = ZoneInfo("America/St_Johns"), time(0, 0)
    for minutes in range(120):
        _check_neighbours(_utc("2010-11-07T02:00:00") + timedelta(minutes=minutes), midnight, zone)
