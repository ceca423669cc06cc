"""Encryption keys: a fresh one, and what the present ones protect."""

from fastapi import APIRouter
from pydantic import Field

from backend.api import examples
from backend.api.access import AdminActor, ObserverActor
from backend.api.bodies import StrictRoute
from backend.api.dependencies import Answer, ReadSession
from backend.api.problems import problems
from backend.services.encryption_service import get_encryption_service
from backend.services.key_use_service import get_key_use_service

router = APIRouter(prefix="/security/encryption", tags=["encryption"], route_class=StrictRoute)


class KeyAnswer(Answer):
    key: str = Field(
        repr=False, description="Base64 of 32 random bytes, for ENCRYPTION_KEY; stored nowhere."
    )


class KeyStatus(Answer):
    key_id: str
    state: str = Field(
        description="`primary` seals and opens, `previous` only opens, `disabled` does neither, "
        "`missing` is not configured."
    )
    values: int = Field(description="Values sealed with it, in all columns.")
    columns: dict[str, int]
    index_terms: int = Field(description="Blind index terms made with it.")
    ledger_entries: int
    backups: int = Field(description="Stored backups that need it.")
    limit_used: float = Field(description="The fullest column's share of `message_limit`.")
    may_be_disabled: bool


class EncryptionStatus(Answer, json_schema_extra=examples.of(examples.KEY_STATUS)):
    primary: str
    message_limit: int = Field(description="Most values per key and column (SP 800-38D, 8.3).")
    keys: list[KeyStatus]


@router.get("/key/generate", responses=problems(401, 403))
def generate_key(_actor: AdminActor) -> KeyAnswer:
    """Make a fresh key; it is shown here and stored nowhere."""
    return KeyAnswer(key=get_encryption_service().generate_key())


@router.get("/status", responses=problems(401, 403))
def encryption_status(session: ReadSession, _actor: ObserverActor) -> EncryptionStatus:
    """Show the known keys and what each still protects."""
    return EncryptionStatus.model_validate(get_key_use_service().status(session))
