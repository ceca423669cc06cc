"""Retention runs: batch by batch, all that is due goes, beside others and whatever ends a run."""

import threading
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any, Final

import pytest
from sqlalchemy import delete, text, update

from backend.db_utils import session_scope
from backend.models import (
    DATA_MAP,
    DataRetentionLog,
    InvoiceLine,
    PolicyVersion,
    RetentionStatus,
    User,
)
from backend.privacy.declarations import OnErase
from backend.privacy.periods import Period
from backend.services.pace import Pace
from backend.services.policy_service import get_policy_service
from backend.services.retention_results import RetentionRun
from backend.services.retention_service import get_retention_service
from backend.services.setup_service import get_setup_service
from backend.settings import RetentionAction
from tests.conftest import Service, clear_caches
from tests.privacy import people
from tests.privacy.people import ADMINISTRATOR, companion, dump, feedback, plant

DELETE, ANONYMIZE = RetentionAction.DELETE, RetentionAction.ANONYMIZE
NOW: Final = datetime(2026, 11, 20, 14, 30, 15, tzinfo=UTC)
OLD: Final = datetime(2001, 2, 3, 4, 5, 6, tzinfo=UTC)
BATCH: Final = 3

pytestmark = pytest.mark.usefixtures("_without_brake")


@pytest.fixture
def _without_brake(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """These runs touch whole tables, as somebody has meant."""
    monkeypatch.setenv("RETENTION_BRAKE_ROWS", "1000000")
    clear_caches()
    get_setup_service().open()


@pytest.fixture
def _small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    for limit in ("_FIRST", "_LEAST", "MOST"):
        monkeypatch.setattr(Pace, limit, BATCH)


class Rests:
    """The clock of the pace: it does something at some of the rests, the first being 1."""

    def __init__(self, acts: dict[int, Callable[[], object]]) -> None:
        self.taken = 0
        self._acts = acts

    def sleep(self, _seconds: float) -> None:
        self.taken += 1
        self._acts.get(self.taken, lambda: None)()

    def monotonic(self) -> float:
        return time.monotonic()


def at_rests(monkeypatch: pytest.MonkeyPatch, **acts: Callable[[], object]) -> Rests:
    """Do something before a batch: `before_3=...`."""
    rests = Rests({int(name.removeprefix("before_")): act for name, act in acts.items()})
    monkeypatch.setattr("backend.services.pace.time", rests)
    return rests


def apply(data_type: str | None = None, **fields: Any) -> RetentionRun:
    given: dict[str, Any] = {"dry_run": False, "now": NOW} | fields
    return get_retention_service().apply(ADMINISTRATOR, data_type=data_type, **given)


def set_policy(data_type: str, action: RetentionAction, period: str = "P1Y") -> None:
    with session_scope() as session:
        parsed = Period.parse(period)
        get_policy_service().set(session, ADMINISTRATOR, data_type, parsed, action, enabled=True)
        # As if it had never been another: the brake has tests of its own.
        session.execute(delete(PolicyVersion))


def logs(data_type: str) -> Sequence[DataRetentionLog]:
    """The log of one data type, oldest first."""
    with session_scope(read_only=True) as session:
        newest, _ = get_retention_service().logs(session, 100, 0, data_type=data_type)
    return newest[::-1]


def affected(run: RetentionRun) -> dict[str, int]:
    return {one.data_type: one.affected for one in run.results}


@pytest.mark.usefixtures("_small_batches")
@pytest.mark.parametrize("rows", [0, 1, BATCH - 1, BATCH, BATCH + 1, 3 * BATCH])
def test_every_due_row_goes_however_many_batches_there_are(
    service: Service, monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    new = feedback(None, NOW)
    # Keys and ages have nothing to do with each other.
    service.add(*(feedback(None, OLD) for _ in range(rows // 2)), new)
    service.add(*(feedback(None, OLD) for _ in range(rows - rows // 2)))
    rests = at_rests(monkeypatch)
    assert apply("feedback").affected == rows
    assert set(dump()["feedback"]) == {(new.id,)}
    assert rests.taken == -(-rows // BATCH) + 1
    (logged,) = logs("feedback")
    assert (logged.status, logged.matched, logged.affected) == (RetentionStatus.DONE, rows, rows)


@pytest.mark.usefixtures("_small_batches")
@pytest.mark.parametrize("action", [DELETE, ANONYMIZE])
def test_what_hangs_from_the_rows_of_a_batch_goes_with_them(
    service: Service, action: RetentionAction
) -> None:
    due = [people.booking(None, OLD.date()) for _ in range(2 * BATCH + 1)]
    stays = people.booking(None, NOW.date())
    bills = [people.invoice(None, OLD.date()) for _ in range(2 * BATCH + 1)]
    new_bill = people.invoice(None, NOW.date())
    service.add(*due, stays, *bills, new_bill)
    paid = [people.payment(None, NOW, booking_id=stay.id) for stay in due]
    service.add(*(companion(stay.id, full_name="Jane") for stay in [*due, stays]), *paid)
    service.add(
        *(InvoiceLine(**people.line_values(), invoice_id=bill.id, description="a room")
          for bill in [*bills, new_bill] for _ in range(2)),
    )  # fmt: skip
    for data_type in ("booking", "invoice"):
        set_policy(data_type, action)
    run = apply()
    assert affected(run) == dict.fromkeys(DATA_MAP.by_data_type, 0) | {"booking": 7, "invoice": 7}
    after = dump()
    left = {
        "companions": [row["full_name"] is not None for row in after["companions"].values()],
        "invoice_lines": [r["description"] is not None for r in after["invoice_lines"].values()],
    }
    gone = [] if action is DELETE else [False] * 7
    assert {name: sorted(cells) for name, cells in left.items()} == {
        "companions": [*gone, True],
        "invoice_lines": [*gone, *gone, True, True],
    }
    if action is DELETE:
        assert set(after["bookings"]) == {(stays.id,)}
        # A payment is kept for longer than the stay: its link to it is cut.
        assert {row["booking_id"] for row in after["payments"].values()} == {None}


def may_stay(mark: people.Mark) -> bool:
    """Whether a law, or what statistics need, may keep the text of a person who is gone."""
    rule = DATA_MAP[mark.table].personal_columns[mark.column]
    return rule.statutory or rule.on_erase is OnErase.KEEP


@pytest.mark.usefixtures("_small_batches")
@pytest.mark.parametrize("action", [DELETE, ANONYMIZE])
def test_people_go_in_batches_and_what_the_law_keeps_of_each_stays_restricted(
    service: Service, action: RetentionAction
) -> None:
    now = datetime.now(UTC)
    persons, active = [plant(letter, now) for letter in "ABCDEFG"], plant("H", now)
    with session_scope() as session:
        session.execute(
            update(User)
            .where(User.id.in_([person.id for person in persons]))
            .values(last_activity_at=OLD)
        )
    before = dump()
    set_policy("user", action)
    assert affected(apply("user", now=now)) == {"user": 7}
    after = dump()
    for person in persons:
        own = after["users"].get((person.id,))
        assert own is None if action is DELETE else (own or {})["anonymized_at"] is not None
        for table in ("payments", "invoices"):
            inside, past = person.keys[table]
            assert after[table][(inside,)]["restricted_at"] is not None
            assert after[table][(inside,)]["user_id"] is None
            assert (past,) not in after[table] or after[table][(past,)]["anonymized_at"]
    lines = [line for person in persons for line in person.keys["invoice_lines"][:2]]
    assert all((line,) in after["invoice_lines"] for line in lines)
    cells = people.cells_in_plain()
    for person in persons:
        assert people.left_of({m.text for m in person.marks if not may_stay(m)}, cells) == set()
    for table, keys in people.keys_of(before, active.id).items():
        assert all(after[table][key] == before[table][key] for key in keys), table


@pytest.mark.usefixtures("_small_batches")
def test_who_becomes_active_between_two_batches_stays(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = [service.user(f"{n}@example.com", last_activity_at=OLD) for n in range(2 * BATCH)]

    def sign_in() -> None:
        with session_scope() as session:
            session.get_one(User, ids[-1]).last_activity_at = NOW

    at_rests(monkeypatch, before_2=sign_in)
    set_policy("user", DELETE)
    assert apply("user").affected == 2 * BATCH - 1
    assert {key for (key,) in dump()["users"]} & set(ids) == {ids[-1]}


def test_batches_of_full_size_are_within_what_engines_take(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch's keys are parameters of each of its statements, and engines have limits for them."""
    monkeypatch.setattr(Pace, "_FIRST", Pace.MOST)
    rows = Pace.MOST + 1
    service.add(people.booking(None, OLD.date()))
    with session_scope() as session:
        names = ", ".join(c.name for c in DATA_MAP["bookings"].table.c if c.name not in
                          ("id", "reference"))  # fmt: skip
        session.execute(
            text(
                "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < :rows) "  # noqa: S608 - names of the model
                f"INSERT INTO bookings (reference, {names}) "
                f"SELECT CAST(i AS TEXT), {names} FROM bookings, n"
            ),
            {"rows": rows - 1},
        )
    set_policy("booking", DELETE)
    assert apply("booking").affected == rows
    assert dump()["bookings"] == {}


@pytest.mark.usefixtures("_small_batches")
def test_two_runs_at_once_do_each_other_no_harm_and_their_logs_add_up(
    service: Service,
) -> None:
    rows = [people.booking(None, OLD.date()) for _ in range(40)]
    service.add(*rows, *(feedback(None, OLD) for _ in range(40)))
    service.add(*(companion(row.id) for row in rows))
    set_policy("booking", DELETE)
    together, raised, runs = threading.Barrier(2), list[Exception](), list[RetentionRun]()

    def work() -> None:
        together.wait(timeout=60)
        try:
            runs.append(apply())
        except Exception as err:  # noqa: BLE001 - looked at below
            raised.append(err)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert raised == []
    assert sum(run.affected for run in runs) == 80
    after = dump()
    assert (after["bookings"], after["companions"], after["feedback"]) == ({}, {}, {})
    for data_type in ("booking", "feedback"):
        assert sum(log.affected for log in logs(data_type)) == 40
        assert {log.status for log in logs(data_type)} == {RetentionStatus.DONE}
