"""
Blind indexes: equality search over an encrypted column.

HMAC-SHA256 under a key of its own, stored as `bi1.` and base64url of key id (4 bytes) and digest
(16 bytes).
"""

import base64
import hashlib
import hmac
import unicodedata
from collections.abc import Callable
from functools import lru_cache
from typing import Final

from backend.crypto import keyring
from backend.crypto.codecs import encode_text

TERM_PREFIX: Final = "bi1."
# 128 bits: among 2**32 people the chance of one false match stays below 2**-64.
_INDEX_BYTES: Final = 16


def normalise_email(address: str) -> str:
    """One spelling per mailbox: case and Unicode form do not make another person."""
    return unicodedata.normalize("NFKC", address.strip()).casefold()


def normalise_phone(number: str, region: str | None) -> str:
    """
    One spelling per telephone: E.164 where the number can be read, its digits where it cannot.

    Args:
        region: ISO 3166 code of the country in which numbers without a country code are.
    """
    # Late: it reads its tables at the first import, and most processes look up no number.
    import phonenumbers

    text = unicodedata.normalize("NFKC", number).strip()
    # ITU-T E.123: two zeros stand for the plus sign.
    dialled = f"+{text[2:]}" if text.startswith("00") else text
    try:
        parsed = phonenumbers.parse(dialled, region)
    except phonenumbers.NumberParseException:
        return "".join(char for char in text if char.isdecimal()) or text
    spelled = str(phonenumbers.format_number(parsed, phonenumbers.PhoneNumberFormat.E164))
    # Behind one switchboard are many people (RFC 3966, 5.3).
    return f"{spelled};ext={parsed.extension}" if parsed.extension else spelled


class BlindIndex:
    """
    Equality search over one encrypted column: HMAC-SHA256 under a key of its own.

    Stored as `bi1.` and base64url of key id (4 bytes) and digest (16 bytes). It shows which rows
    are equal, by design, and nothing to whoever lacks the key.
    """

    def __init__(self, table: str, column: str, normalise: Callable[[str], str]) -> None:
        self._names = (table, column)
        self._normalise = normalise

    def spelled(self, value: str) -> str:
        """Return the one spelling of *value* that is looked for."""
        return self._normalise(value)

    def term(self, value: str) -> str:
        """The term to store, under the primary key."""
        return self._term(keyring.current().primary, value)

    def terms(self, value: str) -> list[str]:
        """The terms to look for: one per configured key, so that a rotation hides nobody."""
        return [self._term(key, value) for key in keyring.current().keys]

    def _term(self, key: keyring.RootKey, value: str) -> str:
        digest = hmac.new(
            _index_key(key, *self._names), encode_text(self._normalise(value)), hashlib.sha256
        ).digest()
        raw = key.key_id + digest[:_INDEX_BYTES]
        return TERM_PREFIX + base64.urlsafe_b64encode(raw).decode().rstrip("=")


def term_prefixes(key: keyring.RootKey) -> list[str]:
    """Return what terms under *key* begin with, each of the same length, for counting in SQL."""
    # 32 bits of key id are five characters and 2 bits of the sixth: 16 prefixes.
    spelled = (base64.urlsafe_b64encode(key.key_id + bytes([rest << 4])) for rest in range(16))
    return [TERM_PREFIX + text[:6].decode() for text in spelled]


@lru_cache(maxsize=64)
def _index_key(key: keyring.RootKey, table: str, column: str) -> bytes:
    return key.derive("blind index", table, column)
