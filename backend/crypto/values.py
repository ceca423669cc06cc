"""
Sealed values: AES-256-GCM tokens that open only where they belong.

Layout, in bytes: version (1) | key id (4) | nonce (12) | ciphertext | tag (16), so 33 bytes more
than the plaintext. As text: `enc1.` and unpadded base64url, so that rows per key can be counted
in SQL by prefix.

Source: NIST SP 800-38D, 8.2.2 and 8.3 (at most 2**32 random nonces per key).
"""

import binascii
import io
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from backend.errors import (
    CryptoError,
    KeyDisabledError,
    MalformedTokenError,
    NotEncryptedError,
    TamperedError,
    UnknownKeyError,
    ValueTooLongError,
)

TEXT_PREFIX: Final = "enc1."
VERSION: Final = b"\x01"
OVERHEAD_BYTES: Final = 33
# What OpenSSL takes at once.
MAX_BYTES: Final = 2**31 - 1
_HEADER_BYTES: Final = 5
_NONCE_END: Final = 17
_LONG_BYTES: Final = 4096
_TO_URL: Final = bytes.maketrans(b"+/", b"-_")
# The standard alphabet's own characters become invalid: a token has one spelling.
_FROM_URL: Final = bytes.maketrans(b"-_+/=", b"+/!!!")
# A last character whose unused bits are not zero would be a second spelling too.
_CANONICAL_TAIL: Final = {
    0: frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"),
    1: frozenset[int](),
    2: frozenset(b"AQgw"),
    3: frozenset(b"AEIMQUYcgkosw048"),
}
# By the length of the text modulo four.
_PADDING: Final = (b"", b"", b"==", b"=")


def _pack(*parts: bytes) -> bytes:
    """Join *parts* with their lengths, so that no two lists of parts give the same bytes."""
    return b"".join(len(part).to_bytes(4, "big") + part for part in parts)


@dataclass(frozen=True, slots=True)
class Scope:
    """
    Where a value belongs: a purpose and its names.

    *key_names* choose the key; all names are bound as associated data.
    """

    purpose: str
    names: tuple[str, ...] = ()
    key_per_name: bool = True

    @property
    def key_names(self) -> tuple[str, ...]:
        return (self.purpose, *self.names) if self.key_per_name else (self.purpose,)

    @property
    def associated_data(self) -> bytes:
        return _pack(*(name.encode() for name in (self.purpose, *self.names)))


def column_scope(table: str, column: str) -> Scope:
    """Scope of one encrypted column: its own key, so the 2**32 limit counts per column."""
    return Scope("column", (table, column))


def value_scope(context: str) -> Scope:
    """Scope of a single value: one key for all, *context* bound as associated data."""
    return Scope("value", (context,), key_per_name=False)


