"""What each encryption key still protects: values by column, index terms, ledger, backups."""

import base64
from collections import Counter
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Final

from sqlalchemy import Column, Text, func, select, type_coerce
from sqlalchemy.orm import Session

from backend.crypto import keyring
from backend.crypto.blind_index import TERM_PREFIX
from backend.crypto.columns import Encrypted
from backend.crypto.keyring import KEY_ID_BYTES
from backend.crypto.values import TEXT_PREFIX
from backend.models import BLIND_INDEXES, DATA_MAP, EncryptionKey
from backend.services.cluster_service import get_cluster_service
from backend.services.ledger_service import sealed_with
from backend.services.store_service import claimed_by_backups

# NIST SP 800-38D, 8.3: at most 2**32 messages per key with random nonces.
MESSAGE_LIMIT: Final = 2**32
# So many characters of base64url hold version and key id, and key id alone.
_TOKEN_CHARS: Final = 7
_TERM_CHARS: Final = 6


@dataclass(slots=True)
class KeyUse:
    """How much one key protects."""

    columns: dict[str, int] = field(default_factory=dict)
    terms: dict[str, int] = field(default_factory=dict)
    ledger: int = 0
    backups: int = 0

    @property
    def total(self) -> int:
        counted = sum(self.columns.values()) + sum(self.terms.values())
        return counted + self.ledger + self.backups

    @property
    def words(self) -> str:
        parts = (
            (sum(self.columns.values()), "values"),
            (sum(self.terms.values()), "index terms"),
            (self.ledger, "ledger entries"),
            (self.backups, "backups"),
        )
        return ", ".join(f"{count} {what}" for count, what in parts if count) or "nothing"

    @property
    def limit_used(self) -> float:
        """The fullest column's share of the messages that one key may seal."""
        return max(self.columns.values(), default=0) / MESSAGE_LIMIT


class KeyUseService:
    """Counts, in the database and the store, what each key is needed for."""

    def uses(self, session: Session) -> dict[str, KeyUse]:
        """Return the use of every key that is known, configured or found, by key id."""
        ids = set(session.scalars(select(EncryptionKey.key_id)))
        ids |= {key.key_id.hex() for key in keyring.current().keys}
        found = {key_id: KeyUse() for key_id in sorted(ids)}
        for mapped in DATA_MAP.tables:
            for column in mapped.table.columns:
                if isinstance(column.type, Encrypted):
                    for key_id, count in _counts(session, column, TEXT_PREFIX).items():
                        found.setdefault(key_id, KeyUse()).columns[_name(column)] = count
        for indexed in BLIND_INDEXES:
            for key_id, count in _counts(session, indexed.index_column, TERM_PREFIX).items():
                found.setdefault(key_id, KeyUse()).terms[_name(indexed.index_column)] = count
        for key_id, count in Counter(key_id for _, _, key_id in sealed_with()).items():
            found.setdefault(key_id, KeyUse()).ledger = count
        needed = Counter(key_id for ids in claimed_by_backups().values() for key_id in ids)
        for key_id, count in needed.items():
            found.setdefault(key_id, KeyUse()).backups = count
        if repository_key := get_cluster_service().key_id():
            # The passphrase of pgBackRest's repository: without it no backup there opens.
            found.setdefault(repository_key, KeyUse()).backups += 1
        return found

    def status(self, session: Session) -> dict[str, Any]:
        """Say per key what it protects, how near its limit it is, and whether it may go."""
        primary = keyring.current().primary.key_id.hex()
        rows = {row.key_id: row for row in session.scalars(select(EncryptionKey))}
        disabled = {key_id for key_id, row in rows.items() if row.disabled_at is not None}
        configured = {key.key_id.hex() for key in keyring.current().keys}
        return {
            "primary": primary,
            "message_limit": MESSAGE_LIMIT,
            "keys": [
                {
                    "key_id": key_id,
                    "state": _state(key_id, primary, configured, disabled),
                    "values": sum(use.columns.values()),
                    "columns": use.columns,
                    "index_terms": sum(use.terms.values()),
                    "ledger_entries": use.ledger,
                    "backups": use.backups,
                    "limit_used": use.limit_used,
                    "may_be_disabled": key_id not in {primary, *disabled} and not use.total,
                }
                for key_id, use in self.uses(session).items()
            ],
        }


def _state(key_id: str, primary: str, configured: set[str], disabled: set[str]) -> str:
    if key_id in disabled:
        return "disabled"
    if key_id == primary:
        return "primary"
    return "previous" if key_id in configured else "missing"


def _counts(session: Session, column: Column[Any], prefix: str) -> dict[str, int]:
    """Count the cells of *column* per key id, read from what they begin with."""
    chars = _TOKEN_CHARS if prefix == TEXT_PREFIX else _TERM_CHARS
    raw = type_coerce(column, Text)
    head = func.substr(raw, 1, len(prefix) + chars)
    counts: Counter[str] = Counter()
    statement = select(head, func.count()).where(raw.startswith(prefix)).group_by(head)
    for text, count in session.execute(statement):
        packed = base64.urlsafe_b64decode(text[len(prefix) :].ljust(8, "A"))
        start = 1 if prefix == TEXT_PREFIX else 0
        counts[packed[start : start + KEY_ID_BYTES].hex()] += count
    return dict(counts)


def _name(column: Column[Any]) -> str:
    return f"{column.table.name}.{column.name}"


@lru_cache(maxsize=1)
def get_key_use_service() -> KeyUseService:
    return KeyUseService()
