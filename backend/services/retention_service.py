"""Retention: what the policies would do now, and doing it, batch by batch."""

from collections.abc import Sequence
from dataclasses import replace
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
    count_due_by,
    plan_retention,
)
from backend.privacy.steps import IncompleteErasureError
from backend.services.alert_service import get_alert_service
from backend.services.audit_service import ITSELF, Actor, get_audit_service
from backend.services.brake_service import BrakeError, get_brake_service
from backend.services.hold_service import get_hold_service
from backend.services.notice_service import get_notice_service
from backend.services.pace import Pace
from backend.services.policy_service import Policy, get_policy_service
from backend.services.retention_results import (
    Forecast,
    Planned,
    PolicyState,
    RetentionRun,
    digest_of,
    log_row,
)

log = structlog.get_logger(__name__)
SOON: Final = timedelta(days=30)
# A run whose last batch is older has ended without saying so.
_SILENT: Final = timedelta(minutes=5)
_MONTHS: Final = 12
_MOST_TRIES: Final = 20


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
        ends = [_month_end(now, ahead) - timedelta(microseconds=1) for ahead in range(_MONTHS)]
        found = []
        for policy in get_policy_service().policies(session):
            clockwork = self._clockwork(session, policy, now)
            due, *by_end = count_due_by(session, DATA_MAP, clockwork, [now, *ends])
            months = [
                (f"{end:%Y-%m}", later - sooner)
                for end, sooner, later in zip(ends, [due, *by_end], by_end, strict=False)
            ]
            found.append(Forecast(policy.data_type, policy.enabled, due, months))
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

        Manages its own transactions, one a batch, after one that records that it begins. Killed
        at any point, the next run goes on.

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
            self._begin(now, confirmed=plan_digest is not None)
        with snapshot_scope() as session:
            planned = self._plan(session, now, data_type)
            plans = [(one.policy, one.plan) for one in planned]
            brakes = get_brake_service().brakes(session, plans, now)
        results = [one.result(one.plan.affected) for one in planned]
        whole = digest_of(results)
        run = RetentionRun(uuid4(), dry_run, whole, results, brakes)
        if plan_digest is not None and plan_digest != whole:
            raise StalePlanError("due rows have changed since the dry run", plan_digest=whole)
        if not dry_run:
            if brakes and plan_digest is None:
                self._refuse(actor, run)
            run = self._carry_out(actor, run, planned, now)
            get_brake_service().note(run.run_id, now)
        with session_scope() as session:
            get_audit_service().record(
                session, "retention_applied", actor, outcome="dry_run" if dry_run else "done",
                run=run.run_id, affected=run.affected, confirmed=plan_digest is not None,
            )  # fmt: skip
        return run

    def apply_again(self, session: Session, actor: Actor, *, runs_lost: bool) -> int:
        """
        Apply the policies to a database that is being restored, in its session's transaction.

        What retention has removed since the backup must not come back; more than that would need
        the brake. So policies, also those that were switched off since, are as at their last run,
        and one that never ran takes nothing.

        Args:
            runs_lost: Runs since the backup are not known here, for the live database is lost: a
                policy that had not run by then is applied as it is now, unless that is much.

        Returns:
            How many rows met their end.
        """
        now, run_id, total = datetime.now(UTC), uuid4(), 0
        for policy in get_policy_service().policies(session):
            applied = get_brake_service().as_applied(session, policy)
            if applied is None and not (runs_lost and policy.enabled):
                continue
            as_it_was, moment = applied or (policy, now)
            if not get_policy_service().is_lawful(as_it_was):
                continue
            one = self._planned(session, as_it_was, moment)
            if applied is None and get_brake_service().is_large(policy.data_type, one.plan):
                continue
            batches, affected = RetentionBatches(DATA_MAP, one.clockwork), 0
            while rows := batches.run(session, one.clockwork.holds, Pace.MOST):
                affected += rows
            session.add(log_row(one, run_id, actor.ref(session), affected))
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
            .order_by(
                DataRetentionLog.started_at.desc(), DataRetentionLog.data_type, DataRetentionLog.id
            )
        )
        total = session.scalar(select(func.count()).select_from(DataRetentionLog).where(*rows)) or 0
        return list(session.scalars(newest.limit(limit).offset(offset))), total

    def _begin(self, now: datetime, *, confirmed: bool) -> None:
        """Say which runs were interrupted, and whom of the inactive is to be told."""
        heard_of = select(DataRetentionLog.run_id).where(
            DataRetentionLog.finished_at >= datetime.now(UTC) - _SILENT
        )
        with session_scope() as session:
            interrupted = session.execute(
                update(DataRetentionLog)
                .where(
                    DataRetentionLog.status == RetentionStatus.RUNNING,
                    # The turn of a policy may come late in a run that goes on.
                    DataRetentionLog.run_id.not_in(heard_of),
                )
                .values(status=RetentionStatus.INTERRUPTED)
                .returning(DataRetentionLog.run_id)
            ).all()
            for run_id in {row.run_id for row in interrupted}:
                log.warning("retention_interrupted", run=str(run_id))
                get_audit_service().record(
                    session, "retention_applied", ITSELF, outcome="interrupted", run=run_id,
                    affected=_affected(session, run_id),
                )  # fmt: skip
            moved = not confirmed and get_brake_service().clock_moved(session, now)
        # By a clock that is off, people would be told too late, or too soon.
        if not moved:
            get_notice_service().bring_up(now)

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
        self, actor: Actor, run: RetentionRun, planned: Sequence[Planned], now: datetime
    ) -> RetentionRun:
        with session_scope() as session:
            if any(brake.reason == "clock" for brake in run.brakes):
                get_brake_service().accept_clock(session, now)
            logs = [log_row(one, run.run_id, actor.ref(session)) for one in planned]
            session.add_all(logs)
            get_audit_service().record(
                session, "retention_applied", actor, outcome="begun", run=run.run_id,
                planned=run.affected,
            )  # fmt: skip
        results = []
        try:
            for one, entry in zip(planned, logs, strict=True):
                results.append(one.result(self._run_policy(one, entry.id)))
        finally:
            # Until then the log still holds the pages as they were before.
            empty_wal(get_engine())
            if len(results) < len(logs):
                self._fail(actor, run.run_id, [entry.id for entry in logs[len(results) :]])
        return replace(run, results=results)

    def _run_policy(self, one: Planned, log_id: UUID) -> int:
        """Carry out one policy in transactions of a batch each; the log grows with them."""
        batches, pace = RetentionBatches(DATA_MAP, one.clockwork), Pace(get_engine())
        affected, tries = 0, 0
        while True:
            try:
                rows = self._run_batch(one, batches, pace, log_id, affected)
            except IncompleteErasureError:
                # Another run, or a writer, was faster: what is due is looked at anew.
                tries += 1
                if tries > _MOST_TRIES:
                    raise
                continue
            if rows is None:
                return affected
            tries, affected = 0, affected + rows

    def _run_batch(
        self, one: Planned, batches: RetentionBatches, pace: Pace, log_id: UUID, affected: int
    ) -> int | None:
        mine = update(DataRetentionLog).where(DataRetentionLog.id == log_id)
        with pace.batch(), session_scope() as session:
            # Placed a moment ago, a hold counts from the next batch on.
            holds = get_hold_service().standing(session)
            rows = batches.run(session, holds, pace.limit)
            values = {
                "affected": affected + (rows or 0),
                "finished_at": datetime.now(UTC),
                "status": RetentionStatus.DONE if rows is None else RetentionStatus.RUNNING,
            }
            if rows is None and holds != one.clockwork.holds:
                # What was placed or released meanwhile is counted, too.
                clockwork = replace(one.clockwork, holds=holds)
                values["held"] = plan_retention(session, DATA_MAP, clockwork).held
            session.execute(mine.values(values))
            pace.did(rows or 0)
        return rows

    def _fail(self, actor: Actor, run_id: UUID, ids: Sequence[UUID]) -> None:
        with session_scope() as session:
            session.execute(
                update(DataRetentionLog)
                .where(DataRetentionLog.id.in_(ids))
                .values(status=RetentionStatus.FAILED)
            )
            get_audit_service().record(
                session, "retention_applied", actor, outcome="failed", run=run_id,
                affected=_affected(session, run_id),
            )  # fmt: skip

    def _plan(self, session: Session, now: datetime, data_type: str | None) -> list[Planned]:
        policies = [
            policy
            for policy in get_policy_service().policies(session)
            if policy.enabled and data_type in (None, policy.data_type)
        ]
        for policy in policies:
            get_policy_service().require_lawful(policy)
        return [self._planned(session, policy, now) for policy in policies]

    def _planned(self, session: Session, policy: Policy, now: datetime) -> Planned:
        clockwork = self._clockwork(session, policy, now)
        return Planned(policy, plan_retention(session, DATA_MAP, clockwork), clockwork)

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


def _affected(session: Session, run_id: UUID) -> int:
    """Return how many rows met their end in a run, over all of its policies, until now."""
    mine = select(func.sum(DataRetentionLog.affected)).where(DataRetentionLog.run_id == run_id)
    return session.scalar(mine) or 0


def _month_end(now: datetime, ahead: int) -> datetime:
    """Return when the month ends that is *ahead* of the present one, in UTC."""
    months = now.year * 12 + now.month + ahead
    return datetime(months // 12, months % 12 + 1, 1, tzinfo=UTC)


@lru_cache(maxsize=1)
def get_retention_service() -> RetentionService:
    return RetentionService()
