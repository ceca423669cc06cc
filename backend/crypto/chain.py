"""
The audit trail's chain: each event has a link, keyed over the link before it and all that it says.

Whoever has the database without the key can change events, but make no link that fits.

The link of an event: HMAC-SHA256 over the 32 bytes of the link before it (zeros before the first)
and the event: its number (8 bytes) | microseconds since 1970, UTC (8 bytes) | action,
outcome, actor, subject, request and detail in plain, each as its length (4 bytes) and UTF-8, and
where there is none as FF FF FF FF. Numbers are big-endian and signed, lengths are not.

The keys come from the installation's own reference key, so that rotating encryption keys leaves
the chain as it is.
"""

import hmac
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import Final, NamedTuple

from backend.crypto.keyring import RootKey

START: Final = bytes(32)
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND: Final = timedelta(microseconds=1)
_NONE: Final = b"\xff\xff\xff\xff"
_CHAIN_ID_BYTES: Final = 8
NUMBER_BYTES: Final = 8


class Event(NamedTuple):
    """One event of the trail, with its detail in plain: what a link is made over."""

    id: int
    at: datetime
    action: str
    outcome: str
    actor_ref: str
    subject_ref: str | None
    request_id: str | None
    detail: str | None


@dataclass(frozen=True, slots=True)
class ChainKeys:
    """
    What one installation's chain needs.

    Attributes:
        chain_id: Tells the chain from another installation's; 16 hex characters.
        older: Key of the digest over the events of before the chain.
        signing: Private key of the checkpoints.
    """

    chain_id: str
    link: bytes = field(repr=False)
    older: bytes = field(repr=False)
    signing: bytes = field(repr=False)


@lru_cache(maxsize=4)
def chain_keys(reference_key: bytes) -> ChainKeys:
    """Derive the keys of the installation that has *reference_key*."""
    root = RootKey(reference_key)
    return ChainKeys(
        root.derive("audit chain id", size=_CHAIN_ID_BYTES).hex(),
        root.derive("audit chain"),
        root.derive("audit events of before the chain"),
        root.derive("audit checkpoint"),
    )


def canonical(event: Event) -> bytes:
    """
    Spell *event* as bytes; no two events have the same.

    Raises:
        ValueError: A text cannot be UTF-8, or the number has more than 8 bytes.
    """
    since = (event.at - _EPOCH) // _MICROSECOND
    try:
        head = b"".join(n.to_bytes(NUMBER_BYTES, "big", signed=True) for n in (event.id, since))
    except OverflowError as err:
        raise ValueError("a number that no event has") from err
    return head + b"".join(map(_spell, event[2:]))


def link(key: bytes, previous: bytes, spelled: bytes) -> bytes:
    """Return the link of the event that is *spelled* so, after one whose link is *previous*."""
    return hmac.digest(key, previous + spelled, "sha256")


def _spell(text: str | None) -> bytes:
    if text is None:
        return _NONE
    raw = text.encode()
    return len(raw).to_bytes(4, "big") + raw
