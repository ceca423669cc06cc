"""An event is written with its act or not at all, in the order of the commits and without a gap."""

import os
import subprocess
import sys
import threading
import time
from contextlib import suppress

import pytest
from sqlalchemy import func, select, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from backend.db_utils import get_engine, session_scope
from backend.errors import UnavailableError
from backend.models import AuditEvent, DataConsent, User
from backend.services.audit_service import COMMAND_LINE, get_audit_service
from backend.services.consent_service import get_consent_service
from tests.conftest import Service
from tests.services.trail import act, found, numbers, put_back, raw_rows, refuse_events, sql

PATIENCE_SECONDS = 60
WRITER = """
from backend.services.setup_service import get_setup_service
from tests.services.trail import act
get_setup_service().open()
while True:
    act()
"""


def record(session: Session, action: str) -> None:
    get_audit_service().record(session, action, COMMAND_LINE)


def actions() -> list[str]:
    with session_scope(read_only=True) as session:
        return list(session.scalars(select(AuditEvent.action).order_by(AuditEvent.id)))[3:]


def test_writers_at_once_leave_no_gap_and_no_broken_link(service: Service) -> None:
    raised: list[BaseException] = []

    def write() -> None:
        try:
            act(12)
        except BaseException as err:  # noqa: BLE001 - looked at by the test
            raised.append(err)

    threads = [threading.Thread(target=write) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert raised == []
    assert numbers() == [*range(1, 3 + 8 * 12 + 1)]
    assert found() is None


def test_writers_that_are_killed_leave_no_gap_and_no_broken_link(service: Service) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    writers = [subprocess.Popen([sys.executable, "-c", WRITER], env=environment) for _ in range(2)]
    try:
        for writer in writers:
            more = len(numbers()) + 20
            end = time.monotonic() + PATIENCE_SECONDS
            while len(numbers()) < more:
                assert writer.poll() is None
                assert time.monotonic() < end, "nothing is written"
            writer.kill()
            writer.wait()
    finally:
        for writer in writers:
            writer.kill()
            writer.wait()
    assert found() is None
    last = act()
    assert numbers() == [*range(1, last + 1)]
    assert found() is None


@pytest.fixture
def _no_room(service: Service) -> None:
    """Have the database refuse every new row of the trail."""
    assert service
    refuse_events()


def give_consent(user_id: int) -> None:
    with session_scope() as session:
        get_consent_service().record(
            session, COMMAND_LINE, user_id, purpose="marketing", granted=True, evidence="form"
        )


def consents() -> int:
    with session_scope(read_only=True) as session:
        return session.scalar(select(func.count()).select_from(DataConsent)) or 0


def test_an_act_is_done_with_its_record(service: Service) -> None:
    give_consent(service.user("jane@example.com"))
    assert (consents(), actions()) == (1, ["consent"])


@pytest.mark.usefixtures("_no_room")
def test_an_act_that_cannot_be_recorded_is_not_done(service: Service) -> None:
    jane = service.user("jane@example.com")
    with pytest.raises(DBAPIError, match="no room"):
        give_consent(jane)
    assert (consents(), actions()) == (0, [])
    with pytest.raises(DBAPIError, match="no room"):
        get_consent_service().show(COMMAND_LINE, jane)


def delete_recording(user_id: int, *recorded: str) -> None:
    with session_scope() as session:
        session.execute(text("DELETE FROM users WHERE id = :id"), {"id": user_id})
        for action in recorded:
            record(session, action)


@pytest.mark.parametrize("dropped", ["act_one", "act_two"])
def test_an_act_whose_record_the_database_drops_without_a_word_is_not_done(
    service: Service, dropped: str
) -> None:
    """As by RAISE(IGNORE), or a trigger that returns NULL: one row of several is enough."""
    jane = service.user("jane@example.com")
    if service.engine == "sqlite":
        sql(
            "CREATE TRIGGER quiet BEFORE INSERT ON audit_events"
            f" WHEN new.action = '{dropped}' BEGIN SELECT RAISE(IGNORE); END"
        )
    else:
        sql(
            "CREATE FUNCTION quiet() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
            f" IF new.action = '{dropped}' THEN RETURN NULL; END IF; RETURN new; END $$"
        )
        sql(
            "CREATE TRIGGER quiet BEFORE INSERT ON audit_events"
            " FOR EACH ROW EXECUTE FUNCTION quiet()"
        )
    for others in ((), ("act_one", "act_two")):
        with pytest.raises(UnavailableError):
            delete_recording(jane, *others, dropped)
    assert actions() == []
    with session_scope(read_only=True) as session:
        assert session.get(User, jane) is not None
    # What it lets through is done.
    delete_recording(jane, "another", "more")
    assert actions() == ["another", "more"]
    with session_scope(read_only=True) as session:
        assert session.get(User, jane) is None


def test_what_is_rolled_back_leaves_no_event(service: Service) -> None:
    with Session(get_engine()) as session:
        record(session, "undone")
        session.rollback()
        record(session, "done")
        session.commit()
    with suppress(ZeroDivisionError), session_scope() as session:
        record(session, "undone")
        raise ZeroDivisionError
    assert actions() == ["done"]
    assert found() is None


def test_the_end_of_a_savepoint_writes_and_drops_nothing(service: Service) -> None:
    with session_scope() as session:
        record(session, "first")
        with session.begin_nested() as savepoint:
            session.execute(text("UPDATE users SET city = NULL"))
            savepoint.rollback()
        with session.begin_nested():
            session.execute(text("UPDATE users SET city = NULL"))
        assert session.scalar(select(func.count()).select_from(AuditEvent)) == 3
        record(session, "second")
    assert actions() == ["first", "second"]
    assert found() is None


def test_what_might_be_undone_alone_or_is_not_committed_is_not_recorded(service: Service) -> None:
    with session_scope() as session:
        with session.begin_nested(), pytest.raises(RuntimeError, match="commits its act"):
            record(session, "in a savepoint")
        record(session, "after it")
    with (
        session_scope(read_only=True) as session,
        pytest.raises(RuntimeError, match="commits its act"),
    ):
        record(session, "nowhere")
    assert actions() == ["after it"]


# SQLite has one writer at a time, whatever it writes.
@pytest.mark.parametrize("service", ["postgresql"], indirect=True)
def test_an_act_that_takes_long_keeps_no_other_one_waiting(service: Service) -> None:
    with session_scope() as session:
        record(session, "begun first")
        session.flush()
        with session_scope() as other:
            other.execute(text("SET LOCAL statement_timeout = '5s'"))
            record(other, "done first")
    assert actions() == ["done first", "begun first"]
    assert found() is None


def _as_before_the_chain() -> None:
    """Have the trail as an earlier version leaves it, with a gap in its numbers."""
    sql("DELETE FROM audit_events WHERE action = 'audit_chain_begun'")
    sql("UPDATE audit_events SET link = NULL")
    sql("UPDATE audit_events SET id = 20 WHERE id = 5")


def test_a_trail_of_before_the_chain_is_sealed_by_its_first_event(service: Service) -> None:
    act(4)
    _as_before_the_chain()
    act(2)
    begun = 21
    assert numbers() == [2, 3, 4, 6, 7, 20, begun, 22, 23]
    assert found() is None
    before = raw_rows()
    for change, kind in (
        ("UPDATE audit_events SET action = 'import' WHERE id = 4", "edited"),
        ("DELETE FROM audit_events WHERE id = 4", "removed"),
        ("DELETE FROM audit_events WHERE id = 20", "removed"),
        ("UPDATE audit_events SET id = 8 WHERE id = 20", "edited"),
        ("UPDATE audit_events SET id = -1 WHERE id = 2", "edited"),
    ):
        sql(change)
        assert found() == (kind, begun), change
        put_back(before)
    assert found() is None
