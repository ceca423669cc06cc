"""What settings may name as an address: of a page, of a service, of a webhook."""

import re
import socket
import unicodedata
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Final
from urllib.parse import urlsplit

_LOOPBACK: Final = ("localhost", "127.0.0.1", "[::1]")
# Where clouds tell their machines their credentials, beside the link-local addresses that most of
# them use. Source: the documentation of each.
_METADATA: Final = tuple(
    map(
        ip_network,
        (
            "fd00:ec2::/32",  # Amazon: 254 of machines, 23 of containers
            "fd20:ce::254",  # Google
            "100.100.100.200",  # Alibaba
            "192.0.0.192",  # Oracle, of old
            "fd00:c1::a9fe:a9fe",  # Oracle
            "168.63.129.16",  # Azure's WireServer
            "fd00:42::42",  # Scaleway
        ),
    )
)
# Addresses of IPv4 as IPv6 carries them in the last 32 bits: RFC 6052, 2.1; 2765, 2.1; and 4291,
# 2.5.5.1, of which :: and ::1 are addresses of their own.
_CARRIERS: Final = (
    IPv6Network("64:ff9b::/96"),
    IPv6Network("::ffff:0:0:0/96"),
    IPv6Network("::/96"),
)


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


def carried(ip: IPv4Address | IPv6Address) -> IPv4Address | IPv6Address:
    """Return the address of IPv4 that *ip* stands for, where it does, and else *ip* itself."""
    if isinstance(ip, IPv4Address):
        return ip
    if int(ip) > 1 and any(ip in network for network in _CARRIERS):
        return IPv4Address(int(ip) & 0xFFFF_FFFF)
    return ip.ipv4_mapped or ip.sixtofour or ip


def _is_metadata(host: str) -> bool:
    ip = _literal(_plain(host).rstrip("."))
    if ip is None:
        return False
    ip = carried(ip)
    return ip.is_link_local or any(ip in network for network in _METADATA)


def _plain(host: str) -> str:
    """Spell *host* as it is looked up: in ASCII, with full stops for ideographic ones."""
    folded = unicodedata.normalize("NFKC", host)
    try:
        return folded.encode("idna").decode("ascii")
    except UnicodeError:
        # Too long for a name: so it is looked up nowhere.
        return folded


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
