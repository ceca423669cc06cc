"""The scan after an erasure: old values are found wherever they stand, and counted, not shown."""

import json
import logging
import unicodedata
from datetime import UTC, date, datetime
from typing import Any

import pytest
from sqlalchemy import (
    Column,
    Engine,
    MetaData,
    Table,
    Text,
    func,
    insert,
    inspect,
    make_url,
    select,
    text,
    update,
)

from backend.db_utils import get_engine, make_engine, session_scope
from backend.models import DATA_MAP, BackupRecord, BackupStatus, Booking, User
from backend.privacy.old_values import OldValue, old_values
from backend.privacy.scan import Found, Scan, Unread, scan
from backend.privacy.words import Words
from tests.conftest import Service
from tests.privacy.people import booking, feedback, invoice, plant

_DAY = date(2024, 5, 6)
_NAME = OldValue("Zoë Ångström-Quist", "user.name")
_EMAIL = OldValue("zoe.quist@example.com", "user.contact.email")
_PHONE = OldValue("+351 912 345 678", "user.contact.phone_number")
_STREET = OldValue("Rua das Oliveiras 17", "user.contact.address.street")
_VALUES = (_NAME, _EMAIL, _PHONE, _STREET)
_GONE = Words(_VALUES)


def _scan(words: Words = _GONE, engine: Engine | None = None) -> Scan:
    return scan(engine or get_engine(), DATA_MAP, words)


def _run(statement: str, *rows: dict[str, Any]) -> None:
    with session_scope() as session:
        session.execute(text(statement), list(rows) or None)


def _newsletter(*texts: str) -> None:
    """A table that nobody declared."""
    _run("CREATE TABLE newsletter (id INTEGER, email TEXT)")
    _run("INSERT INTO newsletter VALUES (1, :email)", *({"email": one} for one in texts))


def test_a_database_without_the_values_is_clean_and_read_whole(service: Service) -> None:
    plant("K")
    found = _scan()
    assert found.clean
    assert found.tables >= len(inspect(get_engine()).get_table_names())
    with session_scope() as session:
        rows = session.scalar(select(func.count()).select_from(Booking)) or 0
    assert found.cells > rows
    assert (found.namesakes, found.skipped_words) == (0, 0)


@pytest.mark.parametrize("value", _VALUES, ids=lambda v: v.category)
def test_a_value_is_found_in_each_place_where_it_has_no_business(
    service: Service, value: OldValue
) -> None:
    guest = service.user("other@example.com")
    said = f"Came with {value.text}, again."
    service.add(
        booking(guest, _DAY, staff_notes=said),
        booking(guest, _DAY, staff_notes=said, special_requests="a quiet room"),
        invoice(guest, _DAY, note=value.text),
        BackupRecord(
            status=BackupStatus.FAILED, location="-", label=said, created_at=datetime.now(UTC)
        ),
    )
    _newsletter(said, "nobody@example.com", said.upper())
    _run("ALTER TABLE bookings ADD COLUMN legacy_name TEXT")
    _run("UPDATE bookings SET legacy_name = :name WHERE id = 1", {"name": value.text})
    found = _scan()
    assert found.found == (
        Found("backup_records", "label", 1),
        Found("bookings", "legacy_name", 1),
        Found("bookings", "staff_notes", 2),
        Found("invoices", "note", 1),
        Found("newsletter", "email", 2),
    )
    assert not found.clean
    assert (found.namesakes, found.unread) == (0, ())


