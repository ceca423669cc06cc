"""Key services that are down, odd or not set up: told apart, in bounded time, without secrets."""

import base64
import logging
import re
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread
from typing import Any, Final

import pytest

from backend.crypto.key_services import (
    KeyService,
    KeyServiceRefusedError,
    KeyServices,
    KeyServiceUnavailableError,
    is_wrapped,
    unwrap,
    wrap,
)
from backend.errors import ConfigurationError, UnavailableError
from tests.conftest import KEY
from tests.crypto.conftest import (
    RAW,
    TOKEN,
    Keeper,
    address_of,
    assert_nothing_secret,
    bao_command,
    free_port,
    needs,
    outage,
    refusal,
    running,
    vault_client,
)

BLOB: Final = base64.b64encode(bytes(60)).decode()
FORMS: Final = {KeyService.VAULT: f"vault:v1:{BLOB}", KeyService.AWS_KMS: f"aws-kms:{BLOB}"}
# Seconds: for a server that never answers, and for one that does, however busy the machine.
SOON: Final = 1.5
IN_TIME: Final = 30.0
JSON: Final = "application/json"


def services_at(address: str, timeout_seconds: float = IN_TIME) -> KeyServices:
    """Both services, said to be at one address."""
    return KeyServices(
        vault_addr=address, vault_token=TOKEN, vault_transit_key="k",
        aws_region="eu-west-1", aws_endpoint_url=address, aws_kms_key_id="k",
        timeout_seconds=timeout_seconds,
    )  # fmt: skip


@contextmanager
def answering(
    status: int = 200, body: bytes = b"", media: str = JSON, location: str = "", drip: bool = False
) -> Iterator[tuple[str, list[str]]]:
    """A server that answers always the same, and the requests it has seen."""
    seen: list[str] = []
    over = Event()

    def answer(self: BaseHTTPRequestHandler) -> None:
        seen.append(f"{self.path} {self.headers}")
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.send_response(status)
        self.send_header("Content-Type", media)
        self.send_header("Content-Length", "1000" if drip else str(len(body)))
        if location:
            self.send_header("Location", location)
        self.end_headers()
        self.wfile.write(body)
        while drip and not over.wait(0.05):
            self.wfile.write(b" ")

    quiet: dict[str, Any] = {"log_message": lambda *_: None}
    verbs = {f"do_{verb}": answer for verb in ("GET", "POST", "PUT")}
    handler = type("Handler", (BaseHTTPRequestHandler,), quiet | verbs)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield address_of(server.server_port), seen
        finally:
            over.set()
            server.shutdown()
            thread.join()


@pytest.fixture(params=list(KeyService))
def service(request: pytest.FixtureRequest, aws_credentials: None) -> KeyService:
    needs("hvac", "boto3")
    return KeyService(request.param)


def test_a_sealed_or_stopped_vault_is_unavailable_and_one_unsealed_opens(tmp_path: Path) -> None:
    port = free_port()
    with running(bao_command(port), tmp_path, port) as process:
        services = services_at(address_of(port))
        client = vault_client(address_of(port))
        client.sys.enable_secrets_engine("transit")
        client.secrets.transit.create_key("k")
        wrapped = wrap(RAW, KeyService.VAULT, services)
        client.sys.seal()
        assert "sealed" in outage(partial(unwrap, wrapped, services))
        assert "sealed" in outage(partial(wrap, RAW, KeyService.VAULT, services))
        printed = re.search(r"Unseal Key: (\S+)", (tmp_path / "log").read_text())
        assert printed
        client.sys.submit_unseal_key(printed[1])
        client.adapter.close()
        assert unwrap(wrapped, services) == RAW
        process.kill()
        process.wait()
        assert "VAULT_ADDR" in outage(partial(unwrap, wrapped, services))


