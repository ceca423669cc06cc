"""The command line: it does what it says, and every refusal is one line and exit code 2."""

import json
import os
import stat
from pathlib import Path

import pytest
from sqlalchemy import func, select

from backend.db_utils import session_scope
from backend.models import Booking, User
from tests.conftest import ADMIN, PASSWORD, Run, Service


def test_init_makes_the_first_admin_and_shows_the_password_once(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DATA_DIR", str(tmp_path / "new"))
    first, second = run("init"), run("init")
    assert first.code == second.code == 0
    assert "password, shown this once: " in first.out
    assert "password" not in second.out


def test_a_created_account_signs_in_with_a_password_from_stdin(run: Run, service: Service) -> None:
    assert (
        run("create-user", "eve@example.com", "--password-stdin", stdin=f"{PASSWORD}\n").code == 0
    )
    again = run("create-user", "EVE@example.com", "--password-stdin", stdin=f"{PASSWORD}\n")
    assert again.code == 2
    assert again.err == "holdfast: this e-mail address has an account already\n"
    assert run("set-password", "eve@example.com", "--password-stdin", stdin="short\n").code == 2
    unknown = run("set-password", "nobody@example.com", "--password-stdin", stdin=f"{PASSWORD}\n")
    assert unknown.code == 2


def test_load_fills_the_model_and_spreads_bookings_over_guests(run: Run, service: Service) -> None:
    answer = run("load", "--count", "60", "--guests", "20", "--json")
    assert answer.code == 0, answer.err
    assert answer.json["bookings"] == 60
    assert answer.json["users"] == 20
    with session_scope(read_only=True) as session:
        per_guest = session.execute(
            select(func.count()).select_from(Booking).group_by(Booking.user_id)
        ).scalars()
        assert set(per_guest) == {3}
    # A second load goes beside the first, and accounts can still be made.
    assert run("load", "--count", "10").code == 0
    assert run("create-user", "x@example.com", "--password-stdin", stdin=f"{PASSWORD}\n").code == 0


HEADER = (
    "hotel,is_canceled,lead_time,arrival_date_year,arrival_date_month,arrival_date_week_number,"
    "arrival_date_day_of_month,stays_in_weekend_nights,stays_in_week_nights,adults,children,"
    "babies,meal,country,market_segment,distribution_channel,is_repeated_guest,"
    "previous_cancellations,previous_bookings_not_canceled,reserved_room_type,assigned_room_type,"
    "booking_changes,deposit_type,agent,company,days_in_waiting_list,customer_type,adr,"
    "required_car_parking_spaces,total_of_special_requests,reservation_status,"
    "reservation_status_date\n"
)
LINE = (
    "Resort Hotel,0,342,2015,July,27,1,1,2,2,NA,0,BB,PRT,Direct,Direct,0,0,0,C,C,3,No Deposit,"
    "NULL,NULL,0,Transient,75.5,0,1,Check-Out,7/4/2015\n"
)


def test_a_line_of_the_bookings_file_arrives_whole(
    run: Run, service: Service, tmp_path: Path
) -> None:
    file = tmp_path / "bookings.csv"
    file.write_text(HEADER + LINE)
    assert run("load", "--bookings", str(file)).code == 0
    with session_scope(read_only=True) as session:
        booking = session.scalars(select(Booking)).one()
        found = (str(booking.check_in), str(booking.check_out), str(booking.status_date))
        assert found == ("2015-07-01", "2015-07-04", "2015-07-04")
        assert (booking.adr_minor, booking.children, booking.agent) == (7550, None, None)
        assert (booking.lead_time_days, booking.created_at.date().isoformat()) == (
            342,
            "2014-07-24",
        )
        assert booking.special_requests


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (HEADER + LINE.replace("July", "Juli"), "line 2 of the bookings file: arrival_date_month"),
        (HEADER + LINE + LINE.replace("75.5", "-1"), "line 3 of the bookings file: adr"),
        (HEADER + LINE.replace("75.5", "1.005"), "line 2 of the bookings file: adr"),
        ("a,b\n1,2\n", "line 2 of the bookings file: hotel"),
        (HEADER, "the file has no bookings"),
        ("\xff\xfe", "the bookings file cannot be read"),
    ],
)
def test_a_bookings_file_that_cannot_be_read_names_the_place_and_loads_nothing(
    run: Run, sqlite_service: Service, tmp_path: Path, content: str, words: str
) -> None:
    file = tmp_path / "bookings.csv"
    file.write_bytes(content.encode("latin-1"))
    answer = run("load", "--bookings", str(file))
    assert answer.code == 2
    assert answer.err.startswith("holdfast: ")
    assert words in answer.err
    with session_scope(read_only=True) as session:
        assert session.scalar(select(func.count()).select_from(User)) == 1


def test_an_export_is_written_whole_for_its_owner_only_and_never_over_a_file(
    run: Run, service: Service, tmp_path: Path
) -> None:
    service.user("eve@example.com", full_name="Eve")
    out = tmp_path / "eve.json"
    assert run("export", "2", "-o", str(out)).code == 0
    assert json.loads(out.read_bytes())["data"]["users"][0]["full_name"] == "Eve"
    assert stat.S_IMODE(out.stat().st_mode) == 0o600
    before = out.read_bytes()
    assert run("export", "2", "-o", str(out)).code == 2
    assert run("export", "99", "-o", str(tmp_path / "no.json")).code == 2
    assert out.read_bytes() == before
    assert not (tmp_path / "no.json").exists()