def test_no_spelling_hides_a_value_and_no_likeness_is_taken_for_one(service: Service) -> None:
    spelled = [
        _EMAIL.text.upper(),
        unicodedata.normalize("NFD", _NAME.text),
        _NAME.text.replace(" ", "\u00a0"),
        _NAME.text.replace(" ", " \n\t"),
        "\uff3aoe.quist@example.com",  # A wide letter, as some keyboards give.
        json.dumps({"who": _NAME.text}),  # "Zo\\u00eb"
        json.dumps({"text": f"x\n{_STREET.text}"}),
        "00351912345678",
        "tel:912-345-678",
        "(+351) 912.345.678",
        "call 912 / 345 / 678 today",
    ]
    alike = ["zoe.quist@example.org", "Zoë Quist", "+351 912 345 67", "9123456789", "Rua 17"]
    every = {f"c{number:02d}": one for number, one in enumerate(spelled + alike)}
    columns = (Column(name, Text) for name in every)
    newsletter = Table("newsletter", MetaData(), *columns)
    newsletter.create(get_engine())
    with session_scope() as session:
        session.execute(insert(newsletter), [every])
    # Among many words they are looked for in another way.
    many = Words([*_VALUES, *(OldValue(f"{n:x}-of-many-words", "user.name") for n in range(500))])
    for words in (_GONE, many):
        assert [every[one.column] for one in _scan(words).found] == spelled


def test_somebody_elses_own_same_value_is_no_finding(service: Service) -> None:
    namesake = service.user("other@example.com", full_name=_NAME.text, street=_STREET.text)
    service.add(
        booking(namesake, _DAY, contact_phone="912345678"),
        # The law keeps it; an address holds its street.
        invoice(None, _DAY, billing_name=_NAME.text, billing_address=f"{_STREET.text}, Porto"),
    )
    found = _scan()
    assert found.clean
    assert found.namesakes == 5

    # The e-mail in a column of names is nobody's name.
    with session_scope() as session:
        session.get_one(User, namesake).full_name = f"{_NAME.text} ({_EMAIL.text})"
    found = _scan()
    assert found.found == (Found("users", "full_name", 1),)
    assert found.namesakes == 4


def test_a_category_that_only_begins_alike_is_another(service: Service) -> None:
    guest = service.user("other@example.com", full_name="Known Cookie 77")
    words = Words([OldValue("Known Cookie 77", "user.name_of_device")])
    assert _scan(words).found == (Found("users", "full_name", 1),)
    assert guest


def test_a_damaged_cell_is_told_and_the_rest_is_still_read(service: Service) -> None:
    guest = service.user("other@example.com", staff_notes=f"Sister of {_NAME.text}.")
    service.add(
        booking(guest, _DAY, staff_notes="to be damaged"),
        booking(guest, _DAY, staff_notes="to be replaced"),
        booking(guest, _DAY, staff_notes=_EMAIL.text),
        feedback(guest, datetime.now(UTC), comment=_PHONE.text),
    )
    _run("UPDATE bookings SET staff_notes = substr(staff_notes, 1, 40) WHERE id = 1")
    # Plain text where a token belongs: not opened, and searched as it is.
    _run("UPDATE bookings SET staff_notes = :plain WHERE id = 2", {"plain": _STREET.text})
    found = _scan()
    assert found.found == (
        Found("bookings", "staff_notes", 2),
        Found("feedback", "comment", 1),
        Found("users", "staff_notes", 1),
    )
    assert found.unread == (
        Unread("bookings", "malformed_token", "staff_notes", 1),
        Unread("bookings", "not_encrypted", "staff_notes", 1),
    )
    assert not found.clean


def test_a_copy_of_sealed_cells_that_nothing_opens_is_told(service: Service) -> None:
    guest = service.user("other@example.com")
    service.add(booking(guest, _DAY, staff_notes=_NAME.text))
    _run("CREATE TABLE copied AS SELECT id, staff_notes FROM bookings")
    _run("UPDATE bookings SET staff_notes = NULL")
    found = _scan()
    assert found.found == ()
    assert found.unread == (Unread("copied", "sealed", "staff_notes", 1),)
    assert not found.clean


def test_a_table_that_is_gone_is_told_and_the_others_are_read(service: Service) -> None:
    _newsletter(_EMAIL.text)
    _run("DROP TABLE feedback")
    found = _scan()
    assert found.unread == (Unread("feedback", "missing"),)
    assert found.found == (Found("newsletter", "email", 1),)


