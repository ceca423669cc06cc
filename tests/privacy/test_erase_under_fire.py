"""Erasure beside everything else: others who erase, write, read, hang up, are killed, restore."""

import gc
import json
import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final
from uuid import UUID

import httpx2 as httpx
import pytest
from fastapi.testclient import TestClient
from sqlalchemy import event, func, select, text
from sqlalchemy.exc import DBAPIError

from backend.db_utils import dispose_engine, get_engine, session_scope
from backend.errors import HoldfastError
from backend.models import (
    Booking,
    Companion,
    Feedback,
    LedgerEntry,
    LedgerKind,
    Payment,
    User,
)
from backend.privacy.declarations import EraseMode
from backend.services.audit_service import COMMAND_LINE
from backend.services.certificate_service import get_certificate_service
from backend.services.erasure_service import Erasure, get_erasure_service
from backend.services.hold_service import get_hold_service
from backend.services.ledger_service import get_ledger_service
from backend.services.setup_service import get_setup_service
from backend.services.store_service import store
from backend.services.subject_service import Who, get_subject_service
from tests.conftest import Service
from tests.privacy.people import (
    booking,
    cells_in_plain,
    companion,
    dump,
    feedback,
    keys_of,
    left_of,
    many_rows,
    payment,
    person_hold,
    plant,
)

DELETE, ANONYMIZE = EraseMode.DELETE, EraseMode.ANONYMIZE
JANE, JANES_PHONE, KIM = "jane@example.com", "+351 912 345 678", "kim@example.com"
DELETE_URL = "/security/data/delete"
# Bounds what never comes; how long a busy machine takes decides nothing.
_PATIENCE_SECONDS: Final = 60


def erase(who: Who, mode: EraseMode = DELETE) -> Erasure:
    with session_scope() as session:
        return get_erasure_service().erase(
            session, COMMAND_LINE, who, mode, reason="request", dry_run=False
        )


def gone(user_id: int) -> bool:
    """Whether neither the person nor a row that leads to them is there."""
    raw = dump()
    keys = keys_of(raw, user_id)
    return (
        (user_id,) not in raw["users"]
        and keys.pop("users") == {(user_id,)}
        and not any(keys.values())
    )


def certificate(erasure_id: Any) -> dict[str, Any]:
    with session_scope() as session:
        document: dict[str, Any] = json.loads(get_certificate_service().of(session, erasure_id))
    statement: dict[str, Any] = document["statement"]
    return statement


# Others who erase


@pytest.mark.parametrize(
    ("named", "mode", "told"),
    [("user_id", DELETE, 404), ("user_id", ANONYMIZE, 410), ("email", DELETE, 404)],
    ids=["delete", "anonymize", "known by an address alone"],
)
def test_of_two_requests_at_once_one_erases_and_one_is_told_that_nobody_is_there(
    client: TestClient, service: Service, admin: dict[str, str],
    named: str, mode: EraseMode, told: int,
) -> None:  # fmt: skip
    person = plant("A")
    host = booking(plant("B").id, datetime.now(UTC).date())
    service.add(host)
    service.add(companion(host.id, email=KIM, full_name="Kim Known"))
    who = {"user_id": person.id} if named == "user_id" else {"email": KIM.upper()}
    body = {**who, "mode": mode, "reason": "request"}
    start = threading.Barrier(2)

    def ask(_number: int) -> httpx.Response:
        start.wait()
        return client.post(DELETE_URL, json=body, headers=admin)

    with ThreadPoolExecutor(2) as pool:
        answers = sorted(pool.map(ask, range(2)), key=lambda answer: answer.status_code)
    assert [answer.status_code for answer in answers] == [200, told]
    assert client.post(DELETE_URL, json=body, headers=admin).status_code == told
    with session_scope(read_only=True) as session:
        assert session.scalar(select(func.count()).select_from(LedgerEntry)) == 1
    assert len(list(store().names("ledger-", ".enc"))) == 1
    proof = client.get(f"/security/data/erasures/{answers[0].json()['erasure_id']}", headers=admin)
    assert proof.json()["statement"]["scan"]["state"] == "clean"


