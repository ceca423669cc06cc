"""TLS: which versions and ciphers, which certificates are refused, and no HTTP in production."""

import ipaddress
import socket
import ssl
import urllib.request
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    KeySerializationEncryption,
    NoEncryption,
    PrivateFormat,
)

from backend.crypto.tls import server_context
from backend.errors import ConfigurationError
from tests.conftest import JWT_SECRET, KEY
from tests.test_main import Refuse, Server, fetch, refused, serving

__all__ = ["refused"]  # a fixture

SECRETS: Final = {"ENCRYPTION_KEY": KEY, "JWT_SECRET_KEY": JWT_SECRET}
PRODUCTION: Final = {"APP_ENV": "production"} | SECRETS
HOUR: Final = timedelta(hours=1)


@dataclass(frozen=True)
class Pair:
    """A certificate for loopback that signs itself, and its key."""

    certificate: Path
    key: Path

    @property
    def settings(self) -> dict[str, str]:
        return {"SSL_CERT_PATH": str(self.certificate), "SSL_KEY_PATH": str(self.key)}


def pair(
    folder: Path,
    *,
    since: timedelta = -HOUR,
    until: timedelta = HOUR,
    encryption: KeySerializationEncryption | None = None,
) -> Pair:
    """Make a pair that is valid from *since* to *until*, as seen from now."""
    folder.mkdir(exist_ok=True)
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.now(UTC)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now + since)
        .not_valid_after(now + until)
        .add_extension(x509.SubjectAlternativeName([address]), critical=False)
        .sign(key, SHA256())
    )
    made_pair = Pair(folder / "cert.pem", folder / "key.pem")
    made_pair.certificate.write_bytes(made.public_bytes(Encoding.PEM))
    made_pair.key.touch(0o600)
    made_pair.key.write_bytes(
        key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption or NoEncryption())
    )
    return made_pair


# What a client meets


@dataclass(frozen=True)
class Site:
    """A server in production that ends TLS itself."""

    server: Server
    pair: Pair

    @property
    def port(self) -> int:
        return int(self.server.url.rpartition(":")[2])


def shake_hands(port: int, pair: Pair, version: ssl.TLSVersion, ciphers: str) -> str | None:
    """Offer one version, however old, and *ciphers*; return the version agreed on."""
    client = lax(ssl.create_default_context(cafile=pair.certificate), version, ciphers)
    with (
        socket.create_connection(("127.0.0.1", port), timeout=30) as plain,
        client.wrap_socket(plain, server_hostname="127.0.0.1") as connection,
    ):
        return connection.version()


def lax(context: ssl.SSLContext, version: ssl.TLSVersion, ciphers: str) -> ssl.SSLContext:
    """Have *context* speak what OpenSSL itself speaks no longer."""
    context.set_ciphers(f"{ciphers}:@SECLEVEL=0")
    with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
        context.minimum_version = context.maximum_version = version
    return context


def agreed_elsewhere(pair: Pair, version: ssl.TLSVersion, ciphers: str) -> str | None:
    """What the same client agrees on with a server that takes all: it does offer it."""
    context = lax(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), version, "ALL")
    context.load_cert_chain(pair.certificate, pair.key)
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        ThreadPoolExecutor(1) as thread,
        context.wrap_socket(listener, server_side=True) as server,
    ):
        port = server.getsockname()[1]
        accepted = thread.submit(server.accept)
        found = shake_hands(port, pair, version, ciphers)
        accepted.result(timeout=30)[0].close()
        return found


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    base = tmp_path_factory.mktemp("tls")
    made = pair(base)
    settings = PRODUCTION | made.settings
    with serving(base / "data", log=base / "log", **settings) as server:
        # The port is open before the service accepts.
        trusting = ssl.create_default_context(cafile=made.certificate)
        assert fetch(f"{server.url}/healthz", trusting) == 200
        yield Site(server, made)


MODERN: Final = {ssl.TLSVersion.TLSv1_2: "TLSv1.2", ssl.TLSVersion.TLSv1_3: "TLSv1.3"}
OLD: Final = {ssl.TLSVersion.TLSv1: "TLSv1", ssl.TLSVersion.TLSv1_1: "TLSv1.1"}


@pytest.mark.parametrize("version", MODERN)
def test_tls_from_1_2_on_is_spoken(site: Site, version: ssl.TLSVersion) -> None:
    sound = "ECDHE-ECDSA-AES128-GCM-SHA256"
    assert shake_hands(site.port, site.pair, version, sound) == MODERN[version]


@pytest.mark.parametrize("version", OLD)
def test_older_tls_is_refused(site: Site, version: ssl.TLSVersion) -> None:
    assert agreed_elsewhere(site.pair, version, "ALL") == OLD[version]
    with pytest.raises(ssl.SSLError):
        shake_hands(site.port, site.pair, version, "ALL")


