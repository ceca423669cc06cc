"""Who empties the trail and has a new one begun has hidden nothing: the store knows the old one."""

import json

import pytest
import structlog
from sqlalchemy import select

from backend.db_utils import session_scope
from backend.models import Alert, AlertKind
from backend.services import setup_service
from backend.services.audit_service import ITSELF, Sought, get_audit_service
from backend.services.scheduler_service import SchedulerService
from backend.services.setup_service import get_setup_service
from backend.settings import AppEnv
from tests.backup.promises import back_up
from tests.conftest import Run, Service, clear_caches
from tests.logged import logged
from tests.services.trail import act, anchor, keys, sql, verify


def begin_anew() -> None:
    """Take the installation's key away, without which a start makes another one."""
    sql("DELETE FROM installation")
    start()


def start() -> None:
    clear_caches()
    get_setup_service().prepare()
    get_setup_service().open()


def made() -> list[dict[str, object]]:
    """What the trail says of keys that were made where there seems to have been one."""
    with session_scope() as session:
        events = get_audit_service().read(
            session, ITSELF, Sought(action="installation_made"), limit=9
        )
    return [dict(event.detail) for event in events]


def test_a_trail_that_was_begun_anew_is_not_called_whole(service: Service, run: Run) -> None:
    last = act(5)
    anchor()
    old = keys().chain_id
    assert verify().status == "ok"
    sql("DELETE FROM audit_events")
    begin_anew()
    act(2)
    assert keys().chain_id != old
    checked = verify()
    assert (checked.status, checked.breaks) == ("incomplete", [])
    # The first checkpoint of the new one was made by the start.
    assert checked.checkpoints == 1
    assert checked.others == [(old, last, str(service.folder / "backups"))]
    answer = run("audit", "verify")
    assert answer.code == 1
    assert f"another trail, {old}, lies in" in answer.err
    assert f"up to event {last}:" in answer.err


@pytest.mark.usefixtures("sqlite_service")
def test_the_nightly_check_raises_an_alert_of_it() -> None:
    act(2)
    anchor()
    sql("DELETE FROM audit_events")
    begin_anew()
    (watch,) = (job for job in SchedulerService()._jobs if job.name == "watch")
    assert watch.run_alone is not None
    watch.run_alone()
    with session_scope(read_only=True) as session:
        found = session.scalars(select(Alert.code).where(Alert.kind == AlertKind.AUDIT_BROKEN))
        assert found.all() == ["incomplete"]


@pytest.mark.usefixtures("service")
def test_a_key_made_where_there_was_one_is_logged_and_recorded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # One that no earlier test has used keeps no earlier level.
    monkeypatch.setattr(setup_service, "log", structlog.get_logger())
    back_up()
    old = keys().chain_id
    sql("DELETE FROM audit_events")
    with logged(AppEnv.PRODUCTION) as written:
        begin_anew()
    known = {"people": 1, "backups": 1, "trails": [old]}
    assert made() == [known]
    lines = map(json.loads, written().splitlines())
    (line,) = (line for line in lines if line["event"] == "installation_made")
    assert line["level"] == "warning"
    assert {name: line[name] for name in known} == known | {"trails": 1}
    # The key is there now, and no other one is made.
    start()
    assert made() == [known]


def test_a_new_installation_begins_without_such_a_word(
    sqlite_service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DATABASE_URL", f"sqlite:///{sqlite_service.folder / 'new.db'}")
    start()
    assert made() == []
