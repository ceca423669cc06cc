"""Sign-ins that are renewed, ended and begun at once: nobody waits for each other in a circle."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from typing import Any, Final
from uuid import uuid4

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import Connection, event, select

from backend.crypto import bearer
from backend.db_utils import get_engine, session_scope
from backend.errors import ConflictError
from backend.models import AuditEvent, Role, SignIn, User
from backend.services.account_service import get_account_service, token_lifetime
from backend.services.audit_service import COMMAND_LINE
from backend.services.auth_service import get_auth_service
from tests.conftest import ADMIN, JWT_SECRET, PASSWORD, Service

JANE: Final = "jane@example.com"
SECOND: Final = "second-admin@example.com"
ROUNDS: Final = 12
# How long one waits for another who waits for a lock of the first.
TOGETHER_SECONDS: Final = 0.2
_SECRET: Final = "s" * 43
Headers = dict[str, str]


class Begun:
    """A sign-in as signing in makes it, without the wait for a hash."""

    def __init__(self, service: Service, user_id: int, *, ended: bool = False) -> None:
        now = datetime.now(UTC)
        name = uuid4()
        service.add(
            SignIn(
                id=name,
                user_id=user_id,
                token_digest=sha256(_SECRET.encode()).hexdigest(),
                signed_in_at=now,
                renewed_at=now,
                expires_at=now + timedelta(days=-1 if ended else 14),
            )
        )
        self.user_id, self.refresh_token = user_id, f"{name.hex}.{_SECRET}"
        keys = bearer.TokenKeys(JWT_SECRET)
        of = bearer.SignIn(user_id, str(name), now)
        self.access_token = keys.issue(of, lifetime=token_lifetime(), now=now)


def bearing(token: str) -> Headers:
    return {"Authorization": f"Bearer {token}"}


def renew(client: TestClient, token: str) -> Any:
    return client.post("/auth/token", data={"grant_type": "refresh_token", "refresh_token": token})


Act = Callable[[TestClient, Begun, Headers], int]


def _sign_out(client: TestClient, begun: Begun, _admin: Headers) -> int:
    return client.post("/auth/logout", headers=bearing(begun.access_token)).status_code


def _sign_out_everywhere(client: TestClient, begun: Begun, _admin: Headers) -> int:
    path = "/auth/logout/everywhere"
    return client.post(path, headers=bearing(begun.access_token)).status_code


def _end_sign_ins(_client: TestClient, _begun: Begun, _admin: Headers) -> int:
    with session_scope() as session:
        get_account_service().end_sign_ins_of(session, JANE, COMMAND_LINE)
    return 204


def _erase(client: TestClient, begun: Begun, admin: Headers) -> int:
    body = {"user_id": begun.user_id, "mode": "delete", "reason": "request under art. 17"}
    return client.post("/security/data/delete", json=body, headers=admin).status_code


ENDINGS: Final = [_sign_out, _sign_out_everywhere, _end_sign_ins, _erase]


@contextmanager
def both_hold_a_lock() -> Iterator[None]:
    """Have each of two transactions go on once the other, too, has what it locks first."""
    both, seen = threading.Barrier(2), threading.local()

    def locked(_connection: Connection, _cursor: object, statement: str, *_: object) -> None:
        locks = statement.startswith(("UPDATE", "DELETE")) or "FOR UPDATE" in statement
        ours = "users" in statement or "sign_ins" in statement
        if locks and ours and not getattr(seen, "once", False):
            seen.once = True
            # Where the other one waits for our lock, it does not come.
            with suppress(threading.BrokenBarrierError):
                both.wait(TOGETHER_SECONDS)

    event.listen(get_engine(), "after_cursor_execute", locked)
    try:
        yield
    finally:
        event.remove(get_engine(), "after_cursor_execute", locked)


def renewed_beside(client: TestClient, begun: Begun, ending: Act, admin: Headers) -> set[int]:
    """Renew and end a sign-in at once; then nothing of it opens any more."""
    start = threading.Barrier(2)

    def renewing() -> Any:
        start.wait()
        return renew(client, begun.refresh_token)

    def ending_it() -> int:
        start.wait()
        return ending(client, begun, admin)

    with ThreadPoolExecutor(2) as pool:
        waiting, ended = pool.submit(renewing), pool.submit(ending_it)
        answer, status = waiting.result(timeout=60), ended.result(timeout=60)
    tokens = [begun.refresh_token]
    opened = [begun.access_token]
    if answer.status_code == 200:
        tokens.append(answer.json()["refresh_token"])
        opened.append(answer.json()["access_token"])
    refused = [renew(client, token).status_code for token in tokens]
    refused += [client.get("/auth/me", headers=bearing(t)).status_code for t in opened]
    assert set(refused) == {401}
    return {answer.status_code, status}


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_sign_in_that_is_renewed_while_it_is_ended_has_ended_and_nobody_fails(
    client: TestClient, service: Service, admin: Headers, ending: Act
) -> None:
    """PostgreSQL ends one of two who wait for each other after a second."""
    with both_hold_a_lock():
        found = renewed_beside(client, Begun(service, service.user(JANE)), ending, admin)
    assert found <= {200, 204, 401}
    with session_scope(read_only=True) as session:
        assert session.scalars(select(SignIn)).all() == []
        outcomes = session.scalars(select(AuditEvent.outcome)).all()
    assert "token_reused" not in outcomes


def test_so_it_is_however_often_and_in_whichever_order_they_come(
    client: TestClient, service: Service, admin: Headers
) -> None:
    user_id = service.user(JANE)
    found = set[int]()
    for _ in range(ROUNDS):
        for ending in (_sign_out, _sign_out_everywhere, _end_sign_ins):
            found |= renewed_beside(client, Begun(service, user_id), ending, admin)
    found |= renewed_beside(client, Begun(service, user_id), _erase, admin)
    assert found <= {200, 204, 401}
    with session_scope(read_only=True) as session:
        assert session.scalars(select(SignIn)).all() == []
        assert session.scalars(select(User.id).where(User.id == user_id)).all() == []


def test_who_signs_in_waits_for_no_ended_sign_in_that_another_holds(
    client: TestClient, service: Service
) -> None:
    if service.engine == "sqlite":
        pytest.skip("SQLite has one writer at a time")
    Begun(service, service.user("joe@example.com"), ended=True)
    service.user(JANE)
    with ThreadPoolExecutor(1) as pool, session_scope() as session:
        # As an erasure of that person does.
        assert session.scalars(select(SignIn).with_for_update()).all()
        signing_in = pool.submit(get_auth_service().sign_in, JANE, PASSWORD)
        tokens = signing_in.result(timeout=20)
    assert renew(client, tokens.refresh_token).status_code == 200
    with session_scope(read_only=True) as session:
        assert len(session.scalars(select(SignIn)).all()) == 2
    get_auth_service().sign_in(JANE, PASSWORD)
    with session_scope(read_only=True) as session:
        # It goes with the next one who signs in.
        ended = select(SignIn).where(SignIn.expires_at < datetime.now(UTC))
        assert session.scalars(ended).all() == []


def test_of_two_admins_who_lose_their_rights_at_once_one_stays(service: Service) -> None:
    service.user(SECOND, Role.ADMIN)
    both = threading.Barrier(2)

    def demote(email: str) -> str:
        try:
            with session_scope() as session:
                get_account_service().set_role(session, email, Role.USER, COMMAND_LINE)
                session.flush()
                # Where the other one waits for our lock, it does not come.
                with suppress(threading.BrokenBarrierError):
                    both.wait(TOGETHER_SECONDS)
        except ConflictError:
            return "the last admin"
        return "done"

    with ThreadPoolExecutor(2) as pool:
        assert sorted(pool.map(demote, [ADMIN, SECOND])) == ["done", "the last admin"]
    with session_scope(read_only=True) as session:
        admins = select(User.id).where(User.role == Role.ADMIN, User.is_active)
        assert len(session.scalars(admins).all()) == 1