def test_a_second_erasure_that_waited_for_the_first_is_told_so_by_address_too(
    service: Service,
) -> None:
    """Nobody's row is there to be locked, so that both have looked before one was done."""
    host = booking(plant("B").id, datetime.now(UTC).date())
    service.add(host)
    service.add(companion(host.id, email=KIM))

    def second() -> str:
        try:
            erase(Who(email=KIM))
        except HoldfastError as err:
            return err.code
        return "erased"

    with ThreadPoolExecutor(1) as pool:
        with session_scope() as session:
            get_erasure_service().erase(
                session, COMMAND_LINE, Who(email=KIM), DELETE, reason="request", dry_run=False
            )
            waiting = pool.submit(second)
            wait([waiting], timeout=0.3)
        assert waiting.result(timeout=60) == "subject_not_found"
    assert len(list(store().names("ledger-", ".enc"))) == 1


# Others who write


def test_an_address_that_is_being_changed_during_an_erasure_goes_too(service: Service) -> None:
    person = service.user("old@example.com")
    host = booking(plant("B").id, datetime.now(UTC).date())
    service.add(host)
    with ThreadPoolExecutor(1) as pool:
        with session_scope() as session:
            session.get_one(User, person).email = JANE
            session.add(companion(host.id, email=JANE, full_name="Jane Known"))
            session.flush()
            erasing = pool.submit(erase, Who(person))
            wait([erasing], timeout=0.3)
        erasing.result(timeout=60)
    assert left_of({JANE, "Jane Known"}, cells_in_plain()) == set()


class Writers:
    """Fifty writers of rows, and what was acknowledged to them."""

    def __init__(self, target: int, its_stay: int, others: list[int]) -> None:
        self._target, self._its_stay, self._others = target, its_stay, others
        self._stop = threading.Event()
        self.acknowledged: list[str] = []
        self.of_target = 0
        self.unexpected: list[Exception] = []

    @contextmanager
    def at_work(self) -> Iterator[None]:
        threads = [threading.Thread(target=self._work, args=(n,)) for n in range(50)]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self._stop.set()
            for thread in threads:
                thread.join()

    def wait_for_some(self) -> None:
        """Wait until rows of the one and of others were acknowledged."""
        end = time.monotonic() + _PATIENCE_SECONDS
        while not (self.of_target and self.acknowledged):
            assert time.monotonic() < end, "nobody writes"
            time.sleep(0.02)

    def _work(self, number: int) -> None:
        dice = random.Random(number)  # noqa: S311 - nothing secret
        end = time.monotonic() + _PATIENCE_SECONDS
        for turn in range(1000):
            if self._stop.is_set() or time.monotonic() > end:
                return
            mine = (turn + number) % 3 == 0
            user_id = self._target if mine else dice.choice(self._others)
            words = f"{'late' if mine else 'kept'} words {number}-{turn}"
            try:
                with session_scope() as session:
                    self._write(session, user_id, words, awkward=mine and number % 2 == 0)
            except DBAPIError:
                continue  # The person is gone, or two have waited for each other.
            except Exception as err:  # noqa: BLE001 - looked at by the test
                self.unexpected.append(err)
            else:
                self.of_target += mine
                if not mine:
                    self.acknowledged.append(words)
            # Fifty that never rest would leave the eraser no turn of the interpreter's lock.
            time.sleep(0.3)

    def _write(self, session: Any, user_id: int, words: str, *, awkward: bool) -> None:
        now = datetime.now(UTC)
        if awkward:
            # A row that hangs from theirs first: not in the order in which an erasure goes.
            session.add(companion(self._its_stay, full_name=words))
            session.flush()
        stay = booking(user_id, now.date(), staff_notes=words)
        session.add(stay)
        session.flush()
        session.add_all([
            companion(stay.id, full_name=words, email=f"{stay.reference}@example.com"),
            payment(user_id, now, payment_reference=words),
            feedback(user_id, now, comment=words),
        ])  # fmt: skip


