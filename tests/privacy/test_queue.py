"""The queue: an erasure that a legal hold forbids waits for it to end, and for nothing else."""

from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, date, datetime
from typing import Any, Final
from uuid import UUID

import httpx2 as httpx
import pytest
from fastapi.testclient import TestClient

from backend.db_utils import session_scope
from backend.errors import SubjectNotFoundError
from backend.models import DATA_MAP, Companion, Role, User
from backend.privacy.declarations import EraseMode
from backend.services.queue_service import get_queue_service
from backend.services.setup_service import get_setup_service
from backend.services.store_service import store
from backend.services.subject_service import Who
from tests.conftest import Service, SignIn
from tests.privacy.people import ADMINISTRATOR, Person, booking, dump, plant, without

# What no engine does otherwise is shown on the one that starts sooner.
SQLITE = pytest.mark.parametrize("service", ["sqlite"], indirect=True)
HOLDS: Final = "/security/holds"
REASON: Final = "request under art. 17"
Headers = dict[str, str]


def erase(
    client: TestClient, headers: Headers, user_id: int | None, **fields: Any
) -> httpx.Response:
    body = {"user_id": user_id, "mode": "delete", "reason": REASON, "queue": True} | fields
    return client.post("/security/data/delete", json=body, headers=headers)


def place(client: TestClient, headers: Headers, **what: Any) -> str:
    answer = client.post(HOLDS, json={"reason": "claim of 2026-11"} | what, headers=headers)
    assert answer.status_code == 201, answer.text
    return str(answer.json()["id"])


def release(client: TestClient, headers: Headers, hold_id: str) -> None:
    # The queue runs after the answer, which the test client waits for.
    assert client.delete(f"{HOLDS}/{hold_id}", headers=headers).status_code == 200


def is_there(user_id: int) -> bool:
    with session_scope(read_only=True) as session:
        return session.get(User, user_id) is not None


def queued() -> list[dict[str, Any]]:
    return list(dump()["queued_erasures"].values())


def hold_on(kind: str, person: Person) -> dict[str, Any]:
    return {
        "person": {"scope": "person", "user_id": person.id},
        "row": {"scope": "row", "data_type": "feedback", "row_id": person.keys["feedback"][0]},
        "data type": {"scope": "data_type", "data_type": "booking"},
    }[kind]


@pytest.mark.parametrize("kind", ["person", "row", "data type"])
def test_what_a_hold_forbids_is_queued_and_runs_when_the_hold_is_released(
    client: TestClient, admin: Headers, kind: str
) -> None:
    person, other = plant("A"), plant("B")
    hold = place(client, admin, **hold_on(kind, person))
    before = without(dump(), {}, "audit_events")
    asked_only = erase(client, admin, person.id, queue=False)
    assert (asked_only.status_code, asked_only.json()["holds"]) == (409, [hold])
    tried = erase(client, admin, person.id, dry_run=True)
    assert (tried.status_code, tried.json()["code"]) == (409, "legal_hold")
    assert without(dump(), {}, "audit_events") == before

    answer = erase(client, admin, person.id)
    assert answer.status_code == 202
    said = answer.json()
    assert (said["status"], said["mode"], said["holds"]) == ("queued", "delete", [hold])
    assert without(dump(), {}, "audit_events", "queued_erasures") == without(
        before, {}, "queued_erasures"
    )
    assert list(store().names("ledger-", ".enc")) == []

    release(client, admin, hold)
    assert not is_there(person.id)
    assert queued() == []
    (record,) = dump()["erasures"].values()
    # Proven as any other.
    assert record["certificate"] is not None
    assert is_there(other.id)