def test_an_encrypted_export_opens_with_its_passphrase_and_no_other(
    run: Run, sqlite_service: Service, tmp_path: Path
) -> None:
    sealed, opened = tmp_path / "e.hfe", tmp_path / "e.json"
    phrase = "four words and more\n"
    assert run("export", "1", "-o", str(sealed), "--passphrase-stdin", stdin=phrase).code == 0
    assert ADMIN.encode() not in sealed.read_bytes()
    wrong = run("open", str(sealed), "-o", str(opened), "--passphrase-stdin", stdin="other words\n")
    assert wrong.code != 0
    assert not opened.exists()
    assert run("open", str(sealed), "-o", str(opened), "--passphrase-stdin", stdin=phrase).code == 0
    assert json.loads(opened.read_bytes())["data"]["users"][0]["email"] == ADMIN


def test_erase_plans_first_and_then_forgets(run: Run, service: Service) -> None:
    service.user("eve@example.com")
    planned = run("erase", "2", "--dry-run", "--json")
    assert planned.json["tables"]["users"]["deleted"] == 1
    stale = run("erase", "2", "--plan-digest", "0" * 64)
    assert stale.code == 2
    done = run("erase", "2", "--plan-digest", planned.json["plan_digest"], "--json")
    assert done.code == 0
    assert run("consent", "2").code == 2


def test_an_import_brings_an_erased_person_back(run: Run, service: Service, tmp_path: Path) -> None:
    service.user("eve@example.com", full_name="Eve")
    out = tmp_path / "eve.json"
    run("export", "2", "-o", str(out))
    run("erase", "2")
    tried = run("import", str(out), "--dry-run", "--json")
    assert tried.code == 0, tried.err
    assert tried.json["users"]["restored"] == 1
    assert run("consent", "2").code == 2
    assert run("import", str(out)).code == 0
    assert run("consent", "2").code == 0
    out.write_text("[]")
    assert run("import", str(out)).code == 2


def test_retention_says_what_is_due_and_applies_it(run: Run, service: Service) -> None:
    run("load", "--count", "50")
    assert run("retention", "policy", "booking", "P1000Y", "delete").code == 2
    assert run("retention", "policy", "booking", "P5Y", "delete").code == 0
    status = {
        item["data_type"]: item for item in run("retention", "status", "--json").json["items"]
    }
    assert status["booking"]["period"] == "P5Y"
    assert 0 < status["booking"]["due"] < status["booking"]["rows"]
    tried = run("retention", "apply", "--dry-run", "--data-type", "booking", "--json").json
    untold = run("retention", "apply", "--data-type", "booking")
    assert (untold.code, untold.err.splitlines()[-1][:9]) == (2, "holdfast:")
    assert "% of the table" in untold.err
    applied = run(
        "retention", "apply", "--data-type", "booking", "--json",
        "--plan-digest", tried["plan_digest"],
    ).json  # fmt: skip
    assert tried["results"][0]["affected"] == applied["results"][0]["affected"]
    assert tried["results"][0]["affected"] == status["booking"]["due"]
    assert "plan digest" in run("retention", "apply", "--dry-run").out


def test_backups_are_made_proven_listed_restored_and_expire(run: Run, service: Service) -> None:
    created = run("backup", "create", "--label", "one", "--json")
    assert created.code == 0, created.err
    made = created.json
    assert run("backup", "verify", made["id"]).code == 0
    listed = run("backup", "list", "--json").json["items"]
    assert [item["id"] for item in listed] == [made["id"]]
    assert listed[0]["verified_at"]
    assert run("backup", "restore", made["id"]).code == 2
    assert run("backup", "restore", made["id"], "--dry-run").code == 0
    assert run("backup", "restore", made["id"], "--confirm").code == 0
    assert run("backup", "restore", "../../etc/passwd", "--confirm").code == 2
    (verdict,) = run("backup", "prune", "--json").json["items"]
    assert (verdict["verdict"], verdict["why"]) == ("kept", "the last good one")


def test_keys_status_counts_what_each_key_protects(run: Run, service: Service) -> None:
    key = run("keys", "generate").out.strip()
    assert len(key) == 44
    status = run("keys", "status", "--json").json
    assert status["keys"][0]["columns"]["users.email"] == 1
    assert run("keys", "status").code == 0


def test_a_command_on_an_unprepared_database_says_what_to_run(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DATA_DIR", str(tmp_path / "new"))
    answer = run("backup", "list")
    assert answer.code == 2
    assert "python db_cli.py init" in answer.err
    assert answer.err.count("\n") == 1


def test_the_demo_keeps_every_promise_and_leaves_nothing_behind(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    # The demo sets its own environment; a copy takes it, so that it ends with the test.
    monkeypatch.setattr(os, "environ", os.environ.copy())
    answer = run("demo", "--json")
    assert answer.code == 0, answer.err
    assert answer.json["ok"] is True
    assert [chapter["ok"] for chapter in answer.json["chapters"]] == [True] * 11
    assert list(tmp_path.iterdir()) == []
