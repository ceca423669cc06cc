"""The brake: what a run must not do before somebody has looked, and that it goes when they have."""

import json
import time
from datetime import UTC, datetime, timedelta
from typing import Any, Final

import pytest
from sqlalchemy import select

from backend.db_utils import session_scope
from backend.errors import StalePlanError
from backend.models import Alert, AlertKind, AuditEvent
from backend.privacy.periods import Period
from backend.services.brake_service import BrakeError, get_brake_service
from backend.services.policy_service import get_policy_service
from backend.services.retention_results import RetentionRun
from backend.services.retention_service import get_retention_service
from backend.services.setup_service import get_setup_service
from backend.settings import RetentionAction
from tests.conftest import Service, clear_caches
from tests.privacy import people
from tests.privacy.people import ADMINISTRATOR, dump, feedback

NOW: Final = datetime(2026, 11, 20, 14, 30, 15, tzinfo=UTC)
DAY: Final = timedelta(days=1)
HOUR: Final = timedelta(hours=1)
DUE, FRESH = NOW - 400 * DAY, NOW - DAY
DELETE = RetentionAction.DELETE


@pytest.fixture(autouse=True)
def _new_process() -> None:
    """What a process remembers of its last run is not another test's."""
    get_brake_service.cache_clear()


def apply(plan_digest: str | None = None, *, dry_run: bool = False, **fields: Any) -> RetentionRun:
    given = {"dry_run": dry_run, "data_type": "feedback", "plan_digest": plan_digest, "now": NOW}
    arguments: dict[str, Any] = given | fields
    return get_retention_service().apply(ADMINISTRATOR, **arguments)


def fill(due: int, fresh: int = 0, now: datetime = NOW) -> None:
    with session_scope() as session:
        session.add_all([feedback(None, now - 400 * DAY) for _ in range(due)])
        session.add_all([feedback(None, now - DAY) for _ in range(fresh)])


def configure(monkeypatch: pytest.MonkeyPatch, **settings: object) -> None:
    for name, value in settings.items():
        monkeypatch.setenv(f"RETENTION_{name.upper()}", str(value))
    clear_caches()
    get_setup_service().open()


def set_policy(period: str, *, year_end: bool = False, enabled: bool = True) -> None:
    with session_scope() as session:
        get_policy_service().set(
            session, ADMINISTRATOR, "feedback", Period.parse(period, year_end=year_end), DELETE,
            enabled=enabled,
        )  # fmt: skip


def alerts() -> set[tuple[str, str]]:
    with session_scope(read_only=True) as session:
        found = session.scalars(select(Alert).where(Alert.kind == AlertKind.RETENTION_BRAKE))
        return {(alert.about, alert.code) for alert in found}


def last_event() -> tuple[str, dict[str, Any]]:
    with session_scope(read_only=True) as session:
        event = session.scalars(select(AuditEvent).order_by(AuditEvent.id.desc()).limit(1)).one()
        return event.outcome, json.loads(event.detail or "{}")


def assert_brakes(*reasons: str, **fields: Any) -> None:
    """It stops before the first row, says so, and goes with the digest that it names."""
    about = {("all" if reason == "clock" else "feedback", reason) for reason in reasons}
    before = dump()
    with pytest.raises(BrakeError) as refused:
        apply(**fields)
    after = dump()
    assert people.without(after, {}, "alerts", "audit_events") == people.without(
        before, {}, "alerts", "audit_events"
    )
    problem = refused.value.extra
    assert {(b["data_type"], b["reason"]) for b in problem["brakes"]} == about
    assert alerts() >= about
    outcome, detail = last_event()
    assert outcome == "brake"
    assert set(detail["brakes"]) == {" ".join(each) for each in about}
    looked = apply(dry_run=True, **fields)
    assert {(b.data_type, b.reason) for b in looked.brakes} == about
    assert looked.plan_digest == problem["plan_digest"]
    done = apply(looked.plan_digest, **fields)
    assert done.affected == looked.affected > 0
    outcome, detail = last_event()
    assert (outcome, detail["confirmed"]) == ("done", True)


