"""
Checkpoints of the audit trail: signed notes, kept elsewhere, of how far it went and how it ended.

A checkpoint is one JSON document:

    {"format": "holdfast-audit-checkpoint", "version": 1, "statement": {...},
     "signature": {"algorithm": "Ed25519", "public_key": "ed25519:...", "value": BASE64URL}}

What is signed: the line `holdfast-audit-checkpoint/1` and a line feed, then the canonical form
(RFC 8785) of `statement`.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

from backend.crypto import signing
from backend.crypto.certificates import CertificateRefusedError, canonical
from backend.errors import RefusedError

FORMAT: Final = "holdfast-audit-checkpoint"
VERSION: Final = 1
MAX_BYTES: Final = 4096
_CONTEXT: Final = f"{FORMAT}/{VERSION}\n".encode()


class CheckpointRefusedError(RefusedError):
    """This is no checkpoint that the key has signed."""

    code, title = "checkpoint_refused", "The checkpoint was refused"


class ForeignCheckpointError(CheckpointRefusedError):
    """Another key has signed it."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """
    How the trail ended at one moment.

    Attributes:
        chain_id: Whose trail.
        event_id: Its last event, and *link* the link of that.
        at: When the checkpoint was made.
        previous: The checkpoint before: its `event_id`, `at` and `digest`.
    """

    chain_id: str
    event_id: int
    link: str
    at: datetime
    previous: Mapping[str, Any] | None

    @property
    def digest(self) -> str:
        """What the next checkpoint names this one by."""
        return hashlib.sha256(_signed(self._statement())).hexdigest()

    def reference(self) -> dict[str, Any]:
        """What the next checkpoint says of this one."""
        return {"event_id": self.event_id, "at": self.at.isoformat(), "digest": self.digest}

    def document(self, private_key: bytes) -> bytes:
        """Spell it with its signature."""
        statement = self._statement()
        signature = {
            "algorithm": "Ed25519",
            "public_key": signing.spell_public_key(signing.public_key_of(private_key)),
            "value": signing.to_base64url(signing.sign(_signed(statement), private_key)),
        }
        body = {"format": FORMAT, "version": VERSION, "statement": statement}
        return json.dumps(body | {"signature": signature}, indent=1).encode() + b"\n"

    def _statement(self) -> dict[str, Any]:
        return {
            "chain_id": self.chain_id,
            "event_id": self.event_id,
            "link": self.link,
            "at": self.at.isoformat(),
            "previous": self.previous,
        }


def read_checkpoint(document: bytes, public_key: bytes) -> Checkpoint:
    """
    Return what *document* says, once it is known that it was signed for *public_key*.

    Raises:
        ForeignCheckpointError: Another key has signed it.
        CheckpointRefusedError: It is no checkpoint, or was changed.
    """
    refused = CheckpointRefusedError("this is no checkpoint, or it was changed")
    try:
        found = json.loads(document)
        statement, said = found["statement"], found["signature"]
        if (found["format"], found["version"]) != (FORMAT, VERSION):
            raise refused
        signer = signing.parse_public_key(said["public_key"])
        value = signing.from_base64url(said["value"], signing.SIGNATURE_BYTES)
        signing.verify(_signed(statement), value, signer)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, RefusedError):
        raise refused from None
    if signer != public_key:
        raise ForeignCheckpointError(f"the checkpoint is by key {signing.key_id(signer)}")
    return Checkpoint(**statement | {"at": datetime.fromisoformat(statement["at"])})


def _signed(statement: Any) -> bytes:
    try:
        return _CONTEXT + canonical(statement)
    except CertificateRefusedError as err:
        raise CheckpointRefusedError("this is no statement of a checkpoint") from err