def test_a_vault_with_a_certificate_is_trusted_by_its_authority_only(tmp_path: Path) -> None:
    port = free_port()
    flags = ("-dev-tls", f"-dev-tls-cert-dir={tmp_path}")
    with running(bao_command(port, *flags), tmp_path, port):
        (authority,) = tmp_path.glob("*-ca.pem")
        address = f"https://127.0.0.1:{port}"
        services = KeyServices(address, TOKEN, vault_cacert=authority, vault_transit_key="k")
        with closing(vault_client(address, verify=str(authority)).adapter) as adapter:
            adapter.post("/v1/sys/mounts/transit", json={"type": "transit"})
            adapter.post("/v1/transit/keys/k")
        wrapped = wrap(RAW, KeyService.VAULT, services)
        assert unwrap(wrapped, services) == RAW
        for path in (None, tmp_path / "missing.pem"):
            changed = replace(services, vault_cacert=path)
            assert "VAULT_CACERT" in refusal(partial(unwrap, wrapped, changed))


def test_a_vault_over_its_quota_is_unavailable(vault: Keeper) -> None:
    adapter = vault.client.adapter
    adapter.post("/v1/sys/mounts/slow", json={"type": "transit"})
    adapter.post("/v1/slow/keys/k")
    quota = {"path": "slow/", "rate": 1, "interval": "1h"}
    adapter.post("/v1/sys/quotas/rate-limit/slow", json=quota)
    services = replace(vault.services, vault_transit_mount="slow", vault_transit_key="k")
    # Its one request of this hour.
    refusal(partial(unwrap, FORMS[KeyService.VAULT], services))
    assert "429" in outage(partial(unwrap, FORMS[KeyService.VAULT], services))


def test_an_outage_is_answered_with_503_and_a_refusal_stops_the_start() -> None:
    assert issubclass(KeyServiceUnavailableError, UnavailableError)
    assert KeyServiceUnavailableError.status == 503
    assert KeyServiceUnavailableError.retry_after_seconds > 0
    assert issubclass(KeyServiceRefusedError, ConfigurationError)


def test_a_service_that_nobody_runs_is_unavailable(service: KeyService) -> None:
    services = services_at(address_of(free_port()))
    outage(partial(unwrap, FORMS[service], services))
    outage(partial(wrap, RAW, service, services))


def test_a_service_that_answers_drop_by_drop_is_given_up_in_time(service: KeyService) -> None:
    with answering(drip=True) as (address, seen):
        start = time.monotonic()
        assert f"within {SOON:g} s" in outage(
            partial(unwrap, FORMS[service], services_at(address, SOON))
        )
        assert time.monotonic() - start < IN_TIME
        # On a busy machine it may be given up before it was asked; asked again it never is.
        assert len(seen) <= 1


@pytest.mark.parametrize("status", [500, 502, 503, 429, 473, 412, 307])
def test_a_vault_in_trouble_is_asked_once_and_never_followed_elsewhere(status: int) -> None:
    needs("hvac")
    body, form = b'{"errors": ["canary"]}', FORMS[KeyService.VAULT]
    with answering() as (elsewhere, never), answering(status, body, location=elsewhere) as there:
        outage(partial(unwrap, form, services_at(there[0])))
        assert len(there[1]) == 1
        assert TOKEN in there[1][0]
        assert never == []


@pytest.mark.parametrize(
    ("status", "kind"),
    [(500, "KMSInternalException"), (503, "x"), (429, "x"), (400, "ThrottlingException")],
)
def test_a_kms_in_trouble_is_asked_once(status: int, kind: str, aws_credentials: None) -> None:
    needs("boto3")
    body = f'{{"__type": "{kind}", "message": "canary"}}'.encode()
    with answering(status, body) as (address, seen):
        outage(partial(unwrap, FORMS[KeyService.AWS_KMS], services_at(address)))
        assert len(seen) == 1


@pytest.mark.parametrize(
    ("status", "body", "media"),
    [
        (200, b"<html>canary</html>", "text/html"),
        (200, b'{"canary": 1}', JSON),
        (200, b"{", JSON),
        (200, b'{"data": {"plaintext": "canary!"}, "Plaintext": "canary!"}', JSON),
        (200, b'{"data": {"plaintext": 7}, "Plaintext": 7}', JSON),
        (301, b"", "text/html"),
        (404, b"<html>canary</html>", "text/html"),
        (400, b'{"errors": ["canary"], "__type": "canary"}', JSON),
        (418, b'{"errors": ["canary"]}', JSON),
    ],
)
def test_what_is_no_key_service_is_refused_in_our_words(
    service: KeyService, status: int, body: bytes, media: str
) -> None:
    with answering(status, body, media) as (address, seen):
        refusal(partial(unwrap, FORMS[service], services_at(address)))
        assert len(seen) == 1


