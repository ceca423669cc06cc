"""The contract: every endpoint does real work and answers with the fields programs rely on."""

import base64
import csv
import io
import json
import threading
import time
import zipfile
from datetime import UTC, date, datetime, timedelta
from typing import Any, Final
from uuid import UUID

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import select

from backend.crypto.files import Lock, Opener, PassphraseLock
from backend.db_utils import session_scope
from backend.errors import TamperedError
from backend.models import Booking, DataConsent, Feedback, Invoice, InvoiceLine, Role, User
from backend.services.encryption_service import get_encryption_service
from tests.conftest import KEY, Service, SignIn

JANE: Final = "jane@example.com"
JOE: Final = "joe@example.com"
NAME: Final = "Jane Exämple"
NOTE: Final = "=late arrival, ground floor"
Headers = dict[str, str]


def booking(user_id: int, number: str, note: str | None = None) -> Booking:
    """A stay of last month."""
    check_in = datetime.now(UTC).date() - timedelta(days=30)
    return Booking(
        user_id=user_id, reference=number, hotel="City Hotel", status="Check-Out",
        check_in=check_in, check_out=check_in + timedelta(days=2), weekend_nights=1,
        week_nights=1, adults=2, babies=0, meal="BB", market_segment="Direct",
        distribution_channel="Direct", is_repeated_guest=False, previous_cancellations=0,
        previous_bookings_not_canceled=0, reserved_room_type="A", assigned_room_type="A",
        booking_changes=0, deposit_type="No Deposit", customer_type="Transient",
        currency="EUR", parking_spaces=0, special_request_count=1, special_requests=note,
        created_at=datetime.now(UTC),
    )  # fmt: skip


def invoice(user_id: int, number: str) -> Invoice:
    today = datetime.now(UTC).date()
    return Invoice(
        user_id=user_id, number=number, issued_on=today, supplied_on=today,
        billing_name=NAME, currency="EUR", net_minor=10_000, vat_minor=700, gross_minor=10_700,
    )  # fmt: skip


def feedback(user_id: int, *, days_old: int, comment: str = "Good.") -> Feedback:
    at = datetime.now(UTC) - timedelta(days=days_old)
    return Feedback(user_id=user_id, rating=4, comment=comment, submitted_at=at)


@pytest.fixture
def jane(service: Service) -> int:
    """A guest with a booking, an invoice of one line, and feedback that is due and that is not."""
    user_id = service.user(JANE, full_name=NAME, date_of_birth=date(1980, 2, 29))
    service.add(booking(user_id, "B-1", NOTE), invoice(user_id, "R-1"))
    service.add(feedback(user_id, days_old=400, comment="Old."), feedback(user_id, days_old=3))
    with session_scope() as session:
        found = session.scalars(select(Invoice)).one()
        session.add(
            InvoiceLine(
                invoice_id=found.id, description="Room", quantity=2, unit_price_minor=5_000,
                vat_rate_hundredths=700, net_minor=10_000, vat_minor=700,
            )
        )  # fmt: skip
    return user_id


def answer(client: TestClient, method: str, path: str, headers: Headers, body: Any = None) -> Any:
    """The JSON of a request that must succeed."""
    found = client.request(method, path, json=body, headers=headers)
    assert found.status_code in {200, 201}, found.text
    return found.json()


def export(client: TestClient, headers: Headers, user_id: int, **fields: Any) -> Any:
    found = client.post(
        "/security/data/export", json={"user_id": user_id, **fields}, headers=headers
    )
    assert found.status_code == 200, found.text
    return found


def delete(client: TestClient, headers: Headers, user_id: int, **fields: Any) -> Any:
    body = {"user_id": user_id, "reason": "request under art. 17", **fields}
    return answer(client, "POST", "/security/data/delete", headers, body)


def consent(client: TestClient, headers: Headers, user_id: int, **fields: Any) -> Any:
    return answer(client, "POST", f"/security/data/consent/{user_id}", headers, fields)


def has(found: dict[str, int], **counts: int) -> bool:
    """Say whether *found* has these counts; more fields are welcome."""
    return found | counts == found


def moment(text: str) -> datetime:
    """A time as the contract writes it: ISO 8601, UTC."""
    found = datetime.fromisoformat(text)
    assert text.endswith("Z")
    assert abs(datetime.now(UTC) - found) < timedelta(minutes=5)
    return found


