"""The scheduler: each due time once, by one runner, whatever clocks and processes do."""

import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from datetime import time as clock_time
from typing import Final
from zoneinfo import ZoneInfo

import pytest
from sqlalchemy import select
from sqlalchemy.orm import Session

from backend.db_utils import session_scope
from backend.errors import RefusedError
from backend.models import BackupRecord, BackupStatus, Feedback, JobRun, JobStatus
from backend.services import scheduler_service
from backend.services.archive_service import exclusive
from backend.services.audit_service import COMMAND_LINE
from backend.services.backup_service import get_backup_service
from backend.services.catalogue_service import get_catalogue_service
from backend.services.job_times import last_due
from backend.services.scheduler_service import (
    LEASE,
    MAX_ATTEMPTS,
    Job,
    SchedulerService,
)
from backend.services.setup_service import get_setup_service
from tests.conftest import Service, clear_caches
from tests.privacy.people import feedback

BERLIN = ZoneInfo("Europe/Berlin")
# Bounds threads that hang; how long good ones take decides nothing.
_PATIENCE_SECONDS: Final = 60
# Past the due time of 02:00 UTC of the day after tomorrow: attempts are timed by the real clock.
TODAY = datetime.now(UTC).replace(hour=12, minute=0, second=0, microsecond=0)


def _runner(*jobs: tuple[str, Callable[[Session], object]]) -> SchedulerService:
    runner = SchedulerService()
    vars(runner)["_jobs"] = tuple(
        Job(name, lambda settings: settings.retention_time, run=run) for name, run in jobs
    )
    return runner


def _note(name: str) -> Callable[[Session], None]:
    """A job that leaves a row in its transaction."""

    def run(session: Session) -> None:
        session.add(Feedback(rating=1, submitted_at=datetime.now(UTC), comment=name))

    return run


def _noted() -> list[str]:
    with session_scope(read_only=True) as session:
        return [str(comment) for comment in session.scalars(select(Feedback.comment))]


def _runs(job: str) -> list[JobRun]:
    with session_scope(read_only=True) as session:
        return list(
            session.scalars(select(JobRun).where(JobRun.job == job).order_by(JobRun.due_at))
        )


