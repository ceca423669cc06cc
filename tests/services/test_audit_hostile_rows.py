"""Rows that no service writes: somebody's with the database, told by name and never in the way."""

from typing import Any, Final

import pytest

from backend.db_utils import get_engine, session_scope
from backend.errors import ConflictError
from backend.services.audit_service import COMMAND_LINE, get_audit_service
from backend.services.restore_service import RestoreService, get_restore_service
from tests.backup.promises import back_up
from tests.conftest import Service
from tests.services.trail import act, anchor, found, numbers, sql, verify

COPIED: Final = (
    "INSERT INTO audit_events (id, at, action, outcome, actor_ref)"
    " SELECT {id}, at, 'export', 'done', actor_ref FROM audit_events WHERE id = 3"
)


def test_an_event_before_all_others_is_found(service: Service) -> None:
    act(3)
    anchor()
    sql(COPIED.format(id=-(2**63)))
    assert verify().status == "broken"


def test_an_event_before_all_others_is_named_and_not_the_one_after_it(service: Service) -> None:
    act(3)
    sql(COPIED.format(id=0))
    assert found() == ("edited", 0)


def test_a_beginning_that_has_lost_its_links_is_not_told_as_removed(service: Service) -> None:
    act(6)
    sql("UPDATE audit_events SET link = NULL WHERE id <= 5")
    assert found() == ("begun_again", 1)
    sql("UPDATE audit_events SET action = 'export' WHERE id = 1")
    assert found() == ("edited", 1)
    sql("DELETE FROM audit_events WHERE id = 5")
    assert found() == ("removed", 5)


def test_a_moment_with_a_zone_of_its_own_is_an_edited_one(sqlite_service: Service) -> None:
    act(6)
    sql("UPDATE audit_events SET at = at || '+09:00' WHERE id = 5")
    assert found() == ("edited", 5)


def test_bytes_in_the_place_of_a_link_are_named_and_stop_no_act(sqlite_service: Service) -> None:
    act(6)
    sql("UPDATE audit_events SET link = x'00' WHERE id = 5")
    assert found() == ("edited", 5)
    sql("UPDATE audit_events SET link = x'00' WHERE id = (SELECT max(id) FROM audit_events)")
    last = numbers()[-1]
    assert act() == last + 1


@pytest.mark.parametrize("service", ["postgresql"], indirect=True)
@pytest.mark.parametrize("at", ["infinity", "-infinity", "0044-03-15 BC"])
def test_a_moment_that_no_clock_shows_is_named(service: Service, at: str) -> None:
    act(6)
    sql("UPDATE audit_events SET at = CAST(:at AS timestamptz) WHERE id = 5", at=at)
    assert found() == ("edited", 5)


def test_a_restore_stops_where_another_process_has_written_meanwhile(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    act(3)
    back_up()
    act(2)
    prepare = RestoreService._prepare

    def beside(self: RestoreService, *arguments: Any) -> Any:
        prepared = prepare(self, *arguments)
        # Past this process's gate, as another process is.
        with session_scope(get_engine()) as session:
            get_audit_service().record(session, "export", COMMAND_LINE)
        return prepared

    monkeypatch.setattr(RestoreService, "_prepare", beside)
    with pytest.raises(ConflictError, match="another process"):
        get_restore_service().restore(None, COMMAND_LINE, dry_run=False, confirm=True)
    kept = numbers()
    monkeypatch.setattr(RestoreService, "_prepare", prepare)
    get_restore_service().restore(None, COMMAND_LINE, dry_run=False, confirm=True)
    assert numbers()[: len(kept)] == kept
    assert verify().status == "ok"
