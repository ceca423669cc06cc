"""TLS of the service itself: its versions and ciphers, and a certificate that can be served."""

import ssl
from datetime import datetime
from pathlib import Path
from typing import Final

from cryptography import x509

from backend.errors import ConfigurationError

# Of TLS 1.2 only what has forward secrecy and authenticates what it encrypts, as RFC 9325, 4.2
# asks for; all ciphers of TLS 1.3 do.
_CIPHERS: Final = "ECDHE+AESGCM:ECDHE+CHACHA20"
_FOR_OTHERS: Final = 0o007


def server_context(certificate: Path, key: Path, now: datetime) -> ssl.SSLContext:
    """
    Return what a server needs to speak TLS 1.2 and 1.3.

    Args:
        certificate: PEM, the server's own first, then those of its authorities.
        key: PEM without a passphrase, which others than its owner and group cannot read.

    Raises:
        ConfigurationError: A file cannot be read, the two do not belong together, the key is open
            to everybody, or no client would accept the certificate at *now*.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers(_CIPHERS)
    context.options |= ssl.OP_NO_RENEGOTIATION
    try:
        open_to_others = key.stat().st_mode & _FOR_OTHERS
        # An empty passphrase: else OpenSSL would wait for one at the terminal.
        context.load_cert_chain(certificate, key, password="")
    except (OSError, ssl.SSLError) as err:
        raise ConfigurationError(
            f"SSL_CERT_PATH and SSL_KEY_PATH: not a certificate and its key: {_reason(err)}"
        ) from None
    if open_to_others:
        raise ConfigurationError("SSL_KEY_PATH: everybody on this machine may read it: chmod o= it")
    _refuse_out_of_date(certificate, now)
    return context


def _refuse_out_of_date(certificate: Path, now: datetime) -> None:
    try:
        own, *_ = x509.load_pem_x509_certificates(certificate.read_bytes())
    except ValueError:
        # OpenSSL has also taken BEGIN TRUSTED CERTIFICATE, a form of its own.
        raise ConfigurationError(
            "SSL_CERT_PATH: not certificates in PEM, each between BEGIN CERTIFICATE and END "
            "CERTIFICATE"
        ) from None
    since, until = own.not_valid_before_utc, own.not_valid_after_utc
    if not since <= now <= until:
        raise ConfigurationError(
            f"SSL_CERT_PATH: the certificate is valid from {since:%Y-%m-%d %H:%M} UTC to "
            f"{until:%Y-%m-%d %H:%M} UTC, and not now"
        )


def _reason(err: OSError) -> str:
    if isinstance(err, ssl.SSLError):
        return (err.reason or "unreadable").replace("_", " ").lower()
    return err.strerror or type(err).__name__
