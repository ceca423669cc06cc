"""Encryption at rest: loading the keys, proving that they fit the data, and using them."""

import base64
import os
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Final, overload

import structlog
from sqlalchemy import inspect, select, update
from sqlalchemy.orm import Session

from backend.backup.storage import LocalStore
from backend.crypto import keyring
from backend.crypto.codecs import encode_text
from backend.crypto.files import KeyringLock
from backend.crypto.key_services import KeyServices, is_wrapped, unwrap
from backend.crypto.keyring import KEY_BYTES, Keyring, RootKey, parse_key
from backend.crypto.values import Cipher, value_scope
from backend.db_utils import database_may_exist, get_engine, session_scope
from backend.errors import (
    ConfigurationError,
    ConflictError,
    KeyFormatError,
    MalformedTokenError,
)
from backend.models import EncryptionKey
from backend.services import ledger_service
from backend.services.store_service import claimed_by_backups
from backend.settings import Settings, get_settings

log = structlog.get_logger(__name__)
KEY_FILE: Final = "encryption.key"


class EncryptionService:
    """Seals and opens values with the keys of this process."""

    @overload
    def encrypt(self, value: str, context: str = "") -> str: ...

    @overload
    def encrypt(self, value: bytes, context: str = "") -> bytes: ...

    def encrypt(self, value: str | bytes, context: str = "") -> str | bytes:
        """
        Encrypt *value* so that it opens only with the same *context*.

        Returns:
            For text an `enc1.` token as text; for bytes the token's bytes, 33 more than *value*.

        Raises:
            ConfigurationError: No key is configured.
            UnencodableError: Neither text nor bytes, or text with a lone surrogate.
            ValueTooLongError: More than 2**31 - 1 bytes.
        """
        cipher = self._cipher(context)
        if isinstance(value, bytes):
            return cipher.seal(value)
        return cipher.seal_text(encode_text(value))

    @overload
    def decrypt(self, token: str, context: str = "") -> str: ...

    @overload
    def decrypt(self, token: bytes, context: str = "") -> bytes: ...

    def decrypt(self, token: str | bytes, context: str = "") -> str | bytes:
        """
        Decrypt what `encrypt` returned: text from a text token, bytes from a bytes token.

        Raises:
            CryptoError: Unknown or disabled key, changed or moved, malformed, or not encrypted:
                one class each.
        """
        cipher = self._cipher(context)
        match token:
            case bytes():
                return cipher.open(token)
            case str():
                return _text(cipher.open_text(token))
            case _:
                raise MalformedTokenError("an encrypted value is text or bytes")

    def _cipher(self, context: str) -> Cipher:
        encode_text(context)
        return self._keys().cipher(value_scope(context))

    def file_lock(self) -> KeyringLock:
        """The lock that files of this service open with."""
        return KeyringLock(self._keys())

    def generate_key(self) -> str:
        """Return a fresh key as base64 of 32 random bytes; it is stored nowhere."""
        return base64.b64encode(os.urandom(KEY_BYTES)).decode()

    def find(self) -> Keyring | None:
        """
        Read the configured keys and make nothing.

        Returns:
            `None` in development where there is no key yet and no data needs one.

        Raises:
            ConfigurationError: A key is malformed, missing in production, or missing although
                data exists; the message says which key id is expected.
        """
        settings = get_settings()
        given = settings.encryption_key
        primary = (
            _root_key("ENCRYPTION_KEY", given.get_secret_value())
            if given is not None
            else self._stored_key(settings)
        )
        listed = settings.encryption_keys_previous
        previous = [
            _root_key("ENCRYPTION_KEYS_PREVIOUS", key)
            for key in (listed.get_secret_value().split(",") if listed else [])
        ]
        return Keyring(primary, previous) if primary else None

    def load(self) -> Keyring:
        """
        Make the configured keys this process's keyring; make a missing one, where `find` may.

        Raises:
            ConfigurationError: As `find`.
        """
        keys = self.find()
        if keys is None:
            path = get_settings().data_dir / KEY_FILE
            if write_secret(path, self.generate_key()):
                log.warning("encryption_key_generated", path=str(path), advice="keep a copy")
            # Another process may have been first: then its key counts.
            return self.load()
        keyring.install(keys)
        return keys

    def check(self, session: Session, configured: Keyring | None = None) -> None:
        """
        Prove that the data of *session* was sealed with keys that we have.

        Args:
            configured: Keys to prove instead of this process's.

        Raises:
            ConfigurationError: A key is wrong or missing; names the key ids.
        """
        keys = {key.key_id.hex(): key for key in (configured or self._keys()).keys}
        rows = session.scalars(select(EncryptionKey))
        known = {row.key_id: row for row in rows if row.disabled_at is None}
        if missing := sorted(set(known) - set(keys)):
            raise ConfigurationError(
                f"the data needs encryption key {', '.join(missing)}; "
                f"configured: {', '.join(sorted(keys))}"
            )
        for key_id, row in known.items():
            if keys[key_id].check_value.hex() != row.check_value:
                raise ConfigurationError(f"the configured key {key_id} is not the data's key")

    def enter_primary(self, session: Session) -> None:
        """Note that the primary key now seals data here, and let go of keys disabled before."""
        disabled = session.scalars(
            select(EncryptionKey.key_id).where(EncryptionKey.disabled_at.is_not(None))
        )
        keyring.install(self._keys().disabling(bytes.fromhex(key_id) for key_id in disabled))
        self.note_primary(session)

    def note_primary(self, session: Session) -> None:
        """Note in the database of *session* that the primary key seals its values."""
        primary = self._keys().primary
        primary_id = primary.key_id.hex()
        if session.get(EncryptionKey, primary_id) is None:
            session.add(
                EncryptionKey(
                    key_id=primary_id,
                    check_value=primary.check_value.hex(),
                    is_primary=True,
                    first_seen_at=datetime.now(UTC),
                )
            )
            session.flush()
        session.execute(update(EncryptionKey).values(is_primary=EncryptionKey.key_id == primary_id))

    def _keys(self) -> Keyring:
        try:
            return keyring.current()
        except ConfigurationError:
            return self.load()

    def _stored_key(self, settings: Settings) -> RootKey | None:
        """Return the development key, if it was made already."""
        if settings.is_production:
            raise ConfigurationError(f"ENCRYPTION_KEY is not set{self._expected_key()}")
        path = settings.data_dir / KEY_FILE
        if text := read_secret(path):
            return _root_key(str(path), text)
        if expected := self._expected_key():
            raise ConfigurationError(f"ENCRYPTION_KEY is not set and {path} is gone{expected}")
        return None

    def _expected_key(self) -> str:
        """Name the keys that existing data and backups need; empty where there are none yet."""
        ids = {key_id for _, _, key_id in ledger_service.sealed_with()}
        ids.update(*claimed_by_backups().values())
        engine = get_engine() if database_may_exist() else None
        if engine is not None and inspect(engine).has_table(EncryptionKey.__tablename__):
            with session_scope(engine, read_only=True) as session:
                rows = select(EncryptionKey.key_id).where(EncryptionKey.disabled_at.is_(None))
                ids.update(session.scalars(rows))
        return f"; the data needs key {', '.join(sorted(ids))}" if ids else ""


