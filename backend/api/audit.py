"""The audit trail, to be read: who did what, to whom, when, and how it ended."""

from datetime import datetime
from typing import Annotated, Any

from fastapi import APIRouter, Query
from pydantic import Field

from backend.api import examples
from backend.api.access import ReaderActor
from backend.api.bodies import StrictRoute
from backend.api.dependencies import MAX_ID, Answer, InAddress, Limit, Moment, WriteSession
from backend.api.problems import problems
from backend.services.audit_service import Sought, get_audit_service
from backend.services.trail_service import Verdict, get_trail_service
from backend.services.trail_walk import BreakKind

router = APIRouter(prefix="/security/audit", tags=["audit"], route_class=StrictRoute)
Number = Annotated[int | None, Query(gt=0, le=MAX_ID), InAddress]
Word = Annotated[str | None, Query(min_length=1, max_length=64)]


class EventItem(Answer):
    id: int
    at: datetime | None = Field(description="`null` only where `damaged`.")
    action: str
    outcome: str
    actor_ref: str = Field(description="Keyed reference, or `command line`, `scheduler`.")
    subject_ref: str | None = Field(description="Keyed reference of the person concerned.")
    request_id: str | None
    detail: dict[str, Any] = Field(description="Counts and ids.")
    damaged: bool = Field(
        description="Somebody has changed the row so that it is no event: what of it can be read."
    )


class EventsAnswer(Answer, json_schema_extra=examples.of(examples.AUDIT)):
    items: list[EventItem] = Field(description="Newest first.")
    next_before: int | None = Field(description="For the next page; None where this is the last.")


class BreakItem(Answer):
    kind: BreakKind
    event_id: int = Field(description="The first event that it is about.")
    detail: str


class LossItem(Answer):
    after: int = Field(description="The last event that the restored backup had.")
    at: datetime
    known_until: int | None = Field(description="The last lost event that a checkpoint knows.")


class OtherItem(Answer):
    chain_id: str
    event_id: int = Field(description="Up to which event it went.")
    store: str = Field(description="Where its checkpoints lie.")


class CheckedAnswer(Answer, json_schema_extra=examples.of(examples.AUDIT_CHECKED)):
    status: Verdict = Field(
        description="`incomplete`: the links hold, and a store did not answer, or none has a "
        "checkpoint: nothing can be said of what was cut off or put back; or there are `others`."
    )
    events: int = Field(description="Events that fit, to the first break.")
    older: int = Field(description="Those of them that are of before the chain.")
    last: int = Field(description="Number of the last one that fits.")
    breaks: list[BreakItem] = Field(description="The first of the trail, all of checkpoints.")
    losses: list[LossItem] = Field(description="What restores are known not to have brought back.")
    checkpoints: int
    checkpoint_at: datetime | None = Field(description="When the newest one was made.")
    checkpoint_event: int | None = Field(description="Up to which event it speaks.")
    silent: list[str] = Field(description="Stores that did not answer.")
    others: list[OtherItem] = Field(
        description="Other trails that lie in the stores, and that no restore has replaced by this "
        "one: another installation's, or this one's own of before somebody had it begun anew."
    )
    public_key: str = Field(description="By which the checkpoints are signed.")


@router.get("", responses=problems(401, 403, 404, 422))
def read_events(  # noqa: PLR0913 - each is a question of its own
    session: WriteSession,
    actor: ReaderActor,
    *,
    user_id: Number = None,
    subject_ref: Annotated[str | None, Query(pattern="^[0-9a-f]{32}$")] = None,
    by_user_id: Number = None,
    action: Word = None,
    outcome: Word = None,
    since: Moment | None = None,
    until: Moment | None = None,
    before: Annotated[int | None, Query(gt=0, le=2**63 - 1), InAddress] = None,
    limit: Limit = 100,
) -> EventsAnswer:
    """
    Show what was done, as who looked at a person's data between two moments.

    Reading it is recorded, too.
    """
    sought = Sought(user_id, subject_ref, by_user_id, action, outcome, since, until, before)
    events = get_audit_service().read(session, actor, sought, limit)
    return EventsAnswer(
        items=[EventItem.model_validate(event) for event in events],
        # None has a lower number than 1, but for rows that somebody has put there.
        next_before=events[-1].id if len(events) == limit and events[-1].id > 1 else None,
    )


@router.get("/verify", responses=problems(401, 403))
def verify_trail(actor: ReaderActor) -> CheckedAnswer:
    """
    Say whether the trail is what was recorded, and name the first place where it is not.

    It reads every event: a million take about twenty seconds. That it was checked is recorded.
    """
    return CheckedAnswer.model_validate(get_trail_service().verify(actor))
