"""What backups must keep, made short for tests: saving, restoring, erasing, consenting."""

import threading
import time
from collections.abc import Callable
from typing import Any, Final
from uuid import UUID

import pytest
from sqlalchemy import select

from backend.db_utils import session_scope
from backend.models import DATA_MAP, User
from backend.privacy.declarations import EraseMode
from backend.services.audit_service import COMMAND_LINE
from backend.services.backup_service import get_backup_service
from backend.services.compliance_service import get_compliance_service
from backend.services.consent_service import get_consent_service
from backend.services.restore_service import get_restore_service
from backend.services.restored import Restored
from backend.services.setup_service import get_setup_service
from tests.conftest import clear_caches

OF_PEOPLE: Final = [mapped.name for mapped in DATA_MAP.of_people]
# Bounds what never comes; how long a busy machine takes decides nothing.
_PATIENCE_SECONDS: Final = 60


def back_up() -> UUID:
    """Make a backup, and wait until nothing is being copied any more."""
    backup_id = get_backup_service().create(COMMAND_LINE).id
    wait_for_copies()
    return backup_id


def wait_for_copies() -> None:
    """Wait for the threads that copy small objects: whoever started them does not."""
    for thread in threading.enumerate():
        # They have no name but that of what they do: a context's `run`.
        if thread.name.endswith("(run)") and not thread.daemon:
            thread.join(_PATIENCE_SECONDS)


def restore(
    backup_id: UUID | None, *, dry_run: bool = False, confirm_empty: bool = False
) -> Restored:
    return get_restore_service().restore(
        backup_id, COMMAND_LINE, dry_run=dry_run, confirm=not dry_run, confirm_empty=confirm_empty
    )


def erase(user_id: int, mode: EraseMode = EraseMode.DELETE, *, dry_run: bool = False) -> None:
    with session_scope() as session:
        get_compliance_service().erase(
            session, COMMAND_LINE, user_id, mode, reason="request", dry_run=dry_run
        )


def consent(user_id: int, *, granted: bool, purpose: str = "marketing") -> None:
    with session_scope() as session:
        get_consent_service().record(
            session, COMMAND_LINE, user_id, purpose=purpose, granted=granted, evidence="a form"
        )


def has_consent(user_id: int, purpose: str = "marketing") -> bool:
    with session_scope(read_only=True) as session:
        return get_consent_service().of(session, user_id).purposes[purpose].granted


def is_there(user_id: int) -> bool:
    with session_scope(read_only=True) as session:
        return session.get(User, user_id) is not None


def texts() -> set[str]:
    """Every text of people's tables, encrypted ones in plain."""
    with session_scope(read_only=True) as session:
        return {
            value
            for mapped in DATA_MAP.of_people
            for row in session.execute(select(*mapped.table.columns))
            for value in row
            if isinstance(value, str)
        }


def plain_rows(table: str) -> set[tuple[Any, ...]]:
    """The rows of a table, encrypted columns in plain: they are sealed anew when carried over."""
    with session_scope(read_only=True) as session:
        return {tuple(row) for row in session.execute(select(*DATA_MAP[table].table.columns))}


def nothing_is_due(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every retention period so long that no row of a test ends."""
    for data_type in DATA_MAP.by_data_type:
        monkeypatch.setenv(f"RETENTION_{data_type}_DAYS".upper(), "36500")
    clear_caches()
    get_setup_service().open()


def wait_until(holds: Callable[[], object]) -> None:
    """Wait for what a thread does beside the test."""
    end = time.monotonic() + _PATIENCE_SECONDS
    while not holds():
        assert time.monotonic() < end, "it never came to be"
        time.sleep(0.005)
