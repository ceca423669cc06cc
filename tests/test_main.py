"""`python main.py`: refuses where it cannot start, starts where it can, stops when asked."""

import logging
import os
import re
import signal
import socket
import sqlite3
import ssl
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest
import uvicorn

from main import main
from tests.conftest import ADMIN, JWT_SECRET, KEY, OTHER_KEY, clear_caches

ROOT: Final = Path(__file__).resolve().parents[1]
# Bounds a start that hangs; how long a good one takes decides nothing.
_START_SECONDS: Final = 60


_HALF_A_REQUEST: Final = (
    b"POST /auth/token HTTP/1.1\r\nHost: 127.0.0.1\r\nExpect: 100-continue\r\n"
    b"Content-Type: application/x-www-form-urlencoded\r\nContent-Length: 100\r\n\r\n"
)


def environment(folder: Path, **settings: str) -> dict[str, str]:
    """What a shell would give: nothing of this process, and a free port of loopback."""
    ours = {"PATH": os.environ["PATH"], "DATA_DIR": str(folder), "PORT": "0"}
    return ours | {"PYTHONDONTWRITEBYTECODE": "1", "SCHEDULER_ENABLED": "false"} | settings


@dataclass
class Server:
    """A running service: its address, and what it has written so far."""

    process: subprocess.Popen[str]
    url: str
    lines: list[str]

    @property
    def output(self) -> str:
        return "\n".join(self.lines)

    @property
    def password(self) -> str:
        """The first admin's password, as it was shown."""
        found = re.search(r"Password, shown this once: (\S+)", self.output)
        assert found, self.output
        return found[1]

    def stop(self, by: signal.Signals = signal.SIGTERM) -> int:
        """Ask it to stop, wait until it has, keep what it still wrote; return its exit code."""
        self.process.send_signal(by)
        code = self.process.wait(timeout=_START_SECONDS)
        self.lines += (line.rstrip("\n") for line in self.process.stdout or ())
        return code


@contextmanager
def serving(folder: Path, *, log: Path, **settings: str) -> Iterator[Server]:
    """Start the service, wait until it says its address, stop it in the end."""
    with (
        log.open("w") as stderr,
        subprocess.Popen(
            [sys.executable, ROOT / "main.py"],
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            cwd=folder.parent,
            env=environment(folder, **settings),
        ) as process,
    ):
        # A start that hangs must not hang the tests.
        alarm = threading.Timer(_START_SECONDS, process.kill)
        alarm.start()
        lines: list[str] = []
        try:
            url = _address(process, lines)
            assert url, log.read_text()
            alarm.cancel()
            yield Server(process, url, lines)
        finally:
            alarm.cancel()
            if process.poll() is None:
                process.kill()


def _address(process: subprocess.Popen[str], lines: list[str]) -> str | None:
    for line in process.stdout or ():
        lines.append(line.rstrip("\n"))
        if found := re.search(r"Holdfast is at (https?://\S+)", line):
            return found[1]
    return None


def fetch(url: str, context: ssl.SSLContext | None = None) -> int:
    """Get *url*; the port is open before the service accepts, so the first call waits."""
    with urllib.request.urlopen(url, timeout=_START_SECONDS, context=context) as answer:  # noqa: S310 - loopback
        status: int = answer.status
        return status


Refuse = Callable[..., str]


@pytest.fixture
def refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Refuse]:
    """Start where that must be refused; return the one line that says why."""

    def never(_server: uvicorn.Server, sockets: object) -> None:
        pytest.fail(f"it serves on {sockets}")

    def start(folder: Path, **settings: str) -> str:
        for name, value in environment(folder, **settings).items():
            monkeypatch.setenv(name, value)
        clear_caches()
        assert main() == 2
        written = capsys.readouterr()
        assert written.out == ""
        (line,) = written.err.splitlines()
        assert line.startswith("holdfast: ")
        return line

    # In this process, for a new one takes a second; what must not be reached would not return.
    monkeypatch.setattr(uvicorn.Server, "run", never)
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    yield start
    root.handlers[:], root.level = before, level


