"""Sign-in: passwords against tokens, tokens against who is asking, and their end."""

import hashlib
import re
import secrets
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import Any, Final
from uuid import UUID, uuid4

import structlog
from sqlalchemy import bindparam, delete, exists, select, update
from sqlalchemy.orm import Session

from backend.crypto import bearer, one_time_codes, passwords
from backend.crypto.bearer import Claims, TokenKeys
from backend.db_utils import session_scope
from backend.errors import (
    ConfigurationError,
    ForbiddenError,
    StaleSignInError,
    UnauthenticatedError,
)
from backend.models import RevokedToken, SignIn, User
from backend.services.account_service import (
    Account,
    get_account_service,
    is_password,
    readable,
    revoke,
    token_lifetime,
)
from backend.services.audit_service import ANYONE, Actor, get_audit_service
from backend.services.encryption_service import read_secret, write_secret
from backend.services.notice_service import get_notice_service
from backend.services.throttle_service import get_throttle_service
from backend.settings import MIN_JWT_SECRET_CHARS, get_settings

log = structlog.get_logger(__name__)
JWT_SECRET_FILE: Final = "jwt.secret"  # noqa: S105 - the name of a file
_REFRESH_BYTES: Final = 32
_REFRESH_TOKEN: Final = re.compile(r"([0-9a-f]{32})\.([A-Za-z0-9_-]{43})", re.ASCII)


_users, _revoked = User.__table__, RevokedToken.__table__
# Asked at every request, so built once, and past the mapper: nothing of it becomes an object.
_BEARER: Final = select(
    _users.c.uid, _users.c.role, _users.c.is_active, _users.c.tokens_valid_after
).where(
    _users.c.id == bindparam("user_id"),
    ~exists().where(_revoked.c.token_id.in_((bindparam("token_id"), bindparam("sign_in_id")))),
)


class WrongPasswordError(UnauthenticatedError):
    """Unknown address, wrong password or code: the same answer, in the same time."""

    code = "wrong_credentials"


@dataclass(frozen=True, slots=True)
class Tokens:
    """What a sign-in gives: a token that opens, and one that is worth the next two, once."""

    access_token: str = field(repr=False)
    refresh_token: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class SignedIn:
    """Who a valid token belongs to, and of which sign-in it is."""

    actor: Actor
    sign_in: bearer.SignIn


