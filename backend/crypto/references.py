"""
Keyed references to people: they tell two records of one person apart from another's, and nothing
else without the key and the person's own row.

The key is the installation's own and does not change when encryption keys are rotated: a ledger
entry must find its person in a backup of any age.
"""

import hashlib
import hmac
import os
from typing import Final
from uuid import UUID

KEY_BYTES: Final = 32
_DIGEST_BYTES: Final = 16


def new_reference_key() -> bytes:
    """Return a fresh key; an installation makes one, once."""
    return os.urandom(KEY_BYTES)


def reference(key: bytes, uid: UUID) -> str:
    """Return the reference of the person *uid*: 128 bits of HMAC-SHA256, as hex."""
    return hmac.new(key, uid.bytes, hashlib.sha256).hexdigest()[: 2 * _DIGEST_BYTES]


def address_reference(key: bytes, kind: str, address: str) -> str:
    """
    Return the reference of whoever is known by an address alone.

    Args:
        kind: Of address, as `email`; one text as two kinds gives two references.
        address: In its one spelling; see `backend.crypto.blind_index`.
    """
    message = f"{kind}:{address}".encode()
    return hmac.new(key, message, hashlib.sha256).hexdigest()[: 2 * _DIGEST_BYTES]
