"""A restore keeps the trail; where it cannot, what is lost is known, and no excuse for more."""

from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta, tzinfo
from pathlib import Path
from typing import Self

import pytest
from sqlalchemy.orm import Session

from backend.db_utils import dispose_engine, get_engine
from backend.models import LedgerKind, User
from backend.services import audit_service
from backend.services.audit_service import COMMAND_LINE
from backend.services.ledger_service import get_ledger_service
from backend.services.reference_service import reference_to
from backend.services.restore_service import get_restore_service
from backend.services.setup_service import get_setup_service
from tests.backup.lives import acts
from tests.backup.promises import back_up, consent, has_consent, is_there, restore
from tests.conftest import PostgresServer, Service, clear_caches
from tests.services.trail import (
    act,
    anchor,
    found,
    keys,
    known,
    numbers,
    put_back,
    raw_rows,
    sql,
    verify,
)  # fmt: skip

Lose = Callable[[], None]


@pytest.fixture
def lose(service: Service, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Lose:
    """Lose the database: from the call on there is an empty one, and the same store."""

    def lose_() -> None:
        url = f"sqlite:///{service.folder / 'empty.db'}"
        if service.engine == "postgresql":
            server: PostgresServer = request.getfixturevalue("postgres_server")
            # The next test drops it.
            server.run("CREATE DATABASE test_holdfast_empty")
            url = server.url("test_holdfast_empty")
        monkeypatch.setenv("DATABASE_URL", url)
        clear_caches()
        # An engine that an earlier test has left does not make the file.
        dispose_engine()
        get_setup_service().prepare()
        get_setup_service().open()

    return lose_


def test_the_trail_goes_on_through_a_restore(service: Service) -> None:
    act(3)
    backup_id = back_up()
    last = act(3)
    anchor()
    restore(backup_id)
    checked = verify()
    assert (checked.status, checked.breaks, checked.losses) == ("ok", [], [])
    assert checked.last > last
    # The restore has left a checkpoint of its own.
    assert checked.checkpoint_event == checked.last
    get_restore_service().undo(COMMAND_LINE, dry_run=False, confirm=True)
    assert verify().status == "ok"


def test_what_a_lost_database_knew_is_a_known_loss(service: Service, lose: Lose) -> None:
    act(3)
    backup_id = back_up()
    # Of the backup's own events the first is in it.
    kept = numbers()[-1] - 1
    act(4)
    lost = anchor()
    lose()
    restore(backup_id)
    checked = verify()
    assert (checked.status, checked.breaks) == ("ok", [])
    (loss,) = checked.losses
    assert (loss.after, loss.known_until) == (kept, lost)
    # It goes on past the numbers that were given out before.
    act(lost)
    anchor()
    assert verify().status == "ok"


def test_a_known_loss_excuses_no_later_one(service: Service, lose: Lose) -> None:
    act(3)
    backup_id = back_up()
    act(2)
    anchor()
    lose()
    restore(backup_id)
    earlier = raw_rows()
    act(3)
    last = anchor()
    put_back(earlier)
    assert found(known()) == ("truncated", earlier[-1]["id"] + 1)
    act(last)
    assert found(known()) == ("rolled_back", last)


# What the clock says does not depend on the engine.
@pytest.mark.parametrize("service", ["sqlite"], indirect=True)
@pytest.mark.parametrize("days", [-2, 2])
def test_a_clock_that_is_wrong_at_the_restore_neither_hides_nor_invents_a_loss(
    service: Service, lose: Lose, monkeypatch: pytest.MonkeyPatch, days: int
) -> None:
    act(3)
    backup_id = back_up()
    act(3)
    anchor()
    lose()

    class Wrong(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> Self:
            return super().now(tz) + timedelta(days=days)

    # It is set right before the next checkpoint.
    monkeypatch.setattr(audit_service, "datetime", Wrong)
    restore(backup_id)
    monkeypatch.undo()
    act(3)
    last = anchor()
    assert verify().status == "ok"
    sql("DELETE FROM audit_events WHERE id >= :id", id=last)
    assert found(known()) == ("truncated", last)


@pytest.mark.parametrize("service", ["sqlite"], indirect=True)
def test_a_store_of_its_own_gets_checkpoints_that_are_none_of_what_was_lost(
    service: Service, lose: Lose
) -> None:
    """After `restore --from`, by a clock that is behind the lost machine's."""
    act(3)
    backup_id = back_up()
    act(3)
    store, last = service.folder / "backups", anchor()
    (path,) = store.glob(f"audit-*-{last:016}-*.json")
    (told,) = (each for each in known().good.values() if each.event_id == last)
    path.write_bytes(replace(told, at=told.at + timedelta(days=2)).document(keys().signing))
    lose()
    restore(backup_id)
    for checkpoint in store.glob("audit-*"):
        checkpoint.unlink()
    act(3)
    last = anchor()
    sql("DELETE FROM audit_events WHERE id >= :id", id=last)
    assert found(known()) == ("truncated", last)


def test_a_restore_says_whose_place_it_takes_and_so_does_undoing_it(
    service: Service, lose: Lose
) -> None:
    act(3)
    backup_id = back_up()
    lost = keys().chain_id
    lose()
    new = keys().chain_id
    # Somebody has to say what became of the old one.
    checked = verify()
    assert checked.status == "incomplete"
    assert [each.chain_id for each in checked.others] == [lost]
    restore(backup_id)
    assert (verify().status, verify().others, keys().chain_id) == ("ok", [], lost)
    get_restore_service().undo(COMMAND_LINE, dry_run=False, confirm=True)
    assert (verify().status, verify().others, keys().chain_id) == ("ok", [], new)


def test_who_puts_an_old_state_back_can_declare_no_loss(service: Service) -> None:
    act(3)
    earlier = raw_rows()
    act(3)
    last = anchor()
    put_back(earlier)
    number = earlier[-1]["id"] + 1
    sql(
        "INSERT INTO audit_events (id, at, action, outcome, actor_ref, link)"
        " SELECT :id, at, 'audit_resumed', 'done', actor_ref, link FROM audit_events WHERE id = 6",
        id=number,
    )
    assert found(known()) == ("edited", number)
    assert last > number


def test_a_dry_run_and_a_look_leave_trail_and_checkpoints_alone(
    sqlite_service: Service, tmp_path: Path
) -> None:
    last = act(2)
    backup_id = back_up()
    stored = set((sqlite_service.folder / "backups").iterdir())
    restore(backup_id, dry_run=True)
    get_restore_service().restore_to(backup_id, COMMAND_LINE, str(tmp_path / "look.db"))
    assert set((sqlite_service.folder / "backups").iterdir()) == stored
    checked = verify()
    # Beginning and end of the backup and both restores are recorded, and nothing else.
    assert (checked.status, checked.events) == ("ok", last + 4)


def test_an_act_that_a_start_has_to_finish_is_recorded_then(service: Service) -> None:
    jane, joe = service.user("jane@example.com"), service.user("joe@example.com")
    consent(joe, granted=True)
    # Promised beside the backups by a process that was killed before it could commit.
    with Session(get_engine()) as session:
        for user_id, kind in ((jane, LedgerKind.ERASE), (joe, LedgerKind.WITHDRAW_CONSENT)):
            subject = reference_to(session, session.get_one(User, user_id).uid)
            get_ledger_service().enter(
                session, kind, subject, COMMAND_LINE, at=datetime.now(UTC), purpose="marketing"
            )
    assert is_there(jane)
    get_setup_service().prepare()
    assert (is_there(jane), has_consent(joe)) == (False, False)
    assert acts("erasure") == ["applied_again"]
    assert acts("consent") == ["done", "applied_again"]
    assert found() is None
