"""The scheduler seen from outside: its status, its alerts, its metrics, and how it stops."""

import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any, Final

import pytest
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy import select, update
from sqlalchemy.orm import Session

from backend.db_utils import session_scope
from backend.errors import RefusedError
from backend.models import Alert, AlertKind, BackupRecord, JobRun, JobStatus
from backend.services.alert_service import get_alert_service
from backend.services.audit_service import COMMAND_LINE
from backend.services.backup_service import get_backup_service
from backend.services.checkpoint_service import get_checkpoint_service
from backend.services.scheduler_service import (
    MAX_ATTEMPTS,
    Job,
    SchedulerService,
    get_scheduler_service,
)
from backend.settings import get_settings
from tests.conftest import Service, SignIn
from tests.privacy.people import person_hold
from tests.services.webhook_receiver import (
    CANARY,
    SECRET,
    Clock,
    Receiver,
    receiver,
)

__all__ = ["receiver"]  # fixtures

STATUS: Final = "/security/scheduler/status"
TODAY: Final = datetime.now(UTC).replace(hour=12, minute=0, second=0, microsecond=0)
DUE: Final = TODAY.replace(hour=2) + timedelta(days=1)
Headers = dict[str, str]
Use = Callable[..., None]
# What no engine does otherwise is shown on the one that starts sooner.
SQLITE = pytest.mark.parametrize("service", ["sqlite"], indirect=True)


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Use:
    """Replace the jobs of this process's scheduler."""

    def use_(*jobs: Job) -> None:
        monkeypatch.setattr(get_scheduler_service(), "_jobs", jobs)

    return use_


def _job(run: Callable[[Session], object] = lambda _session: None, name: str = "job") -> Job:
    return Job(name, lambda settings: settings.retention_time, run=run)


def _fail(_session: Session) -> None:
    raise RefusedError("a message that names jane@example.com")


def _watch() -> Job:
    return next(job for job in SchedulerService()._jobs if job.name == "watch")


def _tick(now: datetime) -> list[str]:
    return get_scheduler_service().tick(now)


def _alerts() -> list[tuple[AlertKind, str, str]]:
    with session_scope(read_only=True) as session:
        found = session.scalars(select(Alert).order_by(Alert.raised_at))
        return [(alert.kind, alert.about, alert.code) for alert in found]


def _status(client: TestClient, headers: Headers) -> Any:
    answer = client.get(STATUS, headers=headers)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_the_status_is_for_administrators(
    client: TestClient, service: Service, sign_in: SignIn, admin: Headers
) -> None:
    service.user("jane@example.com")
    assert client.get(STATUS).status_code == 401
    assert client.get(STATUS, headers=sign_in("jane@example.com")).status_code == 403
    assert _status(client, admin)["running"] is False


def test_every_job_is_shown_with_its_last_run(client: TestClient, admin: Headers, use: Use) -> None:
    use(_job(name="good"), _job(_fail, name="bad"))
    assert _tick(TODAY) == []
    assert {job["last_status"] for job in _status(client, admin)["jobs"]} == {"baseline"}
    assert _tick(DUE) == ["good", "bad"]
    status = _status(client, admin)
    good, bad = status["jobs"]
    assert datetime.fromisoformat(good["last_due_at"]) == DUE
    assert (good["name"], good["at"], good["last_status"]) == ("good", "02:00", "done")
    assert (good["last_attempts"], good["last_error"]) == (1, None)
    assert (bad["name"], bad["last_status"], bad["last_error"]) == ("bad", "failed", "refused")
    (alert,) = status["alerts"]
    shown = (alert["kind"], alert["about"], alert["code"], alert["attempts"], alert["sent_at"])
    assert shown == ("job_failed", "bad", "refused", 0, None)
    assert "jane" not in str(status)


@SQLITE
@pytest.mark.parametrize(
    ("now", "due"),
    [
        ("2026-03-28T01:29:59", "2026-03-28T01:30:00"),
        ("2026-03-28T01:30:00", "2026-03-29T01:30:00"),
        ("2026-03-29T01:30:00", "2026-03-30T00:30:00"),
        ("2026-10-24T12:00:00", "2026-10-25T00:30:00"),
        ("2026-10-25T00:30:00", "2026-10-26T01:30:00"),
    ],
)
def test_when_a_job_is_due_next_follows_local_clocks(
    client: TestClient, admin: Headers, monkeypatch: pytest.MonkeyPatch, now: str, due: str
) -> None:
    monkeypatch.setenv("TIMEZONE", "Europe/Berlin")
    monkeypatch.setenv("RETENTION_TIME", "02:30")
    monkeypatch.setenv("BACKUP_TIME", "off")
    monkeypatch.setenv("SCHEDULER_ENABLED", "true")
    get_settings.cache_clear()
    clock = Clock(datetime.fromisoformat(now).replace(tzinfo=UTC))
    monkeypatch.setattr("backend.services.scheduler_service.datetime", clock)
    jobs = {job["name"]: job for job in _status(client, admin)["jobs"]}
    assert list(jobs) == ["retention", "backup", "backup_proof", "backup_expiry", "watch"]
    shown = datetime.fromisoformat(jobs["retention"]["next_due_at"])
    assert shown == datetime.fromisoformat(due).replace(tzinfo=UTC)
    assert (jobs["backup"]["at"], jobs["backup"]["next_due_at"]) == (None, None)
    monkeypatch.setenv("SCHEDULER_ENABLED", "false")
    get_settings.cache_clear()
    assert {job["next_due_at"] for job in _status(client, admin)["jobs"]} == {None}


