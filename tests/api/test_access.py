"""Who may do what: every route of the service, as each kind of caller."""

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from enum import StrEnum, auto
from typing import Any, Final
from uuid import uuid4

import pytest
from fastapi import APIRouter, Depends
from fastapi.testclient import TestClient
from sqlalchemy import select

from backend.api.access import ANYONE as ANYONE_
from backend.api.access import Permit, require_declared
from backend.db_utils import session_scope
from backend.models import Approval, Base, InactivityNotice, Role, User
from backend.models.people import EMAIL_INDEX
from main import create_app
from tests.conftest import ADMIN, PASSWORD, Service, SignIn

JANE, JOE, GONE = "jane@example.com", "joe@example.com", "gone@example.com"
AUDITOR, OPERATOR = "auditor@example.com", "operator@example.com"


@pytest.fixture
def service(sqlite_service: Service) -> Service:
    """Who may do what does not depend on the engine."""
    return sqlite_service


class Who(StrEnum):
    """Who calls."""

    NOBODY = auto()  # Without a token.
    JANE = auto()  # The person that requests are about.
    JOE = auto()  # Another one.
    AUDITOR = auto()
    OPERATOR = auto()
    ADMIN = auto()


# The column "who" of the contract.
ADMIN_ONLY: Final = {Who.ADMIN}
STAFF: Final = {Who.AUDITOR, Who.OPERATOR, Who.ADMIN}
RUNNERS: Final = {Who.OPERATOR, Who.ADMIN}
READERS: Final = {Who.AUDITOR, Who.ADMIN}
OBSERVERS: Final = STAFF
SELF_OR_ADMIN: Final = {Who.JANE, Who.ADMIN}
SIGNED_IN: Final = set(Who) - {Who.NOBODY}
ANYONE: Final = set(Who)  # Probes and the API page, too.


ACCOUNTS: Final = {
    Who.JANE: JANE, Who.JOE: JOE, Who.AUDITOR: AUDITOR, Who.OPERATOR: OPERATOR, Who.ADMIN: ADMIN,
}  # fmt: skip


@dataclass
class World:
    """What requests are made about."""

    person: int
    hold: str
    backup: str
    erasure: str
    notice: str
    approval: str

    def with_unknown_ids(self) -> "World":
        """The same requests about things that do not exist."""
        return replace(
            self, person=999_999,
            **{name: str(uuid4()) for name in ("hold", "backup", "erasure", "notice", "approval")},
        )  # fmt: skip


Arguments = Callable[[World], dict[str, Any]]
Route = tuple[str, str]


def _nothing(_world: World) -> dict[str, Any]:
    return {}


def _json(**fields: Any) -> Arguments:
    return lambda _world: {"json": fields}


def _person(**fields: Any) -> Arguments:
    return lambda world: {"json": {"user_id": world.person, **fields}}


