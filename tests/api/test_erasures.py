"""Erasures: the plan is the act, what nobody declared stops it, and a certificate proves it."""

import json
from collections.abc import Callable
from datetime import UTC, date, datetime, timedelta
from typing import Any, Final
from uuid import uuid4

import httpx2 as httpx
import pytest
from fastapi.testclient import TestClient
from sqlalchemy import text, update

from backend.crypto import certificates, signing
from backend.db_utils import session_scope
from backend.models import Companion, ErasureRecord, User
from backend.privacy.declarations import EraseMode
from backend.services.erasure_service import Erasure, get_erasure_service
from backend.services.store_service import store
from backend.services.subject_service import Who
from tests.conftest import Service, SignIn
from tests.privacy import people
from tests.privacy.people import ADMINISTRATOR, Dump, Person, cells_in_plain, dump, plant, without

DELETE: Final = "/security/data/delete"
KEY: Final = "/security/data/certificate-key"
OUTCOMES: Final = {"deleted", "anonymized", "retained", "redacted", "shared"}
Headers = dict[str, str]
# What no engine does otherwise is shown on the one that starts sooner.
SQLITE = pytest.mark.parametrize("service", ["sqlite"], indirect=True)


def delete(client: TestClient, headers: Headers, user_id: int, **fields: Any) -> httpx.Response:
    body = {"user_id": user_id, "mode": "delete", "reason": "request under art. 17", **fields}
    return client.post(DELETE, json=body, headers=headers)


def certificate_of(client: TestClient, headers: Headers, erasure_id: str) -> httpx.Response:
    return client.get(f"/security/data/erasures/{erasure_id}", headers=headers)


def statement_of(client: TestClient, headers: Headers, erasure_id: str) -> dict[str, Any]:
    """The statement of a certificate, checked with the key that the service gives out."""
    answer = certificate_of(client, headers, erasure_id)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "application/json"
    key = client.get(KEY, headers=headers).json()
    public = signing.parse_public_key(key["public_key"])
    assert signing.parse_public_key(key["pem"]) == public
    assert signing.key_id(public) == key["key_id"]
    return dict(certificates.verify(answer.content, public))


def contents() -> Dump:
    """All rows but what the service notes of requests."""
    return without(dump(), {}, "audit_events", "planned_erasures")


def erase_without_proof(user_id: int) -> Erasure:
    """Erase as an endpoint does before its answer: the scan comes after."""
    with session_scope() as session:
        return get_erasure_service().erase(
            session, ADMINISTRATOR, Who(user_id), EraseMode.DELETE, reason="request", dry_run=False
        )


# The plan


@pytest.mark.parametrize("mode", ["delete", "anonymize"])
def test_the_run_does_what_its_dry_run_said(client: TestClient, admin: Headers, mode: str) -> None:
    person = plant("A")
    before = contents()
    planned = delete(client, admin, person.id, mode=mode, dry_run=True).json()
    assert contents() == before
    assert list(store().names("ledger-", ".enc")) == []
    assert certificate_of(client, admin, planned["erasure_id"]).status_code == 404
    again = delete(client, admin, person.id, mode=mode, dry_run=True).json()
    assert again["plan_digest"] == planned["plan_digest"]
    done = delete(client, admin, person.id, mode=mode, plan_digest=planned["plan_digest"]).json()
    assert (planned["status"], done["status"]) == ("planned", "complete")
    for field in ("mode", "plan_digest", "tables", "retained", "not_reached"):
        assert done[field] == planned[field]
    assert {frozenset(counts) for counts in done["tables"].values()} == {frozenset(OUTCOMES)}


@SQLITE
def test_a_digest_that_is_stale_is_refused_with_what_changed(
    client: TestClient, admin: Headers, service: Service
) -> None:
    person = plant("A")
    planned = delete(client, admin, person.id, dry_run=True).json()
    at = datetime.now(UTC)
    service.add(*(people.feedback(person.id, at, comment=f"new {n}") for n in range(3)))
    before = contents()
    for fields in ({}, {"dry_run": True}):
        stale = delete(client, admin, person.id, plan_digest=planned["plan_digest"], **fields)
        problem = stale.json()
        assert (stale.status_code, problem["code"]) == (409, "stale_plan")
        assert stale.headers["content-type"] == "application/problem+json"
        assert problem["changed"] == [
            {"table": "feedback", "outcome": "deleted", "planned": 2, "now": 5}
        ]
    assert contents() == before
    fresh = problem["plan_digest"]
    assert fresh != planned["plan_digest"]
    assert delete(client, admin, person.id, plan_digest=fresh).json()["plan_digest"] == fresh


