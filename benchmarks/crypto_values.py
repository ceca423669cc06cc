"""Values of 64 B and 1 MiB: ours as bytes and as text beside the bare call and the peers."""

import os
from collections.abc import Sequence
from functools import partial
from typing import Any, Final

from backend.crypto.keyring import Keyring, RootKey
from backend.crypto.values import column_scope
from benchmarks import peers
from benchmarks.peers import Peer
from benchmarks.report import Aim, Figure, Samples
from benchmarks.timing import Call, alternate

ROUNDS: Final = 15
_SMALL: Final = 64
_LARGE: Final = 1024 * 1024
_OURS: Final = "Holdfast"
_FASTER: Final = Aim(1, at_most=True)
_BARE: Final = {_SMALL: Aim(2.5, at_most=True), _LARGE: Aim(1.1, at_most=True)}
_SIZES: Final = {_SMALL: "64 B", _LARGE: "1 MiB"}
_BINDING: Final = {peers.TINK, peers.ESDK, peers.TINK + peers.IN_BASE64}


def measure() -> tuple[list[Figure], list[str]]:
    """Return the figures, and a note for each peer that is missing."""
    cipher = Keyring(RootKey(os.urandom(32))).cipher(column_scope("users", "email"))
    bare = peers.bare()
    binding, missing = peers.installed(peers.tink, peers.esdk)
    textual, also_missing = peers.installed(peers.fernet, peers.sqlalchemy_utils)
    as_bytes = [Peer(_OURS, cipher.seal, cipher.open), bare, *binding]
    as_text = [
        Peer(_OURS, cipher.seal_text, cipher.open_text),
        bare.in_base64(),
        *(peer.in_base64() for peer in binding if peer.name == peers.TINK),
        *textual,
    ]
    figures = []
    for size in _SIZES:
        figures += _compare(size, "bytes", as_bytes)
        figures += _compare(size, "text", as_text)
    return figures, missing + also_missing


def _compare(size: int, form: str, contestants: Sequence[Peer]) -> list[Figure]:
    seals: dict[str, Call] = {}
    opens: dict[str, Call] = {}
    # Text of one byte a character, for the peer that takes nothing else.
    text = os.urandom(size // 2).hex()
    for peer in contestants:
        plaintext: Any = text if peer.of_text else text.encode()
        token = peer.seal(plaintext)
        if peer.open(token) != plaintext:
            raise RuntimeError(f"{peer.name} does not give back what it was given")
        seals[peer.name] = partial(peer.seal, plaintext)
        opens[peer.name] = partial(peer.open, token)
    return [
        figure
        for verb, calls in (("encrypt", seals), ("decrypt", opens))
        for figure in _figures(size, f"{_SIZES[size]}, {verb}, {form}", calls, form)
    ]


def _figures(size: int, section: str, calls: dict[str, Call], form: str) -> list[Figure]:
    found: dict[str, Samples] = alternate(calls, rounds=ROUNDS)
    ours = found.pop(_OURS)
    return [
        Figure(section, "µs", ours, samples, _aim(size, form, name), against=name)
        for name, samples in found.items()
    ]


def _aim(size: int, form: str, peer: str) -> Aim | None:
    """
    Return what ours is asked beside *peer*.

    Base64 alone costs 20 times the cipher at 1 MiB: what text is held to has it too.
    """
    limit = peers.BARE if form == "bytes" else peers.BARE + peers.IN_BASE64
    if peer == limit:
        return _BARE[size]
    return _FASTER if size == _SMALL and peer in _BINDING else None
