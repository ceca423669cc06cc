"""Finding people: by number, e-mail address or telephone, however these are spelled."""

import unicodedata
from datetime import UTC, date, datetime
from typing import Any, Final

import httpx2 as httpx
import pytest
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from backend.models import BillingAddress, Companion
from tests.conftest import Service, SignIn
from tests.privacy import people
from tests.privacy.people import Dump, dump, without

FIND, EXPORT, DELETE = (f"/security/data/{act}" for act in ("find", "export", "delete"))
ACTS: Final[dict[str, dict[str, Any]]] = {
    FIND: {},
    EXPORT: {},
    DELETE: {"mode": "delete", "reason": "request under art. 17"},
}
ZOE: Final = "zoé.müller@example.com"
PHONE: Final = "+49 30 1234567"
Headers = dict[str, str]
# What no engine does otherwise is shown on the one that starts sooner.
SQLITE = pytest.mark.parametrize("service", ["sqlite"], indirect=True)


def wide(text: str) -> str:
    """Spell *text* in the full-width forms of East Asian keyboards."""
    return "".join(chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in text)


EMAILS: Final = {
    "as it is": ZOE,
    "upper case": ZOE.upper(),
    "decomposed": unicodedata.normalize("NFD", ZOE),
    "decomposed upper case": unicodedata.normalize("NFD", ZOE.upper()),
    "full width": wide(ZOE),
    "with white space around": f"  {ZOE} ",
}
PHONES: Final = {
    "as it is": PHONE,
    "in one": "+49301234567",
    "with dashes": "+49-30-1234-567",
    "with brackets and a slash": "+49 (30) 123/4567",
    "with 00": "0049 30 1234567",
    "with the zero that is not dialled": "+49 (0)30 1234567",
    "with 00 and that zero": "0049 (0) 30 / 123 45 67",
    "with dots and no-break spaces": "+49\N{NO-BREAK SPACE}30.123.4567",
    "full width": wide(PHONE),
}


@pytest.fixture
def zoe(service: Service) -> int:
    service.user("joe@example.com", phone="+49 30 7654321")
    return service.user(ZOE, full_name="Zoé Müller", phone=PHONE)


def ask(client: TestClient, headers: Headers, act: str, **fields: Any) -> httpx.Response:
    return client.post(act, json=ACTS[act] | fields, headers=headers)


def contents() -> Dump:
    """All rows but what the service notes of requests and of sign-ins."""
    return without(dump(), {}, "audit_events", "planned_erasures")


def test_any_spelling_of_an_address_finds_its_person_and_no_other(
    client: TestClient, admin: Headers, zoe: int
) -> None:
    for field, spellings in (("email", EMAILS), ("phone", PHONES)):
        found = {
            name: ask(client, admin, FIND, **{field: text}).json()
            for name, text in spellings.items()
        }
        wanted = {"user_id": zoe, "named_in": [], "subject_ref": found["as it is"]["subject_ref"]}
        assert found == dict.fromkeys(spellings, wanted)
    for other in ("zoe.muller@example.com", "zoé.müller@example.org", "zoé@example.com"):
        assert ask(client, admin, FIND, email=other).status_code == 404
    for other in ("+49 30 123456", "+49 30 12345678", "+43 30 1234567", "1234567"):
        assert ask(client, admin, FIND, phone=other).status_code == 404


