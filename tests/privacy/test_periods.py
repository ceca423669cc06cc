"""Retention periods: what is read, what is refused, and that no row leaves before its end."""

from datetime import UTC, date, datetime, timedelta

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from backend.errors import RefusedError
from backend.privacy.periods import Period


@pytest.mark.parametrize(
    ("text", "months", "days", "canonical"),
    [
        ("P7Y", 84, 0, "P7Y"),
        ("P2555D", 0, 2555, "P2555D"),
        ("P18M", 18, 0, "P1Y6M"),
        ("P2W", 0, 14, "P14D"),
        ("P1Y2M3W4D", 14, 25, "P1Y2M25D"),
        ("P1D", 0, 1, "P1D"),
        ("P100Y", 1200, 0, "P100Y"),
    ],
)
def test_a_duration_is_read_and_written_back_in_one_spelling(
    text: str, months: int, days: int, canonical: str
) -> None:
    period = Period.parse(text)
    assert (period.months, period.days) == (months, days)
    assert str(period) == canonical
    assert Period.parse(str(period)) == period


@pytest.mark.parametrize(
    "text",
    [
        "", "P", "7Y", "P7", "p7y", "P-1D", "P0D", "P0Y0D", "P1.5Y", "PT1H", "P1DT1H", "P1D1Y",
        " P7Y", "P7Y\n", "P7Y ", "P99999Y", "P36501D", "P101Y", "P1200M1D1", "P\u0667Y", "P7Y7Y",
    ],
)  # fmt: skip
def test_what_is_no_duration_of_a_day_to_a_century_is_refused(text: str) -> None:
    with pytest.raises(RefusedError):
        Period.parse(text)


@pytest.mark.parametrize("days", [-1, 0, 36_501])
def test_days_outside_a_day_to_a_century_are_refused(days: int) -> None:
    assert Period.of_days(1).days == 1
    assert Period.of_days(36_500).days == 36_500
    with pytest.raises(RefusedError):
        Period.of_days(days)


def test_words_are_for_a_reader() -> None:
    assert Period.parse("P7Y").words == "7 years"
    assert Period.parse("P1Y1M").words == "1 year and 1 month"
    assert Period.parse("P1D").words == "1 day"


def test_seven_years_are_the_calendar_s_and_not_2555_days() -> None:
    issued = utc(2024, 1, 1)
    assert Period.parse("P7Y").end(issued) == utc(2031, 1, 1)
    assert Period.of_days(2555).end(issued) == utc(2030, 12, 30)


def test_a_year_from_29_february_ends_on_1_march() -> None:
    assert Period.parse("P1Y").end(utc(2024, 2, 29)) == utc(2025, 3, 1)
    assert Period.parse("P4Y").end(utc(2024, 2, 29)) == utc(2028, 2, 29)
    assert Period.parse("P1M").end(utc(2027, 1, 31)) == utc(2027, 3, 1)


def test_a_day_counts_whole() -> None:
    assert Period.parse("P1D").end_of_day(date(2026, 1, 1)) == date(2026, 1, 3)
    assert Period.parse("P1Y").end_of_day(date(2024, 2, 28)) == date(2025, 3, 1)


def utc(year: int, month: int, day: int) -> datetime:
    return datetime(year, month, day, tzinfo=UTC)


def test_the_cutoff_of_29_february_is_not_in_march() -> None:
    leap_day = datetime(2024, 2, 29, tzinfo=UTC)
    cutoff = Period.parse("P1Y").cutoff(leap_day)
    assert datetime(2023, 2, 28, tzinfo=UTC) <= cutoff < datetime(2023, 3, 1, tzinfo=UTC)


moments = st.datetimes(datetime(1990, 1, 1), datetime(2090, 12, 31), timezones=st.just(UTC))  # noqa: DTZ001 - hypothesis adds the zone
periods = st.builds(
    Period,
    st.sampled_from([0, 1, 2, 6, 11, 12, 18, 84, 120]),
    st.sampled_from([0, 1, 10, 28, 30, 365, 2555]),
).filter(lambda period: period.months or period.days)


@given(anchor=moments, period=periods)
@example(anchor=datetime(2027, 1, 31, tzinfo=UTC), period=Period(1, 10))
@example(anchor=datetime(2024, 2, 29, 12, tzinfo=UTC), period=Period(84, 0))
def test_a_row_is_due_from_the_end_that_is_told_and_not_a_moment_before(
    anchor: datetime, period: Period
) -> None:
    end = period.end(anchor)
    assert anchor <= period.cutoff(end)
    assert anchor > period.cutoff(end - timedelta(microseconds=1))


@given(now=moments, period=periods, later=st.timedeltas(timedelta(0), timedelta(days=40)))
@example(now=datetime(2027, 3, 28, 23, tzinfo=UTC), period=Period(1, 0), later=timedelta(hours=3))
def test_what_is_due_once_stays_due(now: datetime, period: Period, later: timedelta) -> None:
    assert period.cutoff(now) <= period.cutoff(now + later)


@given(moment=moments, days=st.integers(1, 36_500))
def test_days_are_whole_days(moment: datetime, days: int) -> None:
    period = Period.of_days(days)
    assert period.end(period.cutoff(moment)) == moment
    assert moment - period.cutoff(moment) == timedelta(days=days)
