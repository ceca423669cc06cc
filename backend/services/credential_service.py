"""
What one signs in with, changed by its owner: password and one-time codes.

A token alone is not enough for that, for it may be stolen: the present password or code is asked
for, a wrong one is recorded, and guessing is throttled as it is at the sign-in.
"""

from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import lru_cache
from typing import NoReturn

from sqlalchemy import Select, select, update
from sqlalchemy.orm import Session

from backend.crypto import one_time_codes
from backend.db_utils import reading_any_text, session_scope
from backend.errors import ConflictError, ForbiddenError, RefusedError
from backend.models import Role, User
from backend.services.account_service import (
    get_account_service,
    hash_strong,
    is_password,
    readable,
)
from backend.services.audit_service import Actor, get_audit_service
from backend.services.auth_service import not_valid
from backend.services.throttle_service import get_throttle_service


class WrongPresentPasswordError(RefusedError):
    """Signed in, and the present password is another one."""

    code = "wrong_password"


class WrongCodeError(RefusedError):
    """Signed in, and this is not the present one-time code, or it was used."""

    code = "wrong_code"


@dataclass(frozen=True, slots=True)
class _Attempt:
    """Somebody signed in who is to prove that the account is theirs."""

    actor: Actor
    user_id: int
    email: str = field(repr=False)
    address: str | None = field(repr=False)
    password_hash: str | None = field(repr=False)

    @property
    def account(self) -> str:
        """What failures are counted under: as at the sign-in, where the e-mail can be read."""
        return self.email or str(self.user_id)


class CredentialService:
    """
    Changes one's own password and one-time codes, and manages its own transactions.

    Each act takes the address that it comes from, for throttling, and raises what the others do:
    TooManyAttemptsError before anything was looked at, UnauthenticatedError where the account is
    gone.
    """

    def change_password(
        self, actor: Actor, present: str, password: str, address: str | None
    ) -> None:
        """
        Change a password; every sign-in ends, this one too.

        Raises:
            WrongPresentPasswordError: *present* is not the password.
            WeakPasswordError: *password* would be guessed.
        """
        attempt = self._begin(actor, address)
        self._require_password(attempt, present, "password_changed")
        with session_scope(read_only=True) as session:
            name = readable(session, User.full_name, attempt.user_id)
        hashed = hash_strong(password, attempt.email, name)
        with session_scope() as session:
            self._lock(session, attempt)
            get_account_service().replace_hash(session, attempt.user_id, hashed, actor)

    def begin_codes(self, actor: Actor, present: str, address: str | None) -> tuple[str, str]:
        """
        Give an account a secret for one-time codes, which are asked for once one was confirmed.

        Whoever has stolen a token would lock the owner out by a device of their own, so the
        password is needed.

        Returns:
            The secret in base32, and the address that an authenticator app reads it from.

        Raises:
            ForbiddenError: The account has no more rights than a user's.
            WrongPresentPasswordError: *present* is not the password.
            ConflictError: Codes are asked for already.
        """
        if actor.role is Role.USER:
            raise ForbiddenError("one-time codes are for accounts with more than a user's rights")
        attempt = self._begin(actor, address)
        self._require_password(attempt, present, "codes_begun")
        secret = one_time_codes.new_secret()
        with session_scope() as session:
            if self._lock(session, attempt) is not None:
                raise ConflictError("this account has one-time codes already")
            self._set(session, attempt, totp_secret=secret)
            get_audit_service().record(session, "codes_begun", actor, subject=actor.uid)
        return secret, one_time_codes.address(secret, attempt.email)

    def confirm_codes(self, actor: Actor, code: str, address: str | None) -> None:
        """
        Ask for a code at every sign-in from now on.

        Raises:
            ConflictError: Codes were not begun, or are asked for already.
            WrongCodeError: The code is wrong.
        """
        attempt = self._begin(actor, address)
        with session_scope() as session:
            last = self._lock(session, attempt)
            secret = readable(session, User.totp_secret, attempt.user_id)
            if last is not None or not secret:
                raise ConflictError("there are no one-time codes to confirm")
            step = one_time_codes.step_of(code, secret, datetime.now(UTC))
            if step is not None:
                self._set(session, attempt, totp_step=step)
                get_audit_service().record(session, "codes_confirmed", actor, subject=actor.uid)
                return
        self._refuse(attempt, "codes_confirmed", _wrong_code())

    def remove_codes(self, actor: Actor, code: str, address: str | None) -> None:
        """
        Ask for no more codes; one is needed for that.

        Raises:
            ConflictError: None are asked for.
            WrongCodeError: The code is wrong, or was used.
        """
        attempt = self._begin(actor, address)
        with session_scope() as session:
            last = self._lock(session, attempt)
            if last is None:
                raise ConflictError("this account has no one-time codes")
            secret = readable(session, User.totp_secret, attempt.user_id)
            step = one_time_codes.step_of(code, secret, datetime.now(UTC))
            if step is not None and step > last:
                get_account_service().forget_codes(session, attempt.user_id, actor)
                return
        self._refuse(attempt, "codes_removed", _wrong_code())

    def _begin(self, actor: Actor, address: str | None) -> _Attempt:
        user_id = actor.user_id or 0
        with session_scope(read_only=True) as session, reading_any_text(session):
            stored = session.execute(_stored(user_id)).one_or_none()
            if stored is None:
                raise not_valid()
            email = readable(session, User.email, user_id)
        attempt = _Attempt(actor, user_id, email, address, stored.password_hash)
        get_throttle_service().require_allowed(attempt.account, address)
        return attempt

    def _require_password(self, attempt: _Attempt, present: str, act: str) -> None:
        if not is_password(present, attempt.password_hash):
            self._refuse(attempt, act, _wrong_password())

    def _lock(self, session: Session, attempt: _Attempt) -> int | None:
        """Lock the account, and return the step of its last code, if it asks for codes."""
        with reading_any_text(session):
            stored = session.execute(_stored(attempt.user_id).with_for_update()).one_or_none()
        # It may have been erased or signed out everywhere while a password was hashed.
        if stored is None:
            raise not_valid()
        password_hash, step = stored
        # Of two changes at once, the second one finds another password.
        if password_hash != attempt.password_hash:
            raise _wrong_password()
        return step

    def _set(self, session: Session, attempt: _Attempt, **columns: object) -> None:
        session.execute(update(User).where(User.id == attempt.user_id).values(**columns))

    def _refuse(self, attempt: _Attempt, act: str, error: RefusedError) -> NoReturn:
        get_throttle_service().failed(attempt.account, attempt.address)
        actor = attempt.actor
        with session_scope() as session:
            get_audit_service().record(session, act, actor, outcome=error.code, subject=actor.uid)
        raise error


def _stored(user_id: int) -> Select[str | None, int | None]:
    return select(User.password_hash, User.totp_step).where(User.id == user_id, User.is_active)


def _wrong_password() -> WrongPresentPasswordError:
    return WrongPresentPasswordError("this is not the present password")


def _wrong_code() -> WrongCodeError:
    return WrongCodeError("this is not the present one-time code, or it was used")


@lru_cache(maxsize=1)
def get_credential_service() -> CredentialService:
    return CredentialService()
