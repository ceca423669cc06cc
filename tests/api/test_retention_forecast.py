"""The forecast: month by month what a run would find then, over the API and drawn as bars."""

from datetime import UTC, datetime, timedelta

import pytest
from fastapi.testclient import TestClient

from backend.db_utils import session_scope
from backend.privacy.periods import Period
from backend.services.policy_service import get_policy_service
from backend.services.retention_results import Forecast
from backend.services.retention_service import get_retention_service
from backend.settings import RetentionAction
from tests.conftest import Run, Service
from tests.privacy import people
from tests.privacy.people import ADMINISTRATOR

DAY, TICK = timedelta(days=1), timedelta(microseconds=1)
NOW = datetime(2026, 11, 20, 14, 30, 15, 123456, tzinfo=UTC)
LABELS = ["2026-11", "2026-12", *(f"2027-{month:02d}" for month in range(1, 11))]


def put(data_type: str, period: str, *, year_end: bool = False) -> None:
    with session_scope() as session:
        get_policy_service().set(
            session, ADMINISTRATOR, data_type, Period.parse(period, year_end=year_end),
            RetentionAction.ANONYMIZE, enabled=True,
        )  # fmt: skip


def forecast(data_type: str, now: datetime = NOW) -> Forecast:
    with session_scope(read_only=True) as session:
        found = get_retention_service().forecast(session, now)
    return next(each for each in found if each.data_type == data_type)


def due(data_type: str, at: datetime) -> int:
    with session_scope(read_only=True) as session:
        states = get_retention_service().states(session, at)
    return next(state.due for state in states if state.policy.data_type == data_type)


def last_instants() -> list[datetime]:
    following = [*LABELS[1:], "2027-11"]
    return [datetime.fromisoformat(f"{label}-01T00:00:00+00:00") - TICK for label in following]


def test_the_months_add_up_to_what_is_due_at_their_ends(service: Service) -> None:
    # Never on the first or the last day of a month: see the next test.
    days = [NOW - n * DAY for n in range(0, 420, 3) if 3 < (NOW - n * DAY).day < 27]
    service.add(*(people.feedback(None, day) for day in days))
    service.add(*(people.booking(None, day.date()) for day in days))
    service.add(*(people.booking(None, days[0].date(), anonymized_at=NOW) for _ in range(2)))
    for data_type in ("feedback", "booking"):
        put(data_type, "P1Y")
        found = forecast(data_type)
        assert [label for label, _ in found.months] == LABELS
        assert found.due_now == due(data_type, NOW)
        total = found.due_now
        for (label, coming), end in zip(found.months, last_instants(), strict=True):
            total += coming
            assert total == due(data_type, end), (data_type, label)
        assert 0 < found.due_now < total < len(days)
    assert forecast("invoice").months == [(label, 0) for label in LABELS]


@pytest.mark.parametrize("year_end", [False, True])
def test_what_is_due_on_the_first_of_a_month_is_not_due_in_the_month_before(
    service: Service, year_end: bool
) -> None:
    service.add(people.invoice(None, datetime(2025, 12, 31, tzinfo=UTC).date()))
    service.add(people.payment(None, datetime(2026, 1, 1, tzinfo=UTC) - year_end * TICK))
    for data_type in ("invoice", "payment"):
        put(data_type, "P1Y", year_end=year_end)
        assert due(data_type, datetime(2027, 1, 1, tzinfo=UTC) - TICK) == 0
        assert due(data_type, datetime(2027, 1, 1, tzinfo=UTC)) == 1
        assert dict(forecast(data_type).months) == dict.fromkeys(LABELS, 0) | {"2027-01": 1}


@pytest.mark.parametrize("month", range(1, 13))
def test_the_months_follow_one_another_over_every_turn_of_the_year(
    sqlite_service: Service, month: int
) -> None:
    for day in (1, 28):
        first, *others = forecast("feedback", datetime(2027, month, day, tzinfo=UTC)).months
        assert first[0] == f"2027-{month:02d}"
        names = [name for name, _ in others]
        assert names == sorted(set(names))
        assert len(names) == 11
        assert names[-1] == (f"2028-{month - 1:02d}" if month > 1 else "2027-12")


def test_the_api_the_command_and_its_bars_tell_the_same(
    client: TestClient, service: Service, admin: dict[str, str], run: Run
) -> None:
    now = datetime.now(UTC)
    ages = [365 + 40, *[365 - 45] * 7, *[365 - 200] * 70]
    service.add(*(people.feedback(None, now - age * DAY) for age in ages))
    answer = client.get("/security/retention/forecast", headers=admin).json()["items"]
    listed = client.get("/security/retention/policies", headers=admin).json()["items"]
    shown = run("retention", "status", "--json").json["items"]
    assert [each["data_type"] for each in shown] == [each["data_type"] for each in answer]
    for command, told, policy in zip(shown, answer, listed, strict=True):
        assert command["months"] == told["months"]
        assert len(told["months"]) == 12
        assert command["due"] == told["due_now"] == policy["due"]
        assert command["period"] == policy["retention_period"]
        for name in ("rows", "due_soon", "held", "year_end", "action", "enabled", "last_run_at"):
            assert command[name] == policy[name], name
    (feedback,) = (each for each in answer if each["data_type"] == "feedback")
    coming = {one["month"]: one["due"] for one in feedback["months"]}
    assert sorted(coming.values())[-3:] == [0, 7, 70]
    drawn = run("retention", "status").out
    bars = dict(line.split(maxsplit=1) for line in drawn.splitlines() if "█" in line)
    most = next(month for month, rows in coming.items() if rows == 70)
    fewer = next(month for month, rows in coming.items() if rows == 7)
    assert bars == {
        "now": "█ 1", fewer: f"{'█' * 5} 7", most: f"{'█' * 50} 70",
    }  # fmt: skip
    assert drawn.count("rows that become due") == 1
    assert "\nfeedback: rows that become due\n" in drawn
