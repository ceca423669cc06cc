"""The brake as others meet it: over HTTP, in the scheduler's job, and in a restore."""

from datetime import UTC, datetime, timedelta
from typing import Any, Final
from uuid import uuid4

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import func, select, update

from backend.db_utils import session_scope
from backend.models import (
    AuditEvent,
    Booking,
    DataRetentionLog,
    Feedback,
    InactivityNotice,
    Installation,
    JobRun,
    JobStatus,
    RetentionStatus,
)
from backend.services.audit_service import COMMAND_LINE
from backend.services.backup_service import get_backup_service
from backend.services.brake_service import BrakeError, get_brake_service
from backend.services.restore_service import get_restore_service
from backend.services.scheduler_service import MAX_ATTEMPTS, SchedulerService
from tests.conftest import Service
from tests.privacy import people
from tests.privacy.people import dump, feedback
from tests.services.test_retention_brake import alerts, apply, configure, set_policy

DAY: Final = timedelta(days=1)
URL: Final = "/security/retention/apply"
# As in the scheduler's own tests: past the due time of 02:00 UTC.
TODAY: Final = datetime.now(UTC).replace(hour=12, minute=0, second=0, microsecond=0)


@pytest.fixture(autouse=True)
def _new_process() -> None:
    get_brake_service.cache_clear()


def add(rows: int, days: int) -> None:
    """Add feedback that is so old."""
    with session_scope() as session:
        session.add_all([feedback(None, datetime.now(UTC) - days * DAY) for _ in range(rows)])


def rows_left() -> int:
    with session_scope(read_only=True) as session:
        return session.scalar(select(func.count()).select_from(Feedback)) or 0


def test_over_http_a_run_that_brakes_is_a_conflict_that_says_how_to_go_on(
    client: TestClient, service: Service, admin: dict[str, str]
) -> None:
    add(21, days=400)
    body: dict[str, Any] = {"dry_run": False, "data_type": "feedback"}
    refused = client.post(URL, json=body, headers=admin)
    problem = refused.json()
    assert (refused.status_code, problem["code"]) == (409, "retention_brake")
    assert refused.headers["content-type"].startswith("application/problem+json")
    assert problem["brakes"] == [{"data_type": "feedback", "reason": "share"}]
    assert rows_left() == 21
    looked = client.post(URL, json=body | {"dry_run": True}, headers=admin).json()
    assert looked["plan_digest"] == problem["plan_digest"]
    assert [(b["data_type"], b["reason"]) for b in looked["brakes"]] == [("feedback", "share")]
    assert "21 of 21 rows" in looked["brakes"][0]["words"]
    # The digest of another plan confirms nothing: this one is of all policies.
    other = client.post(URL, json={"dry_run": True}, headers=admin).json()["plan_digest"]
    stale = client.post(URL, json=body | {"plan_digest": other}, headers=admin)
    assert (stale.status_code, stale.json()["code"], rows_left()) == (409, "stale_plan", 21)
    done = client.post(URL, json=body | {"plan_digest": looked["plan_digest"]}, headers=admin)
    assert (done.status_code, rows_left()) == (200, 0)
    assert done.json()["results"][0]["affected"] == 21


def scheduled() -> SchedulerService:
    runner = SchedulerService()
    vars(runner)["_jobs"] = tuple(job for job in runner._jobs if job.name == "retention")
    return runner


def last_job() -> JobRun:
    with session_scope(read_only=True) as session:
        return session.scalars(select(JobRun).order_by(JobRun.due_at.desc()).limit(1)).one()


def events(outcome: str) -> int:
    with session_scope(read_only=True) as session:
        found = select(func.count()).select_from(AuditEvent)
        return session.scalar(found.where(AuditEvent.outcome == outcome)) or 0


def test_the_schedulers_job_that_brakes_waits_for_a_word_and_the_next_night_is_new(
    service: Service,
) -> None:
    runner = scheduled()
    assert runner.tick(TODAY) == []
    add(21, days=400)
    night = TODAY + DAY
    assert runner.tick(night) == ["retention"]
    job = last_job()
    assert (job.status, job.error, job.attempts) == (
        JobStatus.FAILED, "retention_brake", MAX_ATTEMPTS
    )  # fmt: skip
    assert alerts() == {("feedback", "share")}
    for minutes in (0, 3, 60, 600):
        assert runner.tick(night + timedelta(minutes=minutes)) == []
    assert (events("brake"), rows_left()) == (1, 21)
    # Nobody has said a word: it stops again, and the alert of today stands for both.
    assert runner.tick(night + DAY) == ["retention"]
    assert (events("brake"), rows_left(), alerts()) == (2, 21, {("feedback", "share")})
    now = datetime.now(UTC)
    looked = apply(dry_run=True, data_type=None, now=now)
    assert apply(looked.plan_digest, data_type=None, now=now).affected == 21
    add(1, days=400)
    assert runner.tick(night + 2 * DAY) == ["retention"]
    assert (last_job().status, rows_left()) == (JobStatus.DONE, 0)


