"""Keep rules by themselves: of how many days, weeks and so on the newest backup stays."""

from collections.abc import Iterable
from datetime import UTC, date, datetime, time, timedelta
from typing import Any, Final
from uuid import UUID
from zoneinfo import ZoneInfo

from hypothesis import given
from hypothesis import strategies as st

from backend.backup.keeping import KeepRules, kept

RULES: Final = ("last", "daily", "weekly", "monthly", "yearly")
ZONES: Final = ("UTC", "Europe/Berlin", "America/New_York", "Asia/Kathmandu", "Pacific/Apia",
                "Australia/Lord_Howe")  # fmt: skip


def keeping(moments: Iterable[str], zone: str = "UTC", **rules: int) -> dict[str, list[str]]:
    """Say which of the moments (in *zone*) are kept, by which rules."""
    where = ZoneInfo(zone)
    at = {UUID(int=n): moment for n, moment in enumerate(moments)}
    backups = [(key, datetime.fromisoformat(m).replace(tzinfo=where)) for key, m in at.items()]
    utc = [(key, moment.astimezone(UTC)) for key, moment in backups]
    return {at[key]: why for key, why in kept(utc, KeepRules(**rules), where).items()}


def days(first: str, count: int, step: int = 1) -> list[str]:
    start = datetime.combine(date.fromisoformat(first), time(3))
    return [(start + timedelta(days=step * n)).isoformat() for n in range(count)]


def test_the_newest_of_a_day_counts_and_days_without_a_backup_do_not() -> None:
    found = keeping(
        ["2026-05-01T09:00", "2026-05-01T21:00", "2026-05-04T03:00", "2026-05-20T03:00"], daily=3
    )
    assert found.keys() == {"2026-05-01T21:00", "2026-05-04T03:00", "2026-05-20T03:00"}


def test_weekly_backups_under_a_daily_rule_stay_as_the_documentation_of_restic_says() -> None:
    # "--keep-daily 4" on twelve Sundays keeps the last four.
    sundays = days("2026-01-04", 12, step=7)
    assert keeping(sundays, daily=4).keys() == set(sundays[-4:])


def test_daily_backups_of_years_thin_out_as_the_documentation_of_restic_says() -> None:
    # The last 7 days, which hold the end of one week; 4 more weeks; 11 or 12 more months.
    found = keeping(days("2020-01-01", 2404), daily=7, weekly=5, monthly=12, yearly=75)
    # The last is 2026-07-31, a Friday.
    newest = [f"2026-07-{day:02}" for day in (25, 26, 27, 28, 29, 30, 31)]
    weeks = ["2026-07-05", "2026-07-12", "2026-07-19"]
    months = ["2026-06-30", "2026-05-31", "2026-04-30", "2026-03-31", "2026-02-28", "2026-01-31",
              "2025-12-31", "2025-11-30", "2025-10-31", "2025-09-30", "2025-08-31"]  # fmt: skip
    years = [f"{year}-12-31" for year in range(2020, 2025)]
    assert {moment[:10] for moment in found} == {*newest, *weeks, *months, *years}
    assert found["2026-07-31T03:00:00"] == ["daily", "weekly", "monthly", "yearly"]
    assert found["2026-07-26T03:00:00"] == ["daily", "weekly"]
    assert found["2025-12-31T03:00:00"] == ["monthly", "yearly"]


def test_last_counts_backups_and_not_days() -> None:
    same_day = ["2026-05-01T01:00", "2026-05-01T02:00", "2026-05-01T03:00"]
    assert keeping(same_day, last=2).keys() == set(same_day[1:])
    assert keeping(same_day, daily=2).keys() == {same_day[2]}


def test_a_week_is_that_of_iso_8601_also_at_the_end_of_a_year() -> None:
    # 2027-01-01 is a Friday of the 53rd week of 2026; Monday the 4th begins the first of 2027.
    moments = ["2026-12-27T03:00", "2026-12-31T03:00", "2027-01-03T03:00", "2027-01-04T03:00"]
    assert keeping(moments, weekly=2).keys() == {moments[3], moments[2]}
    assert keeping(moments, weekly=3).keys() == {moments[3], moments[2], moments[0]}
    # A year is the calendar's.
    assert keeping(moments, yearly=2).keys() == {moments[3], moments[1]}
    # 2024-12-30 is a Monday of the first week of 2025.
    turn = ["2024-12-29T03:00", "2024-12-30T03:00", "2025-01-01T03:00"]
    assert keeping(turn, weekly=2).keys() == {turn[2], turn[0]}
    assert keeping(turn, yearly=2).keys() == {turn[2], turn[1]}