# Export and import


def test_a_json_export_holds_everything_in_plain(
    client: TestClient, jane: int, sign_in: SignIn
) -> None:
    headers = sign_in(JANE)
    consent(client, headers, jane, purpose="marketing", granted=True)
    found = export(client, headers, jane, format="json")
    assert found.headers["content-type"] == "application/json"
    assert found.headers["content-disposition"] == 'attachment; filename="export.json"'
    document = found.json()
    assert document["subject"] == {"user_id": jane}
    moment(document["generated_at"])
    data = document["data"]
    (user,) = data["users"]
    assert (user["email"], user["full_name"]) == (JANE, NAME)
    assert user["date_of_birth"] == "1980-02-29"
    assert "password_hash" not in user
    assert [row["special_requests"] for row in data["bookings"]] == [NOTE]
    assert [row["comment"] for row in data["feedback"]] == ["Old.", "Good."]
    assert [row["description"] for row in data["invoice_lines"]] == ["Room"]
    assert document["counts"] == {table: len(rows) for table, rows in data.items()}
    assert document["consents"]["purposes"]["marketing"]["granted"] is True
    assert "enc1." not in found.text


def test_a_csv_export_is_one_table_that_no_spreadsheet_runs(
    client: TestClient, jane: int, admin: Headers
) -> None:
    found = export(client, admin, jane, format="csv")
    assert found.headers["content-type"].startswith("text/csv")
    rows = list(csv.DictReader(io.StringIO(found.text)))
    assert list(rows[0]) == ["data_type", "record", "field", "value"]
    values = {(row["data_type"], row["field"]): row["value"] for row in rows}
    assert values["users", "full_name"] == NAME
    assert values["bookings", "special_requests"] == f"'{NOTE}"


def test_a_zip_export_holds_json_one_csv_per_table_and_a_page(
    client: TestClient, jane: int, admin: Headers
) -> None:
    found = export(client, admin, jane, format="zip")
    assert found.headers["content-type"] == "application/zip"
    with zipfile.ZipFile(io.BytesIO(found.content)) as archive:
        assert archive.testzip() is None
        document = json.loads(archive.read("export.json"))
        tables = {f"tables/{name}.csv" for name in document["data"]}
        assert set(archive.namelist()) == {"export.json", "index.html"} | tables
        assert NAME in archive.read("index.html").decode()
        (row,) = csv.DictReader(io.StringIO(archive.read("tables/users.csv").decode()))
        assert row["email"] == JANE


@pytest.mark.parametrize("passphrase", [None, "a long passphrase"])
def test_an_encrypted_export_opens_to_the_export_with_its_own_lock_only(
    client: TestClient, jane: int, admin: Headers, passphrase: str | None
) -> None:
    found = export(client, admin, jane, format="json", encrypt=True, passphrase=passphrase)
    assert found.headers["content-type"] == "application/octet-stream"
    assert found.headers["content-disposition"] == 'attachment; filename="export.json.hfe"'
    assert JANE.encode() not in found.content
    locks: list[Lock] = [get_encryption_service().file_lock()]
    if passphrase is not None:
        locks = [PassphraseLock(passphrase)]
        with pytest.raises(TamperedError):
            Opener(io.BytesIO(found.content), PassphraseLock("another passphrase"))
    opened = b"".join(Opener(io.BytesIO(found.content), locks[0]).chunks())
    assert json.loads(opened)["data"]["users"][0]["email"] == JANE


def test_a_passphrase_without_encryption_is_refused(
    client: TestClient, jane: int, admin: Headers
) -> None:
    body = {"user_id": jane, "passphrase": "a long passphrase"}
    found = client.post("/security/data/export", json=body, headers=admin)
    assert (found.status_code, found.json()["code"]) == (422, "refused")


