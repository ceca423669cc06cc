"""The commands around an erasure: finding, erasing, replaying, and checking the certificate."""

import json
import os
import resource
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest
from sqlalchemy import select

from backend.crypto import certificates, signing
from backend.db_utils import session_scope
from backend.models import User
from tests.conftest import Answer, Run, Service, clear_caches
from tests.privacy import people
from tests.privacy.people import dump, without

ROOT: Final = Path(__file__).resolve().parents[1]
ZOE: Final = "zoe.zaunkoenig@example.com"
PHONE: Final = "+49 30 1234567"


def is_refused(answer: Answer) -> bool:
    """One line that says why, and nothing else."""
    line = answer.err
    return (answer.code, answer.out, line.count("\n"), line[:10]) == (2, "", 1, "holdfast: ")


def is_there(user_id: int) -> bool:
    with session_scope(read_only=True) as session:
        return session.scalar(select(User.id).where(User.id == user_id)) is not None


@pytest.fixture
def zoe(service: Service) -> int:
    return service.user(ZOE, full_name="Zoe Zaunkoenig", phone=PHONE)


@pytest.fixture
def sqlite_zoe(sqlite_service: Service) -> int:
    return sqlite_service.user(ZOE, full_name="Zoe Zaunkoenig", phone=PHONE)


# Naming a person


def test_a_person_is_found_by_an_address_from_stdin(run: Run, zoe: int) -> None:
    for line in (ZOE.upper(), "0049 (0)30 / 123 45 67"):
        found = run("find", "--json", stdin=f"{line}\n").json
        assert (found["user_id"], found["named_in"]) == (zoe, [])
        assert len(found["subject_ref"]) == 32
    assert f"user_id      {zoe}\n" in run("find", stdin=ZOE).out
    for line in ("nobody@example.com\n", "", "\n", "  \n", f"{ZOE} {ZOE}\n"):
        answer = run("find", stdin=line)
        assert is_refused(answer), line
        assert "nobody" not in answer.err.removeprefix("holdfast: nobody here has")
        assert "example" not in answer.err


def test_no_command_takes_an_address_as_an_argument(
    run: Run, sqlite_zoe: int, tmp_path: Path
) -> None:
    for arguments in (("find", ZOE), ("erase", ZOE), ("export", ZOE, "-o", tmp_path / "x")):
        assert run(*arguments, stdin=ZOE).code == 2
    assert is_there(sqlite_zoe)
    assert not (tmp_path / "x").exists()


def test_an_export_takes_an_address_and_then_a_passphrase_from_stdin(
    run: Run, sqlite_zoe: int, tmp_path: Path
) -> None:
    plain, sealed, opened = (tmp_path / name for name in ("plain", "sealed", "opened"))
    assert run("export", "--address-stdin", "-o", plain, stdin=f"{PHONE}\n").code == 0
    document = json.loads(plain.read_bytes())
    assert document["subject"] == {"user_id": sqlite_zoe}
    assert [row["email"] for row in document["data"]["users"]] == [ZOE]
    phrase = "four words and more"
    both = ("export", "--address-stdin", "--passphrase-stdin", "-o", sealed)
    assert run(*both, stdin=f"{ZOE}\n{phrase}\n").code == 0
    assert run("open", sealed, "-o", opened, "--passphrase-stdin", stdin=f"{phrase}\n").code == 0
    assert json.loads(opened.read_bytes())["data"] == document["data"]
    out = tmp_path / "none"
    for arguments in (("2", "--address-stdin"), (), ("--address-stdin",)):
        assert is_refused(run("export", *arguments, "-o", out, stdin="nobody@example.com\n"))
    assert not out.exists()


# Erasing


