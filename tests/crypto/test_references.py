"""References: they tell people apart for whoever has the key, and say nothing to anyone else."""

import hashlib
import hmac
from uuid import UUID

from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import select, text

from backend.crypto.references import new_reference_key, reference
from backend.db_utils import session_scope
from backend.models import AuditEvent, Installation, User
from backend.services.account_service import get_account_service
from backend.services.audit_service import COMMAND_LINE
from backend.services.reference_service import reference_to
from backend.services.setup_service import get_setup_service
from tests.conftest import PASSWORD, Service

KEY, OTHER = bytes(range(32)), bytes(range(1, 33))
JANE = UUID("11111111-2222-4333-8444-555555555555")


def test_a_reference_is_half_a_keyed_digest_of_the_unique_id() -> None:
    # The ledger outlives releases: a change here would lose every erased person's entry.
    assert reference(KEY, JANE) == hmac.digest(KEY, JANE.bytes, hashlib.sha256)[:16].hex()


@given(st.uuids(), st.uuids())
def test_two_people_have_two_references_and_one_person_one(one: UUID, other: UUID) -> None:
    assert (reference(KEY, one) == reference(KEY, other)) == (one == other)


def test_without_the_key_a_reference_is_another() -> None:
    guesses = {
        digest(JANE.bytes).hexdigest()[:32]
        for digest in (hashlib.sha256, hashlib.sha1, hashlib.md5)
    }
    assert reference(KEY, JANE) not in guesses | {reference(OTHER, JANE), JANE.hex}


def test_an_installation_has_a_key_of_its_own_which_lies_sealed(sqlite_service: Service) -> None:
    assert new_reference_key() != new_reference_key()
    with session_scope(read_only=True) as session:
        key = session.scalars(select(Installation.reference_key)).one()
        assert len(key) == 32
        assert reference_to(session, JANE) == reference(key, JANE)
        (stored,) = session.execute(text("SELECT reference_key FROM installation")).scalars()
    assert stored.startswith("enc1.")
    get_setup_service().prepare()
    with session_scope(read_only=True) as session:
        assert session.scalars(select(Installation.reference_key)).one() == key


def test_the_audit_trail_names_people_by_their_reference_only(service: Service) -> None:
    with session_scope() as session:
        eve, joe = (
            get_account_service().create(session, f"{name}@example.com", PASSWORD, COMMAND_LINE).id
            for name in ("eve", "joe")
        )
    with session_scope(read_only=True) as session:
        events = session.scalars(
            select(AuditEvent).where(AuditEvent.action == "user_created").order_by(AuditEvent.id)
        ).all()[-2:]
        people = [session.get_one(User, user_id) for user_id in (eve, joe)]
        assert [event.subject_ref for event in events] == [
            reference_to(session, person.uid) for person in people
        ]
        assert "example.com" not in str([vars(event) for event in events])
