"""Erasure: it leaves nothing of a person, keeps what the law keeps, and says truly what it did."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from datetime import UTC, date, datetime, timedelta
from typing import Any

import httpx2 as httpx
import pytest
from fastapi.testclient import TestClient
from sqlalchemy import func, select, text

from backend.db_utils import session_scope
from backend.errors import HoldfastError
from backend.models import DATA_MAP, AuditEvent, LedgerEntry, Role, User
from backend.privacy.declarations import EraseMode, OnErase, Personal
from backend.services.compliance_service import get_compliance_service
from backend.services.consent_service import get_consent_service
from backend.services.retention_service import get_retention_service
from backend.services.store_service import store
from tests.conftest import PASSWORD, Service, SignIn
from tests.privacy import people
from tests.privacy.people import (
    ADMINISTRATOR,
    INSIDE,
    Dump,
    Keys,
    Person,
    cells_in_plain,
    dump,
    keys_of,
    left_of,
    plant,
)

DELETE, ANONYMIZE = EraseMode.DELETE, EraseMode.ANONYMIZE
MODES = pytest.mark.parametrize("mode", [DELETE, ANONYMIZE])
# The default of payments and invoices.
PERIOD = timedelta(days=2555)
# The service's own records of the act.
RECORDS = ("audit_events", "privacy_ledger", "erasures", "installation")
# What tax law asks an invoice and a payment to show, of the columns with marks.
KEPT_BY_LAW = {
    ("payments", "method"),
    ("invoices", "number"),
    ("invoices", "billing_name"),
    ("invoices", "billing_address"),
    ("invoice_lines", "description"),
}
# What tells nobody apart once the rest of the row is gone.
KEPT_IN_ANONYMOUS_ROWS = {
    ("bookings", "status"),
    ("bookings", "country"),
    ("payments", "method"),
}


def erase(
    client: TestClient, headers: dict[str, str], user_id: int, mode: str = "delete", **fields: Any
) -> httpx.Response:
    body = {"user_id": user_id, "mode": mode, "reason": "request under art. 17", **fields}
    return client.post("/security/data/delete", json=body, headers=headers)


def retained_keys(person: Person) -> dict[str, set[str]]:
    """The rows that are inside the law's period: of each two the newer one."""
    keys = person.keys
    return {
        "payments": {str(keys["payments"][0])},
        "invoices": {str(keys["invoices"][0])},
        "invoice_lines": {str(key) for key in keys["invoice_lines"][:2]},
    }


def must_be_gone(person: Person, mode: EraseMode) -> list[people.Mark]:
    kept = retained_keys(person)
    return [
        mark
        for mark in person.marks
        if not (
            ((mark.table, mark.column) in KEPT_BY_LAW and mark.record in kept[mark.table])
            or (mode is ANONYMIZE and (mark.table, mark.column) in KEPT_IN_ANONYMOUS_ROWS)
        )
    ]


def what_happened(before: Dump, after: Dump, keys: Keys) -> dict[str, dict[str, int]]:
    counts = {}
    for table, mine in keys.items():
        still = [after[table][key] for key in mine if key in after[table]]
        anonymous = sum(row["anonymized_at"] is not None for row in still)
        counts[table] = {
            "deleted": len(mine) - len(still),
            "anonymized": anonymous,
            "retained": len(still) - anonymous,
            "redacted": 0,
            "shared": 0,
        }
    return counts


@MODES
def test_nothing_of_the_person_is_left_and_the_answer_says_what_happened(
    client: TestClient, admin: dict[str, str], mode: EraseMode
) -> None:
    person, other = plant("A"), plant("B")
    marks = must_be_gone(person, mode)
    before = dump()
    mine = keys_of(before, person.id)
    assert left_of(person.texts(), cells_in_plain()) == person.texts()
    answer = erase(client, admin, person.id, mode)
    assert answer.status_code == 200, answer.text
    after = dump()
    cells = cells_in_plain()
    assert left_of({mark.text for mark in marks}, cells) == set()
    row = before["users"][(person.id,)]
    assert left_of({str(row["uid"]), row["email_index"]}, cells) == set()
    said = answer.json()
    assert (said["status"], said["mode"], said["dry_run"]) == ("complete", mode, False)
    assert said["tables"] == what_happened(before, after, mine)
    assert sum(said["tables"]["payments"].values()) == 2
    # Nobody else's cell has changed, and the other person's marks are all there.
    assert people.without(before, mine, *RECORDS) == people.without(after, mine, *RECORDS)
    assert left_of(other.texts(), cells) == other.texts()