@SQLITE
def test_a_queued_request_is_one_however_often_it_is_made_and_the_last_word_counts(
    client: TestClient, admin: Headers
) -> None:
    person = plant("A")
    holds = [place(client, admin, **hold_on(kind, person)) for kind in ("person", "row")]
    first = erase(client, admin, person.id).json()
    email = next(m.text for m in person.marks if (m.table, m.column) == ("users", "email"))
    for user_id, named in ((person.id, {}), (None, {"email": email.upper()})):
        again = erase(client, admin, user_id, mode="anonymize", **named).json()
        assert (again["request_id"], again["mode"]) == (first["request_id"], "anonymize")
        assert again["queued_at"] == first["queued_at"]
        assert set(again["holds"]) == set(holds)
    assert len(queued()) == 1
    for hold in holds:
        assert is_there(person.id)
        release(client, admin, hold)
    with session_scope(read_only=True) as session:
        assert session.get_one(User, person.id).anonymized_at is not None
    assert queued() == []


@SQLITE
def test_one_of_two_holds_released_frees_nobody(client: TestClient, admin: Headers) -> None:
    person, other = plant("A"), plant("B")
    first, second = (place(client, admin, **hold_on(kind, person)) for kind in ("person", "row"))
    unrelated = place(client, admin, scope="person", user_id=other.id)
    erase(client, admin, person.id)
    for hold in (unrelated, second):
        release(client, admin, hold)
        assert is_there(person.id)
        assert len(queued()) == 1
    release(client, admin, first)
    assert not is_there(person.id)


@SQLITE
def test_a_queued_request_is_in_the_persons_export_and_sealed_in_the_database(
    client: TestClient, admin: Headers
) -> None:
    person = plant("A")
    hold = place(client, admin, **hold_on("person", person))
    request = erase(client, admin, person.id, reason="asked at the desk").json()
    asked = {"user_id": person.id, "format": "json"}
    document = client.post("/security/data/export", json=asked, headers=admin).json()
    (row,) = document["data"]["queued_erasures"]
    assert (row["id"], row["mode"], row["reason"]) == (
        request["request_id"], "delete", "asked at the desk",
    )  # fmt: skip
    assert document["counts"]["queued_erasures"] == 1
    assert "erasure_queued" in {request["action"] for request in document["requests"]}
    assert [str(row["reason"])[:5] for row in queued()] == ["enc1."]
    # It is no way round the hold: the person's other data are all still there.
    assert len(document["data"]["bookings"]) == 2
    release(client, admin, hold)
    gone = client.post("/security/data/export", json=asked, headers=admin)
    assert gone.status_code == 404


@SQLITE
def test_who_is_under_no_hold_is_erased_at_once_and_nobody_unknown_is_queued(
    client: TestClient, admin: Headers
) -> None:
    person = plant("A")
    done = erase(client, admin, person.id)
    assert (done.status_code, done.json()["status"]) == (200, "complete")
    assert erase(client, admin, person.id).status_code == 404
    assert erase(client, admin, 1).status_code == 409
    assert queued() == []


@SQLITE
def test_an_erasure_by_hand_takes_the_queued_one_with_it(
    client: TestClient, admin: Headers
) -> None:
    person = plant("A")
    hold = place(client, admin, **hold_on("person", person))
    erase(client, admin, person.id)
    with session_scope() as session:
        # As another process that has released it, and has not run the queue yet.
        session.execute(DATA_MAP["legal_holds"].table.delete())
    assert hold
    assert erase(client, admin, person.id).status_code == 200
    assert queued() == []
    assert get_queue_service().run() == 0
    assert len(dump()["erasures"]) == 1


@SQLITE
def test_the_start_runs_what_a_process_that_died_has_left(
    client: TestClient, admin: Headers
) -> None:
    person, held = plant("A"), plant("B")
    place(client, admin, **hold_on("person", held))
    hold = place(client, admin, **hold_on("person", person))
    for one in (person, held):
        assert erase(client, admin, one.id).status_code == 202
    with session_scope() as session:
        table = DATA_MAP["legal_holds"].table
        released = table.update().where(table.c.user_id == person.id)
        session.execute(released.values(released_at=datetime.now(UTC)))
    assert hold
    assert is_there(person.id)
    get_setup_service().prepare()
    assert not is_there(person.id)
    assert is_there(held.id)
    assert [row["user_id"] for row in queued()] == [held.id]


