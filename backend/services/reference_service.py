"""What hangs on the installation's own key, read from the database: references, and the chain."""

from typing import Final
from uuid import UUID

from sqlalchemy import select
from sqlalchemy.orm import Session

from backend.crypto.chain import ChainKeys, chain_keys
from backend.crypto.references import address_reference, reference
from backend.errors import ConfigurationError
from backend.models import IDENTITY_INDEXES, Installation
from backend.privacy.declarations import Identity

_CACHE: Final = "reference_key"
# Built once, for nearly every act asks for it.
_REFERENCE_KEY: Final = select(Installation.__table__.c.reference_key)


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


def chain_keys_of(session: Session) -> ChainKeys:
    """
    Return the keys of the audit trail in the database of *session*.

    Raises:
        ConfigurationError: The database was not prepared.
    """
    return chain_keys(_key(session))


def _key(session: Session) -> bytes:
    key: bytes | None = session.info.get(_CACHE)
    if key is None:
        key = session.connection().scalar(_REFERENCE_KEY)
        if key is None:
            raise ConfigurationError("the database was not prepared: run `python db_cli.py init`")
        session.info[_CACHE] = key
    return key
