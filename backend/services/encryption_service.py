"""Encryption at rest: loading the keys, proving that they fit the data, and using them."""

import base64
import os
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

import structlog
from sqlalchemy import ColumnElement, func, inspect, select, update
from sqlalchemy.orm import Session

from backend.backup import archive
from backend.backup.storage import LocalStore
from backend.crypto import keyring
from backend.crypto.columns import Encrypted
from backend.crypto.files import KeyringLock
from backend.crypto.keyring import KEY_BYTES, Keyring, RootKey, parse_key
from backend.crypto.values import TEXT_PREFIX, VERSION, encode_token, value_scope
from backend.db_utils import database_may_exist, get_engine, session_scope
from backend.errors import ConfigurationError, ConflictError, KeyFormatError
from backend.models import DATA_MAP, EncryptionKey
from backend.services import ledger_service
from backend.services.ledger_service import store
from backend.settings import Settings, get_settings

log = structlog.get_logger(__name__)
KEY_FILE: Final = "encryption.key"
# NIST SP 800-38D, 8.3: at most 2**32 messages per key with random nonces.
MESSAGE_LIMIT: Final = 2**32


class EncryptionService:
    """Seals and opens values with the keys of this process."""

    def encrypt(self, text: str, context: str = "") -> str:
        """
        Encrypt *text* to an `enc1.` token that opens only with the same *context*.

        Raises:
            ConfigurationError: No key is configured.
        """
        return self._keys().cipher(value_scope(context)).seal_text(text.encode())

    def decrypt(self, token: str, context: str = "") -> str:
        """
        Decrypt an `enc1.` token.

        Raises:
            CryptoError: Unknown key, changed or moved, malformed, or not encrypted: one class each.
        """
        return self._keys().cipher(value_scope(context)).open_text(token).decode()

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
        known = {row.key_id: row for row in session.scalars(select(EncryptionKey))}
        if missing := sorted(set(known) - set(keys)):
            raise ConfigurationError(
                f"the data needs encryption key {', '.join(missing)}; "
                f"configured: {', '.join(sorted(keys))}"
            )
        for key_id, row in known.items():
            if keys[key_id].check_value.hex() != row.check_value:
                raise ConfigurationError(f"the configured key {key_id} is not the data's key")

    def enter_primary(self, session: Session) -> None:
        """Note that the primary key now seals data here; none is ever dropped by this."""
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

    def status(self, session: Session) -> dict[str, Any]:
        """Say per key and encrypted column how many values it protects."""
        return {
            "primary": self._keys().primary.key_id.hex(),
            "message_limit": MESSAGE_LIMIT,
            "keys": [self._key_status(session, key) for key in self._keys().keys],
        }

    def _key_status(self, session: Session, key: RootKey) -> dict[str, Any]:
        columns: dict[str, int] = {}
        for mapped in DATA_MAP.tables:
            sealed = [c for c in mapped.table.columns if isinstance(c.type, Encrypted)]
            if not sealed:
                continue
            counts = session.execute(
                select(*(func.count().filter(_sealed_with(c, key)) for c in sealed))
            ).one()
            columns |= {
                f"{mapped.name}.{column.name}": count
                for column, count in zip(sealed, counts, strict=True)
            }
        total = sum(columns.values())
        return {
            "key_id": key.key_id.hex(),
            "state": "primary" if key is self._keys().primary else "previous",
            "values": total,
            "columns": columns,
        }

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
        ids = archive.claimed_key_ids(store()) | ledger_service.claimed_key_ids()
        engine = get_engine() if database_may_exist() else None
        if engine is not None and inspect(engine).has_table(EncryptionKey.__tablename__):
            with session_scope(engine, read_only=True) as session:
                ids.update(session.scalars(select(EncryptionKey.key_id)))
        return f"; the data needs key {', '.join(sorted(ids))}" if ids else ""


def _root_key(source: str, text: str) -> RootKey:
    try:
        return RootKey(parse_key(text))
    except KeyFormatError as err:
        raise KeyFormatError(f"{source}: {err.detail}") from None


def _sealed_with(column: ColumnElement[Any], key: RootKey) -> ColumnElement[bool]:
    # Version and key id are 40 bits, so 6 characters and 4 bits of the seventh: four prefixes.
    head = VERSION + key.key_id
    size = len(TEXT_PREFIX) + 7
    prefixes = [encode_token(head + bytes([tail << 6]))[:size] for tail in range(4)]
    return func.substr(column, 1, size).in_(prefixes)


def read_secret(path: Path) -> str | None:
    """
    Read a file that `write_secret` wrote; `None` where there is none.

    Raises:
        ConfigurationError: It is empty or no text.
    """
    try:
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
