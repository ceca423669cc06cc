"""Import: rows of an export come back to the person they were taken from, and to nobody else."""

import copy
import json
from datetime import UTC, date, datetime
from uuid import uuid4

from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import delete, event, insert, select

from backend.db_utils import get_engine, session_scope
from backend.models import (
    AuditEvent,
    BillingAddress,
    Companion,
    Feedback,
    User,
)
from backend.privacy.declarations import EraseMode
from backend.privacy.export import ExportFormat
from backend.privacy.import_plan import Imported
from backend.services.compliance_service import get_compliance_service
from backend.services.restore_service import get_restore_service
from backend.services.subject_service import Who
from tests.conftest import Run, Service
from tests.privacy import people
from tests.privacy.exports import contents, counts, erase, export, import_, take_back
from tests.privacy.people import ADMINISTRATOR, dump, keys_of, plant


def test_an_import_over_what_is_there_changes_nothing(
    client: TestClient, admin: dict[str, str]
) -> None:
    person = plant("A")
    document = export(person.id)
    before = contents()
    answer = import_(client, admin, document, user_id=person.id)
    assert counts(answer) == {
        "users": (0, 1, 0),
        "billing_addresses": (0, 2, 0),
        "bookings": (0, 2, 0),
        "companions": (0, 2, 0),
        "payments": (0, 2, 0),
        "invoices": (0, 2, 0),
        "invoice_lines": (0, 4, 0),
        "feedback": (0, 2, 0),
    }
    assert contents() == before


def test_a_row_that_was_lost_comes_back_as_it_was_and_only_that(
    client: TestClient, admin: dict[str, str]
) -> None:
    person = plant("A")
    document = export(person.id)
    lost = person.keys["feedback"][0]
    with session_scope() as session:
        session.execute(delete(Feedback).where(Feedback.id == lost))
        # What has changed since the export is newer than the export.
        session.get_one(User, person.id).staff_notes = "newer"
    answer = import_(client, admin, document)
    assert counts(answer)["feedback"] == (1, 1, 0)
    now = export(person.id)
    assert now["data"]["feedback"] == document["data"]["feedback"]
    assert now["data"]["users"][0]["staff_notes"] == "newer"
    with session_scope(read_only=True) as session:
        event = session.scalars(select(AuditEvent).where(AuditEvent.action == "import")).one()
    assert (event.outcome, json.loads(event.detail or "")) == ("done", {"restored": 1})
    assert event.subject_ref is not None


def test_an_erased_person_comes_back_without_what_the_law_has_kept_apart(
    client: TestClient, admin: dict[str, str]
) -> None:
    person, other = plant("A"), plant("B")
    document = export(person.id)
    erase(person.id)
    erased = dump()
    planned = import_(client, admin, document, dry_run=True)
    assert people.without(dump(), {}, "audit_events") == people.without(erased, {}, "audit_events")
    answer = import_(client, admin, document)
    # Of payments and invoices one is retained and restricted: that is nobody's now.
    assert (
        counts(answer)
        == counts(planned)
        == {
            "users": (1, 0, 0),
            "billing_addresses": (2, 0, 0),
            "bookings": (2, 0, 0),
            "companions": (2, 0, 0),
            "payments": (1, 0, 1),
            "invoices": (1, 0, 1),
            "invoice_lines": (2, 0, 2),
            "feedback": (2, 0, 0),
        }
    )
    assert (planned.json()["dry_run"], answer.json()["dry_run"]) == (True, False)
    after = dump()
    for table, rows in erased.items():
        if table not in ("audit_events", "users"):
            assert rows.items() <= after[table].items(), table
    assert keys_of(after, other.id) == keys_of(erased, other.id)
    new = export(person.id)["data"]
    old = document["data"]
    assert new["bookings"] == old["bookings"]
    assert new["feedback"] == old["feedback"]
    assert new["payments"] == old["payments"][1:]
    assert new["billing_addresses"] == old["billing_addresses"]
    # Consents and holds are evidence, and a new consent is the person's to give.
    assert new["data_consents"] == new["legal_holds"] == []
    assert (uid := new["users"][0].pop("uid")) != old["users"][0].pop("uid")
    assert uid
    assert new["users"] == old["users"]


def test_a_number_given_after_an_import_is_a_new_one(
    client: TestClient, service: Service, admin: dict[str, str]
) -> None:
    user_id = service.user("jane@example.com")
    document = export(user_id)
    erase(user_id)
    # As an export of another installation would have it.
    document["subject"]["user_id"] = document["data"]["users"][0]["id"] = user_id + 50
    assert import_(client, admin, document, dry_run=True).status_code == 200
    assert service.user("joe@example.com") == user_id + 1
    assert import_(client, admin, document).status_code == 200
    assert service.user("june@example.com") == user_id + 51


