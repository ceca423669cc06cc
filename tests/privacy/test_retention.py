"""Retention: what is due goes, what is not stays, and a run does what its dry run has said."""

import json
from collections.abc import Callable
from datetime import UTC, date, datetime, timedelta
from typing import Any

import httpx2 as httpx
import pytest
from fastapi.testclient import TestClient
from sqlalchemy import select

from backend.db_utils import session_scope
from backend.models import (
    DATA_MAP,
    AuditEvent,
    HoldScope,
    InvoiceLine,
    LegalHold,
    Role,
    User,
)
from backend.privacy.periods import Period
from backend.services.policy_service import get_policy_service
from backend.services.retention_results import RetentionRun
from backend.services.retention_service import get_retention_service
from backend.services.setup_service import get_setup_service
from backend.settings import RetentionAction
from main import create_app
from tests.conftest import ADMIN, PASSWORD, Service, clear_caches
from tests.privacy import people
from tests.privacy.people import ADMINISTRATOR, dump, person_hold, plant

DELETE, ANONYMIZE = RetentionAction.DELETE, RetentionAction.ANONYMIZE
ACTIONS = pytest.mark.parametrize("action", [DELETE, ANONYMIZE])
NOW = datetime(2026, 11, 20, 14, 30, 15, 123456, tzinfo=UTC)
TABLE_OF = {name: mapped.name for name, mapped in DATA_MAP.by_data_type.items()}
TICK = timedelta(microseconds=1)
DAY = timedelta(days=1)
OLD = datetime(2001, 2, 3, 4, 5, 6, tzinfo=UTC)


def apply(data_type: str | None = None, *, dry_run: bool = False, **fields: Any) -> RetentionRun:
    service, fields = get_retention_service(), {"now": NOW} | fields
    if not dry_run and "plan_digest" not in fields:
        # As somebody who has looked at what is to go: the brake has tests of its own.
        planned = service.apply(ADMINISTRATOR, dry_run=True, data_type=data_type, **fields)
        fields["plan_digest"] = planned.plan_digest
    return service.apply(ADMINISTRATOR, dry_run=dry_run, data_type=data_type, **fields)


def set_policies(
    period: str, action: RetentionAction, *data_types: str, enabled: bool = True
) -> None:
    with session_scope() as session:
        for data_type in data_types or TABLE_OF:
            get_policy_service().set(
                session, ADMINISTRATOR, data_type, Period.parse(period), action, enabled=enabled
            )


def post(client: TestClient, headers: dict[str, str], path: str, **body: Any) -> httpx.Response:
    return client.post(f"/security/retention/{path}", json=body, headers=headers)


def results(run: RetentionRun) -> dict[str, tuple[int, int, int]]:
    return {r.data_type: (r.matched, r.held, r.affected) for r in run.results}


def plant_both_sides(due: datetime, not_due: datetime) -> dict[str, tuple[int, int]]:
    """A due row and one that is not yet due, of every data type; return their numbers."""
    make: dict[str, Callable[[datetime], Any]] = {
        "user": lambda at: User(created_at=OLD, last_activity_at=at, is_active=True),
        "booking": lambda at: people.booking(None, at.date(), staff_notes="words"),
        "payment": lambda at: people.payment(None, at, card_last4="1234"),
        "invoice": lambda at: people.invoice(None, at.date(), billing_name="Jane"),
        "feedback": lambda at: people.feedback(None, at, comment="words"),
    }
    found = {}
    with session_scope() as session:
        for data_type, row in make.items():
            pair = row(due), row(not_due)
            session.add_all(pair)
            session.flush()
            found[data_type] = (pair[0].id, pair[1].id)
        for number in found["invoice"]:
            line = InvoiceLine(**people.line_values(), invoice_id=number, description="a room")
            session.add(line)
    return found


@ACTIONS
def test_of_every_data_type_what_is_due_goes_and_what_is_due_tomorrow_stays(
    service: Service, action: RetentionAction
) -> None:
    set_policies("P1Y", action)
    cutoff = NOW.replace(year=2025)
    moments = plant_both_sides(cutoff, cutoff + TICK)
    days = plant_both_sides(cutoff - DAY, cutoff)
    before = dump()
    planned = apply(dry_run=True)
    assert people.without(dump(), {}, "audit_events") == people.without(before, {}, "audit_events")
    run = apply(plan_digest=planned.plan_digest)
    assert {r.cutoff for r in run.results} == {cutoff}
    assert results(run) == results(planned)
    assert run.plan_digest == planned.plan_digest
    # A day counts from its end: bookings and invoices of the cutoff's own day are not due.
    expected = {
        "user": {*moments["user"][:1], *days["user"]},
        "payment": {*moments["payment"][:1], *days["payment"]},
        "feedback": {*moments["feedback"][:1], *days["feedback"]},
        "booking": {days["booking"][0]},
        "invoice": {days["invoice"][0]},
    }
    assert results(run) == {name: (len(keys), 0, len(keys)) for name, keys in expected.items()}
    after = dump()
    assert changed(before, after, action) == expected
    lines = after["invoice_lines"].values()
    emptied = sum(row["description"] is None for row in lines)
    assert (len(lines), emptied) == ((3, 0) if action is DELETE else (4, 1))
    assert results(apply()) == dict.fromkeys(TABLE_OF, (0, 0, 0))
    assert people.without(dump(), {}, "audit_events", "data_retention_logs") == people.without(
        after, {}, "audit_events", "data_retention_logs"
    )


