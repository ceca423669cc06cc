"""The commands `export` and `open`: what a person needs to read their own file, and no more."""

import json
import os
import pty
import select
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from tests.conftest import ADMIN, Run, Service
from tests.privacy.test_export_locked import PASSPHRASE, locked_files

ROOT = Path(__file__).resolve().parents[2]
Command = Callable[..., tuple[int, str]]


@pytest.fixture
def command(run: Run) -> Command:
    """Run `db_cli.py` with something piped in: its exit code, and what it says of an error."""

    def run_(*arguments: str | Path, stdin: str = "") -> tuple[int, str]:
        answer = run(*arguments, stdin=stdin)
        return answer.code, answer.err

    return run_


def test_the_command_writes_a_zip_that_opens_with_the_piped_passphrase(
    command: Command, sqlite_service: Service, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    asked = ("export", "1", "--format", "zip", "--container", "zip", "-o", out / "export.zip")
    refused = [
        (asked, ""),
        ((*asked, "--encrypt"), ""),
        ((*asked, "--passphrase-stdin"), ""),
        ((*asked, "--passphrase-stdin"), "eleven char\n"),
        ((*asked, "--passphrase-stdin", "--format", "csv"), f"{PASSPHRASE}\n"),
    ]
    for arguments, stdin in refused:
        code, error = command(*arguments, stdin=stdin)
        assert (code, error.count("\n"), error[:10]) == (2, 1, "holdfast: ")
        assert list(out.iterdir()) == []
    assert command(*asked, "--passphrase-stdin", stdin=f"{PASSPHRASE}\n") == (0, "")
    whole = (out / "export.zip").read_bytes()
    assert json.loads(locked_files(whole)["export.json"])["data"]["users"][0]["email"] == ADMIN
    assert (out / "export.zip").stat().st_mode & 0o777 == 0o600
    code, error = command(*asked, "--passphrase-stdin", stdin=f"{PASSPHRASE}\n")
    assert (code, error) == (2, f"holdfast: {out / 'export.zip'} exists already\n")
    assert (out / "export.zip").read_bytes() == whole


@pytest.mark.parametrize("passphrase", [None, PASSPHRASE])
def test_open_takes_the_name_without_its_ending_and_never_over_a_file(
    command: Command, sqlite_service: Service, tmp_path: Path, passphrase: str | None
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    sealed, opened = out / "export.json.hfe", out / "export.json"
    how = ("--passphrase-stdin",) if passphrase else ()
    piped = f"{passphrase}\n" if passphrase else ""
    assert command("export", "1", "-o", sealed, *(how or ("--encrypt",)), stdin=piped)[0] == 0
    if passphrase:
        for wrong, code in ((("--passphrase-stdin",), 1), ((), 2)):
            answer = command("open", sealed, *wrong, stdin="another passphrase\n")
            assert (answer[0], answer[1].count("\n"), answer[1][:10]) == (code, 1, "holdfast: ")
            assert "passphrase" in answer[1]
            assert list(out.iterdir()) == [sealed]
    assert command("open", sealed, *how, stdin=piped) == (0, "")
    assert json.loads(opened.read_bytes())["data"]["users"][0]["email"] == ADMIN
    opened.write_text("mine")
    refusal = (2, f"holdfast: {opened} exists already\n")
    assert command("open", sealed, *how, stdin=piped) == refusal
    assert opened.read_text() == "mine"
    unnamed = sealed.rename(out / "sealed")
    code, error = command("open", unnamed, *how, stdin=piped)
    assert (code, error) == (2, f"holdfast: {unnamed} does not end in .hfe: give -o FILE\n")
    assert command("open", unnamed, *how, "-o", out / "new", stdin=piped) == (0, "")
    assert {path.name for path in out.iterdir()} == {"export.json", "sealed", "new"}


def test_on_a_terminal_the_passphrase_is_asked_for_and_not_shown(
    command: Command, sqlite_service: Service, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    sealed = out / "export.json.hfe"
    piped = f"{PASSPHRASE}\n"
    assert command("export", "1", "-o", sealed, "--passphrase-stdin", stdin=piped)[0] == 0
    code, shown = on_terminal(out, "another passphrase", "open", sealed)
    assert code == 1
    assert "holdfast: the passphrase is wrong or the file was changed" in shown
    assert [path.name for path in out.iterdir()] == [sealed.name]
    code, shown = on_terminal(out, PASSPHRASE, "open", sealed)
    assert code == 0
    assert "Passphrase: " in shown
    assert PASSPHRASE not in shown
    # Nothing of the service is there, nothing of it is made: the passphrase is all it takes.
    assert {path.name for path in out.iterdir()} == {sealed.name, "export.json"}


def on_terminal(
    folder: Path, typed: str, *arguments: str | Path, asked: str = "Passphrase"
) -> tuple[int, str]:
    """Run a command on a terminal of its own, far from any installation, and type a line."""
    ours, theirs = pty.openpty()
    # A session without a terminal of its own reads and asks on what it is given.
    process = subprocess.Popen(
        [sys.executable, ROOT / "db_cli.py", *arguments], cwd=folder, start_new_session=True,
        env={"PATH": os.environ["PATH"]}, stdin=theirs, stdout=theirs, stderr=theirs,
    )  # fmt: skip
    os.close(theirs)
    seen = b""
    try:
        # The space comes when the terminal no longer shows, or forgets, what is typed.
        while not seen.endswith(f"{asked}: ".encode()) and (data := read(ours)):
            seen += data
        os.write(ours, f"{typed}\n".encode())
        while data := read(ours):
            seen += data
        return process.wait(timeout=60), seen.decode().replace("\r\n", "\n")
    finally:
        process.kill()
        process.wait()
        os.close(ours)


def read(terminal: int) -> bytes:
    """What was written to the terminal; nothing when the other side has ended."""
    assert select.select([terminal], [], [], 60)[0], "nothing came for 60 seconds"
    with suppress(OSError):  # Linux says EIO then.
        return os.read(terminal, 1024)
    return b""
