"""Who looked at a person's data: lists, holds and telephones of several are no way round it."""

from datetime import UTC, date, datetime, timedelta
from typing import Any
from uuid import uuid4

import pytest
from fastapi.testclient import TestClient

from backend.models import HoldScope, InactivityNotice, LegalHold, Role
from tests.api.test_audit import Headers, ask
from tests.conftest import Run, Service, SignIn
from tests.privacy.people import booking, companion, plant
from tests.services.trail import numbers, sql

JANE, JOE, PHONE = "jane@example.com", "joe@example.com", "+49 30 1234567"
HOLDS, NOTICES, FIND = "/security/holds", "/security/retention/notices", "/security/data/find"


def looks(client: TestClient, headers: Headers, user_id: int) -> list[tuple[str, str]]:
    """What was done with somebody's data, oldest first, but for looking here."""
    found = ask(client, headers, user_id=user_id)[::-1]
    return [(e["action"], e["outcome"]) for e in found if e["action"] != "audit_read"]


def hold(client: TestClient, headers: Headers, **what: Any) -> str:
    body = {"reason": "claim of 2026-11"} | what
    answer = client.post(HOLDS, json=body, headers=headers)
    assert answer.status_code == 201, answer.text
    return str(answer.json()["id"])


def test_whose_notice_was_shown_is_recorded_of_each(
    client: TestClient, service: Service, admin: Headers
) -> None:
    jane, joe, kim = (service.user(f"{name}@example.com") for name in ("jane", "joe", "kim"))
    now = datetime.now(UTC)
    for days, user_id in enumerate((jane, joe, kim)):
        service.add(
            InactivityNotice(
                id=uuid4(), user_id=user_id, queued_at=now + timedelta(days=days), ends_at=now
            )
        )
    assert len(client.get(NOTICES, params={"limit": 2}, headers=admin).json()["items"]) == 2
    assert looks(client, admin, jane) == looks(client, admin, joe) == [("notice_read", "done")]
    # On a page that nobody has asked for.
    assert looks(client, admin, kim) == []


def test_whose_hold_was_read_is_recorded_of_each(
    client: TestClient, service: Service, sign_in: SignIn, admin: Headers
) -> None:
    jane, joe = service.user(JANE), service.user(JOE)
    service.user("auditor@example.com", Role.AUDITOR)
    stay = booking(joe, date(2026, 1, 2))
    service.add(stay)
    of_jane = hold(client, admin, scope="person", user_id=jane)
    of_joe = hold(client, admin, scope="row", data_type="booking", row_id=stay.id)
    of_all = hold(client, admin, scope="data_type", data_type="invoice")
    assert (
        client.get(f"{HOLDS}/{of_jane}", headers=sign_in("auditor@example.com")).status_code == 200
    )
    assert looks(client, admin, jane) == [("hold_placed", "done"), ("hold_read", "done")]
    assert looks(client, admin, joe) == [("hold_placed", "done")]
    read = ask(client, admin, user_id=jane, action="hold_read")[0]
    assert read["detail"] == {"hold": of_jane}
    assert len(client.get(HOLDS, headers=admin).json()["items"]) == 3
    assert (
        looks(client, admin, jane)[2:] == looks(client, admin, joe)[1:] == [("hold_read", "done")]
    )
    # One that is about nobody keeps no writer waiting and leaves no event.
    known = numbers()
    assert client.get(f"{HOLDS}/{of_all}", headers=admin).status_code == 200
    assert client.get(f"{HOLDS}/{uuid4()}", headers=admin).status_code == 404
    assert client.get(HOLDS, params={"offset": 3}, headers=admin).json() == {"items": []}
    assert client.get(f"{HOLDS}/{of_joe}", headers=sign_in(JOE)).status_code == 403
    assert numbers() == [*known, known[-1] + 1]


def test_whose_hold_was_released_is_recorded(
    client: TestClient, service: Service, admin: Headers
) -> None:
    jane, joe = service.user(JANE), service.user(JOE)
    held = hold(client, admin, scope="person", user_id=jane)
    assert client.delete(f"{HOLDS}/{held}", headers=admin).status_code == 200
    assert looks(client, admin, jane) == [("hold_placed", "done"), ("hold_released", "done")]
    assert looks(client, admin, joe) == []