def test_an_import_is_refused_for_anyone_but_its_person(
    client: TestClient, service: Service, admin: dict[str, str]
) -> None:
    person, other, anonymous = (plant(letter) for letter in "ABC")
    document, of_anonymous = export(person.id), export(anonymous.id)
    erase(anonymous.id, EraseMode.ANONYMIZE)
    now_another = copy.deepcopy(document)
    now_another["data"]["users"][0]["uid"] = str(uuid4())
    two_people = copy.deepcopy(document)
    two_people["data"]["users"] += export(other.id)["data"]["users"]
    no_person = copy.deepcopy(document)
    no_person["data"]["users"] = []
    before = contents()
    answers = {
        "for another": import_(client, admin, document, user_id=other.id),
        "another uid": import_(client, admin, now_another),
        "anonymous": import_(client, admin, of_anonymous),
        "two people": import_(client, admin, two_people),
        "no person": import_(client, admin, no_person),
    }
    assert {name: answer.status_code for name, answer in answers.items()} == {
        "for another": 403,
        "another uid": 409,
        "anonymous": 410,
        "two people": 422,
        "no person": 422,
    }
    assert contents() == before
    assert import_(client, admin, document, user_id=person.id).status_code == 200


def test_an_import_is_refused_whole_where_the_address_is_another_person_s_now(
    client: TestClient, service: Service, admin: dict[str, str]
) -> None:
    user_id = service.user("jane@example.com")
    document = export(user_id)
    erase(user_id)
    service.user("JANE@example.com")
    before = contents()
    answer = import_(client, admin, document)
    assert (answer.status_code, answer.json()["code"]) == (409, "conflict")
    assert "jane" not in answer.text.lower()
    assert contents() == before


def test_nothing_is_taken_from_others_and_nothing_hung_on_them(
    client: TestClient, service: Service, admin: dict[str, str]
) -> None:
    person, other = plant("A"), plant("B")
    document = export(person.id)
    erase(person.id)
    data = document["data"]
    theirs = other.keys["bookings"][0]
    data["bookings"][0]["id"] = theirs
    data["feedback"][0]["booking_id"] = theirs
    data["feedback"][1]["user_id"] = other.id
    data["invoice_lines"][-1]["invoice_id"] = other.keys["invoices"][0]
    before = dump()
    done = counts(import_(client, admin, document))
    assert (done["bookings"], done["feedback"]) == ((1, 0, 1), (1, 0, 1))
    assert done["invoice_lines"] == (1, 0, 3)
    after = dump()
    mine = keys_of(after, other.id)
    assert mine == keys_of(before, other.id)
    for table, keys in mine.items():
        assert all(after[table][key] == before[table][key] for key in keys), table
    (restored,) = (row for row in after["feedback"].values() if row["user_id"] == person.id)
    assert restored["booking_id"] is None


def test_an_import_gives_no_rights_and_no_password(
    client: TestClient, service: Service, admin: dict[str, str]
) -> None:
    user_id = service.user("jane@example.com")
    document = export(user_id)
    erase(user_id)
    document["data"]["users"][0]["role"] = "admin"
    assert import_(client, admin, document).status_code == 200
    row = dump()["users"][(user_id,)]
    assert (row["role"], row["password_hash"]) == ("user", None)
    # The address is found again, so nobody else can register it.
    again = client.post(
        "/auth/token", data={"username": "jane@example.com", "password": "wrong wrong wrong"}
    )
    assert again.status_code == 401
    assert row["email_index"].startswith("bi1.")


def test_a_second_import_restores_nothing(client: TestClient, admin: dict[str, str]) -> None:
    person = plant("A")
    document = export(person.id)
    # The export stays theirs, however often a mistake is put right.
    for _ in range(2):
        erase(person.id)
        assert counts(import_(client, admin, document))["users"] == (1, 0, 0)
        before = contents()
        again = import_(client, admin, document)
        assert {restored for restored, _unchanged, _skipped in counts(again).values()} == {0}
        assert counts(again)["bookings"] == (0, 2, 0)
        assert contents() == before
    document["data"]["users"][0]["uid"] = str(uuid4())
    assert import_(client, admin, document).status_code == 409


