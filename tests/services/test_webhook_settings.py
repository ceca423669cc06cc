"""Settings of the webhook: a bad one stops the start, by its name and without its value."""

from typing import Final

import pytest

from backend.errors import ConfigurationError
from backend.settings import get_settings
from tests.conftest import Run
from tests.services.webhook_receiver import CANARY, SECRET, set_webhook

GOOD: Final = f"https://{CANARY}.example.com/hook"


@pytest.mark.parametrize(
    ("url", "secret", "named"),
    [
        (GOOD, None, "ALERT_WEBHOOK_SECRET"),
        (GOOD, CANARY, "ALERT_WEBHOOK_SECRET"),
        (f"ftp://{CANARY}.example.com/", SECRET, "ALERT_WEBHOOK_URL"),
        (f"{CANARY}.example.com/hook", SECRET, "ALERT_WEBHOOK_URL"),
        (f"https:///{CANARY}", SECRET, "ALERT_WEBHOOK_URL"),
        (f"https://:443/{CANARY}", SECRET, "ALERT_WEBHOOK_URL"),
        (f"https://{CANARY}.example.com:0/", SECRET, "ALERT_WEBHOOK_URL"),
        (f"https://{CANARY}.example.com:99999/", SECRET, "ALERT_WEBHOOK_URL"),
        (f"https://[::1/{CANARY}", SECRET, "ALERT_WEBHOOK_URL"),
        (f"https://user:word@{CANARY}.example.com/", SECRET, "ALERT_WEBHOOK_URL"),
        (GOOD, f"whsec_{CANARY}", "ALERT_WEBHOOK_SECRET"),
        (GOOD, f"{CANARY}-of-no-standard-but-long-enough", "ALERT_WEBHOOK_SECRET"),
    ],
)
def test_a_bad_webhook_stops_the_start_by_its_name_and_is_not_shown(
    monkeypatch: pytest.MonkeyPatch, run: Run, url: str, secret: str | None, named: str
) -> None:
    set_webhook(monkeypatch, url, secret or "")
    with pytest.raises(ConfigurationError, match=named) as refusal:
        get_settings()
    assert CANARY not in refusal.value.detail
    answer = run("retention", "status")
    assert answer.code != 0
    assert named in answer.err
    assert CANARY not in answer.out + answer.err


def test_a_webhook_in_plain_is_taken_only_where_private_networks_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    set_webhook(monkeypatch, "http://127.0.0.1:8080/hook")
    assert get_settings().alert_webhook_url is not None
    monkeypatch.setenv("ALERT_WEBHOOK_ALLOW_PRIVATE", "false")
    get_settings.cache_clear()
    with pytest.raises(ConfigurationError, match="ALERT_WEBHOOK_URL"):
        get_settings()


def test_a_good_webhook_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    for url in (GOOD, f"{GOOD}?a=b", "https://hooks.example.com:8443"):
        set_webhook(monkeypatch, url)
        assert get_settings().alert_webhook_url is not None
    monkeypatch.setenv("ALERT_WEBHOOK_ALLOW_PRIVATE", "perhaps")
    get_settings.cache_clear()
    with pytest.raises(ConfigurationError, match=r"^ALERT_WEBHOOK_ALLOW_PRIVATE: "):
        get_settings()
