"""The notice of article 15: of this person's rows, with dates that retention keeps to."""

import json
from datetime import UTC, date, datetime, timedelta
from typing import Any

import pytest

from backend.db_utils import session_scope
from backend.models import DATA_MAP, Companion
from backend.privacy.declarations import EraseMode
from backend.privacy.periods import Period
from backend.services.compliance_service import get_compliance_service
from backend.services.consent_service import get_consent_service
from backend.services.policy_service import get_policy_service
from backend.services.retention_service import get_retention_service
from backend.services.subject_service import Who
from backend.settings import RetentionAction
from tests.conftest import Service
from tests.privacy import people
from tests.privacy.people import ADMINISTRATOR, PAST, plant
from tests.privacy.reading_back import export

BOOKING_DAYS = 2555


def document_of(who: int | Who) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(export(who))
    return document


def notice_of(who: int | Who) -> dict[str, Any]:
    notice: dict[str, Any] = document_of(who)["notice"]
    return notice


def reached(notice: dict[str, Any], right: str) -> list[str]:
    (found,) = (one["tables"] for one in notice["rights"] if one["right"] == right)
    return list(found)


def test_tables_that_hold_something_are_told_in_full_and_the_others_by_name(
    service: Service,
) -> None:
    user_id = service.user("jane@example.com")
    service.add(people.booking(user_id, date(2026, 1, 2)))
    document = document_of(user_id)
    notice = document["notice"]
    assert list(notice["tables"]) == ["users", "bookings"]
    assert set(notice["nothing_held"]) == set(document["data"]) - {"users", "bookings"}
    booking = notice["tables"]["bookings"]
    assert booking["rows"] == 1
    assert booking["purpose"] == "Providing the stay that was booked"
    assert booking["lawful_basis"] == "contract (GDPR art. 6(1)(b))"
    assert "user.device.ip_address" in booking["categories"]
    assert booking["recipients"] == ["the travel agent who booked"]
    assert booking["source"].startswith("the person or their travel agent")
    assert (booking["transfers"], booking["automated_decisions"]) == (None, None)
    assert notice["controller"]["name"] == "the operator of this service"
    assert notice["backups_expire_after_days"] == 90


def test_the_last_row_of_each_table_is_due_on_the_day_that_is_told(service: Service) -> None:
    now = datetime.now(UTC)
    person = plant("A", now)
    tables = notice_of(person.id)["tables"]
    stay = now - people.INSIDE
    # Of a date the whole day counts, so the row is due on the day after.
    of_stay = stay.date() + timedelta(days=BOOKING_DAYS + 1)
    of_time = (stay + timedelta(days=BOOKING_DAYS)).date()
    account = (now - timedelta(days=3) + timedelta(days=3650)).date()
    expected = {
        "users": account,
        "data_consents": account,
        "legal_holds": account,
        # At the latest: an expired one goes with the next sign-in.
        "sign_ins": account,
        "bookings": of_stay,
        "companions": of_stay,
        "invoices": of_stay,
        "invoice_lines": of_stay,
        "payments": of_time,
        "feedback": (stay + timedelta(days=365)).date(),
        # Goes when nobody refers to it any more: no day is known.
        "billing_addresses": None,
    }
    told = {name: table["last_due_on"] for name, table in tables.items()}
    assert told == {name: day and day.isoformat() for name, day in expected.items()}
    for name, table in tables.items():
        by_law = name in ("payments", "invoices", "invoice_lines")
        assert (table["kept_by_law"] is not None) == by_law
        assert table["kept_by_law_until"] == (table["last_due_on"] if by_law else None)
    assert tables["bookings"]["kept_for"] == "2555 days from check out"
    assert tables["data_consents"]["kept_for"] == "as long as the account"
    assert "art. 17(3)(b)" in tables["invoices"]["kept_by_law"]


def test_retention_finds_the_last_row_due_on_the_day_told_and_not_a_day_before(
    service: Service,
) -> None:
    user_id = service.user("jane@example.com")
    service.add(
        people.booking(user_id, date(2024, 2, 29)),
        people.feedback(user_id, datetime(2024, 3, 1, 12, tzinfo=UTC)),
    )
    tables = notice_of(user_id)["tables"]
    for table, data_type in (("bookings", "booking"), ("feedback", "feedback")):
        day = date.fromisoformat(tables[table]["last_due_on"])
        evening = datetime(day.year, day.month, day.day, 23, 59, tzinfo=UTC)
        for moment, due in ((evening, 1), (evening - timedelta(days=1), 0)):
            with session_scope(read_only=True) as session:
                states = get_retention_service().states(session, moment)
            assert [s.due for s in states if s.policy.data_type == data_type] == [due]


def test_what_a_law_keeps_after_an_erasure_is_kept_until_the_day_that_was_told(
    service: Service,
) -> None:
    person = plant("A")
    tables = notice_of(person.id)["tables"]
    with session_scope() as session:
        erasure = get_compliance_service().erase(
            session, ADMINISTRATOR, person.id, EraseMode.DELETE, reason="asked", dry_run=True
        )
    until = {one.table: str(one.until)[:10] for one in erasure.plan.retained}
    told = {name: t["kept_by_law_until"] for name, t in tables.items() if t["kept_by_law_until"]}
    assert told == until
    assert len(told) == 3


