"""
Bearer tokens: signed JWTs of one algorithm, one issuer and one type.

python-jose accepts by default a token without `exp` or `aud`, any listed algorithm, a `crit`
header and keys of one character; so everything is pinned and required here, and every failure is
the same 401 (RFC 8725, 3.1, 3.8, 3.11).
"""

import json
import re
import secrets
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from jose import JWTError, jwt

from backend.errors import UnauthenticatedError

ALGORITHM: Final = "HS256"
ISSUER: Final = "holdfast"
AUDIENCE: Final = "holdfast-api"
TOKEN_TYPE: Final = "at+jwt"  # noqa: S105 - RFC 9068, 2.1
MAX_TOKEN_CHARS: Final = 2048
LEEWAY: Final = timedelta(seconds=5)
_KEY_ID_BYTES: Final = 8
# A database integer has at most 19 digits.
_SUBJECT: Final = re.compile(r"[1-9][0-9]{0,17}", re.ASCII)
_REQUIRED: Final = ("exp", "iat", "nbf", "sub", "aud", "iss", "jti")
_OPTIONS: Final = {f"require_{claim}": True for claim in _REQUIRED} | {
    "leeway": int(LEEWAY.total_seconds())
}


@dataclass(frozen=True, slots=True)
class SignIn:
    """One sign-in of one person, which many tokens may be of."""

    user_id: int
    id: str
    at: datetime


@dataclass(frozen=True, slots=True)
class Claims:
    """What a valid token says: of which sign-in it is, its own id, when it was issued and ends."""

    sign_in: SignIn
    token_id: str
    issued_at: datetime
    expires_at: datetime


class TokenKeys:
    """
    What tokens are signed with, and what earlier ones that still count were signed with.

    A token names its key by an id that is derived one way from the secret: nothing else that it
    says decides how it is checked.
    """

    def __init__(self, secret: str, previous: Iterable[str] = ()) -> None:
        self.key_id = _key_id(secret)
        self._secrets = {_key_id(known): known for known in (*previous, secret)}

    def issue(self, sign_in: SignIn, *, lifetime: timedelta, now: datetime) -> str:
        """Sign a token of *sign_in* that lives for *lifetime* from *now*."""
        claims = {
            "sub": str(sign_in.user_id),
            "iss": ISSUER,
            "aud": AUDIENCE,
            "iat": now,
            "nbf": now,
            "exp": now + lifetime,
            "jti": secrets.token_urlsafe(16),
            "sid": sign_in.id,
            "auth_time": int(sign_in.at.timestamp()),
        }
        headers = {"typ": TOKEN_TYPE, "kid": self.key_id}
        return jwt.encode(claims, self._secrets[self.key_id], algorithm=ALGORITHM, headers=headers)

    def verify(self, token: str) -> Claims:
        """
        Check a token and return its claims.

        Raises:
            UnauthenticatedError: For every reason with the same words.
        """
        try:
            claims = jwt.decode(
                token,
                self._secrets[_checked_key_id(token)],
                algorithms=[ALGORITHM],
                audience=AUDIENCE,
                issuer=ISSUER,
                options=_OPTIONS,
            )
            return _claims(claims)
        except (JWTError, LookupError, ValueError, TypeError, RecursionError, OverflowError):
            # RecursionError: a deeply nested header breaks json inside jose, past `JWTError`.
            raise UnauthenticatedError("the bearer token is not valid") from None

    def __repr__(self) -> str:
        return f"TokenKeys({', '.join(self._secrets)})"


def _key_id(secret: str) -> str:
    derived = HKDF(algorithm=SHA256(), length=_KEY_ID_BYTES, salt=None, info=b"holdfast token key")
    return derived.derive(secret.encode()).hex()


def _checked_key_id(token: str) -> str:
    """Return the key's id; refuse by size and shape before jose parses anything."""
    if len(token) > MAX_TOKEN_CHARS or not token.isascii() or token.count(".") != 2:  # noqa: PLR2004 - two dots
        raise ValueError("not a compact JWS")
    for part in token.split("."):
        raw = urlsafe_b64decode(part + "=" * (-len(part) % 4))
        # Re-encoded spellings of one token would slip past revocation by raw value.
        if urlsafe_b64encode(raw).decode().rstrip("=") != part:
            raise ValueError("not canonical base64url")
    head = token.split(".", 1)[0]
    header = json.loads(urlsafe_b64decode(head + "=" * (-len(head) % 4)))
    key_id = str(header["kid"])
    if header != {"alg": ALGORITHM, "typ": TOKEN_TYPE, "kid": key_id}:
        raise ValueError("not our header")
    return key_id


def _claims(claims: dict[str, Any]) -> Claims:
    times = [claims[name] for name in ("iat", "exp", "auth_time")]
    subject, token_id, sign_in_id = (claims[name] for name in ("sub", "jti", "sid"))
    if any(type(time) is not int for time in times) or claims["aud"] != AUDIENCE:
        raise ValueError("claims of the wrong type")
    if not (
        _SUBJECT.fullmatch(subject)
        and all(isinstance(name, str) and name for name in (token_id, sign_in_id))
    ):
        raise ValueError("claims of the wrong type")
    issued_at, expires_at, signed_in_at = (datetime.fromtimestamp(time, UTC) for time in times)
    if issued_at > datetime.now(UTC) + LEEWAY:
        raise ValueError("issued in the future")
    return Claims(SignIn(int(subject), sign_in_id, signed_in_at), token_id, issued_at, expires_at)
