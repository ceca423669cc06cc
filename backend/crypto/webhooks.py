"""Signatures of what we send to a webhook, as Standard Webhooks 1.0 describes them."""

import base64
import hashlib
import hmac
from datetime import datetime
from typing import Final

_PREFIX: Final = "whsec_"


def signed_headers(secret: str, message_id: str, at: datetime, body: bytes) -> dict[str, str]:
    """
    Return the headers by which a receiver knows that *body* is ours and new.

    Args:
        secret: As the standard spells it: `whsec_` and base64.
    """
    moment = str(int(at.timestamp()))
    said = b".".join((message_id.encode(), moment.encode(), body))
    digest = hmac.new(_key(secret), said, hashlib.sha256).digest()
    return {
        "webhook-id": message_id,
        "webhook-timestamp": moment,
        "webhook-signature": f"v1,{base64.b64encode(digest).decode()}",
    }


def _key(secret: str) -> bytes:
    # The standard's own libraries take it without padding too.
    bare = secret.removeprefix(_PREFIX).rstrip("=")
    return base64.b64decode(bare + "=" * (-len(bare) % 4), validate=True)