def contents(folder: Path) -> dict[str, bytes | None]:
    """Every file below *folder*, and what is in it."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


# Refusals: one line, exit code 2, and nothing is made or changed.


# As behind a proxy that ends TLS.
_PRODUCTION: Final = {"APP_ENV": "production", "TRUSTED_PROXIES": "127.0.0.1"}
_PLACEHOLDER: Final = "change-me-change-me-change-me-change-me"
_PASSWORD: Final = "pass-word"
_URL: Final = f"holdfast:{_PASSWORD}@127.0.0.1"


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"TIMEZONE": "Nowhere"}, "TIMEZONE"),
        ({"ADMIN_EMAIL": "no address"}, "ADMIN_EMAIL"),
        ({"ENCRYPTION_KEY": "c2hvcnQ="}, "key"),
        ({"ENCRYPTION_KEY": KEY, "ENCRYPTION_KEYS_PREVIOUS": "c2hvcnQ="}, "key"),
        ({"ENCRYPTION_KEY": KEY, "ENCRYPTION_KEYS_PREVIOUS": KEY}, "ENCRYPTION_KEYS_PREVIOUS"),
        ({"JWT_SECRET_KEY": "short"}, "JWT_SECRET_KEY"),
        ({"JWT_SECRET_KEY": _PLACEHOLDER}, "JWT_SECRET_KEY"),
        ({"THROTTLE_STORE": "redis://127.0.0.1:99999/0"}, "THROTTLE_STORE"),
        (_PRODUCTION | {"JWT_SECRET_KEY": JWT_SECRET}, "ENCRYPTION_KEY"),
        (_PRODUCTION | {"ENCRYPTION_KEY": KEY}, "JWT_SECRET_KEY"),
        ({"DATABASE_URL": "nowhere"}, "DATABASE_URL"),
        ({"DATABASE_URL": f"mysql://{_URL}/holdfast"}, "DATABASE_URL"),
        ({"DATABASE_URL": f"postgresql://{_URL}:port/holdfast"}, "DATABASE_URL"),
        ({"DATABASE_URL": f"postgresql+none://{_URL}/holdfast"}, "DATABASE_URL"),
        # Nobody listens on port 1.
        ({"DATABASE_URL": f"postgresql://{_URL}:1/holdfast"}, "DATABASE_URL"),
        ({"DATABASE_URL": "sqlite:///missing/folder/holdfast.db"}, "DATABASE_URL"),
        ({"BACKUP_URL": "ftp://127.0.0.1/backups"}, "BACKUP_URL"),
        ({"BACKUP_URL": "a-file"}, "BACKUP_URL"),
        ({"SSL_CERT_PATH": "a-file"}, "SSL_KEY_PATH"),
        ({"SSL_CERT_PATH": "a-file", "SSL_KEY_PATH": "a-file"}, "SSL_CERT_PATH"),
        ({"SSL_CERT_PATH": "missing", "SSL_KEY_PATH": "missing"}, "SSL_CERT_PATH"),
        ({"DATA_DIR": "a-file"}, "DATA_DIR"),
        ({"DATA_DIR": "a-file/below"}, "DATA_DIR"),
        # A folder in which not even root may make a file.
        ({"DATA_DIR": "/proc"}, "DATA_DIR"),
        ({"DATABASE_URL": "sqlite:////proc/holdfast.db"}, "DATABASE_URL"),
        ({"BACKUP_URL": "/proc"}, "BACKUP_URL"),
    ],
)
def test_a_bad_setting_is_one_line_and_makes_nothing(
    tmp_path: Path, refused: Refuse, settings: dict[str, str], named: str
) -> None:
    (tmp_path / "a-file").write_text("mine")
    line = refused(tmp_path / "data", **settings)
    assert named in line
    assert not [secret for secret in (KEY, "c2hvcnQ=", _PLACEHOLDER, _PASSWORD) if secret in line]
    assert contents(tmp_path) == {"a-file": b"mine"}


def test_a_port_in_use_is_one_line_and_makes_nothing(tmp_path: Path, refused: Refuse) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        line = refused(tmp_path / "data", PORT=port)
    assert port in line
    assert contents(tmp_path) == {}


@pytest.fixture
def prepared(tmp_path: Path, sqlite_template: Path) -> Path:
    """A folder with a database that was made under `KEY`."""
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "holdfast.db").write_bytes(sqlite_template.read_bytes())
    return folder


def test_another_key_than_the_datas_is_refused_and_changes_nothing(
    prepared: Path, refused: Refuse
) -> None:
    before = contents(prepared)
    line = refused(prepared, ENCRYPTION_KEY=OTHER_KEY, JWT_SECRET_KEY=JWT_SECRET)
    assert "key" in line
    assert OTHER_KEY not in line
    assert contents(prepared) == before


def test_no_key_is_made_where_data_needs_one(prepared: Path, refused: Refuse) -> None:
    with closing(sqlite3.connect(prepared / "holdfast.db")) as database:
        ((key_id,),) = database.execute("SELECT key_id FROM encryption_keys")
    before = contents(prepared)
    assert key_id in refused(prepared, JWT_SECRET_KEY=JWT_SECRET)
    assert contents(prepared) == before


def test_a_database_of_a_newer_version_is_refused_and_changes_nothing(
    prepared: Path, refused: Refuse
) -> None:
    with closing(sqlite3.connect(prepared / "holdfast.db")) as database, database:
        database.execute("UPDATE alembic_version SET version_num = '9999'")
    before = contents(prepared)
    assert "9999" in refused(prepared, ENCRYPTION_KEY=KEY, JWT_SECRET_KEY=JWT_SECRET)
    assert contents(prepared) == before


def test_a_file_that_is_no_database_is_refused_and_stays_as_it_is(
    tmp_path: Path, refused: Refuse
) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "holdfast.db").write_text("mine " * 100)
    before = contents(tmp_path)
    line = refused(folder, ENCRYPTION_KEY=KEY, JWT_SECRET_KEY=JWT_SECRET)
    assert "DATABASE_URL" in line
    assert contents(tmp_path) == before


def test_a_database_of_another_program_is_refused_and_stays_as_it_is(
    tmp_path: Path, refused: Refuse
) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    with closing(sqlite3.connect(folder / "holdfast.db")) as database, database:
        database.execute("CREATE TABLE users (name TEXT)")
    before = contents(tmp_path)
    assert "DATABASE_URL" in refused(folder)
    assert contents(tmp_path) == before


def test_a_dotenv_file_that_is_no_text_is_refused(tmp_path: Path, refused: Refuse) -> None:
    (tmp_path / ".env").write_bytes(b"\xff\xfe")
    assert ".env" in refused(tmp_path / "data")
    assert contents(tmp_path) == {".env": b"\xff\xfe"}


@pytest.mark.parametrize("name", ["encryption.key", "jwt.secret"])
@pytest.mark.parametrize("data", [b"", b"short", b"\xff" * 64], ids=["empty", "short", "binary"])
def test_a_damaged_secret_in_the_folder_is_refused_and_not_replaced(
    tmp_path: Path, refused: Refuse, name: str, data: bytes
) -> None:
    # A process that is killed while it makes one leaves it short; with an empty `jwt.secret`
    # anyone could sign a token.
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / name).write_bytes(data)
    assert name in refused(folder)
    assert contents(folder) == {name: data}


def test_a_refusal_is_the_last_word_of_the_process_and_its_exit_code(prepared: Path) -> None:
    before = contents(prepared)
    done = subprocess.run(
        [sys.executable, ROOT / "main.py"],
        capture_output=True, text=True, timeout=_START_SECONDS, check=False, cwd=prepared.parent,
        env=environment(prepared, ENCRYPTION_KEY=OTHER_KEY, JWT_SECRET_KEY=JWT_SECRET),
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert re.fullmatch(r"holdfast: .*\n", done.stderr)
    # Not even what SQLite keeps beside an open database.
    assert contents(prepared) == before


# A good start


@dataclass(frozen=True)
class Starts:
    """What two starts in one folder wrote, and how each ended."""

    folder: Path
    first: str
    second: str
    password: str
    ready: list[int]
    codes: list[int]


@pytest.fixture(scope="module")
def starts(tmp_path_factory: pytest.TempPathFactory) -> Starts:
    """Two starts, one after the other, in a folder that is not there before."""
    base = tmp_path_factory.mktemp("starts")
    written, ready, codes = [], [], []
    password = ""
    for number, by in enumerate((signal.SIGTERM, signal.SIGINT)):
        with serving(base / "data", log=base / f"{number}.log", SCHEDULER_ENABLED="true") as server:
            ready.append(fetch(f"{server.url}/readyz"))
            password = password or server.password
            codes.append(server.stop(by))
            written.append(server.output + (base / f"{number}.log").read_text())
    return Starts(base / "data", written[0], written[1], password, ready, codes)


def test_the_first_start_makes_everything_and_is_ready(starts: Starts) -> None:
    assert starts.ready == [200, 200]
    assert starts.folder.stat().st_mode & 0o777 == 0o700
    for name in ("holdfast.db", "encryption.key", "jwt.secret"):
        assert (starts.folder / name).stat().st_mode & 0o777 == 0o600


def test_the_admins_password_is_shown_once_and_kept_as_a_hash_only(starts: Starts) -> None:
    assert ADMIN in starts.first
    assert starts.first.count(starts.password) == 1
    assert "Password" not in starts.second
    assert starts.password not in starts.second
    for name, data in contents(starts.folder).items():
        assert starts.password.encode() not in (data or b""), name
    with closing(sqlite3.connect(starts.folder / "holdfast.db")) as database:
        ((stored,),) = database.execute("SELECT password_hash FROM users")
    assert stored.startswith("$argon2id$v=19$m=19456,t=2,p=1$")


def test_a_key_that_was_made_is_warned_about_and_never_shown(starts: Starts) -> None:
    key = (starts.folder / "encryption.key").read_text()
    assert "encryption_key_generated" in starts.first
    assert "encryption_key_generated" not in starts.second
    assert key not in starts.first + starts.second


def _ends(by: signal.Signals) -> set[int]:
    # Uvicorn ends in order and then by the signal itself; service managers count that as success.
    return {0, -by, 128 + by}


def test_asked_to_stop_it_ends_in_order_and_without_a_word_of_error(starts: Starts) -> None:
    for code, by in zip(starts.codes, (signal.SIGTERM, signal.SIGINT), strict=True):
        assert code in _ends(by)
    for written in (starts.first, starts.second):
        assert "Application shutdown complete" in written
        assert "Traceback" not in written
    # An end in order moves the log into the file.
    assert not (starts.folder / "holdfast.db-wal").exists()


def test_a_caller_that_never_ends_its_request_does_not_keep_it_from_stopping(
    tmp_path: Path,
) -> None:
    with serving(tmp_path / "data", log=tmp_path / "log") as server:
        fetch(f"{server.url}/healthz")
        host, _, port = server.url.removeprefix("http://").partition(":")
        with socket.create_connection((host, int(port))) as caller:
            caller.sendall(_HALF_A_REQUEST)
            # The service asks for the rest, so the request is under way.
            assert caller.recv(100).startswith(b"HTTP/1.1 100")
            assert server.stop() in _ends(signal.SIGTERM)
    assert not (tmp_path / "data" / "holdfast.db-wal").exists()


def test_an_address_of_ipv6_is_shown_as_a_browser_takes_it(tmp_path: Path) -> None:
    with serving(tmp_path / "data", log=tmp_path / "log", HOST="::1") as server:
        assert server.url.startswith("http://[::1]:")
        assert fetch(f"{server.url}/healthz") == 200
