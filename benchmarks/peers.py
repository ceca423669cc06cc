"""
Libraries that do what ours does, each called as its own documentation shows, with its key ready.

They are loaded by name: a missing one is left out and named, and types are checked without them.
"""

import base64
import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from cryptography.fernet import Fernet
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

BARE: Final = "bare AESGCM"
TINK: Final = "Tink"
ESDK: Final = "AWS Encryption SDK"
FERNET: Final = "Fernet"
SQLALCHEMY_UTILS: Final = "SQLAlchemy-Utils"
IN_BASE64: Final = " in base64"
# As long as what ours binds for a column: version, key id, purpose, table and column.
CONTEXT: Final = b"\x01key!" + b"\x00\x00\x00\x06column\x00\x00\x00\x05users\x00\x00\x00\x05email"


@dataclass(frozen=True)
class Peer:
    """Seals to bytes or to text and opens again; *seal* takes text where *of_text* says so."""

    name: str
    seal: Callable[[Any], Any]
    open: Callable[[Any], Any]
    of_text: bool = False

    def in_base64(self) -> "Peer":
        """Return the same, kept as text: what a text column needs of a peer that gives bytes."""
        return Peer(
            self.name + IN_BASE64,
            lambda plaintext: base64.urlsafe_b64encode(self.seal(plaintext)).decode(),
            lambda token: self.open(base64.urlsafe_b64decode(token)),
        )


def bare() -> Peer:
    """Return the limit: nothing but the call, with one nonce, which no product may do."""
    gcm, nonce = AESGCM(os.urandom(32)), os.urandom(12)
    return Peer(
        BARE,
        lambda plaintext: gcm.encrypt(nonce, plaintext, CONTEXT),
        lambda token: gcm.decrypt(nonce, token, CONTEXT),
    )


def tink() -> Peer:
    library = importlib.import_module("tink")
    aead = importlib.import_module("tink.aead")
    aead.register()
    handle = library.new_keyset_handle(aead.aead_key_templates.AES256_GCM)
    cipher = handle.primitive(aead.Aead)
    return Peer(
        TINK,
        lambda plaintext: cipher.encrypt(plaintext, CONTEXT),
        lambda token: cipher.decrypt(token, CONTEXT),
    )


def fernet() -> Peer:
    cipher = Fernet(Fernet.generate_key())
    return Peer(FERNET, cipher.encrypt, cipher.decrypt)


def sqlalchemy_utils() -> Peer:
    types = importlib.import_module("sqlalchemy_utils.types.encrypted.encrypted_type")
    engine = types.AesGcmEngine()
    # What its column type does once per column.
    engine._update_key(base64.b64encode(os.urandom(32)).decode())  # noqa: SLF001 - no other way
    return Peer(SQLALCHEMY_UTILS, engine.encrypt, engine.decrypt, of_text=True)


def esdk() -> Peer:
    """Return the SDK with a local key: no service is asked, and no signature is made."""
    sdk = importlib.import_module("aws_encryption_sdk")
    raw = importlib.import_module("aws_encryption_sdk.key_providers.raw")
    names = importlib.import_module("aws_encryption_sdk.identifiers")
    wrapping = importlib.import_module("aws_encryption_sdk.internal.crypto.wrapping_keys")
    key = wrapping.WrappingKey(
        wrapping_algorithm=names.WrappingAlgorithm.AES_256_GCM_IV12_TAG16_NO_PADDING,
        wrapping_key=os.urandom(32),
        wrapping_key_type=names.EncryptionKeyType.SYMMETRIC,
    )
    provider_class = type(
        "LocalKey",
        (raw.RawMasterKeyProvider,),
        {"provider_id": "benchmark", "_get_raw_key": lambda _self, _key_id: key},
    )
    provider = provider_class()
    provider.add_master_key("local")
    client = sdk.EncryptionSDKClient()
    algorithm = names.Algorithm.AES_256_GCM_HKDF_SHA512_COMMIT_KEY
    context = {"table": "users", "column": "email"}

    def seal(plaintext: bytes) -> Any:
        return client.encrypt(
            source=plaintext,
            key_provider=provider,
            algorithm=algorithm,
            encryption_context=context,
        )[0]

    return Peer(ESDK, seal, lambda token: client.decrypt(source=token, key_provider=provider)[0])


def installed(*makers: Callable[[], Peer]) -> tuple[list[Peer], list[str]]:
    """Make the peers that are there; also name those that are not."""
    peers, missing = [], []
    for maker in makers:
        try:
            peers.append(maker())
        except ImportError as error:
            missing.append(f"left out: {error.name} is not installed")
    return peers, missing
