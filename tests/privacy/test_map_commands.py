"""`map show`, `map check` and `map records`: what they print, and how they end."""

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from sqlalchemy import text

from backend.db_utils import session_scope
from tests.conftest import Run, Service


def test_map_show_needs_no_database(run: Run, tmp_path: Path) -> None:
    answer = run("map", "show")
    assert answer.code == 0, answer.err
    lines = [" ".join(line.split()) for line in answer.out.splitlines()]
    for line in (
        "invoice_lines (owned): Invoicing",
        "to the person: invoice_lines.invoice_id > invoices.user_id > users",
        "or, where that is NULL: payments.booking_id > bookings.user_id > users",
        "referred to by: bookings.billing_address_id",
        "companions.full_name user.name null about a third party, encrypted",
        "invoices.billing_name user.name null kept by law, encrypted",
        "users.email_index user.contact.email null not exported, finds by email, keyed hash",
        "users.is_active user.account constant becomes False",
        "bookings.hotel not personal which house",
    ):
        assert line in lines, line
    document = run("map", "show", "--json").json
    assert (document["format"], document["version"]) == ("holdfast-data-map", 1)
    (users,) = (table for table in document["tables"] if table["name"] == "users")
    (email,) = (column for column in users["columns"] if column["name"] == "email")
    assert (email["personal"]["category"], email["protection"]) == (
        "user.contact.email",
        "encrypted",
    )
    assert list(tmp_path.iterdir()) == []


def test_map_check_passes_until_the_database_has_what_the_map_has_not(
    run: Run, service: Service
) -> None:
    passed = run("map", "check")
    assert (passed.code, passed.out) == (0, "no drift\n"), passed.err
    with session_scope() as session:
        session.execute(text("ALTER TABLE bookings ADD COLUMN nickname TEXT"))
        session.execute(text("ALTER TABLE feedback DROP COLUMN comment"))
    failed = run("map", "check")
    assert failed.code == 1
    assert failed.out == (
        "bookings.nickname: is in the database and not in the data map\n"
        "feedback.comment: is in the data map and not in the database\n"
    )
    as_json = run("map", "check", "--json")
    assert as_json.code == 1
    assert [one["where"] for one in as_json.json["drift"]] == [
        "bookings.nickname",
        "feedback.comment",
    ]


def test_a_table_that_the_operator_leaves_out_is_shown_and_is_no_failure(
    run: Run, sqlite_service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    with closing(sqlite3.connect(sqlite_service.folder / "holdfast.db")) as connection:
        connection.execute("CREATE TABLE old_guests (name TEXT)")
    assert run("map", "check").code == 1
    # What is in the map is never left out, and what is not there is not spoken of.
    monkeypatch.setenv("DATA_MAP_IGNORE", "old_guests,users,nowhere")
    answer = run("map", "check")
    assert answer.code == 0
    assert answer.out == "left out by DATA_MAP_IGNORE: old_guests\nno drift\n"
    assert run("map", "check", "--json").json == {"drift": [], "left_out": ["old_guests"]}
    with closing(sqlite3.connect(sqlite_service.folder / "holdfast.db")) as connection:
        connection.execute("ALTER TABLE users RENAME COLUMN street TO road")
    assert run("map", "check").code == 1


def test_map_check_without_a_database_is_refused(run: Run, tmp_path: Path) -> None:
    answer = run("map", "check")
    assert answer.code == 2
    assert "python db_cli.py init" in answer.err


def test_records_are_written_as_a_page_once_and_printed_as_lines(
    run: Run, sqlite_service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CONTROLLER_NAME", "Hotel & Sons")
    file = tmp_path / "records.html"
    written = run("map", "records", "-o", file)
    assert (written.code, written.out) == (0, f"written to {file}\n")
    assert "Hotel &amp; Sons" in file.read_text()
    again = run("map", "records", "-o", file)
    assert (again.code, again.err) == (2, f"holdfast: {file} exists already\n")
    assert run("map", "records", "--json", "-o", tmp_path / "two").code == 2
    lines = run("map", "records").out.splitlines()
    assert lines[0].startswith("controller: Hotel & Sons, ")
    assert "Receiving everybody who stays" in lines
    assert "  people: users; others whom companions name" in lines
    assert run("map", "records", "--json").json["controller"]["name"] == "Hotel & Sons"
