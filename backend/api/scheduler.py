"""The scheduler: which jobs there are, when they are due, how they went, and alerts."""

from datetime import datetime
from typing import Self
from uuid import UUID

from fastapi import APIRouter
from pydantic import Field

from backend.api import examples
from backend.api.access import ObserverActor
from backend.api.bodies import StrictRoute
from backend.api.dependencies import Answer, ReadSession
from backend.api.problems import problems
from backend.models import AlertKind, JobStatus
from backend.services.alert_service import get_alert_service
from backend.services.scheduler_service import JobState, get_scheduler_service

router = APIRouter(prefix="/security/scheduler", tags=["scheduler"], route_class=StrictRoute)
_ALERTS = 50


class JobItem(Answer):
    name: str
    at: str | None = Field(description="Local time, every day; None where it is switched off.")
    next_due_at: datetime | None
    last_due_at: datetime | None
    last_status: JobStatus | None = Field(description="`baseline`: before the first start.")
    last_attempts: int | None
    last_finished_at: datetime | None
    last_error: str | None

    @classmethod
    def of(cls, state: JobState) -> Self:
        last = state.last
        return cls(
            name=state.name,
            at=state.at,
            next_due_at=state.next_due_at,
            last_due_at=last and last.due_at,
            last_status=last and last.status,
            last_attempts=last and last.attempts,
            last_finished_at=last and last.finished_at,
            last_error=last and last.error,
        )


class AlertItem(Answer):
    id: UUID
    kind: AlertKind
    about: str = Field(description="Name of a job or data type, or number of a record.")
    code: str
    raised_at: datetime
    sent_at: datetime | None = Field(description="When the webhook has taken it.")
    attempts: int
    error: str | None = Field(description="Why the webhook has not.")


class StatusAnswer(Answer, json_schema_extra=examples.of(examples.SCHEDULER)):
    running: bool = Field(description="Whether this process ticks.")
    jobs: list[JobItem]
    alerts: list[AlertItem] = Field(description="Newest first.")


@router.get("/status", responses=problems(401, 403))
def status(session: ReadSession, _actor: ObserverActor) -> StatusAnswer:
    """Show every job with its last run and next due time, and the newest alerts."""
    alerts = get_alert_service().newest(session, _ALERTS)
    return StatusAnswer(
        running=get_scheduler_service().is_running,
        jobs=[JobItem.of(state) for state in get_scheduler_service().states(session)],
        alerts=[AlertItem.model_validate(alert) for alert in alerts],
    )
