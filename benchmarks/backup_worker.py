"""
What runs inside a Holdfast process of its own to measure backups.

Reads one JSON object and writes another. `prepare` makes an installation and fills it; `read`
reads a backup whole; `sign_in` makes a person with consents, an admin, and a token of each.
"""

import json
import sys
from collections.abc import Callable
from typing import Any, Final
from uuid import UUID

from backend.db_utils import session_scope
from backend.models import Role
from backend.services.account_service import get_account_service
from backend.services.archive_service import get_archive_service
from backend.services.audit_service import COMMAND_LINE
from backend.services.auth_service import get_auth_service
from backend.services.setup_service import get_setup_service
from benchmarks import backup_rows as rows
from benchmarks.installation import somebody
from benchmarks.processes import MIB

_ADMIN: Final = "operator@example.com"
_PASSWORD: Final = "made for one measurement"


def prepare(order: dict[str, Any]) -> dict[str, Any]:
    get_setup_service().prepare()
    counts = rows.fill(order["mib"])
    with rows.unmeasured() as connection:
        return {"rows": counts, "mib": rows.size_bytes(connection) / MIB}


def read(order: dict[str, Any]) -> dict[str, Any]:
    get_setup_service().open()
    archives = get_archive_service()
    archives.read_through(archives.manifest(UUID(order["backup_id"])))
    return {}


def sign_in(_order: dict[str, Any]) -> dict[str, Any]:
    get_setup_service().open()
    person = somebody()
    with session_scope() as session:
        get_account_service().create(session, _ADMIN, _PASSWORD, COMMAND_LINE, Role.ADMIN)
    return person | {"admin_token": get_auth_service().sign_in(_ADMIN, _PASSWORD).access_token}


_TASKS: Final[dict[str, Callable[[dict[str, Any]], dict[str, Any]]]] = {
    "prepare": prepare,
    "read": read,
    "sign_in": sign_in,
}


if __name__ == "__main__":
    order = json.load(sys.stdin)
    json.dump(_TASKS[order["task"]](order), sys.stdout)
