"""Retention: policies, what they would do now, and doing it."""

import hashlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import lru_cache
from uuid import UUID, uuid4

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from backend.db_utils import empty_wal_after_commit
from backend.errors import RefusedError, StalePlanError
from backend.models import DATA_MAP, DataRetentionLog, RetentionPolicy
from backend.privacy.declarations import EraseMode
from backend.privacy.due import RetentionPlan, carry_out_retention, plan_retention
from backend.privacy.periods import Period
from backend.services.audit_service import Actor, get_audit_service
from backend.services.hold_service import get_hold_service
from backend.settings import RetentionAction, get_settings


class UnknownDataTypeError(RefusedError):
    """No table of the data map has this data type."""

    code = "unknown_data_type"


@dataclass(frozen=True, slots=True)
class Policy:
    """One policy in force and where it comes from (`environment` or `api`)."""

    data_type: str
    period: Period
    action: RetentionAction
    enabled: bool
    source: str
    updated_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class PolicyState:
    """A policy with what is there: all rows, rows due now, due rows that a hold keeps."""

    policy: Policy
    rows: int
    due: int
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
    """One run over all policies, with one digest for the whole plan."""

    run_id: UUID
    dry_run: bool
    plan_digest: str
    results: list[PolicyResult]

    @property
    def affected(self) -> int:
        return sum(result.affected for result in self.results)


class RetentionService:
    """The policies of all data types and the runs that apply them."""

    def policies(self, session: Session) -> list[Policy]:
        """
        The policies in force: those set over the API win over the environment's.

        People come last, so that no policy takes rows that a later one has counted.
        """
        stored = {row.data_type: row for row in session.scalars(select(RetentionPolicy))}
        return [
            _stored(stored[data_type]) if data_type in stored else _default(data_type)
            for data_type in reversed(DATA_MAP.by_data_type)
        ]

    def periods(self, session: Session) -> dict[str, Period]:
        """The retention period per data type."""
        return {policy.data_type: policy.period for policy in self.policies(session)}

    def set_policy(
        self,
        session: Session,
        actor: Actor,
        data_type: str,
        period: Period,
        action: RetentionAction,
        *,
        enabled: bool,
    ) -> Policy:
        """
        Set the policy of one data type; it wins over the environment from now on.

        Raises:
            UnknownDataTypeError: No table has this data type.
        """
        self._require(data_type)
        before = next(p for p in self.policies(session) if p.data_type == data_type)
        row = RetentionPolicy(
            data_type=data_type,
            period=str(period),
            action=action,
            enabled=enabled,
            updated_at=datetime.now(UTC),
            updated_by=actor.ref(session),
        )
        session.merge(row)
        session.flush()
        get_audit_service().record(
            session, "retention_policy_set", actor, data_type=data_type,
            before=f"{before.period} {before.action} {before.enabled}",
            after=f"{period} {action} {enabled}",
        )  # fmt: skip
        return _stored(row)

    def states(self, session: Session, now: datetime | None = None) -> list[PolicyState]:
        """Every policy with what is due now; read from the plan that a run would carry out."""
        now = now or datetime.now(UTC)
        return [self._state(session, policy, now) for policy in self.policies(session)]

    def apply(
        self,
        session: Session,
        actor: Actor,
        *,
        dry_run: bool,
        data_type: str | None = None,
        plan_digest: str | None = None,
        now: datetime | None = None,
    ) -> RetentionRun:
        """
        Carry out the enabled policies, or only say what that would do.

        Args:
            plan_digest: Of a dry run; the run refuses when the plan has changed since.

        Raises:
            UnknownDataTypeError: No table has this data type.
            StalePlanError: The plan is not the one of the dry run.
        """
        if data_type is not None:
            self._require(data_type)
        now, run_id = now or datetime.now(UTC), uuid4()
        policies = [
            policy
            for policy in self.policies(session)
            if policy.enabled and data_type in (None, policy.data_type)
        ]
        started = datetime.now(UTC)
        plans = [self._plan(session, policy, now, lock=not dry_run) for policy in policies]
        results = [_result(policy, plan, now) for policy, plan in zip(policies, plans, strict=True)]
        run = RetentionRun(run_id, dry_run, _digest_of(results), results)
        if plan_digest is not None and plan_digest != run.plan_digest:
            raise StalePlanError(
                "due rows have changed since the dry run", plan_digest=run.plan_digest
            )
        if not dry_run:
            for plan in plans:
                carry_out_retention(session, DATA_MAP, plan, now)
            empty_wal_after_commit(session)
            self._log(session, actor, run, started)
        get_audit_service().record(
            session, "retention_applied", actor, outcome="dry_run" if dry_run else "done",
            run=run_id, affected=run.affected,
        )  # fmt: skip
        return run

    def logs(self, session: Session, limit: int, offset: int) -> tuple[list[DataRetentionLog], int]:
        """The log, newest first, and how long it is."""
        newest = select(DataRetentionLog).order_by(
            DataRetentionLog.started_at.desc(), DataRetentionLog.data_type
        )
        total = session.scalar(select(func.count()).select_from(DataRetentionLog)) or 0
        return list(session.scalars(newest.limit(limit).offset(offset))), total

    def _plan(
        self, session: Session, policy: Policy, now: datetime, *, lock: bool = False
    ) -> RetentionPlan:
        return plan_retention(
            session,
            DATA_MAP,
            policy.data_type,
            mode=EraseMode(policy.action.value),
            periods=self.periods(session),
            holds=get_hold_service().standing(session),
            now=now,
            lock=lock,
        )

    def _log(self, session: Session, actor: Actor, run: RetentionRun, started: datetime) -> None:
        finished = datetime.now(UTC)
        session.add_all(
            DataRetentionLog(
                run_id=run.run_id,
                started_by=actor.ref(session),
                started_at=started,
                finished_at=finished,
                **asdict(result),
            )
            for result in run.results
        )

    def _state(self, session: Session, policy: Policy, now: datetime) -> PolicyState:
        plan = self._plan(session, policy, now)
        table = DATA_MAP.by_data_type[policy.data_type].table
        last = select(func.max(DataRetentionLog.finished_at)).where(
            DataRetentionLog.data_type == policy.data_type
        )
        return PolicyState(
            policy,
            session.scalar(select(func.count()).select_from(table)) or 0,
            plan.matched,
            plan.held,
            session.scalar(last),
        )

    def _require(self, data_type: str) -> None:
        if data_type not in DATA_MAP.by_data_type:
            raise UnknownDataTypeError(
                f"data_type is one of {', '.join(sorted(DATA_MAP.by_data_type))}"
            )


def _default(data_type: str) -> Policy:
    days, action = get_settings().retention_default(data_type)
    return Policy(data_type, Period.of_days(days), action, enabled=True, source="environment")


def _stored(row: RetentionPolicy) -> Policy:
    return Policy(
        row.data_type, Period.parse(row.period), row.action, row.enabled, "api", row.updated_at
    )


def _result(policy: Policy, plan: RetentionPlan, now: datetime) -> PolicyResult:
    return PolicyResult(
        policy.data_type,
        policy.action,
        policy.period.cutoff(now),
        plan.matched,
        plan.held,
        plan.affected,
        plan.digest,
    )


def _digest_of(results: Iterable[PolicyResult]) -> str:
    """One digest over all policies' plans: which rows, and what happens to them."""
    parts = [f"{r.data_type} {r.action} {r.plan_digest}" for r in results]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


@lru_cache(maxsize=1)
def get_retention_service() -> RetentionService:
    return RetentionService()