def test_no_day_is_told_where_no_period_ends_the_rows(service: Service) -> None:
    admin = notice_of(1)["tables"]["users"]
    assert (admin["last_due_on"], admin["kept_for"]) == (None, "as long as it is in use")
    user_id = service.user("jane@example.com")
    service.add(people.booking(user_id, date(9999, 12, 31)))
    booking = notice_of(user_id)["tables"]["bookings"]
    assert booking["last_due_on"] == "9999-12-31"


def test_a_policy_that_is_off_and_a_hold_that_stands_are_told(service: Service) -> None:
    user_id = service.user("jane@example.com")
    service.add(people.booking(user_id, date(2026, 1, 2)))
    before = notice_of(user_id)["tables"]
    assert not any(table["on_hold"] for table in before.values())
    service.add(people.person_hold(user_id))
    with session_scope() as session:
        get_policy_service().set(
            session, ADMINISTRATOR, "booking", Period.parse("P7Y"), RetentionAction.DELETE,
            enabled=False,
        )  # fmt: skip
    after = notice_of(user_id)
    booking = after["tables"]["bookings"]
    assert booking["kept_for"] == "7 years from check out, then removed by hand"
    assert booking["last_due_on"] == "2033-01-03"
    assert all(table["on_hold"] for table in after["tables"].values())
    assert reached(after, "erasure") == []


def test_each_right_is_told_with_its_article_and_the_tables_that_it_reaches(
    service: Service,
) -> None:
    user_id = service.user("jane@example.com")
    now = datetime.now(UTC)
    service.add(people.payment(user_id, now), people.feedback(user_id, now))
    with session_scope() as session:
        get_consent_service().record(
            session, ADMINISTRATOR, user_id, purpose="marketing", granted=True, evidence="a form"
        )
    notice = notice_of(user_id)
    articles = {one["right"]: one["article"] for one in notice["rights"]}
    assert articles == {
        "access": "GDPR art. 15",
        "rectification": "GDPR art. 16",
        "erasure": "GDPR art. 17",
        "restriction": "GDPR art. 18",
        "portability": "GDPR art. 20",
        "objection": "GDPR art. 21",
        "withdrawal of consent": "GDPR art. 7(3)",
        "complaint": "GDPR art. 77",
    }
    assert reached(notice, "access") == list(notice["tables"])
    assert "payments" not in reached(notice, "erasure")
    assert "feedback" in reached(notice, "erasure")
    assert reached(notice, "portability") == ["users"]
    assert reached(notice, "objection") == ["feedback"]
    words = {one["right"]: one["how"] for one in notice["rights"]}
    assert "stands for: marketing." in words["withdrawal of consent"]
    assert notice["controller"]["contact"] in words["rectification"]


def test_somebody_whom_only_others_name_is_told_what_is_held_of_them_and_nobody_else(
    service: Service,
) -> None:
    guest, _other = plant("A"), plant("B")
    address, name = (
        next(m.text for m in guest.marks if (m.table, m.column) == ("companions", column))
        for column in ("email", "full_name")
    )
    document = document_of(Who(email=address.upper()))
    assert document["subject"] == {"user_id": None}
    assert document["consents"] == {"user_id": None, "purposes": {}, "history": []}
    (row,) = document["data"]["companions"]
    assert (row["email"], row["full_name"], row["created_at"]) == (address, name, None)
    assert list(document["notice"]["tables"]) == ["companions"]
    stay = datetime.now(UTC).date() - people.INSIDE
    due = stay + timedelta(days=BOOKING_DAYS + 1)
    assert document["notice"]["tables"]["companions"]["last_due_on"] == due.isoformat()
    assert document["redactions"] == [
        {
            "table": "companions",
            "row": {"id": row["id"]},
            "columns": ["created_at"],
            "ground": "GDPR art. 15(4): it is about the person whose row it is",
        }
    ]
    (request,) = document["requests"]
    assert (request["action"], request["outcome"]) == ("export", "done")
    mine = {address, name, row["phone"]}
    for format_ in ("json", "csv"):
        told = export(Who(email=address), format_).decode()
        assert not [text for text in guest.words() - mine if text in told]
        assert "B0" not in told


def test_what_a_guest_is_not_told_of_their_companions_is_listed(service: Service) -> None:
    guest = plant("A")
    document = document_of(guest.id)
    left_out = {one["table"]: set(one["columns"]) for one in document["redactions"]}
    assert left_out == {
        "companions": {"full_name", "email", "phone"},
        "billing_addresses": {"contact_name", "email"},
    }
    rows = document["data"]["companions"]
    assert {one["row"]["id"] for one in document["redactions"] if one["table"] == "companions"} == {
        row["id"] for row in rows
    }
    assert not any(row[column] for row in rows for column in left_out["companions"])


@pytest.mark.parametrize("named_too", [True, False])
def test_a_guest_who_is_named_in_their_own_booking_reads_what_it_says_of_them(
    sqlite_service: Service, named_too: bool
) -> None:
    user_id = sqlite_service.user("jane@example.com")
    stay = people.booking(user_id, date(2026, 1, 2))
    sqlite_service.add(stay)
    address = "Jane@Example.com" if named_too else "joe@example.com"
    companion = Companion(booking_id=stay.id, email=address, created_at=datetime.now(UTC) - PAST)
    sqlite_service.add(companion)
    document = document_of(user_id)
    (row,) = document["data"]["companions"]
    assert row["email"] == (address if named_too else None)
    assert bool(document["redactions"]) != named_too
    assert DATA_MAP["companions"].rule.purpose in json.dumps(document["notice"])
