"""Ends and cutoffs: each the exact inverse of the other, by the calendar, the year and in UTC."""

from datetime import UTC, date, datetime, timedelta, timezone
from zoneinfo import ZoneInfo

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from backend.privacy.periods import Period

TICK, DAY = timedelta(microseconds=1), timedelta(days=1)
ZONES = (
    timezone(timedelta(hours=14)),
    timezone(timedelta(hours=-12)),
    ZoneInfo("Europe/Berlin"),
    ZoneInfo("America/New_York"),
)


def utc(year: int, month: int, day: int, hour: int = 0, minute: int = 0) -> datetime:
    return datetime(year, month, day, hour, minute, tzinfo=UTC)


def midnight(day: date) -> datetime:
    return utc(day.year, day.month, day.day)


# The ends of months and years are where calendars go wrong: half of all moments are there.
_anywhere = st.datetimes(datetime(1950, 1, 1), datetime(2090, 12, 31), timezones=st.just(UTC))  # noqa: DTZ001 - hypothesis adds the zone
_edges = st.builds(
    lambda year, month, off: utc(year, month, 1) + off,
    st.integers(1950, 2090),
    st.sampled_from([1, 1, 3, 12]),
    st.sampled_from([-3 * DAY, -2 * DAY, -DAY, -TICK, timedelta(0), TICK, DAY]),
)
moments = _anywhere | _edges
days = moments.map(datetime.date)
periods = st.builds(
    Period,
    st.sampled_from([0, 1, 2, 11, 12, 13, 84, 120]) | st.integers(0, 600),
    st.sampled_from([0, 1, 30, 365]) | st.integers(0, 18_000),
    st.booleans(),
).filter(lambda period: period.months or period.days)


@given(anchor=moments, period=periods)
@example(anchor=utc(2024, 2, 29, 12), period=Period(12, 0))
@example(anchor=utc(2026, 1, 1) - TICK, period=Period(84, 0, year_end=True))
def test_an_anchor_reaches_the_cutoff_at_its_end_and_no_instant_before(
    anchor: datetime, period: Period
) -> None:
    end = period.end(anchor)
    assert period.cutoff(end - TICK) < anchor <= period.cutoff(end)


@given(now=moments, period=periods)
@example(now=utc(2027, 3, 31), period=Period(1, 0))
@example(now=utc(2027, 1, 1) - TICK, period=Period(12, 0, year_end=True))
def test_the_cutoff_is_due_and_the_instant_after_it_is_not(now: datetime, period: Period) -> None:
    cutoff = period.cutoff(now)
    assert period.end(cutoff) <= now < period.end(cutoff + TICK)


@given(anchor=days, period=periods)
@example(anchor=date(2024, 2, 28), period=Period(12, 0))
@example(anchor=date(2025, 12, 31), period=Period(84, 0, year_end=True))
def test_a_day_is_due_from_the_midnight_of_its_end_and_no_instant_before(
    anchor: date, period: Period
) -> None:
    end = midnight(period.end_of_day(anchor))
    assert period.cutoff_day(end - TICK) <= anchor < period.cutoff_day(end)


@given(now=moments, period=periods)
def test_the_cutoff_day_is_the_first_that_is_not_due(now: datetime, period: Period) -> None:
    first = period.cutoff_day(now)
    assert midnight(period.end_of_day(first - DAY)) <= now < midnight(period.end_of_day(first))


@given(anchor=moments, period=periods)
def test_a_day_leaves_no_sooner_than_the_last_instant_of_it(
    anchor: datetime, period: Period
) -> None:
    last = midnight(anchor.date()) + DAY - TICK
    assert midnight(period.end_of_day(anchor.date())) >= period.end(last)


@given(now=moments, period=periods, later=st.timedeltas(timedelta(0), timedelta(days=800)))
def test_what_is_due_once_stays_due(now: datetime, period: Period, later: timedelta) -> None:
    assert period.cutoff(now) <= period.cutoff(now + later)
    assert period.cutoff_day(now) <= period.cutoff_day(now + later)


