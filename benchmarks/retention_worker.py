"""
What runs inside a Holdfast process of its own to measure retention.

Reads one JSON object (`task` and what it takes) and writes another. `prepare` makes an
installation; `retire` fills a table with due rows and takes the time of their end, by the service
or by SQL written by hand in batches; `count` takes that of a dry run and of the counting query.
"""

# ruff: noqa: S608 - Names and values of our own, none of them a stranger's.

import json
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from sqlalchemy import Connection, CursorResult, DateTime, bindparam, text

from backend.db_utils import get_engine, session_scope
from backend.models import Role
from backend.services.account_service import get_account_service
from backend.services.audit_service import COMMAND_LINE
from backend.services.auth_service import get_auth_service
from backend.services.pace import Pace
from backend.services.retention_service import get_retention_service
from backend.services.setup_service import get_setup_service
from backend.settings import RetentionAction, get_settings
from benchmarks import privacy_rows as rows
from benchmarks.installation import somebody
from benchmarks.memory import begin_memory, peak_mib

_DATA_TYPE: Final = "feedback"
_BATCH: Final = Pace.MOST
_ADMIN: Final = "operator@example.com"
_PASSWORD: Final = "made for one measurement"
_NULLED: Final = ("user_id", "booking_id", "comment", "staff_response", "ip_address")
_MONTH: Final = {
    "sqlite": "strftime('%Y-%m-01 00:00:00.000000', submitted_at)",
    "postgresql": "date_trunc('month', submitted_at AT TIME ZONE 'UTC') AT TIME ZONE 'UTC'",
}


def prepare(_order: dict[str, Any]) -> dict[str, Any]:
    get_setup_service().prepare()
    person = somebody()
    with session_scope() as session:
        get_account_service().create(session, _ADMIN, _PASSWORD, COMMAND_LINE, Role.ADMIN)
    return person | {"admin_token": get_auth_service().sign_in(_ADMIN, _PASSWORD).access_token}


def fill(order: dict[str, Any]) -> dict[str, Any]:
    get_setup_service().open()
    rows.fill_feedback(order["rows"])
    return {}


def retire(order: dict[str, Any]) -> dict[str, Any]:
    """Seconds, rows, and how much memory more was held, of the service or of SQL by hand."""
    fill(order)
    act = _by_hand if order["by_hand"] else _by_service(_tried().plan_digest)
    before, started = begin_memory(), time.perf_counter()
    done = act()
    return {
        "seconds": time.perf_counter() - started,
        "rows": done,
        "growth_mib": peak_mib() - before,
    }


def count(order: dict[str, Any]) -> dict[str, Any]:
    """Seconds of a dry run and of the counting query, in turns; nothing is due any less."""
    fill(order)
    calls: dict[str, Callable[[], int]] = {
        "holdfast": lambda: _tried().affected,
        "counting": _count,
    }
    found: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(order["rounds"] + 1):
        said = set()
        for name, call in calls.items():
            started = time.perf_counter()
            said.add(call())
            if number:
                found[name].append(time.perf_counter() - started)
        if len(said) > 1:
            raise RuntimeError(f"the two count differently: {said}")
    return found


def _tried() -> Any:
    return get_retention_service().apply(COMMAND_LINE, dry_run=True, data_type=_DATA_TYPE)


def _by_service(plan_digest: str) -> Callable[[], int]:
    def apply() -> int:
        run = get_retention_service().apply(
            COMMAND_LINE, dry_run=False, data_type=_DATA_TYPE, plan_digest=plan_digest
        )
        return run.affected

    return apply


def _by_hand() -> int:
    """End the due rows in the order of their keys, a transaction for each batch."""
    due, params = _due()
    batch = f"SELECT id FROM feedback WHERE id > :last AND {due} ORDER BY id LIMIT {_BATCH}"
    if get_settings().retention_feedback_action is RetentionAction.DELETE:
        act = "DELETE FROM feedback"
    else:
        nulled = ", ".join(f"{column} = NULL" for column in _NULLED)
        month = _MONTH[get_engine().dialect.name]
        act = f"UPDATE feedback SET {nulled}, submitted_at = {month}, anonymized_at = :cutoff"
    act += f" WHERE id > :last AND id <= :until AND {due}"
    last, done = 0, 0
    while True:
        with get_engine().connect() as connection:
            values = params | {"last": last}
            until = _run(connection, f"SELECT max(id) FROM ({batch}) AS batch", values).scalar()
            if until is None:
                return done
            done += _run(connection, act, values | {"until": until}).rowcount
            connection.commit()
            last = until


def _count() -> int:
    due, params = _due()
    with get_engine().connect() as connection:
        counted = _run(connection, f"SELECT count(*) FROM feedback WHERE {due}", params)
        return int(counted.scalar_one())


def _due() -> tuple[str, dict[str, Any]]:
    cutoff = datetime.now(UTC) - timedelta(days=get_settings().retention_feedback_days)
    due = "submitted_at <= :cutoff"
    if get_settings().retention_feedback_action is RetentionAction.ANONYMIZE:
        due += " AND anonymized_at IS NULL"
    is_sqlite = get_engine().dialect.name == "sqlite"
    return due, {"cutoff": cutoff.replace(tzinfo=None) if is_sqlite else cutoff}


def _run(connection: Connection, statement: str, values: dict[str, Any]) -> CursorResult[Any]:
    # As the driver of SQLite stores times.
    cutoff = bindparam("cutoff", type_=DateTime(timezone=True))
    return connection.execute(text(statement).bindparams(cutoff), values)


_TASKS: Final[dict[str, Callable[[dict[str, Any]], dict[str, Any]]]] = {
    "prepare": prepare,
    "fill": fill,
    "retire": retire,
    "count": count,
}


if __name__ == "__main__":
    order = json.load(sys.stdin)
    json.dump(_TASKS[order["task"]](order), sys.stdout)
