"""The webhook: signed as the standard says, sent to public addresses only, and never astray."""

import base64
import ipaddress
import socket
import ssl
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from hypothesis import given
from hypothesis import strategies as st

from backend.crypto.webhooks import signed_headers
from backend.services import webhook
from backend.services.webhook import WebhookError, post
from tests.services.webhook_receiver import (
    CANARY,
    Received,
    Receiver,
    checked,
    receiving,
)

NOW: Final = datetime(2026, 3, 1, 12, tzinfo=UTC)
PUBLIC: Final = ("8.8.8.8", "2606:4700::1111")
Calls = list[tuple[str, int]]


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving() as receiver:
        yield receiver


@pytest.fixture
def connected(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Where connections would have been made: outside there is nothing in these tests."""
    calls: Calls = []

    def refuse(address: tuple[str, int], *_arguments: Any) -> socket.socket:
        calls.append(address)
        raise ConnectionRefusedError

    monkeypatch.setattr(socket, "create_connection", refuse)
    return calls


def _resolve_to(monkeypatch: pytest.MonkeyPatch, *answers: tuple[str, ...]) -> None:
    """Have names resolve to the addresses of each answer in turn."""
    left = iter(answers)

    def resolve(_host: str, port: int, **_options: Any) -> list[Any]:
        return [(None, None, 6, "", (address, port)) for address in next(left)]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)


# standard-webhooks, libraries/python/tests/test_webhooks.py, test_sign_function.
def test_the_published_vector_comes_out_of_our_signature() -> None:
    headers = signed_headers(
        "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw",
        "msg_p5jXN8AQM9LWM0D4loKWxJek",
        datetime.fromtimestamp(1614265330, UTC),
        b'{"test": 2432232314}',
    )
    assert headers == {
        "webhook-id": "msg_p5jXN8AQM9LWM0D4loKWxJek",
        "webhook-timestamp": "1614265330",
        "webhook-signature": "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=",
    }


@given(key=st.binary(min_size=1), number=st.uuids(), seconds=st.floats(0, 4e9))
def test_who_has_the_secret_can_check_every_message(
    key: bytes, number: object, seconds: float
) -> None:
    at = datetime.fromtimestamp(seconds, UTC)
    headers = signed_headers(f"whsec_{base64.b64encode(key).decode()}", str(number), at, b'{"a":1}')
    assert checked(Received("/", headers, b'{"a":1}'), key, at) == {"a": 1}
    assert at - timedelta(seconds=1) < datetime.fromtimestamp(
        int(headers["webhook-timestamp"]), UTC
    )


# The published library fills up what is missing before it decodes; so we must sign with the same.
def test_a_secret_without_padding_is_the_same_secret() -> None:
    whole = "whsec_" + base64.b64encode(bytes(range(32))).decode()
    signed = [signed_headers(secret, "id", NOW, b"") for secret in (whole, whole.rstrip("="))]
    assert signed[0] == signed[1]


V4: Final = (
    "127.0.0.1", "10.0.0.1", "172.16.0.1", "192.168.0.1", "169.254.169.254", "0.0.0.0",  # noqa: S104 - refused
    "100.64.0.1", "255.255.255.255", "224.0.0.1", "198.18.0.1", "192.0.0.1", "240.0.0.1",
)  # fmt: skip
V6: Final = ("::", "::1", "fc00::1", "fd00:ec2::254", "fe80::1", "fe80::1%1", "ff02::1", "100::1")
# Addresses of IPv4 as IPv6 carries them: RFC 4291, 3056, 6052, 8215, 2765, and 4291 once more.
MAPPED: Final = ("::ffff:", "2002:")
TRANSLATED: Final = ("64:ff9b::", "64:ff9b:1::", "::ffff:0:", "::")


def _carried(by: str, address: str) -> str:
    number = int(ipaddress.IPv4Address(address))
    if by == "2002:":
        return f"2002:{number >> 16:x}:{number & 0xFFFF:x}::1"
    return f"{by}{number >> 16:x}:{number & 0xFFFF:x}"


@pytest.mark.parametrize(
    "address", [*V4, *V6, *(_carried(by, address) for by in MAPPED for address in V4)]
)
def test_private_addresses_are_refused_before_anything_is_connected_to(
    monkeypatch: pytest.MonkeyPatch, connected: Calls, address: str
) -> None:
    for found in [(address,), (*PUBLIC, address), (address, *PUBLIC)]:
        _resolve_to(monkeypatch, found)
        with pytest.raises(WebhookError, match="private_address"):
            post("https://hooks.example.com/", b"", {}, allow_private=False)
    assert connected == []
    _resolve_to(monkeypatch, (address,))
    with pytest.raises(WebhookError, match="ConnectionRefusedError"):
        post("https://hooks.example.com/", b"", {}, allow_private=True)
    assert connected == [(address, 443)]


@pytest.mark.parametrize(
    "address", [*(_carried(by, "169.254.169.254") for by in TRANSLATED), "fec0::1", "5f00::1"]
)
def test_what_leads_to_private_networks_is_refused(
    monkeypatch: pytest.MonkeyPatch, connected: Calls, address: str
) -> None:
    _resolve_to(monkeypatch, (address,))
    with pytest.raises(WebhookError, match="private_address"):
        post("https://hooks.example.com/", b"", {}, allow_private=False)
    assert connected == []


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "localhost", "[::1]", "[::ffff:127.0.0.1]", "2130706433", "0x7f.1", "0", "127.1"],
)
def test_addresses_may_be_spelt_as_they_like(connected: Calls, host: str) -> None:
    with pytest.raises(WebhookError, match=r"private_address|gaierror"):
        post(f"https://{host}:8443/", b"", {}, allow_private=False)
    assert connected == []


@pytest.mark.parametrize("address", [*PUBLIC, "::ffff:8.8.8.8", "64:ff9b::808:808"])
def test_the_address_that_was_looked_at_is_the_one_connected_to(
    monkeypatch: pytest.MonkeyPatch, connected: Calls, address: str
) -> None:
    # Whoever asks a second time is told another one.
    _resolve_to(monkeypatch, (address,), ("127.0.0.1",))
    with pytest.raises(WebhookError, match="ConnectionRefusedError"):
        post("https://hooks.example.com:8443/", b"", {}, allow_private=False)
    assert connected == [(address, 8443)]


def test_without_encryption_nothing_is_sent_unless_it_stays_at_home(
    monkeypatch: pytest.MonkeyPatch, receiver: Receiver
) -> None:
    with pytest.raises(WebhookError, match="not_https"):
        post(receiver.url, b"{}", {}, allow_private=False)
    assert receiver.received == []
    post(f"{receiver.url}?a=b#c", b"{}", {"webhook-id": "1"}, allow_private=True)
    (received,) = receiver.received
    assert (received.path, received.body, received.id) == (f"/hook-{CANARY}?a=b", b"{}", "1")


def _certificate(folder: Path, name: x509.GeneralName) -> tuple[ssl.SSLContext, Path]:
    """A server's side of TLS with a certificate that is its own authority."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([name]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, SHA256())
    )
    path = folder / "certificate.pem"
    path.write_bytes(made.public_bytes(Encoding.PEM))
    with_key = folder / "both.pem"
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    with_key.write_bytes(private + path.read_bytes())
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(with_key)
    return context, path