def test_a_person_is_erased_by_an_address_as_planned_and_the_certificate_is_written(
    run: Run, zoe: int, tmp_path: Path
) -> None:
    file = tmp_path / "certificate.json"
    planned = run("erase", "--address-stdin", "--dry-run", "--json", stdin=f"{ZOE}\n").json
    assert (planned["status"], planned["dry_run"]) == ("planned", True)
    assert "scan" not in planned
    assert is_there(zoe)
    asked = ("erase", "--address-stdin", "--plan-digest", planned["plan_digest"])
    done = run(*asked, "--certificate", file, "--json", stdin=f"{PHONE}\n")
    assert done.code == 0, done.err
    facts = done.json
    assert facts["tables"] == planned["tables"]
    assert (facts["status"], facts["scan"]["state"]) == ("complete", "clean")
    assert not is_there(zoe)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    shown = run("certificate", "show", facts["erasure_id"])
    assert shown.out.encode() == file.read_bytes()
    spelled = run("certificate", "key").out.strip()
    statement = certificates.verify(file.read_bytes(), signing.parse_public_key(spelled))
    assert statement["erasure_id"] == facts["erasure_id"]
    assert statement["scan"] == facts["scan"]
    for text in (done.out, shown.out):
        assert ZOE not in text
        assert "1234567" not in text


def test_what_the_scan_finds_is_told(run: Run, sqlite_service: Service, sqlite_zoe: int) -> None:
    sqlite_service.user("joe@example.com", staff_notes="A friend of Zoe Zaunkoenig.")
    told = run("erase", str(sqlite_zoe)).out
    assert ": found\n" in told
    assert "users.staff_notes: 1 cells hold an old value" in told
    assert "aunkoenig" not in told


def test_an_erasure_that_cannot_be_as_asked_changes_nothing(
    run: Run, sqlite_service: Service, sqlite_zoe: int, tmp_path: Path
) -> None:
    taken, dangling = tmp_path / "taken", tmp_path / "dangling"
    taken.write_text("mine")
    dangling.symlink_to(tmp_path / "nowhere")
    held = sqlite_service.user("held@example.com")
    sqlite_service.add(people.person_hold(held))
    person = str(sqlite_zoe)
    before = without(dump(), {}, "audit_events")
    for arguments in (
        (person, "--certificate", taken),
        (person, "--certificate", dangling),
        (person, "--certificate", tmp_path / "no folder" / "certificate"),
        (person, "--dry-run", "--certificate", tmp_path / "new"),
        (person, "--address-stdin"),
        (),
        (person, "--replay"),
        ("--address-stdin", "--replay"),
        ("--dry-run", "--replay"),
        ("--certificate", tmp_path / "new", "--replay"),
        (person, "--plan-digest", "0" * 64),
        (person, "--plan-digest", "kanarienvogel"),
        ("99",),
        ("1",),
        (str(held),),
    ):
        answer = run("erase", *arguments, stdin=f"{ZOE}\n")
        assert is_refused(answer), (arguments, answer.code, answer.err)
        assert without(dump(), {}, "audit_events") == before, arguments
    assert taken.read_text() == "mine"
    assert {path.name for path in tmp_path.iterdir()} == {"taken", "dangling"}


def test_a_number_that_nobody_can_have_is_refused(run: Run, service: Service) -> None:
    for number in ("0", "-1", str(2**31), str(2**63), "9" * 400, "1.0", "one"):
        answer = run("erase", number)
        # What typer itself refuses it tells with the usage above.
        assert (answer.code, answer.out) == (2, ""), (number, answer.err)


def test_a_replay_erases_again_in_a_copy_that_has_not_seen_it_and_then_nobody(
    run: Run, sqlite_service: Service, sqlite_zoe: int, tmp_path: Path
) -> None:
    database, copy = sqlite_service.folder / "holdfast.db", tmp_path / "copy.db"
    joe = sqlite_service.user("joe@example.com")
    clear_caches()
    shutil.copy(database, copy)
    assert run("erase", str(sqlite_zoe)).code == 0
    clear_caches()
    for name in ("holdfast.db", "holdfast.db-wal", "holdfast.db-shm"):
        (sqlite_service.folder / name).unlink(missing_ok=True)
    # By other means than ours: the copy knows nothing of the erasure.
    shutil.copy(copy, database)
    replayed = run("erase", "--replay", "--json")
    assert replayed.code == 0, replayed.err
    assert replayed.json["erasures"] == 1
    assert not is_there(sqlite_zoe)
    assert is_there(joe)
    assert ZOE not in replayed.out
    new = sqlite_service.user(ZOE)
    assert run("erase", "--replay", "--json").json["erasures"] == 0
    assert is_there(new)
    assert new != sqlite_zoe


