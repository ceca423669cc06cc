"""Kinds of encrypted columns, and values that open in their own row only."""

import uuid
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import Engine, Text, Uuid, insert, select, text, type_coerce, update
from sqlalchemy.exc import InvalidRequestError, StatementError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, aliased, mapped_column

from backend.crypto import keyring
from backend.crypto.codecs import CODECS, UnencodableError
from backend.crypto.columns import Encrypted, RowEncrypted
from backend.crypto.keyring import Keyring, RootKey
from backend.db_utils import make_engine, session_scope
from backend.errors import TamperedError


class Base(DeclarativeBase):
    pass


class Note(Base):
    __tablename__ = "notes"

    id: Mapped[uuid.UUID] = mapped_column(Uuid, primary_key=True, default=uuid.uuid4)
    words: Mapped[str | None] = mapped_column(RowEncrypted())
    answer: Mapped[Any] = mapped_column(RowEncrypted("json"), nullable=True)


class Mark(Base):
    __tablename__ = "marks"

    code: Mapped[str] = mapped_column(primary_key=True)
    words: Mapped[str | None] = mapped_column(RowEncrypted())


class Kinds(Base):
    __tablename__ = "kinds"

    id: Mapped[int] = mapped_column(primary_key=True)
    raw: Mapped[bytes | None] = mapped_column(Encrypted("bytes"))
    price: Mapped[Decimal | None] = mapped_column(Encrypted("decimal"))
    answers: Mapped[Any] = mapped_column(Encrypted("json"), nullable=True)


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    keyring.install(Keyring(RootKey(bytes(range(32)))))
    engine = make_engine(f"sqlite:///{tmp_path / 'notes.db'}")
    with session_scope(engine) as session:
        Base.metadata.create_all(session.connection())
    yield engine
    engine.dispose()


def words(session: Session) -> list[str | None]:
    return sorted(session.scalars(select(Note.words)), key=str)


def test_what_the_orm_writes_and_changes_is_read_back(engine: Engine) -> None:
    with session_scope(engine) as session:
        session.add_all([Note(words="one"), Note(words=None), Note(words="", answer={"a": [1]})])
    with session_scope(engine) as session:
        assert words(session) == ["", None, "one"]
        note = session.scalars(select(Note).where(Note.answer.is_not(None))).one()
        note.words = "changed"
    with session_scope(engine) as session:
        assert words(session) == [None, "changed", "one"]
        other = aliased(Note)
        answers = session.scalars(select(other.answer).where(other.answer.is_not(None)))
        assert answers.all() == [{"a": [1]}]
        for note in session.scalars(select(Note).execution_options(yield_per=1)):
            assert note.words in {None, "changed", "one"}


def test_bulk_inserts_and_updates_by_key_are_bound_too(engine: Engine) -> None:
    first, second = uuid.uuid4(), uuid.uuid4()
    with session_scope(engine) as session:
        session.execute(insert(Note), [{"id": first, "words": "one"}, {"words": "two"}])
        session.execute(insert(Note).values(id=second, words="three"))
        session.execute(insert(Mark), [{"code": "a-b", "words": "four"}])
    with session_scope(engine) as session:
        assert words(session) == ["one", "three", "two"]
        assert session.scalars(select(Mark.words)).one() == "four"
        session.execute(update(Note), [{"id": first, "words": "1"}, {"id": second, "words": "3"}])
    with session_scope(engine) as session:
        assert words(session) == ["1", "3", "two"]


def test_a_value_moved_to_another_row_or_column_does_not_open(engine: Engine) -> None:
    one, two = uuid.uuid4(), uuid.uuid4()
    with session_scope(engine) as session:
        session.add_all([Note(id=one, words="one", answer=1), Note(id=two, words="two")])
    raw = type_coerce(Note.words, Text)
    with session_scope(engine) as session:
        token = session.scalar(select(raw).where(Note.id == one))
        session.execute(
            text("UPDATE notes SET words = :t WHERE id = :i"), {"t": token, "i": two.hex}
        )
    with session_scope(engine) as session:
        assert session.scalar(select(Note.words).where(Note.id == one)) == "one"
        with pytest.raises(TamperedError):
            session.scalar(select(Note.words).where(Note.id == two))
        session.execute(text("UPDATE notes SET answer = words"))
        with pytest.raises(TamperedError):
            session.scalar(select(Note.answer).where(Note.id == one))


def test_a_statement_that_does_not_tell_the_row_is_refused_and_shows_nothing(
    engine: Engine,
) -> None:
    statements = [
        update(Note).values(words="secret words"),
        insert(Note).values([{"words": "secret words"}, {"words": "more"}]),
        insert(Mark).values(code="with space", words="secret words"),
    ]
    with session_scope(engine) as session:
        for statement in statements:
            with pytest.raises((InvalidRequestError, StatementError)) as refusal:
                session.execute(statement)
            assert "secret" not in str(refusal.value)
    with session_scope(engine) as session:
        assert words(session) == []


def test_bytes_decimals_and_json_come_back_as_they_were(engine: Engine) -> None:
    answers = {"text": "äß\U0001f600", "list": [1, 2.5, None, True], "empty": {}}
    row = Kinds(id=1, raw=b"\x00\xff", price=Decimal("19.90"), answers=answers)
    with session_scope(engine) as session:
        session.add_all([row, Kinds(id=2)])
    with session_scope(engine) as session:
        found = session.get_one(Kinds, 1)
        assert (found.raw, str(found.price), found.answers) == (b"\x00\xff", "19.90", answers)
        empty = session.get_one(Kinds, 2)
        assert (empty.raw, empty.price, empty.answers) == (None, None, None)
        stored = session.execute(text("SELECT raw, price, answers FROM kinds WHERE id = 1")).one()
        assert all(token.startswith("enc1.") for token in stored)


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=60)
@given(
    st.one_of(
        st.tuples(st.just("str"), st.text()),
        st.tuples(st.just("bytes"), st.binary()),
        st.tuples(st.just("date"), st.dates()),
        st.tuples(st.just("decimal"), st.decimals(allow_nan=False, allow_infinity=False)),
        st.tuples(st.just("json"), json_values),
    )
)
def test_every_kind_is_written_and_read_back(case: tuple[str, Any]) -> None:
    name, value = case
    codec = CODECS[name]
    assert codec.decode(codec.encode(value)) == value


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("str", 7), ("str", b"bytes"), ("str", "\ud800"), ("bytes", "text"), ("date", "2026-01-02"),
        ("date", True), ("decimal", 1.5), ("decimal", 1), ("json", float("nan")),
        ("json", float("inf")), ("json", {1: object()}), ("json", "\ud800"),
    ],
)  # fmt: skip
def test_a_value_of_another_kind_is_refused_and_not_shown(name: str, value: Any) -> None:
    with pytest.raises(UnencodableError) as refusal:
        CODECS[name].encode(value)
    assert repr(value) not in str(refusal.value)
    assert refusal.value.__cause__ is None
