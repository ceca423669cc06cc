"""References to people under the installation's own key, read from the database they stand in."""

from uuid import UUID

from sqlalchemy import select
from sqlalchemy.orm import Session

from backend.crypto.references import reference
from backend.errors import ConfigurationError
from backend.models import Installation

_CACHE = "reference_key"


def reference_to(session: Session, uid: UUID) -> str:
    """
    Return the reference of the person *uid* in the database of *session*.

    Raises:
        ConfigurationError: The database was not prepared.
    """
    key = session.info.get(_CACHE)
    if key is None:
        key = session.scalar(select(Installation.reference_key))
        if key is None:
            raise ConfigurationError("the database was not prepared: run `python db_cli.py init`")
        session.info[_CACHE] = key
    return reference(key, uid)