# Certificates


@pytest.fixture
def certificate(run: Run, sqlite_zoe: int, tmp_path: Path) -> Path:
    file = tmp_path / "certificate.json"
    assert run("erase", str(sqlite_zoe), "--certificate", file).code == 0
    return file


def test_a_certificate_is_shown_written_and_missed(
    run: Run, certificate: Path, tmp_path: Path
) -> None:
    erasure_id = json.loads(certificate.read_bytes())["statement"]["erasure_id"]
    out = tmp_path / "again.json"
    assert run("certificate", "show", erasure_id, "-o", out).code == 0
    assert out.read_bytes() == certificate.read_bytes()
    assert is_refused(run("certificate", "show", erasure_id, "-o", out))
    assert is_refused(run("certificate", "show", "00000000-0000-4000-8000-000000000000"))
    assert run("certificate", "show", "7").code == 2


@pytest.fixture
def keys(run: Run, certificate: Path, tmp_path: Path) -> dict[str, str]:
    """The public key in each form that `verify` takes."""
    spelled, pem = run("certificate", "key").out.strip(), run("certificate", "key", "--pem").out
    (tmp_path / "key.pem").write_text(pem)
    (tmp_path / "key.txt").write_text(f"{spelled}\n")
    files = {name: str(tmp_path / name) for name in ("key.pem", "key.txt")}
    return {"spelled": spelled, **files}


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[str]]:
    """Move to a machine without the service's settings, and say what was made there."""

    def move() -> list[str]:
        folder = tmp_path / "elsewhere"
        folder.mkdir(exist_ok=True)
        monkeypatch.chdir(folder)
        for name in ("DATA_DIR", "ENCRYPTION_KEY", "JWT_SECRET_KEY", "ADMIN_EMAIL"):
            monkeypatch.delenv(name, raising=False)
        clear_caches()
        return [path.name for path in folder.iterdir()]

    return move


def verify(run: Run, file: Path, key: str, *more: str) -> Answer:
    return run("certificate", "verify", file, "--public-key", key, *more)


def test_a_certificate_is_checked_with_its_public_key_alone(
    run: Run, certificate: Path, keys: dict[str, str], elsewhere: Callable[[], list[str]]
) -> None:
    own = run("certificate", "verify", certificate)
    assert own.code == 0, own.err
    elsewhere()
    for key in keys.values():
        answer = verify(run, certificate, key)
        assert (answer.code, answer.err) == (0, "")
        assert answer.out == own.out
        assert "and unchanged\n" in answer.out
        assert "scan afterwards: clean\n" in answer.out
    statement = json.loads(certificate.read_bytes())["statement"]
    assert verify(run, certificate, keys["spelled"], "--json").json == statement
    # Without a key it needs the service, which is not here.
    assert is_refused(run("certificate", "verify", certificate))
    assert not [name for name in elsewhere() if name != "data"]
    assert not list(Path("data").glob("*.db"))


def changed(certificate: Path, *place: str, to: Any) -> bytes:
    """The certificate with another value at *place*."""
    document = json.loads(certificate.read_bytes())
    at = document
    for name in place[:-1]:
        at = at[name]
    at[place[-1]] = to
    return json.dumps(document).encode()