@given(anchor=_anywhere.filter(lambda at: at.year < 2089), period=periods)
def test_no_row_leaves_before_the_fewest_days_that_a_period_is_said_to_take(
    anchor: datetime, period: Period
) -> None:
    least = timedelta(days=period.shortest_days)
    # Over 2100, which has no leap day: see below.
    spare = DAY if period.end(anchor) >= utc(2100, 1, 1) else timedelta(0)
    assert period.end(anchor) - anchor >= least - spare
    assert period.end_of_day(anchor.date()) - anchor.date() >= least - spare


@pytest.mark.parametrize(
    ("text", "least"),
    [("P1D", 1), ("P1M", 28), ("P1M3D", 31), ("P2M", 59), ("P1Y", 365), ("P3Y", 1095)],
)
def test_somewhere_a_period_takes_no_more_than_its_fewest_days(text: str, least: int) -> None:
    period = Period.parse(text)
    begins = [utc(2001, 1, 1) + n * DAY for n in range(1461)]
    taken = min((period.end(begin) - begin).days for begin in begins)
    assert (period.shortest_days, taken) == (least, least)


def test_the_fewest_days_hold_over_the_turn_of_the_next_century_too() -> None:
    begin, period = utc(2096, 3, 1), Period.parse("P7Y")
    assert (period.end(begin) - begin).days >= period.shortest_days


def test_books_of_a_year_leave_together_when_the_years_after_it_are_over() -> None:
    period = Period.parse("P7Y", year_end=True)
    for anchor in (utc(2019, 1, 1), utc(2019, 6, 30, 12), utc(2020, 1, 1) - TICK):
        assert period.end(anchor) == utc(2027, 1, 1)
        assert period.end_of_day(anchor.date()) == date(2027, 1, 1)
    assert period.end(utc(2020, 1, 1)) == utc(2028, 1, 1)
    assert period.cutoff_day(utc(2027, 1, 1)) == date(2020, 1, 1)
    assert period.cutoff_day(utc(2027, 1, 1) - TICK) == date(2019, 1, 1)
    # Days come after the years: 31 January is not yet the end.
    month = Period.parse("P1Y31D", year_end=True)
    assert month.end(utc(2024, 5, 5)) == utc(2026, 2, 1)


def test_a_year_ends_in_utc_wherever_its_anchor_was_written() -> None:
    period = Period.parse("P1Y", year_end=True)
    # In Berlin it was 2026 already.
    anchor = datetime(2026, 1, 1, 0, 30, tzinfo=ZoneInfo("Europe/Berlin"))
    assert period.end(anchor) == utc(2027, 1, 1)
    assert period.end(anchor + timedelta(hours=1)) == utc(2028, 1, 1)


@given(now=moments, period=periods.filter(lambda p: p.year_end), zone=st.sampled_from(ZONES))
def test_a_year_s_end_is_the_same_instant_however_it_is_written(
    now: datetime, period: Period, zone: timezone | ZoneInfo
) -> None:
    assert period.end(now.astimezone(zone)) == period.end(now)


@given(now=moments, period=periods, zone=st.sampled_from(ZONES))
@example(now=utc(2026, 2, 28, 22, 30), period=Period(1, 0), zone=ZONES[0])
def test_what_is_due_now_does_not_depend_on_the_zone_in_which_now_is_written(
    now: datetime, period: Period, zone: timezone | ZoneInfo
) -> None:
    there = now.astimezone(zone)
    assert period.cutoff(there) == period.cutoff(now)
    assert period.cutoff_day(there) == period.cutoff_day(now)
    assert period.end(there) == period.end(now)


@pytest.mark.parametrize("year_end", [False, True])
def test_a_moment_without_a_zone_is_refused(year_end: bool) -> None:
    period, naive = Period.parse("P1Y", year_end=year_end), utc(2026, 1, 1).replace(tzinfo=None)
    assert period.cutoff(naive.replace(tzinfo=UTC))
    for count in (period.cutoff, period.cutoff_day, period.end):
        with pytest.raises(ValueError, match="zone"):
            count(naive)