def test_an_erasure_among_fifty_writers_ends_right(
    client: TestClient, service: Service, admin: dict[str, str]
) -> None:
    if service.engine == "postgresql":
        # Two that wait for each other are told sooner than after a second.
        name = service.url.rpartition("/")[2]
        with session_scope() as session:
            session.execute(text(f"ALTER DATABASE {name} SET deadlock_timeout = '20ms'"))
        dispose_engine()
    person, others = plant("A"), [plant("B").id, plant("C").id]
    writers = Writers(person.id, person.keys["bookings"][0], others)
    statuses: list[int] = []
    with writers.at_work():
        writers.wait_for_some()
        body = {"user_id": person.id, "mode": "delete", "reason": "request"}
        while not statuses or (statuses[-1] in (409, 503) and len(statuses) < 20):
            statuses.append(client.post(DELETE_URL, json=body, headers=admin).status_code)
        time.sleep(0.1)
    assert statuses[-1] == 200, statuses
    assert writers.unexpected == []
    assert writers.of_target > 0
    assert gone(person.id)
    cells = cells_in_plain()
    assert [cell for cell in cells if cell.startswith("late words")] == []
    assert len(writers.acknowledged) > 10
    for table in (Booking.staff_notes, Companion.full_name, Payment.payment_reference,
                  Feedback.comment):  # fmt: skip
        with session_scope(read_only=True) as session:
            assert set(writers.acknowledged) <= set(session.scalars(select(table)))
    # One promise, and none of an attempt that was given up.
    assert len(list(store().names("ledger-", ".enc"))) == 1


# Killed


def test_an_erasure_that_waited_for_holds_runs_after_the_last_also_after_a_kill(
    client: TestClient, service: Service, admin: dict[str, str]
) -> None:
    person = plant("A")
    service.add(person_hold(person.id), person_hold(person.id))
    body = {"user_id": person.id, "mode": "delete", "reason": "request", "queue": True}
    queued = client.post(DELETE_URL, json=body, headers=admin)
    assert queued.status_code == 202
    first, last = queued.json()["holds"]
    assert client.delete(f"/security/holds/{first}", headers=admin).status_code == 200
    assert not gone(person.id)
    # Killed between the release's commit and what runs after its answer.
    with session_scope() as session:
        get_hold_service().release(session, UUID(last), COMMAND_LINE)
    assert not gone(person.id)
    get_setup_service().recover()
    assert gone(person.id)
    with session_scope(read_only=True) as session:
        (entry,) = session.scalars(select(LedgerEntry.id))
    assert certificate(entry)["scan"]["state"] == "clean"


class _KilledError(Exception):
    """Stands for the end of a process between object and commit."""


def promise_only(who: Who) -> Any:
    """Leave what a process leaves that was killed once the ledger's object was written."""
    with suppress(_KilledError), session_scope() as session:
        subject = get_subject_service().find(session, who)
        entry = get_ledger_service().enter(
            session, LedgerKind.ERASE, subject.ref, COMMAND_LINE, at=datetime.now(UTC),
            identity_refs=subject.identity_refs,
        )  # fmt: skip
        raise _KilledError
    return entry.id


@pytest.mark.parametrize("by", ["number", "address"])
def test_an_erasure_that_a_start_finishes_has_a_certificate(service: Service, by: str) -> None:
    person, host = service.user(JANE), booking(plant("B").id, datetime.now(UTC).date())
    service.add(host)
    service.add(companion(host.id, email=KIM), companion(host.id, email=JANE))
    entry = promise_only(Who(person) if by == "number" else Who(email=KIM))
    get_setup_service().recover()
    left = {KIM} if by == "number" else {JANE}
    assert left_of({KIM, JANE}, cells_in_plain()) == left
    statement = certificate(entry)
    assert (statement["mode"], statement["scan"]) == ("delete", {"state": "applied_again"})


# Many rows


def peak_kib(act: Callable[[], object]) -> int:
    """How far *act* takes the memory of this process above what it was, in KiB."""
    gc.collect()
    # 5 resets the high-water mark: proc(5), clear_refs.
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    act()
    return _status("VmHWM") - before


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{name}:")).split()[1])


def test_an_erasure_of_very_many_rows_costs_no_more_statements_and_no_memory(
    sqlite_service: Service,
) -> None:
    statements: list[str] = []
    event.listen(
        get_engine(), "before_cursor_execute",
        lambda _c, _cursor, statement, *_rest: statements.append(statement),
    )  # fmt: skip
    counts, grown = [], 0
    for rows in (20, 20_000):
        person = sqlite_service.user(f"guest{rows}@example.com")
        many_rows(person, rows)
        statements.clear()
        done: list[Erasure] = []

        def act(person: int = person, done: list[Erasure] = done) -> None:
            done.append(erase(Who(person)))

        grown = peak_kib(act)
        assert done[0].plan.counts["feedback"]["deleted"] == rows  # type: ignore[index] # by value
        counts.append(len(statements))
        get_erasure_service().prove(done[0])
        assert certificate(done[0].erasure_id)["scan"]["state"] == "clean"
        assert gone(person)
    assert counts[0] == counts[1]
    assert grown < 16 * 1024