class Cipher:
    """Seals with the primary key of one scope and opens with whichever key a token names."""

    __slots__ = ("_disabled", "_header", "_openers")

    def __init__(
        self,
        scope: Scope,
        keys: Mapping[bytes, bytes],
        primary: bytes,
        disabled: frozenset[bytes] = frozenset(),
    ) -> None:
        self._disabled = disabled
        bound = scope.associated_data
        # By a token's first five bytes: what opens it, and what it is bound to.
        self._openers = {
            VERSION + key_id: (AESGCM(key), VERSION + key_id + bound)
            for key_id, key in keys.items()
        }
        self._header = VERSION + primary

    def seal(self, plaintext: bytes, row: bytes = b"") -> bytes:
        """
        Encrypt *plaintext* so that it opens only in this scope and for the same *row*.

        Args:
            plaintext: At most 2**31 - 1 bytes; files go through `backend.crypto.files`.
            row: Primary key bound as associated data; empty where it is not known yet.

        Returns:
            `OVERHEAD_BYTES` more than *plaintext*.

        Raises:
            ValueTooLongError: *plaintext* is longer.
        """
        if len(plaintext) > MAX_BYTES:
            raise ValueTooLongError(f"a value holds at most {MAX_BYTES} bytes")
        nonce = os.urandom(12)
        sealer, aad = self._openers[self._header]
        if row:
            aad += _pack(row)
        if len(plaintext) < _LONG_BYTES:
            return self._header + nonce + sealer.encrypt(nonce, plaintext, aad)
        # Joining would copy the ciphertext; a buffer that becomes the result does not.
        token = io.BytesIO(self._header + nonce)
        token.seek(OVERHEAD_BYTES + len(plaintext) - 1)
        token.write(b"\0")
        with token.getbuffer() as whole, whole[_NONCE_END:] as rest:
            sealer.encrypt_into(nonce, plaintext, aad, rest)
        return token.getvalue()

    def open(self, token: bytes, row: bytes = b"") -> bytes:
        """
        Decrypt *token*. Only the key that it names is tried.

        Raises:
            MalformedTokenError: Too short, or of another version.
            UnknownKeyError: Its key is not configured.
            KeyDisabledError: Its key was disabled.
            TamperedError: It was changed, or belongs to another scope or row.
        """
        found = self._openers.get(token[:_HEADER_BYTES])
        if found is None or len(token) < OVERHEAD_BYTES:
            raise self._refusal(token)
        opener, aad = found
        # A slice copies, which a long value would notice and a short one would not.
        sealed = token if len(token) < _LONG_BYTES else memoryview(token)
        try:
            return opener.decrypt(
                token[_HEADER_BYTES:_NONCE_END],
                sealed[_NONCE_END:],
                aad + _pack(row) if row else aad,
            )
        except InvalidTag:
            raise TamperedError("an encrypted value was changed or moved") from None

    def _refusal(self, token: bytes) -> CryptoError:
        if len(token) < OVERHEAD_BYTES or token[:1] != VERSION:
            return MalformedTokenError("this is no whole encrypted value of version 1")
        key_id = token[1:_HEADER_BYTES]
        if key_id in self._disabled:
            return KeyDisabledError(f"sealed with key {key_id.hex()}, which was disabled")
        return UnknownKeyError(f"sealed with key {key_id.hex()}, which is not configured")

    def seal_text(self, plaintext: bytes, row: bytes = b"") -> str:
        """Seal and spell as `enc1.` text."""
        return encode_token(self.seal(plaintext, row))

    def open_text(self, token: str, row: bytes = b"") -> bytes:
        """
        Open an `enc1.` text.

        Raises:
            NotEncryptedError: It does not begin with `enc1.`.
            CryptoError: As `open`.
        """
        return self.open(decode_token(token), row)


def encode_token(token: bytes) -> str:
    """Spell *token* as `enc1.` and unpadded base64url."""
    return TEXT_PREFIX + binascii.b2a_base64(token).translate(_TO_URL, b"=\n").decode()


def token_prefixes(key_id: bytes) -> list[str]:
    """Return what tokens under a key begin with, each of the same length, for counting in SQL."""
    # Version and key id are 40 bits, so 6 characters and 4 bits of the seventh: four prefixes.
    size = len(TEXT_PREFIX) + 7
    return [encode_token(VERSION + key_id + bytes([rest << 6]))[:size] for rest in range(4)]


def decode_token(text: str) -> bytes:
    """
    Read an `enc1.` text in its one canonical spelling.

    Raises:
        NotEncryptedError: No `enc1.` at its beginning.
        MalformedTokenError: Not canonical base64url behind it.
    """
    if text[: len(TEXT_PREFIX)] != TEXT_PREFIX:
        raise NotEncryptedError("plain text stands where an encrypted value belongs")
    try:
        body = text[len(TEXT_PREFIX) :].encode("ascii")
        rest = len(body) & 3
        if body[-1] in _CANONICAL_TAIL[rest]:
            padded = body.translate(_FROM_URL) + _PADDING[rest]
            return binascii.a2b_base64(padded, strict_mode=True)
    except (binascii.Error, UnicodeEncodeError, IndexError):
        # `from None` below: the codec's own error holds the text.
        pass
    raise MalformedTokenError("an encrypted value was cut or changed") from None
