"""A restore and its record are one: neither is there without the other, whatever fails then."""

from collections.abc import Callable
from contextlib import nullcontext
from datetime import datetime
from typing import Any

import pytest
from sqlalchemy import Engine
from sqlalchemy.exc import DBAPIError

from backend.backup.database import Still
from backend.backup.postgres import PostgresDatabase
from backend.db_utils import get_engine, session_scope
from backend.errors import ConflictError, UnavailableError
from backend.services.archive_service import live_database
from backend.services.audit_service import COMMAND_LINE, Sought, get_audit_service
from backend.services.setup_service import get_setup_service
from tests.backup.lives import acts
from tests.backup.promises import back_up, is_there, restore
from tests.conftest import Service
from tests.services.trail import found, refuse_events


def at_the_swap(
    monkeypatch: pytest.MonkeyPatch, before: Callable[[], object], after: Callable[[], object]
) -> None:
    """Do something right before the next swap, and right after it."""
    kind = type(live_database())
    swap: Callable[..., str] = kind.swap

    def swap_(*arguments: Any) -> str:
        before()
        kept = swap(*arguments)
        after()
        return kept

    monkeypatch.setattr(kind, "swap", swap_)


def nothing() -> None:
    """Do nothing."""


def test_what_another_process_records_before_the_swap_is_not_lost(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    backup_id, joe = back_up(), service.user("joe@example.com")

    def beside() -> None:
        # Past this process's gate, as another process is.
        with session_scope(get_engine()) as session:
            get_audit_service().record(session, "export", COMMAND_LINE)

    at_the_swap(monkeypatch, beside, nothing)
    with pytest.raises(ConflictError, match="another process"):
        restore(backup_id)
    assert (acts("export"), acts("restore"), is_there(joe)) == (["done"], ["conflict"], True)
    monkeypatch.undo()
    restore(backup_id)
    assert (acts("export"), acts("restore")) == (["done"], ["conflict", "done"])
    assert not is_there(joe)


# SQLite has its lock when it looks.
@pytest.mark.parametrize("service", ["postgresql"], indirect=True)
def test_what_was_recorded_too_late_to_stop_a_restore_is_told_as_lost(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    backup_id, joe = back_up(), service.user("joe@example.com")
    swap = PostgresDatabase.swap

    def swap_(self: PostgresDatabase, built: Engine, at: datetime, _still: Still) -> str:
        # As if it had come and gone after the last look.
        with session_scope(get_engine()) as session:
            get_audit_service().record(session, "export", COMMAND_LINE)
        return swap(self, built, at, nullcontext)

    monkeypatch.setattr(PostgresDatabase, "swap", swap_)
    restore(backup_id)
    assert (is_there(joe), acts("export"), acts("restore")) == (False, [], ["done"])
    with session_scope() as session:
        lost = Sought(action="events_lost")
        (told,) = get_audit_service().read(session, COMMAND_LINE, lost, 2)
    assert told.detail["events"] == 1
    monkeypatch.undo()
    restore(backup_id)
    assert acts("events_lost") == ["done"]


def test_a_restore_that_cannot_be_recorded_is_not_done(service: Service) -> None:
    refuse_events("NEW.action = 'restore' AND NEW.outcome = 'done'")
    backup_id, joe = back_up(), service.user("joe@example.com")
    with pytest.raises(DBAPIError, match="no room"):
        restore(backup_id)
    assert is_there(joe)
    assert (len(acts("restore")), "done" in acts("restore")) == (1, False)


def test_what_fails_after_the_swap_does_not_make_the_restore_a_failed_one(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    backup_id, joe = back_up(), service.user("joe@example.com")
    store = service.folder / "backups"
    away = store.with_name("away")

    def lose_the_store() -> None:
        store.rename(away)
        store.write_text("no folder")

    at_the_swap(monkeypatch, nothing, lose_the_store)
    assert restore(backup_id).previous is not None
    assert (is_there(joe), acts("restore")) == (False, ["done"])
    assert acts("restore_unfinished") == ["unavailable"] * 2
    monkeypatch.undo()
    store.unlink()
    away.rename(store)
    get_setup_service().prepare()
    assert (is_there(joe), found()) == (False, None)


def test_a_restore_is_done_whatever_becomes_of_what_was_built(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    backup_id, joe = back_up(), service.user("joe@example.com")

    def fail(*_: Any) -> None:
        raise UnavailableError("the server is busy")

    monkeypatch.setattr(type(live_database()), "discard", fail)
    restore(backup_id)
    assert (is_there(joe), acts("restore")) == (False, ["done"])


def test_a_swap_that_does_not_take_place_is_no_restore(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    backup_id, joe = back_up(), service.user("joe@example.com")

    def fail() -> None:
        raise UnavailableError("the server is busy")

    at_the_swap(monkeypatch, fail, nothing)
    with pytest.raises(UnavailableError):
        restore(backup_id)
    assert (is_there(joe), acts("restore")) == (True, ["unavailable"])