@MODES
def test_no_byte_of_what_was_stored_stays_in_the_file_or_its_log(
    sqlite_service: Service, mode: EraseMode
) -> None:
    crowd = [plant(letter) for letter in "ABCDEFGHIJKL"]
    before = dump()
    for person in crowd[::2]:
        erase_person(person.id, mode)
    stored = {
        before[mark.table][key][mark.column].encode()
        for person in crowd[::2]
        for mark in must_be_gone(person, mode)
        for key in keys_of(before, person.id)[mark.table]
        if str(key[0]).replace("-", "") == mark.record.replace("-", "")
    }
    stored |= {before["users"][(p.id,)][name].encode() for p in crowd[::2]
               for name in ("uid", "email_index")}  # fmt: skip
    stored = {value for value in stored if len(value) > 3}
    assert len(stored) > 200
    files = b"".join(path.read_bytes() for path in sqlite_service.folder.glob("holdfast.db*"))
    assert b"B02-users-password_hash-mark" in files
    assert [value for value in stored if value in files] == []


def test_what_the_law_keeps_keeps_its_statutory_columns_and_no_link(service: Service) -> None:
    links = {"user_id", "booking_id", "restricted_at"}
    for mode, person in ((DELETE, plant("A")), (ANONYMIZE, plant("B"))):
        before = dump()
        erase_person(person.id, mode)
        after = dump()
        changed = {
            table: {
                column
                for key, row in after[table].items()
                if str(key[0]) in kept
                for column, value in row.items()
                if value != before[table][key][column]
            }
            for table, kept in retained_keys(person).items()
        }
        assert changed == {
            "payments": links | {"payment_reference", "card_last4", "ip_address"},
            "invoices": links | {"note"},
            "invoice_lines": set(),
        }
    for table in ("payments", "invoices"):
        assert {row["user_id"] for row in after[table].values()} == {None}


def test_what_is_retained_has_a_ground_and_leaves_on_the_day_that_was_said(
    client: TestClient, admin: dict[str, str]
) -> None:
    now = datetime.now(UTC)
    person = plant("A", now)
    before = dump()
    retained = {
        kept.pop("table"): kept for kept in erase(client, admin, person.id).json()["retained"]
    }
    assert {table: kept["rows"] for table, kept in retained.items()} == {
        "payments": 1,
        "invoices": 1,
        "invoice_lines": 2,
    }
    assert all(kept["ground"].startswith("GDPR art. 17(3)(b)") for kept in retained.values())
    paid_until = datetime.fromisoformat(retained["payments"]["until"])
    assert paid_until == now - INSIDE + PERIOD
    # A day of issue counts from its end.
    issued_until = date.fromisoformat(retained["invoices"]["until"])
    assert issued_until == (now - INSIDE).date() + timedelta(days=1) + PERIOD
    assert retained["invoice_lines"]["until"] == retained["invoices"]["until"]
    midnight = datetime(issued_until.year, issued_until.month, issued_until.day, tzinfo=UTC)
    ends = {"payment": paid_until, "invoice": midnight}
    for data_type, end in ends.items():
        for moment, affected in ((end - timedelta(microseconds=1), 0), (end, 1)):
            run = get_retention_service().apply(
                ADMINISTRATOR, dry_run=False, data_type=data_type, now=moment
            )
            assert run.affected == affected, data_type
    # With the law's period the last marks leave, but for the words that tell nobody apart.
    texts = {mark.text for mark in person.marks if mark.column != "method"}
    assert left_of(texts, cells_in_plain()) == set()
    assert set(after := dump()["payments"]) < set(before["payments"])
    assert [row["anonymized_at"] is not None for row in after.values()] == [True]