@SQLITE
def test_a_changed_row_and_one_that_is_gone_are_told_too(
    client: TestClient, admin: Headers
) -> None:
    person = plant("A")
    planned = delete(client, admin, person.id, dry_run=True).json()
    swapped, gone = person.keys["feedback"]
    with session_scope() as session:
        # As many rows as before, and another one among them.
        session.execute(text("UPDATE feedback SET id = 9999 WHERE id = :id"), {"id": swapped})
    stale = delete(client, admin, person.id, plan_digest=planned["plan_digest"]).json()
    assert stale["changed"] == [{"table": "feedback", "outcome": "deleted", "planned": 2, "now": 2}]
    with session_scope() as session:
        session.execute(text("DELETE FROM feedback"))
    stale = delete(client, admin, person.id, plan_digest=planned["plan_digest"]).json()
    assert stale["changed"] == [{"table": "feedback", "outcome": "deleted", "planned": 2, "now": 0}]
    assert gone in person.keys["feedback"]


@SQLITE
def test_the_digest_of_no_dry_run_for_this_person_is_refused(
    client: TestClient, admin: Headers
) -> None:
    person, other = plant("A"), plant("B")
    others = delete(client, admin, other.id, dry_run=True).json()["plan_digest"]
    before = contents()
    for digest in ("0" * 64, others):
        refused = delete(client, admin, person.id, plan_digest=digest)
        problem = refused.json()
        assert (refused.status_code, problem["code"], problem["changed"]) == (409, "stale_plan", [])
        assert "no dry run" in problem["detail"]
    # A plan to anonymise is none to delete.
    planned = delete(client, admin, person.id, mode="anonymize", dry_run=True).json()
    refused = delete(client, admin, person.id, plan_digest=planned["plan_digest"])
    assert refused.json()["code"] == "stale_plan"
    for digest in ("", "0" * 63, "G" * 64, "0" * 65):
        assert delete(client, admin, person.id, plan_digest=digest).status_code == 422
    assert contents() == before


# What nobody declared


def alter(*statements: str) -> None:
    with session_scope() as session:
        for statement in statements:
            session.execute(text(statement))


def add_unknown(person: Person) -> None:
    """A column and a table as another program would add them, with the person in them."""
    email = next(m.text for m in person.marks if (m.table, m.column) == ("users", "email"))
    alter(
        "ALTER TABLE bookings ADD COLUMN loyalty_card TEXT",
        "CREATE TABLE newsletter (address TEXT)",
    )
    with session_scope() as session:
        session.execute(text("INSERT INTO newsletter VALUES (:email)"), {"email": email})


def test_what_the_map_does_not_know_stops_an_erasure_before_it_starts(
    client: TestClient, admin: Headers
) -> None:
    person = plant("A")
    planned = delete(client, admin, person.id, dry_run=True).json()
    add_unknown(person)
    before = contents()
    for fields in (
        {}, {"mode": "anonymize"}, {"dry_run": True}, {"plan_digest": planned["plan_digest"]},
    ):  # fmt: skip
        refused = delete(client, admin, person.id, **fields)
        problem = refused.json()
        assert (refused.status_code, problem["code"]) == (409, "unmapped_data")
        assert refused.headers["content-type"] == "application/problem+json"
        assert problem["unmapped"] == ["bookings.loyalty_card", "newsletter"]
    assert contents() == before
    assert list(store().names("ledger-", ".enc")) == []
    alter("DROP TABLE newsletter", "ALTER TABLE bookings DROP COLUMN loyalty_card")
    assert delete(client, admin, person.id).json()["status"] == "complete"


@pytest.fixture
def _without_newsletter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATA_MAP_IGNORE", "newsletter,no_such_table")