def _utc(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


@pytest.mark.parametrize(
    ("now", "at", "due"),
    [
        # An ordinary day, a second before and at the time; winter is UTC+1, summer UTC+2.
        ("2026-01-15T00:59:59", "02:00", "2026-01-14T01:00:00"),
        ("2026-01-15T01:00:00", "02:00", "2026-01-15T01:00:00"),
        ("2026-07-15T00:00:00", "02:00", "2026-07-15T00:00:00"),
        # 2026-03-29, 02:00 to 03:00 does not exist: 02:30 is taken an hour later, at 03:30.
        ("2026-03-29T01:29:59", "02:30", "2026-03-28T01:30:00"),
        ("2026-03-29T01:30:00", "02:30", "2026-03-29T01:30:00"),
        ("2026-03-30T00:30:00", "02:30", "2026-03-30T00:30:00"),
        # 2026-10-25, 02:00 to 03:00 comes twice: the first counts.
        ("2026-10-25T00:29:59", "02:30", "2026-10-24T00:30:00"),
        ("2026-10-25T00:30:00", "02:30", "2026-10-25T00:30:00"),
        ("2026-10-25T01:30:00", "02:30", "2026-10-25T00:30:00"),
        ("2026-10-26T01:30:00", "02:30", "2026-10-26T01:30:00"),
        # Late in the evening, local and UTC dates differ.
        ("2026-07-14T21:59:00", "23:59", "2026-07-14T21:59:00"),
        ("2026-07-14T22:30:00", "00:15", "2026-07-14T22:15:00"),
    ],
)
def test_what_is_due_follows_local_clocks(now: str, at: str, due: str) -> None:
    assert last_due(_utc(now), clock_time.fromisoformat(at), BERLIN) == _utc(due)


@pytest.mark.parametrize("day", ["2026-03-27", "2026-10-23"])
@pytest.mark.parametrize("at", ["02:00", "02:30", "03:00"])
def test_across_a_change_of_clocks_a_job_runs_once_a_day(
    sqlite_service: Service, monkeypatch: pytest.MonkeyPatch, day: str, at: str
) -> None:
    monkeypatch.setenv("TIMEZONE", "Europe/Berlin")
    monkeypatch.setenv("RETENTION_TIME", at)
    clear_caches()
    start = _utc(f"{day}T12:00:00")
    runner = _runner(("job", lambda _session: None))
    ran = []
    for half_hours in range(2 * 24 * 4):
        now = start + timedelta(minutes=30 * half_hours)
        ran += [now.astimezone(BERLIN).date() for _job in runner.tick(now)]
    assert ran == [start.date() + timedelta(days=days) for days in range(1, 5)]


@pytest.fixture
def _started(service: Service) -> None:
    """The first tick of an installation finds nothing of its own to catch up with."""
    assert _runner(("job", _note("too early")), ("other", _note("too early"))).tick(TODAY) == []
    assert _noted() == []
    assert [run.status for run in _runs("job")] == [JobStatus.BASELINE]


@pytest.mark.usefixtures("_started")
def test_after_downtime_the_work_is_caught_up_once(service: Service) -> None:
    runner = _runner(("job", _note("done")))
    later = TODAY + timedelta(days=9)
    assert runner.tick(later) == ["job"]
    assert runner.tick(later + timedelta(hours=1)) == []
    assert _noted() == ["done"]
    assert runner.tick(later + timedelta(days=1)) == ["job"]
    assert [run.status for run in _runs("job")] == [JobStatus.BASELINE, *[JobStatus.DONE] * 2]


@pytest.mark.usefixtures("_started")
def test_of_many_runners_one_does_the_work(service: Service) -> None:
    runners = [_runner(("job", _note("done"))) for _ in range(6)]
    together = threading.Barrier(len(runners))
    ran: list[str] = []
    raised: list[Exception] = []

    def tick(runner: SchedulerService) -> None:
        together.wait(_PATIENCE_SECONDS)
        try:
            ran.extend(runner.tick(TODAY + timedelta(days=1)))
        except Exception as err:  # noqa: BLE001 - told below
            raised.append(err)

    threads = [threading.Thread(target=tick, args=(runner,)) for runner in runners]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (ran, raised, _noted()) == (["job"], [], ["done"])
    assert _runs("job")[-1].attempts == 1


@pytest.mark.usefixtures("_started")
def test_a_killed_runners_work_is_taken_over_when_its_lease_has_ended(service: Service) -> None:
    now = TODAY + timedelta(days=1)
    # As a process leaves it that was killed at work: claimed, and never settled.
    dead = _runner()
    assert dead._claim("job", last_due(now, clock_time(2), ZoneInfo("UTC")), now)
    runner = _runner(("job", _note("done")))
    assert runner.tick(now + LEASE - timedelta(seconds=1)) == []
    assert runner.tick(now + LEASE + timedelta(seconds=1)) == ["job"]
    assert _noted() == ["done"]
    run = _runs("job")[-1]
    assert (run.status, run.attempts, run.owner) == (JobStatus.DONE, 2, runner._owner)


@pytest.mark.usefixtures("_started")
def test_a_runner_whose_job_was_taken_over_undoes_its_work_and_goes_on(service: Service) -> None:
    now = TODAY + timedelta(days=1)
    faster = _runner(("job", _note("the faster one")))

    def too_slow(session: Session) -> None:
        assert faster.tick(now + LEASE + timedelta(seconds=1)) == ["job"]
        _note("the slow one")(session)

    slow = _runner(("job", too_slow), ("other", _note("other")))
    assert "other" in slow.tick(now)
    assert sorted(_noted()) == ["other", "the faster one"]
    assert (_runs("job")[-1].status, _runs("job")[-1].error) == (JobStatus.DONE, None)


@pytest.mark.usefixtures("_started")
def test_a_failing_job_is_recorded_and_does_not_stop_the_others(service: Service) -> None:
    jane = "jane@example.com"

    def fail(session: Session) -> None:
        _note("half done")(session)
        session.flush()
        raise RefusedError(f"a message that names {jane}")

    runner = _runner(("job", fail), ("other", _note("other")))
    assert runner.tick(TODAY + timedelta(days=1)) == ["job", "other"]
    assert _noted() == ["other"]
    run = _runs("job")[-1]
    assert (run.status, run.error, run.attempts) == (JobStatus.FAILED, "refused", 1)
    assert run.finished_at is not None
    assert _runs("other")[-1].status is JobStatus.DONE


@pytest.mark.usefixtures("_started")
def test_a_failed_job_is_tried_again_after_longer_and_longer_pauses(service: Service) -> None:
    def fail(_session: Session) -> None:
        raise ZeroDivisionError

    failing = _runner(("job", fail))
    now = TODAY + timedelta(days=1)
    assert failing.tick(now) == ["job"]
    for attempt in range(1, MAX_ATTEMPTS):
        ended = _runs("job")[-1].finished_at
        assert ended is not None
        pause = timedelta(minutes=2**attempt)
        # The due time must stay the same one for all attempts.
        _finish_at(now)
        assert failing.tick(now + pause - timedelta(seconds=1)) == []
        assert failing.tick(now + pause + timedelta(seconds=1)) == ["job"]
        assert _runs("job")[-1].attempts == attempt + 1
    _finish_at(now)
    assert failing.tick(now + timedelta(hours=10)) == [], "it is not tried for ever"
    assert _runs("job")[-1].error == "ZeroDivisionError"
    # The next day is a new start, and works.
    assert _runner(("job", _note("done"))).tick(now + timedelta(days=1)) == ["job"]
    assert _noted() == ["done"]


def _finish_at(now: datetime, job: str = "job") -> None:
    with session_scope() as session:
        newest = select(JobRun).where(JobRun.job == job).order_by(JobRun.due_at.desc())
        session.scalars(newest.limit(1)).one().finished_at = now


def _backups() -> list[BackupRecord]:
    with session_scope(read_only=True) as session:
        return get_catalogue_service().records(session)


def _backing_up() -> SchedulerService:
    """A runner of the jobs that make and prove backups."""
    runner = SchedulerService()
    wanted = {"backup", "backup_proof"}
    vars(runner)["_jobs"] = tuple(job for job in runner._jobs if job.name in wanted)
    return runner


def test_every_night_data_are_retired_a_backup_is_made_and_proven_and_old_ones_go(
    service: Service,
) -> None:
    runner = SchedulerService()
    assert runner.tick(TODAY) == []
    service.add(feedback(None, datetime.now(UTC) - timedelta(days=400)))
    service.add(feedback(None, datetime.now(UTC)))
    old, new = (get_backup_service().create(COMMAND_LINE).id for _ in range(2))
    with session_scope() as session:
        session.get_one(BackupRecord, old).created_at -= timedelta(days=91)
    jobs = ["retention", "backup", "backup_proof", "backup_expiry", "watch"]
    assert runner.tick(TODAY + timedelta(days=1)) == jobs
    assert {_runs(job)[-1].status for job in jobs} == {JobStatus.DONE}
    assert len(_noted()) == 1
    made, kept = _backups()
    assert (made.label, kept.id) == ("scheduled", new)
    assert made.verified_at is not None


def test_backups_have_a_time_of_their_own_on_local_clocks(
    sqlite_service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TIMEZONE", "Europe/Berlin")
    monkeypatch.setenv("BACKUP_TIME", "04:30")
    clear_caches()
    get_setup_service().open()
    runner = SchedulerService()
    assert runner.tick(_utc("2026-01-15T12:00:00")) == []
    assert runner.tick(_utc("2026-01-16T03:29:59")) == ["retention", "backup_expiry", "watch"]
    assert _backups() == []
    assert runner.tick(_utc("2026-01-16T03:30:00")) == ["backup", "backup_proof"]
    assert len(_backups()) == 1


def test_backups_can_be_left_to_somebody_else(
    sqlite_service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BACKUP_TIME", "off")
    clear_caches()
    get_setup_service().open()
    runner = SchedulerService()
    assert runner.tick(TODAY) == []
    # What expires does so all the same: people were told when.
    assert runner.tick(TODAY + timedelta(days=1)) == ["retention", "backup_expiry", "watch"]
    assert (_backups(), _runs("backup"), _runs("backup_proof")) == ([], [], [])


def test_of_many_replicas_one_makes_the_backup_and_makes_up_for_downtime_once(
    service: Service,
) -> None:
    assert _backing_up().tick(TODAY) == []
    runners = [_backing_up() for _ in range(3)]
    together = threading.Barrier(len(runners))
    ran: list[str] = []

    def tick(runner: SchedulerService) -> None:
        together.wait(_PATIENCE_SECONDS)
        ran.extend(runner.tick(TODAY + timedelta(days=9)))

    threads = [threading.Thread(target=tick, args=(runner,)) for runner in runners]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(ran) == ["backup", "backup_proof"]
    assert [run.status for run in _runs("backup")] == [JobStatus.BASELINE, JobStatus.DONE]
    assert [record.status for record in _backups()] == [BackupStatus.COMPLETE]


def test_a_backup_that_failed_is_tried_again(sqlite_service: Service) -> None:
    runner, now = _backing_up(), TODAY + timedelta(days=1)
    assert runner.tick(TODAY) == []
    with exclusive():
        # Somebody restores at this moment.
        assert runner.tick(now) == ["backup", "backup_proof"]
    run = _runs("backup")[-1]
    assert (run.status, run.error, _backups()) == (JobStatus.FAILED, "conflict", [])
    _finish_at(now, "backup")
    # That somebody else was at it is no failed attempt, so the wait does not grow.
    assert "backup" not in runner.tick(now + timedelta(minutes=1))
    assert "backup" in runner.tick(now + timedelta(minutes=1, seconds=1))
    run = _runs("backup")[-1]
    assert (run.status, run.attempts) == (JobStatus.DONE, 1)
    assert [record.status for record in _backups()] == [BackupStatus.COMPLETE]


def test_a_proof_waits_for_a_backup_that_takes_hours(sqlite_service: Service) -> None:
    runner, now = _backing_up(), TODAY + timedelta(days=1)
    vars(runner)["_jobs"] = tuple(job for job in runner._jobs if job.name == "backup_proof")
    get_backup_service().create(COMMAND_LINE)
    assert runner.tick(TODAY) == []
    with exclusive():
        # Another replica makes the backup of this night.
        for minutes in range(0, 180, 20):
            runner.tick(now + timedelta(minutes=minutes))
            _finish_at(now + timedelta(minutes=minutes), "backup_proof")
    assert runner.tick(now + timedelta(hours=10)) == ["backup_proof"]
    assert _runs("backup_proof")[-1].status is JobStatus.DONE


def test_a_backup_that_does_not_restore_fails_the_job_that_proves(
    sqlite_service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner, now = _backing_up(), TODAY + timedelta(days=1)
    assert runner.tick(TODAY) == []
    damaged = get_backup_service().create(COMMAND_LINE)
    archive = sqlite_service.folder / "backups" / f"{damaged.id}.hfb"
    archive.write_bytes(archive.read_bytes()[:-1])
    monkeypatch.setenv("BACKUP_VERIFY", "restore")
    clear_caches()
    get_setup_service().open()
    assert runner.tick(now) == ["backup", "backup_proof"]
    run = _runs("backup_proof")[-1]
    assert (run.status, run.error) == (JobStatus.FAILED, "backup_damaged")
    made, old = _backups()
    assert (made.verified_at is not None, old.error) == (True, "backup_damaged")
    # Known by now, it does not keep the others from being proven.
    _finish_at(now, "backup_proof")
    assert runner.tick(now + timedelta(minutes=3)) == ["backup_proof"]
    assert _runs("backup_proof")[-1].status is JobStatus.DONE


def test_it_starts_once_ticks_by_itself_and_stops_before_the_next_tick(
    sqlite_service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduler_service, "TICK_SECONDS", 24 * 3600)
    ticked = threading.Event()
    runner = _runner(("job", lambda _session: ticked.set()))
    assert runner.tick(datetime.now(UTC) - timedelta(days=2)) == []
    runner.start()
    runner.start()
    assert ticked.wait(_PATIENCE_SECONDS)
    (thread,) = _threads()
    before = runner.is_running
    runner.stop()
    assert (before, runner.is_running) == (True, False)
    # It may still be at what follows the job.
    thread.join(_PATIENCE_SECONDS)
    assert _threads() == []


def _threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "scheduler"]
