"""Consent: an append-only history in which the newest event of a purpose is the state."""

from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx2 as httpx
import pytest
from fastapi.testclient import TestClient
from sqlalchemy import select

from backend.db_utils import session_scope
from backend.models import AuditEvent, LedgerEntry, LedgerKind, User
from backend.privacy.declarations import EraseMode
from backend.services import consent_service
from backend.services.audit_service import Actor
from backend.services.compliance_service import get_compliance_service
from backend.services.consent_service import get_consent_service
from backend.services.reference_service import reference_to
from backend.services.setup_service import get_setup_service
from backend.services.store_service import store
from tests.conftest import Service, SignIn, clear_caches
from tests.privacy.people import ADMINISTRATOR, dump

JANE = "jane@example.com"
PURPOSES = {"marketing", "analytics", "profiling", "third_party_sharing"}
OPEN = {"granted": False, "since": None, "notice_version": None}


@pytest.fixture
def person(service: Service) -> int:
    return service.user(JANE)


@pytest.fixture
def jane(person: int, sign_in: SignIn) -> dict[str, str]:
    return sign_in(JANE)


def record(
    client: TestClient, headers: dict[str, str], user_id: int, **body: Any
) -> httpx.Response:
    body = {"purpose": "marketing", "granted": True} | body
    return client.post(f"/security/data/consent/{user_id}", json=body, headers=headers)


def read(client: TestClient, headers: dict[str, str], user_id: int) -> dict[str, Any]:
    answer = client.get(f"/security/data/consent/{user_id}", headers=headers)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def record_as(actor: Actor, user_id: int, *, granted: bool) -> datetime:
    with session_scope() as session:
        event = get_consent_service().record(
            session, actor, user_id, purpose="marketing", granted=granted, evidence="a call"
        )
        return event.recorded_at


def test_the_newest_event_of_a_purpose_is_its_state_and_the_history_is_oldest_first(
    client: TestClient, person: int, jane: dict[str, str]
) -> None:
    at_first = read(client, jane, person)
    assert at_first == {
        "user_id": person,
        "purposes": dict.fromkeys(PURPOSES, OPEN),
        "history": [],
    }
    given = [
        ("marketing", True, "1"),
        ("analytics", True, "1"),
        ("marketing", True, "2"),
        ("analytics", False, None),
        ("analytics", False, None),
    ]
    events = []
    for purpose, granted, notice in given:
        answer = record(
            client, jane, person, purpose=purpose, granted=granted, notice_version=notice
        )
        assert answer.status_code == 201, answer.text
        events.append(answer.json())
    now = read(client, jane, person)
    assert now["history"] == events
    assert [(e["purpose"], e["granted"], e["notice_version"]) for e in events] == given
    assert [e["method"] for e in events] == ["self"] * 5
    # Given again is not given anew: the state is as old as its first event.
    assert now["purposes"]["marketing"] == {
        "granted": True,
        "since": events[0]["recorded_at"],
        "notice_version": "2",
    }
    assert now["purposes"]["analytics"] == OPEN | {"since": events[3]["recorded_at"]}
    assert now["purposes"]["profiling"] == OPEN


def test_an_event_is_never_changed_by_a_later_one_nor_by_a_request(
    client: TestClient, person: int, jane: dict[str, str]
) -> None:
    for granted in (True, False, True):
        before = dump()["data_consents"]
        assert record(client, jane, person, granted=granted).status_code == 201
        after = dump()["data_consents"]
        assert before.items() <= after.items()
        assert len(after) == len(before) + 1
    for method in ("PUT", "PATCH", "DELETE"):
        answer = client.request(method, f"/security/data/consent/{person}", headers=jane)
        assert answer.status_code == 405
    assert dump()["data_consents"] == after


def test_a_purpose_that_is_not_asked_for_is_refused(
    client: TestClient, person: int, jane: dict[str, str]
) -> None:
    before = dump()
    for purpose in ("Marketing", "newsletter", "marketing "):
        refused = record(client, jane, person, purpose=purpose)
        assert (refused.status_code, refused.json()["code"]) == (422, "unknown_purpose")
    assert record(client, jane, person, purpose="").status_code == 422
    assert dump() == before
    assert record(client, jane, person).status_code == 201


