"""A trail that somebody has changed is noticed in the night."""

from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import select

from backend.db_utils import session_scope
from backend.models import Alert, AlertKind
from backend.services.scheduler_service import SchedulerService
from backend.settings import get_settings
from tests.conftest import Service
from tests.services.trail import act, anchor, sql, verify


def alerts() -> list[tuple[str, str]]:
    with session_scope(read_only=True) as session:
        found = select(Alert.about, Alert.code).where(Alert.kind == AlertKind.AUDIT_BROKEN)
        return [(about, code) for about, code in session.execute(found)]


def a_night(days: int) -> None:
    scheduler = SchedulerService()
    now = datetime.now(UTC)
    scheduler.tick(now)
    assert "watch" in scheduler.tick(now + timedelta(days=days))


def test_each_night_the_trail_is_checked_and_what_is_broken_raises_an_alert(
    service: Service,
) -> None:
    number = act(3)
    anchor()
    a_night(1)
    assert alerts() == []
    sql("UPDATE audit_events SET outcome = 'refused' WHERE id = :id", id=number - 1)
    assert verify().status == "broken"
    a_night(2)
    assert alerts() == [("audit trail", "edited")]


def test_a_trail_of_which_no_checkpoint_is_left_raises_one_too(
    sqlite_service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Each backup makes a checkpoint.
    monkeypatch.setenv("BACKUP_TIME", "off")
    get_settings.cache_clear()
    act(3)
    anchor()
    for checkpoint in (sqlite_service.folder / "backups").glob("audit-*"):
        checkpoint.unlink()
    a_night(1)
    assert alerts() == [("audit trail", "incomplete")]
