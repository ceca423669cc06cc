"""The audit trail can be asked who did what, to whom and when; asking leaves a trace, too."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import select, update

from backend.db_utils import session_scope
from backend.models import AuditEvent, User
from backend.services.reference_service import reference_to
from tests.conftest import Run, Service, SignIn

JANE, JOE = "jane@example.com", "joe@example.com"
Headers = dict[str, str]


def ask(client: TestClient, headers: Headers, **query: Any) -> list[dict[str, Any]]:
    answer = client.get("/security/audit", params=query, headers=headers)
    assert answer.status_code == 200, answer.text
    items: list[dict[str, Any]] = answer.json()["items"]
    return items


def export(client: TestClient, headers: Headers, user_id: int) -> int:
    body = {"user_id": user_id, "format": "json"}
    return client.post("/security/data/export", json=body, headers=headers).status_code


def ref(user_id: int) -> str:
    with session_scope(read_only=True) as session:
        return reference_to(session, session.get_one(User, user_id).uid)


def test_who_looked_at_a_persons_data_between_two_moments(
    client: TestClient, service: Service, sign_in: SignIn, admin: Headers
) -> None:
    jane, joe = service.user(JANE), service.user(JOE)
    assert export(client, sign_in(JANE), jane) == 200
    before = datetime.now(UTC)
    assert export(client, admin, jane) == 200
    after = datetime.now(UTC)
    assert export(client, admin, joe) == 200
    assert export(client, sign_in(JOE), jane) == 403
    exports = ask(client, admin, user_id=jane, action="export")
    assert [(one["actor_ref"], one["outcome"]) for one in exports] == [
        (ref(1), "done"), (ref(jane), "done"),
    ]  # fmt: skip
    assert {one["subject_ref"] for one in exports} == {ref(jane)}
    span = {"since": before.isoformat(), "until": after.isoformat()}
    (one,) = ask(client, admin, user_id=jane, action="export", **span)
    assert one == exports[0]
    assert ask(client, admin, user_id=jane, by_user_id=jane, action="export") == exports[1:]
    late = {"since": after.isoformat(), "until": (after + timedelta(days=1)).isoformat()}
    assert ask(client, admin, user_id=jane, action="export", **late) == []


def test_an_erased_person_is_found_by_the_reference_and_the_trail_is_whole(
    client: TestClient, service: Service, admin: Headers
) -> None:
    jane = service.user(JANE)
    known = ref(jane)
    assert export(client, admin, jane) == 200
    body = {"user_id": jane, "mode": "delete", "reason": "request under art. 17"}
    assert client.post("/security/data/delete", json=body, headers=admin).status_code == 200
    assert client.get(f"/security/audit?user_id={jane}", headers=admin).status_code == 404
    found = ask(client, admin, subject_ref=known)
    assert [one["action"] for one in found] == ["erasure", "export"]
    assert JANE not in str(ask(client, admin, limit=500))


def test_reading_is_recorded_with_whom_it_was_about(
    client: TestClient, service: Service, admin: Headers
) -> None:
    jane = service.user(JANE)
    assert export(client, admin, jane) == 200
    assert len(ask(client, admin, user_id=jane)) == 1
    (read,) = ask(client, admin, action="audit_read")
    assert (read["subject_ref"], read["detail"]) == (ref(jane), {"events": 1})
    assert read["actor_ref"] == ref(1)


def test_pages_have_every_event_once(client: TestClient, service: Service, admin: Headers) -> None:
    jane = service.user(JANE)
    assert [export(client, admin, jane) for _ in range(7)] == [200] * 7
    with session_scope(read_only=True) as session:
        wanted = set(session.scalars(select(AuditEvent.id).where(AuditEvent.action == "export")))
    query: dict[str, Any] = {"action": "export", "limit": 3}
    seen: list[int] = []
    while True:
        page = client.get("/security/audit", params=query, headers=admin).json()
        seen += [one["id"] for one in page["items"]]
        if page["next_before"] is None:
            break
        query["before"] = page["next_before"]
    assert len(seen) == len(set(seen)) == 7
    assert set(seen) == wanted


@pytest.mark.parametrize(
    "query",
    [
        "user_id=0", "user_id=-1", "user_id=x", f"user_id={2**63}", "limit=0", "limit=501",
        "since=yesterday", "since=2026-11-20T10:00:00", "before=0", "action=", "subject_ref=",
    ],
)  # fmt: skip
def test_what_cannot_be_meant_is_refused(
    client: TestClient, service: Service, admin: Headers, query: str
) -> None:
    answer = client.get(f"/security/audit?{query}", headers=admin)
    assert answer.status_code == 422, answer.text
    assert ask(client, admin, action="audit_read") == []


def test_the_command_line_says_the_same(
    client: TestClient, service: Service, admin: Headers, run: Run
) -> None:
    jane = service.user(JANE)
    assert export(client, admin, jane) == 200
    (shown,) = run("audit", "list", "--user-id", str(jane), "--action", "export", "--json").json[
        "items"
    ]
    (asked,) = ask(client, admin, user_id=jane, action="export")
    assert (shown["id"], shown["actor_ref"]) == (asked["id"], asked["actor_ref"])
    assert run("audit", "list", "--user-id", "999999").code == 2
    assert run("audit", "list", "--since", "yesterday").code == 2


def test_whoever_looks_at_anothers_consents_or_finds_them_is_recorded(
    client: TestClient, service: Service, sign_in: SignIn, admin: Headers, run: Run
) -> None:
    jane, joe = service.user(JANE), service.user(JOE)
    path = f"/security/data/consent/{jane}"
    # People may look at their own as often as they like.
    assert client.get(path, headers=sign_in(JANE)).status_code == 200
    assert client.get(path, headers=sign_in(JOE)).status_code == 403
    assert client.get(f"/security/data/consent/{joe}", headers=admin).status_code == 200
    assert ask(client, admin, user_id=jane, outcome="done") == []
    assert client.get(path, headers=admin).status_code == 200
    body = {"email": JANE.upper()}
    assert client.post("/security/data/find", json=body, headers=admin).status_code == 200
    assert run("consent", str(jane)).code == 0
    assert run("find", stdin=f"{JANE}\n").code == 0
    seen = ask(client, admin, user_id=jane, outcome="done")
    assert [(one["action"], one["actor_ref"]) for one in seen] == [
        ("find", "command line"), ("consent_read", "command line"),
        ("find", ref(1)), ("consent_read", ref(1)), ("audit_read", ref(1)),
    ]  # fmt: skip
    assert JANE not in str(ask(client, admin, limit=500)).lower()


def test_whom_nobody_knows_leaves_no_trace_of_a_reading(
    client: TestClient, service: Service, admin: Headers
) -> None:
    for user_id in (999, 1):
        client.get(f"/security/data/consent/{user_id}", headers=admin)
    body = {"email": "nobody@example.com"}
    assert client.post("/security/data/find", json=body, headers=admin).status_code == 404
    assert ask(client, admin, action="consent_read") == ask(client, admin, action="find") == []


def test_the_trail_is_checked_over_http_and_on_the_command_line(
    client: TestClient, service: Service, admin: Headers, run: Run
) -> None:
    assert run("audit", "checkpoint").code == 0
    answer = client.get("/security/audit/verify", headers=admin)
    assert answer.status_code == 200, answer.text
    assert (answer.json()["status"], answer.json()["breaks"]) == ("ok", [])
    shown = run("audit", "verify", "--json")
    assert (shown.code, shown.json["status"]) == (0, "ok")
    assert run("audit", "checkpoint", "--json").json["event"] == shown.json["last"] + 1
    assert run("audit", "checkpoint", "--json").json["event"] is None
    with session_scope() as session:
        session.execute(update(AuditEvent).where(AuditEvent.id == 2).values(outcome="denied"))
    found = client.get("/security/audit/verify", headers=admin).json()
    assert found["status"] == "broken"
    assert found["breaks"] == [
        {"kind": "edited", "event_id": 2, "detail": "is not what was recorded"}
    ]
    shown = run("audit", "verify")
    assert shown.code == 1
    assert "warning: edited: event 2 is not what was recorded" in shown.err
    checks = ask(client, admin, action="audit_verified")
    assert [one["outcome"] for one in checks] == ["broken", "broken", "ok", "ok"]
    assert checks[0]["detail"]["breaks"] == ["edited 2"]
