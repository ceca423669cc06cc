"""
Bearer tokens: signed JWTs of one algorithm, one issuer and one type.

python-jose accepts by default a token without `exp` or `aud`, any listed algorithm, a `crit`
header and keys of one character; so everything is pinned and required here, and every failure is
the same 401 (RFC 8725, 3.1, 3.8, 3.11).
"""

import binascii
import json
import re
import secrets
from base64 import urlsafe_b64decode, urlsafe_b64encode
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from jose import JWTError, jwt

from backend.errors import UnauthenticatedError

ALGORITHM: Final = "HS256"
ISSUER: Final = "holdfast"
AUDIENCE: Final = "holdfast-api"
TOKEN_TYPE: Final = "at+jwt"  # noqa: S105 - RFC 9068, 2.1
MAX_TOKEN_CHARS: Final = 2048
_LEEWAY_SECONDS: Final = 5
# A database integer has at most 19 digits.
_SUBJECT: Final = re.compile(r"[1-9][0-9]{0,17}", re.ASCII)
_REQUIRED: Final = ("exp", "iat", "nbf", "sub", "aud", "iss", "jti")
_OPTIONS: Final = {f"require_{claim}": True for claim in _REQUIRED} | {"leeway": _LEEWAY_SECONDS}


@dataclass(frozen=True, slots=True)
class Claims:
    """What a valid token says: whose it is, its own id, when it was issued and when it ends."""

    user_id: int
    token_id: str
    issued_at: datetime
    expires_at: datetime


def issue(user_id: int, *, secret: str, lifetime: timedelta, now: datetime) -> str:
    """Sign a token for *user_id* that lives for *lifetime* from *now*."""
    claims = {
        "sub": str(user_id),
        "iss": ISSUER,
        "aud": AUDIENCE,
        "iat": now,
        "nbf": now,
        "exp": now + lifetime,
        "jti": secrets.token_urlsafe(16),
    }
    return jwt.encode(claims, secret, algorithm=ALGORITHM, headers={"typ": TOKEN_TYPE})


def verify(token: str, *, secret: str) -> Claims:
    """
    Check a token and return its claims.

    Raises:
        UnauthenticatedError: For every reason with the same words.
    """
    try:
        _check_header(token)
        claims = jwt.decode(
            token,
            secret,
            algorithms=[ALGORITHM],
            audience=AUDIENCE,
            issuer=ISSUER,
            options=_OPTIONS,
        )
        return _claims(claims)
    except (JWTError, ValueError, TypeError, RecursionError, OverflowError, binascii.Error):
        # RecursionError: a deeply nested header breaks json inside jose, past `JWTError`.
        raise UnauthenticatedError("the bearer token is not valid") from None


def _check_header(token: str) -> None:
    """Refuse by size and shape before jose parses anything."""
    if len(token) > MAX_TOKEN_CHARS or not token.isascii() or token.count(".") != 2:  # noqa: PLR2004 - two dots
        raise ValueError("not a compact JWS")
    for part in token.split("."):
        raw = urlsafe_b64decode(part + "=" * (-len(part) % 4))
        # Re-encoded spellings of one token would slip past revocation by raw value.
        if urlsafe_b64encode(raw).decode().rstrip("=") != part:
            raise ValueError("not canonical base64url")
    head = token.split(".", 1)[0]
    header = json.loads(urlsafe_b64decode(head + "=" * (-len(head) % 4)))
    if header != {"alg": ALGORITHM, "typ": TOKEN_TYPE}:
        raise ValueError("not our header")


def _claims(claims: dict[str, Any]) -> Claims:
    issued, expires, subject, token_id = (claims[name] for name in ("iat", "exp", "sub", "jti"))
    if type(issued) is not int or type(expires) is not int or claims["aud"] != AUDIENCE:
        raise ValueError("claims of the wrong type")
    if not (_SUBJECT.fullmatch(subject) and isinstance(token_id, str) and token_id):
        raise ValueError("claims of the wrong type")
    issued_at = datetime.fromtimestamp(issued, UTC)
    if issued_at > datetime.now(UTC) + timedelta(seconds=_LEEWAY_SECONDS):
        raise ValueError("issued in the future")
    return Claims(int(subject), token_id, issued_at, datetime.fromtimestamp(expires, UTC))