def test_what_is_no_certificate_by_this_key_is_refused_in_one_line(
    run: Run, certificate: Path, keys: dict[str, str], elsewhere: Callable[[], list[str]],
    tmp_path: Path,
) -> None:  # fmt: skip
    elsewhere()
    whole = certificate.read_bytes()
    stranger = signing.new_signing_key()
    forged = certificates.issue(json.loads(whole)["statement"], stranger)
    said = "statement"
    bad: dict[str, bytes] = {
        "a count": changed(certificate, said, "tables", "users", "deleted", to=2),
        "the status": changed(certificate, said, "status", to="partial"),
        "the scan": changed(certificate, said, "scan", "state", to="found"),
        "more": changed(certificate, said, "note", to="Zoe Zaunkoenig"),
        "no signature": changed(certificate, "signature", to=None),
        "by another": forged,
        "cut": whole[:-20],
        "empty": b"",
        "not JSON": b"Zoe Zaunkoenig",
        "a list": b"[]",
        "another document": b'{"format": "holdfast-export"}',
        "too long": b" " * (2**20 + 1),
        "binary": bytes(range(256)),
    }
    file = tmp_path / "bad.json"
    for name, content in bad.items():
        file.write_bytes(content)
        answer = verify(run, file, keys["spelled"])
        assert is_refused(answer), (name, answer.code, answer.err)
        assert "Zaunkoenig" not in answer.err
    for none in (tmp_path / "missing", tmp_path, Path("/dev/zero")):
        assert is_refused(verify(run, none, keys["spelled"])), none
    spelled = signing.spell_public_key(signing.public_key_of(stranger))
    assert is_refused(verify(run, certificate, spelled))
    file.write_bytes(forged)
    assert verify(run, file, spelled).code == 0


def test_a_key_that_is_none_is_refused_in_one_line_and_not_shown(
    run: Run, certificate: Path, keys: dict[str, str], elsewhere: Callable[[], list[str]],
    tmp_path: Path,
) -> None:  # fmt: skip
    elsewhere()
    private = signing.to_base64url(signing.new_signing_key())
    (tmp_path / "private").write_text(f"-----BEGIN PRIVATE KEY-----\n{private}\n")
    (tmp_path / "binary").write_bytes(bytes(range(256)))
    (tmp_path / "empty").write_bytes(b"")
    bad = ["ed25519:", f"ed25519:{'A' * 43}", f"{keys['spelled']}A", f"ed25519:{private}=="]
    bad += [str(tmp_path / name) for name in ("private", "binary", "empty", "missing")]
    bad += [str(tmp_path), str(certificate), ""]
    for key in bad:
        answer = verify(run, certificate, key)
        assert is_refused(answer), (key, answer.code, answer.err)
        assert private not in answer.err
    # Whoever pastes a private key must not find it in a log.
    answer = verify(run, certificate, private)
    assert is_refused(answer)
    assert private not in answer.err


def _little() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30))


def outside(folder: Path, *arguments: str | Path) -> Answer:
    """Run a command in a process of its own, with little memory and little time."""
    done = subprocess.run(
        [sys.executable, ROOT / "db_cli.py", *arguments], cwd=folder, env={"PATH": os.defpath},
        stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=60,
        preexec_fn=_little,
    )  # fmt: skip
    return Answer(done.returncode, done.stdout, done.stderr)


@pytest.mark.parametrize("what", ["a pipe as FILE", "a pipe as key", "an endless key"])
def test_a_file_that_never_ends_is_refused_and_not_waited_for(tmp_path: Path, what: str) -> None:
    private = signing.new_signing_key()
    file, pipe = tmp_path / "good.json", tmp_path / "pipe"
    file.write_bytes(certificates.issue({"status": "complete"}, private))
    os.mkfifo(pipe)
    key = signing.spell_public_key(signing.public_key_of(private))
    arguments: dict[str, tuple[str | Path, ...]] = {
        "a pipe as FILE": (pipe, "--public-key", key),
        "a pipe as key": (file, "--public-key", pipe),
        "an endless key": (file, "--public-key", "/dev/zero"),
    }
    assert is_refused(outside(tmp_path, "certificate", "verify", *arguments[what]))