def changed(
    before: people.Dump, after: people.Dump, action: RetentionAction
) -> dict[str, set[int]]:
    """The numbers of the rows that were deleted, or made anonymous, by data type."""
    found = {}
    for data_type, table in TABLE_OF.items():
        if action is DELETE:
            keys = set(before[table]) - set(after[table])
            untouched = after[table].items() <= before[table].items()
        else:
            keys = {key for key, row in after[table].items() if row["anonymized_at"] is not None}
            untouched = all(after[table][key] == row for key, row in before[table].items()
                            if key not in keys)  # fmt: skip
        assert untouched, table
        found[data_type] = {key[0] for key in keys}
    return found


def test_seven_years_are_counted_by_the_calendar_and_2555_days_are_not(service: Service) -> None:
    issued = date(2019, 11, 20)
    service.add(people.invoice(None, issued), people.invoice(None, issued - 2 * DAY))
    set_policies("P7Y", DELETE, "invoice")
    assert results(apply("invoice", dry_run=True)) == {"invoice": (1, 0, 1)}
    set_policies("P2555D", DELETE, "invoice")
    assert results(apply("invoice", dry_run=True)) == {"invoice": (2, 0, 2)}
    set_policies("P7Y", DELETE, "invoice")
    assert apply("invoice", now=NOW + DAY).affected == 2
    assert dump()["invoices"] == {}


def test_a_due_person_loses_everything_but_what_the_law_keeps(service: Service) -> None:
    person, active = plant("A"), plant("B")
    with session_scope() as session:
        session.get_one(User, person.id).last_activity_at = OLD
    set_policies("P10Y", ANONYMIZE, "user")
    before = dump()
    run = apply("user", now=datetime.now(UTC))
    assert results(run) == {"user": (1, 0, 1)}
    after = dump()
    assert after["users"][(person.id,)]["anonymized_at"] is not None
    assert people.keys_of(after, person.id)["bookings"] == set()
    new, old = (after["payments"][(key,)] for key in person.keys["payments"])
    assert (new["restricted_at"] is None, new["anonymized_at"] is None) == (False, True)
    assert (old["restricted_at"] is None, old["anonymized_at"] is None) == (True, False)
    theirs = people.keys_of(before, active.id)
    for table, keys in theirs.items():
        assert all(after[table][key] == before[table][key] for key in keys), table


def test_an_admin_and_who_was_never_active_are_never_due(service: Service) -> None:
    service.user("second@example.com", Role.ADMIN, last_activity_at=OLD)
    service.user("jane@example.com", last_activity_at=None)
    due = service.user("joe@example.com", last_activity_at=OLD)
    set_policies("P1D", DELETE, "user")
    assert results(apply("user")) == {"user": (1, 0, 1)}
    left = dump()["users"]
    assert (due,) not in left
    assert len(left) == 3


def test_a_stale_digest_is_refused_and_nothing_changes(
    client: TestClient, service: Service, admin: dict[str, str]
) -> None:
    service.add(people.feedback(None, OLD))
    digest = post(client, admin, "apply", dry_run=True).json()["plan_digest"]
    service.add(people.feedback(None, OLD))
    before = dump()
    refused = post(client, admin, "apply", dry_run=False, plan_digest=digest)
    assert (refused.status_code, refused.json()["code"]) == (409, "stale_plan")
    assert dump() == before
    fresh = refused.json()["plan_digest"]
    post(client, admin, "policy", data_type="feedback", retention_days=365, action="anonymize")
    other_act = post(client, admin, "apply", dry_run=False, plan_digest=fresh)
    assert other_act.status_code == 409
    again = other_act.json()["plan_digest"]
    done = post(client, admin, "apply", dry_run=False, plan_digest=again)
    assert done.status_code == 200
    assert done.json()["plan_digest"] == again
    assert all(row["anonymized_at"] for row in dump()["feedback"].values())