def _text(plaintext: bytes) -> str:
    try:
        return plaintext.decode()
    except UnicodeDecodeError:
        # `from None`: the decoder's own error holds the plaintext.
        raise MalformedTokenError("the encrypted value is bytes, not text") from None


def key_services() -> KeyServices:
    """Where the services that open wrapped keys are."""
    settings = get_settings()
    token = settings.vault_token
    return KeyServices(
        vault_addr=settings.vault_addr,
        vault_token=token.get_secret_value() if token else None,
        vault_namespace=settings.vault_namespace,
        vault_cacert=settings.vault_cacert,
        vault_transit_mount=settings.vault_transit_mount,
        vault_transit_key=settings.vault_transit_key,
        aws_region=settings.aws_region,
        aws_endpoint_url=settings.aws_endpoint_url,
        aws_kms_key_id=settings.aws_kms_key_id,
        timeout_seconds=settings.key_service_timeout_seconds,
    )


def _root_key(source: str, text: str) -> RootKey:
    try:
        return RootKey(unwrap(text, key_services()) if is_wrapped(text) else parse_key(text))
    except KeyFormatError as err:
        raise KeyFormatError(f"{source}: {err.detail}") from None


def read_secret(path: Path) -> str | None:
    """
    Read a file that `write_secret` wrote; `None` where there is none.

    Raises:
        ConfigurationError: It is empty or no text, or others may read it.
    """
    try:
        if path.stat().st_mode & 0o077:
            raise ConfigurationError(f"{path} may be read by others: `chmod 600` it")
        text = path.read_text(encoding="ascii").strip()
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError):
        text = ""
    if not text:
        raise ConfigurationError(f"{path} cannot be read: restore it from your copy")
    return text


def write_secret(path: Path, text: str) -> bool:
    """Write a new 0600 file, whole and durable; say whether it is ours or was there already."""
    try:
        with LocalStore(str(path.parent)).create(path.name) as file:
            file.write(text.encode())
    except ConflictError:
        return False
    return True


@lru_cache(maxsize=1)
def get_encryption_service() -> EncryptionService:
    return EncryptionService()