@pytest.mark.parametrize("service", ["sqlite"], indirect=True)
@pytest.mark.parametrize("path", [HOLDS, NOTICES])
def test_what_cannot_be_recorded_is_not_shown(
    client: TestClient, service: Service, admin: Headers, path: str
) -> None:
    jane, now = service.user(JANE), datetime.now(UTC)
    service.add(
        InactivityNotice(id=uuid4(), user_id=jane, queued_at=now, ends_at=now),
        LegalHold(
            id=uuid4(), scope=HoldScope.PERSON, user_id=jane, reason="claim", placed_by="scheduler",
            placed_at=now,
        ),
    )  # fmt: skip
    assert "user_id" in client.get(path, headers=admin).text
    sql("CREATE TRIGGER quiet BEFORE INSERT ON audit_events BEGIN SELECT RAISE(IGNORE); END")
    answer = client.get(path, headers=admin)
    assert (answer.status_code, answer.json()["code"]) == (503, "unavailable")
    assert "user_id" not in answer.text


def test_who_has_a_telephone_that_was_asked_for_is_recorded_also_where_others_have_it(
    client: TestClient, service: Service, admin: Headers, run: Run
) -> None:
    jane, joe = (service.user(email, phone=PHONE) for email in (JANE, JOE))
    kim = service.user("kim@example.com", phone="+49 30 7654321")
    answer = client.post(FIND, json={"phone": PHONE}, headers=admin)
    assert (answer.status_code, answer.json()["user_ids"]) == (409, [jane, joe])
    assert looks(client, admin, jane) == looks(client, admin, joe) == [("find", "several")]
    assert run("find", stdin=f"{PHONE}\n").code != 0
    assert looks(client, admin, joe) == [("find", "several")] * 2
    assert looks(client, admin, kim) == []
    assert client.post(FIND, json={"email": JOE}, headers=admin).status_code == 200
    assert looks(client, admin, joe)[2:] == [("find", "done")]


def test_whom_only_others_name_can_be_asked_for_by_what_find_says(
    client: TestClient, service: Service, admin: Headers, run: Run
) -> None:
    stay = booking(plant("B").id, datetime.now(UTC).date())
    service.add(stay)
    service.add(companion(stay.id, email="kim@example.com", full_name="Kim"))
    found = client.post(FIND, json={"email": "kim@example.com"}, headers=admin).json()
    assert found["user_id"] is None
    body = {"email": "kim@example.com", "format": "json"}
    assert client.post("/security/data/export", json=body, headers=admin).status_code == 200
    reference = found["subject_ref"]
    events = ask(client, admin, subject_ref=reference)
    assert [event["action"] for event in events] == ["export", "find"]
    # On the command line, too.
    same = run("find", "--json", stdin="kim@example.com\n").json
    assert same["subject_ref"] == reference
    listed = run("audit", "list", "--subject-ref", reference, "--json").json["items"]
    assert [event["action"] for event in listed] == ["find", "audit_read", "export", "find"]
    before = ("--before", str(listed[2]["id"]))
    (first,) = run("audit", "list", "--subject-ref", reference, *before, "--json").json["items"]
    assert first == listed[3]


def test_one_with_an_account_is_found_with_the_reference_that_the_trail_has(
    client: TestClient, service: Service, admin: Headers
) -> None:
    jane = service.user(JANE)
    found = client.post(FIND, json={"email": JANE}, headers=admin).json()
    (event,) = ask(client, admin, user_id=jane)
    assert event["subject_ref"] == found["subject_ref"]


@pytest.mark.usefixtures("sqlite_service")
@pytest.mark.parametrize("before", ["0", "x", str(2**63)])
def test_pages_that_nobody_can_mean_are_refused(run: Run, before: str) -> None:
    assert run("audit", "list", "--before", before).code == 2
    assert run("audit", "list", "--before", "3").code == 0
