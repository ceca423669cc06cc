"""
Passwords: argon2id hashes, with a bound on how many are computed at once, and which are too weak.

Source: OWASP Password Storage Cheat Sheet (m = 19 MiB, t = 2, p = 1); NIST SP 800-63B, 5.1.1.2.
"""

import os
import re
import secrets
import threading
from collections.abc import Iterable
from functools import lru_cache
from typing import Final

from passlib.hash import argon2

from backend.crypto.codecs import UnencodableError, encode_text
from backend.errors import RefusedError

MIN_CHARS: Final = 12
MAX_CHARS: Final = 1024
_HASHER: Final = argon2.using(type="ID", memory_cost=19_456, time_cost=2, parallelism=1)
# Each hash takes 19 MiB and some 30 ms of a core: half of the cores are left to other requests.
AT_ONCE: Final = max(1, (os.cpu_count() or 2) // 2)
_SLOTS: Final = threading.BoundedSemaphore(AT_ONCE)
# zxcvbn: 0 to 4; below 3 some 10^8 guesses are enough.
_STRONG: Final = 3
# What it looks at; a longer password is judged by its beginning, and only gets better after it.
_JUDGED_CHARS: Final = 24
# As short as many a first name.
_MIN_WORD_CHARS: Final = 3
# What must be left beside words that are known of the account.
_MIN_OWN_CHARS: Final = 8


class WeakPasswordError(RefusedError):
    """A password that is too short, too long, known, or easily guessed."""

    code = "weak_password"


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


def is_outdated(stored: str) -> bool:
    """Say whether *stored* was made with less than today's cost, so that it is to be made anew."""
    return bool(_HASHER.needs_update(stored))


def require_strong(password: str, context: Iterable[str]) -> None:
    """
    Refuse a password that somebody would guess.

    Judged are words that many people use as passwords, names, dates, keyboard patterns,
    repetitions, and the words of *context*: what is known of the account and this service.

    Raises:
        WeakPasswordError: It is one; the message says why and never repeats it.
    """
    if not MIN_CHARS <= len(password) <= MAX_CHARS:
        raise WeakPasswordError(f"a password has {MIN_CHARS} to {MAX_CHARS} characters")
    # Late: its word lists take a while to load, and few processes ever set a password.
    from zxcvbn import zxcvbn

    parts = {part.lower() for text in context for part in re.split(r"[\W_]+", text)}
    words = sorted((part for part in parts if len(part) >= _MIN_WORD_CHARS), key=len, reverse=True)
    # Whoever guesses tries these first, with something around them.
    own = re.sub("|".join(map(re.escape, words)) or "$", "", password, flags=re.IGNORECASE)
    judged = zxcvbn(password[:_JUDGED_CHARS], user_inputs=words)
    if judged["score"] < _STRONG or len(own) < _MIN_OWN_CHARS:
        raise WeakPasswordError(
            "this password is easily guessed: take several words that have nothing to do with "
            "each other, with you, or with this service"
        )


@lru_cache(maxsize=1)
def _dummy() -> str:
    return str(_HASHER.hash(secrets.token_urlsafe(24)))


def generate_password() -> str:
    """Return a random password of 120 bits."""
    return secrets.token_urlsafe(15)