@pytest.mark.usefixtures("_without_newsletter")
@SQLITE
def test_a_table_that_is_left_out_makes_the_act_partial_and_is_named(
    client: TestClient, admin: Headers
) -> None:
    person, other = plant("A"), plant("B")
    add_unknown(person)
    refused = delete(client, admin, person.id).json()
    assert (refused["code"], refused["unmapped"]) == ("unmapped_data", ["bookings.loyalty_card"])
    alter("ALTER TABLE bookings DROP COLUMN loyalty_card")
    planned = delete(client, admin, person.id, dry_run=True).json()
    assert (planned["status"], planned["not_reached"]) == ("planned", ["newsletter"])
    done = delete(client, admin, person.id, plan_digest=planned["plan_digest"]).json()
    assert (done["status"], done["not_reached"]) == ("partial", ["newsletter"])
    statement = statement_of(client, admin, done["erasure_id"])
    assert (statement["status"], statement["not_reached"]) == ("partial", ["newsletter"])
    # Left out of the act, not of the scan.
    assert statement["scan"]["found"] == [{"table": "newsletter", "column": "address", "cells": 1}]
    alter("DROP TABLE newsletter")
    assert delete(client, admin, other.id).json()["status"] == "complete"


# The certificate


@pytest.mark.parametrize("mode", ["delete", "anonymize"])
@SQLITE
def test_a_certificate_says_what_the_answer_said_and_names_nobody(
    client: TestClient, admin: Headers, mode: str
) -> None:
    plant("B")
    person = plant("A")
    with session_scope(read_only=True) as session:
        user = session.get_one(User, person.id)
        uid, terms = user.uid, (user.email_index, user.phone_index)
    done = delete(client, admin, person.id, mode=mode).json()
    statement = statement_of(client, admin, done["erasure_id"])
    for field in ("erasure_id", "status", "mode", "plan_digest", "not_reached"):
        assert statement[field] == done[field], field
    touched = {name: counts for name, counts in done["tables"].items() if any(counts.values())}
    assert statement["tables"] == touched
    assert statement["status"] == "complete"
    said = [(kept["table"], kept["rows"], kept["ground"]) for kept in done["retained"]]
    kept = [(kept["table"], kept["rows"], kept["ground"]) for kept in statement["retained"]]
    assert kept == said
    assert {table for table, _rows, _ground in kept} >= {"payments", "invoices"}
    assert all(ground for _table, _rows, ground in kept)
    today = datetime.now(UTC).date().isoformat()
    assert all(kept["until"][:10] > today for kept in statement["retained"])
    for one, other in zip(statement["retained"], done["retained"], strict=True):
        assert datetime.fromisoformat(one["until"]) == datetime.fromisoformat(other["until"])
    for field in ("erased_at", "backups_expire_at"):
        assert datetime.fromisoformat(statement[field]).tzinfo is not None
    told = datetime.fromisoformat(done["backups_expire_at"])
    assert datetime.fromisoformat(statement["backups_expire_at"]) == told
    scan = statement["scan"]
    assert (scan["state"], scan["found"], scan["unread"]) == ("clean", [], [])
    assert scan["cells"] > 100
    assert scan["tables"] > 10
    whole = certificate_of(client, admin, done["erasure_id"]).text
    for word in (*person.words(), str(uid), uid.hex, *terms, '"user_id"', "example.com", "enc1."):
        assert str(word) not in whole
    # It is issued once: who compares two copies finds them equal.
    assert certificate_of(client, admin, done["erasure_id"]).text == whole
    assert json.loads(whole)["format"] == "holdfast-erasure-certificate"


@SQLITE
def test_two_erasures_have_two_certificates_by_one_key_and_no_common_reference(
    client: TestClient, admin: Headers, service: Service
) -> None:
    statements = [
        statement_of(client, admin, delete(client, admin, service.user(email)).json()["erasure_id"])
        for email in ("zoe@example.com", "ZOE@example.com")
    ]
    one, two = statements
    assert one["erasure_id"] != two["erasure_id"]
    # One address twice is two people: nothing tells that it was one.
    same = {name for name in one if isinstance(one[name], str) and one[name] == two.get(name)}
    assert same <= {"controller", "status", "mode"}


@SQLITE
def test_certificates_of_somebody_without_an_account_do_not_tell_that_it_was_one_person(
    client: TestClient, admin: Headers, service: Service
) -> None:
    body = {"email": "kim@example.com", "mode": "delete", "reason": "request under art. 17"}
    stay = people.booking(service.user("joe@example.com"), date(2026, 1, 2))
    service.add(stay)
    statements = []
    for _ in range(2):
        at = datetime.now(UTC)
        service.add(Companion(booking_id=stay.id, email="kim@example.com", created_at=at))
        done = client.post(DELETE, json=body, headers=admin).json()
        statements.append(statement_of(client, admin, done["erasure_id"]))
    one, two = statements
    assert one["tables"] == two["tables"]
    # A keyed digest of an address is a pseudonym, and the same one for ever.
    same = {name for name in one if isinstance(one[name], str) and one[name] == two.get(name)}
    assert same <= {"controller", "status", "mode"}


