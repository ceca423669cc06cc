"""
The scheduler: one thread, and `job_runs` rows that say what is due and who does it.

The `schedule` library only ticks: it does not catch up, a raising job stops being scheduled, and
its own time zones run twice after a change of clocks. What is due is decided here, and a run is
claimed by inserting its row, so that of many replicas one runs it.
"""

import os
import secrets
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from contextvars import copy_context
from dataclasses import dataclass
from datetime import UTC, datetime, time, timedelta
from functools import lru_cache
from typing import Any, Final, cast

import schedule
import structlog
from sqlalchemy import CursorResult, func, select, update
from sqlalchemy.exc import IntegrityError, SQLAlchemyError
from sqlalchemy.orm import Session

from backend.db_utils import session_scope
from backend.errors import ConflictError, HoldfastError
from backend.models import AlertKind, JobRun, JobStatus
from backend.services.alert_service import get_alert_service
from backend.services.approval_service import get_approval_service
from backend.services.audit_service import SCHEDULER
from backend.services.backup_service import get_backup_service
from backend.services.brake_service import BrakeError
from backend.services.catalogue_service import get_catalogue_service
from backend.services.checkpoint_service import get_checkpoint_service
from backend.services.hold_service import get_hold_service
from backend.services.job_times import last_due, next_due
from backend.services.pruning_service import get_pruning_service
from backend.services.queue_service import get_queue_service
from backend.services.retention_service import get_retention_service
from backend.services.setup_service import get_setup_service
from backend.services.store_service import get_store_service
from backend.services.trail_service import Verdict, get_trail_service
from backend.settings import Settings, get_settings

log = structlog.get_logger(__name__)
TICK_SECONDS: Final = 15
LEASE: Final = timedelta(minutes=5)
MAX_ATTEMPTS: Final = 5
_BACKOFF: Final = timedelta(minutes=1)
_STOP_SECONDS: Final = 2
_LATE: Final = timedelta(hours=1)
# Backups are proven every night: one that fails is tried again the next.
_PROVEN_WITHIN: Final = timedelta(days=2)


@dataclass(frozen=True, slots=True)
class Job:
    """
    Work that is due every day at one local time.

    Attributes:
        at: `HH:MM`; `None` where it is switched off.
        run: Does it in the transaction that also marks it as done.
        run_alone: Does it in transactions of its own, for it takes long: what it does may be done
            again when its process is killed.
    """

    name: str
    at: Callable[[Settings], str | None]
    run: Callable[[Session], object] | None = None
    run_alone: Callable[[], object] | None = None


@dataclass(frozen=True, slots=True)
class JobState:
    """A job: when it is due next (`None` if switched off), and how its last run went."""

    name: str
    at: str | None
    next_due_at: datetime | None
    last: JobRun | None


class LeaseLostError(HoldfastError):
    """Another runner took the job over, so this one's work is undone."""

    code = "lease_lost"