def anonymous_cells() -> Iterator[tuple[str, Personal, Any]]:
    """The personal cells of the rows that are marked anonymous."""
    with session_scope(read_only=True) as session:
        for mapped in DATA_MAP.of_people:
            for row in session.execute(select(mapped.table)).mappings():
                if row.get("anonymized_at") is not None:
                    for name, rule in mapped.personal_columns.items():
                        yield f"{mapped.name}.{name}", rule, row[name]


def is_empty_of_people(rule: Personal, value: Any) -> bool:
    if rule.on_erase is OnErase.MONTH and isinstance(value, datetime):
        return value == datetime(value.year, value.month, 1, tzinfo=UTC)
    if rule.on_erase is OnErase.MONTH and value is not None:
        return bool(value.day == 1)
    return bool(value == rule.constant)


def test_anonymous_values_are_null_constant_coarse_or_random_and_never_the_same_twice(
    service: Service,
) -> None:
    crowd = [plant("A"), plant("B")]
    before = dump()
    for person in crowd:
        erase_person(person.id, ANONYMIZE)
    after = dump()
    anonymous = list(anonymous_cells())
    for column, rule, value in anonymous:
        assert rule.on_erase in (OnErase.KEEP, OnErase.RANDOM) or is_empty_of_people(rule, value), (
            column
        )
    randoms = [
        str(value).replace("-", "")
        for _, rule, value in anonymous
        if rule.on_erase is OnErase.RANDOM
    ]
    assert len(randoms) == 2 * (1 + 2 + 1)  # uid, references of bookings, number of an invoice
    assert len(set(randoms)) == len(randoms)
    assert all(len(value) == 32 for value in randoms)
    old = {str(cell).replace("-", "") for rows in before.values() for row in rows.values()
           for cell in row.values()}  # fmt: skip
    assert old.isdisjoint(randoms)
    for key, kept in after["bookings"].items():
        assert str(kept["check_out"])[:7] == str(before["bookings"][key]["check_out"])[:7]


@MODES
def test_a_dry_run_changes_nothing_and_its_digest_is_the_real_run_s(
    client: TestClient, admin: dict[str, str], mode: EraseMode
) -> None:
    person = plant("A")
    before = people.without(dump(), {}, "audit_events", "planned_erasures")
    planned = erase(client, admin, person.id, mode, dry_run=True).json()
    assert people.without(dump(), {}, "audit_events", "planned_erasures") == before
    assert list(store().names("ledger-", ".enc")) == []
    assert (planned["status"], planned["dry_run"]) == ("planned", True)
    again = erase(client, admin, person.id, mode, dry_run=True).json()
    assert again["plan_digest"] == planned["plan_digest"]
    done = erase(client, admin, person.id, mode, plan_digest=planned["plan_digest"])
    assert done.status_code == 200, done.text
    differs = ("erasure_id", "status", "dry_run", "backups_expire_at")
    assert {k: v for k, v in done.json().items() if k not in differs} == {
        k: v for k, v in planned.items() if k not in differs
    }
    assert len(list(store().names("ledger-", ".enc"))) == 1


def test_a_stale_digest_is_refused_and_nothing_changes(
    client: TestClient, service: Service, admin: dict[str, str]
) -> None:
    person = plant("A")
    digest = erase(client, admin, person.id, dry_run=True).json()["plan_digest"]
    other_mode = erase(client, admin, person.id, "anonymize", plan_digest=digest)
    service.add(people.booking(person.id, date(2026, 1, 2)))
    before = dump()
    stale = erase(client, admin, person.id, plan_digest=digest)
    for refused in (other_mode, stale):
        assert (refused.status_code, refused.json()["code"]) == (409, "stale_plan")
    assert dump() == before
    assert list(store().names("ledger-", ".enc")) == []
    fresh = stale.json()["plan_digest"]
    assert erase(client, admin, person.id, plan_digest=fresh).status_code == 200


