"""Legal holds: while one stands its data stay, and its record stays after it."""

import json
from datetime import UTC, date, datetime
from typing import Any
from uuid import uuid4

import httpx2 as httpx
from fastapi.testclient import TestClient
from sqlalchemy import select, text

from backend.db_utils import session_scope
from backend.models import AuditEvent
from backend.services.store_service import store
from tests.conftest import Service
from tests.privacy import people
from tests.privacy.people import dump, plant

HOLDS = "/security/holds"
OLD = datetime(2001, 2, 3, tzinfo=UTC)


def place(client: TestClient, headers: dict[str, str], scope: str, **what: Any) -> httpx.Response:
    body = {"scope": scope, "reason": "claim of 2026-11"} | what
    return client.post(HOLDS, json=body, headers=headers)


def release(client: TestClient, headers: dict[str, str], hold_id: str) -> httpx.Response:
    return client.delete(f"{HOLDS}/{hold_id}", headers=headers)


def erase(
    client: TestClient, headers: dict[str, str], user_id: int, **fields: Any
) -> httpx.Response:
    body = {"user_id": user_id, "mode": "delete", "reason": "request"} | fields
    return client.post("/security/data/delete", json=body, headers=headers)


def test_a_hold_is_placed_shown_newest_first_and_its_record_stays_after_its_release(
    client: TestClient, service: Service, admin: dict[str, str]
) -> None:
    user_id = service.user("jane@example.com")
    stay = people.booking(user_id, date(2026, 1, 2))
    service.add(stay)
    assert client.get(HOLDS, headers=admin).json() == {"items": []}
    review = "2027-03-01T00:00:00Z"
    answers = [
        place(client, admin, "person", user_id=user_id, review_on=review),
        place(client, admin, "row", data_type="booking", row_id=stay.id),
        place(client, admin, "data_type", data_type="invoice"),
    ]
    assert [answer.status_code for answer in answers] == [201] * 3
    placed = [answer.json() for answer in answers]
    named = [(hold["user_id"], hold["data_type"], hold["row_id"]) for hold in placed]
    assert named == [(user_id, None, None), (user_id, "booking", stay.id), (None, "invoice", None)]
    assert [hold["review_on"] for hold in placed] == [review, None, None]
    assert {hold["reason"] for hold in placed} == {"claim of 2026-11"}
    assert {hold["released_at"] for hold in placed} == {None}
    assert client.get(HOLDS, headers=admin).json() == {"items": placed[::-1]}
    one = f"{HOLDS}/{placed[0]['id']}"
    assert client.get(one, headers=admin).json() == placed[0]
    released = release(client, admin, placed[0]["id"])
    assert released.status_code == 200
    assert released.json() == placed[0] | {"released_at": released.json()["released_at"]}
    assert released.json()["released_at"] is not None
    assert client.get(one, headers=admin).json() == released.json()
    assert len(client.get(HOLDS, headers=admin).json()["items"]) == 3
    again = release(client, admin, placed[0]["id"])
    assert (again.status_code, again.json()["code"]) == (409, "conflict")
    assert all(row["reason"].startswith("enc1.") for row in dump()["legal_holds"].values())


def test_placing_and_releasing_are_in_the_trail(
    client: TestClient, service: Service, admin: dict[str, str]
) -> None:
    user_id = service.user("jane@example.com")
    hold_id = place(client, admin, "person", user_id=user_id).json()["id"]
    release(client, admin, hold_id)
    with session_scope(read_only=True) as session:
        found = session.scalars(
            select(AuditEvent).where(AuditEvent.action.like("hold_%")).order_by(AuditEvent.id)
        ).all()
    assert [event.action for event in found] == ["hold_placed", "hold_released"]
    assert [json.loads(event.detail or "")["hold"] for event in found] == [hold_id] * 2
    assert found[0].subject_ref is not None
    assert "claim" not in (found[0].detail or "")


def test_a_hold_that_names_too_little_too_much_or_nothing_that_exists_is_refused(
    client: TestClient, service: Service, admin: dict[str, str]
) -> None:
    user_id = service.user("jane@example.com")
    service.add(people.booking(user_id, date(2026, 1, 2)))
    refused: list[tuple[int, str, dict[str, Any]]] = [
        (422, "person", {}),
        (422, "person", {"user_id": user_id, "data_type": "booking"}),
        (422, "row", {"data_type": "booking"}),
        (422, "row", {"row_id": 1}),
        (422, "row", {"user_id": user_id, "data_type": "booking", "row_id": 1}),
        (422, "data_type", {}),
        (422, "data_type", {"data_type": "weather"}),
        (422, "row", {"data_type": "weather", "row_id": 1}),
        (422, "data_type", {"data_type": "booking", "row_id": 1}),
        (422, "everything", {}),
        (422, "person", {"user_id": user_id, "reason": ""}),
        (422, "person", {"user_id": str(user_id)}),
        (422, "person", {"user_id": user_id, "review_on": "2027-03-01T00:00:00"}),
        (404, "person", {"user_id": user_id + 1}),
        (404, "row", {"data_type": "booking", "row_id": 999}),
    ]
    before = dump()
    found = [place(client, admin, scope, **what).status_code for _, scope, what in refused]
    assert found == [status for status, _, _ in refused]
    assert release(client, admin, str(uuid4())).status_code == 404
    assert client.get(f"{HOLDS}/{uuid4()}", headers=admin).status_code == 404
    assert release(client, admin, "7").status_code == 422
    assert dump() == before