@pytest.fixture
def _in_germany(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PHONE_REGION", "DE")


@SQLITE
@pytest.mark.usefixtures("_in_germany")
def test_a_national_number_is_that_of_the_region(
    client: TestClient, admin: Headers, service: Service, zoe: int
) -> None:
    kim = service.user("kim@example.com", phone="(0221) 998877")
    for text, who in (
        ("030 1234567", zoe), ("030/123-4567", zoe), ("+49 221 998877", kim), ("0221998877", kim),
    ):  # fmt: skip
        assert ask(client, admin, FIND, phone=text).json()["user_id"] == who
    assert ask(client, admin, FIND, phone="1234567").status_code == 404


@SQLITE
def test_without_a_region_a_national_number_is_found_by_its_digits_only(
    client: TestClient, admin: Headers, service: Service, zoe: int
) -> None:
    kim = service.user("kim@example.com", phone="(0221) 998877")
    assert ask(client, admin, FIND, phone="0221/99 88 77").json()["user_id"] == kim
    assert ask(client, admin, FIND, phone="+49 221 998877").status_code == 404
    assert ask(client, admin, FIND, phone="030 1234567").status_code == 404


@SQLITE
def test_two_extensions_of_one_switchboard_are_two_people(
    client: TestClient, admin: Headers, service: Service, zoe: int
) -> None:
    kim = service.user("kim@example.com", phone="+43 1 234567 ext. 5")
    book(service, zoe, companion("Another Companion", phone="+43 1 234567 ext. 9"))
    assert ask(client, admin, FIND, phone="0043 1 23 45 67 ext. 5").json()["user_id"] == kim
    assert ask(client, admin, FIND, phone="+43 1 234567 ext. 9").json()["user_id"] is None
    assert ask(client, admin, FIND, phone="+43 1 234567").status_code == 404
    exported = ask(client, admin, EXPORT, user_id=kim)
    assert exported.json()["data"]["companions"] == []
    assert "Another" not in exported.text


@SQLITE
@settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(gaps=st.lists(st.sampled_from(["", " ", "-", "/", ".", " - "]), min_size=9, max_size=9))
def test_gaps_between_the_digits_make_no_other_person(
    client: TestClient, admin: Headers, zoe: int, gaps: list[str]
) -> None:
    text = "+49" + "".join(f"{gap}{digit}" for gap, digit in zip(gaps, "301234567", strict=True))
    assert ask(client, admin, FIND, phone=text).json()["user_id"] == zoe, text


@pytest.mark.parametrize("named", ["user_id", "email", "phone"])
@SQLITE
def test_each_act_takes_each_way_of_naming_a_person(
    client: TestClient, admin: Headers, zoe: int, named: str
) -> None:
    who: dict[str, Any] = {named: {"user_id": zoe, "email": ZOE.upper(), "phone": PHONE}[named]}
    assert ask(client, admin, FIND, **who).json()["user_id"] == zoe
    exported = ask(client, admin, EXPORT, **who).json()
    assert exported["subject"] == {"user_id": zoe}
    assert [row["full_name"] for row in exported["data"]["users"]] == ["Zoé Müller"]
    planned = ask(client, admin, DELETE, dry_run=True, **who).json()
    assert ask(client, admin, DELETE, plan_digest=planned["plan_digest"], **who).status_code == 200
    assert (zoe,) not in dump()["users"]
    for act in ACTS:
        gone = ask(client, admin, act, **who)
        assert (gone.status_code, gone.json()["code"]) == (404, "subject_not_found")


@SQLITE
def test_a_person_is_named_in_exactly_one_way(client: TestClient, admin: Headers, zoe: int) -> None:
    ways: dict[str, Any] = {"user_id": zoe, "email": ZOE, "phone": PHONE}
    bad: list[dict[str, Any]] = [
        {},
        dict.fromkeys(ways),
        *({**ways, left_out: None} for left_out in ways),
        ways,
    ]
    before = contents()
    for act in ACTS:
        for named in bad:
            refused = ask(client, admin, act, **named)
            problem = refused.json()
            assert (refused.status_code, problem["code"]) == (422, "invalid_request"), named
            assert "one of user_id, email and phone" in problem["detail"]
    assert contents() == before


@SQLITE
def test_an_address_that_is_nobodys_or_none_is_refused_and_not_repeated(
    client: TestClient, admin: Headers, zoe: int
) -> None:
    odd: list[tuple[int, dict[str, Any]]] = [
        (404, {"email": "nobody@example.com"}),
        (404, {"email": "no address at all"}),
        (404, {"email": "%@example.com"}),
        (404, {"phone": "+1 202 555 0100"}),
        (404, {"phone": "---"}),
        (404, {"phone": "+++"}),
        (422, {"email": ""}),
        (422, {"email": "    "}),
        (422, {"email": "a@example.com\nb@example.com"}),
        (422, {"email": "zo\0e@example.com"}),
        (422, {"email": f"{'a' * 320}@example.com"}),
        (422, {"email": [ZOE]}),
        (422, {"phone": 49301234567}),
        (422, {"phone": "1" * 41}),
        (422, {"phone": "\N{NO-BREAK SPACE} \t"}),
        (422, {"mail": ZOE}),
    ]
    for status, named in odd:
        (value,) = (str(value).strip() for value in named.values())
        for act in ACTS:
            refused = ask(client, admin, act, **named)
            assert refused.status_code == status, named
            assert refused.headers["content-type"] == "application/problem+json"
            assert len(value) < 5 or value not in refused.text


# Somebody whom only others' rows name


def book(service: Service, user_id: int, *companions: Companion, **columns: Any) -> None:
    stay = people.booking(user_id, date(2026, 1, 2), **columns)
    service.add(stay)
    for companion in companions:
        companion.booking_id = stay.id
        companion.created_at = datetime(2026, 1, 1, tzinfo=UTC)
    service.add(*companions)


def companion(name: str, email: str | None = None, phone: str | None = None) -> Companion:
    return Companion(full_name=name, email=email, phone=phone)


@pytest.mark.parametrize(
    "named", [{"email": "KIM@example.com"}, {"phone": "0044 (0)20 7946 0000"}], ids=str
)
def test_who_is_named_in_anothers_booking_only_is_found_exported_and_erased(
    client: TestClient, admin: Headers, service: Service, zoe: int, named: dict[str, str]
) -> None:
    # A telephone names somebody where there is no e-mail address.
    email = "kim@example.com" if "email" in named else None
    kim = companion("Kim Companion", email, "+44 20 7946 0000")
    other = companion("Ada Companion", "ada@example.com", "+44 20 7946 0001")
    book(service, zoe, kim, other, special_requests="a note of the booker")
    found = ask(client, admin, FIND, **named).json()
    assert (found["user_id"], found["named_in"]) == (None, ["companions"])

    exported = ask(client, admin, EXPORT, **named)
    document = exported.json()
    assert document["subject"] == {"user_id": None}
    rows = {table: rows for table, rows in document["data"].items() if rows}
    assert set(rows) == {"companions"}
    (row,) = rows["companions"]
    assert (row["id"], row["full_name"], row["email"]) == (kim.id, "Kim Companion", email)
    assert row["phone"] == "+44 20 7946 0000"
    for foreign in ("Zoé", ZOE, "Ada", "ada@", "0001", "a note of the booker"):
        assert foreign not in exported.text
    (told,) = document["redactions"]
    assert (told["table"], told["row"]) == ("companions", {"id": kim.id})
    assert {name for name in row if row[name] is None} >= set(told["columns"])
    assert "created_at" in told["columns"]
    assert told["ground"].startswith("GDPR art. 15(4)")

    before = contents()
    planned = ask(client, admin, DELETE, dry_run=True, **named).json()
    assert contents() == before
    done = ask(client, admin, DELETE, plan_digest=planned["plan_digest"], **named).json()
    assert done["tables"] == planned["tables"]
    assert done["tables"]["companions"]["redacted"] == 1
    assert {t for t, counts in done["tables"].items() if any(counts.values())} == {"companions"}
    after = contents()
    left = after["companions"][(kim.id,)]
    cut = ("full_name", "email", "email_index", "phone", "phone_index")
    assert [left[name] for name in cut] == [None] * 5
    assert left["booking_id"] == kim.booking_id
    untouched = {"companions": {(kim.id,)}}
    own = ("erasures", "privacy_ledger", "installation")
    assert without(after, untouched, *own) == without(before, untouched, *own)
    assert ask(client, admin, FIND, **named).status_code == 404


@SQLITE
def test_a_guest_who_is_named_by_others_too_is_one_person(
    client: TestClient, admin: Headers, service: Service, zoe: int
) -> None:
    host = service.user("host@example.com", full_name="The Host")
    address = BillingAddress(
        company="The Host's", contact_name="Zoé Müller", email=ZOE.upper(),
        created_at=datetime(2026, 1, 1, tzinfo=UTC),
    )  # fmt: skip
    service.add(address)
    with_zoe = companion("Zoé Müller", ZOE)
    book(service, host, with_zoe, billing_address_id=address.id)
    found = ask(client, admin, FIND, phone=PHONE).json()
    assert (found["user_id"], set(found["named_in"])) == (zoe, {"companions", "billing_addresses"})
    document = ask(client, admin, EXPORT, user_id=zoe).json()
    assert [row["id"] for row in document["data"]["companions"]] == [with_zoe.id]
    (billing,) = document["data"]["billing_addresses"]
    assert (billing["contact_name"], billing["company"]) == ("Zoé Müller", None)
    assert "The Host" not in str(document)
    done = ask(client, admin, DELETE, email=ZOE).json()
    assert done["tables"]["companions"]["redacted"] == 1
    assert done["tables"]["billing_addresses"]["redacted"] == 1
    hosts = ask(client, admin, EXPORT, user_id=host).json()["data"]
    assert [row["company"] for row in hosts["billing_addresses"]] == ["The Host's"]
    assert [row["contact_name"] for row in hosts["billing_addresses"]] == [None]
    assert len(hosts["bookings"]) == len(hosts["companions"]) == 1


@SQLITE
def test_two_people_with_one_telephone_are_told_apart_by_number(
    client: TestClient, admin: Headers, service: Service, zoe: int
) -> None:
    kim = service.user("kim@example.com", phone="0049 (0)30 1234567")
    before = contents()
    for act in ACTS:
        refused = ask(client, admin, act, phone=PHONE)
        problem = refused.json()
        assert (refused.status_code, problem["code"]) == (409, "conflict")
        assert problem["user_ids"] == [zoe, kim]
        assert "1234567" not in refused.text
    assert contents() == before
    assert ask(client, admin, DELETE, user_id=kim).status_code == 200
    assert ask(client, admin, FIND, phone=PHONE).json()["user_id"] == zoe


# Who may ask, and what is written down


@SQLITE
def test_who_is_no_admin_exports_their_own_number_and_never_by_address(
    client: TestClient, service: Service, zoe: int, sign_in: SignIn
) -> None:
    own = sign_in(ZOE)
    assert ask(client, own, EXPORT, user_id=zoe).status_code == 200
    denied: list[dict[str, Any]] = [
        {"email": ZOE}, {"phone": PHONE}, {"email": "joe@example.com"},
        {"email": "nobody@example.com"}, {"phone": "+1 202 555 0100"}, {"user_id": 1},
    ]  # fmt: skip
    said = {
        (answer.status_code, answer.json()["detail"])
        for answer in (ask(client, own, EXPORT, **named) for named in denied)
    }
    # One answer, so that nobody learns whose address is here.
    assert {status for status, _detail in said} == {403}
    assert len({detail for _status, detail in said}) <= 2
    by_address = {
        ask(client, own, EXPORT, email=email).json()["detail"]
        for email in (ZOE, "joe@example.com", "nobody@example.com")
    }
    assert len(by_address) == 1
    for act in (FIND, DELETE):
        assert ask(client, own, act, user_id=zoe).status_code == 403
        assert ask(client, {}, act, email=ZOE).status_code == 401
    assert ask(client, {}, EXPORT, email=ZOE).status_code == 401


@SQLITE
def test_an_erased_person_is_gone_by_number_and_unknown_by_address(
    client: TestClient, admin: Headers, zoe: int
) -> None:
    assert ask(client, admin, DELETE, email=ZOE, mode="anonymize").status_code == 200
    for act in ACTS:
        statuses = [
            ask(client, admin, act, **named).status_code
            for named in ({"user_id": zoe}, {"email": ZOE}, {"phone": PHONE})
        ]
        assert statuses == [410, 404, 404]


@pytest.fixture
def _loud(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOG_LEVEL", "DEBUG")


@SQLITE
@pytest.mark.usefixtures("_loud")
def test_no_address_is_in_a_log_a_trail_a_file_name_or_a_refusal(
    client: TestClient, admin: Headers, service: Service, zoe: int,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    service.user("kim@example.com", phone=PHONE)
    answers = [
        ask(client, admin, act, **named)
        for act in ACTS
        for named in (
            {"phone": PHONE}, {"email": "nobody@example.com"}, {"email": "a" * 320 + ZOE},
        )
    ]  # fmt: skip
    assert {answer.status_code for answer in answers} == {404, 409, 422}
    done = [ask(client, admin, act, email=ZOE) for act in ACTS]
    assert {answer.status_code for answer in done} == {200}
    trail = "".join(str(row) for row in dump()["audit_events"].values())
    said = [answer.text for answer in answers]
    # What the test client says of its own requests is not ours, but names no more.
    log = caplog.text
    assert FIND in log
    assert "erasure" in trail
    said += [str(answer.headers) for answer in answers + done] + [trail, log]
    for text in said:
        low = text.lower()
        for word in (ZOE, "zoé", "nobody@", "1234567", "123 45"):
            assert word not in low