def test_who_came_back_is_told_in_the_trail_and_not_erased_by_the_ledger(
    client: TestClient, admin: dict[str, str], run: Run
) -> None:
    person = plant("A")
    document = export(person.id)
    erase(person.id)
    assert import_(client, admin, document).status_code == 200
    with session_scope(read_only=True) as session:
        events = {
            event.action: event
            for event in session.scalars(select(AuditEvent).where(AuditEvent.outcome == "done"))
        }
    told = json.loads(events["import"].detail or "")
    assert told["was"] == events["erasure"].subject_ref != events["import"].subject_ref
    before = contents()
    with session_scope() as session:
        replayed = get_restore_service().recover(session)
    assert replayed.erasures == 0
    answer = run("erase", "--replay", "--json")
    assert (answer.code, answer.json["erasures"]) == (0, 0)
    assert contents() == before


def test_a_person_s_own_address_that_came_back_is_not_redacted_by_the_ledger(
    service: Service,
) -> None:
    user_id = service.user("jane@example.com")
    at = datetime(2026, 1, 2, tzinfo=UTC)
    address = BillingAddress(contact_name="Jane", email="Jane@example.com", created_at=at)
    service.add(address)
    stay = people.booking(user_id, at.date(), billing_address_id=address.id)
    service.add(stay)
    service.add(Companion(booking_id=stay.id, email="jane@example.com", created_at=at))
    document = export(user_id)
    erase(user_id)
    take_back(document)
    before = contents()
    with session_scope() as session:
        get_restore_service().recover(session)
    assert contents() == before


def test_the_export_of_somebody_without_an_account_is_refused(
    client: TestClient, service: Service, admin: dict[str, str]
) -> None:
    service.add(
        BillingAddress(email="jack@example.com", created_at=datetime(2026, 1, 2, tzinfo=UTC))
    )
    with session_scope() as session:
        chunks = get_compliance_service().export(
            session, ADMINISTRATOR, Who(email="jack@example.com"), ExportFormat.JSON
        )
    document = json.loads(b"".join(chunks))
    for named in ({}, {"user_id": 1}):
        answer = import_(client, admin, document, **named)
        assert (answer.status_code, answer.json()["code"]) == (422, "import_refused")
        assert "without an account" in answer.json()["detail"]


def test_keys_are_looked_up_a_thousand_at_a_time(sqlite_service: Service) -> None:
    at = datetime(2026, 1, 2, tzinfo=UTC)

    def statements(rows: int) -> int:
        user_id = sqlite_service.user(f"u{rows}@example.com")
        with session_scope() as session:
            values = [{"user_id": user_id, "rating": 5, "submitted_at": at}] * rows
            session.execute(insert(Feedback), values)
        document = export(user_id)
        with session_scope() as session:
            session.execute(delete(Feedback))
        seen: list[str] = []
        listener = lambda *arguments: seen.append(arguments[2])  # noqa: E731
        event.listen(get_engine(), "before_cursor_execute", listener)
        assert take_back(document)["feedback"] == Imported(restored=rows)
        event.remove(get_engine(), "before_cursor_execute", listener)
        return len(seen)

    # Two chunks more: each is looked up once and inserted once.
    assert statements(2_500) == statements(500) + 4


# No row may hold the character that ends a string in C.
optional = st.none() | st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=40)


moments = st.datetimes(datetime(1990, 1, 1), datetime(2015, 1, 1), timezones=st.just(UTC))  # noqa: DTZ001 - hypothesis adds the zone


@given(
    name=optional,
    notes=optional,
    words=optional,
    born=st.none() | st.dates(),
    amount=st.integers(0, 10**9),
    at=moments,
)
@settings(
    max_examples=10,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
def test_a_person_who_was_exported_and_erased_is_whole_again_after_the_import(
    sqlite_service: Service, name: str | None, notes: str | None, words: str | None,
    born: date | None, amount: int, at: datetime,
) -> None:  # fmt: skip
    day = at.date()
    person = User(full_name=name, staff_notes=notes, date_of_birth=born, created_at=at)
    with session_scope() as session:
        session.add(person)
        session.flush()
        stay = people.booking(person.id, day, special_requests=words, created_at=at)
        session.add(stay)
        session.flush()
        # Past the law's period, so that they are erased, too.
        session.add(people.payment(person.id, at, booking_id=stay.id, amount_minor=amount))
        session.add(people.invoice(person.id, day, note=notes))
        session.add(people.feedback(person.id, at, comment=words, booking_id=stay.id))
    document = export(person.id)
    erase(person.id)
    with session_scope() as session:
        get_compliance_service().import_(session, ADMINISTRATOR, document, None, dry_run=False)
    data = export(person.id)["data"]
    for half in (data, document["data"]):
        half["users"][0].pop("uid")
    assert data == document["data"]
