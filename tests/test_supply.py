"""What is installed is what was chosen: locked, hashed, justified, and listed in the SBOM."""

import ast
import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import Distribution, distribution, packages_distributions
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.test_house import imports, sources

ROOT: Final = Path(__file__).resolve().parents[1]
_SETS: Final = ("requirements", "requirements-dev", "requirements-parts")
# Ours to name, since they are part of how the other library is used.
_COMES_WITH: Final = {
    "starlette": "fastapi",
    "anyio": "starlette",
    "markupsafe": "jinja2",
    "botocore": "boto3",
    "urllib3": "botocore",
    "requests": "hvac",
}
# Where a part is not installed, nothing says whose name it is.
_PART_OF: Final = {"gnupg": "python-gnupg"}
# Found by other libraries, or by Python itself, once they are there.
_NEVER_IMPORTED: Final = {
    "python-multipart",
    "psycopg",
    "tzdata",
    "pycryptodomex",
    "argon2-cffi",
    "redis",
}
# Only who installs them has them; the other parts are for tests.
_OPTIONAL: Final = ("boto3", "hvac", "python-gnupg", "redis")
_ENTRY: Final = re.compile(
    r"^(?P<pin>[a-z0-9].*?) \\\n(?P<hashes>(?:    --hash=.*\n)*)", re.MULTILINE
)
_HASH: Final = re.compile(r"    --hash=sha256:[0-9a-f]{64}( \\)?")


def chosen(name: str) -> dict[str, Requirement]:
    """What the list *name* asks for, by name; lists that it builds on are left out."""
    lines = (ROOT / f"{name}.in").read_text().splitlines()
    asked = [Requirement(line) for line in lines if line and line[0] not in "#-"]
    return {canonicalize_name(each.name): each for each in asked}


def locked(name: str) -> dict[str, tuple[Requirement, list[str]]]:
    """What the lock *name* holds: the pin, and the lines of its hashes."""
    pins = _ENTRY.finditer((ROOT / f"{name}.txt").read_text())
    read = [(Requirement(pin["pin"]), pin["hashes"].splitlines()) for pin in pins]
    return {canonicalize_name(each.name): (each, hashes) for each, hashes in read}


def installed(asked: Requirement, seen: dict[str, str]) -> dict[str, str]:
    """Name and version of everything that *asked* brings here; *seen* is added to."""
    found = distribution(asked.name)
    extras = ["", *asked.extras]
    seen[canonicalize_name(asked.name)] = found.version
    for needed in map(Requirement, found.requires or ()):
        wanted = needed.marker is None or any(
            needed.marker.evaluate({"extra": extra}) for extra in extras
        )
        if wanted and (needed.extras or canonicalize_name(needed.name) not in seen):
            installed(needed, seen)
    return seen


def imported() -> Iterator[str]:
    """Names of the distributions that code which runs in production imports from."""
    known = packages_distributions()
    for source in sources().values():
        for name in imports(ast.parse(source)):
            top = name.split(".")[0]
            if top not in {*sys.stdlib_module_names, "backend", "main", ""}:
                yield canonicalize_name(known.get(top, [_PART_OF.get(top, top)])[0])


@pytest.mark.parametrize("name", _SETS)
def test_every_locked_package_has_one_version_and_only_sha256_hashes(name: str) -> None:
    text = (ROOT / f"{name}.txt").read_text()
    for pin, hashes in locked(name).values():
        assert [each.operator for each in pin.specifier] == ["=="], pin
        assert hashes, pin
        assert all(_HASH.fullmatch(each) for each in hashes), pin
    # Nothing stands in the file that was not read above.
    lines = [line for line in text.splitlines() if not re.match(r"\s*#", line)]
    assert len(lines) == sum(1 + len(hashes) for _pin, hashes in locked(name).values())
    assert "://" not in text


@pytest.mark.parametrize("name", _SETS)
def test_the_lock_holds_what_was_chosen(name: str) -> None:
    lock = locked(name)
    assert {
        key: str(asked.specifier) for key, asked in chosen(name).items()
    } == {key: str(lock[key][0].specifier) for key in chosen(name)}  # fmt: skip


def test_what_both_lists_lock_they_lock_alike() -> None:
    runtime, dev, parts = map(locked, _SETS)
    assert {name: dev[name] for name in runtime} == runtime
    shared = dev.keys() & parts.keys()
    assert shared
    assert {name: parts[name][1] for name in shared} == {name: dev[name][1] for name in shared}


def test_everything_that_the_running_service_brings_is_locked_and_installed_so() -> None:
    here: dict[str, str] = {}
    for asked in chosen("requirements").values():
        installed(asked, here)
    lock = {name: str(pin.specifier)[2:] for name, (pin, _hashes) in locked(_SETS[0]).items()}
    assert len(here) > len(chosen("requirements"))
    assert {name: lock.get(name) for name in here} == here


