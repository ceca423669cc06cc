"""No key, token, passphrase or plaintext in what is raised, printed, logged or answered."""

import base64
import io
import logging
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

import orjson
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from sqlalchemy import insert, select, text

import db_cli
from backend import errors
from backend.api.auth import Token
from backend.api.encryption import KeyAnswer
from backend.crypto import bearer, keyring, passwords
from backend.crypto.files import KeyringLock, Opener, PassphraseLock, Sealer
from backend.crypto.keyring import Keyring, RootKey, parse_key
from backend.crypto.values import column_scope, value_scope
from backend.db_utils import session_scope
from backend.models import User
from backend.services.encryption_service import get_encryption_service
from backend.services.setup_service import Prepared
from backend.settings import get_settings, load_settings
from main import create_app, main
from tests.conftest import ADMIN, JWT_SECRET, KEY, OTHER_KEY, PASSWORD, Service, clear_caches
from tests.test_main import environment

# What must not appear: the names of birds stand for what is anybody's own.
PLAIN: Final = "Kanarienvogel"
PHRASE: Final = "Zaunkönig und Wellensittich"
WRONG_PASSWORD: Final = "Rotkehlchen-Rotkehlchen"
SHORT: Final = "Gimpel"
BAD_KEY: Final = "Stieglitz-Stieglitz-Stieglitz"
NOW: Final = datetime(2026, 3, 1, 12, tzinfo=UTC)

RAW, OTHER_RAW = base64.b64decode(KEY), base64.b64decode(OTHER_KEY)
ONE, TWO = Keyring(RootKey(RAW)), Keyring(RootKey(OTHER_RAW))
SIGN_IN: Final = bearer.SignIn(1, "a-random-number", NOW)
KEYS: Final = bearer.TokenKeys(JWT_SECRET)
JWT: Final = KEYS.issue(SIGN_IN, lifetime=timedelta(minutes=5), now=NOW)
FORGED: Final = bearer.TokenKeys("x" * 40).issue(SIGN_IN, lifetime=timedelta(days=9), now=NOW)
SEALED: Final = ONE.cipher(value_scope("a")).seal_text(PLAIN.encode())


def spellings(raw: bytes) -> set[str]:
    """Every way in which 32 bytes are likely to be written."""
    standard, url = base64.b64encode(raw).decode(), base64.urlsafe_b64encode(raw).decode()
    found = {standard, url, base64.b64encode(url.encode()).decode(), raw.hex(), raw.hex(":")}
    found |= {repr(raw)[2:-1], repr(bytearray(raw))[12:-2], str(list(raw))[1:-1]}
    return {text.rstrip("=") for text in found | {raw.hex().upper(), str(int.from_bytes(raw))}}


SECRETS: Final[dict[str, set[str]]] = {
    "the key": spellings(RAW),
    "another key": spellings(OTHER_RAW),
    "a working key": spellings(ONE.primary.derive("value"))
    | spellings(ONE.primary.derive("column", "users", "email"))
    | spellings(ONE.primary.derive("file key")),
    "a refused key": {BAD_KEY},
    "the secret of tokens": {JWT_SECRET, base64.b64encode(JWT_SECRET.encode()).decode()},
    # The signature is what makes it a token.
    "a bearer token": {token.rsplit(".", 1)[1] for token in (JWT, FORGED)},
    "a sealed value": {SEALED},
    "a plaintext": {PLAIN, PLAIN.encode().hex(), base64.b64encode(PLAIN.encode()).decode()},
    "a passphrase": {PHRASE, "Wellensittich", SHORT},
    "a password": {PASSWORD, WRONG_PASSWORD},
}


ANY_SEALED: Final = re.compile(r"enc1\.[\w-]{8,}")


def leaks(said: str) -> list[str]:
    """Name the secrets that stand in *said*."""
    low = ANY_SEALED.sub(SEALED, said).lower()
    return [kind for kind, words in SECRETS.items() if any(word.lower() in low for word in words)]


def said_by(err: BaseException) -> str:
    """All that a log, a terminal or an error tracker would show of *err* and what it came from."""
    shown: BaseException | None = err
    parts = traceback.format_exception(err)
    while shown is not None:
        parts += [str(shown), repr(shown), repr(getattr(shown, "extra", None))]
        shown = shown.__cause__ or (None if shown.__suppress_context__ else shown.__context__)
    return "\n".join(parts)