def test_an_import_brings_an_erased_persons_rows_back(
    client: TestClient, jane: int, admin: Headers
) -> None:
    document = export(client, admin, jane, format="json").json()
    delete(client, admin, jane, mode="delete")
    body = {"export": document, "user_id": jane, "dry_run": True}
    planned = answer(client, "POST", "/security/data/import", admin, body)
    assert planned["dry_run"] is True
    assert has(planned["tables"]["users"], restored=1, unchanged=0, skipped=0)
    missing = client.get(f"/security/data/consent/{jane}", headers=admin)
    assert missing.status_code == 404
    done = answer(client, "POST", "/security/data/import", admin, body | {"dry_run": False})
    assert (done["user_id"], done["dry_run"]) == (jane, False)
    assert done["tables"] == planned["tables"]
    again = export(client, admin, jane, format="json").json()
    assert again["data"]["users"][0]["full_name"] == NAME
    assert [row["special_requests"] for row in again["data"]["bookings"]] == [NOTE]


def test_an_import_of_what_is_there_changes_nothing(
    client: TestClient, jane: int, admin: Headers
) -> None:
    document = export(client, admin, jane, format="json").json()
    done = answer(client, "POST", "/security/data/import", admin, {"export": document})
    assert {table["restored"] for table in done["tables"].values()} == {0}
    assert done["tables"]["feedback"]["unchanged"] == 2
    assert export(client, admin, jane, format="json").json()["data"] == document["data"]


def test_an_import_for_another_person_than_named_is_refused(
    client: TestClient, jane: int, admin: Headers
) -> None:
    document = export(client, admin, jane, format="json").json()
    body = {"export": document, "user_id": 1}
    found = client.post("/security/data/import", json=body, headers=admin)
    assert found.status_code == 403


# Erasure


def test_a_dry_run_says_exactly_what_the_erasure_then_does(
    client: TestClient, jane: int, admin: Headers
) -> None:
    planned = delete(client, admin, jane, mode="delete", dry_run=True)
    assert (planned["status"], planned["dry_run"]) == ("planned", True)
    assert export(client, admin, jane, format="json").json()["counts"]["feedback"] == 2
    done = delete(client, admin, jane, mode="delete", plan_digest=planned["plan_digest"])
    assert (done["status"], done["mode"], done["dry_run"]) == ("complete", "delete", False)
    assert UUID(done["erasure_id"])
    for field in ("plan_digest", "tables", "retained"):
        assert done[field] == planned[field]
    assert has(done["tables"]["users"], deleted=1, anonymized=0, retained=0)
    assert done["tables"]["feedback"]["deleted"] == 2
    assert has(done["tables"]["invoices"], deleted=0, anonymized=0, retained=1)
    (kept,) = (row for row in done["retained"] if row["table"] == "invoices")
    assert kept["rows"] == 1
    assert kept["ground"]
    until = date.fromisoformat(kept["until"][:10])
    # A date counts from its end.
    assert until == datetime.now(UTC).date() + timedelta(days=2555 + 1)
    gone = client.get(f"/security/data/consent/{jane}", headers=admin)
    assert (gone.status_code, gone.json()["code"]) == (404, "subject_not_found")
    with session_scope(read_only=True) as session:
        assert session.scalars(select(Feedback)).all() == []
        assert session.scalars(select(Invoice)).one().restricted_at is not None


def test_anonymizing_leaves_rows_that_are_about_nobody(
    client: TestClient, jane: int, admin: Headers
) -> None:
    done = delete(client, admin, jane, mode="anonymize")
    assert (done["status"], done["mode"]) == ("complete", "anonymize")
    assert has(done["tables"]["users"], deleted=0, anonymized=1, retained=0)
    gone = client.get(f"/security/data/consent/{jane}", headers=admin)
    assert (gone.status_code, gone.json()["code"]) == (410, "subject_erased")
    with session_scope(read_only=True) as session:
        user = session.get_one(User, jane)
        stay = session.scalars(select(Booking)).one()
        assert (user.email, user.full_name, user.password_hash) == (None, None, None)
        assert (stay.special_requests, stay.hotel) == (None, "City Hotel")


def test_a_plan_that_has_changed_is_not_carried_out(
    client: TestClient, jane: int, admin: Headers, service: Service
) -> None:
    planned = delete(client, admin, jane, mode="delete", dry_run=True)
    service.add(feedback(jane, days_old=1))
    body = {"user_id": jane, "mode": "delete", "reason": "request under art. 17"}
    stale = client.post(
        "/security/data/delete", json=body | {"plan_digest": planned["plan_digest"]}, headers=admin
    )
    assert (stale.status_code, stale.json()["code"]) == (409, "stale_plan")
    assert export(client, admin, jane, format="json").json()["counts"]["feedback"] == 3
    assert delete(client, admin, jane, mode="delete", plan_digest=stale.json()["plan_digest"])


