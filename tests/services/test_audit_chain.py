"""Whoever has the database and not the key changes no event unnoticed, and the place is named."""

import shutil
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from backend.db_utils import dispose_engine, session_scope
from backend.privacy.declarations import EraseMode
from backend.services.audit_service import COMMAND_LINE
from backend.services.compliance_service import get_compliance_service
from backend.services.rotation_service import get_rotation_service
from backend.services.setup_service import get_setup_service
from backend.services.trail_walk import BreakKind
from tests.conftest import KEY, OTHER_KEY, Service, clear_caches
from tests.privacy.people import plant
from tests.services.trail import (
    TABLE,
    act,
    anchor,
    first_break,
    found,
    known,
    numbers,
    put_back,
    raw_rows,
    sql,
    verify,
)  # fmt: skip

COLUMNS = [column.name for column in TABLE.columns if column.name != "id"]
OTHERS: dict[str, Any] = {
    "at": "at", "action": "import", "outcome": "denied", "actor_ref": "scheduler",
    "subject_ref": "0" * 32, "request_id": "another", "detail": "enc1.none", "link": "0" * 64,
}  # fmt: skip


def test_an_untouched_trail_holds(service: Service) -> None:
    last = act(5)
    assert found() is None
    anchor()
    checked = verify()
    assert (checked.status, checked.breaks, checked.losses) == ("ok", [], [])
    assert (checked.events, checked.last, checked.checkpoint_event) == (last, last, last)
    # That it was checked is an event of its own.
    assert numbers() == [*range(1, last + 2)]


@pytest.mark.parametrize("column", [name for name in COLUMNS if name != "at"])
def test_an_edited_column_is_found(service: Service, column: str) -> None:
    act(6)
    sql(f"UPDATE audit_events SET {column} = :value WHERE id = 6", value=OTHERS[column])  # noqa: S608 - a column
    assert found() == ("edited", 6)


def test_a_moment_of_another_event_is_found(service: Service) -> None:
    act(6)
    sql("UPDATE audit_events SET at = (SELECT at FROM audit_events WHERE id = 7) WHERE id = 6")
    assert found() == ("edited", 6)


@pytest.mark.parametrize("column", ["subject_ref", "request_id", "detail", "link"])
def test_what_was_emptied_is_found(service: Service, column: str) -> None:
    act(6)
    sql(f"UPDATE audit_events SET {column} = NULL WHERE id = 6")  # noqa: S608 - a column
    assert found() == ("edited", 6)


def test_the_sealed_detail_of_another_event_is_found(service: Service) -> None:
    act(6)
    sql(
        "UPDATE audit_events SET detail = (SELECT detail FROM audit_events WHERE id = 5)"
        " WHERE id = 6"
    )
    assert found() == ("edited", 6)


@pytest.mark.parametrize(
    "at", ["'x'", "replace(at, ' ', 'T')", "'2026-01-01'", "7", "CAST(x'FF' AS TEXT)", "x'00'"]
)
def test_what_is_no_moment_or_no_text_is_found(sqlite_service: Service, at: str) -> None:
    act(6)
    sql(f"UPDATE audit_events SET at = {at} WHERE id = 6")  # noqa: S608 - SQLite keeps all of these
    assert found() == ("edited", 6)
    sql("UPDATE audit_events SET action = CAST(x'FF' AS TEXT) WHERE id = 5")
    assert found() == ("edited", 5)


@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_single_change_is_found_where_it_is(service: Service, data: st.DataObject) -> None:
    if not numbers()[7:]:
        act(8)
    before = raw_rows()
    row = data.draw(st.sampled_from(before[:8]))
    column = data.draw(st.sampled_from([name for name in COLUMNS if name != "at"]))
    some = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=40)
    others = st.sampled_from([each[column] for each in before]) | some
    value = data.draw(others.filter(lambda value: value is not None and value != row[column]))
    change = f"UPDATE audit_events SET {column} = :value WHERE id = :id"  # noqa: S608 - a column
    sql(change, value=value, id=row["id"])
    one = first_break()
    assert one is not None
    assert one.event_id == row["id"]
    put_back(before)
    assert found() is None


@pytest.mark.parametrize("moved", [5, 99])
def test_a_changed_number_is_found(service: Service, moved: int) -> None:
    act(6)
    sql("DELETE FROM audit_events WHERE id = :id", id=moved)
    sql("UPDATE audit_events SET id = :id WHERE id = 6", id=moved)
    # What stood at 5 is gone then.
    assert found() == (("removed", 5) if moved == 5 else ("reordered", 6))


def test_a_removed_event_is_found(service: Service) -> None:
    last = act(6)
    sql("DELETE FROM audit_events WHERE id IN (5, 6)")
    assert found() == ("removed", 5)
    # Those after it get its number, so that no gap is left.
    for number in range(7, last + 1):
        sql("UPDATE audit_events SET id = :new WHERE id = :old", new=number - 2, old=number)
    assert numbers() == [*range(1, last - 1)]
    one = first_break()
    assert one is not None
    assert (one.kind, one.event_id) == (BreakKind.REMOVED, 5)
    assert "with 1 after it" in one.detail


def test_a_removed_beginning_is_found(service: Service) -> None:
    act(3)
    sql("DELETE FROM audit_events WHERE id = 1")
    assert found() == ("removed", 1)
    sql("DELETE FROM audit_events WHERE id = 2")
    assert found() == ("removed", 1)


