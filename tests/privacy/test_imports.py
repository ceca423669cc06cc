"""Import: rows of an export come back to the person they were taken from, and to nobody else."""

import copy
import json
from collections.abc import Callable
from datetime import UTC, date, datetime
from typing import Any
from uuid import uuid4

import httpx2 as httpx
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import delete, select

from backend.db_utils import session_scope
from backend.models import AuditEvent, Feedback, User
from backend.privacy.erase import EraseMode
from backend.privacy.export import ExportFormat
from backend.services.compliance_service import get_compliance_service
from tests.conftest import Service
from tests.privacy import people
from tests.privacy.people import ADMINISTRATOR, Dump, dump, keys_of, plant

Document = dict[str, Any]


def export(user_id: int) -> Document:
    with session_scope() as session:
        chunks = get_compliance_service().export(session, ADMINISTRATOR, user_id, ExportFormat.JSON)
    document: Document = json.loads(b"".join(chunks))
    return document


def erase(user_id: int, mode: EraseMode = EraseMode.DELETE) -> None:
    with session_scope() as session:
        get_compliance_service().erase(
            session, ADMINISTRATOR, user_id, mode, reason="request", dry_run=False
        )


def import_(
    client: TestClient, headers: dict[str, str], document: Document, **fields: Any
) -> httpx.Response:
    # Escaped, so that every text of Python can be sent.
    body = json.dumps({"export": document, **fields})
    headers = {"Content-Type": "application/json", **headers}
    return client.post("/security/data/import", content=body, headers=headers)


def contents() -> Dump:
    """All rows but the trail, which tells of dry runs too."""
    return people.without(dump(), {}, "audit_events")


def counts(answer: httpx.Response) -> dict[str, tuple[int, int, int]]:
    assert answer.status_code == 200, answer.text
    return {
        table: (done["restored"], done["unchanged"], done["skipped"])
        for table, done in answer.json()["tables"].items()
    }


def test_an_import_over_what_is_there_changes_nothing(
    client: TestClient, admin: dict[str, str]
) -> None:
    person = plant("A")
    document = export(person.id)
    before = contents()
    answer = import_(client, admin, document, user_id=person.id)
    assert counts(answer) == {
        "users": (0, 1, 0),
        "bookings": (0, 2, 0),
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
            "bookings": (2, 0, 0),
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


Change = Callable[[Document], object]


def booking(column: str, value: Any) -> Change:
    return lambda document: document["data"]["bookings"][0].update({column: value})


def user(column: str, value: Any) -> Change:
    return lambda document: document["data"]["users"][0].update({column: value})


BROKEN: dict[str, Change] = {
    "another format": lambda d: d.update(format="other"),
    "a later version": lambda d: d.update(version=2),
    "no subject": lambda d: d.pop("subject"),
    "no data": lambda d: d.pop("data"),
    "a list for data": lambda d: d.update(data=[]),
    "an unknown table": lambda d: d["data"].update(secrets=[]),
    "a table of the service": lambda d: d["data"].update(audit_events=[]),
    "rows that are none": lambda d: d["data"].update(bookings=["row"]),
    "a column too many": user("password_hash", "$argon2id$"),
    "a column too few": lambda d: d["data"]["users"][0].pop("phone"),
    "null where a value must be": booking("hotel", None),
    "a number as text": booking("adults", "2"),
    "a truth value as a number": booking("adults", True),
    "no such day": booking("check_in", "2026-02-30"),
    "a time without a zone": booking("created_at", "2026-02-03T01:02:03"),
    "no uuid": user("uid", "x"),
    "no such role": user("role", "owner"),
}
# The types are right, but no row of ours can hold them.
IMPOSSIBLE: dict[str, Change] = {
    "a number that no column holds": booking("adults", 2**63),
    "a row number that no column holds": booking("id", 2**40),
    "half a character": user("full_name", "\ud800"),
    "a text that is too long": booking("country", "x" * 400),
    "a text that ends a string in C": booking("hotel", "a\x00b"),
    "a time before time": booking("created_at", "0001-01-01T00:00:00+14:00"),
}


def statuses(
    client: TestClient, headers: dict[str, str], changes: dict[str, Change]
) -> dict[str, int]:
    """Import a whole export with each of *changes*; none may leave a trace."""
    person = plant("A")
    document = export(person.id)
    erase(person.id)
    before, found = dump(), {}
    for name, change in changes.items():
        broken = copy.deepcopy(document)
        change(broken)
        found[name] = import_(client, headers, broken).status_code
    assert dump() == before
    return found


def test_what_is_no_whole_export_is_refused_and_nothing_changes(
    client: TestClient, admin: dict[str, str]
) -> None:
    assert statuses(client, admin, BROKEN) == dict.fromkeys(BROKEN, 422)


def test_values_that_no_row_can_hold_are_refused_and_nothing_changes(
    client: TestClient, admin: dict[str, str]
) -> None:
    assert statuses(client, admin, IMPOSSIBLE) == dict.fromkeys(IMPOSSIBLE, 422)


def test_a_value_that_breaks_a_rule_of_the_database_is_a_conflict(
    client: TestClient, admin: dict[str, str]
) -> None:
    changes: dict[str, Change] = {
        "a stay that ends before it begins": booking("check_out", "2001-01-01"),
        "a rating of six": lambda d: d["data"]["feedback"][0].update(rating=6),
        "a row twice": lambda d: d["data"]["feedback"].append(d["data"]["feedback"][0]),
    }
    assert statuses(client, admin, changes) == dict.fromkeys(changes, 409)


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
    max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
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