@SQLITE
def test_a_value_in_anothers_row_is_found_and_the_act_is_partial(
    client: TestClient, admin: Headers, service: Service
) -> None:
    zoe = service.user("zoe@example.com", full_name="Zoe Zaunkoenig", street="7 Feather Lane")
    service.user("joe@example.com", staff_notes="Came with ZOE  ZAUNKOENIG. Likes quiet rooms.")
    service.user("kim@example.com", full_name="Zoe Zaunkoenig")
    done = delete(client, admin, zoe).json()
    statement = statement_of(client, admin, done["erasure_id"])
    scan = statement["scan"]
    assert (statement["status"], scan["state"]) == ("partial", "found")
    assert scan["found"] == [{"table": "users", "column": "staff_notes", "cells": 1}]
    # Another guest of that name is told apart.
    assert scan["own_values_of_others"] == 1
    assert "zaunkoenig" not in certificate_of(client, admin, done["erasure_id"]).text.lower()
    record = dump()["erasures"]
    assert [row["status"] for row in record.values()] == ["partial"]


@SQLITE
def test_before_the_scan_has_ended_there_is_no_certificate_and_then_there_is(
    client: TestClient, admin: Headers, service: Service
) -> None:
    erasure = erase_without_proof(service.user("zoe@example.com"))
    erasure_id = str(erasure.erasure_id)
    early = certificate_of(client, admin, erasure_id)
    assert (early.status_code, early.json()["code"]) == (409, "conflict")
    assert "not ended" in early.json()["detail"]
    get_erasure_service().prove(erasure)
    assert statement_of(client, admin, erasure_id)["scan"]["state"] == "clean"


@SQLITE
def test_a_scan_whose_process_died_is_certified_as_one_that_did_not_end(
    client: TestClient, admin: Headers, service: Service
) -> None:
    erasure = erase_without_proof(service.user("zoe@example.com"))
    with session_scope() as session:
        long_ago = datetime.now(UTC) - timedelta(hours=2)
        session.execute(update(ErasureRecord).values(erased_at=long_ago))
    statement = statement_of(client, admin, str(erasure.erasure_id))
    assert statement["scan"] == {"state": "not_finished"}


@SQLITE
def test_an_unknown_certificate_is_not_found_and_who_is_no_admin_gets_none(
    client: TestClient, admin: Headers, service: Service, sign_in: SignIn
) -> None:
    missing = certificate_of(client, admin, str(uuid4()))
    assert (missing.status_code, missing.json()["code"]) == (404, "not_found")
    assert certificate_of(client, admin, "7").status_code == 422
    zoe = service.user("zoe@example.com")
    service.user("joe@example.com")
    erasure_id = delete(client, admin, zoe).json()["erasure_id"]
    joe = sign_in("joe@example.com")
    for headers, status in ((joe, 403), ({}, 401)):
        assert certificate_of(client, headers, erasure_id).status_code == status
        assert certificate_of(client, headers, str(uuid4())).status_code == status
        assert client.get(KEY, headers=headers).status_code == status


@SQLITE
def test_an_erasure_that_is_refused_leaves_no_record(
    client: TestClient, admin: Headers, service: Service
) -> None:
    service.add(people.person_hold(service.user("zoe@example.com")))
    refusals: list[Callable[[], httpx.Response]] = [
        lambda: delete(client, admin, 2),
        lambda: delete(client, admin, 99),
        lambda: delete(client, admin, 1),
    ]
    before = contents()
    assert [refusal().status_code for refusal in refusals] == [409, 404, 409]
    assert contents() == before
    assert list(store().names("ledger-", ".enc")) == []


@SQLITE
def test_the_signing_key_is_shown_nowhere(
    client: TestClient, admin: Headers, service: Service
) -> None:
    delete(client, admin, service.user("zoe@example.com"))
    (row,) = dump()["installation"].values()
    assert str(row["signing_key"]).startswith("enc1.")
    key = client.get(KEY, headers=admin).json()
    assert set(key) == {"public_key", "key_id", "pem"}
    assert "PRIVATE" not in key["pem"]
    assert key["public_key"] not in cells_in_plain()
