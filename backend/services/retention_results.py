"""What retention says of itself: states of policies, plans, results of runs, what is to come."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from uuid import UUID

from backend.models import DataRetentionLog, RetentionStatus
from backend.privacy.due import Clockwork, RetentionPlan
from backend.services.brake_service import Brake
from backend.services.policy_service import Policy
from backend.settings import RetentionAction


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
    enabled: bool
    due_now: int
    months: Sequence[tuple[str, int]]


@dataclass(frozen=True, slots=True)
class Planned:
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


def log_row(
    one: Planned, run_id: UUID, started_by: str, affected: int | None = None
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


def digest_of(results: Iterable[PolicyResult]) -> str:
    """One digest over all policies' plans: which rows, and what happens to them."""
    parts = [f"{r.data_type} {r.action} {r.plan_digest}" for r in results]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
