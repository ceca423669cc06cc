"""What settings may name as an address: of a page, of a service, of a webhook."""

import re
import socket
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Final
from urllib.parse import urlsplit

_LOOPBACK: Final = ("localhost", "127.0.0.1", "[::1]")
# Where Amazon's machines are given their credentials over IPv6; over IPv4 it is link-local.
_METADATA: Final = IPv6Address("fd00:ec2::254")


def is_web_address(text: str, *, plain: bool) -> bool:
    """Say whether *text* is an `https://` address, or an `http://` one where *plain* may be."""
    try:
        url = urlsplit(text)
        schemes = ("https", "http") if plain else ("https",)
        return (
            url.scheme in schemes and bool(url.hostname) and url.port != 0 and url.username is None
        )
    except ValueError:
        return False


def is_service_address(text: str) -> bool:
    """
    Say whether *text* may be the address of a service that is trusted with keys or backups.

    It may be in a private network, but not where a cloud tells its machines their credentials: a
    wrong setting would send tokens there, and show in errors what is answered.
    """
    return is_web_address(text, plain=True) and not _is_metadata(urlsplit(text).hostname or "")


def is_origin(text: str, *, plain: bool) -> bool:
    """Say whether *text* is an origin as browsers send it: no path, no default port."""
    found = re.fullmatch(r"(https?)://([a-z0-9.-]+|\[[0-9a-f:]+\])(:[1-9]\d{0,4})?", text)
    if found is None or found[3] == {"https": ":443", "http": ":80"}[found[1]]:
        return False
    return found[1] == "https" or (plain and found[2] in _LOOPBACK)


def _is_metadata(host: str) -> bool:
    ip = _literal(host.rstrip("."))
    if isinstance(ip, IPv6Address):
        ip = ip.ipv4_mapped or ip
    return ip is not None and (ip.is_link_local or ip == _METADATA)


def _literal(host: str) -> IPv4Address | IPv6Address | None:
    """Read *host* as the system does: one number, octal or hexadecimal are addresses, too."""
    try:
        return ip_address(host)
    except ValueError:
        pass
    try:
        return IPv4Address(socket.inet_aton(host))
    except (OSError, ValueError):
        return None
