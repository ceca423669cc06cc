"""
The keys of one process: parsing them, naming them, deriving working keys from them.

A configured key is never used itself. Working keys come from it by HKDF-SHA256 (RFC 5869) with
one `info` per purpose, so that no key serves two purposes.
"""

import base64
import binascii
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from typing import Final

from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from backend.crypto.values import Cipher, Scope
from backend.errors import ConfigurationError, KeyDisabledError, KeyFormatError, UnknownKeyError

KEY_BYTES: Final = 32
KEY_ID_BYTES: Final = 4
CHECK_VALUE_BYTES: Final = 8
# A random 32-byte key has fewer than 8 distinct bytes with a chance below 2**-150.
_MIN_DISTINCT_BYTES: Final = 8
_SALT: Final = b"holdfast/v1"
_BASE64_TEXT: Final = re.compile(r"[A-Za-z0-9+/_-]+={0,2}")


def parse_key(text: str) -> bytes:
    """
    Read a 32-byte key from base64, base64url, a Fernet key, or a base64-encoded Fernet key.

    The last is what `base64.b64encode(Fernet.generate_key())` prints: 60 characters that decode
    to the 44 characters of a Fernet key, so they are decoded twice.

    Raises:
        KeyFormatError: Anything else; the message gives lengths only.
    """
    text = text.strip().strip("\"'").strip()
    key = _decode(text)
    # 43 or 44 decoded bytes are the text of a key without or with its padding.
    if key is not None and len(key) in (43, 44):
        try:
            key = _decode(key.decode("ascii"))
        except UnicodeDecodeError:
            key = None
    if key is None or len(key) != KEY_BYTES:
        size = "not base64" if key is None else f"{len(key)} bytes"
        raise KeyFormatError(
            f"an encryption key is the base64 of {KEY_BYTES} bytes; "
            f"this one has {len(text)} characters and is {size}"
        )
    if len(set(key)) < _MIN_DISTINCT_BYTES:
        raise KeyFormatError("an encryption key must be random; this one repeats a few bytes")
    return key


def _decode(text: str) -> bytes | None:
    if not _BASE64_TEXT.fullmatch(text):
        return None
    body = text.rstrip("=").replace("-", "+").replace("_", "/")
    padded = body + "=" * (-len(body) % 4)
    try:
        raw = binascii.a2b_base64(padded, strict_mode=True)
    except binascii.Error:
        return None
    # Two spellings of one key would be two values of one secret: accept only the canonical one.
    return raw if base64.b64encode(raw).decode() == padded else None


_CACHED_CIPHERS: Final = 1024


class RootKey:
    """One configured key. It shows its id and nothing else."""

    __slots__ = ("_key", "check_value", "key_id")

    def __init__(self, key: bytes) -> None:
        self._key = key
        self.key_id = self.derive("key id", size=KEY_ID_BYTES)
        self.check_value = self.derive("check value", size=CHECK_VALUE_BYTES)

    def derive(self, purpose: str, *names: str, size: int = KEY_BYTES) -> bytes:
        """Derive *size* bytes for one purpose, separated further by *names*."""
        info = b"".join(
            len(part).to_bytes(2, "big") + part for part in (n.encode() for n in (purpose, *names))
        )
        return HKDF(algorithm=SHA256(), length=size, salt=_SALT, info=info).derive(self._key)

    def sealed(self, cipher: Cipher, place: bytes) -> bytes:
        """Return this key, sealed with another one, for the *place* where it is kept."""
        return cipher.seal(self._key, place)

    def __repr__(self) -> str:
        return f"RootKey({self.key_id.hex()})"


class Keyring:
    """
    The primary key, which seals and opens, and previous keys, which only open.

    Args:
        disabled: Ids of keys that neither seal nor open, configured or not.

    Raises:
        ConfigurationError: Two keys are the same or share an id, or the primary is disabled.
    """

    def __init__(
        self,
        primary: RootKey,
        previous: Iterable[RootKey] = (),
        disabled: frozenset[bytes] = frozenset(),
    ) -> None:
        configured = (primary, *previous)
        if len({key.key_id for key in configured}) != len(configured):
            raise ConfigurationError("ENCRYPTION_KEYS_PREVIOUS repeats a key")
        if primary.key_id in disabled:
            raise ConfigurationError(f"ENCRYPTION_KEY: key {primary.key_id.hex()} was disabled")
        self.primary = primary
        self.disabled = disabled
        self.keys = tuple(key for key in configured if key.key_id not in disabled)
        self._by_id = {key.key_id: key for key in self.keys}
        # More than there are encrypted columns; callers' own contexts must not fill the memory.
        self.cipher = lru_cache(maxsize=_CACHED_CIPHERS)(self._cipher)

    def find(self, key_id: bytes) -> RootKey:
        """
        Return the key with this id.

        Raises:
            KeyDisabledError: It was disabled.
            UnknownKeyError: It is not configured.
        """
        try:
            return self._by_id[key_id]
        except KeyError:
            if key_id in self.disabled:
                raise KeyDisabledError(f"key {key_id.hex()} was disabled") from None
            raise UnknownKeyError(f"no configured key has the id {key_id.hex()}") from None

    def _cipher(self, scope: Scope) -> Cipher:
        """Return the cipher of *scope*, made once: deriving costs more than sealing."""
        derived = {key.key_id: key.derive(*scope.key_names) for key in self.keys}
        return Cipher(scope, derived, self.primary.key_id, self.disabled)

    def with_more(self, keys: Iterable[RootKey]) -> "Keyring":
        """Return a keyring that also opens with *keys*, disabled here or not."""
        found = {key.key_id: key for key in (*self.keys, *keys)}
        previous = (key for key in found.values() if key.key_id != self.primary.key_id)
        return Keyring(self.primary, previous)

    def disabling(self, key_ids: Iterable[bytes]) -> "Keyring":
        """Return these keys with those of *key_ids* disabled."""
        previous = (key for key in self.keys if key is not self.primary)
        return Keyring(self.primary, previous, self.disabled | frozenset(key_ids))

    def __repr__(self) -> str:
        return f"Keyring({', '.join(key.key_id.hex() for key in self.keys)})"


_installed: list[Keyring] = []
_used_here: ContextVar[Keyring | None] = ContextVar("keyring", default=None)


def install(keyring: Keyring) -> None:
    """Make *keyring* the one that encrypted columns of this process use."""
    _installed[:] = [keyring]


def current() -> Keyring:
    """
    Return the keyring of this process.

    Raises:
        ConfigurationError: None was installed yet.
    """
    return _used_here.get() or configured()


def configured() -> Keyring:
    """
    Return the keyring of this process, without keys that a backup has brought along.

    Raises:
        ConfigurationError: None was installed yet.
    """
    if not _installed:
        raise ConfigurationError("no encryption key is loaded yet")
    return _installed[0]


@contextmanager
def using(keys: Keyring) -> Iterator[None]:
    """Use *keys* in this thread until the block ends: a backup may bring keys of its own."""
    token = _used_here.set(keys)
    try:
        yield
    finally:
        _used_here.reset(token)
