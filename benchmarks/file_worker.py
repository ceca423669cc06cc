"""
One file through one tool, in a process of its own.

Reads one JSON object (`tool`, `verb`, `source`, `target`, `keys`) and writes another:
`cpu_seconds` in user and kernel mode from the tool's first byte to its last, and `growth_mib`,
the most memory that the process held more than before it began.
"""

import base64
import importlib
import json
import resource
import subprocess
import sys
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO, Final

from backend.crypto.files import READ_BYTES, KeyringLock, Opener, Sealer
from backend.crypto.keyring import Keyring, RootKey
from benchmarks.processes import MIB, psutil

_META: Final = {"kind": "benchmark"}
# What the plain copy and Tink were fastest with, of 64 KiB to 1 MiB.
_BLOCK_BYTES: Final = 256 * 1024
_PEAK: Final = "VmHWM:"
Keys = Mapping[str, str]
Tool = Callable[[BinaryIO, BinaryIO], None]


def _blocks(source: BinaryIO, size: int = _BLOCK_BYTES) -> Any:
    return iter(lambda: source.read(size), b"")


def copy(source: BinaryIO, target: BinaryIO) -> None:
    target.writelines(_blocks(source))


def _holdfast(verb: str, keys: Keys) -> Tool:
    lock = KeyringLock(Keyring(RootKey(base64.b64decode(keys["holdfast"]))))

    def seal(source: BinaryIO, target: BinaryIO) -> None:
        blocks = _blocks(source, READ_BYTES)
        target.writelines(Sealer(_META, [lock], now=datetime.now(UTC)).seal(blocks))

    def unseal(source: BinaryIO, target: BinaryIO) -> None:
        target.writelines(Opener(source, lock).chunks())

    return seal if verb == "encrypt" else unseal


def _tink(verb: str, keys: Keys) -> Tool:
    library = importlib.import_module("tink")
    access = importlib.import_module("tink.secret_key_access")
    streaming = importlib.import_module("tink.streaming_aead")
    streaming.register()
    handle = library.json_proto_keyset_format.parse(keys["tink"], access.TOKEN)
    cipher = handle.primitive(streaming.StreamingAead)
    context = json.dumps(_META).encode()

    def seal(source: BinaryIO, target: BinaryIO) -> None:
        with cipher.new_encrypting_stream(target, context) as stream:
            for block in _blocks(source):
                stream.write(block)

    def unseal(source: BinaryIO, target: BinaryIO) -> None:
        with cipher.new_decrypting_stream(source, context) as stream:
            target.writelines(_blocks(stream))

    return seal if verb == "encrypt" else unseal


def _pyrage(verb: str, keys: Keys) -> Tool:
    pyrage = importlib.import_module("pyrage")
    identity = pyrage.x25519.Identity.from_str(keys["age"])

    def seal(source: BinaryIO, target: BinaryIO) -> None:
        pyrage.encrypt_file(source.name, target.name, [identity.to_public()])

    def unseal(source: BinaryIO, target: BinaryIO) -> None:
        pyrage.decrypt_file(source.name, target.name, [identity])

    return seal if verb == "encrypt" else unseal


def _age(verb: str, keys: Keys) -> Tool:
    ways = {"encrypt": ["-e", "-r", keys["age_public"]], "decrypt": ["-d", "-i", keys["age_file"]]}

    def run(source: BinaryIO, target: BinaryIO) -> None:
        subprocess.run(["age", *ways[verb]], stdin=source, stdout=target, check=True)

    return run


_TOOLS: Final[dict[str, Callable[[str, Keys], Tool]]] = {
    "copy": lambda _verb, _keys: copy,
    "holdfast": _holdfast,
    "tink": _tink,
    "pyrage": _pyrage,
    "age": _age,
}


def main() -> None:
    order = json.load(sys.stdin)
    tool = _TOOLS[order["tool"]](order["verb"], order["keys"])
    with (
        Path(order["source"]).open("rb", buffering=0) as source,
        Path(order["target"]).open("wb", buffering=0) as target,
    ):
        before = _begin_memory()
        started = _cpu_seconds()
        tool(source, target)
        spent = _cpu_seconds() - started
    json.dump({"cpu_seconds": spent, "growth_mib": _peak_mib() - before}, sys.stdout)


def _cpu_seconds() -> float:
    return sum(
        usage.ru_utime + usage.ru_stime
        for usage in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    )


def _begin_memory() -> float:
    """Return what the process holds now; where the system can, its peak begins anew here."""
    reset = Path("/proc/self/clear_refs")
    if reset.exists():
        # proc(5): 5 resets the peak resident set size to the current one.
        reset.write_text("5", encoding="ascii")
    return float(psutil.Process().memory_info().rss) / MIB


def _peak_mib() -> float:
    status = Path("/proc/self/status")
    if status.exists():
        line = next(x for x in status.read_text("ascii").splitlines() if x.startswith(_PEAK))
        return int(line.split()[1]) / 1024
    # macOS counts bytes here, and its peak includes the start.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / MIB


if __name__ == "__main__":
    main()