class SchedulerService:
    """Runs due jobs once among all processes, and catches up after downtime."""

    def __init__(self) -> None:
        self._owner = f"{socket.gethostname()[:30]}:{os.getpid()}:{secrets.token_hex(4)}"
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None
        self._jobs = (
            Job("retention", _retention_time, run_alone=_apply_retention),
            Job("backup", _backup_time, run_alone=_back_up),
            Job("backup_proof", _backup_time, run_alone=_prove_backups),
            Job("backup_expiry", _retention_time, run_alone=_expire_backups),
            Job("watch", _retention_time, run=_watch, run_alone=_check_trail),
        )

    def start(self) -> None:
        """Start ticking in a thread of its own; once is enough."""
        if self.is_running:
            return
        # A new one: a thread that still waits for something keeps its order to stop.
        self._stopped = threading.Event()
        self._thread = threading.Thread(
            target=self._loop, args=(self._stopped,), name="scheduler", daemon=True
        )
        self._thread.start()

    def stop(self) -> None:
        """Stop ticking; a run that takes longer is left to its lease."""
        self._stopped.set()
        if self._thread is not None:
            self._thread.join(timeout=_STOP_SECONDS)
            self._thread = None

    @property
    def is_running(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def tick(self, now: datetime | None = None) -> list[str]:
        """Run what is due at *now* and not done; return the names of the jobs that were run."""
        settings = get_settings()
        now = now or datetime.now(UTC)
        done = []
        for job in self._jobs:
            if (at := job.at(settings)) is not None:
                due_at = last_due(now, time.fromisoformat(at), settings.zone)
                if self._run_if_due(job, due_at, now):
                    done.append(job.name)
        return done

    def next_run(self, name: str) -> datetime | None:
        """Return when a job is due next; `None` where it, or the scheduler, is switched off."""
        settings = get_settings()
        at = next(job.at(settings) for job in self._jobs if job.name == name)
        if at is None or not settings.scheduler_enabled:
            return None
        return next_due(datetime.now(UTC), time.fromisoformat(at), settings.zone)

    def states(self, session: Session) -> list[JobState]:
        """Every job, when it is due and how it went."""
        newest = select(JobRun).order_by(JobRun.due_at.desc()).limit(1)
        return [
            JobState(
                job.name,
                job.at(get_settings()),
                self.next_run(job.name),
                session.scalar(newest.where(JobRun.job == job.name)),
            )
            for job in self._jobs
        ]

    def last_done(self, session: Session) -> dict[str, datetime]:
        """When each job was last done, of those that ever were."""
        done = select(JobRun.job, func.max(JobRun.finished_at)).where(
            JobRun.status == JobStatus.DONE, JobRun.finished_at.is_not(None)
        )
        found = session.execute(done.group_by(JobRun.job))
        return {job: moment for job, moment in found if moment is not None}

    def _loop(self, stopped: threading.Event) -> None:
        ticker = schedule.Scheduler()
        ticker.every(TICK_SECONDS).seconds.do(self._tick_safely)
        self._tick_safely()
        while not stopped.wait(0.5):
            ticker.run_pending()

    def _tick_safely(self) -> None:
        try:
            # What the last tick found, before this one's work takes its time.
            get_alert_service().tell()
            self.tick()
            get_setup_service().recover_if_due()
            if get_store_service().sync_due.is_set():
                with suppress(ConflictError):
                    get_backup_service().copy()
            # Released holds let theirs run at once; these are of a process that died before.
            get_queue_service().run()
            get_alert_service().tell()
        except Exception as err:  # noqa: BLE001 - the edge of the thread
            log.error("scheduler_tick_failed", error=type(err).__name__)

    def _run_if_due(self, job: Job, due_at: datetime, now: datetime) -> bool:
        # All that is logged meanwhile, here or in a thread of the work, names the run.
        with structlog.contextvars.bound_contextvars(job=job.name, run_id=secrets.token_hex(8)):
            if not self._claim(job.name, due_at, now):
                return False
            self._run(job, due_at, now)
        return True

    def _run(self, job: Job, due_at: datetime, now: datetime) -> None:
        log.info("job_started", due_at=due_at.isoformat())
        finished = threading.Event()
        heart = threading.Thread(
            target=copy_context().run, args=(self._beat, job.name, due_at, finished), daemon=True
        )
        heart.start()
        try:
            if job.run_alone is not None:
                job.run_alone()
            # The work and the mark that it is done are one transaction: never one alone.
            with session_scope() as session:
                if job.run is not None:
                    job.run(session)
                self._settle(session, job.name, due_at, JobStatus.DONE, None)
        except BrakeError as err:
            # It has raised its own alerts; trying again would change nothing.
            log.warning("job_needs_confirmation")
            with suppress(LeaseLostError), session_scope() as session:
                self._settle(session, job.name, due_at, JobStatus.FAILED, err.code, final=True)
        except ConflictError as err:
            # A backup or restore is running elsewhere: that is no failed attempt.
            log.info("job_waits")
            with suppress(LeaseLostError), session_scope() as session:
                self._settle(session, job.name, due_at, JobStatus.FAILED, err.code, counts=False)
                if now - due_at > _LATE:
                    get_alert_service().raise_alert(session, AlertKind.JOB_LATE, job.name, err.code)
        except LeaseLostError:
            # Undone whole: whoever took the job over does it, and writes how it ended.
            log.warning("job_lost")
        except Exception as err:  # noqa: BLE001 - the edge of the job: logged, kept, tried again
            code = err.code if isinstance(err, HoldfastError) else type(err).__name__
            log.error("job_failed", code=code)
            with suppress(LeaseLostError), session_scope() as session:
                self._settle(session, job.name, due_at, JobStatus.FAILED, code)
                get_alert_service().raise_alert(session, AlertKind.JOB_FAILED, job.name, code[:64])
        else:
            log.info("job_done")
        finally:
            finished.set()
            heart.join(timeout=_STOP_SECONDS)

    def _claim(self, job: str, due_at: datetime, now: datetime) -> bool:
        """Take the run, if it is free; exactly one process gets True."""
        try:
            with session_scope() as session:
                row = session.get(JobRun, (job, due_at))
                if row is not None:
                    return self._take_over(session, row, now)
                # What was due before the first start was nobody's to run.
                first = not session.scalar(select(func.count()).where(JobRun.job == job))
                if not first and now - due_at > _LATE:
                    get_alert_service().raise_alert(session, AlertKind.JOB_LATE, job, "late")
                session.add(
                    JobRun(
                        job=job,
                        due_at=due_at,
                        status=JobStatus.BASELINE if first else JobStatus.RUNNING,
                        owner=self._owner,
                        lease_until=now + LEASE,
                        attempts=0 if first else 1,
                    )
                )
                return not first
        except IntegrityError:
            return False

    def _take_over(self, session: Session, row: JobRun, now: datetime) -> bool:
        abandoned = row.status is JobStatus.RUNNING and row.lease_until < now
        again = (
            row.status is JobStatus.FAILED
            and row.attempts < MAX_ATTEMPTS
            and row.finished_at is not None
            and row.finished_at + _BACKOFF * 2**row.attempts < now
        )
        if not abandoned and not again:
            return False
        # The conditions once more in SQL: of two that saw the same row, one changes it.
        taken = session.execute(
            update(JobRun)
            .where(
                JobRun.job == row.job,
                JobRun.due_at == row.due_at,
                JobRun.status == row.status,
                JobRun.owner == row.owner,
                JobRun.attempts == row.attempts,
            )
            .values(
                status=JobStatus.RUNNING,
                owner=self._owner,
                lease_until=now + LEASE,
                attempts=row.attempts + 1,
            )
            .execution_options(synchronize_session=False)
        )
        return cast("CursorResult[Any]", taken).rowcount == 1

    def _settle(
        self,
        session: Session,
        job: str,
        due_at: datetime,
        status: JobStatus,
        error: str | None,
        *,
        counts: bool = True,
        final: bool = False,
    ) -> None:
        attempts = MAX_ATTEMPTS if final else JobRun.attempts if counts else JobRun.attempts - 1
        settled = session.execute(
            self._mine(job, due_at).values(
                status=status,
                finished_at=datetime.now(UTC),
                error=error and error[:200],
                attempts=attempts,
            )
        )
        if cast("CursorResult[Any]", settled).rowcount != 1:
            raise LeaseLostError(f"another process runs {job} now")

    def _beat(self, job: str, due_at: datetime, finished: threading.Event) -> None:
        """Extend the lease while the job runs."""
        while not finished.wait(LEASE.total_seconds() / 5):
            try:
                with session_scope() as session:
                    extended = datetime.now(UTC) + LEASE
                    session.execute(self._mine(job, due_at).values(lease_until=extended))
            except (SQLAlchemyError, HoldfastError) as err:
                # On SQLite the job's own transaction keeps others out, and so the lease safe.
                log.warning("heartbeat_failed", error=type(err).__name__)

    def _mine(self, job: str, due_at: datetime) -> Any:
        return update(JobRun).where(
            JobRun.job == job,
            JobRun.due_at == due_at,
            JobRun.owner == self._owner,
            JobRun.status == JobStatus.RUNNING,
        )


def _apply_retention() -> object:
    return get_retention_service().apply(SCHEDULER, dry_run=False)


def _watch(session: Session) -> None:
    """Raise alerts for what nobody else would notice, and clear up what nobody came for."""
    now = datetime.now(UTC)
    get_approval_service().forget_expired(session, now)
    for hold_id in get_hold_service().due_for_review(session, now):
        get_alert_service().raise_alert(session, AlertKind.HOLD_REVIEW, str(hold_id), "due")
    if _backup_time(get_settings()) is None:
        return
    known_since = session.scalar(select(func.min(JobRun.due_at)))
    proven = get_catalogue_service().age(session).newest_proven or known_since
    if proven is not None and proven < now - _PROVEN_WITHIN:
        get_alert_service().raise_alert(session, AlertKind.BACKUP_UNPROVEN, "backup", "unproven")


def _check_trail() -> None:
    """Have a trail that somebody has changed noticed, and sign what it is now."""
    checked = get_trail_service().verify(SCHEDULER)
    if checked.status is not Verdict.OK:
        code = checked.breaks[0].kind if checked.breaks else checked.status
        with session_scope() as session:
            get_alert_service().raise_alert(session, AlertKind.AUDIT_BROKEN, "audit trail", code)
    get_checkpoint_service().make_if_possible()


def _expire_backups() -> object:
    return get_pruning_service().prune(SCHEDULER, dry_run=False)


def _back_up() -> object:
    return get_backup_service().create(SCHEDULER, "scheduled")


def _prove_backups() -> object:
    return get_backup_service().prove_next(SCHEDULER)


def _retention_time(settings: Settings) -> str:
    return settings.retention_time


def _backup_time(settings: Settings) -> str | None:
    return None if settings.backup_time == "off" else settings.backup_time


@lru_cache(maxsize=1)
def get_scheduler_service() -> SchedulerService:
    return SchedulerService()
