"""Approvals are used once, on both engines, however many come at once."""

from concurrent.futures import ThreadPoolExecutor
from typing import Final

from backend.db_utils import session_scope
from backend.errors import ApprovalNeededError
from backend.models import Role, User
from backend.services.approval_service import Request, get_approval_service
from backend.services.audit_service import Actor
from tests.conftest import Service

ASKED: Final = Request("POST /security/retention/apply", "{}")
AT_ONCE: Final = 4


def admin(service: Service, email: str) -> Actor:
    user_id = service.user(email, Role.ADMIN)
    with session_scope(read_only=True) as session:
        uid = session.get_one(User, user_id).uid
    return Actor("person", Role.ADMIN, user_id, uid=uid)


def goes_through(actor: Actor) -> bool:
    try:
        get_approval_service().require(actor, ASKED)
    except ApprovalNeededError:
        return False
    return True


def test_of_many_who_come_with_one_approval_at_once_one_is_let_through(service: Service) -> None:
    first, second = (admin(service, f"{name}@example.com") for name in ("jane", "joe"))
    for _ in range(3):
        assert not goes_through(first)
        with session_scope() as session:
            (waiting,) = get_approval_service().waiting(session)
            get_approval_service().approve(session, second, waiting.id)
        with ThreadPoolExecutor(AT_ONCE) as pool:
            let_through = list(pool.map(goes_through, [first] * AT_ONCE))
        assert let_through.count(True) == 1
        with session_scope() as session:
            for left in get_approval_service().waiting(session):
                get_approval_service().refuse(session, second, left.id)