def test_the_last_admin_is_not_erased_and_one_of_two_is(
    client: TestClient, admin: Headers, service: Service
) -> None:
    body = {"user_id": 1, "mode": "delete", "reason": "request under art. 17"}
    assert client.post("/security/data/delete", json=body, headers=admin).status_code == 409
    other = service.user(JOE, Role.ADMIN)
    assert delete(client, admin, other, mode="delete")["status"] == "complete"


# Consent


def test_consent_is_a_history_whose_newest_event_counts(
    client: TestClient, jane: int, sign_in: SignIn
) -> None:
    headers = sign_in(JANE)
    path = f"/security/data/consent/{jane}"
    before = answer(client, "GET", path, headers)
    assert (before["user_id"], before["history"]) == (jane, [])
    purposes = {"marketing", "analytics", "profiling", "third_party_sharing"}
    assert set(before["purposes"]) == purposes
    nothing = {"granted": False, "since": None, "notice_version": None}
    assert before["purposes"]["marketing"] == nothing
    given = consent(client, headers, jane, purpose="marketing", granted=True, notice_version="v1")
    assert (given["purpose"], given["granted"], given["method"]) == ("marketing", True, "self")
    taken = consent(client, headers, jane, purpose="marketing", granted=False, notice_version="v2")
    consent(client, headers, jane, purpose="analytics", granted=True)
    after = answer(client, "GET", path, headers)
    state = after["purposes"]["marketing"]
    assert (state["granted"], state["notice_version"]) == (False, "v2")
    assert state["since"] == taken["recorded_at"]
    assert after["purposes"]["analytics"]["granted"] is True
    assert [event["id"] for event in after["history"][:2]] == [given["id"], taken["id"]]
    assert moment(given["recorded_at"]) < moment(taken["recorded_at"])


def test_an_admins_evidence_is_kept_and_encrypted(
    client: TestClient, jane: int, admin: Headers
) -> None:
    event = consent(
        client, admin, jane, purpose="profiling", granted=True, evidence="call of 3 May"
    )
    assert event["method"] == "admin"
    with session_scope(read_only=True) as session:
        row = session.get_one(DataConsent, UUID(event["id"]))
        raw = session.connection().exec_driver_sql("SELECT evidence FROM data_consents")
        assert row.evidence == "call of 3 May"
        assert str(raw.scalar_one()).startswith("enc1.")


# Retention


def test_a_policy_in_days_or_by_the_calendar_is_listed_with_what_is_due(
    client: TestClient, jane: int, admin: Headers
) -> None:
    listed = answer(client, "GET", "/security/retention/policies", admin)["items"]
    before = {item["data_type"]: item for item in listed}
    assert set(before) == {"booking", "payment", "invoice", "feedback", "user"}
    assert before["feedback"]["retention_period"] == "P365D"
    assert (before["feedback"]["action"], before["feedback"]["source"]) == ("delete", "environment")
    assert (before["feedback"]["rows"], before["feedback"]["due"]) == (2, 1)
    path = "/security/retention/policy"
    days = {"data_type": "feedback", "retention_days": 2, "action": "anonymize"}
    assert answer(client, "POST", path, admin, days)["retention_period"] == "P2D"
    years = {"data_type": "invoice", "retention_period": "P7Y", "action": "anonymize"}
    calendar = answer(client, "POST", path, admin, years | {"enabled": False})
    assert (calendar["retention_period"], calendar["enabled"]) == ("P7Y", False)
    moment(calendar["updated_at"])
    listed = answer(client, "GET", "/security/retention/policies", admin)["items"]
    after = {item["data_type"]: item for item in listed}
    assert after["invoice"]["retention_period"] == "P7Y"
    assert (after["feedback"]["due"], after["feedback"]["action"]) == (2, "anonymize")
    assert (after["feedback"]["source"], after["booking"]["source"]) == ("api", "environment")


