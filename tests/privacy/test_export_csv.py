"""CSV: no spreadsheet runs it, whatever separates its cells, and nothing of a text is lost."""

import csv
import io
import json
from datetime import UTC, date, datetime

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from backend.db_utils import session_scope
from backend.models import User
from backend.privacy.export_csv import BYTE_ORDER_MARK
from tests.conftest import Service
from tests.privacy import people
from tests.privacy.reading_back import (
    export,
    lines,
    members,
    tables_of_csv,
    tables_of_zip,
    text_of,
)

NASTY = st.text(alphabet=st.sampled_from("=+-@'\"\t\r\n\0 ,;|a\u00fc\uff1d\u2028\U0001f600"))
FORMULAS = (
    "=1+1", "+49 30 1", "-1", "@SUM(A1)", "\t=1", "\r=1", "\n=1", "\0=1", "\uff1d1+1", " =1",
    "x;=1", 'x";=1', "x\n=1", "x\t=1", "x|=1", "x,\xa0=1", 'x;"=1', "'", "'=1", "''", "",
)  # fmt: skip


def is_formula(cell: str) -> bool:
    """Whether a spreadsheet that trims what it can would take *cell* for a formula."""
    return cell.lstrip(' \xa0\t\r\n\0"').startswith(tuple("=+-@\uff1d\uff0b\uff0d\uff20"))


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
def test_no_cell_is_a_formula_whatever_a_spreadsheet_takes_for_its_separator(
    sqlite_service: Service, separator: str
) -> None:
    user_id = sqlite_service.user("jane@example.com")
    day = date(2026, 1, 2)
    sqlite_service.add(*(people.booking(user_id, day, staff_notes=text) for text in FORMULAS))
    files = members(export(user_id, "zip"))
    for content in (export(user_id, "csv"), files["tables/bookings.csv"]):
        text = content.decode("utf-8-sig")
        # As a spreadsheet reads it: quoted as the format says, or every quote for a sign.
        for quoting in (csv.QUOTE_MINIMAL, csv.QUOTE_NONE):
            reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, quoting=quoting)
            assert not [cell for line in reader for cell in line if is_formula(cell)]


def test_what_stands_before_a_formula_can_be_told_from_what_was_there(service: Service) -> None:
    texts = [text for text in FORMULAS if service.engine == "sqlite" or "\0" not in text]
    user_id = service.user("jane@example.com")
    day = date(2026, 1, 2)
    service.add(*(people.booking(user_id, day, staff_notes=text) for text in (*texts, None)))
    document = json.loads(export(user_id))["data"]
    assert [row["staff_notes"] for row in document["bookings"]] == [*texts, None]
    archive = export(user_id, "zip")
    assert tables_of_zip(archive) == document
    cells = [line["staff_notes"] for line in lines(members(archive)["tables/bookings.csv"])]
    assert len(set(cells)) == len(cells)
    assert cells[:2] == ["'=1+1", "'+49 30 1"]
    assert cells[-2:] == ["'", ""]


@given(words=NASTY | st.text(), reply=NASTY | st.none())
@example(words='"a";b,\n\r\n', reply="\x00")
@example(words="", reply=None)
@settings(
    max_examples=20,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
def test_json_csv_zip_and_database_agree_in_every_field_of_any_text(
    sqlite_service: Service, words: str, reply: str | None
) -> None:
    now = datetime.now(UTC)
    user = User(created_at=now)
    with session_scope() as session:
        session.add(user)
        session.flush()
        session.add(people.feedback(user.id, now, comment=words, staff_response=reply))
    archive = export(user.id, "zip")
    document = json.loads(members(archive)["export.json"])["data"]
    (row,) = document["feedback"]
    assert (row["comment"], row["staff_response"]) == (words, reply)
    assert tables_of_zip(archive) == document
    assert tables_of_csv(export(user.id, "csv")) == {
        t: rows for t, rows in document.items() if rows
    }


def test_a_spreadsheet_is_told_that_the_tables_are_utf_8_and_a_program_gets_the_header_first(
    sqlite_service: Service,
) -> None:
    user_id = sqlite_service.user("jane@example.com", full_name="J\u00fcrgen")
    for name, content in members(export(user_id, "zip")).items():
        assert content.startswith(BYTE_ORDER_MARK) == name.endswith(".csv")
    assert export(user_id, "csv").startswith(b"data_type,record,field,value\r\n")


def test_a_reader_takes_away_only_what_was_put_there() -> None:
    assert text_of("'=1") == "=1"
    assert text_of("it's; 'tis") == "it's; 'tis"
    assert text_of("a,' -b") == "a, -b"