def test_a_real_run_is_logged_and_a_dry_run_only_in_the_trail(
    client: TestClient, service: Service, admin: dict[str, str]
) -> None:
    service.add(people.feedback(None, OLD), people.payment(None, OLD))
    post(client, admin, "apply", dry_run=True)
    logs = client.get("/security/retention/logs", headers=admin)
    assert logs.json() == {"items": [], "total": 0}
    first = post(client, admin, "apply", dry_run=False).json()
    second = post(client, admin, "apply", dry_run=False, data_type="feedback").json()
    logs = client.get("/security/retention/logs", headers=admin)
    assert logs.json()["total"] == len(TABLE_OF) + 1
    items = logs.json()["items"]
    assert [item["run_id"] for item in items] == [second["run_id"]] + [first["run_id"]] * 5
    by_type = {item["data_type"]: item for item in items[1:]}
    said = {result["data_type"]: result for result in first["results"]}
    assert set(by_type) == set(TABLE_OF)
    for data_type, item in by_type.items():
        assert {name: item[name] for name in said[data_type]} == said[data_type]
    assert (by_type["feedback"]["action"], by_type["feedback"]["affected"]) == ("delete", 1)
    page = client.get("/security/retention/logs?limit=2&offset=1", headers=admin).json()
    assert page["items"] == items[1:3]
    with session_scope(read_only=True) as session:
        trail = select(AuditEvent).where(AuditEvent.action == "retention_applied")
        events = session.scalars(trail.order_by(AuditEvent.id)).all()
    assert [event.outcome for event in events] == ["dry_run", *["begun", "done"] * 2]
    assert json.loads(events[2].detail or "")["affected"] == 2


def restart() -> None:
    """Read the settings anew, as a new process does."""
    clear_caches()
    get_setup_service().open()