def test_who_is_under_a_hold_is_not_erased_and_nobody_else_is_kept(
    client: TestClient, service: Service, admin: dict[str, str]
) -> None:
    person = plant("A")
    holds: list[dict[str, Any]] = [
        {"scope": "person", "user_id": person.id},
        {"scope": "row", "data_type": "feedback", "row_id": person.keys["feedback"][0]},
        {"scope": "row", "data_type": "user", "row_id": person.id},
        {"scope": "data_type", "data_type": "booking"},
    ]
    for number, what in enumerate(holds):
        other = service.user(f"joe{number}@example.com")
        hold_id = place(client, admin, **what).json()["id"]
        before = dump()
        for fields in ({}, {"mode": "anonymize"}, {"dry_run": True}):
            refused = erase(client, admin, person.id, **fields)
            assert (refused.status_code, refused.json()["code"]) == (409, "legal_hold")
            assert refused.json()["holds"] == [hold_id]
        assert dump() == before
        assert len(list(store().names("ledger-", ".enc"))) == number
        assert erase(client, admin, other).status_code == 200
        assert release(client, admin, hold_id).status_code == 200
    assert erase(client, admin, person.id).status_code == 200


def test_each_of_several_holds_keeps_and_the_last_release_frees(
    client: TestClient, service: Service, admin: dict[str, str]
) -> None:
    user_id = service.user("jane@example.com")
    said = people.feedback(user_id, OLD, comment="evidence")
    service.add(said)
    holds = [
        place(client, admin, "person", user_id=user_id).json()["id"],
        place(client, admin, "row", data_type="feedback", row_id=said.id).json()["id"],
    ]
    assert set(erase(client, admin, user_id).json()["holds"]) == set(holds)

    def due() -> tuple[int, int]:
        body = {"dry_run": False, "data_type": "feedback"}
        answer = client.post("/security/retention/apply", json=body, headers=admin)
        (result,) = answer.json()["results"]
        return result["held"], result["affected"]

    assert due() == (1, 0)
    release(client, admin, holds[0])
    assert erase(client, admin, user_id).json()["holds"] == [holds[1]]
    assert due() == (1, 0)
    release(client, admin, holds[1])
    assert due() == (0, 1)
    assert erase(client, admin, user_id).status_code == 200


def test_a_hold_on_a_retained_row_keeps_it_when_the_law_no_longer_does(
    client: TestClient, service: Service, admin: dict[str, str]
) -> None:
    person = plant("A")
    kept, gone = person.keys["invoices"]
    assert erase(client, admin, person.id).status_code == 200
    assert set(dump()["invoices"]) == {(kept,)}
    hold_id = place(client, admin, "row", data_type="invoice", row_id=kept).json()["id"]
    assert place(client, admin, "row", data_type="invoice", row_id=gone).status_code == 404
    policy = {"data_type": "invoice", "retention_days": 1, "action": "delete"}
    assert client.post("/security/retention/policy", json=policy, headers=admin).status_code == 201
    body = {"dry_run": False, "data_type": "invoice"}
    client.post("/security/retention/apply", json=body, headers=admin)
    assert set(dump()["invoices"]) == {(kept,)}
    release(client, admin, hold_id)
    client.post("/security/retention/apply", json=body, headers=admin)
    assert dump()["invoices"] == dump()["invoice_lines"] == {}


def test_the_reasons_of_holds_stay_sealed_where_others_are_exported_and_erased(
    client: TestClient, service: Service, admin: dict[str, str]
) -> None:
    held, other = plant("A"), service.user("joe@example.com")
    for what in ({"user_id": held.id}, {"data_type": "booking"}):
        scope = "person" if "user_id" in what else "data_type"
        assert place(client, admin, scope, **what).status_code == 201
    with session_scope() as session:
        session.execute(text("UPDATE legal_holds SET reason = 'no token'"))
    answer = client.post("/security/data/export", json={"user_id": other}, headers=admin)
    assert answer.json()["data"]["users"][0]["email"] == "joe@example.com"
    assert len(erase(client, admin, held.id).json()["holds"]) == 2
    assert erase(client, admin, other).status_code == 200