@pytest.mark.parametrize("cipher", ["ECDHE-ECDSA-AES128-SHA", "ECDHE-ECDSA-AES256-SHA384"])
def test_a_cipher_that_does_not_authenticate_is_refused(site: Site, cipher: str) -> None:
    assert agreed_elsewhere(site.pair, ssl.TLSVersion.TLSv1_2, cipher) == "TLSv1.2"
    with pytest.raises(ssl.SSLError):
        shake_hands(site.port, site.pair, ssl.TLSVersion.TLSv1_2, cipher)


def test_no_cipher_without_forward_secrecy_is_offered(tmp_path: Path) -> None:
    made = pair(tmp_path)
    context = server_context(made.certificate, made.key, datetime.now(UTC))
    offered = [cipher["name"] for cipher in context.get_ciphers()]
    assert offered
    assert [name for name in offered if not name.startswith(("ECDHE-", "TLS_"))] == []


def test_over_tls_answers_ask_for_https_from_then_on(site: Site) -> None:
    trusting = ssl.create_default_context(cafile=site.pair.certificate)
    url = f"{site.server.url}/readyz"
    with urllib.request.urlopen(url, context=trusting, timeout=60) as answer:  # noqa: S310 - loopback
        assert answer.status == 200
        assert answer.headers["Strict-Transport-Security"] == "max-age=31536000"


def test_where_https_is_spoken_http_is_not(site: Site) -> None:
    with pytest.raises(OSError, match=r"."):
        fetch(f"{site.server.url.replace('https', 'http')}/healthz")


# What an operator meets


@pytest.mark.parametrize(
    ("since", "until"),
    [(-2 * HOUR, -HOUR), (HOUR, 2 * HOUR)],
    ids=["over", "not yet"],
)
def test_a_certificate_that_no_client_would_take_is_refused(
    tmp_path: Path, refused: Refuse, since: timedelta, until: timedelta
) -> None:
    made = pair(tmp_path, since=since, until=until)
    line = refused(tmp_path / "data", **PRODUCTION, **made.settings)
    day = f"{datetime.now(UTC) + until:%Y-%m-%d}"
    assert "SSL_CERT_PATH: the certificate is valid from" in line
    assert day in line
    assert not (tmp_path / "data").exists()


def test_a_certificate_is_taken_from_its_first_second_to_its_last(tmp_path: Path) -> None:
    made = pair(tmp_path)
    own = x509.load_pem_x509_certificate(made.certificate.read_bytes())
    first, last = own.not_valid_before_utc, own.not_valid_after_utc
    for moment in (first, last):
        assert server_context(made.certificate, made.key, moment)
    for moment in (first - timedelta(seconds=1), last + timedelta(seconds=1)):
        with pytest.raises(ConfigurationError, match="and not now"):
            server_context(made.certificate, made.key, moment)


@pytest.mark.parametrize("mode", [0o644, 0o602, 0o604, 0o600, 0o400, 0o640])
def test_a_key_that_everybody_may_read_is_refused(tmp_path: Path, mode: int) -> None:
    made = pair(tmp_path)
    made.key.chmod(mode)
    if mode in (0o600, 0o400, 0o640):
        assert server_context(made.certificate, made.key, datetime.now(UTC))
        return
    with pytest.raises(ConfigurationError, match="SSL_KEY_PATH: everybody on this machine"):
        server_context(made.certificate, made.key, datetime.now(UTC))


def test_a_key_of_another_certificate_is_refused(tmp_path: Path, refused: Refuse) -> None:
    mine, other = pair(tmp_path / "mine"), pair(tmp_path / "other")
    line = refused(tmp_path / "data", **Pair(mine.certificate, other.key).settings)
    assert "not a certificate and its key: key values mismatch" in line


def test_a_key_with_a_passphrase_is_refused(tmp_path: Path, refused: Refuse) -> None:
    made = pair(tmp_path, encryption=BestAvailableEncryption(b"Kanarienvogel"))
    assert "not a certificate and its key" in refused(tmp_path / "data", **made.settings)


def test_a_certificate_in_openssls_own_form_is_refused(tmp_path: Path, refused: Refuse) -> None:
    made = pair(tmp_path)
    text = made.certificate.read_text()
    made.certificate.write_text(text.replace(" CERTIFICATE-", " TRUSTED CERTIFICATE-"))
    # It is one that OpenSSL takes.
    ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(made.certificate, made.key)
    line = refused(tmp_path / "data", **made.settings)
    assert "SSL_CERT_PATH: not certificates in PEM, each between BEGIN CERTIFICATE" in line


def test_production_without_tls_is_refused_and_makes_nothing(
    tmp_path: Path, refused: Refuse
) -> None:
    line = refused(tmp_path / "data", **PRODUCTION)
    assert all(name in line for name in ("SSL_CERT_PATH", "SSL_KEY_PATH", "TRUSTED_PROXIES"))
    assert not (tmp_path / "data").exists()