def test_a_policy_set_over_the_api_wins_over_the_environment_and_may_be_off(
    client: TestClient, service: Service, admin: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RETENTION_FEEDBACK_DAYS", "10")
    monkeypatch.setenv("RETENTION_FEEDBACK_ACTION", "anonymize")
    restart()
    service.add(people.feedback(None, datetime.now(UTC) - 20 * DAY))

    def feedback() -> dict[str, Any]:
        items = client.get("/security/retention/policies", headers=admin).json()["items"]
        assert {item["data_type"] for item in items} == set(TABLE_OF)
        (found,) = (item for item in items if item["data_type"] == "feedback")
        return dict(found)

    found = feedback()
    assert (found["source"], found["retention_period"]) == ("environment", "P10D")
    assert (found["action"], found["rows"], found["due"]) == ("anonymize", 1, 1)
    new = {"data_type": "feedback", "retention_period": "P6M", "action": "delete"}
    assert post(client, admin, "policy", **new).status_code == 201
    restart()
    found = feedback()
    assert (found["source"], found["retention_period"]) == ("api", "P6M")
    assert (found["action"], found["rows"], found["due"]) == ("delete", 1, 0)
    off = {"data_type": "feedback", "retention_days": 5, "action": "delete", "enabled": False}
    assert post(client, admin, "policy", **off).json()["enabled"] is False
    assert feedback()["due"] == 1
    done = post(client, admin, "apply", dry_run=False, data_type="feedback").json()
    assert done["results"] == []
    assert len(dump()["feedback"]) == 1
    assert post(client, admin, "policy", **off | {"enabled": True}).status_code == 201
    done = post(client, admin, "apply", dry_run=False, data_type="feedback").json()
    assert [result["affected"] for result in done["results"]] == [1]
    assert dump()["feedback"] == {}


def test_a_policy_that_makes_no_sense_is_refused(client: TestClient, admin: dict[str, str]) -> None:
    good = {"data_type": "feedback", "retention_days": 30, "action": "delete"}
    bad: list[dict[str, Any]] = [
        good | {"data_type": "weather"},
        good | {"action": "shred"},
        good | {"retention_days": 0},
        good | {"retention_days": "30"},
        good | {"retention_period": "P1M"},
        {"data_type": "feedback", "action": "delete"},
        {"data_type": "feedback", "action": "delete", "retention_period": "30 days"},
        good | {"enabled": "yes"},
    ]
    assert [post(client, admin, "policy", **body).status_code for body in bad] == [422] * 8
    assert dump()["retention_policies"] == {}
    assert post(client, admin, "policy", **good).status_code == 201
    unknown = post(client, admin, "apply", dry_run=True, data_type="weather")
    assert (unknown.status_code, unknown.json()["code"]) == (422, "unknown_data_type")


def hold(scope: HoldScope, **what: Any) -> LegalHold:
    return LegalHold(scope=scope, placed_by="an administrator", placed_at=NOW, reason="x", **what)


@ACTIONS
def test_holds_of_every_scope_keep_their_rows_as_they_are(
    service: Service, action: RetentionAction
) -> None:
    held, free = (service.user(f"{name}@example.com", last_activity_at=OLD) for name in "ab")
    row_of_free = people.feedback(free, OLD, comment="evidence")
    service.add(
        people.booking(held, OLD.date()), people.booking(free, OLD.date()),
        people.feedback(held, OLD), people.feedback(free, OLD), people.feedback(None, OLD),
        row_of_free, people.payment(None, OLD), people.payment(held, OLD),
        people.invoice(held, OLD.date()),
    )  # fmt: skip
    service.add(
        person_hold(held),
        hold(HoldScope.ROW, data_type="feedback", row_id=row_of_free.id),
        hold(HoldScope.DATA_TYPE, data_type="payment"),
    )
    set_policies("P1Y", action)
    before = dump()
    planned = apply(dry_run=True)
    run = apply(plan_digest=planned.plan_digest)
    expected = {
        "booking": (2, 1, 1),
        "feedback": (4, 2, 2),
        "payment": (2, 2, 0),
        "invoice": (1, 1, 0),
        # The other one stays whole, too: a row of theirs is held.
        "user": (2, 2, 0),
    }
    assert results(planned) == results(run) == expected
    after = dump()
    for table, keys in people.keys_of(before, held).items():
        assert all(after[table][key] == before[table][key] for key in keys), table
    for table in ("users", "payments", "legal_holds"):
        assert after[table] == before[table]
    assert after["feedback"][(row_of_free.id,)] == before["feedback"][(row_of_free.id,)]
    with session_scope() as session:
        for standing in session.scalars(select(LegalHold)):
            standing.released_at = NOW
    released = apply()
    assert {name: found[1] for name, found in results(released).items()} == dict.fromkeys(
        TABLE_OF, 0
    )
    assert results(released)["user"] == (2, 0, 2)


def test_a_held_row_keeps_its_link_to_a_row_that_is_due(service: Service) -> None:
    stays = [people.booking(None, OLD.date()), people.booking(None, OLD.date())]
    service.add(*stays)
    paid = people.payment(None, OLD, booking_id=stays[0].id)
    billed = people.invoice(None, OLD.date(), booking_id=stays[1].id)
    service.add(paid, billed)
    service.add(hold(HoldScope.ROW, data_type="payment", row_id=paid.id))
    service.add(hold(HoldScope.DATA_TYPE, data_type="invoice"))
    set_policies("P1Y", DELETE, "booking")
    before = dump()
    apply("booking")
    after = dump()
    for table in ("payments", "invoices"):
        assert after[table] == before[table]


def test_what_is_anonymous_is_not_touched_again_and_may_be_deleted_later(
    service: Service,
) -> None:
    service.add(people.booking(None, OLD.date()), people.payment(None, OLD))
    set_policies("P1Y", ANONYMIZE)
    assert apply().affected == 2
    once = dump()
    assert apply(now=NOW + 40 * DAY).affected == 0
    for table in ("bookings", "payments"):
        assert dump()[table] == once[table]
    set_policies("P1Y", DELETE, "booking")
    assert results(apply(now=NOW + 41 * DAY))["booking"] == (1, 0, 1)
    assert dump()["bookings"] == {}


def test_a_run_that_fails_midway_has_changed_nothing(
    sqlite_service: Service,
) -> None:
    sqlite_service.add(people.feedback(None, OLD), people.payment(None, OLD))
    trigger = (
        "CREATE TRIGGER stop BEFORE INSERT ON data_retention_logs "
        "BEGIN SELECT RAISE(ABORT, 'no'); END"
    )
    before = dump()
    with session_scope() as session:
        session.connection().exec_driver_sql(trigger)
    with pytest.raises(Exception, match="no"):
        apply(plan_digest=None)
    assert dump() == before
    with session_scope() as session:
        session.connection().exec_driver_sql("DROP TRIGGER stop")
    assert apply().affected == 2


def test_no_byte_of_a_row_that_was_due_stays_in_the_file_or_its_log(
    sqlite_service: Service,
) -> None:
    sqlite_service.add(*(people.feedback(None, OLD, comment=f"words {n}") for n in range(20)))
    stored = {row["comment"].encode() for row in dump()["feedback"].values()}

    def found() -> int:
        paths = sqlite_service.folder.glob("holdfast.db*")
        files = b"".join(path.read_bytes() for path in paths)
        return sum(value in files for value in stored)

    assert found() == 20
    with TestClient(create_app()) as client:
        form = {"username": ADMIN, "password": PASSWORD}
        token = client.post("/auth/token", data=form).json()["access_token"]
        headers = {"Authorization": f"Bearer {token}"}
        done = post(client, headers, "apply", dry_run=False, data_type="feedback").json()
        assert done["results"][0]["affected"] == 20
        # Asked while the service runs: its last connection to close empties the log anyway.
        assert found() == 0
