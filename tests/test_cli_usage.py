"""How commands are called: what cannot be meant is refused in one line, and help is help."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import PASSWORD, Answer, Run, Service
from tests.privacy.test_export_command import on_terminal

ROOT = Path(__file__).resolve().parents[1]
# The interrupt comes while the command waits for what is piped in.
INTERRUPTED = """
import signal, sys, db_cli
class Piped:
    def readline(self):
        signal.raise_signal(signal.SIGINT)
sys.stdin = Piped()
sys.exit(db_cli.main())
"""


def refused(answer: Answer, words: str) -> None:
    """A refusal is one line on stderr, and exit code 2."""
    assert (answer.code, answer.out) == (2, ""), answer.out
    assert (answer.err.count("\n"), answer.err[:10]) == (1, "holdfast: ")
    assert words in answer.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("nonsense",), "'nonsense'"),
        (("backup", "nonsense"), "'nonsense'"),
        (("export", "abc", "-o", "out"), "'user_id'"),
        (("export", "1"), "'--output'"),
        (("load", "--count", "-5"), "'--count'"),
        (("load", "--count"), "'--count'"),
        (("--unknown",), "--unknown"),
        (("erase", "1", "--unknown"), "--unknown"),
        (("erase", "1", "2"), "(2)"),
        (("consent",), "'user_id'"),
        (("backup", "verify", "no-uuid"), "'backup_id'"),
        # Typer lists the choices in lines of their own.
        (("keys", "wrap"), "vault, aws-kms"),
        (("find", "3"), "(3)"),
    ],
)
def test_a_call_that_cannot_be_meant_is_refused_in_one_line(
    run: Run, arguments: tuple[str, ...], words: str
) -> None:
    refused(run(*arguments), words)


@pytest.mark.parametrize(
    ("arguments", "code"),
    [(("--help",), 0), (("export", "--help"), 0), ((), 2), (("backup",), 2)],
    ids=str,
)
def test_help_is_shown_where_it_is_asked_for_or_nothing_is(
    run: Run, arguments: tuple[str, ...], code: int
) -> None:
    answer = run(*arguments)
    assert (answer.code, answer.err) == (code, "")
    assert "Usage: " in answer.out


def test_a_command_that_is_interrupted_ends_with_130(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, "keys", "id"], cwd=tmp_path, capture_output=True,
        text=True, check=False, env={"PATH": os.defpath, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_a_question_that_is_not_answered_ends_the_command_in_one_line(tmp_path: Path) -> None:
    code, shown = on_terminal(tmp_path, "\x04", "create-user", "eve@example.com", asked="Password")
    assert (code, shown.splitlines()[-1]) == (1, "holdfast: aborted")


def test_no_account_is_asked_a_password_for_that_cannot_be(
    run: Run, sqlite_service: Service
) -> None:
    for given in (("--password-stdin",), ()):
        refused(
            run("create-user", "not-mail", *given, stdin=f"{PASSWORD}\n"),
            "this is no e-mail address",
        )
    for command in ("create-user", "set-password"):
        # Nobody sits at a pipe.
        refused(run(command, "eve@example.com"), "--password-stdin")
    piped = ("--password-stdin",)
    assert run("create-user", " eve@example.com", *piped, stdin=f"{PASSWORD}\n").code == 0


def test_find_asks_on_a_terminal_and_reads_what_is_piped(
    run: Run, sqlite_service: Service, tmp_path: Path
) -> None:
    sqlite_service.user("eve@example.com")
    assert run("find", "--json", stdin=" eve@example.com\n").json["user_id"] == 2
    asked = "E-mail address or telephone"
    code, shown = on_terminal(tmp_path, "eve@example.com", "find", asked=asked)
    assert (code, shown.splitlines()[-1][:10]) == (2, "holdfast: ")
    assert "there is no database yet" in shown
    for command in (("find",), ("erase", "--address-stdin")):
        for nothing in ("", "\n", "  \neve@example.com\n"):
            refused(run(*command, stdin=nothing), "nothing came")