def test_a_queued_erasure_that_may_not_be_done_stays_is_logged_and_keeps_nobody_else(
    client: TestClient, service: Service, admin: Headers, sign_in: SignIn,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    second = service.user("second@example.com", Role.ADMIN, full_name="Second Zaunkoenig")
    guest = service.user("zoe@example.com")
    holds = [place(client, admin, scope="person", user_id=one) for one in (second, guest)]
    requests = [erase(client, admin, one).json()["request_id"] for one in (second, guest)]
    as_second = sign_in("second@example.com")
    # Now the one who waits is the last admin.
    assert erase(client, as_second, 1).status_code == 200
    caplog.clear()
    for hold in holds:
        release(client, as_second, hold)
    assert is_there(second)
    assert not is_there(guest)
    assert [row["user_id"] for row in queued()] == [second]
    said = [line for line in caplog.messages if "queued_erasure_failed" in line]
    # At each release the queue was run.
    assert len(said) == 2
    assert all(requests[0] in line for line in said)
    assert "zaunkoenig" not in caplog.text.lower()
    # With another admin there it goes.
    service.user("third@example.com", Role.ADMIN)
    assert get_queue_service().run() == 1
    assert not is_there(second)


def test_two_processes_that_run_the_queue_erase_once(client: TestClient, admin: Headers) -> None:
    people_there = [plant(letter) for letter in "AB"]
    holds = [place(client, admin, **hold_on("person", person)) for person in people_there]
    for person in people_there:
        erase(client, admin, person.id)
    with session_scope() as session:
        session.execute(DATA_MAP["legal_holds"].table.delete())
    assert holds
    with ThreadPoolExecutor(3) as pool:
        ran = list(pool.map(lambda _: get_queue_service().run(), range(3)))
    assert sum(ran) == 2
    assert len(dump()["erasures"]) == 2
    assert queued() == []


@pytest.mark.parametrize("kind", ["person", "row", "data type"])
@SQLITE
def test_a_hold_keeps_what_a_booking_says_of_companions_too(
    client: TestClient, service: Service, admin: Headers, kind: str
) -> None:
    host = service.user("host@example.com")
    stay = booking(host, date(2026, 1, 2))
    service.add(stay)
    service.add(
        Companion(booking_id=stay.id, email="kim@example.com", created_at=datetime.now(UTC))
    )
    scopes: dict[str, dict[str, Any]] = {
        "person": {"scope": "person", "user_id": host},
        "row": {"scope": "row", "data_type": "booking", "row_id": stay.id},
        "data type": {"scope": "data_type", "data_type": "booking"},
    }
    hold = place(client, admin, **scopes[kind])
    before = without(dump(), {}, "audit_events")
    refused = erase(client, admin, None, email="kim@example.com", queue=False)
    # What was held for a claim would no longer say who was there.
    assert (refused.status_code, refused.json().get("holds")) == (409, [hold])
    assert without(dump(), {}, "audit_events") == before
    release(client, admin, hold)
    done = erase(client, admin, None, email="kim@example.com", queue=False)
    assert done.json()["tables"]["companions"]["redacted"] == 1


def test_two_who_ask_at_once_make_one_request(client: TestClient, admin: Headers) -> None:
    person = plant("A")
    place(client, admin, **hold_on("person", person))
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: erase(client, admin, person.id), range(4)))
    assert [answer.status_code for answer in answers] == [202] * 4
    assert {answer.json()["request_id"] for answer in answers} == {
        str(UUID(str(row["id"]))) for row in queued()
    }
    assert len(queued()) == 1


@SQLITE
def test_nobody_who_has_no_row_is_queued(service: Service) -> None:
    with session_scope() as session, pytest.raises(SubjectNotFoundError):
        get_queue_service().enqueue(
            session, ADMINISTRATOR, Who(email="nobody@example.com"), EraseMode.DELETE, reason="x"
        )
    assert queued() == []