def test_sqlite_hides_no_text_behind_a_type(sqlite_service: Service) -> None:
    service = sqlite_service
    guest = service.user("other@example.com")
    service.add(booking(guest, _DAY))
    _run("UPDATE bookings SET week_nights = :x", {"x": _EMAIL.text})
    _run("UPDATE bookings SET adults = :x", {"x": _EMAIL.text.encode()})
    _run("CREATE TABLE odd (n INTEGER, b BLOB, d DATE, bad TEXT)")
    _run(
        "INSERT INTO odd VALUES (:n, :b, :d, CAST(:bad AS TEXT))",
        {"n": 351912345678, "b": f"x{_NAME.text}".encode(), "d": _EMAIL.text, "bad": b"\xff\xfe"},
        {"n": 1, "b": b"\xff\xfe\x00", "d": None, "bad": b"\xff " + _EMAIL.text.encode()},
    )
    found = _scan()
    assert found.found == (
        Found("bookings", "adults", 1),
        Found("bookings", "week_nights", 1),
        Found("odd", "b", 1),
        Found("odd", "bad", 1),
        Found("odd", "d", 1),
        Found("odd", "n", 1),
    )
    assert found.unread == ()


only_postgresql = pytest.mark.parametrize("service", ["postgresql"], indirect=True)


@only_postgresql
def test_postgresql_hides_no_text_behind_a_type_or_schema(service: Service) -> None:
    kinds = {"j": "JSON", "jb": "JSONB", "a": "TEXT[]", "b": "BYTEA", "c": "CHAR(40)"}
    _run(f"CREATE TABLE odd ({', '.join(f'{name} {kind}' for name, kind in kinds.items())})")
    _run(
        "INSERT INTO odd VALUES (:j, CAST(CAST(:j AS JSON) AS JSONB), ARRAY[:a], :b, :c)",
        {
            "j": json.dumps([_NAME.text]),
            "a": f'a "{_NAME.text}"',
            "b": _EMAIL.text.encode() + b"\xff",
            "c": _EMAIL.text,
        },
    )
    _run('CREATE SCHEMA "Old %"')
    _run('CREATE TABLE "Old %".users ("full name" TEXT, phone BIGINT)')
    _run('INSERT INTO "Old %".users VALUES (:name, 351912345678)', {"name": _NAME.text})
    _run("CREATE TABLE parts (email TEXT) PARTITION BY LIST (email)")
    _run("CREATE TABLE part_one PARTITION OF parts DEFAULT")
    _run("INSERT INTO parts VALUES (:x)", {"x": _EMAIL.text})
    _run("CREATE MATERIALIZED VIEW copied AS SELECT email FROM parts")
    found = _scan()
    assert set(found.found) == {
        *(Found("odd", name, 1) for name in kinds),
        Found("Old %.users", "full name", 1),
        Found("Old %.users", "phone", 1),
        Found("parts", "email", 1),
        Found("copied", "email", 1),
    }
    assert found.unread == ()


@only_postgresql
def test_a_table_that_may_not_be_read_is_told(service: Service) -> None:
    _newsletter(_EMAIL.text)
    role = f"reader_{service.url.rpartition('_')[2]}"
    _run("CREATE TABLE filtered (email TEXT)")
    _run("ALTER TABLE filtered ENABLE ROW LEVEL SECURITY")
    _run(f"CREATE ROLE {role} LOGIN")
    _run(f"GRANT SELECT ON ALL TABLES IN SCHEMA public TO {role}")
    _run("CREATE TABLE secret (email TEXT)")
    engine = make_engine(
        make_url(service.url).set(username=role).render_as_string(hide_password=False)
    )
    try:
        found = _scan(engine=engine)
    finally:
        engine.dispose()
        _run(f"DROP OWNED BY {role}")
        _run(f"DROP ROLE {role}")
    assert found.unread == (Unread("filtered", "42501"), Unread("secret", "42501"))
    assert found.found == (Found("newsletter", "email", 1),)