def test_a_share_of_the_table_above_the_limit_brakes_and_the_exact_limit_does_not(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    configure(monkeypatch, brake_rows=0, brake_percent=20, brake_multiple=1000)
    fill(due=10, fresh=40)
    assert apply().affected == 10
    fill(due=11)  # Of 51.
    assert_brakes("share")
    assert apply().affected == 0


def test_few_rows_do_not_brake_whatever_their_share(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    configure(monkeypatch, brake_rows=5)
    fill(due=5)
    assert apply().affected == 5
    fill(due=6)
    assert_brakes("share")


def test_many_times_the_usual_brakes_and_the_exact_limit_does_not(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    configure(monkeypatch, brake_rows=3, brake_percent=100, brake_multiple=4)
    for day, rows in enumerate((2, 9, 2)):
        # What is usual is the median, and nobody knows it after two runs.
        fill(due=rows, now=NOW - (3 - day) * DAY)
        assert apply(now=NOW - (3 - day) * DAY).affected == rows
    fill(due=8)
    assert apply().affected == 8
    fill(due=23)  # The median of 2, 9, 2, 8 is 5.5.
    assert_brakes("usual", now=NOW + DAY)


@pytest.mark.parametrize(
    ("period", "brakes"), [("P200D", False), ("P100D", False), ("P99D", True), ("P3M", True)]
)
def test_a_policy_that_is_shortened_by_more_than_half_brakes(
    service: Service, period: str, *, brakes: bool
) -> None:
    set_policy("P200D")
    fill(due=1, fresh=1)
    assert apply(now=NOW - HOUR).affected == 1
    set_policy(period)
    fill(due=1)
    if brakes:
        assert_brakes("shortened")
        fill(due=1)
    assert apply(now=NOW + HOUR).affected == 1


def test_a_shortened_policy_brakes_also_when_it_finds_its_first_row_later(
    service: Service,
) -> None:
    set_policy("P200D")
    fill(due=1)
    apply(now=NOW - 2 * HOUR)
    set_policy("P10D")
    assert apply(now=NOW - HOUR).affected == 0
    fill(due=1)
    assert_brakes("shortened")


def test_leaving_out_the_end_of_the_year_shortens_a_policy(service: Service) -> None:
    set_policy("P1M", year_end=True)
    fill(due=1)
    apply(now=NOW - HOUR)
    # 40 days old: kept until the end of January, and now due.
    service.add(feedback(None, NOW - 40 * DAY))
    set_policy("P1M")
    assert_brakes("shortened")


def test_a_policy_that_was_shortened_before_the_first_run_brakes(service: Service) -> None:
    set_policy("P1D")  # The environment's is 365 days.
    fill(due=1)
    assert_brakes("shortened")


@pytest.mark.parametrize(("moved", "brakes"), [(DAY, False), (DAY + timedelta(seconds=1), True)])
def test_a_clock_that_goes_back_more_than_a_day_brakes_in_any_process(
    service: Service, moved: timedelta, *, brakes: bool
) -> None:
    fill(due=1)
    apply(now=NOW + moved)
    get_brake_service.cache_clear()
    fill(due=1)
    if brakes:
        assert_brakes("clock")
    else:
        assert apply().affected == 1


class Ticks:
    """Clocks that nobody sets."""

    def __init__(self) -> None:
        self.passed = 0.0

    CLOCK_MONOTONIC = time.CLOCK_MONOTONIC

    def clock_gettime(self, clock: int) -> float:
        return time.clock_gettime(clock) + self.passed


@pytest.mark.parametrize(
    ("moved", "passed", "brakes"),
    [
        (3 * DAY, 3 * DAY, False),
        (3 * DAY, 2 * DAY + HOUR, False),
        (3 * DAY, 2 * DAY - HOUR, True),
        # It stood still, which is as if it had gone back.
        (timedelta(), 2 * DAY, True),
    ],
)
def test_a_clock_that_moves_otherwise_than_time_passes_brakes_within_a_process(
    service: Service, monkeypatch: pytest.MonkeyPatch,
    moved: timedelta, passed: timedelta, *, brakes: bool,
) -> None:  # fmt: skip
    ticks = Ticks()
    monkeypatch.setattr("backend.services.brake_service.time", ticks)
    fill(due=1)
    apply()
    ticks.passed = passed.total_seconds()
    fill(due=1)
    if brakes:
        assert_brakes("clock", now=NOW + moved)
        # Confirmed once, the clock is taken to be right.
        fill(due=1)
    assert apply(now=NOW + moved + HOUR).affected == 1


def test_a_process_that_was_down_for_long_does_not_brake(service: Service) -> None:
    fill(due=1)
    apply()
    get_brake_service.cache_clear()
    fill(due=1)
    assert apply(now=NOW + 9 * DAY).affected == 1


def test_a_clock_that_was_put_right_brakes_once(service: Service) -> None:
    fill(due=1)
    apply(now=NOW + 3000 * DAY)
    get_brake_service.cache_clear()
    fill(due=1)
    assert_brakes("clock")
    fill(due=1)
    assert apply(now=NOW + HOUR).affected == 1


def test_what_touches_nothing_does_not_brake(service: Service) -> None:
    fill(due=0, fresh=30)
    apply()
    assert apply(now=NOW - 9 * DAY).brakes == []
    assert alerts() == set()


def test_all_reasons_are_told_at_once(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    configure(monkeypatch, brake_rows=0, brake_percent=50, brake_multiple=2)
    set_policy("P300D")
    for day in (4, 3, 2):
        fill(due=1, fresh=2)
        apply(now=NOW - day * DAY)
    set_policy("P10D")
    fill(due=9)
    assert_brakes("share", "usual", "shortened", "clock", now=NOW - 5 * DAY)


def test_a_stale_digest_is_refused_where_the_run_brakes_too(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    configure(monkeypatch, brake_rows=0)
    fill(due=3)
    digest = apply(dry_run=True).plan_digest
    fill(due=1)
    with pytest.raises(StalePlanError):
        apply(digest)
    assert len(dump()["feedback"]) == 4
    assert apply(apply(dry_run=True).plan_digest).affected == 4
