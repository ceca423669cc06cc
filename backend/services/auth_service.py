"""Accounts and sign-in: passwords, bearer tokens, sign-out."""

import secrets
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import Final

import structlog
from sqlalchemy import delete, exists, func, select, update
from sqlalchemy.orm import Session

from backend.crypto import bearer, passwords
from backend.crypto.bearer import Claims
from backend.db_utils import session_scope
from backend.errors import (
    ConfigurationError,
    ConflictError,
    ForbiddenError,
    RefusedError,
    SubjectNotFoundError,
    UnauthenticatedError,
)
from backend.models import RevokedToken, Role, User
from backend.models.people import EMAIL_INDEX
from backend.services.audit_service import ANYONE, Actor, get_audit_service
from backend.services.encryption_service import read_secret, write_secret
from backend.services.notice_service import get_notice_service
from backend.settings import MAX_EMAIL_CHARS, MIN_JWT_SECRET_CHARS, get_settings, is_address

log = structlog.get_logger(__name__)
JWT_SECRET_FILE: Final = "jwt.secret"  # noqa: S105 - the name of a file


class WrongPasswordError(UnauthenticatedError):
    """Unknown address or wrong password: the same answer, in the same time."""

    code = "wrong_credentials"


@dataclass(frozen=True, slots=True)
class SignedIn:
    """Who a valid token belongs to, and when it ends."""

    actor: Actor
    expires_at: datetime


