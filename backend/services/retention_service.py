"""Retention: what the policies would do now, and doing it, batch by batch."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import Final
from uuid import UUID, uuid4

import structlog
from sqlalchemy import func, select, update
from sqlalchemy.orm import Session

from backend.db_utils import empty_wal, get_engine, session_scope, snapshot_scope
from backend.errors import StalePlanError
from backend.models import DATA_MAP, AlertKind, DataRetentionLog, RetentionStatus
from backend.privacy.declarations import EraseMode
from backend.privacy.due import (
    Clockwork,
    RetentionBatches,
    RetentionPlan,
    count_due_by,
    plan_retention,
)
from backend.services.alert_service import get_alert_service
from backend.services.audit_service import Actor, get_audit_service
from backend.services.brake_service import Brake, BrakeError, get_brake_service
from backend.services.hold_service import get_hold_service
from backend.services.notice_service import get_notice_service
from backend.services.pace import Pace
from backend.services.policy_service import Policy, get_policy_service
from backend.settings import RetentionAction

log = structlog.get_logger(__name__)
SOON: Final = timedelta(days=30)
# A run whose last batch is older has ended without saying so.
_SILENT: Final = timedelta(minutes=5)
_MONTHS: Final = 12


@dataclass(frozen=True, slots=True)
class PolicyState:
    """A policy with what is there: all rows, rows due now and soon, due rows that a hold keeps."""

    policy: Policy
    rows: int
    due: int
    due_soon: int
    held: int
    last_run_at: datetime | None


@dataclass(frozen=True, slots=True)
class PolicyResult:
    """What one policy did, or would do."""

    data_type: str
    action: RetentionAction
    cutoff: datetime
    matched: int
    held: int
    affected: int
    plan_digest: str


@dataclass(frozen=True, slots=True)
class RetentionRun:
    """
    One run over all policies, with one digest for the whole plan.

    Attributes:
        brakes: Why it needs the digest of a dry run as confirmation, if it does.
    """

    run_id: UUID
    dry_run: bool
    plan_digest: str
    results: list[PolicyResult]
    brakes: list[Brake] = field(default_factory=list)

    @property
    def affected(self) -> int:
        return sum(result.affected for result in self.results)


@dataclass(frozen=True, slots=True)
class Forecast:
    """How many rows of a data type are due now, and by the end of each of the coming months."""

    data_type: str
    due_now: int
    months: Sequence[tuple[str, int]]


@dataclass(frozen=True, slots=True)
class _Planned:
    """A policy, and what it does now."""

    policy: Policy
    plan: RetentionPlan
    clockwork: Clockwork

    def result(self, affected: int) -> PolicyResult:
        return PolicyResult(
            self.policy.data_type,
            self.policy.action,
            self.policy.period.cutoff(self.clockwork.now),
            self.plan.matched,
            self.plan.held,
            affected,
            self.plan.digest,
        )


class RetentionService:
    """What the policies of all data types do, and the runs that apply them."""

    def states(self, session: Session, now: datetime | None = None) -> list[PolicyState]:
        """Every policy with what is due now; read from the plan that a run would carry out."""
        now = now or datetime.now(UTC)
        return [
            self._state(session, policy, now) for policy in get_policy_service().policies(session)
        ]

    def forecast(self, session: Session, now: datetime | None = None) -> list[Forecast]:
        """How much is due over the coming year, by data type; what a hold keeps is counted too."""
        now = now or datetime.now(UTC)
        ends = [_month_end(now, ahead) for ahead in range(_MONTHS)]
        found = []
        for policy in get_policy_service().policies(session):
            clockwork = self._clockwork(session, policy, now)
            due, *by_end = count_due_by(session, DATA_MAP, clockwork, [now, *ends])
            months = [
                (f"{end - timedelta(days=1):%Y-%m}", later - sooner)
                for end, sooner, later in zip(ends, [due, *by_end], by_end, strict=False)
            ]
            found.append(Forecast(policy.data_type, due, months))
        return found

    def apply(
        self,
        actor: Actor,
        *,
        dry_run: bool,
        data_type: str | None = None,
        plan_digest: str | None = None,
        now: datetime | None = None,
    ) -> RetentionRun:
        """
        Carry out the enabled policies, or only say what that would do.

        Manages its own transactions, one a batch. Killed at any point, the next run goes on.

        Args:
            plan_digest: Of a dry run; the run refuses when the plan has changed since.

        Raises:
            UnknownDataTypeError: No table has this data type.
            StalePlanError: The plan is not the one of the dry run.
            BrakeError: It would touch more than is usual, and nobody has confirmed that.
        """
        if data_type is not None:
            get_policy_service().require(data_type)
        now = now or datetime.now(UTC)
        if not dry_run:
            self._begin(now)
        with snapshot_scope() as session:
            planned = self._plan(session, now, data_type)
            plans = [(one.policy, one.plan) for one in planned]
            brakes = get_brake_service().brakes(session, plans, now)
        results = [one.result(one.plan.affected) for one in planned]
        whole = _digest_of(results)
        run = RetentionRun(uuid4(), dry_run, whole, results, brakes)
        if plan_digest is not None and plan_digest != whole:
            raise StalePlanError("due rows have changed since the dry run", plan_digest=whole)
        if not dry_run:
            if brakes and plan_digest is None:
                self._refuse(actor, run)
            run = self._carry_out(actor, run, planned)
            get_brake_service().note(run.run_id, now)
        with session_scope() as session:
            get_audit_service().record(
                session, "retention_applied", actor, outcome="dry_run" if dry_run else "done",
                run=run.run_id, affected=run.affected, confirmed=plan_digest is not None,
            )  # fmt: skip
        return run

    def apply_again(self, session: Session, actor: Actor) -> int:
        """
        Apply the policies to a database that is being restored, in its session's transaction.

        What retention has removed since the backup must not come back. Nobody has to confirm
        that, so a policy that was shortened without ever being applied counts as it was applied.

        Returns:
            How many rows met their end.
        """
        now, run_id, total = datetime.now(UTC), uuid4(), 0
        for policy in get_policy_service().policies(session):
            one = self._planned(session, *get_brake_service().as_applied(session, policy, now))
            if not policy.enabled or get_brake_service().is_new_and_large(
                session, policy.data_type, one.plan
            ):
                continue
            batches, affected = RetentionBatches(DATA_MAP, one.clockwork), 0
            while rows := batches.run(session, one.clockwork.holds, Pace.MOST):
                affected += rows
            session.add(_log(one, run_id, actor.ref(session), affected))
            total += affected
        get_audit_service().record(session, "retention_applied", actor, run=run_id, affected=total)
        return total

    def logs(
        self,
        session: Session,
        limit: int,
        offset: int,
        *,
        data_type: str | None = None,
        run_id: UUID | None = None,
    ) -> tuple[list[DataRetentionLog], int]:
        """The log, newest first, and how long it is; of one data type or run, if one is named."""
        wanted = {DataRetentionLog.data_type: data_type, DataRetentionLog.run_id: run_id}
        rows = [column == value for column, value in wanted.items() if value is not None]
        newest = (
            select(DataRetentionLog)
            .where(*rows)
            .order_by(DataRetentionLog.started_at.desc(), DataRetentionLog.data_type)
        )
        total = session.scalar(select(func.count()).select_from(DataRetentionLog).where(*rows)) or 0
        return list(session.scalars(newest.limit(limit).offset(offset))), total

    def _begin(self, now: datetime) -> None:
        """Say which runs were interrupted, and whom of the inactive is to be told."""
        with session_scope() as session:
            interrupted = session.execute(
                update(DataRetentionLog)
                .where(
                    DataRetentionLog.status == RetentionStatus.RUNNING,
                    DataRetentionLog.finished_at < datetime.now(UTC) - _SILENT,
                )
                .values(status=RetentionStatus.INTERRUPTED)
                .returning(DataRetentionLog.run_id)
            ).all()
            for run_id in {row.run_id for row in interrupted}:
                log.warning("retention_interrupted", run=str(run_id))
            get_notice_service().bring_up(session, now)

    def _refuse(self, actor: Actor, run: RetentionRun) -> None:
        with session_scope() as session:
            for brake in run.brakes:
                get_alert_service().raise_alert(
                    session, AlertKind.RETENTION_BRAKE, brake.data_type, brake.reason
                )
            get_audit_service().record(
                session, "retention_applied", actor, outcome="brake", run=run.run_id,
                brakes=[f"{brake.data_type} {brake.reason}" for brake in run.brakes],
            )  # fmt: skip
        raise BrakeError(
            f"{'; '.join(brake.words for brake in run.brakes)}. Look at a dry run, and give its "
            "plan_digest if that is meant",
            plan_digest=run.plan_digest,
            brakes=[{"data_type": each.data_type, "reason": each.reason} for each in run.brakes],
        )

    def _carry_out(
        self, actor: Actor, run: RetentionRun, planned: Sequence[_Planned]
    ) -> RetentionRun:
        with session_scope() as session:
            logs = [_log(one, run.run_id, actor.ref(session)) for one in planned]
            session.add_all(logs)
        results = []
        try:
            for one, entry in zip(planned, logs, strict=True):
                results.append(one.result(self._run_policy(one, entry.id)))
        finally:
            # Until then the log still holds the pages as they were before.
            empty_wal(get_engine())
            if len(results) < len(logs):
                self._settle([entry.id for entry in logs[len(results) :]], RetentionStatus.FAILED)
        return replace(run, results=results)

    def _run_policy(self, one: _Planned, log_id: UUID) -> int:
        """Carry out one policy in transactions of a batch each; the log grows with them."""
        batches, pace, affected = RetentionBatches(DATA_MAP, one.clockwork), Pace(get_engine()), 0
        mine = update(DataRetentionLog).where(DataRetentionLog.id == log_id)
        while True:
            with pace.batch(), session_scope() as session:
                # Placed a moment ago, a hold counts from the next batch on.
                holds = get_hold_service().standing(session)
                rows = batches.run(session, holds, pace.limit)
                affected += rows or 0
                session.execute(
                    mine.values(
                        affected=affected,
                        finished_at=datetime.now(UTC),
                        status=RetentionStatus.DONE if rows is None else RetentionStatus.RUNNING,
                    )
                )
                pace.did(rows or 0)
            if rows is None:
                return affected

    def _settle(self, ids: Sequence[UUID], status: RetentionStatus) -> None:
        with session_scope() as session:
            session.execute(
                update(DataRetentionLog).where(DataRetentionLog.id.in_(ids)).values(status=status)
            )

    def _plan(self, session: Session, now: datetime, data_type: str | None) -> list[_Planned]:
        return [
            self._planned(session, policy, now)
            for policy in get_policy_service().policies(session)
            if policy.enabled and data_type in (None, policy.data_type)
        ]

    def _planned(self, session: Session, policy: Policy, now: datetime) -> _Planned:
        clockwork = self._clockwork(session, policy, now)
        return _Planned(policy, plan_retention(session, DATA_MAP, clockwork), clockwork)

    def _clockwork(self, session: Session, policy: Policy, now: datetime) -> Clockwork:
        periods = get_policy_service().periods(session) | {policy.data_type: policy.period}
        return Clockwork(
            policy.data_type,
            EraseMode(policy.action.value),
            periods,
            now,
            get_hold_service().standing(session),
            get_notice_service().told(policy.data_type, now),
        )

    def _state(self, session: Session, policy: Policy, now: datetime) -> PolicyState:
        clockwork = self._clockwork(session, policy, now)
        plan = plan_retention(session, DATA_MAP, clockwork, now + SOON)
        last = select(func.max(DataRetentionLog.finished_at)).where(
            DataRetentionLog.data_type == policy.data_type,
            DataRetentionLog.status == RetentionStatus.DONE,
        )
        return PolicyState(
            policy, plan.rows, plan.matched, plan.due_soon, plan.held, session.scalar(last)
        )


def _log(
    one: _Planned, run_id: UUID, started_by: str, affected: int | None = None
) -> DataRetentionLog:
    """
    Return the row of one policy in one run.

    Args:
        affected: How many rows met their end; `None` where that has just begun.
    """
    status = RetentionStatus.RUNNING if affected is None else RetentionStatus.DONE
    return DataRetentionLog(
        run_id=run_id,
        started_by=started_by,
        started_at=one.clockwork.now,
        finished_at=datetime.now(UTC),
        status=status,
        period=str(one.policy.period),
        year_end=one.policy.period.year_end,
        **asdict(one.result(affected or 0)),
    )


def _month_end(now: datetime, ahead: int) -> datetime:
    """Return when the month ends that is *ahead* of the present one, in UTC."""
    months = now.year * 12 + now.month + ahead
    return datetime(months // 12, months % 12 + 1, 1, tzinfo=UTC)


def _digest_of(results: Iterable[PolicyResult]) -> str:
    """One digest over all policies' plans: which rows, and what happens to them."""
    parts = [f"{r.data_type} {r.action} {r.plan_digest}" for r in results]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


@lru_cache(maxsize=1)
def get_retention_service() -> RetentionService:
    return RetentionService()
