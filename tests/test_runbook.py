"""The runbook in SECURITY.md is run as it stands, against stores and databases that were lost."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Final

import pytest
from sqlalchemy import create_engine, text

ROOT: Final = Path(__file__).resolve().parents[1]
RUNBOOK: Final = (ROOT / "SECURITY.md").read_text().split("## Runbook")[1].split("\n## ")[0]
KEY: Final = "pYb0Ynzw6dH0h2BDX1nqXBvDfQKyoTf2lFXKKYFxNjg="


class Machine:
    """A folder with its own data, on which commands are run as an operator types them."""

    def __init__(self, folder: Path, store: Path) -> None:
        folder.mkdir()
        self.folder, self.data = folder, folder / "data"
        # `python` is the one that runs the tests, `db_cli.py` this project's.
        programs = folder / "bin"
        programs.mkdir()
        (programs / "python").symlink_to(sys.executable)
        self.environment = {
            "PATH": f"{programs}:{os.environ['PATH']}",
            "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)]),
            "DATA_DIR": str(self.data),
            "BACKUP_URL": str(store),
            "STORE": str(store),
            "ENCRYPTION_KEY": KEY,
            "LOG_LEVEL": "ERROR",
        }

    def run(self, script: str) -> "subprocess.CompletedProcess[str]":
        """Run lines of a shell; the first that fails ends them."""
        typed = script.replace("python db_cli.py", f"python {ROOT}/db_cli.py")
        return subprocess.run(
            ["bash", "-euo", "pipefail", "-c", typed],
            env=self.environment, cwd=self.folder, capture_output=True, text=True, check=False,
        )  # fmt: skip

    def do(self, script: str) -> str:
        done = self.run(script)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def people(self, file: Path | None = None) -> set[int]:
        """Numbers of the people in a database, read by SQL alone."""
        engine = create_engine(f"sqlite:///{file or self.data / 'holdfast.db'}")
        with engine.connect() as connection:
            found = set(connection.execute(text("SELECT id FROM users")).scalars())
        engine.dispose()
        return found


def _steps(title: str) -> str:
    """The commands of one section of the runbook."""
    section = RUNBOOK.split(f"### {title}\n")[1].split("\n### ")[0]
    return "\n".join(re.findall(r"```sh\n(.*?)```", section, re.DOTALL))


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def machine(tmp_path: Path, store: Path) -> Machine:
    """One with people, a backup, and a person who was erased after it."""
    if not shutil.which("bash"):
        pytest.skip("the runbook needs bash, which this machine lacks")
    machine = Machine(tmp_path / "machine", store)
    machine.do("python db_cli.py init; python db_cli.py load --count 30 --guests 10")
    machine.do("python db_cli.py backup create; python db_cli.py erase 3 --reason art-17")
    return machine


def test_a_lost_database_comes_back_without_those_erased_since(machine: Machine) -> None:
    before = machine.people()
    shutil.rmtree(machine.data)
    machine.do(_steps("The database is lost"))
    assert machine.people() == before
    assert 3 not in before


def test_a_lost_machine_comes_back_from_what_is_left(
    machine: Machine, tmp_path: Path, store: Path
) -> None:
    before = machine.people()
    other = Machine(tmp_path / "other", tmp_path / "empty")
    other.environment["STORE"] = str(store)
    del other.environment["BACKUP_URL"]
    other.do(_steps("The machine is lost"))
    assert other.people() == before
    # From now on it stands on its own: the ledger came along.
    assert list((other.data / "backups").glob("ledger-*"))


def test_a_key_that_was_found_can_be_told_from_another(machine: Machine) -> None:
    wanted = json.loads(machine.do("python db_cli.py keys status --json"))["primary"]
    (machine.folder / "key-from-the-safe.txt").write_text(f"{KEY}\n")
    assert machine.do(_steps("The key is lost")).strip() == wanted
    del machine.environment["ENCRYPTION_KEY"]
    refused = machine.run("python db_cli.py backup list")
    assert refused.returncode == 2
    assert wanted in refused.stderr


def test_after_a_theft_nothing_needs_the_old_key(machine: Machine) -> None:
    status = machine.do(f"{_steps('A backup was stolen')}\npython db_cli.py keys status --json")
    keys = {key["state"]: key for key in json.loads(status[status.index("{\n") :])["keys"]}
    assert (keys["disabled"]["values"], keys["disabled"]["backups"]) == (0, 0)
    assert keys["primary"]["backups"] == 2


def test_a_wrong_restore_is_taken_back(machine: Machine) -> None:
    machine.do("python db_cli.py load --count 5 --guests 5")
    before = machine.people()
    machine.do("python db_cli.py backup restore --confirm")
    assert machine.people() != before
    machine.do(_steps("The wrong backup was restored"))
    assert machine.people() == before


def test_the_drill_needs_nothing_but_the_store_and_the_key(
    machine: Machine, tmp_path: Path, store: Path
) -> None:
    drill = Machine(tmp_path / "drill", tmp_path / "empty")
    drill.environment["STORE"] = str(store)
    drill.do(_steps("The drill"))
    assert drill.people(drill.folder / "drill.db") == machine.people()


TESTED: Final[tuple[Callable[..., None], ...]] = (
    test_a_lost_database_comes_back_without_those_erased_since,
    test_a_lost_machine_comes_back_from_what_is_left,
    test_a_key_that_was_found_can_be_told_from_another,
    test_after_a_theft_nothing_needs_the_old_key,
    test_a_wrong_restore_is_taken_back,
    test_the_drill_needs_nothing_but_the_store_and_the_key,
)


def test_every_section_of_the_runbook_is_run() -> None:
    assert RUNBOOK.count("\n### ") == len(TESTED)
