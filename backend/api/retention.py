"""Retention: policies, what is due, applying them, the log, notices to inactive people."""

from datetime import datetime
from typing import Annotated, Self
from uuid import UUID

from fastapi import APIRouter, Path, Query
from pydantic import Field, model_validator

from backend.api import examples
from backend.api.access import AdminActor, GraveAdminActor, GraveRunnerActor, ObserverActor
from backend.api.bodies import StrictRoute
from backend.api.dependencies import (
    Answer,
    Body,
    Limit,
    Offset,
    PlanDigest,
    ReadSession,
    WriteSession,
)
from backend.api.problems import problems
from backend.models import RetentionStatus
from backend.privacy.periods import Period
from backend.services.notice_service import get_notice_service
from backend.services.policy_service import Policy, get_policy_service
from backend.services.retention_results import PolicyState
from backend.services.retention_service import get_retention_service
from backend.services.scheduler_service import get_scheduler_service
from backend.settings import MAX_RETENTION_DAYS, RetentionAction

router = APIRouter(prefix="/security/retention", tags=["retention"], route_class=StrictRoute)
DataType = Annotated[str, Field(min_length=1, max_length=64)]


class PolicyBody(Body, json_schema_extra=examples.of(examples.POLICY)):
    data_type: DataType
    retention_days: int | None = Field(default=None, gt=0, le=MAX_RETENTION_DAYS)
    retention_period: str | None = Field(
        default=None, max_length=32, description="ISO 8601, instead of days."
    )
    action: Annotated[RetentionAction, Field(strict=False)]
    enabled: bool = True
    year_end: bool = Field(
        default=False, description="Counted from the end of the year (UTC) of the anchor."
    )

    @model_validator(mode="after")
    def _one_period(self) -> Self:
        if (self.retention_days is None) == (self.retention_period is None):
            raise ValueError("give retention_days or retention_period, one of them")
        return self

    @property
    def period(self) -> Period:
        if self.retention_period is not None:
            return Period.parse(self.retention_period, year_end=self.year_end)
        return Period.of_days(self.retention_days or 0, year_end=self.year_end)


class PolicyAnswer(Answer, json_schema_extra=examples.of(examples.POLICY_IN_FORCE)):
    data_type: str
    retention_period: str
    action: RetentionAction
    enabled: bool
    year_end: bool
    source: str = Field(description="`environment`, `data_map` or `api`.")
    updated_at: datetime | None
    description: str = Field(description="What the policy does, in words.")

    @classmethod
    def fields_of(cls, policy: Policy) -> dict[str, object]:
        return {
            "data_type": policy.data_type,
            "retention_period": str(policy.period),
            "action": policy.action,
            "enabled": policy.enabled,
            "year_end": policy.period.year_end,
            "source": policy.source,
            "updated_at": policy.updated_at,
            "description": policy.words,
        }


class PolicyItem(PolicyAnswer, json_schema_extra=examples.of(examples.POLICY_STATE)):
    rows: int = Field(description="All rows of the table.")
    due: int = Field(description="Rows due now, held ones included; people only once told.")
    due_soon: int = Field(description="More that become due within 30 days, told or not.")
    held: int = Field(description="Due rows that a legal hold keeps.")
    last_run_at: datetime | None
    next_run_at: datetime | None = Field(description="None where it is off.")

    @classmethod
    def of(cls, state: PolicyState, next_run_at: datetime | None) -> Self:
        return cls.model_validate(
            {
                **cls.fields_of(state.policy),
                "rows": state.rows,
                "due": state.due,
                "due_soon": state.due_soon,
                "held": state.held,
                "last_run_at": state.last_run_at,
                "next_run_at": next_run_at if state.policy.enabled else None,
            }
        )


class PoliciesAnswer(Answer):
    items: list[PolicyItem]


class TermsAnswer(Answer):
    retention_period: str
    year_end: bool
    action: RetentionAction
    enabled: bool
    source: str


class ChangeItem(Answer, json_schema_extra=examples.of(examples.POLICY_CHANGE)):
    data_type: str
    version: int
    changed_at: datetime
    changed_by: str = Field(description="Keyed reference of who did it.")
    before: TermsAnswer
    after: TermsAnswer


class ChangesAnswer(Answer):
    items: list[ChangeItem] = Field(description="Newest first.")


class MonthItem(Answer):
    month: str = Field(examples=["2026-11"])
    due: int = Field(description="Rows that become due in it.")


class ForecastItem(Answer):
    data_type: str
    enabled: bool = Field(description="If not, nothing leaves.")
    due_now: int
    months: list[MonthItem]


class ForecastAnswer(Answer, json_schema_extra=examples.of(examples.FORECAST)):
    items: list[ForecastItem]


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


class BrakeItem(Answer):
    data_type: str
    reason: str = Field(description="`share`, `usual`, `shortened` or `clock`.")
    words: str