def test_a_web_page_where_the_vault_should_be_is_not_taken_for_an_unknown_key() -> None:
    needs("hvac")
    for media, said in (("text/html", "VAULT_ADDR is not"), (JSON, "VAULT_TRANSIT_KEY names no")):
        with answering(404, b'{"errors": []}', media) as (address, _):
            ask = partial(unwrap, FORMS[KeyService.VAULT], services_at(address))
            assert said in refusal(ask)


@pytest.mark.parametrize(
    "text",
    [
        "vault:", "vault:v1:", "vault:v1", "vault:v0:AAAA", "vault:AAAA", "vault:v1:A*AA",
        "vault:v1:AAAA\nAAAA", "vault:v1:vault:v1:AAAA", f"vault:v1:{'A' * 9000}",
        "aws-kms:", "aws-kms:v1:AAAA", "aws-kms:AAAA=A", "aws-kms:A", f"aws-kms:{'A' * 9000}",
    ],
)  # fmt: skip
def test_a_wrapped_key_that_is_cut_is_refused_before_anyone_is_asked(
    text: str, aws_credentials: None
) -> None:
    needs("boto3")
    assert is_wrapped(text)
    with answering() as (address, seen):
        assert "cut or damaged" in refusal(partial(unwrap, text, services_at(address)))
        assert seen == []


@pytest.mark.parametrize("text", ["", KEY, KEY.rstrip("="), "vault", "Vault:v1:AAAA", "kms:AAAA"])
def test_a_key_itself_is_not_taken_for_a_wrapped_one(text: str) -> None:
    assert not is_wrapped(text)


@pytest.mark.parametrize(
    ("wrapped_by", "name"),
    [
        (KeyService.VAULT, "VAULT_ADDR"),
        (KeyService.VAULT, "VAULT_TOKEN"),
        (KeyService.VAULT, "VAULT_TRANSIT_KEY"),
        (KeyService.VAULT, "VAULT_TRANSIT_MOUNT"),
        (KeyService.AWS_KMS, "AWS_REGION"),
        (KeyService.AWS_KMS, "AWS_KMS_KEY_ID"),
    ],
)
def test_a_missing_setting_is_named(
    wrapped_by: KeyService, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The library would take what the machine's other programs use.
    monkeypatch.setenv(name, "http://127.0.0.1:9")
    without: dict[str, Any] = {name.lower(): ""}
    services = replace(services_at(address_of(free_port())), **without)
    assert name in refusal(partial(unwrap, FORMS[wrapped_by], services))
    assert name in refusal(partial(wrap, RAW, wrapped_by, services))


def test_a_missing_library_is_named_with_what_installs_it(
    service: KeyService, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = {KeyService.VAULT: "hvac", KeyService.AWS_KMS: "boto3"}[service]
    for name in [name for name in sys.modules if name.partition(".")[0] == library]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, library, None)
    services = services_at(address_of(free_port()))
    assert f"pip install {library}" in refusal(partial(unwrap, FORMS[service], services))


@pytest.mark.parametrize("address", ["127.0.0.1:8200", "ftp://127.0.0.1", "http://", "canary"])
def test_an_address_that_is_none_is_refused(service: KeyService, address: str) -> None:
    refusal(partial(unwrap, FORMS[service], services_at(address)))


def test_nothing_secret_is_shown_or_logged_at_any_level(
    keeper: Keeper, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    assert unwrap(wrap(RAW, keeper.service, keeper.services), keeper.services) == RAW
    refusal(partial(unwrap, FORMS[keeper.service], keeper.services))
    assert_nothing_secret(caplog.text + repr(keeper.services) + str(keeper.services))
