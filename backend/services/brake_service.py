"""The brake: what a retention run must not do before somebody has looked at it."""

import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from functools import lru_cache
from typing import Final
from uuid import UUID

from sqlalchemy import or_, select, update
from sqlalchemy.orm import Session

from backend.errors import ConflictError
from backend.models import DataRetentionLog, RetentionStatus
from backend.privacy.due import RetentionPlan
from backend.privacy.periods import Period
from backend.services.policy_service import Policy, get_policy_service
from backend.settings import RetentionAction, get_settings

_CLOCK: Final = timedelta(days=1)
# What is usual is seen in so many runs, and not in fewer than these.
_RUNS: Final = 10
_FEWEST_RUNS: Final = 3
ALL: Final = "all"


class BrakeError(ConflictError):
    """The run would touch more than is usual, and nobody has confirmed that; nothing was done."""

    code = "retention_brake"


@dataclass(frozen=True, slots=True)
class Brake:
    """
    Why a run needs to be confirmed.

    Attributes:
        data_type: Of the policy, or `all`.
        reason: `share`, `usual`, `shortened` or `clock`.
    """

    data_type: str
    reason: str
    words: str


class BrakeService:
    """Compares what a run would do with what the last ones did."""

    def __init__(self) -> None:
        # The last run of this process, and what its clocks showed.
        self._last: tuple[UUID, datetime, float] | None = None

    def brakes(
        self, session: Session, planned: Sequence[tuple[Policy, RetentionPlan]], now: datetime
    ) -> list[Brake]:
        """Say why the run needs to be confirmed; one that changes nothing does not."""
        touching = [each for each in planned if each[1].affected]
        found = list(self._of_clock(session, now)) if touching else []
        for policy, plan in touching:
            found += _of_share(policy.data_type, plan)
            found += _of_usual(policy.data_type, plan, _last_runs(session, policy.data_type))
            found += _of_period(policy, _confirmed_period(session, policy.data_type), now)
        return found

    def as_applied(self, session: Session, policy: Policy) -> tuple[Policy, datetime] | None:
        """
        Return the policy and the moment of its last run; `None` where it never ran.

        A later run, or another period, may be one that the brake stops. One that was cut short
        had passed it.
        """
        done = DataRetentionLog.status == RetentionStatus.DONE
        runs = select(DataRetentionLog).where(
            DataRetentionLog.data_type == policy.data_type,
            DataRetentionLog.status != RetentionStatus.CLOCK_AHEAD,
            or_(done, DataRetentionLog.affected > 0),
        )
        run = session.scalar(runs.order_by(DataRetentionLog.started_at.desc()).limit(1))
        if run is None:
            return None
        period = _period_of(run)
        if period is not None:
            policy = replace(policy, period=period, action=RetentionAction(run.action))
        return policy, run.started_at

    def is_large(self, data_type: str, plan: RetentionPlan) -> bool:
        """Say whether a policy would touch much of its table."""
        return any(_of_share(data_type, plan))

    def accept_clock(self, session: Session, now: datetime) -> None:
        """Compare no more with runs of the future: somebody has confirmed that it is earlier."""
        session.execute(
            update(DataRetentionLog)
            .where(DataRetentionLog.status == RetentionStatus.DONE)
            .where(DataRetentionLog.started_at > now)
            .values(status=RetentionStatus.CLOCK_AHEAD)
        )

    def clock_moved(self, session: Session, now: datetime) -> bool:
        """Say whether the clock is off against the last run."""
        return any(self._of_clock(session, now))

    def note(self, run_id: UUID, now: datetime) -> None:
        """Remember when a run took place, by a clock that nobody sets."""
        self._last = run_id, now, _ticks()

    def _of_clock(self, session: Session, now: datetime) -> Iterator[Brake]:
        last = session.scalar(
            select(DataRetentionLog)
            .where(DataRetentionLog.status == RetentionStatus.DONE)
            .order_by(DataRetentionLog.started_at.desc())
            .limit(1)
        )
        if last is None:
            return
        moved = min(now - last.started_at, timedelta())
        if self._last is not None and self._last[0] == last.run_id:
            _, then, ticks = self._last
            moved = (now - then) - timedelta(seconds=_ticks() - ticks)
        if abs(moved) > _CLOCK:
            words = f"the clock moved by {moved.total_seconds() / 86_400:+.1f} days"
            yield Brake(ALL, "clock", f"{words} against the last run")


def _ticks() -> float:
    """Return the seconds of a clock that nobody sets, and that goes on while the machine sleeps."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


def _of_share(data_type: str, plan: RetentionPlan) -> Iterator[Brake]:
    settings = get_settings()
    percent = 100 * plan.affected / max(plan.open_rows, 1)
    if plan.affected > settings.retention_brake_rows and percent > settings.retention_brake_percent:
        share = f"{plan.affected} of {plan.open_rows} rows are {percent:.1f} % of the table"
        words = f"{data_type}: {share}"
        yield Brake(data_type, "share", words)


def _of_usual(
    data_type: str, plan: RetentionPlan, runs: Sequence[DataRetentionLog]
) -> Iterator[Brake]:
    settings = get_settings()
    if len(runs) < _FEWEST_RUNS or plan.affected <= settings.retention_brake_rows:
        return
    usual = statistics.median(run.affected for run in runs)
    if plan.affected > settings.retention_brake_multiple * max(usual, 1):
        words = f"{data_type}: {plan.affected} rows, where {usual:.0f} are usual"
        yield Brake(data_type, "usual", words)


def _of_period(policy: Policy, before: Period | None, now: datetime) -> Iterator[Brake]:
    if before is not None and 2 * (now - policy.period.cutoff(now)) < now - before.cutoff(now):
        words = f"{policy.data_type}: kept for {policy.period}, and for {before} until now"
        yield Brake(policy.data_type, "shortened", words)


def _confirmed_period(session: Session, data_type: str) -> Period | None:
    """
    Return by which period rows went last: a run that touched nothing has confirmed nothing.

    Before the first run, what was in force before anybody has changed it.
    """
    runs = select(DataRetentionLog).where(
        DataRetentionLog.data_type == data_type, DataRetentionLog.status == RetentionStatus.DONE
    )
    at = DataRetentionLog.started_at
    touching = runs.where(DataRetentionLog.affected > 0).order_by(at.desc())
    run = session.scalar(touching.limit(1)) or session.scalar(runs.order_by(at).limit(1))
    return get_policy_service().first_period(session, data_type) if run is None else _period_of(run)


def _period_of(run: DataRetentionLog) -> Period | None:
    """Return the period that was applied; runs of earlier versions do not say."""
    return None if run.period is None else Period.parse(run.period, year_end=bool(run.year_end))


def _last_runs(session: Session, data_type: str) -> Sequence[DataRetentionLog]:
    return session.scalars(
        select(DataRetentionLog)
        .where(
            DataRetentionLog.data_type == data_type,
            DataRetentionLog.status == RetentionStatus.DONE,
        )
        .order_by(DataRetentionLog.started_at.desc())
        .limit(_RUNS)
    ).all()


@lru_cache(maxsize=1)
def get_brake_service() -> BrakeService:
    return BrakeService()
