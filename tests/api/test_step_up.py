"""Acts of weight: a fresh sign-in, and a second admin where the operator wants one."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final
from uuid import uuid4

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import select, text, update

from backend.api.access import Permit
from backend.crypto import bearer
from backend.db_utils import session_scope
from backend.models import Approval, AuditEvent, RetentionPolicy, Role, User
from backend.services.account_service import token_lifetime
from backend.services.approval_service import get_approval_service
from main import create_app
from tests.conftest import ADMIN, JWT_SECRET, Service, SignIn

SECOND: Final = "second-admin@example.com"
POLICY: Final = {"data_type": "feedback", "retention_days": 400, "action": "delete"}
# Restores, erasures, policies: by DESIGN and issue, what needs a fresh sign-in.
GRAVE: Final = {
    ("POST", "/security/backup/restore"),
    ("DELETE", "/security/backup/{backup_id}"),
    ("POST", "/security/data/delete"),
    ("POST", "/security/retention/apply"),
    ("POST", "/security/retention/policy"),
}


@pytest.fixture
def service(sqlite_service: Service) -> Service:
    """Who may do what does not depend on the engine."""
    return sqlite_service


def signed_in(user_id: int, minutes_ago: float) -> dict[str, str]:
    """A token of a sign-in that was some time ago, and was renewed just now."""
    now = datetime.now(UTC)
    sign_in = bearer.SignIn(user_id, str(uuid4()), now - timedelta(minutes=minutes_ago))
    token = bearer.TokenKeys(JWT_SECRET).issue(sign_in, lifetime=token_lifetime(), now=now)
    return {"Authorization": f"Bearer {token}"}


def grave_routes() -> Iterator[tuple[str, str]]:
    pending: list[Any] = list(create_app().routes)
    while pending:
        route = pending.pop()
        if included := getattr(route, "original_router", None):
            pending += included.routes
        for needed in getattr(getattr(route, "dependant", None), "dependencies", ()):
            if isinstance(needed.call, Permit) and needed.call.grave:
                yield min(route.methods), route.path


def test_what_cannot_be_undone_is_grave_and_nothing_else(sqlite_service: Service) -> None:
    assert set(grave_routes()) == GRAVE


def test_a_grave_act_needs_a_sign_in_of_the_last_minutes(
    client: TestClient, service: Service
) -> None:
    for route in GRAVE:
        method, path = route[0], route[1].format(backup_id=uuid4())
        stale = client.request(method, path, json={}, headers=signed_in(1, 16))
        assert (stale.status_code, stale.json()["code"]) == (401, "fresh_sign_in_needed"), route
        # RFC 9470, 3.
        assert "insufficient_user_authentication" in stale.headers["www-authenticate"]
        fresh = client.request(method, path, json={}, headers=signed_in(1, 14))
        assert fresh.status_code in {200, 404, 422}, route
    with session_scope(read_only=True) as session:
        denied = select(AuditEvent.outcome).where(AuditEvent.action == "denied")
        assert list(session.scalars(denied)) == ["fresh_sign_in_needed"] * len(GRAVE)


def test_what_is_not_grave_goes_on_with_a_sign_in_of_yesterday(
    client: TestClient, service: Service
) -> None:
    yesterday = signed_in(1, 24 * 60)
    assert client.get("/security/retention/policies", headers=yesterday).status_code == 200
    assert client.post("/security/backup/create", headers=yesterday).status_code == 201


def test_the_minutes_are_the_operators(
    client: TestClient, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = "/security/retention/policy"
    assert client.post(path, json=POLICY, headers=signed_in(1, 30)).status_code == 401
    monkeypatch.setenv("STEP_UP_MINUTES", "60")
    from backend.settings import get_settings

    get_settings.cache_clear()
    assert client.post(path, json=POLICY, headers=signed_in(1, 30)).status_code == 201


@dataclass
class Two:
    """Two admins, where one is not enough."""

    client: TestClient
    first: dict[str, str]
    second: dict[str, str]

    def ask(self, headers: dict[str, str] | None = None, **changed: Any) -> Any:
        path = "/security/retention/policy"
        return self.client.post(path, json=POLICY | changed, headers=headers or self.first)

    def wanted(self, **changed: Any) -> str:
        """Ask for the act and return the number under which it waits."""
        answer = self.ask(**changed)
        assert (answer.status_code, answer.json()["code"]) == (403, "approval_needed")
        number: str = answer.json()["approval_id"]
        return number

    def approve(self, number: str, headers: dict[str, str] | None = None) -> Any:
        path = f"/security/approvals/{number}"
        return self.client.post(path, headers=headers or self.second)


@pytest.fixture
def two(service: Service, sign_in: SignIn, monkeypatch: pytest.MonkeyPatch) -> Iterator[Two]:
    monkeypatch.setenv("SECOND_ADMIN", "true")
    from backend.settings import get_settings

    get_settings.cache_clear()
    service.user(SECOND, Role.ADMIN)
    with TestClient(create_app(), raise_server_exceptions=False) as client:
        yield Two(client, sign_in(ADMIN), sign_in(SECOND))


def policies() -> int:
    with session_scope(read_only=True) as session:
        return len(session.scalars(select(RetentionPolicy)).all())


def test_the_act_waits_until_another_admin_has_approved_it_and_is_done_once(two: Two) -> None:
    number = two.wanted()
    assert policies() == 0
    (waiting,) = two.client.get("/security/approvals", headers=two.second).json()["items"]
    assert (waiting["id"], waiting["act"]) == (number, "POST /security/retention/policy")
    assert '"retention_days":400' in waiting["request"]
    assert two.approve(number).status_code == 200
    assert two.ask().status_code == 201
    assert policies() == 1
    # The approval was for one act.
    assert two.wanted() != number


def test_nobody_approves_their_own_request(two: Two) -> None:
    number = two.wanted()
    own = two.approve(number, two.first)
    assert (own.status_code, own.json()["code"]) == (403, "forbidden")
    assert two.wanted() == number
    assert two.approve(number).status_code == 200


def test_an_approval_is_for_that_request_of_that_admin_alone(two: Two) -> None:
    assert two.approve(two.wanted()).status_code == 200
    other = two.ask(retention_days=1)
    assert (other.status_code, policies()) == (403, 0)
    # The second one, who approved it, did not ask for it.
    assert (two.ask(two.second).status_code, policies()) == (403, 0)
    assert two.ask().status_code == 201


def test_a_refused_or_expired_approval_lets_nothing_through(two: Two) -> None:
    number = two.wanted()
    assert two.approve(number).status_code == 200
    path = f"/security/approvals/{number}"
    assert two.client.delete(path, headers=two.second).status_code == 204
    assert two.client.delete(path, headers=two.second).status_code == 404
    number = two.wanted()
    assert two.approve(number).status_code == 200
    with session_scope() as session:
        session.execute(update(Approval).values(expires_at=datetime.now(UTC) - timedelta(1)))
    assert two.client.get("/security/approvals", headers=two.first).json()["items"] == []
    assert two.approve(number).status_code == 404
    assert two.wanted() != number


def test_approving_needs_a_fresh_sign_in_and_an_admin(two: Two, service: Service) -> None:
    number = two.wanted()
    with session_scope(read_only=True) as session:
        second = session.scalars(select(User.id).order_by(User.id.desc())).first()
    assert two.approve(number, signed_in(second or 0, 30)).status_code == 401
    operator = service.user("operator@example.com", Role.OPERATOR)
    assert two.approve(number, signed_in(operator, 0)).status_code == 403
    assert two.approve(number).status_code == 200
    assert two.approve(number).status_code == 409


def test_a_dry_run_needs_nobody_else_and_the_real_run_does(two: Two) -> None:
    path = "/security/retention/apply"
    dry = two.client.post(path, json={"dry_run": True}, headers=two.first)
    assert dry.status_code == 200
    real = two.client.post(path, json={"dry_run": False}, headers=two.first)
    assert (real.status_code, real.json()["code"]) == (403, "approval_needed")


def test_nobody_is_asked_to_approve_what_would_be_refused_anyway(two: Two) -> None:
    apply, policy = "/security/retention/apply", "/security/retention/policy"
    cases: list[tuple[str, Any]] = [
        (apply, {}),
        (apply, {"dry_run": "true"}),
        (apply, {"dry_run": 1}),
        (apply, {"dry_run": False, "x": "y" * 60_000}),
        (policy, []),
        (policy, "text"),
        (policy, POLICY | {"retention_days": "400"}),
        ("/security/data/delete", {"user_id": 2, "email": ADMIN, "mode": "delete", "reason": "x"}),
        ("/security/backup/restore", {"backup_id": "x"}),
    ]
    for path, body in cases:
        answer = two.client.post(path, json=body, headers=two.first)
        assert (answer.status_code, answer.json()["code"]) == (422, "invalid_request"), body
        assert answer.json()["errors"][0]["at"].startswith("body")
    bare = two.client.post(policy, headers=two.first)
    assert (bare.status_code, bare.json()["code"]) == (422, "invalid_request")
    assert two.client.get("/security/approvals", headers=two.second).json()["items"] == []


def test_blanks_between_the_words_are_not_kept_and_make_no_other_request_of_it(two: Two) -> None:
    spaced = json.dumps(POLICY, indent=5_000)
    headers = two.first | {"Content-Type": "application/json"}
    path = "/security/retention/policy"
    answer = two.client.post(path, content=spaced, headers=headers)
    number = answer.json()["approval_id"]
    (waiting,) = two.client.get("/security/approvals", headers=two.second).json()["items"]
    assert waiting["request"] == json.dumps(POLICY, separators=(",", ":"))
    assert two.approve(number).status_code == 200
    assert two.ask().status_code == 201


def test_what_waits_is_shown_by_pages_and_more_than_twenty_is_a_conflict(two: Two) -> None:
    numbers = [two.wanted(retention_days=days) for days in range(1, 21)]
    too_many = two.ask(retention_days=21)
    assert (too_many.status_code, too_many.json()["code"]) == (409, "too_many_waiting")
    path = "/security/approvals"
    shown = [
        [one["id"] for one in two.client.get(f"{path}?{page}", headers=two.second).json()["items"]]
        for page in ("", "limit=3", "limit=30&offset=17", "offset=20")
    ]
    assert shown == [numbers, numbers[:3], numbers[17:], []]
    for page in ("limit=0", "limit=501", "offset=-1"):
        assert two.client.get(f"{path}?{page}", headers=two.second).status_code == 422


def test_the_request_lies_sealed_and_is_gone_once_it_was_used(two: Two) -> None:
    number = two.wanted()
    with session_scope(read_only=True) as session:
        assert session.scalars(text("SELECT request FROM approvals")).one().startswith("enc1.")
    two.approve(number)
    assert two.ask().status_code == 201
    with session_scope(read_only=True) as session:
        assert session.scalars(select(Approval)).all() == []
        events = session.scalars(select(AuditEvent).order_by(AuditEvent.id)).all()
    found = [(event.action, event.outcome) for event in events if "approv" in event.action]
    assert found == [
        ("approval_requested", "done"), ("approved", "done"), ("approval_used", "done"),
    ]  # fmt: skip


def test_without_the_setting_one_admin_is_enough(
    client: TestClient, service: Service, admin: dict[str, str]
) -> None:
    answer = client.post("/security/retention/policy", json=POLICY, headers=admin)
    assert answer.status_code == 201
    assert policies() == 1


def test_what_a_request_brings_along_where_no_body_is_taken_makes_no_dry_run_of_it(
    two: Two,
) -> None:
    backup = two.client.post("/security/backup/create", headers=two.first).json()["id"]
    path = f"/security/backup/{backup}"
    for body in ({"dry_run": True}, {}):
        answer = two.client.request("DELETE", path, json=body, headers=two.first)
        assert (answer.status_code, answer.json()["code"]) == (403, "approval_needed"), body
    assert two.client.get(path, headers=two.first).status_code == 200


def test_only_paths_with_ids_are_kept_to_be_approved(two: Two) -> None:
    for name in ("jane.doe@example.com", "x" * 300):
        answer = two.client.delete(f"/security/backup/{name}", headers=two.first)
        assert answer.status_code == 422
    assert two.client.get("/security/approvals", headers=two.first).json()["items"] == []


def test_nobodys_requests_stay_beyond_their_day(two: Two) -> None:
    two.wanted()
    with session_scope() as session:
        session.execute(update(Approval).values(expires_at=datetime.now(UTC) - timedelta(1)))
    with session_scope() as session:
        get_approval_service().forget_expired(session, datetime.now(UTC))
    with session_scope(read_only=True) as session:
        assert session.scalars(select(Approval)).all() == []