# In this order they all succeed for an admin: what destroys comes last.
TABLE: Final[dict[Route, tuple[Collection[Who], Arguments]]] = {
    ("GET", "/healthz"): (ANYONE, _nothing),
    ("GET", "/readyz"): (ANYONE, _nothing),
    ("GET", "/metrics"): (ANYONE, _nothing),
    ("GET", "/docs"): (ANYONE, _nothing),
    ("GET", "/openapi.json"): (ANYONE, _nothing),
    ("GET", "/static"): (ANYONE, _nothing),
    ("POST", "/auth/token"): (
        ANYONE,
        lambda _world: {"data": {"username": JANE, "password": PASSWORD}},
    ),
    ("GET", "/auth/me"): (SIGNED_IN, _nothing),
    ("POST", "/security/data/export"): (SELF_OR_ADMIN, _person(format="csv")),
    ("GET", "/security/data/consent/{user_id}"): (SELF_OR_ADMIN, _nothing),
    ("POST", "/security/data/consent/{user_id}"): (
        SELF_OR_ADMIN,
        _json(purpose="marketing", granted=True, evidence="signed form"),
    ),
    ("POST", "/security/data/find"): (ADMIN_ONLY, _person()),
    ("GET", "/security/data/erasures/{erasure_id}"): (READERS, _nothing),
    ("GET", "/security/data/certificate-key"): (READERS, _nothing),
    ("GET", "/security/data/export/schema"): (SIGNED_IN, _nothing),
    ("GET", "/security/processing"): (READERS, _nothing),
    ("GET", "/security/processing/page"): (READERS, _nothing),
    ("GET", "/security/retention/policies"): (OBSERVERS, _nothing),
    ("GET", "/security/retention/logs"): (
        OBSERVERS,
        lambda world: {"params": {"run_id": world.backup}},
    ),
    ("GET", "/security/retention/policies/{data_type}/versions"): (OBSERVERS, _nothing),
    ("GET", "/security/retention/forecast"): (OBSERVERS, _nothing),
    ("GET", "/security/retention/notices"): (ADMIN_ONLY, _nothing),
    ("POST", "/security/retention/notices/{notice_id}/sent"): (ADMIN_ONLY, _nothing),
    ("GET", "/security/scheduler/status"): (OBSERVERS, _nothing),
    ("GET", "/security/audit"): (
        READERS,
        lambda world: {"params": {"user_id": world.person, "by_user_id": 1}},
    ),
    ("GET", "/security/audit/verify"): (READERS, _nothing),
    ("GET", "/security/holds"): (READERS, _nothing),
    ("GET", "/security/holds/{hold_id}"): (READERS, _nothing),
    ("GET", "/security/backup/list"): (OBSERVERS, _nothing),
    ("GET", "/security/backup/{backup_id}"): (OBSERVERS, _nothing),
    ("GET", "/security/encryption/key/generate"): (ADMIN_ONLY, _nothing),
    ("GET", "/security/encryption/status"): (OBSERVERS, _nothing),
    ("POST", "/security/retention/policy"): (
        ADMIN_ONLY,
        _json(data_type="feedback", retention_days=30, action="delete"),
    ),
    ("POST", "/security/retention/apply"): (RUNNERS, _json(dry_run=False)),
    ("POST", "/security/backup/create"): (RUNNERS, _json(label="second")),
    ("POST", "/security/backup/{backup_id}/verify"): (RUNNERS, _nothing),
    ("POST", "/security/backup/restore"): (
        ADMIN_ONLY,
        lambda world: {"json": {"backup_id": world.backup, "dry_run": True}},
    ),
    ("PUT", "/security/backup/{backup_id}/hold"): (ADMIN_ONLY, _json(until=None)),
    ("DELETE", "/security/backup/{backup_id}"): (ADMIN_ONLY, _nothing),
    # Not an export of ours, which is refused with 422 after the question who asks.
    ("POST", "/security/data/import"): (ADMIN_ONLY, _json(export={})),
    ("POST", "/security/holds"): (
        ADMIN_ONLY,
        _json(scope="data_type", data_type="invoice", reason="audit"),
    ),
    ("DELETE", "/security/holds/{hold_id}"): (ADMIN_ONLY, _nothing),
    ("POST", "/security/data/delete"): (
        ADMIN_ONLY,
        _person(mode="delete", reason="request under art. 17"),
    ),
    ("GET", "/security/approvals"): (ADMIN_ONLY, _nothing),
    ("POST", "/security/approvals/{approval_id}"): (ADMIN_ONLY, _nothing),
    ("DELETE", "/security/approvals/{approval_id}"): (ADMIN_ONLY, _nothing),
    ("POST", "/auth/codes"): (STAFF, _json(present_password=PASSWORD)),
    # There is nothing to confirm, and the password is another one: refused after the question
    # who asks.
    ("POST", "/auth/codes/confirm"): (SIGNED_IN, _json(code="123456")),
    ("POST", "/auth/codes/remove"): (SIGNED_IN, _json(code="123456")),
    ("POST", "/auth/password"): (
        SIGNED_IN,
        _json(present_password="not the password", new_password="seven grey herons at noon"),
    ),
    ("POST", "/auth/logout"): (SIGNED_IN, _nothing),
    ("POST", "/auth/logout/everywhere"): (SIGNED_IN, _nothing),
}
# What a request of the table is answered with by whoever is let in, where it is no success.
REFUSED_LATER: Final = {
    ("POST", "/security/data/import"): {422},
    # Staff have begun by then.
    ("POST", "/auth/codes/confirm"): {409, 422},
    ("POST", "/auth/codes/remove"): {409},
    ("POST", "/auth/password"): {422},
}