def test_the_purposes_are_those_of_the_setting(
    service: Service, person: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CONSENT_PURPOSES", "newsletter")
    clear_caches()
    get_setup_service().open()
    with session_scope() as session:
        consent = get_consent_service()
        with pytest.raises(consent_service.UnknownPurposeError):
            consent.record(
                session, ADMINISTRATOR, person, purpose="marketing", granted=True, evidence="x"
            )
        consent.record(
            session, ADMINISTRATOR, person, purpose="newsletter", granted=True, evidence="x"
        )
        assert set(consent.of(session, person).purposes) == {"newsletter"}


def test_consent_is_a_plain_yes_or_no(
    client: TestClient, person: int, jane: dict[str, str]
) -> None:
    no_answers: tuple[object, ...] = ("true", "yes", 1, 0, None, [], 1.0)
    for granted in no_answers:
        assert record(client, jane, person, granted=granted).status_code == 422, granted
    assert dump()["data_consents"] == {}
    assert record(client, jane, person, granted=False).status_code == 201


def test_an_admin_records_another_s_consent_only_with_evidence_which_is_kept_sealed(
    client: TestClient, person: int, admin: dict[str, str], jane: dict[str, str]
) -> None:
    refused = record(client, admin, person)
    assert (refused.status_code, refused.json()["code"]) == (403, "forbidden")
    assert record(client, admin, person, evidence="").status_code == 422
    assert dump()["data_consents"] == {}
    said = record(client, admin, person, evidence="form 17, signed")
    assert (said.status_code, said.json()["method"]) == (201, "admin")
    (row,) = dump()["data_consents"].values()
    assert row["evidence"].startswith("enc1.")
    # An admin needs none for themselves, as anyone.
    mine = client.get("/auth/me", headers=admin).json()
    assert record(client, admin, mine["user_id"]).json()["method"] == "self"
    # What an admin has recorded, the person sees and takes back.
    assert read(client, jane, person)["purposes"]["marketing"]["granted"] is True
    assert record(client, jane, person, granted=False).status_code == 201


def test_a_withdrawal_is_in_the_ledger_once_and_a_grant_is_not(
    client: TestClient, person: int, jane: dict[str, str]
) -> None:
    # A no without a yes before it takes nothing back.
    for granted in (False, True, True):
        record(client, jane, person, granted=granted)
    assert dump()["privacy_ledger"] == {}
    assert list(store().names("ledger-", ".enc")) == []
    withdrawn = record(client, jane, person, granted=False).json()
    record(client, jane, person, granted=False)
    with session_scope(read_only=True) as session:
        entry = session.scalars(select(LedgerEntry)).one()
        uid = session.get_one(User, person).uid
    assert (entry.kind, entry.purpose) == (LedgerKind.WITHDRAW_CONSENT, "marketing")
    assert str(entry.id) == withdrawn["id"]
    with session_scope(read_only=True) as session:
        assert entry.subject_ref == reference_to(session, uid)
    (name,) = store().names("ledger-", ".enc")
    assert withdrawn["id"] in name


def test_every_event_is_in_the_trail(client: TestClient, person: int, jane: dict[str, str]) -> None:
    for granted in (True, False):
        record(client, jane, person, granted=granted)
    with session_scope(read_only=True) as session:
        events = session.scalars(select(AuditEvent).where(AuditEvent.action == "consent")).all()
    assert len(events) == 2
    assert {event.subject_ref for event in events} == {events[0].actor_ref}


class SetBackClock(datetime):
    """A clock that somebody has set back by an hour."""

    @classmethod
    def now(cls, tz: Any = None) -> "SetBackClock":
        past = datetime.now(tz) - timedelta(hours=1)
        return cls.fromtimestamp(past.timestamp(), tz)


def test_a_clock_set_back_does_not_make_an_older_event_the_newest(
    service: Service, person: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = record_as(ADMINISTRATOR, person, granted=True)
    monkeypatch.setattr(consent_service, "datetime", SetBackClock)
    second = record_as(ADMINISTRATOR, person, granted=False)
    third = record_as(ADMINISTRATOR, person, granted=True)
    fourth = record_as(ADMINISTRATOR, person, granted=False)
    assert datetime.now(UTC) > fourth > third > second > first
    with session_scope(read_only=True) as session:
        found = get_consent_service().of(session, person)
    assert found.purposes["marketing"].granted is False
    assert [event.granted for event in found.history] == [True, False, True, False]


def test_events_at_the_same_time_have_an_order(service: Service, person: int) -> None:
    with ThreadPoolExecutor(4) as pool:
        answers = [
            pool.submit(record_as, ADMINISTRATOR, person, granted=bool(n % 2)) for n in range(12)
        ]
        times = [answer.result(timeout=60) for answer in answers]
    assert len(set(times)) == 12
    with session_scope(read_only=True) as session:
        found = get_consent_service().of(session, person)
    assert [event.recorded_at for event in found.history] == sorted(times)
    assert found.purposes["marketing"].granted is found.history[-1].granted


@pytest.mark.parametrize(("mode", "status"), [(EraseMode.DELETE, 404), (EraseMode.ANONYMIZE, 410)])
def test_nobody_s_consent_is_neither_recorded_nor_read(
    client: TestClient, person: int, admin: dict[str, str], mode: EraseMode, status: int
) -> None:
    assert record(client, admin, person, evidence="a call").status_code == 201
    with session_scope() as session:
        get_compliance_service().erase(
            session, ADMINISTRATOR, person, mode, reason="request", dry_run=False
        )
    before = dump()
    assert record(client, admin, person, evidence="a call").status_code == status
    path = f"/security/data/consent/{person}"
    assert client.get(path, headers=admin).status_code == status
    assert client.get("/security/data/consent/999999", headers=admin).status_code == 404
    assert dump() == before