class AuthService:
    """Signs people in and says who a token belongs to."""

    def sign_in(
        self,
        email: str,
        password: str,
        code: str = "",
        *,
        address: str | None = None,
        request_id: str | None = None,
    ) -> Tokens:
        """
        Return tokens for a password and, where the account asks for it, a one-time code.

        Manages its own transactions: none is open while the password is hashed.

        Args:
            address: Of the caller, for throttling.

        Raises:
            WrongPasswordError: Unknown, deactivated, or the wrong password or code.
            TooManyAttemptsError: Before anything was looked at.
        """
        get_throttle_service().require_allowed(email, address)
        with session_scope(read_only=True) as session:
            account = get_account_service().find(session, email)
            # Asked also of nobody, so that the answer takes as long.
            secret = readable(session, User.totp_secret, account.id if account else 0)
        stored = account.password_hash if account and account.is_active else None
        matches = is_password(password, stored)
        step = _step(account, secret, code)
        if account is None or stored is None or not matches or step is _WRONG:
            get_throttle_service().failed(email, address)
            with session_scope() as session:
                # Whose account was tried is not known, so it is not said.
                get_audit_service().record(
                    session, "sign_in", ANYONE.during(request_id), outcome="wrong_credentials"
                )
            raise _wrong()
        changes: dict[str, Any] = {} if step is None else {"totp_step": step}
        if passwords.is_outdated(stored):
            changes["password_hash"] = passwords.hash_password(password)
        with session_scope() as session:
            tokens = self._begin(session, account, changes, request_id)
        get_throttle_service().succeeded(email, address)
        return tokens

    def _begin(
        self, session: Session, account: Account, changes: dict[str, Any], request_id: str | None
    ) -> Tokens:
        """Begin a sign-in of *account*, unless what was verified has changed meanwhile."""
        now = datetime.now(UTC)
        same = User.is_active & (User.password_hash == account.password_hash)
        if "totp_step" in changes:
            # Of two who come with one code, one is let in.
            same &= User.totp_step < changes["totp_step"]
        # Retention or an erasure may have come while the password was hashed.
        still_there = (
            update(User)
            .where(User.id == account.id, same)
            .values(last_activity_at=now, **changes)
            .returning(User.id)
        )
        if session.scalar(still_there) is None:
            raise _wrong()
        get_notice_service().cancel(session, account.id)
        # Others' rows that somebody is about to delete are left to them: whoever ends all sign-ins
        # of a person takes them in another order, and both would wait for each other.
        ended = select(SignIn.id).where(SignIn.expires_at < now).with_for_update(skip_locked=True)
        session.execute(delete(SignIn).where(SignIn.id.in_(ended)))
        secret, name = secrets.token_urlsafe(_REFRESH_BYTES), uuid4()
        session.add(
            SignIn(
                id=name,
                user_id=account.id,
                token_digest=_digest(secret),
                signed_in_at=now,
                renewed_at=now,
                expires_at=now + timedelta(days=get_settings().refresh_token_days),
            )
        )
        actor = Actor("person", account.role, account.id, uid=account.uid, request_id=request_id)
        get_audit_service().record(session, "sign_in", actor, subject=account.uid)
        return _tokens(bearer.SignIn(account.id, str(name), now), secret, now)

    def renew(self, refresh_token: str, request_id: str | None = None) -> Tokens:
        """
        Return new tokens for a refresh token, which is used up by that.

        A token that is used twice is in two hands: then the sign-in ends, whoever came first
        (RFC 9700, 4.14.2); so it does where somebody guesses at the token of a sign-in that they
        know by name. Manages its own transactions.

        Raises:
            UnauthenticatedError: It is none, used up, or of a sign-in that has ended.
        """
        parts = _REFRESH_TOKEN.fullmatch(refresh_token)
        if parts is None:
            raise not_valid()
        name, digest, now = UUID(parts[1]), _digest(parts[2]), datetime.now(UTC)
        with session_scope(read_only=True) as session:
            begun = session.get(SignIn, name)
            # One that has come to its end was used by nobody else.
            if begun is None or begun.expires_at <= now:
                raise not_valid()
        with session_scope() as session:
            # The person before their sign-ins, as whoever ends those does: in the other order both
            # would wait for each other.
            session.execute(select(User.id).where(User.id == begun.user_id).with_for_update())
            secret = secrets.token_urlsafe(_REFRESH_BYTES)
            renewed = session.execute(
                update(SignIn)
                .where(SignIn.id == name, SignIn.token_digest == digest, SignIn.expires_at > now)
                .values(token_digest=_digest(secret), renewed_at=now)
                .returning(SignIn.user_id, SignIn.signed_in_at)
            ).one_or_none()
            if renewed is None:
                self._end_misused(session, name, request_id)
            elif self._is_active_again(session, renewed.user_id, now):
                sign_in = bearer.SignIn(renewed.user_id, str(name), renewed.signed_in_at)
                return _tokens(sign_in, secret, now)
        raise not_valid()

    def _is_active_again(self, session: Session, user_id: int, now: datetime) -> bool:
        active = update(User).where(User.id == user_id, User.is_active)
        found = session.scalar(active.values(last_activity_at=now).returning(User.id))
        if found is not None:
            get_notice_service().cancel(session, user_id)
        return found is not None

    def _end_misused(self, session: Session, name: UUID, request_id: str | None) -> None:
        ended = session.scalar(delete(SignIn).where(SignIn.id == name).returning(SignIn.user_id))
        if ended is not None:
            log.warning("refresh_token_reused")
            revoke(session, str(name))
            get_audit_service().record(
                session, "sign_in_renewed", ANYONE.during(request_id), outcome="token_reused",
                subject=session.scalar(select(User.uid).where(User.id == ended)),
            )  # fmt: skip

    def authenticate(self, token: str, request_id: str | None) -> SignedIn:
        """
        Return who *token* belongs to; only the columns that decide are read.

        Raises:
            UnauthenticatedError: Invalid, revoked, or of an account that is gone.
        """
        claims = _keys().verify(token)
        user_id = claims.sign_in.user_id
        told = {
            "user_id": user_id, "token_id": claims.token_id, "sign_in_id": claims.sign_in.id
        }  # fmt: skip
        with session_scope(read_only=True) as session:
            user = session.execute(_BEARER, told).one_or_none()
        if user is None or not user.is_active or _is_older(claims, user.tokens_valid_after):
            raise not_valid()
        actor = Actor("person", user.role, user_id, claims.token_id, request_id, uid=user.uid)
        return SignedIn(actor, claims.sign_in)

    def sign_out(self, session: Session, signed_in: SignedIn) -> None:
        """End the sign-in that *signed_in* came with: all of its tokens are refused."""
        name = signed_in.sign_in.id
        # Of two who sign out at once, the second one waits here and finds it done.
        mine = select(User.id).where(User.id == signed_in.actor.user_id)
        session.execute(mine.with_for_update())
        session.execute(delete(SignIn).where(SignIn.id == UUID(name)))
        if session.get(RevokedToken, name) is None:
            revoke(session, name)
        get_audit_service().record(session, "sign_out", signed_in.actor)

    def sign_out_everywhere(self, session: Session, actor: Actor) -> None:
        """End every sign-in of *actor*."""
        get_account_service().end_sign_ins(session, actor.user_id or 0)
        get_audit_service().record(session, "sign_out_everywhere", actor, subject=actor.uid)

    def record_denial(self, actor: Actor, err: ForbiddenError | StaleSignInError, act: str) -> None:
        """Record that somebody signed in asked for what they may not; in its own transaction."""
        with session_scope() as session:
            whose = select(User.uid).where(User.id == err.subject_id)
            get_audit_service().record(
                session, "denied", actor, outcome=err.code, subject=session.scalar(whose), act=act
            )

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
        _keys.cache_clear()