def routes() -> Iterator[Route]:
    """Every route of the application, those outside its OpenAPI document too."""
    pending = list(create_app().routes)
    while pending:
        route: Any = pending.pop()
        if included := getattr(route, "original_router", None):
            pending += included.routes
            continue
        # A mount has no methods of its own.
        for method in getattr(route, "methods", None) or {"GET"}:
            if method != "HEAD":
                yield method, route.path


@pytest.fixture
def world(client: TestClient, service: Service, admin: dict[str, str]) -> World:
    person = service.user(JANE)
    service.user(JOE)
    service.user(AUDITOR, Role.AUDITOR)
    service.user(OPERATOR, Role.OPERATOR)
    gone = {"user_id": service.user(GONE), "mode": "delete", "reason": "request"}
    erased = client.post("/security/data/delete", json=gone, headers=admin).json()
    hold = client.post(
        "/security/holds",
        json={"scope": "data_type", "data_type": "payment", "reason": "claim"},
        headers=admin,
    ).json()["id"]
    # Two, and one of them proven, so that the other one may be deleted.
    proven = client.post("/security/backup/create", headers=admin).json()["id"]
    client.post(f"/security/backup/{proven}/verify", headers=admin)
    backup = client.post("/security/backup/create", headers=admin).json()["id"]
    now = datetime.now(UTC)
    notice = InactivityNotice(id=uuid4(), user_id=1, ends_at=now, queued_at=now)
    approval = Approval(
        id=uuid4(), act="POST /security/retention/apply", request="{}", requested_by="somebody",
        requested_at=now, expires_at=now + timedelta(days=1),
    )  # fmt: skip
    service.add(notice, approval)
    return World(person, hold, backup, erased["erasure_id"], str(notice.id), str(approval.id))


Tokens = dict[Who, dict[str, str]]


@pytest.fixture
def callers(world: World, sign_in: SignIn) -> Tokens:
    """A token of each kind of caller."""
    return {Who.NOBODY: {}} | {who: sign_in(email) for who, email in ACCOUNTS.items()}


def ask(client: TestClient, route: Route, world: World, headers: dict[str, str]) -> Any:
    """Make the table's request for *route*."""
    method, path = route
    arguments = TABLE[route][1](world)
    if path == "/static":
        path = "/static/docs.js"
    path = path.format(
        user_id=world.person, hold_id=world.hold, backup_id=world.backup,
        erasure_id=world.erasure, notice_id=world.notice, approval_id=world.approval,
        data_type="feedback",
    )  # fmt: skip
    return client.request(method, path, headers=headers, **arguments)


def contents() -> dict[str, list[tuple[Any, ...]]]:
    """Every row of every table."""
    with session_scope(read_only=True) as session:
        return {
            table.name: [
                tuple(row) for row in session.execute(select(table).order_by(*table.primary_key))
            ]
            for table in Base.metadata.sorted_tables
        }


def test_every_route_has_an_entry_in_the_table(sqlite_service: Service) -> None:
    assert sorted(routes()) == sorted(TABLE)


def test_an_application_with_a_route_that_declares_nobody_is_not_built() -> None:
    def forgotten() -> None: ...

    for dependencies in ([], [Depends(ANYONE_), Depends(Permit())]):
        router = APIRouter()
        router.get("/forgotten", dependencies=dependencies)(forgotten)
        with pytest.raises(TypeError, match="/forgotten"):
            require_declared(router)
    router = APIRouter(dependencies=[Depends(ANYONE_)])
    router.get("/open")(forgotten)
    require_declared(router)