def test_a_secret_is_found_in_each_spelling_and_behind_each_error() -> None:
    """The search itself: without it, all the rest would prove nothing."""
    for kind, words in SECRETS.items():
        assert all(kind in leaks(f"a {word} b") for word in words)
    assert leaks(f"{ONE!r} 7f3f30de 2026-03-01") == []
    with pytest.raises(RuntimeError) as failure:
        fail_in_a_chain()
    assert leaks(said_by(failure.value)) == ["the key", "a plaintext"]


def fail() -> None:
    raise ValueError(f"{PLAIN} {KEY}")


def fail_in_a_chain() -> None:
    try:
        fail()
    except ValueError as err:
        raise RuntimeError(PLAIN) from err


# Errors


def sealed_file(*locks: Any) -> bytes:
    return b"".join(Sealer({"kind": "export"}, locks, now=NOW).seal([PLAIN.encode()]))


def open_file(data: bytes, lock: Any) -> bytes:
    return b"".join(Opener(io.BytesIO(data), lock).chunks())


LOCK: Final = KeyringLock(ONE)
FILE: Final = sealed_file(LOCK)
FORMAT_9: Final = FILE[:9] + b"\x09" + FILE[10:]
HALF: Final = "\udcff"
NO_TOKEN: Final = f"enc1.{PLAIN}\u00e9"
OPENS: Final = ONE.cipher(value_scope("a"))
DISABLED: Final = Keyring(TWO.primary, [ONE.primary], frozenset({ONE.primary.key_id}))
FAILURES: Final[list[tuple[type[Exception], Callable[[], object]]]] = [
    (errors.KeyFormatError, lambda: parse_key(BAD_KEY)),
    (errors.KeyFormatError, lambda: parse_key(RAW.hex())),
    (errors.KeyFormatError, lambda: parse_key(KEY[:-8])),
    (errors.KeyFormatError, lambda: parse_key(KEY + KEY)),
    (errors.ConfigurationError, lambda: Keyring(ONE.primary, [RootKey(RAW)])),
    (errors.UnknownKeyError, lambda: TWO.cipher(value_scope("a")).open_text(SEALED)),
    (errors.UnknownKeyError, lambda: ONE.find(RAW[:4])),
    (errors.UnknownKeyError, lambda: open_file(FILE, KeyringLock(TWO))),
    (errors.UnknownKeyError, lambda: open_file(FILE, PassphraseLock(PHRASE))),
    (errors.KeyDisabledError, lambda: DISABLED.cipher(value_scope("a")).open_text(SEALED)),
    (errors.TamperedError, lambda: ONE.cipher(value_scope(PLAIN)).open_text(SEALED)),
    (errors.TamperedError, lambda: OPENS.open_text(f"{SEALED[:-6]}AAAAA{SEALED[-1]}")),
    (errors.TamperedError, lambda: open_file(FILE[:-1], LOCK)),
    (
        errors.TamperedError,
        lambda: open_file(sealed_file(PassphraseLock(PHRASE)), PassphraseLock(SHORT)),
    ),
    (errors.MalformedTokenError, lambda: OPENS.open_text(SEALED[:20])),
    (errors.MalformedTokenError, lambda: OPENS.open_text(NO_TOKEN)),
    (errors.MalformedTokenError, lambda: open_file(PLAIN.encode() * 400, LOCK)),
    (errors.NotEncryptedError, lambda: OPENS.open_text(PLAIN)),
    (errors.CryptoError, lambda: open_file(FORMAT_9, LOCK)),
    (errors.UnauthenticatedError, lambda: KEYS.verify(FORGED)),
    (errors.UnauthenticatedError, lambda: KEYS.verify(JWT)),
    (errors.UnauthenticatedError, lambda: KEYS.verify(f"{PLAIN}.a.b")),
    (errors.ConfigurationError, lambda: load_settings(jwt_secret_key=SHORT)),
    (errors.ConfigurationError, lambda: load_settings(encryption_key=[KEY])),
    (errors.ConfigurationError, lambda: load_settings(admin_email=PLAIN)),
]


@pytest.mark.parametrize(("kind", "fail"), FAILURES, ids=lambda case: getattr(case, "__name__", ""))
def test_no_refusal_shows_what_it_refuses(
    kind: type[Exception], fail: Callable[[], object]
) -> None:
    with pytest.raises(kind) as refusal:
        fail()
    assert type(refusal.value) is kind
    assert leaks(said_by(refusal.value)) == []