def test_a_job_that_fails_is_told_once_and_tried_until_its_attempts_are_used(
    service: Service, use: Use
) -> None:
    use(_job(_fail))
    assert _tick(TODAY) == []
    assert _tick(DUE) == ["job"]
    now = DUE
    for attempt in range(1, MAX_ATTEMPTS):
        with session_scope() as session:
            # Attempts are timed by the real clock.
            session.execute(update(JobRun).where(JobRun.due_at == DUE).values(finished_at=now))
        now += timedelta(minutes=2**attempt)
        assert _tick(now) == []
        now += timedelta(seconds=1)
        assert _tick(now) == ["job"]
    with session_scope() as session:
        session.execute(update(JobRun).where(JobRun.due_at == DUE).values(finished_at=now))
        assert session.get_one(JobRun, ("job", DUE)).attempts == MAX_ATTEMPTS
    assert _tick(now + timedelta(hours=6)) == []
    assert _alerts() == [(AlertKind.JOB_FAILED, "job", "refused")]


@pytest.mark.parametrize(("seconds", "told"), [(3600, False), (3601, True)])
def test_a_run_more_than_an_hour_late_is_told_and_made_up_for(
    service: Service, use: Use, seconds: int, told: bool
) -> None:
    use(_job())
    # Before the first start nothing was late.
    assert _tick(TODAY) == []
    assert _alerts() == []
    assert _tick(DUE + timedelta(seconds=seconds)) == ["job"]
    assert _alerts() == ([(AlertKind.JOB_LATE, "job", "late")] if told else [])


def test_a_hold_to_be_reviewed_is_told_by_its_number(
    service: Service, monkeypatch: pytest.MonkeyPatch, use: Use
) -> None:
    monkeypatch.setenv("BACKUP_TIME", "off")
    get_settings.cache_clear()
    now = datetime.now(UTC)
    holds = [person_hold(service.user(f"{name}@example.com")) for name in "abcd"]
    due, later, released, _never = holds
    due.review_on = released.review_on = now - timedelta(days=1)
    later.review_on = now + timedelta(days=2)
    released.released_at = now
    service.add(*holds)
    # As every start makes one: without any, the trail's check has something to tell, too.
    assert get_checkpoint_service().make() is not None
    use(_watch())
    assert _tick(TODAY) == []
    assert _tick(DUE) == ["watch"]
    assert _alerts() == [(AlertKind.HOLD_REVIEW, str(due.id), "due")]


@pytest.mark.parametrize(
    ("proven_days", "known_days", "time_of_backups", "told"),
    [
        (3, 9, "03:00", True),
        (1, 9, "03:00", False),
        # A new installation has had no time to prove anything.
        (None, 9, "03:00", True),
        (None, 1, "03:00", False),
        (None, 9, "off", False),
    ],
)
def test_that_no_new_backup_was_proven_is_told(
    sqlite_service: Service,
    monkeypatch: pytest.MonkeyPatch,
    use: Use,
    proven_days: int | None,
    known_days: int,
    time_of_backups: str,
    told: bool,
) -> None:
    monkeypatch.setenv("BACKUP_TIME", time_of_backups)
    get_settings.cache_clear()
    made = get_backup_service().create(COMMAND_LINE).id
    with session_scope() as session:
        record = session.get_one(BackupRecord, made)
        assert record.verified_at is None
        if proven_days is not None:
            record.created_at = datetime.now(UTC) - timedelta(days=proven_days)
            record.verified_at = datetime.now(UTC)
        known = datetime.now(UTC) - timedelta(days=known_days)
        status, owner = JobStatus.BASELINE, "an earlier process"
        session.add(
            JobRun(
                job="watch", due_at=known, status=status, owner=owner, lease_until=known, attempts=0
            )
        )
    use(_watch())
    assert _tick(DUE) == ["watch"]
    assert _alerts() == ([(AlertKind.BACKUP_UNPROVEN, "backup", "unproven")] if told else [])


def _samples(client: TestClient, name: str) -> dict[str, float]:
    answer = client.get("/metrics")
    assert answer.status_code == 200
    return {
        next(iter(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
        if sample.name == name
    }


def test_the_metrics_show_alerts_and_when_jobs_were_last_done(client: TestClient, use: Use) -> None:
    use(_job(name="good"), _job(_fail, name="bad"))
    _tick(TODAY)
    assert set(_samples(client, "holdfast_alerts").values()) == {0}
    before = time.time()
    _tick(DUE)
    alerts = _samples(client, "holdfast_alerts")
    assert alerts == dict.fromkeys(AlertKind, 0) | {AlertKind.JOB_FAILED: 1}
    done = _samples(client, "holdfast_job_last_done_timestamp_seconds")
    assert before <= done["good"] <= time.time()
    assert "bad" not in done


@SQLITE
def test_the_status_says_whether_the_webhook_took_it_and_not_where_it_is(
    client: TestClient, admin: Headers, receiver: Receiver
) -> None:
    receiver.answer = lambda _received: 500
    with session_scope() as session:
        get_alert_service().raise_alert(session, AlertKind.JOB_FAILED, "job", "boom")
    assert get_alert_service().tell() == 0
    answer = client.get(STATUS, headers=admin)
    (alert,) = answer.json()["alerts"]
    assert (alert["sent_at"], alert["attempts"], alert["error"]) == (None, 1, "status_500")
    for secret in (CANARY, SECRET, receiver.url):
        assert secret not in answer.text + client.get("/metrics").text
