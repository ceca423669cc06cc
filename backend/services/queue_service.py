"""Erasures that wait for a legal hold to end, and their running once none stands."""

from datetime import UTC, datetime
from functools import lru_cache

import structlog
from sqlalchemy import select
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from backend.db_utils import session_scope
from backend.errors import ConflictError, HoldfastError, LegalHoldError
from backend.models import QueuedErasure
from backend.privacy.declarations import EraseMode
from backend.services.audit_service import SCHEDULER, Actor, get_audit_service
from backend.services.erasure_service import get_erasure_service
from backend.services.subject_service import Who, get_subject_service

log = structlog.get_logger(__name__)


class QueueService:
    """Keeps what was asked for while it may not be done."""

    def enqueue(
        self, session: Session, actor: Actor, who: Who, mode: EraseMode, *, reason: str
    ) -> QueuedErasure:
        """
        Note that a person is to be erased as soon as no hold keeps them; once, however often asked.

        Raises:
            SubjectNotFoundError: Nobody is named so.
            ConflictError: The person has no account, so the request could not wait with them.
        """
        subject = get_subject_service().find(session, who)
        if subject.number is None:
            raise ConflictError("only the erasure of somebody with an account can wait for a hold")
        known = session.scalar(select(QueuedErasure).where(QueuedErasure.user_id == subject.number))
        if known is not None:
            known.mode, known.reason = mode, reason
            return known
        queued = QueuedErasure(
            user_id=subject.number,
            mode=mode,
            reason=reason,
            queued_by=actor.ref(session),
            queued_at=datetime.now(UTC),
        )
        session.add(queued)
        session.flush()
        get_audit_service().record(
            session, "erasure_queued", actor, subject=subject.ref, mode=mode, request=queued.id
        )
        return queued

    def run(self) -> int:
        """
        Erase everybody who waits and whom no hold keeps any more; return how many.

        Each in a transaction of their own: one who cannot be erased now does not keep the others.
        """
        with session_scope(read_only=True) as session:
            waiting = list(session.scalars(select(QueuedErasure.id).order_by("queued_at")))
        return sum(self._run_one(queued_id) for queued_id in waiting)

    def _run_one(self, queued_id: object) -> bool:
        try:
            with session_scope() as session:
                # Another process may have taken it.
                queued = session.get(QueuedErasure, queued_id, with_for_update=True)
                if queued is None:
                    return False
                erasure = get_erasure_service().erase(
                    session, SCHEDULER, Who(queued.user_id), queued.mode,
                    reason=queued.reason or "", dry_run=False,
                )  # fmt: skip
        except LegalHoldError:
            return False
        except (HoldfastError, SQLAlchemyError) as err:
            log.error("queued_erasure_failed", request=str(queued_id), error=type(err).__name__)
            return False
        get_erasure_service().prove(erasure)
        return True


@lru_cache(maxsize=1)
def get_queue_service() -> QueueService:
    return QueueService()
