"""One request to an address that an operator has set: no redirects, and to no private network."""

import http.client
import ipaddress
import socket
import ssl
import threading
from collections.abc import Mapping
from contextlib import suppress
from http import HTTPStatus
from typing import Final
from urllib.parse import urlsplit

from backend.errors import HoldfastError
from backend.web_addresses import carried

_SECONDS: Final = 5
_GLOBAL_UNICAST: Final = ipaddress.IPv6Network("2000::/3")


class WebhookError(HoldfastError):
    """The webhook was not told; *code* says why, and not where it is."""

    code = "webhook_failed"

    def __init__(self, reason: str) -> None:
        super().__init__(f"the webhook was not told: {reason}")
        self.reason = reason


def post(url: str, body: bytes, headers: Mapping[str, str], *, allow_private: bool) -> None:
    """
    Send *body* as JSON, to the very address that was looked at.

    A name is resolved once: one that shows another address the second time gains nothing.

    Raises:
        WebhookError: It is in a private network, does not answer, or not with success.
    """
    parts = urlsplit(url)
    host, secure = parts.hostname or "", parts.scheme == "https"
    if not secure and not allow_private:
        raise WebhookError("not_https")
    port = parts.port or (443 if secure else 80)
    late = threading.Event()
    try:
        address = _resolve(host, port, allow_private=allow_private)
        with socket.create_connection((address, port), _SECONDS) as plain:
            connection = http.client.HTTPConnection(host, port, timeout=_SECONDS)
            connection.sock = _dressed(plain, host) if secure else plain
            # Of the whole act: a socket's own time begins anew with each byte.
            end = threading.Timer(_SECONDS, _cut, (connection.sock, late))
            end.daemon = True
            end.start()
            try:
                path = parts.path or "/"
                connection.request(
                    "POST",
                    f"{path}?{parts.query}" if parts.query else path,
                    body,
                    {"Content-Type": "application/json", **headers},
                )
                status = connection.getresponse().status
            finally:
                end.cancel()
                connection.close()
    # `UnicodeError`: a host or path that cannot be spelt in ASCII.
    except (OSError, UnicodeError, http.client.HTTPException) as err:
        reason = TimeoutError.__name__ if late.is_set() else type(err).__name__
        raise WebhookError(reason) from None
    if late.is_set():
        raise WebhookError(TimeoutError.__name__)
    if not HTTPStatus.OK <= status < HTTPStatus.MULTIPLE_CHOICES:
        raise WebhookError(f"status_{status}")


def _dressed(plain: socket.socket, host: str) -> ssl.SSLSocket:
    """The handshake, which checks the certificate, comes with the first byte sent."""
    return ssl.create_default_context().wrap_socket(
        plain, server_hostname=host, do_handshake_on_connect=False
    )


def _cut(sock: socket.socket, late: threading.Event) -> None:
    late.set()
    with suppress(OSError):
        # Not TLS's own: it would have what is still read taken for plain text.
        socket.socket.shutdown(sock, socket.SHUT_RDWR)


def _resolve(host: str, port: int, *, allow_private: bool) -> str:
    found = [str(info[4][0]) for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
    if not allow_private and not all(map(_is_public, found)):
        raise WebhookError("private_address")
    return found[0]


def _is_public(address: str) -> bool:
    # An address of IPv4 is as private as itself where IPv6 carries it.
    ip = carried(ipaddress.ip_address(address.partition("%")[0]))
    # Outside of it: site-local, or not given out.
    if isinstance(ip, ipaddress.IPv6Address) and ip not in _GLOBAL_UNICAST:
        return False
    return ip.is_global and not ip.is_multicast
