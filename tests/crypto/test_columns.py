"""Encrypted columns on a real file: what lies there, what opens, and what may be asked of them."""

import base64
import hashlib
import hmac
import struct
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import Any, Final

import pytest
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from sqlalchemy import Engine, MetaData, Table, func, insert, select, text, update
from sqlalchemy.exc import InvalidRequestError, SQLAlchemyError, StatementError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, aliased, mapped_column

from backend.crypto import keyring
from backend.crypto.blind_index import BlindIndex, normalise_email
from backend.crypto.columns import Encrypted
from backend.crypto.keyring import Keyring, RootKey
from backend.db_utils import make_engine, session_scope
from backend.errors import NotEncryptedError, TamperedError, UnknownKeyError

OLD, NEW = RootKey(bytes(range(32))), RootKey(bytes(range(1, 33)))
BORN: Final = date(1987, 3, 29)


class Base(DeclarativeBase):
    pass


class Guest(Base):
    __tablename__ = "guests"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str | None] = mapped_column(Encrypted())
    # Named otherwise in the database: the scope is the column's name there.
    note: Mapped[str | None] = mapped_column("staff_note", Encrypted())
    born: Mapped[date | None] = mapped_column(Encrypted("date"))


class Visit(Base):
    __tablename__ = "visits"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str | None] = mapped_column(Encrypted())


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    keyring.install(Keyring(OLD))
    engine = make_engine(f"sqlite:///{tmp_path / 'guests.db'}")
    with session_scope(engine) as session:
        Base.metadata.create_all(session.connection())
    yield engine
    engine.dispose()


def add(engine: Engine, *rows: object) -> None:
    with session_scope(engine) as session:
        session.add_all(rows)


def stored(engine: Engine, column: str, table: str = "guests") -> list[Any]:
    """Read a column as it lies in the file."""
    with session_scope(engine, read_only=True) as session:
        statement = text(f"SELECT {column} FROM {table} ORDER BY id")  # noqa: S608 - our own names
        return list(session.scalars(statement))


def run(engine: Engine, statement: str, **values: Any) -> None:
    with session_scope(engine) as session:
        session.execute(text(statement), values)


def read(engine: Engine, column: Any) -> list[Any]:
    with session_scope(engine, read_only=True) as session:
        return list(session.scalars(select(column)))


def test_the_file_holds_tokens_and_the_session_reads_plain(engine: Engine, tmp_path: Path) -> None:
    add(engine, Guest(name="Zoë Lichtenberg", note="allergic to nuts", born=BORN))
    for column in ("name", "staff_note", "born"):
        assert stored(engine, column)[0].startswith("enc1.")
    with session_scope(engine, read_only=True) as session:
        guest = session.scalars(select(Guest)).one()
        assert (guest.name, guest.note, guest.born) == ("Zoë Lichtenberg", "allergic to nuts", BORN)
    engine.dispose()
    files = b"".join(path.read_bytes() for path in tmp_path.glob("guests.db*"))
    assert b"enc1." in files
    for plain in (b"Lichtenberg", "Zoë".encode(), b"allergic", b"1987-03-29"):
        assert plain not in files


def test_null_stays_null_and_the_empty_string_is_sealed(engine: Engine) -> None:
    add(engine, Guest(name=None), Guest(name=""))
    null, empty = stored(engine, "name")
    assert null is None
    assert empty.startswith("enc1.")
    assert read(engine, Guest.name) == [None, ""]


def test_equal_values_lie_in_the_file_as_different_tokens(engine: Engine) -> None:
    add(engine, *(Guest(name="Jane") for _ in range(20)))
    assert len(set(stored(engine, "name"))) == 20


@pytest.mark.parametrize("day", [date.min, date(2000, 2, 29), date.max])
def test_a_date_comes_back_as_the_same_date(engine: Engine, day: date) -> None:
    add(engine, Guest(born=day))
    assert read(engine, Guest.born) == [day]


