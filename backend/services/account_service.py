"""Accounts: found, created, given another password or other rights, and signed out everywhere."""

from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import Any, Final
from uuid import UUID

import structlog
from sqlalchemy import delete, func, select, update
from sqlalchemy.orm import InstrumentedAttribute, Session

from backend.crypto import bearer, passwords
from backend.db_utils import reading_any_text
from backend.errors import (
    ConfigurationError,
    ConflictError,
    CryptoError,
    RefusedError,
    SubjectNotFoundError,
)
from backend.models import RevokedToken, Role, SignIn, User
from backend.models.people import EMAIL_INDEX
from backend.services.audit_service import Actor, get_audit_service
from backend.settings import MAX_EMAIL_CHARS, get_settings, is_address

log = structlog.get_logger(__name__)
_SERVICE: Final = "holdfast"
# As long as `ACCESS_TOKEN_MINUTES` may be: it may have been more when a token was issued.
_LONGEST_TOKEN: Final = timedelta(days=1)


@dataclass(frozen=True, slots=True)
class Account:
    """What of a person's row decides who is let in; the rest of it stays sealed."""

    id: int
    uid: UUID
    role: Role
    is_active: bool
    password_hash: str | None = field(repr=False)
    totp_step: int | None


# Past the mapper, which would open every cell of the row: a damaged one would lock a person out.
_users = User.__table__.c
_ACCOUNTS: Final = select(*(_users[name] for name in Account.__slots__))


class AccountService:
    """Makes accounts, and changes what they may and what ends their sign-ins."""

    def find(self, session: Session, email: str) -> Account | None:
        """Return the account of *email*, in any spelling."""
        # Lone surrogates cannot be encoded, and no address has a megabyte.
        if len(email) > MAX_EMAIL_CHARS or not email.isprintable():
            return None
        named = _ACCOUNTS.where(_users.email_index.in_(EMAIL_INDEX.terms(email)))
        with reading_any_text(session):
            row = session.execute(named).first()
        return None if row is None else Account(*row)

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
        account = self._require(session, email)
        name = readable(session, User.full_name, account.id)
        self.replace_hash(session, account.id, hash_strong(password, email, name), actor)

    def replace_hash(self, session: Session, user_id: int, hashed: str, actor: Actor) -> None:
        """Put a new password's hash in place; every sign-in of the account ends."""
        mine = update(User).where(User.id == user_id).values(password_hash=hashed)
        uid = session.scalar(mine.returning(User.uid))
        self.end_sign_ins(session, user_id)
        get_audit_service().record(session, "password_changed", actor, subject=uid)

    def set_role(self, session: Session, email: str, role: Role, actor: Actor) -> None:
        """
        Change the rights of an account; every sign-in of it ends.

        Raises:
            ConflictError: Nobody would be admin any more.
            SubjectNotFoundError: No account has this address.
        """
        account = self._require(session, email)
        if role is not Role.ADMIN:
            self._refuse_last_admin(session, account.id)
        # Anew: another may have changed it before the lock was ours.
        present = select(User.role).where(User.id == account.id).with_for_update()
        before = session.scalar(present)
        session.execute(update(User).where(User.id == account.id).values(role=role))
        self.end_sign_ins(session, account.id)
        get_audit_service().record(
            session, "role_changed", actor, subject=account.uid, before=before, after=role
        )

    def _refuse_last_admin(self, session: Session, user_id: int) -> None:
        # Locked in one order, as before an erasure, so that of two admins who lose their rights
        # at once one stays.
        admins = select(User.id).where(User.role == Role.ADMIN, User.is_active)
        if session.scalars(admins.order_by(User.id).with_for_update()).all() == [user_id]:
            raise ConflictError("this is the last admin")

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
        account = self._require(session, email)
        self.end_sign_ins(session, account.id)
        get_audit_service().record(session, "sign_ins_ended", actor, subject=account.uid)

    def remove_codes_of(self, session: Session, email: str, actor: Actor) -> None:
        """
        Ask for no more codes of an account whose device was lost.

        Raises:
            SubjectNotFoundError: No account has this address.
        """
        self.forget_codes(session, self._require(session, email).id, actor)

    def forget_codes(self, session: Session, user_id: int, actor: Actor) -> None:
        """Ask an account for no more one-time codes."""
        mine = update(User).where(User.id == user_id).values(totp_secret=None, totp_step=None)
        uid = session.scalar(mine.returning(User.uid))
        get_audit_service().record(session, "codes_removed", actor, subject=uid)

    def first_admin(self, session: Session, actor: Actor) -> tuple[str, str] | None:
        """Create the first admin where there is none; return address and password, shown once."""
        if session.scalar(select(func.count()).where(User.role == Role.ADMIN)):
            return None
        email, password = get_settings().admin_email, passwords.generate_password()
        if self.find(session, email) is not None:
            raise ConfigurationError("ADMIN_EMAIL: belongs to an account that is no admin's")
        self.create(session, email, password, actor, Role.ADMIN)
        return email, password

    def _require(self, session: Session, email: str) -> Account:
        account = self.find(session, email)
        if account is None:
            raise SubjectNotFoundError("no account has this e-mail address")
        return account


def revoke(session: Session, *names: str) -> None:
    """Refuse tokens by their `jti`, or all of a sign-in by its `sid`, until they have ended."""
    now = datetime.now(UTC)
    session.execute(delete(RevokedToken).where(RevokedToken.expires_at < now))
    expires_at = now + _LONGEST_TOKEN + bearer.LEEWAY
    session.add_all(RevokedToken(token_id=name, expires_at=expires_at) for name in names)


def readable(session: Session, column: InstrumentedAttribute[Any], user_id: int) -> str:
    """Return a sealed cell of a person's row; nothing where it is empty or does not open."""
    try:
        return session.scalar(select(column).where(User.id == user_id)) or ""
    except CryptoError as err:
        log.error("cell_not_opened", column=column.key, code=err.code)
        return ""


def is_password(password: str, stored: str | None) -> bool:
    """Tell whether *password* gives *stored*; to a damaged hash none does, in the same time."""
    try:
        return passwords.verify_password(password, stored)
    except (ValueError, TypeError, NotImplementedError):
        # The error has the hash in its words.
        log.error("password_hash_damaged")
        return passwords.verify_password(password, None)


def hash_strong(password: str, *known: str) -> str:
    """
    Return the hash of a password that is to be an account's.

    Args:
        known: What is known of the person, as their address and name: no part of a password.

    Raises:
        WeakPasswordError: It would be guessed.
    """
    passwords.require_strong(password, (*known, _SERVICE, get_settings().controller_name))
    return passwords.hash_password(password)


def token_lifetime() -> timedelta:
    """How long an access token lives."""
    return timedelta(minutes=get_settings().access_token_minutes)


@lru_cache(maxsize=1)
def get_account_service() -> AccountService:
    return AccountService()
