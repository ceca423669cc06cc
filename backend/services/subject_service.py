"""The data subject: finding them, and what stands in the way of erasing them."""

from functools import lru_cache

from sqlalchemy import select
from sqlalchemy.orm import Session

from backend.errors import (
    ConflictError,
    LegalHoldError,
    SubjectErasedError,
    SubjectNotFoundError,
)
from backend.models import Role, User
from backend.services.hold_service import get_hold_service


class SubjectService:
    """Finds people, and says why one may not be erased."""

    def require(self, session: Session, user_id: int, *, lock: bool = False) -> User:
        """
        Return the person, *lock*ed against every other writer of their rows where asked.

        Raises:
            SubjectNotFoundError: Nobody has this id.
            SubjectErasedError: They were made anonymous.
        """
        user = session.get(User, user_id, with_for_update=lock or None)
        if user is None:
            raise SubjectNotFoundError(f"no person has the id {user_id}")
        if user.anonymized_at is not None:
            raise SubjectErasedError(f"person {user_id} was erased")
        return user

    def require_erasable(self, session: Session, user_id: int) -> User:
        """
        Return the person, locked until the transaction ends.

        Locked before anything is planned: a row that is being written for them is waited for, and
        of two erasures the second finds nobody.

        Raises:
            SubjectNotFoundError: Nobody has this id.
            SubjectErasedError: They were made anonymous.
            LegalHoldError: A hold keeps them; names the holds.
            ConflictError: They are the last admin.
        """
        self._refuse_last_admin(session, self.require(session, user_id))
        user = self.require(session, user_id, lock=True)
        self._refuse_held(session, user_id)
        return user

    def _refuse_held(self, session: Session, user_id: int) -> None:
        holds = get_hold_service().on_person(session, user_id)
        if holds:
            raise LegalHoldError(
                f"person {user_id} is under a legal hold (GDPR art. 17(3)(e))",
                holds=[str(hold.id) for hold in holds],
            )

    def _refuse_last_admin(self, session: Session, user: User) -> None:
        if user.role is Role.ADMIN and user.is_active:
            # Locked in one order, so that two admins cannot erase each other at once.
            admins = select(User.id).where(User.role == Role.ADMIN, User.is_active)
            if len(session.scalars(admins.order_by(User.id).with_for_update()).all()) == 1:
                raise ConflictError("this is the last admin: create another one first")


@lru_cache(maxsize=1)
def get_subject_service() -> SubjectService:
    return SubjectService()
