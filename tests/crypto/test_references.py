"""References: they tell people apart for whoever has the key, and say nothing to anyone else."""

import hashlib
import hmac
from uuid import UUID, uuid4

from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import select

from backend.crypto import keyring
from backend.crypto.columns import BlindIndex, normalise_email
from backend.crypto.keyring import Keyring, RootKey
from backend.crypto.references import reference, references
from backend.db_utils import session_scope
from backend.models import AuditEvent, User
from tests.conftest import Service

RAW = bytes(range(32))
OLD, NEW = RootKey(RAW), RootKey(bytes(range(1, 33)))
JANE = UUID("11111111-2222-4333-8444-555555555555")


def test_a_reference_is_key_id_and_half_a_keyed_digest_of_the_unique_id() -> None:
    # The ledger outlives releases: a change here would lose every erased person's entry.
    info = b"\x00\x11subject reference"
    key = HKDF(algorithm=SHA256(), length=32, salt=b"holdfast/v1", info=info).derive(RAW)
    digest = hmac.digest(key, JANE.bytes, hashlib.sha256)[:16]
    assert reference(Keyring(OLD), JANE) == f"{OLD.key_id.hex()}:{digest.hex()}"


@given(st.uuids(), st.uuids())
def test_two_people_have_two_references_and_one_person_one(one: UUID, other: UUID) -> None:
    ring = Keyring(OLD)
    assert reference(ring, one) == reference(Keyring(RootKey(RAW)), one)
    assert (reference(ring, one) == reference(ring, other)) == (one == other)


def test_without_the_key_a_reference_is_another() -> None:
    guesses = {
        digest(JANE.bytes).hexdigest()[:32]
        for digest in (hashlib.sha256, hashlib.sha1, hashlib.md5)
    }
    found = reference(Keyring(OLD), JANE).split(":")[1]
    assert found not in guesses
    assert found != reference(Keyring(NEW), JANE).split(":")[1]
    assert JANE.hex not in found


def test_a_reference_is_no_term_of_a_blind_index() -> None:
    keyring.install(Keyring(OLD))
    index = BlindIndex("users", "uid", normalise_email)
    assert reference(Keyring(OLD), JANE)[9:] not in index.term(str(JANE))


def test_after_a_rotation_a_person_is_found_under_every_key_and_entered_under_the_new() -> None:
    before = reference(Keyring(OLD), JANE)
    rotated = Keyring(NEW, [OLD])
    assert reference(rotated, JANE) == reference(Keyring(NEW), JANE)
    assert references(rotated, JANE) == [reference(rotated, JANE), before]
    assert before not in references(rotated, uuid4())


def test_the_audit_trail_names_people_by_their_reference_only(service: Service) -> None:
    eve = service.user("eve@example.com")
    joe = service.user("joe@example.com")
    with session_scope(read_only=True) as session:
        events = session.scalars(
            select(AuditEvent).where(AuditEvent.action == "user_created").order_by(AuditEvent.id)
        ).all()[-2:]
        people = [session.get_one(User, user_id) for user_id in (eve, joe)]
        assert [event.subject_ref for event in events] == [
            reference(keyring.current(), person.uid) for person in people
        ]
        assert "example.com" not in str([vars(event) for event in events])