def test_a_day_begins_where_the_operator_lives() -> None:
    # In UTC these are of two days, in Berlin of one; and the other way round.
    one_day = {UUID(int=1): "2026-05-01T22:30+00:00", UUID(int=2): "2026-05-02T21:30+00:00"}
    two_days = {UUID(int=1): "2026-05-01T21:30+00:00", UUID(int=2): "2026-05-01T22:30+00:00"}
    for moments, zone, expected in (
        (one_day, "Europe/Berlin", {UUID(int=2)}),
        (one_day, "UTC", {UUID(int=1), UUID(int=2)}),
        (two_days, "Europe/Berlin", {UUID(int=1), UUID(int=2)}),
        (two_days, "UTC", {UUID(int=2)}),
    ):
        backups = [(key, datetime.fromisoformat(at)) for key, at in moments.items()]
        assert kept(backups, KeepRules(daily=2), ZoneInfo(zone)).keys() == expected


def test_a_day_of_23_or_25_hours_is_one_day() -> None:
    for changing in ("2026-03-29", "2026-10-25"):
        hours = [f"{changing}T00:10", f"{changing}T23:50"]
        before = (date.fromisoformat(changing) - timedelta(days=1)).isoformat() + "T23:50"
        found = keeping([before, *hours], "Europe/Berlin", daily=2)
        assert found.keys() == {before, hours[1]}


def test_without_rules_no_rule_keeps_anything() -> None:
    assert keeping(days("2026-01-01", 5)) == {}
    assert not KeepRules().any
    assert all(KeepRules(**{name: 1}).any for name in RULES)


# What strftime calls the period; weeks and their years are those of ISO 8601.
_LABELS: Final = {"daily": "%Y-%m-%d", "weekly": "%G-%V", "monthly": "%Y-%m", "yearly": "%Y"}


def _model(moments: list[datetime], rules: KeepRules, zone: ZoneInfo) -> dict[int, list[str]]:
    """Keep by the letter: name the periods, order them by their newest backup, take so many."""
    found: dict[int, list[str]] = {}
    for name in RULES:
        newest: dict[str, int] = {}
        for n, moment in enumerate(moments):
            # Of the last ones each is a period of its own.
            label = _LABELS.get(name)
            period = str(n) if label is None else moment.astimezone(zone).strftime(label)
            if period not in newest or moments[newest[period]] < moment:
                newest[period] = n
        chosen = sorted(newest.values(), key=lambda n: moments[n], reverse=True)
        for n in chosen[: getattr(rules, name)]:
            found.setdefault(n, []).append(name)
    return found


_START: Final = datetime(2024, 12, 20, tzinfo=UTC)
# Many in a few days around the turn of a year, some hours apart, and a few years of others.
_MOMENTS: Final = st.lists(
    st.one_of(
        st.integers(0, 14 * 24 * 2).map(lambda n: _START + timedelta(minutes=30 * n)),
        st.integers(0, 3 * 365 * 4).map(lambda n: _START + timedelta(hours=6 * n, minutes=7)),
    ),
    unique=True,
    max_size=40,
)


@given(_MOMENTS, st.tuples(*[st.integers(0, 6)] * 5), st.sampled_from(ZONES), st.randoms())
def test_the_rules_keep_what_a_model_by_the_letter_keeps(
    moments: list[datetime], counts: tuple[int, ...], zone: str, random: Any
) -> None:
    rules = KeepRules(**dict(zip(RULES, counts, strict=True)))
    backups = [(UUID(int=n), moment) for n, moment in enumerate(moments)]
    random.shuffle(backups)
    found = kept(backups, rules, ZoneInfo(zone))
    assert {key.int: why for key, why in found.items()} == _model(moments, rules, ZoneInfo(zone))
