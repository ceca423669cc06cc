"""The audit trail, to be read: who did what, to whom, when, and how it ended."""

from datetime import datetime
from typing import Annotated, Any

from fastapi import APIRouter, Query
from pydantic import AwareDatetime, Field

from backend.api import examples
from backend.api.dependencies import MAX_ID, AdminActor, Answer, WriteSession
from backend.api.problems import problems
from backend.services.audit_service import Sought, get_audit_service

router = APIRouter(prefix="/security/audit", tags=["audit"])
Number = Annotated[int | None, Query(gt=0, le=MAX_ID)]
Word = Annotated[str | None, Query(min_length=1, max_length=64)]
Moment = Annotated[AwareDatetime | None, Query()]


class EventItem(Answer):
    id: int
    at: datetime
    action: str
    outcome: str
    actor_ref: str = Field(description="Keyed reference, or `command line`, `scheduler`.")
    subject_ref: str | None = Field(description="Keyed reference of the person concerned.")
    request_id: str | None
    detail: dict[str, Any] = Field(description="Counts and ids.")


class EventsAnswer(Answer, json_schema_extra=examples.of(examples.AUDIT)):
    items: list[EventItem] = Field(description="Newest first.")
    next_before: int | None = Field(description="For the next page; None where this is the last.")


@router.get("", responses=problems(401, 403, 404, 422))
def read_events(  # noqa: PLR0913 - each is a question of its own
    session: WriteSession,
    actor: AdminActor,
    *,
    user_id: Number = None,
    subject_ref: Word = None,
    by_user_id: Number = None,
    action: Word = None,
    outcome: Word = None,
    since: Moment = None,
    until: Moment = None,
    before: Annotated[int | None, Query(gt=0, le=2**63 - 1)] = None,
    limit: Annotated[int, Query(ge=1, le=500)] = 100,
) -> EventsAnswer:
    """
    Show what was done, as who looked at a person's data between two moments.

    Reading it is recorded, too.
    """
    sought = Sought(user_id, subject_ref, by_user_id, action, outcome, since, until, before)
    events = get_audit_service().read(session, actor, sought, limit)
    return EventsAnswer(
        items=[EventItem.model_validate(event) for event in events],
        next_before=events[-1].id if len(events) == limit else None,
    )