@pytest.mark.parametrize("who", Who)
def test_who_is_not_in_the_table_is_denied_whatever_the_ids_and_changes_no_row(
    client: TestClient, world: World, callers: Tokens, who: Who
) -> None:
    denied = [route for route, (let_in, _) in TABLE.items() if who not in let_in]
    before = contents()
    wanted = 401 if who is Who.NOBODY else 403
    said: dict[Route, set[str]] = {}
    for ids in (world, world.with_unknown_ids(), replace(world, person=1)):
        for route in denied:
            answer = ask(client, route, ids, callers[who])
            assert answer.status_code == wanted, route
            said.setdefault(route, set()).add(answer.json()["detail"])
    # Nothing tells whether what was asked for exists.
    assert [route for route, details in said.items() if len(details) > 1] == []
    after = contents()
    written = len(after.pop("audit_events")) - len(before.pop("audit_events"))
    assert after == before
    # The record of the denial is the only trace; who is not signed in leaves none.
    assert written == (0 if who is Who.NOBODY else 3 * len(denied))


@pytest.mark.parametrize("who", Who)
def test_who_is_in_the_table_is_let_in(
    client: TestClient, world: World, sign_in: SignIn, who: Who
) -> None:
    for route, (let_in, _) in TABLE.items():
        if who in let_in:
            # Anew, for some of them sign out.
            token = {} if who is Who.NOBODY else sign_in(ACCOUNTS[who])
            answer = ask(client, route, world, token)
            wanted = REFUSED_LATER.get(route, {200, 201, 204})
            assert answer.status_code in wanted, (route, answer.text)


def test_a_denial_is_recorded_with_who_what_and_whose(
    client: TestClient, world: World, callers: Tokens
) -> None:
    path = f"/security/data/consent/{world.person}"
    answer = client.get(path, headers=callers[Who.OPERATOR])
    assert answer.status_code == 403
    found = client.get(
        "/security/audit",
        params={"action": "denied", "user_id": world.person},
        headers=callers[Who.AUDITOR],
    ).json()["items"]
    assert [event["outcome"] for event in found] == ["forbidden"]
    assert found[0]["detail"] == {"act": "GET /security/data/consent/{user_id}"}
    assert found[0]["request_id"] == answer.headers["x-request-id"]
    assert found[0]["actor_ref"] != found[0]["subject_ref"]


def test_staff_may_what_everybody_may_with_their_own_data(
    client: TestClient, world: World, callers: Tokens
) -> None:
    for who in (Who.AUDITOR, Who.OPERATOR):
        me = client.get("/auth/me", headers=callers[who]).json()["user_id"]
        body = {"user_id": me, "format": "json"}
        export = client.post("/security/data/export", json=body, headers=callers[who])
        assert export.status_code == 200
        consent = client.get(f"/security/data/consent/{me}", headers=callers[who])
        assert consent.status_code == 200


def test_an_admin_records_anothers_consent_only_with_evidence(
    client: TestClient, world: World, admin: dict[str, str]
) -> None:
    path = f"/security/data/consent/{world.person}"
    body = {"purpose": "marketing", "granted": True}
    before = contents()
    assert client.post(path, json=body, headers=admin).status_code == 403
    assert contents()["data_consents"] == before["data_consents"]
    body["evidence"] = "signed form of 2026-11-20"
    assert client.post(path, json=body, headers=admin).status_code == 201


def test_a_denial_does_not_say_whether_the_person_exists(
    client: TestClient, world: World, sign_in: SignIn
) -> None:
    joe = sign_in(JOE)
    answers = [
        client.get(f"/security/data/consent/{user_id}", headers=joe)
        for user_id in (world.person, 999_999)
    ]
    assert [answer.status_code for answer in answers] == [403, 403]
    assert answers[0].json()["detail"] == answers[1].json()["detail"]


def test_a_person_who_becomes_an_admin_may_act_as_one_and_then_not(
    client: TestClient, world: World, sign_in: SignIn, service: Service
) -> None:
    joe = sign_in(JOE)
    path = "/security/encryption/status"
    assert client.get(path, headers=joe).status_code == 403
    for role, status in ((Role.ADMIN, 200), (Role.USER, 403)):
        with session_scope() as session:
            found = select(User).where(User.email_index == EMAIL_INDEX.term(JOE))
            session.scalars(found).one().role = role
        assert client.get(path, headers=joe).status_code == status
