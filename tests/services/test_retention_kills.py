"""Retention runs that end early, or have company: whole batches, a log that says so, and a rest."""

from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Final

import pytest
from sqlalchemy import func, select, text, update

from backend.db_utils import BUSY_TIMEOUT_SECONDS, session_scope
from backend.models import DATA_MAP, AuditEvent, DataRetentionLog, Feedback, RetentionStatus
from backend.services.pace import Pace
from backend.services.setup_service import get_setup_service
from tests.backup.beside import beside
from tests.backup.commands import Commands, running_commands
from tests.backup.lives import acts
from tests.backup.test_under_writers import Till
from tests.conftest import Service, clear_caches
from tests.privacy import people
from tests.privacy.people import feedback
from tests.services.test_retention_runs import (
    DELETE,
    NOW,
    OLD,
    affected,
    apply,
    at_rests,
    logs,
    set_policy,
)

WRITERS: Final = 50
RUNNING, DONE = RetentionStatus.RUNNING, RetentionStatus.DONE
FAILED, INTERRUPTED = RetentionStatus.FAILED, RetentionStatus.INTERRUPTED


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    with running_commands(tmp_path_factory.mktemp("commands")) as commands:
        yield commands


@pytest.fixture(autouse=True)
def _without_brake(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """These runs touch whole tables, as somebody has meant."""
    monkeypatch.setenv("RETENTION_BRAKE_ROWS", "1000000")
    clear_caches()
    get_setup_service().open()


def fill(rows: int) -> None:
    """Add feedback that is due, each with words of its own."""
    with session_scope() as session:
        session.add_all([feedback(None, OLD, comment=f"words {n}") for n in range(rows)])


def rows_left() -> int:
    with session_scope(read_only=True) as session:
        return session.scalar(select(func.count()).select_from(Feedback)) or 0


def age_logs(*data_types: str, minutes: int = 6) -> None:
    """As if the last word of a run were so long ago."""
    with session_scope() as session:
        session.execute(
            update(DataRetentionLog)
            .where(DataRetentionLog.data_type.in_(data_types or DATA_MAP.by_data_type))
            .values(finished_at=datetime.now(UTC) - timedelta(minutes=minutes))
        )


@pytest.mark.parametrize(
    ("path", "batches"),
    [
        # Before the rows of the first batch, and of the second; before they last.
        (("DELETE",), 0),
        (("DELETE", "do_commit"), 0),
        (("DELETE", "do_commit", "DELETE"), 1),
        (("DELETE", "do_commit", "DELETE", "UPDATE"), 1),
        (("DELETE", "do_commit", "DELETE", "do_commit"), 1),
    ],
)
def test_a_killed_run_leaves_whole_batches_and_the_next_run_does_the_rest(
    service: Service, commands: Commands, path: tuple[str, ...], batches: int
) -> None:
    rows = Pace._FIRST + 100
    fill(rows)
    gone = batches * Pace._FIRST
    assert commands.end("retention", "apply", at_path=path).killed
    assert rows_left() == rows - gone
    (killed,) = logs("feedback")
    assert (killed.status, killed.matched, killed.affected) == (RUNNING, rows, gone)
    assert [log.status for log in logs("user")] == [RUNNING]
    # It might be at work still: nobody can know so soon.
    assert affected(apply("feedback", now=datetime.now(UTC))) == {"feedback": rows - gone}
    assert rows_left() == 0
    assert [log.status for log in logs("feedback")] == [RUNNING, DONE]
    age_logs()
    assert apply(now=datetime.now(UTC)).affected == 0
    assert [log.status for log in logs("feedback")] == [INTERRUPTED, DONE, DONE]
    assert [log.status for log in logs("user")] == [INTERRUPTED, DONE]
    assert sum(log.affected for log in logs("feedback")) == rows
    assert acts("retention_applied") == ["begun", "begun", "done", "interrupted", "begun", "done"]


def test_killed_again_and_again_the_log_says_what_went_each_time(
    service: Service, commands: Commands
) -> None:
    rows = 3_000
    fill(rows)
    seconds = commands.run("retention", "apply", "--dry-run").seconds
    for part in range(1, 5):
        commands.kill("retention", "apply", after=seconds * (0.6 + 0.2 * part))
        assert rows_left() == rows - sum(log.affected for log in logs("feedback"))
    commands.run("retention", "apply")
    assert rows_left() == 0
    assert sum(log.affected for log in logs("feedback")) == rows
    assert logs("feedback")[-1].status == DONE


def break_table(service: Service, table: str, key: int) -> None:
    """Have the database refuse that the row goes, as a trigger of somebody's may."""
    body = "RAISE EXCEPTION 'not this one'"
    with session_scope() as session:
        if service.engine == "sqlite":
            session.execute(text(
                f"CREATE TRIGGER keep BEFORE DELETE ON {table} WHEN OLD.id = {key} "
                "BEGIN SELECT RAISE(ABORT, 'not this one'); END"
            ))  # fmt: skip
            return
        session.execute(text(
            "CREATE FUNCTION keep() RETURNS trigger LANGUAGE plpgsql AS "
            f"$$ BEGIN IF OLD.id = {key} THEN {body}; END IF; RETURN OLD; END $$"
        ))  # fmt: skip
        session.execute(text(
            f"CREATE TRIGGER keep BEFORE DELETE ON {table} FOR EACH ROW EXECUTE FUNCTION keep()"
        ))  # fmt: skip


def mend_table(service: Service, table: str) -> None:
    on_table = "" if service.engine == "sqlite" else f" ON {table}"
    with session_scope() as session:
        session.execute(text(f"DROP TRIGGER keep{on_table}"))


def test_a_run_that_fails_says_so_keeps_whole_batches_and_the_next_run_works(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    for limit in ("_FIRST", "_LEAST", "MOST"):
        monkeypatch.setattr(Pace, limit, 3)
    stays = [people.booking(None, OLD.date()) for _ in range(9)]
    service.add(*stays, feedback(None, OLD))
    service.add(*(people.companion(stay.id) for stay in stays))
    set_policy("booking", DELETE)
    break_table(service, "bookings", stays[4].id)
    with pytest.raises(Exception, match=r"keep|trigger|not this one|rule"):
        apply()
    left = {(stay.id,) for stay in stays[3:]}
    assert set(people.dump()["bookings"]) == left
    assert len(people.dump()["companions"]) == len(left)
    found = {name: [(log.status, log.affected) for log in logs(name)]
             for name in ("feedback", "booking", "user")}  # fmt: skip
    assert found == {"feedback": [(DONE, 1)], "booking": [(FAILED, 3)], "user": [(FAILED, 0)]}
    mend_table(service, "bookings")
    assert affected(apply(now=NOW + timedelta(hours=1)))["booking"] == 6
    assert [log.status for log in logs("booking")] == [FAILED, DONE]
    assert people.dump()["companions"] == {}


def test_a_run_that_fails_is_in_the_trail(service: Service) -> None:
    row = feedback(None, OLD)
    service.add(row)
    break_table(service, "feedback", row.id)
    with pytest.raises(Exception, match=r"keep|trigger|not this one|rule"):
        apply()
    with session_scope(read_only=True) as session:
        done = select(AuditEvent.outcome).where(AuditEvent.action == "retention_applied")
        assert session.scalars(done.order_by(AuditEvent.id)).all() == ["begun", "failed"]


def test_a_run_that_goes_on_for_long_is_not_called_interrupted(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    service.add(*(feedback(None, OLD) for _ in range(3)))
    found: Counter[str] = Counter()

    def six_minutes_later() -> None:
        # This run was at feedback all the time; the turn of the others comes after it.
        age_logs(*(set(DATA_MAP.by_data_type) - {"feedback"}))
        apply("invoice", now=NOW + timedelta(minutes=6))
        found.update(log.status for name in ("feedback", "user") for log in logs(name))

    at_rests(monkeypatch, before_2=six_minutes_later)
    assert apply().affected == 3
    assert found == {RUNNING: 2}


def test_beside_fifty_writers_a_run_ends_and_none_waits_for_long(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    for limit in ("_FIRST", "_LEAST", "MOST"):
        monkeypatch.setattr(Pace, limit, 50)
    fill(1_000)
    till = Till()
    with beside(*[till.write] * WRITERS, till.read) as raised:
        till.wait_for(WRITERS)
        before = till.done
        run = apply("feedback", now=datetime.now(UTC))
        meanwhile = till.done - before
    assert raised == []
    assert run.affected == 1_000
    assert meanwhile > 0
    assert till.longest_seconds < BUSY_TIMEOUT_SECONDS
    # What they wrote is not due, and is all there.
    assert rows_left() == len(people.dump()["payments"]) > 0