@pytest.mark.parametrize(("mode", "status"), [("delete", 404), ("anonymize", 410)])
def test_who_was_erased_can_neither_sign_in_nor_use_a_token_nor_be_erased_again(
    client: TestClient, service: Service, admin: dict[str, str], sign_in: SignIn,
    mode: str, status: int,
) -> None:  # fmt: skip
    user_id = service.user("jane@example.com")
    jane = sign_in("jane@example.com")
    assert client.get("/auth/me", headers=jane).status_code == 200
    assert erase(client, admin, user_id, mode).status_code == 200
    assert client.get("/auth/me", headers=jane).status_code == 401
    form = {"username": "jane@example.com", "password": PASSWORD}
    assert client.post("/auth/token", data=form).status_code == 401
    before = dump()
    for dry_run in (True, False):
        assert erase(client, admin, user_id, mode, dry_run=dry_run).status_code == status
    body = {"user_id": user_id, "format": "json"}
    assert client.post("/security/data/export", json=body, headers=admin).status_code == status
    assert dump() == before


@MODES
def test_the_same_address_registered_again_is_a_new_person(
    service: Service, mode: EraseMode
) -> None:
    first = service.user("jane@example.com")
    old = dump()
    erase_person(first, mode)
    second = service.user("jane@example.com")
    new = dump()
    assert second > first
    old_row, new_row = old["users"][(first,)], new["users"][(second,)]
    assert old_row["uid"] != new_row["uid"]
    assert old_row["email"] != new_row["email"]
    by_person = [
        event["subject_ref"] for event in new["audit_events"].values() if event["subject_ref"]
    ]
    # The trail of the first person and of the second have nothing in common.
    assert by_person[-1] not in by_person[:-1]
    assert keys_of(new, second)["users"] == {(second,)}
    assert second not in {row["user_id"] for row in new["bookings"].values()}


def test_an_erasure_is_in_the_trail_and_the_ledger_without_naming_the_person(
    client: TestClient, admin: dict[str, str]
) -> None:
    person = plant("A")
    said = erase(client, admin, person.id).json()
    with session_scope(read_only=True) as session:
        entry = session.scalars(select(LedgerEntry)).one()
        event = session.scalars(select(AuditEvent).where(AuditEvent.action == "erasure")).one()
    assert str(entry.id) == said["erasure_id"]
    assert entry.subject_ref == event.subject_ref
    assert said["erasure_id"] in (event.detail or "")
    assert event.outcome == "done"
    (name,) = store().names("ledger-", ".enc")
    assert str(entry.id) in name


def test_the_last_admin_stays_and_with_two_of_them_one_may_go(
    client: TestClient, service: Service, admin: dict[str, str], sign_in: SignIn
) -> None:
    with session_scope(read_only=True) as session:
        me = session.scalars(select(User.id).where(User.role == Role.ADMIN)).one()
    before = dump()
    refused = erase(client, admin, me)
    assert (refused.status_code, refused.json()["code"]) == (409, "conflict")
    assert dump() == before
    service.user("second@example.com", Role.ADMIN)
    assert erase(client, admin, me).status_code == 200
    assert client.get("/auth/me", headers=admin).status_code == 401
    assert client.get("/auth/me", headers=sign_in("second@example.com")).status_code == 200


def test_a_deactivated_admin_is_not_the_last_one(
    client: TestClient, service: Service, admin: dict[str, str]
) -> None:
    gone = service.user("gone@example.com", Role.ADMIN, is_active=False)
    assert erase(client, admin, gone).status_code == 200
    assert client.get("/auth/me", headers=admin).json()["role"] == "admin"


def stop(engine: str, act: str, table: str, *, silently: bool = False) -> None:
    """Have the database refuse *act* on *table*, or pass over it without a word."""
    before = f"CREATE TRIGGER stop BEFORE {act} ON {table}"
    if engine == "sqlite":
        how = "IGNORE" if silently else "ABORT, 'no'"
        statements = [f"{before} BEGIN SELECT RAISE({how}); END"]
    else:
        body = "RETURN NULL" if silently else "RAISE EXCEPTION $no$no$no$"
        statements = [
            f"CREATE FUNCTION f() RETURNS trigger LANGUAGE plpgsql AS $f$BEGIN {body}; END$f$",
            f"{before} FOR EACH ROW EXECUTE FUNCTION f()",
        ]
    with session_scope() as session:
        for statement in statements:
            session.execute(text(statement))