def test_a_value_that_the_codec_does_not_know_is_refused_and_not_shown(engine: Engine) -> None:
    with pytest.raises(StatementError) as refusal:
        add(engine, Guest(born="on a sunday in spring"))
    assert "sunday" not in str(refusal.value)
    assert stored(engine, "id") == []


def test_a_value_moved_to_another_column_or_table_does_not_open(engine: Engine) -> None:
    add(engine, Guest(name="Jane", note="likes tea"), Visit(name="Joe"))
    assert read(engine, Guest.note) == ["likes tea"]
    run(engine, "UPDATE guests SET staff_note = name")
    run(engine, "UPDATE visits SET name = (SELECT name FROM guests)")
    for column in (Guest.note, Visit.name):
        with pytest.raises(TamperedError):
            read(engine, column)
    assert read(engine, Guest.name) == ["Jane"]


def test_plain_text_in_an_encrypted_column_is_refused_and_not_handed_out(engine: Engine) -> None:
    add(engine, Guest(name="Jane"))
    run(engine, "UPDATE guests SET name = 'Mallory'")
    with pytest.raises(NotEncryptedError) as refusal:
        read(engine, Guest.name)
    assert "Mallory" not in refusal.value.detail


def test_a_value_of_a_key_that_is_not_configured_names_the_key(engine: Engine) -> None:
    add(engine, Guest(name="Jane"))
    keyring.install(Keyring(NEW))
    with pytest.raises(UnknownKeyError, match=OLD.key_id.hex()):
        read(engine, Guest.name)
    keyring.install(Keyring(NEW, [OLD]))
    assert read(engine, Guest.name) == ["Jane"]


COMPARISONS: Final[dict[str, Callable[[], object]]] = {
    "equal": lambda: Guest.name == "Jane",
    "not equal": lambda: Guest.name != "Jane",
    "equal to nothing": lambda: Guest.name == None,  # noqa: E711 - what is tried
    "less": lambda: Guest.name < "Jane",
    "in": lambda: Guest.name.in_(["Jane", "Joe"]),
    "not in": lambda: Guest.name.not_in(["Jane"]),
    "like": lambda: Guest.name.like("J%"),
    "contains": lambda: Guest.name.contains("an"),
    "between": lambda: Guest.born.between(BORN, BORN),
    "is, with a value": lambda: Guest.name.is_(True),
    "joined with another column": lambda: Guest.name == Visit.name,
    "of an alias": lambda: aliased(Guest).name == "Jane",
    "on the right": lambda: "Jane" + Guest.name,
    "sorted": Guest.name.desc,
}


@pytest.mark.parametrize("comparison", COMPARISONS)
def test_comparing_raises_and_names_the_blind_index(comparison: str) -> None:
    with pytest.raises(InvalidRequestError, match="blind index"):
        COMPARISONS[comparison]()


def test_whether_there_is_a_value_may_be_asked(engine: Engine) -> None:
    add(engine, Guest(id=1, name="Jane"), Guest(id=2, name=None))
    with session_scope(engine, read_only=True) as session:
        assert list(session.scalars(select(Guest.id).where(Guest.name.is_(None)))) == [2]
        assert list(session.scalars(select(Guest.id).where(Guest.name.is_not(None)))) == [1]
        assert session.scalar(select(func.count(Guest.name))) == 1


def test_a_value_cannot_be_written_into_the_text_of_a_statement_and_is_not_shown(
    engine: Engine,
) -> None:
    statement = insert(Guest).values(name="Jane")
    with pytest.raises(SQLAlchemyError) as refusal:
        statement.compile(engine, compile_kwargs={"literal_binds": True})
    assert "Jane" not in str(refusal.value)
    assert "Jane" not in str(statement.compile(engine))
    with session_scope(engine) as session:
        session.execute(statement)
    assert read(engine, Guest.name) == ["Jane"]