def test_a_short_value_counts_only_where_it_stands_alone_or_is_left_out(service: Service) -> None:
    words = Words(
        [
            OldValue("Anders", "user.name"),
            OldValue("Kim", "user.name"),
            OldValue("10115", "user.contact.address.postal_code"),
        ]
    )
    _newsletter("Andersson", "Mr. Anders!", "Sanders", "anders", "Kim", "10115", "x_anders_y")
    found = _scan(words)
    assert found.found == (Found("newsletter", "email", 3),)
    assert found.skipped_words == 2


def test_the_values_of_a_person_are_collected_as_far_as_they_are_the_persons_alone(
    service: Service,
) -> None:
    user = service.user(
        "zoe.quist@example.com",
        full_name=_NAME.text,
        phone=_PHONE.text,
        city="Vila Nova de Gaia",
        document_type="passport",
        document_number="P12345678",
        staff_notes="late",
    )
    service.user("other@example.com", full_name="Somebody Else")
    users = DATA_MAP["users"]
    with session_scope(read_only=True) as session:
        got = old_values(session, users, users.key == user, 10)
    assert {(value.text, value.category) for value in got.values} == {
        ("zoe.quist@example.com", "user.contact.email"),
        (_NAME.text, "user.name"),
        (_PHONE.text, "user.contact.phone_number"),
        ("P12345678", "user.government_id"),
    }
    assert (got.limit_reached, got.closed) == (False, 0)


def test_what_the_limit_leaves_out_and_what_does_not_open_is_told(service: Service) -> None:
    guest = service.user("other@example.com")
    texts = ["Allergic to feathers.", "Allergic to feathers.", "Arrives by boat.", "to be damaged"]
    service.add(*(booking(guest, _DAY, staff_notes=one) for one in texts))
    _run("UPDATE bookings SET staff_notes = substr(staff_notes, 1, 40) WHERE id = 4")
    bookings = DATA_MAP["bookings"]
    with session_scope(read_only=True) as session:
        rows = bookings.table.c.user_id == guest
        whole = old_values(session, bookings, rows, len(texts))
        cut = old_values(session, bookings, rows, len(texts) - 1)
        few = old_values(session, bookings, rows, 2)
    assert {value.text for value in whole.values if value.category == "user.content"} == {
        "Allergic to feathers.",
        "Arrives by boat.",
    }
    assert (whole.limit_reached, whole.closed) == (False, 1)
    assert cut.limit_reached
    assert (few.limit_reached, few.closed) == (True, 0)


def test_every_mark_of_a_planted_person_is_found_when_it_is_left(service: Service) -> None:
    person = plant("X")
    words: list[OldValue] = []
    with session_scope(read_only=True) as session:
        for mapped in DATA_MAP.of_people:
            keys = person.keys.get(mapped.name, [])
            words += old_values(session, mapped, mapped.key.in_(keys), 100).values
    _newsletter(*(value.text for value in words if len(value.text) >= 5))
    found = _scan(Words(words))
    assert len(words) > 20
    assert found.found == (
        Found("newsletter", "email", sum(len(value.text) >= 5 for value in words)),
    )
    # Nothing was erased, so the person's own cells are there still, as somebody's own.
    assert found.namesakes >= len(words)


def test_nothing_of_a_value_is_told_or_logged(
    service: Service, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    guest = service.user("other@example.com", full_name=_NAME.text)
    service.add(booking(guest, _DAY, staff_notes=_NAME.text))
    with session_scope() as session:
        session.execute(update(Booking).values(agent=_STREET.text))
    _newsletter(_EMAIL.text, "enc1.broken")
    found = _scan()
    users = DATA_MAP["users"]
    with session_scope(read_only=True) as session:
        collected = old_values(session, users, users.key == guest, 1)
    assert len(found.found) == 3
    said = "\n".join([repr(found), repr(collected), repr(_NAME), repr(_GONE), caplog.text])
    for value in (_NAME, _EMAIL, _STREET):
        assert value.text not in said