def test_a_retention_run_does_what_its_dry_run_said_and_is_logged(
    client: TestClient, jane: int, admin: Headers
) -> None:
    path = "/security/retention/apply"
    planned = answer(client, "POST", path, admin, {"dry_run": True})
    assert planned["dry_run"] is True
    (due,) = (r for r in planned["results"] if r["data_type"] == "feedback")
    assert (due["action"], due["matched"], due["held"], due["affected"]) == ("delete", 1, 0, 1)
    assert export(client, admin, jane, format="json").json()["counts"]["feedback"] == 2
    assert answer(client, "GET", "/security/retention/logs", admin)["total"] == 0
    body = {"dry_run": False, "plan_digest": planned["plan_digest"]}
    done = answer(client, "POST", path, admin, body)
    assert done["plan_digest"] == planned["plan_digest"]
    (gone,) = (r for r in done["results"] if r["data_type"] == "feedback")
    assert gone["affected"] == 1
    left = export(client, admin, jane, format="json").json()["data"]["feedback"]
    assert [row["comment"] for row in left] == ["Good."]
    logs = answer(client, "GET", "/security/retention/logs", admin)
    assert logs["total"] == len(logs["items"]) == 5
    assert {item["run_id"] for item in logs["items"]} == {done["run_id"]}
    stale = client.post(path, json=body, headers=admin)
    assert (stale.status_code, stale.json()["code"]) == (409, "stale_plan")


def test_a_run_of_one_data_type_leaves_the_others(
    client: TestClient, jane: int, admin: Headers
) -> None:
    body = {"dry_run": False, "data_type": "booking"}
    done = answer(client, "POST", "/security/retention/apply", admin, body)
    assert [result["data_type"] for result in done["results"]] == ["booking"]
    assert export(client, admin, jane, format="json").json()["counts"]["feedback"] == 2


def test_the_log_is_given_newest_first_page_by_page(client: TestClient, admin: Headers) -> None:
    body = {"dry_run": False, "data_type": "feedback"}
    runs = [
        answer(client, "POST", "/security/retention/apply", admin, body)["run_id"] for _ in range(3)
    ]
    path = "/security/retention/logs"
    whole = answer(client, "GET", path, admin)
    assert [item["run_id"] for item in whole["items"]] == runs[::-1]
    page = answer(client, "GET", f"{path}?limit=2&offset=1", admin)
    assert (page["total"], page["items"]) == (3, whole["items"][1:])
    assert answer(client, "GET", f"{path}?offset=10", admin) == {"items": [], "total": 3}


# Legal holds


def test_a_hold_keeps_until_it_is_released(client: TestClient, jane: int, admin: Headers) -> None:
    path = "/security/holds"
    body = {
        "scope": "person", "user_id": jane, "reason": "claim of 2026-11",
        "review_on": "2027-01-01T00:00:00Z",
    }  # fmt: skip
    hold = answer(client, "POST", path, admin, body)
    assert hold | {"scope": "person", "user_id": jane, "reason": "claim of 2026-11"} == hold
    assert hold["review_on"] == "2027-01-01T00:00:00Z"
    assert answer(client, "GET", f"{path}/{hold['id']}", admin) == hold
    assert answer(client, "GET", path, admin) == {"items": [hold]}
    erasure = {"user_id": jane, "mode": "delete", "reason": "request under art. 17"}
    kept = client.post("/security/data/delete", json=erasure, headers=admin)
    assert (kept.status_code, kept.json()["code"]) == (409, "legal_hold")
    assert kept.json()["holds"] == [hold["id"]]
    run = answer(client, "POST", "/security/retention/apply", admin, {"dry_run": True})
    (held,) = (r for r in run["results"] if r["data_type"] == "feedback")
    assert (held["matched"], held["held"], held["affected"]) == (1, 1, 0)
    released = answer(client, "DELETE", f"{path}/{hold['id']}", admin)
    moment(released["released_at"])
    assert client.delete(f"{path}/{hold['id']}", headers=admin).status_code == 409
    assert delete(client, admin, jane, mode="delete")["status"] == "complete"