_WRONG: Final = -1


def _step(account: Account | None, secret: str, code: str) -> int | None:
    """Return the step of *code*, `None` where the account asks for none, and `_WRONG`."""
    if account is None or account.totp_step is None:
        return None
    step = one_time_codes.step_of(code, secret, datetime.now(UTC))
    return _WRONG if step is None or step <= account.totp_step else step


def _tokens(sign_in: bearer.SignIn, secret: str, now: datetime) -> Tokens:
    return Tokens(
        _keys().issue(sign_in, lifetime=token_lifetime(), now=now),
        f"{UUID(sign_in.id).hex}.{secret}",
    )


def _digest(secret: str) -> str:
    # 256 random bits: nobody finds them by trying, so a fast digest is enough.
    return hashlib.sha256(secret.encode()).hexdigest()


def _wrong() -> WrongPasswordError:
    return WrongPasswordError("the e-mail, the password or the one-time code is wrong")


def not_valid() -> UnauthenticatedError:
    """Make the one answer to every token that does not open."""
    return UnauthenticatedError("the bearer token is not valid")


@lru_cache(maxsize=1)
def _keys() -> TokenKeys:
    secret = get_auth_service().find_secret()
    if secret is None:
        raise ConfigurationError("no secret for tokens is prepared yet")
    return TokenKeys(secret, get_settings().previous_token_secrets)


def require_self_or_admin(actor: Actor, user_id: int) -> None:
    """
    Let a person at their own data, and an admin at everybody's.

    Raises:
        ForbiddenError: Neither; it does not say whether the person exists.
    """
    if not actor.is_admin and actor.user_id != user_id:
        raise ForbiddenError("this is another person's data", user_id)


def require_admin(actor: Actor) -> None:
    """
    Raises:
        ForbiddenError: Not an admin.
    """
    if not actor.is_admin:
        raise ForbiddenError("only an admin may do this")


def _is_older(claims: Claims, valid_after: datetime | None) -> bool:
    return valid_after is not None and claims.issued_at < valid_after


@lru_cache(maxsize=1)
def get_auth_service() -> AuthService:
    return AuthService()
