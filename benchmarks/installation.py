"""
What runs inside a Holdfast process of its own, with its settings from the environment.

`prepare` makes an installation; `consents` also gives it a person, their consent history and a
token; `load` and `load-plain` fill a prepared one with bookings, with and without encryption.
Each writes one JSON object.
"""

import json
import sys
import time
from collections.abc import Callable
from typing import Any, Final
from unittest.mock import patch

from backend.crypto.values import Cipher
from backend.db_utils import session_scope
from backend.services.audit_service import COMMAND_LINE, Actor
from backend.services.auth_service import get_auth_service
from backend.services.consent_service import get_consent_service
from backend.services.sample_service import get_sample_service
from backend.services.setup_service import get_setup_service
from backend.settings import get_settings

CONSENT_EVENTS: Final = 10
# As many as the public data set of hotel bookings that the demo loads.
BOOKINGS: Final = 14_938
_EMAIL: Final = "jane@example.com"
_PASSWORD: Final = "made for one measurement"


def prepare() -> dict[str, Any]:
    get_setup_service().prepare()
    return {}


def consents() -> dict[str, Any]:
    prepare()
    purposes = get_settings().purposes
    with session_scope() as session:
        user = get_auth_service().create_user(session, _EMAIL, _PASSWORD, COMMAND_LINE)
        user_id, actor = user.id, Actor("benchmark", user.role, user.id)
    for number in range(CONSENT_EVENTS):
        with session_scope() as session:
            get_consent_service().record(
                session,
                actor,
                user_id,
                purpose=purposes[number % len(purposes)],
                granted=number // len(purposes) % 2 == 0,
                notice_version="2026-11",
            )
    token = get_auth_service().sign_in(_EMAIL, _PASSWORD, None)
    return {"user_id": user_id, "token": token}


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
    "consents": consents,
    "load": load,
    "load-plain": load_plain,
}


if __name__ == "__main__":
    json.dump(_TASKS[sys.argv[1]](), sys.stdout)