def test_a_hold_on_a_row_or_a_data_type_names_what_it_holds(
    client: TestClient, jane: int, admin: Headers
) -> None:
    with session_scope(read_only=True) as session:
        row = session.scalars(select(Feedback.id).order_by(Feedback.id)).first()
    good = [
        {"scope": "row", "data_type": "feedback", "row_id": row, "reason": "claim"},
        {"scope": "data_type", "data_type": "invoice", "reason": "audit"},
    ]
    for body in good:
        assert client.post("/security/holds", json=body, headers=admin).status_code == 201
    bad: list[tuple[dict[str, Any], int]] = [
        ({"scope": "person", "reason": "claim"}, 422),
        ({"scope": "person", "user_id": jane, "row_id": 1, "reason": "claim"}, 422),
        ({"scope": "person", "user_id": 999_999, "reason": "claim"}, 404),
        ({"scope": "row", "data_type": "feedback", "row_id": 999_999, "reason": "claim"}, 404),
        ({"scope": "data_type", "data_type": "minutes", "reason": "claim"}, 422),
    ]
    for body, status in bad:
        assert client.post("/security/holds", json=body, headers=admin).status_code == status, body


# Backup and restore


def test_a_backup_is_made_listed_proven_and_deleted(client: TestClient, admin: Headers) -> None:
    path = "/security/backup"
    made = answer(client, "POST", f"{path}/create", admin, {"label": "before the upgrade"})
    assert (made["label"], made["status"]) == ("before the upgrade", "complete")
    assert made["size_bytes"] > 4096
    assert len(bytes.fromhex(made["sha256"])) == 32
    assert made["verified_at"] is None
    assert (made["kind"], made["error"], made["held_until"]) == ("full", None, None)
    assert made["bytes_done"] > made["size_bytes"]
    assert made["id"] in made["location"]
    moment(made["created_at"])
    assert answer(client, "GET", f"{path}/{made['id']}", admin) == made
    last = client.delete(f"{path}/{made['id']}", headers=admin)
    assert last.status_code == 409
    proven = answer(client, "POST", f"{path}/{made['id']}/verify", admin)
    moment(proven["verified_at"])
    second = answer(client, "POST", f"{path}/create", admin)
    listed = answer(client, "GET", f"{path}/list", admin)
    assert listed["total"] == 2
    assert listed["items"] == [second, proven]
    assert (listed["breaks"], listed["newest_proven_at"]) == ([], made["created_at"])
    needed = client.delete(f"{path}/{made['id']}", headers=admin)
    assert (needed.status_code, needed.json()["code"]) == (409, "conflict")
    second = answer(client, "POST", f"{path}/{second['id']}/verify", admin)
    assert client.delete(f"{path}/{made['id']}", headers=admin).status_code == 204
    assert client.get(f"{path}/{made['id']}", headers=admin).status_code == 404
    assert answer(client, "GET", f"{path}/list", admin) == {
        "items": [second], "total": 1, "breaks": [], "newest_proven_at": second["created_at"],
    }  # fmt: skip


def test_a_backup_is_answered_at_once_for_who_does_not_wait(
    client: TestClient, admin: Headers
) -> None:
    path = "/security/backup"
    begun = answer(client, "POST", f"{path}/create", admin, {"label": "long", "wait": False})
    assert (begun["label"], begun["status"]) == ("long", "running")
    assert (begun["size_bytes"], begun["sha256"]) == (None, None)
    deadline = time.monotonic() + 60
    while (found := answer(client, "GET", f"{path}/{begun['id']}", admin))["status"] == "running":
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert (found["status"], found["created_at"]) == ("complete", begun["created_at"])
    # It is still looked at and copied: not into the next test.
    for thread in threading.enumerate():
        if thread.name == "backup":
            thread.join(timeout=60)


def test_a_backup_is_held_until_its_date(client: TestClient, admin: Headers) -> None:
    path = "/security/backup"
    made, _second = (answer(client, "POST", f"{path}/create", admin) for _ in range(2))
    until = (datetime.now(UTC) + timedelta(days=30)).replace(microsecond=0)
    body = {"until": until.isoformat()}
    held = answer(client, "PUT", f"{path}/{made['id']}/hold", admin, body)
    assert datetime.fromisoformat(held["held_until"]) == until
    assert client.delete(f"{path}/{made['id']}", headers=admin).status_code == 409
    released = answer(client, "PUT", f"{path}/{made['id']}/hold", admin, {"until": None})
    assert released == made
    assert client.delete(f"{path}/{made['id']}", headers=admin).status_code == 204


