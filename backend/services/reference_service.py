"""References to people under the installation's own key, read from the database they stand in."""

from uuid import UUID

from sqlalchemy import select
from sqlalchemy.orm import Session

from backend.crypto.references import address_reference, reference
from backend.errors import ConfigurationError
from backend.models import IDENTITY_INDEXES, Installation
from backend.privacy.declarations import Identity

_CACHE = "reference_key"


def reference_to(session: Session, uid: UUID) -> str:
    """
    Return the reference of the person *uid* in the database of *session*.

    Raises:
        ConfigurationError: The database was not prepared.
    """
    return reference(_key(session), uid)


def reference_to_address(session: Session, identity: Identity, address: str) -> str:
    """
    Return the reference of whoever *address*, in any spelling, belongs to.

    Raises:
        ConfigurationError: The database was not prepared.
    """
    return address_reference(_key(session), identity, IDENTITY_INDEXES[identity].spelled(address))


def _key(session: Session) -> bytes:
    key: bytes | None = session.info.get(_CACHE)
    if key is None:
        key = session.scalar(select(Installation.reference_key))
        if key is None:
            raise ConfigurationError("the database was not prepared: run `python db_cli.py init`")
        session.info[_CACHE] = key
    return key
