"""Accounts: created, given another password or other rights, and protected by one-time codes."""

from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import Final

from sqlalchemy import delete, func, select, update
from sqlalchemy.orm import Session

from backend.crypto import bearer, one_time_codes, passwords
from backend.errors import (
    ConfigurationError,
    ConflictError,
    ForbiddenError,
    RefusedError,
    SubjectNotFoundError,
)
from backend.models import RevokedToken, Role, SignIn, User
from backend.models.people import EMAIL_INDEX
from backend.services.audit_service import Actor, get_audit_service
from backend.settings import MAX_EMAIL_CHARS, get_settings, is_address

_SERVICE: Final = "holdfast"
_WRONG_CODE: Final = "this is not the present one-time code, or it was used"
# As long as `ACCESS_TOKEN_MINUTES` may be: it may have been more when a token was issued.
_LONGEST_TOKEN: Final = timedelta(days=1)


class AccountService:
    """The only writer of passwords, rights and one-time codes."""

    def find(self, session: Session, email: str) -> User | None:
        """Return the account of *email*, in any spelling."""
        # Lone surrogates cannot be encoded, and no address has a megabyte.
        if len(email) > MAX_EMAIL_CHARS or not email.isprintable():
            return None
        return session.scalar(select(User).where(User.email_index.in_(EMAIL_INDEX.terms(email))))

    def create(
        self, session: Session, email: str, password: str, actor: Actor, role: Role = Role.USER
    ) -> User:
        """
        Create an account.

        Raises:
            RefusedError: No e-mail address, or a weak password.
            ConflictError: The address has an account.
        """
        if not is_address(email.strip()):
            raise RefusedError("this is no e-mail address")
        if self.find(session, email):
            raise ConflictError("this e-mail address has an account already")
        now = datetime.now(UTC)
        user = User(
            email=email.strip(),
            password_hash=hash_strong(password, email),
            role=role,
            created_at=now,
            last_activity_at=now,
        )
        session.add(user)
        session.flush()
        get_audit_service().record(session, "user_created", actor, subject=user.uid, role=role)
        return user

    def set_password(self, session: Session, email: str, password: str, actor: Actor) -> None:
        """
        Change a password; every sign-in of the account ends.

        Raises:
            WeakPasswordError: It would be guessed.
            SubjectNotFoundError: No account has this address.
        """
        user = self._require(session, email)
        self.replace_hash(session, user, hash_strong(password, email), actor)

    def replace_hash(self, session: Session, user: User, hashed: str, actor: Actor) -> None:
        """Put a new password's hash in place; every sign-in of the account ends."""
        user.password_hash = hashed
        self.end_sign_ins(session, user.id)
        get_audit_service().record(session, "password_changed", actor, subject=user.uid)

    def set_role(self, session: Session, email: str, role: Role, actor: Actor) -> None:
        """
        Change the rights of an account; every sign-in of it ends.

        Raises:
            ConflictError: Nobody would be admin any more.
            SubjectNotFoundError: No account has this address.
        """
        user = self._require(session, email)
        before = user.role
        admins = select(func.count()).where(User.role == Role.ADMIN, User.is_active)
        loses = before is Role.ADMIN and role is not Role.ADMIN and user.is_active
        if loses and session.scalar(admins) == 1:
            raise ConflictError("this is the last admin")
        user.role = role
        self.end_sign_ins(session, user.id)
        get_audit_service().record(
            session, "role_changed", actor, subject=user.uid, before=before, after=role
        )

    def end_sign_ins(self, session: Session, user_id: int) -> None:
        """Have every token of an account refused from now on; its row need not be readable."""
        now = datetime.now(UTC)
        # Tokens carry whole seconds, so that one of this second is not older by its time: the
        # sign-ins that it may be of are revoked by name.
        since = now.replace(microsecond=0)
        session.execute(update(User).where(User.id == user_id).values(tokens_valid_after=since))
        ended = delete(SignIn).where(SignIn.user_id == user_id).returning(SignIn.id)
        revoke(session, *(str(name) for name in session.scalars(ended)))

    def end_sign_ins_of(self, session: Session, email: str, actor: Actor) -> None:
        """
        End every sign-in of somebody's account.

        Raises:
            SubjectNotFoundError: No account has this address.
        """
        user = self._require(session, email)
        self.end_sign_ins(session, user.id)
        get_audit_service().record(session, "sign_ins_ended", actor, subject=user.uid)

    def begin_codes(self, session: Session, user_id: int) -> tuple[str, str]:
        """
        Give an account a secret for one-time codes, which are asked for once one was confirmed.

        Returns:
            The secret in base32, and the address that an authenticator app reads it from.

        Raises:
            ForbiddenError: The account has no more rights than a user's.
            ConflictError: Codes are asked for already.
        """
        # For writing: of two at once, the second one finds what the first one has done.
        user = session.get_one(User, user_id, with_for_update=True)
        if user.role is Role.USER:
            raise ForbiddenError("one-time codes are for accounts with more than a user's rights")
        if user.totp_step is not None:
            raise ConflictError("this account has one-time codes already")
        user.totp_secret = one_time_codes.new_secret()
        return user.totp_secret, one_time_codes.address(user.totp_secret, user.email or "")

    def confirm_codes(self, session: Session, user_id: int, code: str, actor: Actor) -> None:
        """
        Ask for a code at every sign-in from now on.

        Raises:
            ConflictError: Codes were not begun, or are asked for already.
            RefusedError: The code is wrong.
        """
        # For writing: of two at once, the second one finds what the first one has done.
        user = session.get_one(User, user_id, with_for_update=True)
        if user.totp_secret is None or user.totp_step is not None:
            raise ConflictError("there are no one-time codes to confirm")
        step = one_time_codes.step_of(code, user.totp_secret, datetime.now(UTC))
        if step is None:
            raise RefusedError(_WRONG_CODE)
        user.totp_step = step
        get_audit_service().record(session, "codes_confirmed", actor, subject=user.uid)

    def remove_codes(self, session: Session, user_id: int, code: str, actor: Actor) -> None:
        """
        Ask for no more codes; one is needed for that, so that a stolen token is not enough.

        Raises:
            ConflictError: None are asked for.
            RefusedError: The code is wrong, or was used.
        """
        user = session.get_one(User, user_id, with_for_update=True)
        if user.totp_secret is None or user.totp_step is None:
            raise ConflictError("this account has no one-time codes")
        step = one_time_codes.step_of(code, user.totp_secret, datetime.now(UTC))
        if step is None or step <= user.totp_step:
            raise RefusedError(_WRONG_CODE)
        self._forget_codes(session, user, actor)

    def remove_codes_of(self, session: Session, email: str, actor: Actor) -> None:
        """
        Ask for no more codes of an account whose device was lost.

        Raises:
            SubjectNotFoundError: No account has this address.
        """
        self._forget_codes(session, self._require(session, email), actor)

    def _forget_codes(self, session: Session, user: User, actor: Actor) -> None:
        user.totp_secret = user.totp_step = None
        get_audit_service().record(session, "codes_removed", actor, subject=user.uid)

    def first_admin(self, session: Session, actor: Actor) -> tuple[str, str] | None:
        """Create the first admin where there is none; return address and password, shown once."""
        if session.scalar(select(func.count()).where(User.role == Role.ADMIN)):
            return None
        email, password = get_settings().admin_email, passwords.generate_password()
        if self.find(session, email) is not None:
            raise ConfigurationError("ADMIN_EMAIL: belongs to an account that is no admin's")
        self.create(session, email, password, actor, Role.ADMIN)
        return email, password

    def _require(self, session: Session, email: str) -> User:
        user = self.find(session, email)
        if user is None:
            raise SubjectNotFoundError("no account has this e-mail address")
        return user


def revoke(session: Session, *names: str) -> None:
    """Refuse tokens by their `jti`, or all of a sign-in by its `sid`, until they have ended."""
    now = datetime.now(UTC)
    session.execute(delete(RevokedToken).where(RevokedToken.expires_at < now))
    expires_at = now + _LONGEST_TOKEN + bearer.LEEWAY
    session.add_all(RevokedToken(token_id=name, expires_at=expires_at) for name in names)


def hash_strong(password: str, email: str) -> str:
    """
    Return the hash of a password that is to be an account's.

    Raises:
        WeakPasswordError: It would be guessed.
    """
    passwords.require_strong(password, (email, _SERVICE, get_settings().controller_name))
    return passwords.hash_password(password)


def token_lifetime() -> timedelta:
    """How long an access token lives."""
    return timedelta(minutes=get_settings().access_token_minutes)


@lru_cache(maxsize=1)
def get_account_service() -> AccountService:
    return AccountService()