def test_an_edited_beginning_is_found(service: Service) -> None:
    act()
    sql("UPDATE audit_events SET outcome = 'denied' WHERE id = 1")
    assert found() == ("edited", 1)
    sql("UPDATE audit_events SET action = 'export' WHERE id = 1")
    assert found() == ("removed", 1)


def test_a_removed_end_is_found_once_a_checkpoint_speaks_of_it(service: Service) -> None:
    last = act(5)
    # Of what no checkpoint has seen, nothing can be known: the reason to make them often.
    sql("DELETE FROM audit_events WHERE id = :id", id=last)
    assert found(known()) is None
    assert act(2) == last + 1
    anchor()
    sql("DELETE FROM audit_events WHERE id > :id", id=last - 1)
    assert found(known()) == ("truncated", last)
    assert found() is None


def test_a_trail_without_any_event_is_found(service: Service) -> None:
    sql("DELETE FROM audit_events")
    assert found() == ("truncated", 1)


@pytest.mark.parametrize("others", ["", ", link"])
def test_two_events_in_each_others_place_are_found(service: Service, others: str) -> None:
    act(8)
    names = f"at, action, outcome, actor_ref, subject_ref, request_id, detail{others}"
    rows = {row["id"]: dict(row) for row in raw_rows()}
    for number, other in ((5, 9), (9, 5)):
        values = {name: rows[other][name] for name in names.split(", ")}
        sets = ", ".join(f"{name} = :{name}" for name in values)
        sql(f"UPDATE audit_events SET {sets} WHERE id = :id", id=number, **values)  # noqa: S608 - columns
    one = first_break()
    assert one is not None
    assert (one.kind, one.event_id, one.detail) == (BreakKind.REORDERED, 5, "stands at number 9")


def test_a_copied_and_an_invented_event_are_found(service: Service) -> None:
    last = act(4)
    columns = "at, action, outcome, actor_ref, subject_ref, request_id, detail, link"
    sql(
        f"INSERT INTO audit_events (id, {columns})"  # noqa: S608 - columns
        f" SELECT :id, {columns} FROM audit_events WHERE id = 5", id=last + 1,
    )  # fmt: skip
    assert found() == ("edited", last + 1)
    # The service goes on after it, and the place stays the same.
    act(3)
    assert found() == ("edited", last + 1)


def test_a_trail_put_back_to_an_earlier_state_is_found(service: Service) -> None:
    act(3)
    confirmed = anchor()
    act(2)
    earlier = raw_rows()
    act(3)
    last = anchor()
    put_back(earlier)
    assert found(known()) == ("truncated", earlier[-1]["id"] + 1)
    # It goes on from there, and has as many events as before: their links are others.
    act(last - numbers()[-1])
    one = first_break(known())
    assert one is not None
    assert (one.kind, one.event_id) == (BreakKind.ROLLED_BACK, last)
    assert f"after event {confirmed}," in one.detail


def test_an_older_copy_of_the_database_file_is_found(sqlite_service: Service) -> None:
    live, copy = sqlite_service.folder / "holdfast.db", sqlite_service.folder / "copy.db"
    act(2)
    dispose_engine()
    shutil.copy(live, copy)
    act(2)
    last = anchor()
    dispose_engine()
    for suffix in ("-wal", "-shm"):
        live.with_name(f"{live.name}{suffix}").unlink(missing_ok=True)
    shutil.copy(copy, live)
    clear_caches()
    get_setup_service().open()
    assert found(known()) == ("truncated", last - 1)
    assert verify().status == "broken"


def test_a_chain_that_is_begun_again_is_found(service: Service) -> None:
    act(4)
    anchored = anchor()
    act(2)
    sql("UPDATE audit_events SET link = NULL")
    assert found() == ("begun_again", 1)
    act(2)
    assert found() == ("begun_again", 1)
    # Also where nothing tells any more that there was a beginning: the checkpoint does.
    sql("UPDATE audit_events SET action = 'export' WHERE id = 1")
    before = numbers()
    sql("UPDATE audit_events SET link = NULL")
    sql("DELETE FROM audit_events WHERE action = 'audit_chain_begun'")
    act()
    assert numbers()[-1] > before[-1] - 2
    assert found(known()) == ("begun_again", anchored)


def test_a_person_erased_a_key_rotated_and_nothing_is_broken(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    person = plant("A")
    anchor()
    with session_scope() as session:
        get_compliance_service().erase(
            session, COMMAND_LINE, person.id, EraseMode.DELETE, reason="art. 17", dry_run=False
        )
    monkeypatch.setenv("ENCRYPTION_KEY", OTHER_KEY)
    monkeypatch.setenv("ENCRYPTION_KEYS_PREVIOUS", KEY)
    clear_caches()
    get_setup_service().open()
    before = {row["id"]: (row["detail"], row["link"]) for row in raw_rows()}
    assert get_rotation_service().rotate(COMMAND_LINE).changed["audit_events.detail"] > 0
    after = {row["id"]: (row["detail"], row["link"]) for row in raw_rows()}
    assert all(after[one][1] == before[one][1] for one in before)
    assert any(after[one][0] != before[one][0] for one in before)
    assert verify().status == "ok"