def test_a_run_that_brakes_queues_no_notices(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    configure(monkeypatch, notice_days=30)
    service.user("jane@example.com")
    now = datetime.now(UTC)
    add(1, days=400)
    apply(now=now)
    add(1, days=400)
    with pytest.raises(BrakeError):
        # The clock has jumped: by it everybody has been away for eleven years.
        apply(data_type=None, now=now + 4000 * DAY)
    with session_scope(read_only=True) as session:
        assert session.scalars(select(InactivityNotice.user_id)).all() == []


def restore() -> int:
    """Restore the newest backup; return how many rows retention took from it."""
    restored = get_restore_service().restore(None, COMMAND_LINE, dry_run=False, confirm=True)
    return restored.reapplied.retention


def test_a_restore_retires_as_was_applied_where_a_policy_was_shortened_since(
    service: Service,
) -> None:
    set_policy("P200D")
    add(1, days=400)
    apply(now=datetime.now(UTC))
    add(2, days=300)
    add(3, days=100)
    get_backup_service().create(COMMAND_LINE)
    set_policy("P10D")
    # What the shortened policy would take was never confirmed.
    assert restore() == 2
    assert rows_left() == 3
    with pytest.raises(BrakeError, match="P200D"):
        apply(now=datetime.now(UTC))


def test_a_restore_retires_by_a_shortened_policy_once_that_was_confirmed(
    service: Service,
) -> None:
    set_policy("P200D")
    add(1, days=400)
    apply(now=datetime.now(UTC))
    add(3, days=100)
    get_backup_service().create(COMMAND_LINE)
    set_policy("P10D")
    now = datetime.now(UTC)
    apply(apply(dry_run=True, now=now).plan_digest, now=now)
    assert rows_left() == 0
    assert restore() == 3
    assert rows_left() == 0


def test_a_restore_takes_nothing_by_a_policy_that_never_ran(service: Service) -> None:
    service.add(people.booking(None, (TODAY - 5000 * DAY).date()))
    get_backup_service().create(COMMAND_LINE)
    # Nobody has seen more of it than what a dry run says.
    apply(dry_run=True, data_type="booking", now=datetime.now(UTC))
    assert restore() == 0
    assert [row["anonymized_at"] for row in dump()["bookings"].values()] == [None]
    apply(data_type="booking", now=datetime.now(UTC))
    assert restore() == 1
    assert all(row["anonymized_at"] for row in dump()["bookings"].values())


def test_without_the_log_of_runs_a_restore_applies_what_is_not_much(service: Service) -> None:
    add(30, days=400)
    service.add(people.booking(None, (TODAY - 5000 * DAY).date()))
    get_backup_service().create(COMMAND_LINE)
    with session_scope() as session:
        # As on a new machine: what has run since the backup, nobody knows there.
        session.execute(update(Installation).values(id=uuid4()))
    # One booking is not many; thirty of thirty rows are.
    assert restore() == 1
    assert rows_left() == 30
    assert all(row["anonymized_at"] for row in dump()["bookings"].values())


def test_what_a_run_that_was_cut_short_has_removed_does_not_come_back(service: Service) -> None:
    add(2, days=400)
    get_backup_service().create(COMMAND_LINE)
    apply(now=datetime.now(UTC))
    with session_scope() as session:
        session.execute(update(DataRetentionLog).values(status=RetentionStatus.INTERRUPTED))
    assert restore() == 2
    assert rows_left() == 0


@pytest.mark.parametrize("period", ["P365D", "off"])
def test_what_retention_has_removed_does_not_come_back_whatever_the_policy_is_now(
    service: Service, period: str
) -> None:
    set_policy("P30D")
    add(3, days=100)
    get_backup_service().create(COMMAND_LINE)
    apply(apply(dry_run=True, now=datetime.now(UTC)).plan_digest, now=datetime.now(UTC))
    assert rows_left() == 0
    set_policy("P30D" if period == "off" else period, enabled=period != "off")
    restore()
    assert rows_left() == 0


def test_what_is_anonymous_already_does_not_make_a_share_look_small(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    configure(monkeypatch, brake_rows=0)
    service.add(*(people.booking(None, (TODAY - 5000 * DAY).date()) for _ in range(50)))
    with session_scope() as session:
        session.execute(update(Booking).values(anonymized_at=TODAY))
    service.add(*(people.booking(None, (TODAY - 5000 * DAY).date()) for _ in range(10)))
    # All that speaks of anybody.
    with pytest.raises(BrakeError):
        apply(data_type="booking", now=TODAY)


def test_no_other_rows_have_the_same_digest(service: Service) -> None:
    now = TODAY
    rows = [feedback(None, now) for _ in range(8)]
    service.add(*rows)
    digests = {}

    def plan_of(*due: int) -> str:
        with session_scope() as session:
            for at, row in enumerate(rows, 1):
                session.merge(row).submitted_at = now - 400 * DAY if at in due else now
        return apply(dry_run=True, now=now).plan_digest

    # As many rows each, and the same sum of their keys as another one.
    for due in ((1, 2, 5, 6), (1, 3, 4, 6), (1, 4, 5, 7), (1, 3, 6, 7), (1, 2, 7, 8), (1, 4, 5, 8)):
        digests[due] = plan_of(*due)
    assert len(set(digests.values())) == len(digests)
