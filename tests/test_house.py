"""The architecture: imports point one way, libraries enter at one door, one place commits."""

import ast
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

import pytest

ROOT: Final = Path(__file__).resolve().parents[1]
MAX_LINES: Final = 400

# Each line may import the lines below it; names on one line are peers.
_LINES: Final = (
    ("main", "db_cli", "alembic"),
    ("backend.api", "backend.cli"),
    ("backend.services",),
    ("backend.models",),
    ("backend.crypto", "backend.privacy", "backend.backup"),
    ("backend.db_utils",),
    ("backend.sqlite_engine",),
    (
        "backend.logs",
        "backend.settings",
        "backend.errors",
        "backend.folders",
        "backend.token_secrets",
        "backend.web_addresses",
    ),
)
# On the bottom line the errors know nobody, and the settings raise them.
_PEERS_ALLOWED: Final = {
    ("backend.settings", "backend.errors"),
    ("backend.logs", "backend.settings"),
    ("backend.settings", "backend.token_secrets"),
    ("backend.settings", "backend.web_addresses"),
}
# These take what they need as arguments.
_WITHOUT_SETTINGS: Final = ("backend.crypto", "backend.privacy", "backend.backup")
_MIGRATIONS_TAKE: Final = (
    "backend.models",
    "backend.settings",
    "backend.db_utils",
    "backend.crypto.columns",
)
_DOORS: Final = {
    "fastapi": ("main.py", "backend/api/"),
    "starlette": ("main.py", "backend/api/"),
    "typer": ("db_cli.py", "backend/cli/"),
    "rich": ("backend/cli/",),
    "jose": ("backend/crypto/",),
    "passlib": ("backend/crypto/",),
    "pyotp": ("backend/crypto/",),
    "zxcvbn": ("backend/crypto/",),
    "limits": ("backend/services/throttle_service.py",),
    "cryptography": ("backend/crypto/",),
    "schedule": ("backend/services/",),
    "boto3": ("backend/backup/", "backend/crypto/"),
    "hvac": ("backend/crypto/",),
    "pyzipper": ("backend/privacy/",),
    "botocore": ("backend/backup/", "backend/crypto/"),
    "gnupg": ("backend/backup/",),
    "alembic": ("backend/services/schema_service.py", "alembic/"),
}


def sources() -> dict[str, str]:
    """All of our own code that runs in production, by its path below the root."""
    found = [ROOT / "main.py", ROOT / "db_cli.py"]
    for folder in ("backend", "alembic"):
        found += (ROOT / folder).rglob("*.py")
    return {path.relative_to(ROOT).as_posix(): path.read_text() for path in found if path.exists()}


def breaches(path: str, source: str) -> list[str]:
    """Every rule that *source*, lying at *path*, breaks."""
    tree = ast.parse(source)
    imported = list(imports(tree))
    found = [f"{path}: {breach}" for name in imported for breach in _layers(path, name)]
    found += [f"{path}: {breach}" for name in imported for breach in _doors(path, name)]
    if path != "backend/db_utils.py" and any(_commits(node) for node in ast.walk(tree)):
        found.append(f"{path}: commits")
    if path.startswith("backend/") and (lines := source.count("\n")) > MAX_LINES:
        found.append(f"{path}: {lines} lines")
    return found


def imports(tree: ast.AST) -> Iterator[str]:
    """Full names of what is imported anywhere, inside functions too."""
    for node in ast.walk(tree):
        match node:
            case ast.Import():
                yield from (alias.name for alias in node.names)
            case ast.ImportFrom(level=0, module=str(module)):
                yield from (f"{module}.{alias.name}" for alias in node.names)
            case ast.ImportFrom():
                yield "." * node.level + (node.module or "")


def _layers(path: str, name: str) -> Iterator[str]:
    if name.startswith("."):
        yield f"relative import {name}: ours is backend.…"
    source, target = _layer(_module(path)), _layer(name)
    # What is imported as `alembic` is the library.
    if source is None or target in (None, "alembic"):
        return
    if source == "alembic":
        if not any(_is_below(name, allowed) for allowed in _MIGRATIONS_TAKE):
            yield f"a migration imports {name}"
    elif source != target and _rank(target) <= _rank(source):
        if (source, target) not in _PEERS_ALLOWED:
            yield f"{source} imports {target}"
    elif source in _WITHOUT_SETTINGS and target == "backend.settings":
        yield f"{source} reads settings"


def _doors(path: str, name: str) -> Iterator[str]:
    library = name.split(".", maxsplit=1)[0]
    if not path.startswith(_DOORS.get(library, "")):
        yield f"{library} does not enter here"


def _commits(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute) and node.attr == "commit"


def _module(path: str) -> str:
    return path.removesuffix(".py").replace("/", ".").removesuffix(".__init__")


def _layer(name: str) -> str | None:
    """The line's member that *name* is in."""
    members = [member for line in _LINES for member in line]
    return next((m for m in members if _is_below(name, m)), None)