def remove_trigger(engine: str, table: str) -> None:
    on = f" ON {table}" if engine == "postgresql" else ""
    with session_scope() as session:
        session.execute(text(f"DROP TRIGGER stop{on}"))


@pytest.mark.parametrize(
    ("mode", "act", "table", "silently"),
    [
        (DELETE, "DELETE", "users", False),
        (DELETE, "UPDATE", "invoices", False),
        (ANONYMIZE, "UPDATE", "feedback", True),
    ],
    ids=["at its last row", "at what the law keeps", "without a word"],
)
def test_an_erasure_that_fails_midway_has_changed_nothing(
    client: TestClient, service: Service, admin: dict[str, str],
    mode: EraseMode, act: str, table: str, silently: bool,
) -> None:  # fmt: skip
    person = plant("A")
    stop(service.engine, act, table, silently=silently)
    before = dump()
    answer = erase(client, admin, person.id, mode)
    expected = (500, "incomplete_erasure") if silently else (409, "constraint")
    assert (answer.status_code, answer.json()["code"]) == expected
    assert "no$" not in answer.text, "a trigger's own words may quote a row"
    assert dump() == before
    assert list(store().names("ledger-", ".enc")) == []
    remove_trigger(service.engine, table)
    assert erase(client, admin, person.id, mode).status_code == 200


def erase_person(user_id: int, mode: EraseMode) -> str:
    """Erase in a transaction of its own; return how it ended."""
    try:
        with session_scope() as session:
            get_compliance_service().erase(
                session, ADMINISTRATOR, user_id, mode, reason="request", dry_run=False
            )
    except HoldfastError as err:
        return err.code
    return "erased"


def beside(user_id: int, mode: EraseMode, act: Callable[[Any], object]) -> str:
    """Erase while a transaction that has done *act* is open; return how the erasure ended."""
    with ThreadPoolExecutor(1) as pool:
        with session_scope() as session:
            act(session)
            session.flush()
            erasing = pool.submit(erase_person, user_id, mode)
            wait([erasing], timeout=0.4)
        return erasing.result(timeout=60)


@pytest.mark.parametrize(
    ("mode", "second"), [(DELETE, "subject_not_found"), (ANONYMIZE, "subject_erased")]
)
def test_of_two_erasures_at_once_one_is_done_and_one_is_told_so(
    service: Service, mode: EraseMode, second: str
) -> None:
    person = plant("A")

    def first(session: Any) -> None:
        get_compliance_service().erase(
            session, ADMINISTRATOR, person.id, mode, reason="request", dry_run=False
        )

    assert beside(person.id, mode, first) == second
    with session_scope(read_only=True) as session:
        assert session.scalar(select(func.count()).select_from(LedgerEntry)) == 1
    assert len(list(store().names("ledger-", ".enc"))) == 1


@MODES
def test_a_row_that_is_being_written_during_an_erasure_goes_too(
    service: Service, mode: EraseMode
) -> None:
    person = plant("A")
    new = people.booking(person.id, datetime.now(UTC).date(), staff_notes="late words")
    assert beside(person.id, mode, lambda session: session.add(new)) == "erased"
    assert all(row["user_id"] is None for row in dump()["bookings"].values())
    assert left_of({"late words", new.reference}, cells_in_plain()) == set()


def test_a_consent_that_is_being_given_during_an_erasure_goes_too(service: Service) -> None:
    person = plant("A")

    def give(session: Any) -> None:
        get_consent_service().record(
            session, ADMINISTRATOR, person.id, purpose="marketing", granted=True, evidence="call"
        )

    assert beside(person.id, DELETE, give) == "erased"
    assert dump()["data_consents"] == {}