def test_a_restore_brings_back_rows_and_no_broken_promise(
    client: TestClient, jane: int, admin: Headers, service: Service, sign_in: SignIn
) -> None:
    joe = service.user(JOE, full_name="Joe Example")
    hers, his = sign_in(JANE), sign_in(JOE)
    consent(client, his, joe, purpose="marketing", granted=True)
    made = answer(client, "POST", "/security/backup/create", admin)
    consent(client, his, joe, purpose="marketing", granted=False)
    delete(client, admin, jane, mode="delete")
    service.add(feedback(joe, days_old=1, comment="After the backup."))
    with session_scope() as session:
        session.get_one(User, joe).full_name = "Changed"
    path = "/security/backup/restore"
    body: dict[str, Any] = {"backup_id": made["id"]}
    refused = client.post(path, json=body, headers=admin)
    assert (refused.status_code, refused.json()["code"]) == (422, "refused")
    planned = answer(client, "POST", path, admin, body | {"dry_run": True})
    assert (planned["status"], planned["previous"]) == ("planned", None)
    assert (planned["created_at"], planned["dry_run"]) == (made["created_at"], True)
    assert (planned["migrations"], planned["breaks"]) == ([], [])
    change = {"live": 1, "restored": 0, "lost": 1, "regained": 0}
    assert planned["tables"]["feedback"] == change
    assert (
        export(client, his, joe, format="json").json()["data"]["users"][0]["full_name"] == "Changed"
    )
    done = answer(client, "POST", path, admin, body | {"confirm": True})
    assert (done["backup_id"], done["status"]) == (made["id"], "restored")
    assert done["reapplied"]["erasures"] == 1
    assert set(done["reapplied"]) == {"erasures", "consents", "restrictions", "retention"}
    assert done["previous"]
    restored = export(client, his, joe, format="json").json()
    assert restored["data"]["users"][0]["full_name"] == "Joe Example"
    assert restored["data"]["feedback"] == []
    # Kept although the backup does not know them: the withdrawal and the erasure.
    assert restored["consents"]["purposes"]["marketing"]["granted"] is False
    assert client.get("/auth/me", headers=hers).status_code == 401
    assert client.get(f"/security/data/consent/{jane}", headers=admin).status_code == 404


# Encryption


def test_a_generated_key_is_fresh_and_of_32_bytes(client: TestClient, admin: Headers) -> None:
    path = "/security/encryption/key/generate"
    keys = {answer(client, "GET", path, admin)["key"] for _ in range(3)}
    assert len(keys) == 3
    assert {len(base64.b64decode(key, validate=True)) for key in keys} == {32}


def test_the_status_counts_what_each_key_protects(
    client: TestClient, jane: int, admin: Headers
) -> None:
    found = client.get("/security/encryption/status", headers=admin)
    status = found.json()
    (key,) = status["keys"]
    assert (key["key_id"], key["state"]) == (status["primary"], "primary")
    # The admin's address and hers; her name alone.
    assert (key["columns"]["users.email"], key["columns"]["users.full_name"]) == (2, 1)
    assert key["values"] == sum(key["columns"].values())
    assert status["message_limit"] == 2**32
    assert KEY not in found.text


# Probes


def test_probes_and_metrics_answer_without_a_token(client: TestClient) -> None:
    assert client.get("/healthz").json() == {"status": "ok"}
    ready = client.get("/readyz")
    assert ready.status_code == 200
    checks = {"database": "ok", "migrations": "ok", "key": "ok", "scheduler": "off"}
    ages = {"newest_seconds": None, "proven_seconds": None}
    assert ready.json() == {"status": "ready", "checks": checks, "backup": ages}
    metrics = client.get("/metrics")
    assert metrics.headers["content-type"].startswith("text/plain")
    line = 'holdfast_requests_total{method="GET",route="/healthz",status="200"}'
    assert any(row.startswith(line) for row in metrics.text.splitlines())


def test_metrics_name_routes_and_never_ids(client: TestClient, admin: Headers) -> None:
    client.get("/security/data/consent/424242", headers=admin)
    client.get("/security/nowhere/424242")
    text = client.get("/metrics").text
    assert 'route="/security/data/consent/{user_id}",status="404"' in text
    assert "424242" not in text