def test_no_error_of_encryption_is_left_out_above() -> None:
    known = {errors.CryptoError, errors.KeyFormatError}
    known |= {kind for kind in vars(errors).values() if _is_below(kind, errors.CryptoError)}
    assert known <= {kind for kind, _ in FAILURES}


def _is_below(kind: object, base: type) -> bool:
    return isinstance(kind, type) and issubclass(kind, base)


def no_text() -> str:
    """Seal what is no UTF-8, as a program with the key and another encoding would."""
    return keyring.current().cipher(value_scope("")).seal_text(b"\xff" + PLAIN.encode())


ODD: Final[dict[str, Callable[[], object]]] = {
    "half a surrogate pair": lambda: get_encryption_service().encrypt(PLAIN + HALF),
    "half of one as context": lambda: get_encryption_service().encrypt("a", PLAIN + HALF),
    "bytes that are no text": lambda: get_encryption_service().decrypt(no_text()),
    "a token with half of one": lambda: get_encryption_service().decrypt(NO_TOKEN + HALF),
    "a passphrase with half of one": lambda: PassphraseLock(PHRASE + HALF),
    "a password with half of one": lambda: passwords.hash_password(PASSWORD + HALF),
    "a stored hash that is none": lambda: passwords.verify_password(PASSWORD, f"${SHORT}$"),
    "no text in an encrypted column": lambda: _write(full_name=[PLAIN]),
    "no text in an indexed column": lambda: _write(email=[PLAIN]),
    "half of one in an encrypted column": lambda: _write(full_name=PLAIN + HALF),
    "half of one in an indexed column": lambda: _write(email=PLAIN + HALF),
    "an address that is taken": lambda: _write(email=ADMIN, document_type=PLAIN),
    # PostgreSQL quotes the whole row in the words of its error.
    "a row that the database refuses": lambda: _write(created_at=None, document_type=PLAIN),
    "plain text in an encrypted column": lambda: _read_after(f"'{PLAIN}@example.com'"),
    "a value of another column": lambda: _read_after(f"'{SEALED}'"),
}


def _write(**columns: Any) -> None:
    with session_scope() as session:
        session.execute(insert(User), [{"created_at": NOW, "password_hash": PHRASE} | columns])


def _read_after(value: str) -> Any:
    with session_scope() as session:
        session.execute(text(f"UPDATE users SET email = {value}"))  # noqa: S608 - ours
        return session.scalars(select(User.email)).all()


@pytest.mark.parametrize("case", ODD)
def test_what_fails_on_odd_input_does_not_show_it(service: Service, case: str) -> None:
    with pytest.raises(Exception) as failure:  # noqa: PT011 - whichever it is
        ODD[case]()
    assert leaks(said_by(failure.value)) == []


# Representations


