"""Acts that wait for a second admin, where `SECOND_ADMIN` asks for one."""

from datetime import datetime
from uuid import UUID

from fastapi import APIRouter
from pydantic import Field

from backend.api import examples
from backend.api.access import AdminActor, FreshAdminActor
from backend.api.bodies import StrictRoute
from backend.api.dependencies import Answer, Limit, Offset, ReadSession, WriteSession
from backend.api.problems import problems
from backend.services.approval_service import get_approval_service

router = APIRouter(prefix="/security/approvals", tags=["approvals"], route_class=StrictRoute)


class ApprovalItem(Answer):
    id: UUID
    act: str = Field(description="Method and path.")
    request: str = Field(description="Body of the request.")
    requested_by: str = Field(description="Keyed reference.")
    requested_at: datetime
    expires_at: datetime
    approved_by: str | None
    approved_at: datetime | None


class ApprovalsAnswer(Answer, json_schema_extra=examples.of(examples.APPROVALS)):
    items: list[ApprovalItem] = Field(description="Oldest first.")


@router.get("", responses=problems(401, 403))
def list_approvals(
    session: ReadSession, _actor: AdminActor, limit: Limit = 100, offset: Offset = 0
) -> ApprovalsAnswer:
    """Show what waits for a second admin, and what one has approved."""
    waiting = get_approval_service().waiting(session, limit, offset)
    return ApprovalsAnswer(items=[ApprovalItem.model_validate(one) for one in waiting])


@router.post("/{approval_id}", responses=problems(401, 403, 404, 409, 422))
def approve(approval_id: UUID, session: WriteSession, actor: FreshAdminActor) -> ApprovalItem:
    """Let a request of another admin through, once; it has to be sent again for that."""
    return ApprovalItem.model_validate(get_approval_service().approve(session, actor, approval_id))


@router.delete("/{approval_id}", status_code=204, responses=problems(401, 403, 404, 422))
def refuse(approval_id: UUID, session: WriteSession, actor: AdminActor) -> None:
    """Drop a request, or an approval that was not used."""
    get_approval_service().refuse(session, actor, approval_id)