def test_ours_imports_only_what_was_chosen_and_nothing_is_chosen_for_nothing() -> None:
    used = set(imported())
    wanted = {_COMES_WITH.get(name, name) for name in used}
    wanted = {_COMES_WITH.get(name, name) for name in wanted}
    assert wanted | _NEVER_IMPORTED == {*chosen("requirements"), *_OPTIONAL}
    assert not wanted & _NEVER_IMPORTED


@pytest.mark.parametrize(("name", "other"), _COMES_WITH.items())
def test_what_comes_with_another_library_does(name: str, other: str) -> None:
    try:
        needs = distribution(other).requires or ()
    except ModuleNotFoundError:
        pytest.skip(f"{other} is not installed: see requirements-parts.in")
    assert name in {canonicalize_name(Requirement(each).name) for each in needs}


def _table() -> dict[str, list[str]]:
    section = (ROOT / "SECURITY.md").read_text().split("## Dependencies")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `([a-z0-9-]+)` \|(.*)\|$", section, re.MULTILINE)
    return {name: [cell.strip() for cell in cells.split("|")] for name, cells in rows}


def test_every_chosen_library_is_justified_and_no_other() -> None:
    assert list(_table()) == [*chosen("requirements"), *_OPTIONAL]
    assert all(len(cells) == 3 and all(cells) for cells in _table().values())


@pytest.mark.parametrize("name", chosen("requirements"))
def test_the_licence_in_the_table_is_the_library_s_own(name: str) -> None:
    assert _table()[name][1] in _licences(distribution(name))


def _licences(found: Distribution) -> str:
    names = ("License-Expression", "License", "Classifier")
    said = [word for name in names for word in found.metadata.get_all(name) or ()]
    return " ".join(word for word in said if "::" not in word or "License" in word)


@pytest.fixture(scope="module")
def sbom(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Make the SBOM as `make sbom` does."""
    file = tmp_path_factory.mktemp("sbom") / "sbom.json"
    subprocess.run(
        [
            *("make", "--silent", "--old-file=.venv/dev", "sbom"),
            *(f"BIN={Path(sys.executable).parent}", f"SBOM={file}"),
        ],
        cwd=ROOT,
        check=True,
    )
    return file.read_text()


def test_the_sbom_is_valid_and_lists_every_locked_package_with_its_hashes(sbom: str) -> None:
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(sbom) is None
    listed = {
        component["name"]: (component["version"], _hashes(component))
        for component in json.loads(sbom)["components"]
    }
    assert listed == {
        name: (str(pin.specifier)[2:], {re.findall("[0-9a-f]{64}", each)[0] for each in hashes})
        for name, (pin, hashes) in locked("requirements").items()
    }


def _hashes(component: dict[str, Any]) -> set[str]:
    references = component["externalReferences"]
    return {each["content"] for reference in references for each in reference.get("hashes", ())}


@pytest.fixture(scope="module")
def audit() -> ModuleType:
    spec = importlib.util.spec_from_file_location("audit", ROOT / ".ci" / "audit.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["nonsense", "", "boto"])
def test_a_part_that_is_none_is_refused_with_those_that_are(name: str) -> None:
    done = subprocess.run(
        [*("make", "--silent", "--old-file=.venv/runtime", "part"), f"PART={name}"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    said = done.stderr.splitlines()[0]
    assert said.startswith("make part PART=NAME installs one of ")
    assert said.split()[6:] == list(chosen("requirements-parts"))


_SOUND: Final = {"name": "sound", "version": "1", "vulns": []}
_WEAK: Final = {"name": "weak", "version": "2", "vulns": [{"id": "PYSEC-2026-1"}]}
_UNKNOWN: Final = {"name": "unknown", "skip_reason": "not found"}


@pytest.mark.parametrize(
    ("packages", "code", "words"),
    [
        ([_SOUND], 0, "a: 1 packages, no weakness known"),
        ([_SOUND, _WEAK, _UNKNOWN], 1, "a: 1 with known weaknesses\n  weak 2: PYSEC-2026-1"),
        ([_SOUND, _UNKNOWN], 3, "a: 1 of 2 packages NOT AUDITED, not known here"),
        (None, 3, "a: NOT AUDITED, the list of weaknesses cannot be reached from here"),
    ],
)
def test_an_audit_says_what_it_found_and_what_it_could_not_ask(
    audit: ModuleType, packages: list[dict[str, Any]] | None, code: int, words: str
) -> None:
    assert audit.judge("a", packages) == (code, words)
