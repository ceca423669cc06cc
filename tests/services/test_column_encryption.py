"""Encrypting a column that holds plain values: readable meanwhile, refused before and after."""

from collections.abc import Iterator
from datetime import date

import pytest
from sqlalchemy import Text, select, text, type_coerce

from backend.crypto.columns import allow_plaintext
from backend.db_utils import session_scope
from backend.errors import NotEncryptedError, RefusedError
from backend.models import ColumnMigration, DataConsent, User
from backend.services import cells, column_service
from backend.services.audit_service import COMMAND_LINE
from backend.services.column_service import get_column_service
from backend.services.setup_service import get_setup_service
from tests.conftest import Service
from tests.privacy.people import plant

PLAIN = "Rue de l'Exemple 7"


@pytest.fixture(autouse=True)
def _nothing_in_plain() -> Iterator[None]:
    yield
    allow_plaintext([])


@pytest.fixture
def people(service: Service) -> list[int]:
    """People whose street stands in plain, as before the model declared it encrypted."""
    ids = [plant(letter).id for letter in "ABC"]
    with session_scope() as session:
        session.execute(text("UPDATE users SET street = :s WHERE id > 1"), {"s": PLAIN})
    return ids


def streets() -> list[str | None]:
    with session_scope(read_only=True) as session:
        return list(session.scalars(select(User.street).where(User.id > 1).order_by(User.id)))


def stored() -> list[str]:
    with session_scope(read_only=True) as session:
        return list(session.scalars(select(type_coerce(User.street, Text)).where(User.id > 1)))


def encrypt(place: str = "users.street") -> int:
    table, column = place.split(".")
    return get_column_service().encrypt(table, column, COMMAND_LINE)


def test_plain_values_are_encrypted_and_read_as_before(people: list[int]) -> None:
    with pytest.raises(NotEncryptedError):
        streets()
    assert encrypt() == 0
    assert streets() == [PLAIN] * len(people)
    assert all(token.startswith("enc1.") for token in stored())
    with session_scope() as session:
        session.execute(text("UPDATE users SET street = :s WHERE id = 2"), {"s": PLAIN})
    with pytest.raises(NotEncryptedError):
        streets()


def test_while_it_runs_both_kinds_are_read_also_after_a_restart(
    people: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cells, "BATCH", 1)

    def cut(_done: int, _of: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        get_column_service().encrypt("users", "street", COMMAND_LINE, cut)
    for _ in range(2):
        assert sorted(token.startswith("enc1.") for token in stored()) == [False, False, True]
        assert streets() == [PLAIN] * len(people)
        allow_plaintext([])
        get_setup_service().open()
    assert encrypt() == 0
    with session_scope(read_only=True) as session:
        assert session.scalars(select(ColumnMigration)).one().finished_at is not None
    assert streets() == [PLAIN] * len(people)


def test_only_the_declared_column_is_read_in_plain(people: list[int]) -> None:
    assert encrypt() == 0
    with session_scope() as session:
        session.execute(text("UPDATE users SET city = :s WHERE id = 2"), {"s": PLAIN})
    with session_scope(read_only=True) as session, pytest.raises(NotEncryptedError):
        session.scalars(select(User.city)).all()


def test_a_value_that_a_writer_changes_meanwhile_is_kept(
    people: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = cells.swap

    def after_a_writer(*arguments: object) -> int:
        with session_scope() as session:
            session.get_one(User, people[0]).street = "newer"
        return whole(*arguments)  # type: ignore[arg-type] # As they came.

    monkeypatch.setattr(column_service, "swap", after_a_writer)
    assert encrypt() == 0
    assert streets() == ["newer", PLAIN, PLAIN]


def test_what_the_column_does_not_hold_is_left_and_told(people: list[int]) -> None:
    with session_scope() as session:
        session.execute(text("UPDATE users SET date_of_birth = '1987-03-29' WHERE id > 1"))
        session.execute(text("UPDATE users SET date_of_birth = 'unknown' WHERE id = 2"))
    assert encrypt("users.date_of_birth") == 1
    with session_scope(read_only=True) as session:
        born = session.scalars(select(User.date_of_birth).where(User.id > 2)).all()
        assert born == [date(1987, 3, 29)] * (len(people) - 1)
        assert session.scalars(select(ColumnMigration)).one().finished_at is None
        raw = session.scalar(select(type_coerce(User.date_of_birth, Text)).where(User.id == 2))
        assert raw == "unknown"


def test_values_bound_to_their_row_are_bound_by_it_too(service: Service) -> None:
    plant("A")
    with session_scope() as session:
        session.execute(text("UPDATE data_consents SET evidence = 'a form, signed'"))
    assert encrypt("data_consents.evidence") == 0
    with session_scope(read_only=True) as session:
        assert set(session.scalars(select(DataConsent.evidence))) == {"a form, signed"}


@pytest.mark.parametrize(
    "place", ["users.country", "users.none", "none.none", "installation.reference_key"]
)
def test_a_column_that_is_not_declared_so_is_refused(sqlite_service: Service, place: str) -> None:
    with pytest.raises(RefusedError):
        encrypt(place)
    with session_scope(read_only=True) as session:
        assert session.scalars(select(ColumnMigration)).all() == []
