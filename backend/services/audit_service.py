"""The audit trail: who did what, to whom by reference, when, and how it ended."""

from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import lru_cache
from typing import Final
from uuid import UUID

import orjson
from sqlalchemy.orm import Session

from backend.models import AuditEvent, Role
from backend.services.reference_service import reference_to


@dataclass(frozen=True, slots=True)
class Actor:
    """Who acts: a signed-in person, the command line, or the scheduler."""

    name: str
    role: Role
    user_id: int | None = None
    token_id: str | None = None
    request_id: str | None = None
    uid: UUID | None = None

    @property
    def is_admin(self) -> bool:
        return self.role is Role.ADMIN

    def ref(self, session: Session) -> str:
        """Say who acts, without a name: a person by their reference."""
        return self.name if self.uid is None else reference_to(session, self.uid)

    def during(self, request_id: str | None) -> "Actor":
        return replace(self, request_id=request_id)


# Whoever runs the command line reads the database and the key anyway.
COMMAND_LINE: Final = Actor("command line", Role.ADMIN)
SCHEDULER: Final = Actor("scheduler", Role.ADMIN)
ANYONE: Final = Actor("anonymous", Role.USER)


class AuditService:
    """Writes audit rows in the transaction of the act, so that neither exists alone."""

    def record(
        self,
        session: Session,
        action: str,
        actor: Actor,
        *,
        outcome: str = "done",
        subject: UUID | str | None = None,
        **detail: object,
    ) -> None:
        """
        Add one event.

        Args:
            subject: `uid` of the person concerned, of which only a keyed reference is stored, or
                that reference.
            detail: Counts and ids, never personal data.
        """
        session.add(
            AuditEvent(
                at=datetime.now(UTC),
                action=action,
                outcome=outcome,
                actor_ref=actor.ref(session),
                subject_ref=reference_to(session, subject)
                if isinstance(subject, UUID)
                else subject,
                request_id=actor.request_id,
                detail=orjson.dumps(detail, default=str).decode() if detail else None,
            )
        )


@lru_cache(maxsize=1)
def get_audit_service() -> AuditService:
    return AuditService()
