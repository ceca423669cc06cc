"""Legal holds: what must stay, whatever erasure or retention says."""

from datetime import datetime
from typing import Annotated
from uuid import UUID

from fastapi import APIRouter, BackgroundTasks
from pydantic import Field

from backend.api import examples
from backend.api.access import AdminActor, ReaderActor
from backend.api.bodies import StrictRoute
from backend.api.dependencies import (
    MAX_ID,
    Answer,
    Body,
    Limit,
    Moment,
    Offset,
    UserId,
    WriteSession,
)
from backend.api.problems import problems
from backend.models import HoldScope
from backend.services.hold_service import get_hold_service
from backend.services.queue_service import get_queue_service

router = APIRouter(prefix="/security/holds", tags=["legal holds"], route_class=StrictRoute)


class HoldBody(Body, json_schema_extra=examples.of(examples.HOLD)):
    scope: Annotated[HoldScope, Field(strict=False)]
    reason: str = Field(min_length=1, max_length=500)
    user_id: UserId | None = None
    data_type: str | None = Field(default=None, max_length=64)
    row_id: int | None = Field(default=None, gt=0, le=MAX_ID)
    review_on: Moment | None = None


class HoldAnswer(Answer):
    id: UUID
    scope: HoldScope
    reason: str | None
    user_id: int | None
    data_type: str | None
    row_id: int | None
    review_on: datetime | None
    placed_at: datetime
    released_at: datetime | None


class HoldsAnswer(Answer):
    items: list[HoldAnswer] = Field(description="Newest first.")


@router.get("", responses=problems(401, 403))
def list_holds(actor: ReaderActor, limit: Limit = 500, offset: Offset = 0) -> HoldsAnswer:
    """Show holds, newest first, released ones included; it is recorded of whom."""
    holds = get_hold_service().all(actor, limit, offset)
    return HoldsAnswer(items=[HoldAnswer.model_validate(hold) for hold in holds])


@router.post("", status_code=201, responses=problems(401, 403, 404, 422))
def place_hold(body: HoldBody, session: WriteSession, actor: AdminActor) -> HoldAnswer:
    """Hold a person, one row, or a whole data type."""
    hold = get_hold_service().place(session, actor, **dict(body))
    return HoldAnswer.model_validate(hold)


@router.get("/{hold_id}", responses=problems(401, 403, 404, 422))
def read_hold(hold_id: UUID, actor: ReaderActor) -> HoldAnswer:
    """Show one hold; if it is about a person, that is recorded."""
    return HoldAnswer.model_validate(get_hold_service().show(actor, hold_id))


@router.delete("/{hold_id}", responses=problems(401, 403, 404, 409, 422))
def release_hold(
    hold_id: UUID, session: WriteSession, actor: AdminActor, after: BackgroundTasks
) -> HoldAnswer:
    """Release a hold; its record stays, and an erasure that waited for it is carried out."""
    released = HoldAnswer.model_validate(get_hold_service().release(session, hold_id, actor))
    after.add_task(get_queue_service().run)
    return released
