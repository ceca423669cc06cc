"""Which secrets for signing tokens are refused: placeholders, rows of keys, published examples."""

import re
from itertools import pairwise
from typing import Final

# RFC 7518, 3.2: an HS256 key has at least the size of the hash output.
MIN_CHARS: Final = 32
_MIN_DISTINCT_CHARS: Final = 8
# How many must not follow from those before them. Of 32 random hexadecimal digits some 31 do not.
_MIN_OWN_CHARS: Final = 20
# Words of six letters and more come about in one of some million random secrets, so one is enough.
_WORD: Final = re.compile(
    r"secret|passwor|passphrase|example|sample|insert|generate|replace|placeholder|holdfast"
    r"|change|default|insecure|development|random|string|signing|your.?(secret|key|jwt)"
    r"|^your[-_. ]|^<.*>$",
    re.IGNORECASE,
)
# Shorter ones have to stand alone, and not alone of their kind.
_SHORT_WORD: Final = re.compile(
    r"(?<![^\W_])(jwt|todo|fixme|key|token|auth|dummy|test|prod|dev|app|api|your|our|this|the|for|and"
    r"|not|use|set|put|new|long|very|some|here|please)(?![^\W_])",
    re.IGNORECASE,
)
# On keyboards, the last one by columns.
_ROWS: Final = (
    "12345678901",
    "abcdefghijklmnopqrstuvwxyz",
    "qwertyuiop",
    "asdfghjkl",
    "zxcvbnm",
    "1qaz2wsx3edc4rfv5tgb6yhn7ujm8ik9ol0p",
)
_NEXT: Final = frozenset(pair for row in _ROWS for pair in pairwise(row))
_REPEATED_CHARS: Final = 4
# Printed in many copies: of the documentation of FastAPI and of Flask, of RFC 7515 (A.1), and of
# a tutorial on Spring Security.
_PUBLISHED: Final = frozenset(
    (
        "09d25e094faa6ca2556c818166b7a9563b93f7099f6f0f4caa6cf63b88e8d3e7",
        "192b9bdd22ab9ed4d12e236c78afcb9a393ec15f71bbf5dc987d54727823bcbf",
        "AyM1SysPpbyDfgZld3umj1qzKObwVMkoqQ-EstJQLr_T-1qS0gZH75aKtMN3Yj0iPS4hcgUuTwjAzZr1Z9CAow",
        "404E635266556A586E3272357538782F413F4428472B4B6250645367566B5970",
    )
)


def is_weak(secret: str) -> bool:
    """
    Say whether *secret* is too short, or one that somebody would guess.

    What was drawn at random, as hexadecimal digits or base64, is never refused.
    """
    return (
        len(secret) < MIN_CHARS
        or len(set(secret)) < _MIN_DISTINCT_CHARS
        or secret in _PUBLISHED
        or bool(_WORD.search(secret))
        or len(_SHORT_WORD.findall(secret)) > 1
        or _own_chars(secret.lower()) < _MIN_OWN_CHARS
    )


def _own_chars(text: str) -> int:
    """Count the characters that continue no row, forwards or backwards, and repeat nothing."""
    return sum(not _follows(text, at) for at in range(len(text)))


def _follows(text: str, at: int) -> bool:
    steps = set(pairwise(text[max(0, at - 2) : at + 1]))
    back = {(last, first) for first, last in steps}
    repeated = text[max(0, at + 1 - _REPEATED_CHARS) : at + 1] in text[:at]
    return repeated or (at > 1 and (steps <= _NEXT or back <= _NEXT))