HOME: Final = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))


@pytest.mark.parametrize(
    ("name", "trusted", "told"),
    [
        (HOME, True, True),
        (HOME, False, False),
        (x509.DNSName("hooks.example.com"), True, False),
        (x509.IPAddress(ipaddress.ip_address("127.0.0.2")), True, False),
    ],
)
def test_a_certificate_must_be_trusted_and_of_that_host(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: x509.GeneralName,
    trusted: bool,
    told: bool,
) -> None:
    context, certificate = _certificate(tmp_path, name)
    if trusted:
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    with receiving(context) as receiver:
        if told:
            post(receiver.url, b"{}", {}, allow_private=True)
        else:
            with pytest.raises(WebhookError, match="SSLCertVerificationError"):
                post(receiver.url, b"{}", {}, allow_private=True)
        assert bool(receiver.received) == told


def test_an_answer_that_trickles_in_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webhook, "_SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as server:

        def trickle() -> None:
            connection, _ = server.accept()
            with connection:
                # A header that never ends: the whole answer is never there.
                connection.sendall(b"HTTP/1.1 204 No\r\nX: ")
                while not stopped.wait(0.1):
                    try:
                        connection.sendall(b"x")
                    except OSError:
                        return

        stopped = threading.Event()
        thread = threading.Thread(target=trickle)
        thread.start()
        try:
            with pytest.raises(WebhookError, match="TimeoutError"):
                post(f"http://127.0.0.1:{server.getsockname()[1]}/", b"", {}, allow_private=True)
        finally:
            stopped.set()
            thread.join()


@pytest.mark.parametrize("place", ["{home}/hök", f"http://{'a' * 64}.example.com/"])
def test_an_address_that_cannot_be_spelt_is_a_webhook_that_fails(
    receiver: Receiver, place: str
) -> None:
    with pytest.raises(WebhookError):
        post(place.format(home=receiver.url), b"", {}, allow_private=True)
