"""Users' own programs: with `PYTHONPATH=backend` our services import as `services.…`."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

from tests.conftest import KEY

ROOT: Final = Path(__file__).resolve().parents[1]
SERVICES: Final = ("encryption", "compliance", "retention", "scheduler")


def run(program: str, folder: Path) -> str:
    """Run *program* as users do: from the checkout, with the folder `backend` on the path."""
    settings = {"DATA_DIR": str(folder), "ENCRYPTION_KEY": KEY, "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        capture_output=True, text=True, timeout=120, check=False, cwd=ROOT,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": "backend", **settings},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_value_comes_back_through_the_service_that_users_import(tmp_path: Path) -> None:
    program = """
from services.encryption_service import get_encryption_service
service = get_encryption_service()
token = service.encrypt("Jane Exämple", "guests.name")
print(token.startswith("enc1."), "Jane" in token)
print(service.decrypt(token, "guests.name") == "Jane Exämple")
try:
    service.decrypt(token, "guests.email")
except Exception as err:
    print(type(err).__name__)
"""
    assert run(program, tmp_path / "data").split() == ["True", "False", "True", "TamperedError"]


@pytest.mark.parametrize("first", ["services", "backend.services"])
def test_either_name_gives_the_same_modules_and_the_same_objects(
    tmp_path: Path, first: str
) -> None:
    """One process has one keyring and one scheduler, whichever name it imports first."""
    program = f"""
import importlib
for name in {SERVICES}:
    importlib.import_module(f"{first}.{{name}}_service")
for name in {SERVICES}:
    theirs = importlib.import_module(f"services.{{name}}_service")
    ours = importlib.import_module(f"backend.services.{{name}}_service")
    getter = f"get_{{name}}_service"
    print(theirs is ours, getattr(theirs, getter)() is getattr(ours, getter)())
"""
    assert run(program, tmp_path / "data").split() == ["True"] * 2 * len(SERVICES)
