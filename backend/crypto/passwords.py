"""
Password hashes: argon2id, with a bound on how many are computed at once.

Source: OWASP Password Storage Cheat Sheet (m = 19 MiB, t = 2, p = 1).
"""

import secrets
import threading
from functools import lru_cache
from typing import Final

from passlib.hash import argon2

from backend.crypto.codecs import UnencodableError, encode_text

MIN_CHARS: Final = 12
MAX_CHARS: Final = 1024
_HASHER: Final = argon2.using(type="ID", memory_cost=19_456, time_cost=2, parallelism=1)
# Each hash takes 19 MiB and some 30 ms of a core: more at once only slow each other down.
_SLOTS: Final = threading.BoundedSemaphore(2)


def hash_password(password: str) -> str:
    """
    Return the argon2id hash in PHC string form.

    Raises:
        UnencodableError: *password* is no text.
    """
    secret = encode_text(password)
    with _SLOTS:
        return str(_HASHER.hash(secret))


def verify_password(password: str, stored: str | None) -> bool:
    """
    Tell whether *password* gives *stored*.

    With no stored hash a dummy is verified, so that the answer takes as long either way.
    """
    if len(password) > MAX_CHARS:
        return False
    try:
        secret = encode_text(password)
    except UnencodableError:
        return False
    with _SLOTS:
        matches = bool(_HASHER.verify(secret, stored or _dummy()))
    return matches and stored is not None


@lru_cache(maxsize=1)
def _dummy() -> str:
    return str(_HASHER.hash(secrets.token_urlsafe(24)))


def generate_password() -> str:
    """Return a random password of 120 bits."""
    return secrets.token_urlsafe(15)
