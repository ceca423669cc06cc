"""Approvals are used once, however many come at once, and count while who gave them may."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import pytest
from sqlalchemy.orm import Session

from backend.db_utils import session_scope
from backend.errors import ApprovalNeededError
from backend.models import Role, User
from backend.privacy.declarations import EraseMode
from backend.services.account_service import get_account_service
from backend.services.approval_service import (
    MAX_WAITING,
    Request,
    TooManyWaitingError,
    get_approval_service,
)
from backend.services.audit_service import COMMAND_LINE, Actor
from backend.services.erasure_service import get_erasure_service
from backend.services.subject_service import Who
from tests.conftest import Service

ASKED: Final = Request("POST /security/retention/apply", "{}")
AT_ONCE: Final = 4


def admin(service: Service, email: str) -> Actor:
    user_id = service.user(email, Role.ADMIN)
    with session_scope(read_only=True) as session:
        uid = session.get_one(User, user_id).uid
    return Actor("person", Role.ADMIN, user_id, uid=uid)


def goes_through(actor: Actor, request: Request = ASKED) -> bool:
    try:
        get_approval_service().require(actor, request)
    except ApprovalNeededError:
        return False
    return True


def test_of_many_who_come_with_one_approval_at_once_one_is_let_through(service: Service) -> None:
    first, second = (admin(service, f"{name}@example.com") for name in ("jane", "joe"))
    for _ in range(3):
        assert not goes_through(first)
        with session_scope() as session:
            (waiting,) = get_approval_service().waiting(session, 2)
            get_approval_service().approve(session, second, waiting.id)
        with ThreadPoolExecutor(AT_ONCE) as pool:
            let_through = list(pool.map(goes_through, [first] * AT_ONCE))
        assert let_through.count(True) == 1
        with session_scope() as session:
            for left in get_approval_service().waiting(session, 2):
                get_approval_service().refuse(session, second, left.id)


def demote(session: Session, user: User) -> None:
    get_account_service().set_role(session, user.email or "", Role.USER, COMMAND_LINE)


def deactivate(_session: Session, user: User) -> None:
    user.is_active = False


def erase(session: Session, user: User) -> None:
    get_erasure_service().erase(
        session, COMMAND_LINE, Who(user.id), EraseMode.DELETE, reason="asked", dry_run=False
    )


def anonymise(session: Session, user: User) -> None:
    get_erasure_service().erase(
        session, COMMAND_LINE, Who(user.id), EraseMode.ANONYMIZE, reason="asked", dry_run=False
    )


@pytest.mark.parametrize("lose_rights", [demote, deactivate, erase, anonymise])
def test_an_approval_ends_with_the_rights_of_who_gave_it(
    service: Service, lose_rights: Callable[[Session, User], None]
) -> None:
    first, second, third = (admin(service, f"{name}@example.com") for name in ("a", "b", "c"))
    assert not goes_through(first)
    with session_scope() as session:
        (waiting,) = get_approval_service().waiting(session, 2)
        get_approval_service().approve(session, second, waiting.id)
    with session_scope() as session:
        lose_rights(session, session.get_one(User, second.user_id))
    assert not goes_through(first)
    # Another admin, who has the rights still, approves the very same request.
    with session_scope() as session:
        (waiting,) = get_approval_service().waiting(session, 2)
        get_approval_service().approve(session, third, waiting.id)
    assert goes_through(first)


def test_no_more_than_twenty_requests_of_one_person_wait(service: Service) -> None:
    first, second = (admin(service, f"{name}@example.com") for name in ("a", "b"))
    for number in range(MAX_WAITING):
        assert not goes_through(first, Request(ASKED.act, str(number)))
    for request in (ASKED, Request("POST /security/retention/policy", "{}")):
        with pytest.raises(TooManyWaitingError):
            get_approval_service().require(first, request)
    # One that waits is asked for again, and somebody else's is kept beside them.
    assert not goes_through(first, Request(ASKED.act, "0"))
    assert not goes_through(second)
    with session_scope() as session:
        assert len(get_approval_service().waiting(session, 100)) == MAX_WAITING + 1
        oldest, *_ = get_approval_service().waiting(session, 1)
        get_approval_service().approve(session, second, oldest.id)
    # Approved, and not used yet, it still takes its place.
    with pytest.raises(TooManyWaitingError):
        get_approval_service().require(first, ASKED)
    assert goes_through(first, Request(ASKED.act, oldest.request))
    assert not goes_through(first)
