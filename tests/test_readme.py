"""The README's tour is run as it stands, against a real server, and its promises are checked."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.ports import free_port

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
ENTER = ". .venv/bin/activate"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[int, str, dict[str, str]]]:
    """Start `python main.py`; give its port, the first admin's password, and its environment."""
    port = free_port()
    environment = os.environ | {
        "DATA_DIR": str(tmp_path / "data"), "PORT": str(port), "LOG_LEVEL": "ERROR",
    }  # fmt: skip
    with subprocess.Popen(
        [sys.executable, ROOT / "main.py"], env=environment, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        try:
            shown = next(line for line in process.stdout if "shown this once" in line)
            password = shown.split(":")[1].strip()
            _wait(port)
            yield port, password, environment
        finally:
            # Else leaving it would wait for its end, for ever.
            process.terminate()


def _wait(port: int) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz"):
                return
        except OSError:
            time.sleep(0.1)
    raise TimeoutError("the service did not start")


def test_the_tour_in_ten_requests_works_as_written(
    server: tuple[int, str, dict[str, str]],
) -> None:
    if not (shutil.which("curl") and shutil.which("bash")):
        pytest.skip("the tour needs curl and bash, which this machine lacks")
    port, password, environment = server
    tour = README.split("## A tour in ten requests")[1].split("## The command line")[0]
    blocks = re.findall(r"```sh\n(.*?)```", tour, re.DOTALL)
    script = "\n".join(blocks)
    assert script.count("call /") + 1 == 10  # the sign-in is the first
    last = blocks.pop()
    lines = ["set -euo pipefail", *"\n".join(blocks).splitlines()]
    script = "\n".join(line for line in lines if not line.startswith(("read ", f"{ENTER} ")))
    script = script.replace("127.0.0.1:8000", f"127.0.0.1:{port}")
    script = script.replace("python db_cli.py", f"{sys.executable} db_cli.py")
    marked = script + f"\necho; echo MARK; {last.strip()} || true\n"
    done = subprocess.run(
        ["bash", "-c", marked], cwd=ROOT, capture_output=True, text=True, check=False,
        env=environment | {"PASSWORD": password},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert '"retained":' in done.stdout
    assert '"erasures":1' in done.stdout
    problem = json.loads(done.stdout.split("MARK\n")[1])
    assert problem["code"] == "subject_not_found"


def test_the_python_that_commands_need_is_entered_before_the_first_of_them() -> None:
    assert README.index(ENTER) < README.index("python db_cli.py")
    assert ENTER in (ROOT / "SECURITY.md").read_text().split("## Runbook")[1].split("###")[0]
    if not (ROOT / ".venv" / "bin" / "activate").exists():
        pytest.skip("`make run` has set up nothing here")
    shell = f"set -e; {ENTER}; python db_cli.py --help"
    done = subprocess.run(
        ["sh", "-c", shell], cwd=ROOT, capture_output=True, check=False, env={"PATH": os.defpath}
    )
    assert done.returncode == 0, done.stderr


def test_every_file_that_the_documents_point_to_exists() -> None:
    for document in ("README.md", "SECURITY.md"):
        links = re.findall(r"\]\(([^)#:]+)\)", (ROOT / document).read_text())
        assert [link for link in links if not (ROOT / link).exists()] == []


def test_every_command_that_the_readme_names_exists() -> None:
    listed = README.split("the same services as commands: ")[1].split(".\n")[0]
    for part in re.findall(r"`([^`]+)`", listed):
        name, _, subcommands = part.partition(" ")
        for command in subcommands.split("|") if subcommands else [""]:
            words = [name, command] if command else [name]
            _assert_command(words)


def _assert_command(words: list[str]) -> None:
    import db_cli

    group = db_cli.app
    for word in words[:-1]:
        group = next(g.typer_instance for g in group.registered_groups if g.name == word)  # type: ignore[assignment] # a Typer
    names = {
        command.name or command.callback.__name__  # type: ignore[union-attr] # every one has it
        for command in group.registered_commands
    }
    assert words[-1] in names