def test_bulk_writes_and_streamed_reads_seal_and_open_too(engine: Engine) -> None:
    names = [f"guest {number}" for number in range(2_500)]
    with session_scope(engine) as session:
        session.execute(insert(Guest), [{"name": name} for name in names])
    assert all(value.startswith("enc1.") for value in stored(engine, "name"))
    with Session(engine) as session:
        streamed = session.execute(
            select(Guest.name).order_by(Guest.id), execution_options={"yield_per": 100}
        )
        assert [name for (name,) in streamed] == names
        rows = session.scalars(select(Guest).order_by(Guest.id).execution_options(yield_per=100))
        assert [guest.name for guest in rows] == names


def test_one_statement_sets_a_sealed_column_of_many_rows(engine: Engine) -> None:
    add(engine, Guest(id=1, name="Jane"), Guest(id=2, name="Joe"), Guest(id=3, name="Ann"))
    with session_scope(engine) as session:
        session.execute(update(Guest.__table__).values(staff_note="core"))  # type: ignore[arg-type] # a Table
    assert read(engine, Guest.note) == ["core"] * 3
    with session_scope(engine) as session:
        session.execute(update(Guest).where(Guest.id < 3).values(name="changed"))
    assert read(engine, Guest.name) == ["changed", "changed", "Ann"]


def test_aliases_subqueries_and_copies_of_the_table_open_what_the_column_sealed(
    engine: Engine,
) -> None:
    add(engine, Guest(name="Jane"))
    inner = select(Guest.name).subquery()
    copy: Table = Base.metadata.tables["guests"].to_metadata(MetaData())
    for column in (aliased(Guest).name, inner.c.name, copy.c.name):
        assert read(engine, column) == ["Jane"]


INDEX: Final = BlindIndex("users", "email", normalise_email)


@pytest.fixture
def rotated() -> None:
    keyring.install(Keyring(NEW, [OLD]))


def test_a_term_is_bi1_and_key_id_and_half_a_keyed_digest(rotated: None) -> None:
    info = b"".join(
        struct.pack(">H", len(part)) + part for part in (b"blind index", b"users", b"email")
    )
    key = HKDF(algorithm=SHA256(), length=32, salt=b"holdfast/v1", info=info)
    digest = hmac.digest(key.derive(bytes(range(1, 33))), b"jane@example.com", hashlib.sha256)
    raw = NEW.key_id + digest[:16]
    expected = "bi1." + base64.urlsafe_b64encode(raw).decode().rstrip("=")
    assert INDEX.term("jane@example.com") == expected


@pytest.mark.parametrize(
    "spelling",
    [
        "jane@example.com",
        "JANE@Example.COM",
        "  jane@example.com\n",
        # The same letters in full width.
        "\uff4a\uff41\uff4e\uff45@example.com",
    ],
)
def test_spellings_of_one_mailbox_have_one_term(rotated: None, spelling: str) -> None:
    assert INDEX.term(spelling) == INDEX.term("jane@example.com")


def test_composed_and_decomposed_letters_and_their_cases_have_one_term(rotated: None) -> None:
    spellings = ("zoë@straße.example", "zoe\u0308@straße.example", "ZOË@STRASSE.EXAMPLE")
    assert len({INDEX.term(spelling) for spelling in spellings}) == 1


def test_other_mailboxes_columns_and_keys_have_other_terms(rotated: None) -> None:
    addresses = (
        "jane@example.com",
        "jan@example.com",
        "jane@example.org",
        "jane+1@example.com",
        "",
    )
    terms = {INDEX.term(address) for address in addresses}
    for names in (("users", "phone"), ("guests", "email"), ("user", "semail")):
        terms.add(BlindIndex(*names, normalise_email).term("jane@example.com"))
    keyring.install(Keyring(OLD))
    terms.add(INDEX.term("jane@example.com"))
    assert len(terms) == len(addresses) + 3 + 1


def test_after_a_rotation_a_person_is_still_found_by_the_previous_keys_term() -> None:
    keyring.install(Keyring(OLD))
    stored_before = INDEX.term("jane@example.com")
    assert INDEX.terms("Jane@example.com") == [stored_before]
    keyring.install(Keyring(NEW, [OLD]))
    assert INDEX.terms("Jane@example.com") == [INDEX.term("jane@example.com"), stored_before]
    assert INDEX.term("jane@example.com") != stored_before