def _is_below(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def _rank(layer: str) -> int:
    return next(rank for rank, line in enumerate(_LINES) if layer in line)


def cycles(modules: Mapping[str, str]) -> list[list[str]]:
    """Chains of the services in *modules* that import each other in a circle."""
    services = {_module(path): source for path, source in modules.items() if "/services/" in path}
    graph = {
        module: {
            name
            for imported in imports(ast.parse(source))
            for name in services
            if name not in {module, "backend.services"} and _is_below(imported, name)
        }
        for module, source in services.items()
    }
    found: list[list[str]] = []
    done: set[str] = set()

    def visit(module: str, chain: list[str]) -> None:
        if module in chain:
            found.append([*chain[chain.index(module) :], module])
        elif module not in done:
            for name in sorted(graph[module]):
                visit(name, [*chain, module])
            done.add(module)

    for module in graph:
        visit(module, [])
    return found


def test_the_checker_sees_the_whole_tree() -> None:
    found = {_layer(_module(path)) for path in sources()}
    assert found >= {member for line in _LINES for member in line} - {"db_cli"}


def test_imports_libraries_commits_and_sizes_keep_to_the_rules() -> None:
    assert [breach for path, text in sources().items() for breach in breaches(path, text)] == []


def test_services_import_each_other_without_cycles() -> None:
    assert cycles(sources()) == []


def test_the_project_file_holds_rules_for_tools_only() -> None:
    assert set(tomllib.loads((ROOT / "pyproject.toml").read_text())) == {"tool"}


def test_no_package_file_hides_the_library_alembic() -> None:
    assert not (ROOT / "alembic" / "__init__.py").exists()


@pytest.mark.parametrize(
    ("path", "source", "breach"),
    [
        ("backend/services/a.py", "from backend.api.auth import Me", "imports backend.api"),
        ("backend/models/a.py", "from backend.services import audit_service", "backend.services"),
        ("backend/crypto/a.py", "import backend.models", "imports backend.models"),
        ("backend/crypto/a.py", "from backend import privacy", "imports backend.privacy"),
        ("backend/privacy/a.py", "from backend.backup.archive import x", "backend.backup"),
        ("backend/backup/a.py", "def f():\n    from backend import crypto", "backend.crypto"),
        ("backend/backup/a.py", "from backend.settings import get_settings", "reads settings"),
        ("backend/db_utils.py", "from backend.crypto import keyring", "imports backend.crypto"),
        ("backend/errors.py", "from backend.settings import Settings", "imports backend.settings"),
        ("backend/settings.py", "from backend import logs", "imports backend.logs"),
        ("backend/api/a.py", "import main", "imports main"),
        ("db_cli.py", "from main import create_app", "imports main"),
        ("backend/cli/a.py", "from backend.api import auth", "imports backend.api"),
        ("backend/api/a.py", "from backend.cli.showing import out", "imports backend.cli"),
        ("backend/services/a.py", "from backend import cli", "imports backend.cli"),
        ("backend/cli/a.py", "import db_cli", "imports db_cli"),
        ("alembic/env.py", "from backend.crypto import keyring", "a migration imports"),
        ("alembic/env.py", "from backend.services import schema_service", "a migration imports"),
        ("backend/api/a.py", "from .dependencies import Body", "relative import"),
        ("backend/services/a.py", "from fastapi import Request", "fastapi does not"),
        ("backend/services/a.py", "import starlette.types", "starlette does not"),
        ("db_cli.py", "import fastapi", "fastapi does not"),
        ("backend/cli/a.py", "import fastapi", "fastapi does not"),
        ("main.py", "import typer", "typer does not"),
        ("backend/services/a.py", "from rich.progress import Progress", "rich does not"),
        ("backend/api/a.py", "from jose import jwt", "jose does not"),
        ("backend/services/a.py", "from passlib.hash import argon2", "passlib does not"),
        ("backend/backup/a.py", "import cryptography.x509", "cryptography does not"),
        ("main.py", "import schedule", "schedule does not"),
        ("backend/services/a.py", "import boto3", "boto3 does not"),
        ("backend/crypto/a.py", "import gnupg", "gnupg does not"),
        ("backend/services/setup_service.py", "from alembic import command", "alembic does not"),
        ("backend/services/a.py", "session.commit()", "commits"),
        ("backend/api/a.py", "def f(session):\n    done = session.commit\n    done()", "commits"),
        ("backend/privacy/a.py", "\n" * (MAX_LINES + 1), "401 lines"),
    ],
)
def test_a_breach_is_found(path: str, source: str, breach: str) -> None:
    (found,) = breaches(path, source)
    assert breach in found


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("main.py", "import fastapi\nfrom backend.api import auth\nfrom backend import settings"),
        ("db_cli.py", "import typer\nfrom backend.cli import keys\nfrom backend import settings"),
        ("backend/cli/a.py", "import rich.table\nimport typer\nfrom backend.services import b"),
        ("backend/cli/a.py", "from backend.cli.showing import out\nfrom backend.crypto import d"),
        ("backend/api/a.py", "from fastapi import Request\nfrom backend.api.auth import Me"),
        ("backend/services/a.py", "import schedule\nfrom backend.services.b import c"),
        ("backend/services/schema_service.py", "from alembic import command"),
        ("backend/models/a.py", "from backend.settings import RetentionAction"),
        ("backend/crypto/a.py", "from jose import jwt\nfrom backend.crypto import keyring"),
        ("backend/privacy/a.py", "from backend.errors import HoldfastError"),
        ("backend/backup/a.py", "import boto3\nfrom backend import db_utils"),
        ("backend/db_utils.py", "from backend.settings import get_settings\nsession.commit()"),
        ("backend/settings.py", "from backend.errors import ConfigurationError"),
        ("alembic/env.py", "from alembic import context\nfrom backend.crypto.columns import E"),
        ("backend/privacy/a.py", "\n" * MAX_LINES),
    ],
)
def test_what_the_rules_allow_is_no_breach(path: str, source: str) -> None:
    assert breaches(path, source) == []


def test_a_cycle_of_services_is_found() -> None:
    a, b, c = (f"backend/services/{name}.py" for name in "abc")
    chain = {a: "from backend.services.b import x", b: "import backend.services.c", c: ""}
    assert cycles(chain) == []
    closed = chain | {c: "def late():\n    from backend.services import a"}
    names = ["backend.services.a", "backend.services.b", "backend.services.c"]
    assert cycles(closed) == [[*names, names[0]]]
