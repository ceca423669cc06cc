"""Retention: policies, what is due, applying them, the log."""

from datetime import datetime
from typing import Annotated, Self
from uuid import UUID

from fastapi import APIRouter, Query
from pydantic import Field, model_validator

from backend.api import examples
from backend.api.dependencies import (
    AdminActor,
    Answer,
    Body,
    PlanDigest,
    ReadSession,
    WriteSession,
)
from backend.api.problems import problems
from backend.privacy.periods import Period
from backend.services.retention_service import Policy, PolicyState, get_retention_service
from backend.settings import MAX_RETENTION_DAYS, RetentionAction

router = APIRouter(prefix="/security/retention", tags=["retention"])
DataType = Annotated[str, Field(min_length=1, max_length=64)]


class PolicyBody(Body, json_schema_extra=examples.of(examples.POLICY)):
    data_type: DataType
    retention_days: int | None = Field(default=None, gt=0, le=MAX_RETENTION_DAYS)
    retention_period: str | None = Field(
        default=None, max_length=32, description="ISO 8601, instead of days."
    )
    action: Annotated[RetentionAction, Field(strict=False)]
    enabled: bool = True

    @model_validator(mode="after")
    def _one_period(self) -> Self:
        if (self.retention_days is None) == (self.retention_period is None):
            raise ValueError("give retention_days or retention_period, one of them")
        return self

    @property
    def period(self) -> Period:
        if self.retention_period is not None:
            return Period.parse(self.retention_period)
        return Period.of_days(self.retention_days or 0)


class PolicyAnswer(Answer, json_schema_extra=examples.of(examples.POLICY_IN_FORCE)):
    data_type: str
    retention_period: str
    action: RetentionAction
    enabled: bool
    source: str = Field(description="`environment` or `api`.")
    updated_at: datetime | None

    @classmethod
    def fields_of(cls, policy: Policy) -> dict[str, object]:
        return {
            "data_type": policy.data_type,
            "retention_period": str(policy.period),
            "action": policy.action,
            "enabled": policy.enabled,
            "source": policy.source,
            "updated_at": policy.updated_at,
        }


class PolicyItem(PolicyAnswer, json_schema_extra=examples.of(examples.POLICY_STATE)):
    rows: int = Field(description="All rows of the table.")
    due: int = Field(description="Rows due now, held ones included.")
    held: int = Field(description="Due rows that a legal hold keeps.")
    last_run_at: datetime | None

    @classmethod
    def of(cls, state: PolicyState) -> Self:
        return cls.model_validate(
            {
                **cls.fields_of(state.policy),
                "rows": state.rows,
                "due": state.due,
                "held": state.held,
                "last_run_at": state.last_run_at,
            }
        )


class PoliciesAnswer(Answer):
    items: list[PolicyItem]


class ApplyBody(Body, json_schema_extra=examples.of(examples.APPLY)):
    dry_run: bool
    data_type: DataType | None = Field(default=None, description="Only this one; default all.")
    plan_digest: PlanDigest = None


class PolicyResultAnswer(Answer):
    data_type: str
    action: RetentionAction
    cutoff: datetime
    matched: int
    held: int
    affected: int


class ApplyAnswer(Answer, json_schema_extra=examples.of(examples.APPLIED)):
    run_id: UUID
    dry_run: bool
    plan_digest: str
    results: list[PolicyResultAnswer]


class LogItem(PolicyResultAnswer):
    id: UUID
    run_id: UUID
    plan_digest: str
    started_by: str
    started_at: datetime
    finished_at: datetime


class LogsAnswer(Answer):
    items: list[LogItem] = Field(description="Newest first.")
    total: int


@router.post("/policy", status_code=201, responses=problems(401, 403, 422))
def set_policy(body: PolicyBody, session: WriteSession, actor: AdminActor) -> PolicyAnswer:
    """Set the policy of a data type; it wins over the environment's."""
    policy = get_retention_service().set_policy(
        session, actor, body.data_type, body.period, body.action, enabled=body.enabled
    )
    return PolicyAnswer.model_validate(PolicyAnswer.fields_of(policy))


@router.get("/policies", responses=problems(401, 403))
def list_policies(session: ReadSession, _actor: AdminActor) -> PoliciesAnswer:
    """Show every policy in force, with what is due now."""
    states = get_retention_service().states(session)
    return PoliciesAnswer(items=[PolicyItem.of(state) for state in states])


@router.post("/apply", responses=problems(401, 403, 409, 422))
def apply_policies(body: ApplyBody, session: WriteSession, actor: AdminActor) -> ApplyAnswer:
    """Apply the enabled policies, or say what that would do."""
    run = get_retention_service().apply(
        session,
        actor,
        dry_run=body.dry_run,
        data_type=body.data_type,
        plan_digest=body.plan_digest,
    )
    return ApplyAnswer.model_validate(run)


@router.get("/logs", responses=problems(401, 403, 422))
def list_logs(
    session: ReadSession,
    _actor: AdminActor,
    limit: Annotated[int, Query(ge=1, le=500)] = 100,
    offset: Annotated[int, Query(ge=0, le=10**9)] = 0,
) -> LogsAnswer:
    """Show what past runs did, newest first."""
    rows, total = get_retention_service().logs(session, limit, offset)
    return LogsAnswer(items=[LogItem.model_validate(row) for row in rows], total=total)
