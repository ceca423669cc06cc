"""
What runs inside a Holdfast process of its own, with its settings from the environment.

`prepare` makes an installation; `people` also gives it people with stays, consents and a password;
`in-clear` opens every encrypted cell in a copy of its database, whose `file` it reads from a JSON
object; `load` and `load-plain` fill a prepared one with bookings, with and without encryption.
Each writes one JSON object.
"""

import json
import sqlite3
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta
from typing import Any, Final
from unittest.mock import patch
from uuid import uuid4

from sqlalchemy import select

from backend.crypto import passwords
from backend.crypto.columns import Encrypted
from backend.crypto.values import Cipher
from backend.db_utils import session_scope
from backend.models import Base, DataConsent, Installation, Role, User
from backend.services.account_service import get_account_service
from backend.services.audit_service import COMMAND_LINE
from backend.services.auth_service import get_auth_service
from backend.services.sample_service import get_sample_service
from backend.services.setup_service import get_setup_service
from backend.settings import get_settings

# One for each of 64 connections.
PEOPLE: Final = 64
STAYS_EACH: Final = 3
CONSENT_EVENTS: Final = 10
# As many as the public data set of hotel bookings that the demo loads.
BOOKINGS: Final = 14_938
_EMAIL: Final = "jane@example.com"
_PASSWORD: Final = "made for one measurement"


def prepare() -> dict[str, Any]:
    get_setup_service().prepare()
    return {}


def people() -> dict[str, Any]:
    prepare()
    # Hashed once: it is made to be slow.
    hashed = passwords.hash_password(_PASSWORD)
    with session_scope() as session:
        get_sample_service().load(session, COMMAND_LINE, guests=PEOPLE, count=PEOPLE * STAYS_EACH)
        users = session.scalars(select(User).where(User.role == Role.USER)).all()
        for user in users:
            user.password_hash, user.is_active = hashed, True
            session.add_all(_consents(user.id))
        found = [{"user_id": user.id, "email": user.email} for user in users]
    return {"people": found, "password": _PASSWORD}


def somebody() -> dict[str, Any]:
    """Give a prepared installation one more person with consents, and return a token of theirs."""
    with session_scope() as session:
        user = get_account_service().create(session, _EMAIL, _PASSWORD, COMMAND_LINE)
        session.add_all(_consents(user.id))
        user_id = user.id
    token = get_auth_service().sign_in(_EMAIL, _PASSWORD).access_token
    return {"user_id": user_id, "token": token}


def _consents(user_id: int) -> Iterator[DataConsent]:
    purposes = get_settings().purposes
    first = datetime.now(UTC) - timedelta(days=CONSENT_EVENTS)
    for number in range(CONSENT_EVENTS):
        yield DataConsent(
            id=uuid4(),
            user_id=user_id,
            purpose=purposes[number % len(purposes)],
            granted=number // len(purposes) % 2 == 0,
            notice_version="2026-11",
            method="self",
            recorded_at=first + timedelta(days=number),
        )


def in_clear() -> dict[str, Any]:
    get_setup_service().open()
    file = json.load(sys.stdin)["file"]
    with session_scope(read_only=True) as session, closing(sqlite3.connect(file)) as copy, copy:
        for table in Base.metadata.sorted_tables:
            sealed = [column for column in table.columns if isinstance(column.type, Encrypted)]
            # The installation's own keys are nobody's data.
            if not sealed or table.name == Installation.__tablename__:
                continue
            keys = list(table.primary_key)
            cells = ", ".join(f"{column.name} = ?" for column in sealed)
            where = " AND ".join(f"{column.name} = ?" for column in keys)
            update = f"UPDATE {table.name} SET {cells} WHERE {where}"  # noqa: S608 - our own names
            for row in session.execute(select(*sealed, *keys)):
                copy.execute(update, [None if value is None else str(value) for value in row])
        copy.execute("CREATE UNIQUE INDEX users_email ON users (email)")
    return {}


def load() -> dict[str, Any]:
    get_setup_service().open()
    cpu, started = time.process_time(), time.perf_counter()
    with session_scope() as session:
        loaded = get_sample_service().load(session, COMMAND_LINE, count=BOOKINGS)
    return {
        "seconds": time.perf_counter() - started,
        "cpu_seconds": time.process_time() - cpu,
        "bookings": loaded.bookings,
    }


def load_plain() -> dict[str, Any]:
    with patch.object(Cipher, "seal_text", lambda _cipher, plaintext: plaintext.decode()):
        return load()


_TASKS: Final[dict[str, Callable[[], dict[str, Any]]]] = {
    "prepare": prepare,
    "people": people,
    "in-clear": in_clear,
    "load": load,
    "load-plain": load_plain,
}


if __name__ == "__main__":
    json.dump(_TASKS[sys.argv[1]](), sys.stdout)