class ApplyAnswer(Answer, json_schema_extra=examples.of(examples.APPLIED)):
    run_id: UUID
    dry_run: bool
    plan_digest: str
    results: list[PolicyResultAnswer]
    brakes: list[BrakeItem] = Field(
        description="Why a run needs this dry run's `plan_digest`, if it does."
    )


class LogItem(PolicyResultAnswer):
    id: UUID
    run_id: UUID
    plan_digest: str
    started_by: str
    started_at: datetime
    finished_at: datetime = Field(description="Of a run that goes on: when its last batch was.")
    status: RetentionStatus
    period: str | None
    year_end: bool | None


class LogsAnswer(Answer):
    items: list[LogItem] = Field(description="Newest first.")
    total: int


class NoticeItem(Answer):
    id: UUID
    user_id: int
    email: str | None = Field(description="None where there is no address to write to.")
    ends_at: datetime = Field(description="When the account ends unless it is used.")
    queued_at: datetime
    sent_at: datetime | None


class NoticesAnswer(Answer, json_schema_extra=examples.of(examples.NOTICES)):
    items: list[NoticeItem] = Field(description="Those first who wait longest.")


class SentAnswer(Answer):
    id: UUID
    status: str = Field(examples=["sent"])


@router.post("/policy", status_code=201, responses=problems(401, 403, 409, 422))
def set_policy(body: PolicyBody, session: WriteSession, actor: GraveAdminActor) -> PolicyAnswer:
    """Set the policy of a data type; it wins over the environment's."""
    policy = get_policy_service().set(
        session, actor, body.data_type, body.period, body.action, enabled=body.enabled
    )
    return PolicyAnswer.model_validate(PolicyAnswer.fields_of(policy))


@router.get("/policies", responses=problems(401, 403))
def list_policies(session: ReadSession, _actor: ObserverActor) -> PoliciesAnswer:
    """Show every policy in force, with what is due now."""
    states = get_retention_service().states(session)
    next_run_at = get_scheduler_service().next_run("retention")
    return PoliciesAnswer(items=[PolicyItem.of(state, next_run_at) for state in states])


@router.get("/policies/{data_type}/versions", responses=problems(401, 403, 404, 422))
def list_changes(
    data_type: Annotated[str, Path(min_length=1, max_length=64)],
    session: ReadSession,
    _actor: ObserverActor,
) -> ChangesAnswer:
    """Show who changed a policy, when, from what to what."""
    changes = get_policy_service().changes(session, data_type)
    return ChangesAnswer(items=[ChangeItem.model_validate(change) for change in changes])


@router.get("/forecast", responses=problems(401, 403))
def forecast(session: ReadSession, _actor: ObserverActor) -> ForecastAnswer:
    """Show what is due now and in each of the coming twelve months, by data type."""
    return ForecastAnswer(
        items=[
            ForecastItem(
                data_type=one.data_type,
                enabled=one.enabled,
                due_now=one.due_now,
                months=[MonthItem(month=month, due=due) for month, due in one.months],
            )
            for one in get_retention_service().forecast(session)
        ]
    )


@router.post("/apply", responses=problems(401, 403, 409, 422))
def apply_policies(body: ApplyBody, actor: GraveRunnerActor) -> ApplyAnswer:
    """
    Apply the enabled policies, or say what that would do.

    A run that would touch more than is usual is refused (`retention_brake`): give the
    `plan_digest` of a dry run if that is meant.
    """
    run = get_retention_service().apply(
        actor,
        dry_run=body.dry_run,
        data_type=body.data_type,
        plan_digest=body.plan_digest,
    )
    return ApplyAnswer.model_validate(run)


@router.get("/logs", responses=problems(401, 403, 422))
def list_logs(
    session: ReadSession,
    _actor: ObserverActor,
    limit: Limit = 100,
    offset: Offset = 0,
    data_type: Annotated[str | None, Query(min_length=1, max_length=64)] = None,
    run_id: UUID | None = None,
) -> LogsAnswer:
    """Show what past runs did, newest first."""
    rows, total = get_retention_service().logs(
        session, limit, offset, data_type=data_type, run_id=run_id
    )
    return LogsAnswer(items=[LogItem.model_validate(row) for row in rows], total=total)


@router.get("/notices", responses=problems(401, 403, 422))
def list_notices(
    session: WriteSession,
    actor: AdminActor,
    limit: Limit = 100,
) -> NoticesAnswer:
    """Show which inactive people are still to be told that their account ends."""
    notices = get_notice_service().waiting(session, actor, limit)
    return NoticesAnswer(items=[NoticeItem.model_validate(notice) for notice in notices])


@router.post("/notices/{notice_id}/sent", responses=problems(401, 403, 404, 409, 422))
def notice_sent(notice_id: UUID, session: WriteSession, actor: AdminActor) -> SentAnswer:
    """Note that somebody was told."""
    get_notice_service().sent(session, actor, notice_id)
    return SentAnswer(id=notice_id, status="sent")
