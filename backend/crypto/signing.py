"""
Ed25519 signatures: the private key is 32 raw bytes, the public key is spelled for people.

Spelled: `ed25519:` and 43 characters of unpadded base64url. A PEM "PUBLIC KEY", the form that
openssl reads, is taken as well. A message carries its own context: what is signed for one purpose
must begin unlike what is signed for any other.
"""

import hashlib
from base64 import urlsafe_b64decode, urlsafe_b64encode
from typing import Final

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_pem_public_key,
)

from backend.errors import KeyFormatError, RefusedError

KEY_BYTES: Final = 32
SIGNATURE_BYTES: Final = 64
PUBLIC_KEY_PREFIX: Final = "ed25519:"
_KEY_ID_CHARS: Final = 8
_PEM_BEGIN: Final = "-----BEGIN "
_PEM_PUBLIC_KEY: Final = f"{_PEM_BEGIN}PUBLIC KEY-----"

# RFC 8032, 5.1: the field's prime. A key is the y of a point, the top bit is the sign of its x.
_PRIME: Final = 2**255 - 19
# The y of the points of order 8; of order 1, 2 and 4 it is 1, -1 and 0. Whoever has such a "public
# key" needs no private one: under y = 1 one signature fits every message, and `cryptography`
# accepts it. Source: RFC 8032, 5.1.7 and 8.4 (the cofactor is 8); a test computes these points.
_ORDER_8: Final = int("7a03ac9277fdc74ec6cc392cfa53202a0f67100d760b3cba4fd84d3d706a17c7", 16)
_SMALL_ORDER: Final = frozenset({0, 1, _PRIME - 1, _ORDER_8, _PRIME - _ORDER_8})


class PublicKeyRefusedError(RefusedError):
    """This is no Ed25519 public key that can be trusted with anything."""

    code, title = "public_key_refused", "The public key was refused"


class SignatureRefusedError(RefusedError):
    """The signature is not this key's over this message."""

    code, title = "signature_refused", "The signature was refused"


def new_signing_key() -> bytes:
    """Return a fresh private key."""
    return Ed25519PrivateKey.generate().private_bytes_raw()


def public_key_of(private_key: bytes) -> bytes:
    """
    Return the public half of *private_key*.

    Raises:
        KeyFormatError: It is not 32 bytes.
    """
    return _private(private_key).public_key().public_bytes_raw()


def sign(message: bytes, private_key: bytes) -> bytes:
    """
    Return the 64 bytes that prove that whoever has *private_key* signed *message*.

    Raises:
        KeyFormatError: The key is not 32 bytes.
    """
    return _private(private_key).sign(message)


def verify(message: bytes, signature: bytes, public_key: bytes) -> None:
    """
    Check that *signature* was made over *message* with the private half of *public_key*.

    Raises:
        SignatureRefusedError: It was not.
        PublicKeyRefusedError: Signatures by this key would prove nothing.
    """
    try:
        _public(public_key).verify(signature, message)
    except InvalidSignature:
        raise SignatureRefusedError("the signature does not fit") from None


def key_id(public_key: bytes) -> str:
    """
    Return 8 hex characters that name the key to people; too few to trust a key by.

    Raises:
        PublicKeyRefusedError: As `verify`.
    """
    return hashlib.sha256(_public(public_key).public_bytes_raw()).hexdigest()[:_KEY_ID_CHARS]


def spell_public_key(public_key: bytes) -> str:
    """
    Spell *public_key* as `ed25519:` and base64url.

    Raises:
        PublicKeyRefusedError: As `verify`.
    """
    return PUBLIC_KEY_PREFIX + to_base64url(_public(public_key).public_bytes_raw())


def public_key_pem(public_key: bytes) -> str:
    """
    Write *public_key* as openssl reads it.

    Raises:
        PublicKeyRefusedError: As `verify`.
    """
    pem = _public(public_key).public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    return pem.decode()


def parse_public_key(text: str) -> bytes:
    """
    Read a public key as `spell_public_key` or `public_key_pem` writes it.

    Args:
        text: One key; white space around it is ignored, since it usually comes from a file.

    Raises:
        PublicKeyRefusedError: It is anything else, another kind of key, or a weak one.
    """
    text = text.strip()
    try:
        if text.startswith(PUBLIC_KEY_PREFIX):
            raw = from_base64url(text.removeprefix(PUBLIC_KEY_PREFIX), KEY_BYTES)
        else:
            raw = _from_pem(text)
    except (ValueError, UnsupportedAlgorithm):
        # `from None`: whoever gives a private key by mistake must not find it in a log.
        raise PublicKeyRefusedError(
            'an Ed25519 public key is "ed25519:" and 43 characters, or one PEM "PUBLIC KEY"'
        ) from None
    return _public(raw).public_bytes_raw()


def to_base64url(raw: bytes) -> str:
    """Spell *raw* as unpadded base64url."""
    return urlsafe_b64encode(raw).decode().rstrip("=")


def from_base64url(text: str, size: int) -> bytes:
    """
    Read *size* bytes from the one spelling that `to_base64url` gives them.

    Raises:
        ValueError: Of another size, or in another spelling.
    """
    raw = urlsafe_b64decode(text + "=" * (-len(text) % 4))
    if len(raw) != size or to_base64url(raw) != text:
        raise ValueError("not the canonical base64url of so many bytes")
    return raw


def _private(raw: bytes) -> Ed25519PrivateKey:
    if len(raw) != KEY_BYTES:
        raise KeyFormatError(f"a signing key is {KEY_BYTES} bytes, not {len(raw)}")
    return Ed25519PrivateKey.from_private_bytes(raw)


def _public(raw: bytes) -> Ed25519PublicKey:
    if len(raw) != KEY_BYTES:
        raise PublicKeyRefusedError(f"a public key is {KEY_BYTES} bytes, not {len(raw)}")
    y = int.from_bytes(raw, "little") & (1 << 255) - 1
    # RFC 8032, 5.1.3: y is below the prime. OpenSSL takes a second spelling of one key, and so
    # would give one key two names.
    if y >= _PRIME or y in _SMALL_ORDER:
        raise PublicKeyRefusedError("the public key is weak: anyone can sign in its name")
    return Ed25519PublicKey.from_public_bytes(raw)


def _from_pem(text: str) -> bytes:
    # The library skips what stands before the first key, and all keys after it.
    if not text.startswith(_PEM_PUBLIC_KEY) or text.count(_PEM_BEGIN) != 1:
        raise ValueError("not one public key")
    key = load_pem_public_key(text.encode())
    if not isinstance(key, Ed25519PublicKey):
        raise ValueError("another kind of key")  # noqa: TRY004 - answered as any wrong text
    return key.public_bytes_raw()
