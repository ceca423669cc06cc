"""
Keyed references to people: they tell two records of one person apart from another's, and nothing
else without the key and the person's own row.
"""

import hashlib
import hmac
from functools import lru_cache
from typing import Final
from uuid import UUID

from backend.crypto.keyring import Keyring, RootKey

_DIGEST_BYTES: Final = 16


def reference(keyring: Keyring, uid: UUID) -> str:
    """Return the reference of the person *uid* under the primary key: `key id:digest`, as hex."""
    return _reference(keyring.primary, uid)


def references(keyring: Keyring, uid: UUID) -> list[str]:
    """Return the person's references under every configured key, for looking up."""
    return [_reference(key, uid) for key in keyring.keys]


def _reference(key: RootKey, uid: UUID) -> str:
    digest = hmac.new(_secret(key), uid.bytes, hashlib.sha256).digest()[:_DIGEST_BYTES]
    return f"{key.key_id.hex()}:{digest.hex()}"


@lru_cache(maxsize=64)
def _secret(key: RootKey) -> bytes:
    return key.derive("subject reference")