class AuthService:
    """Signs people in and says who a token belongs to."""

    def sign_in(self, email: str, password: str, request_id: str | None) -> str:
        """
        Return a bearer token.

        Manages its own transactions: none is open while the password is hashed.

        Raises:
            WrongPasswordError: Unknown, deactivated, or the wrong password.
        """
        with session_scope(read_only=True) as session:
            user = self._find(session, email)
        stored = user.password_hash if user and user.is_active else None
        if not passwords.verify_password(password, stored) or user is None:
            with session_scope() as session:
                # Whose account was tried is not known, so it is not said.
                get_audit_service().record(
                    session, "sign_in", ANYONE.during(request_id), outcome="wrong_credentials"
                )
            raise WrongPasswordError("the e-mail or the password is wrong")
        now = datetime.now(UTC)
        actor = Actor("person", user.role, user.id, uid=user.uid)
        with session_scope() as session:
            still_there = (
                update(User)
                .where(User.id == user.id, User.is_active)
                .values(last_activity_at=now)
                .returning(User.id)
            )
            # Retention or an erasure may have come while the password was hashed.
            if session.scalar(still_there) is None:
                raise WrongPasswordError("the e-mail or the password is wrong")
            get_notice_service().cancel(session, user.id)
            get_audit_service().record(
                session, "sign_in", actor.during(request_id), subject=user.uid
            )
        return bearer.issue(user.id, secret=_secret(), lifetime=token_lifetime(), now=now)

    def authenticate(self, token: str, request_id: str | None) -> SignedIn:
        """
        Return who *token* belongs to; only the columns that decide are read.

        Raises:
            UnauthenticatedError: Invalid, revoked, or of an account that is gone.
        """
        claims = bearer.verify(token, secret=_secret())
        revoked = exists().where(RevokedToken.token_id == claims.token_id)
        statement = select(User.uid, User.role, User.is_active, User.tokens_valid_after).where(
            User.id == claims.user_id, ~revoked
        )
        with session_scope(read_only=True) as session:
            user = session.execute(statement).one_or_none()
        if user is None or not user.is_active or _is_older(claims, user.tokens_valid_after):
            raise UnauthenticatedError("the bearer token is not valid")
        actor = Actor(
            "person", user.role, claims.user_id, claims.token_id, request_id, uid=user.uid
        )
        return SignedIn(actor, claims.expires_at)

    def sign_out(self, session: Session, actor: Actor, expires_at: datetime) -> None:
        """Revoke the token that *actor* came with, until it would have ended."""
        now = datetime.now(UTC)
        session.execute(delete(RevokedToken).where(RevokedToken.expires_at < now))
        if actor.token_id and session.get(RevokedToken, actor.token_id) is None:
            session.add(RevokedToken(token_id=actor.token_id, expires_at=expires_at))
        get_audit_service().record(session, "sign_out", actor)

    def create_user(
        self, session: Session, email: str, password: str, actor: Actor, role: Role = Role.USER
    ) -> User:
        """
        Create an account.

        Raises:
            RefusedError: No e-mail address, or a password that is too short or too long.
            ConflictError: The address has an account.
        """
        if not is_address(email.strip()):
            raise RefusedError("this is no e-mail address")
        if self._find(session, email):
            raise ConflictError("this e-mail address has an account already")
        now = datetime.now(UTC)
        user = User(
            email=email.strip(),
            password_hash=self._hash(password),
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
        Change a password; every token of the account ends.

        Raises:
            SubjectNotFoundError: No account has this address.
        """
        user = self._find(session, email)
        if user is None:
            raise SubjectNotFoundError("no account has this e-mail address")
        user.password_hash = self._hash(password)
        user.tokens_valid_after = datetime.now(UTC)
        get_audit_service().record(session, "password_changed", actor, subject=user.uid)

    def first_admin(self, session: Session, actor: Actor) -> tuple[str, str] | None:
        """Create the first admin where there is none; return address and password, shown once."""
        if session.scalar(select(func.count()).where(User.role == Role.ADMIN)):
            return None
        email, password = get_settings().admin_email, passwords.generate_password()
        if self._find(session, email) is not None:
            raise ConfigurationError("ADMIN_EMAIL: belongs to an account that is no admin's")
        self.create_user(session, email, password, actor, Role.ADMIN)
        return email, password

    def find_secret(self) -> str | None:
        """
        Return what tokens are signed with; `None` in development where it is not made yet.

        Raises:
            ConfigurationError: `JWT_SECRET_KEY` is not set in production, or its file is damaged.
        """
        settings = get_settings()
        if settings.jwt_secret_key is not None:
            return settings.jwt_secret_key.get_secret_value()
        if settings.is_production:
            raise ConfigurationError("JWT_SECRET_KEY is not set")
        path = settings.data_dir / JWT_SECRET_FILE
        text = read_secret(path)
        if text is not None and len(text) < MIN_JWT_SECRET_CHARS:
            raise ConfigurationError(f"{path} is damaged: remove it, and everybody signs in again")
        return text

    def prepare_secret(self) -> None:
        """Make sure that tokens can be signed."""
        if self.find_secret() is None:
            path = get_settings().data_dir / JWT_SECRET_FILE
            if write_secret(path, secrets.token_urlsafe(48)):
                log.warning("jwt_secret_generated", path=str(path))
        _secret.cache_clear()

    def _find(self, session: Session, email: str) -> User | None:
        # Lone surrogates cannot be encoded, and no address has a megabyte.
        if len(email) > MAX_EMAIL_CHARS or not email.isprintable():
            return None
        return session.scalar(select(User).where(User.email_index.in_(EMAIL_INDEX.terms(email))))

    def _hash(self, password: str) -> str:
        if not passwords.MIN_CHARS <= len(password) <= passwords.MAX_CHARS:
            raise RefusedError(
                f"a password has {passwords.MIN_CHARS} to {passwords.MAX_CHARS} characters"
            )
        return passwords.hash_password(password)


@lru_cache(maxsize=1)
def _secret() -> str:
    secret = get_auth_service().find_secret()
    if secret is None:
        raise ConfigurationError("no secret for tokens is prepared yet")
    return secret


def token_lifetime() -> timedelta:
    return timedelta(minutes=get_settings().access_token_minutes)


def require_self_or_admin(actor: Actor, user_id: int) -> None:
    """
    Let a person at their own data, and an admin at everybody's.

    Raises:
        ForbiddenError: Neither; it does not say whether the person exists.
    """
    if not actor.is_admin and actor.user_id != user_id:
        raise ForbiddenError("this is another person's data")


def require_admin(actor: Actor) -> None:
    """
    Raises:
        ForbiddenError: Not an admin.
    """
    if not actor.is_admin:
        raise ForbiddenError("only an admin may do this")


def _is_older(claims: Claims, valid_after: datetime | None) -> bool:
    # Tokens carry whole seconds: one issued in the second of the change is older too.
    return valid_after is not None and claims.issued_at <= valid_after


@lru_cache(maxsize=1)
def get_auth_service() -> AuthService:
    return AuthService()