def test_nothing_that_holds_a_secret_prints_it(
    sqlite_service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DATABASE_URL", f"postgresql://holdfast:{SHORT}@127.0.0.1/x")
    monkeypatch.setenv("ENCRYPTION_KEYS_PREVIOUS", OTHER_KEY)
    clear_caches()
    sealer = Sealer({"kind": "export"}, [LOCK], now=NOW)
    holders = [
        *(get_settings(), ONE, ONE.primary, OPENS, LOCK, PassphraseLock(PHRASE), sealer),
        *(Opener(io.BytesIO(FILE), LOCK), get_encryption_service(), value_scope("a")),
        *(column_scope("users", "email"), Prepared(migrated=True, admin=(ADMIN, PASSWORD))),
        *(KeyAnswer(key=KEY), Token(access_token=JWT, refresh_token=JWT, expires_in=60)),
    ]
    shown = {type(holder).__name__: leaks(f"{holder!r} {holder} {[holder]}") for holder in holders}
    assert {name: found for name, found in shown.items() if found} == {}


# What the service writes and answers


@pytest.fixture
def written(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Callable[[], str]]:
    """Everything that reaches a terminal or a log, down to what libraries say for debugging."""
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    monkeypatch.setenv("LOG_LEVEL", "DEBUG")

    def read() -> str:
        captured = capsys.readouterr()
        return captured.out + captured.err

    yield read
    root.handlers[:], root.level = before, level


@pytest.mark.parametrize(
    "settings",
    [
        {"ENCRYPTION_KEY": OTHER_KEY},
        {"ENCRYPTION_KEY": BAD_KEY},
        {"ENCRYPTION_KEY": RAW.hex()},
        {"ENCRYPTION_KEY": KEY, "ENCRYPTION_KEYS_PREVIOUS": f"{OTHER_KEY},{OTHER_KEY}"},
        {"ENCRYPTION_KEY": KEY, "ENCRYPTION_KEYS_PREVIOUS": f"{OTHER_KEY},{BAD_KEY}"},
        {"ENCRYPTION_KEY": KEY, "JWT_SECRET_KEY": SHORT},
        {"ENCRYPTION_KEY": KEY, "JWT_SECRET_KEY": f"change-me {PHRASE} change-me"},
        {"DATABASE_URL": f"postgresql://holdfast:{SHORT}@127.0.0.1:9/x"},
        {"DATABASE_URL": f"postgresql://holdfast:{SHORT}@127.0.0.1:port/x"},
        {"DATABASE_URL": f"mysql://holdfast:{SHORT}@127.0.0.1/x"},
        {"BACKUP_URL": f"s3://key:{SHORT}@example.com/x"},
        {},
    ],
    ids=str,
)
def test_a_start_that_is_refused_shows_no_setting(
    sqlite_service: Service,
    monkeypatch: pytest.MonkeyPatch,
    written: Callable[[], str],
    settings: dict[str, str],
) -> None:
    monkeypatch.delenv("ENCRYPTION_KEY")
    # Without any, a key file that is none.
    (sqlite_service.folder / "encryption.key").write_text(BAD_KEY)
    for name, value in (environment(sqlite_service.folder, **settings)).items():
        monkeypatch.setenv(name, value)
    clear_caches()
    assert main() == 2
    said = written()
    assert "holdfast: " in said
    assert leaks(said) == []


def broken(app: FastAPI) -> list[str]:
    """Add endpoints that fail as nobody foresaw, with secrets in hand; return their paths."""

    def duplicate() -> None:
        _write(email=ADMIN, full_name=PLAIN)

    def refuse() -> None:
        OPENS.open_text(PLAIN)

    def misread() -> None:
        get_encryption_service().decrypt(no_text())

    def statement() -> None:
        with session_scope() as session:
            session.execute(text(f"SELECT '{PLAIN}', no_such_column"))

    endpoints = (fail, fail_in_a_chain, duplicate, refuse, misread, statement)
    for endpoint in endpoints:
        app.add_api_route(f"/broken/{endpoint.__name__}", endpoint)
    return [f"/broken/{endpoint.__name__}" for endpoint in endpoints]


EXPORT, IMPORT = "/security/data/export", "/security/data/import"
FIND, DELETE = "/security/data/find", "/security/data/delete"
BAD_NAMES: Final[list[dict[str, Any]]] = [
    {"email": PLAIN},
    {"email": f"{PLAIN}@example.com\n"},
    {"email": [PLAIN]},
    {"phone": f"+49 {PLAIN}"},
    {"phone": PLAIN * 9},
    {"email": PLAIN, "phone": PLAIN},
    {PLAIN: PLAIN},
]
BAD_DELETES: Final[list[dict[str, Any]]] = [
    {"user_id": 99, "mode": "delete", "reason": PLAIN},
    {"user_id": 1, "mode": "delete", "reason": PLAIN},
    {"user_id": 1, "mode": PLAIN, "reason": PLAIN},
    {"user_id": 1, "mode": "delete", "reason": PLAIN, "plan_digest": PLAIN},
    *({"mode": "delete", "reason": PLAIN} | named for named in BAD_NAMES),
]
BAD_EXPORTS: Final[list[dict[str, Any]]] = [
    {"user_id": PLAIN},
    {"user_id": 1, "passphrase": SHORT, "encrypt": True},
    {"user_id": 1, "passphrase": [PHRASE], "encrypt": True},
    {"user_id": 99, "passphrase": PHRASE, "encrypt": True},
]


def test_no_failed_request_shows_a_secret_in_its_answer_or_in_the_log(
    service: Service, written: Callable[[], str]
) -> None:
    clear_caches()
    app = create_app()
    paths = broken(app)
    with TestClient(app, raise_server_exceptions=False) as client:

        def sign_in(name: str, password: str) -> Any:
            return client.post("/auth/token", data={"username": name, "password": password})

        def ask(path: str, token: str, body: Any = None) -> Any:
            header = {"Authorization": f"Bearer {token}"}
            return client.request("POST" if body else "GET", path, json=body, headers=header)

        token = sign_in(ADMIN, PASSWORD).json()["access_token"]
        document = ask(EXPORT, token, {"user_id": 1}).json()
        document["data"]["users"][0] |= {"full_name": [PLAIN], "email": PLAIN}
        answers = [
            *(sign_in(*pair) for pair in ((ADMIN, WRONG_PASSWORD), (PLAIN, PASSWORD))),
            *(ask("/auth/me", wrong) for wrong in (JWT, FORGED, KEY, SEALED)),
            *(ask(EXPORT, token, body) for body in BAD_EXPORTS + BAD_NAMES),
            *(ask(FIND, token, body) for body in BAD_NAMES),
            *(ask(DELETE, token, body) for body in BAD_DELETES),
            ask(IMPORT, token, {"export": document}),
            *(ask(path, token) for path in paths),
        ]
        with session_scope() as session:
            session.execute(text("UPDATE users SET full_name = :n, email = :n"), {"n": PLAIN})
        answers.append(ask(EXPORT, token, {"user_id": 1}))
        client.post("/auth/logout", headers={"Authorization": f"Bearer {token}"})
        answers.append(ask("/auth/me", token))
    statuses = [answer.status_code for answer in answers]
    assert min(statuses) >= 401
    assert len([status for status in statuses if status >= 500]) == len(paths) + 1
    log = written()
    # SQLite tells a statement it cannot read as its own trouble: that is a 503.
    assert log.count("unexpected_error") >= 3
    said = log + "".join(f"{answer.text} {answer.headers}" for answer in answers)
    assert leaks(said.replace(token.rsplit(".", 1)[1], FORGED)) == []


Run = Callable[..., int]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, written: Callable[[], str]) -> Run:
    def run_(*arguments: object, stdin: str = "") -> int:
        monkeypatch.setattr(sys, "argv", ["db_cli.py", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        clear_caches()
        try:
            return db_cli.main()
        except SystemExit as exit_:
            return int(exit_.code or 0)

    return run_


def test_no_command_that_fails_shows_a_secret(
    service: Service, run: Run, tmp_path: Path, written: Callable[[], str]
) -> None:
    service.user("eve@example.com", full_name=PLAIN)
    files = {"sealed": sealed_file(PassphraseLock(PHRASE)), "cut": FILE[:-1]}
    files["import"] = orjson.dumps({"data": {"users": [{"email": PLAIN}]}, "subject": PLAIN})
    files["bookings"] = f"hotel\n{PLAIN}\n".encode()
    files["foreign"] = sealed_file(KeyringLock(TWO))
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    phrase = "--passphrase-stdin"
    codes = [
        run("create-user", "eve@example.com", "--password-stdin", stdin=WRONG_PASSWORD),
        run("set-password", "eve@example.com", "--password-stdin", stdin=SHORT),
        run("export", 2, "-o", tmp_path / "out", phrase, stdin=SHORT),
        run("open", tmp_path / "sealed", "-o", tmp_path / "out", phrase, stdin=SHORT),
        run("open", tmp_path / "cut", "-o", tmp_path / "out"),
        run("open", tmp_path / "foreign", "-o", tmp_path / "out"),
        run("open", tmp_path / "import", "-o", tmp_path / "out"),
        run("import", tmp_path / "import"),
        run("load", "--bookings", tmp_path / "bookings"),
        *(run("find", stdin=line) for line in (PLAIN, f"{PLAIN}@example.com", f"{PLAIN}\0")),
        run("erase", "--address-stdin", "--reason", PLAIN, stdin=f"{PLAIN}@example.com"),
        run("erase", 99, "--reason", PLAIN),
        run("export", "--address-stdin", "-o", tmp_path / "out", stdin=PLAIN),
        run("certificate", "verify", tmp_path / "import"),
        run("certificate", "verify", tmp_path / "sealed"),
    ]
    with session_scope() as session:
        session.execute(text("UPDATE users SET email = :plain WHERE id = 2"), {"plain": PLAIN})
    codes.append(run("export", 2, "-o", tmp_path / "out"))
    with session_scope() as session:
        token = keyring.current().cipher(column_scope("users", "email")).seal_text(b"\xff" * 9)
        session.execute(text("UPDATE users SET email = :token WHERE id = 2"), {"token": token})
    codes.append(run("export", 2, "-o", tmp_path / "out"))
    said = written()
    assert 0 not in codes
    assert said.count("holdfast: ") >= len(codes) - 1
    assert leaks(said) == []
