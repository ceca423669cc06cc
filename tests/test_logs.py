"""Logs in production: one JSON object a line, and nothing of anybody's in any of them."""

import json
import logging
import re
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass
from typing import Any, Final

import pytest
import structlog

from backend.errors import ConfigurationError
from backend.logs import configure_logs, where
from backend.settings import load_settings
from tests.conftest import JWT_SECRET, KEY
from tests.test_main import serving

# Each is sent somewhere that has no use for it, or that fails.
CANARIES: Final = {
    "address": "kanarienvogel@example.com",
    "name": "Wellensittich",
    "password": "Zebrafink-Zebrafink",
    "path": "Stieglitz",
    "query": "Buchfink",
    "token": "Rotkehlchen",
    "agent": "Gimpel",
}
_ERASE: Final = {"mode": "delete", "reason": CANARIES["name"], "dry_run": True}


@dataclass(frozen=True)
class Run:
    """What a run in production wrote, what it was asked with, and the statuses it answered."""

    text: str
    token: str
    statuses: list[int]

    @property
    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.text.splitlines()]


class Caller:
    """Makes requests that carry canaries and keeps the statuses."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.statuses: list[int] = []
        self.token = CANARIES["token"]

    def send(self, path: str, body: Any = None, *, form: bool = False) -> Any:
        data = None
        headers = {
            "Authorization": f"Bearer {self.token}",
            "User-Agent": CANARIES["agent"],
            "Cookie": f"session={CANARIES['token']}",
            "Content-Type": "application/json",
            "X-Forwarded-Proto": "https",
        }
        if body is not None:
            data = json.dumps(body).encode()
        if form:
            data = urllib.parse.urlencode(body).encode()
            headers["Content-Type"] = "application/x-www-form-urlencoded"
        request = urllib.request.Request(self.url + path, data, headers)  # noqa: S310 - loopback
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:  # noqa: S310 - loopback
                self.statuses.append(answer.status)
                return json.load(answer)
        except urllib.error.HTTPError as err:
            self.statuses.append(err.code)
            err.close()
            return None


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    base = tmp_path_factory.mktemp("logs")
    settings = {
        # As behind a proxy on this machine, for which the caller stands.
        "APP_ENV": "production",
        "TRUSTED_PROXIES": "127.0.0.1",
        "ENCRYPTION_KEY": KEY,
        "JWT_SECRET_KEY": JWT_SECRET,
        "ADMIN_EMAIL": CANARIES["address"],
        "LOG_LEVEL": "DEBUG",
    }
    with serving(base / "data", log=base / "log", **settings) as server:
        caller = Caller(server.url)
        _ask(caller, server.password)
        server.stop()
        text = (base / "log").read_text()
        assert server.password not in text
    return Run(text, caller.token, caller.statuses)


def _ask(caller: Caller, password: str) -> None:
    """Everything that may go wrong around a person's data, and the same going right."""
    wrong = {"username": CANARIES["address"], "password": CANARIES["password"]}
    caller.send("/auth/token", wrong, form=True)
    caller.send("/auth/token", {"username": CANARIES["name"]}, form=True)
    caller.send("/auth/me")
    caller.send(f"/{CANARIES['path']}?q={CANARIES['query']}")
    caller.token = caller.send("/auth/token", wrong | {"password": password}, form=True)[
        "access_token"
    ]
    caller.send("/auth/me")
    caller.send(f"/security/holds/{CANARIES['path']}?q={CANARIES['query']}")
    caller.send("/security/data/export", {"user_id": CANARIES["name"]})
    caller.send("/security/data/export", {"user_id": 1, "passphrase": CANARIES["password"]})
    exported = caller.send("/security/data/export", {"user_id": 1})
    exported["data"]["users"][0]["full_name"] = 7
    caller.send("/security/data/import", {"export": exported | {"format": CANARIES["name"]}})
    caller.send("/security/data/import", {"export": exported})
    caller.send("/security/data/delete", _ERASE | {"user_id": 1})
    caller.send("/security/data/consent/1", {"purpose": CANARIES["name"], "granted": True})
    consent = {"purpose": "marketing", "granted": True, "notice_version": CANARIES["name"]}
    caller.send("/security/data/consent/1", consent)
    hold = {"scope": "person", "user_id": 1, "reason": CANARIES["name"]}
    caller.send("/security/holds", hold)
    caller.send("/security/backup/create", {"label": CANARIES["name"]})


def test_every_line_is_one_json_object_that_says_when_how_grave_and_what(run: Run) -> None:
    assert len(run.lines) > len(run.statuses)
    for line in run.lines:
        assert line["timestamp"].endswith("Z")
        assert line["level"] in {"debug", "info", "warning", "error"}
        assert line["event"]


def test_every_request_is_logged_by_route_with_its_id(run: Run) -> None:
    requests = [line for line in run.lines if line["event"] == "request"]
    assert [line["status"] for line in requests] == run.statuses
    assert set(run.statuses) >= {200, 201, 401, 404, 409, 422}
    assert len({line["request_id"] for line in requests}) == len(requests)
    assert {"method", "route", "milliseconds"} <= set(requests[0])
    assert "/security/holds/{hold_id}" in {line["route"] for line in requests}


@pytest.mark.parametrize("kind", CANARIES)
def test_no_line_holds_what_was_sent(run: Run, kind: str) -> None:
    assert CANARIES[kind].lower() not in run.text.lower()


def test_no_line_holds_a_token_or_a_key(run: Run) -> None:
    for secret in (run.token, run.token.rsplit(".", 1)[1], KEY, JWT_SECRET):
        assert secret not in run.text


def test_an_exception_is_logged_by_its_class_and_place_and_never_its_words(
    capsys: pytest.CaptureFixture[str],
) -> None:
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    configure_logs(load_settings(app_env="production"))
    try:
        try:
            load_settings(port=CANARIES["name"])
        except Exception:  # as the edges of the service do
            structlog.get_logger("test").exception("failed")
            logging.getLogger("library").exception("failed")
        lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    finally:
        root.handlers[:], root.level = before, level
    assert [line["error"] for line in lines] == ["ConfigurationError"] * 2
    assert all(line["where"].startswith("settings.py:") for line in lines)
    assert not any(name in line for line in lines for name in ("exception", "exc_info", "stack"))


def test_the_place_is_the_last_line_of_ours() -> None:
    with pytest.raises(ConfigurationError) as ours:
        load_settings(port=-1)
    assert re.fullmatch(r"settings\.py:\d+", where(ours.value))
    with pytest.raises(ValueError, match="Expecting") as theirs:
        json.loads("{")
    assert where(theirs.value) == "unknown"
