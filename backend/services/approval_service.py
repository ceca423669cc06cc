"""A second admin's approval of acts that cannot be undone, where `SECOND_ADMIN` asks for it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import Final
from uuid import UUID

from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from backend.db_utils import session_scope
from backend.errors import ApprovalNeededError, ConflictError, ForbiddenError, NotFoundError
from backend.models import Approval, Role, User
from backend.services.audit_service import Actor, get_audit_service
from backend.services.reference_service import reference_to

_VALID: Final = timedelta(days=1)
# Nobody asks for more acts of weight in a day; each is kept, and shown to every admin.
MAX_WAITING: Final = 20


@dataclass(frozen=True, slots=True)
class Request:
    """What somebody asked for: method and path, and the body of the request."""

    act: str
    body: str = field(repr=False)


class TooManyWaitingError(ConflictError):
    """So many requests of one person wait that no other one is kept."""

    code = "too_many_waiting"


class ApprovalService:
    """Keeps requests until another admin has approved them, and lets each through once."""

    def require(self, actor: Actor, request: Request) -> None:
        """
        Let an approved request through, and keep any other one to be approved.

        The approval is used up before the act begins: one that fails has to be asked for again. It
        counts for as long as whoever gave it is an active admin. Manages its own transactions.

        Raises:
            ApprovalNeededError: With the number that another admin approves it under.
            TooManyWaitingError: `MAX_WAITING` others wait already.
        """
        now = datetime.now(UTC)
        with session_scope() as session:
            self.forget_expired(session, now)
            mine = select(Approval).where(Approval.requested_by == actor.ref(session))
            # For writing: of two who come with one approval, the second one finds it used.
            found = session.scalars(mine.with_for_update()).all()
            # The body is sealed, so it is compared here.
            same = [
                kept for kept in found if (kept.act, kept.request) == (request.act, request.body)
            ]
            approved = next((kept for kept in same if _is_approved(session, kept)), None)
            if approved is not None:
                session.delete(approved)
                get_audit_service().record(
                    session, "approval_used", actor, approval=approved.id, act=request.act,
                    approved_by=approved.approved_by,
                )  # fmt: skip
                return
            if not same and len(found) >= MAX_WAITING:
                raise TooManyWaitingError(
                    f"{MAX_WAITING} requests of yours wait: have some approved or refused first"
                )
            kept = same[0] if same else self._keep(session, actor, request, now)
            number = kept.id
        raise ApprovalNeededError(
            "another admin has to approve this first; then send the same request again",
            approval_id=str(number),
        )

    def waiting(self, session: Session, limit: int, offset: int = 0) -> Sequence[Approval]:
        """Return what waits and what was approved and not used yet, oldest first."""
        valid = select(Approval).where(Approval.expires_at >= datetime.now(UTC))
        oldest_first = valid.order_by(Approval.requested_at, Approval.id)
        return session.scalars(oldest_first.limit(limit).offset(offset)).all()

    def approve(self, session: Session, actor: Actor, number: UUID) -> Approval:
        """
        Let a request of somebody else through, once.

        Raises:
            NotFoundError: No request waits under this number.
            ForbiddenError: It is one's own.
            ConflictError: It was approved already.
        """
        approval = self._require(session, number)
        if approval.requested_by == actor.ref(session):
            raise ForbiddenError("another admin has to approve this")
        if _is_approved(session, approval):
            raise ConflictError("this was approved already")
        approval.approved_by, approval.approved_at = actor.ref(session), datetime.now(UTC)
        get_audit_service().record(
            session, "approved", actor, approval=number, act=approval.act,
            requested_by=approval.requested_by,
        )  # fmt: skip
        return approval

    def refuse(self, session: Session, actor: Actor, number: UUID) -> None:
        """
        Drop a request, one's own too, or an approval that was not used yet.

        Raises:
            NotFoundError: No request waits under this number.
        """
        approval = self._require(session, number)
        session.delete(approval)
        get_audit_service().record(
            session, "approval_refused", actor, approval=number, act=approval.act
        )

    def forget_expired(self, session: Session, now: datetime) -> None:
        """Delete what nobody has approved or used in time."""
        session.execute(delete(Approval).where(Approval.expires_at < now))

    def _keep(self, session: Session, actor: Actor, request: Request, now: datetime) -> Approval:
        kept = Approval(
            act=request.act,
            request=request.body,
            requested_by=actor.ref(session),
            requested_at=now,
            expires_at=now + _VALID,
        )
        session.add(kept)
        session.flush()
        get_audit_service().record(
            session, "approval_requested", actor, approval=kept.id, act=request.act
        )
        return kept

    def _require(self, session: Session, number: UUID) -> Approval:
        found = select(Approval).where(
            Approval.id == number, Approval.expires_at >= datetime.now(UTC)
        )
        approval = session.scalar(found.with_for_update())
        if approval is None:
            raise NotFoundError(f"no request waits under the number {number}")
        return approval


def _is_approved(session: Session, approval: Approval) -> bool:
    """Say whether somebody has approved it who still might."""
    if approval.approved_by is None:
        return False
    # References are keyed, so they are compared here; admins are few.
    admins = session.scalars(select(User.uid).where(User.role == Role.ADMIN, User.is_active))
    return approval.approved_by in {reference_to(session, uid) for uid in admins}


@lru_cache(maxsize=1)
def get_approval_service() -> ApprovalService:
    return ApprovalService()
