"""A large file through ours, a plain copy and the peers, each in a process of its own."""

import base64
import hashlib
import importlib
import importlib.util
import os
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from benchmarks.processes import MIB, Home
from benchmarks.report import Aim, Figure, Samples

ROUNDS: Final = 7
FILE_MIB: Final = 256
_OURS, _COPY = "holdfast", "copy"
_NAMES: Final = {
    _COPY: "plain copy",
    "pyrage": "pyrage",
    "tink": "Tink streaming",
    "age": "age (program)",
}
_VERBS: Final = ("encrypt", "decrypt")
_KINDS: Final = {"speed": "", "growth": ", growth of memory"}
_OF_COPY: Final = Aim(0.8, at_most=False)
_AHEAD: Final = Aim(1, at_most=False)
_GROWTH: Final = Aim(8, at_most=True, of_ratio=False)
# In memory where there is room: the disk is not what is compared.
_MEMORY_FOLDER: Final = Path("/dev/shm")  # noqa: S108 - the folder in it is made with mkdtemp
_ROOM_BYTES: Final = 8 * FILE_MIB * MIB

Found = dict[tuple[str, str], dict[str, list[float]]]


def measure() -> tuple[list[Figure], list[str]]:
    """Return the figures, and notes on where the files lay and which peers are missing."""
    folder, place = _folder()
    tools, keys, missing = _tools()
    with tempfile.TemporaryDirectory(prefix="holdfast-bench-", dir=folder) as name:
        found = _measure(Home.make(Path(name)), tools, keys)
    return list(_figures(found, tools)), [place, *missing]


def _folder() -> tuple[Path | None, str]:
    if _MEMORY_FOLDER.is_dir() and shutil.disk_usage(_MEMORY_FOLDER).free > _ROOM_BYTES:
        return _MEMORY_FOLDER, "files lay in memory, so the disk was not measured"
    return None, "files lay in the system's folder for temporary files"


def _tools() -> tuple[list[str], dict[str, str], list[str]]:
    """Return the tools that are there, a key for each, and a note for each that is missing."""
    tools, missing = [_OURS, _COPY], []
    keys = {"holdfast": base64.b64encode(os.urandom(32)).decode()}
    for module in ("pyrage", "tink"):
        if importlib.util.find_spec(module):
            tools.append(module)
        else:
            missing.append(f"left out: {module} is not installed")
    if "tink" in tools:
        keys["tink"] = _tink_key()
    if "pyrage" in tools:
        identity = importlib.import_module("pyrage").x25519.Identity.generate()
        keys |= {"age": str(identity), "age_public": str(identity.to_public())}
    if shutil.which("age") and "age" in keys:
        tools.append("age")
    else:
        missing.append("left out: the program age is not installed, or pyrage, which makes its key")
    return tools, keys, missing


def _tink_key() -> str:
    library: Any = importlib.import_module("tink")
    access: Any = importlib.import_module("tink.secret_key_access")
    streaming: Any = importlib.import_module("tink.streaming_aead")
    streaming.register()
    # The larger of its two segments is the faster to encrypt.
    template = streaming.streaming_aead_key_templates.AES256_GCM_HKDF_1MB
    handle = library.new_keyset_handle(template)
    text: str = library.json_proto_keyset_format.serialize(handle, access.TOKEN)
    return text


def _measure(home: Home, tools: list[str], keys: dict[str, str]) -> Found:
    plain = home.folder / "plain"
    with plain.open("wb") as file:
        for _ in range(FILE_MIB):
            file.write(os.urandom(MIB))
    digest = _digest(plain)
    if "age" in tools:
        identity = home.folder / "identity"
        identity.write_text(keys["age"], encoding="ascii")
        identity.chmod(0o600)
        keys = keys | {"age_file": str(identity)}
    found: Found = defaultdict(lambda: defaultdict(list))
    for number in range(ROUNDS + 1):
        for tool in tools:
            sealed, opened = home.folder / "sealed", home.folder / "opened"
            for verb, source, target in zip(_VERBS, (plain, sealed), (sealed, opened), strict=True):
                order = {"tool": tool, "verb": verb, "keys": keys}
                order |= {"source": str(source), "target": str(target)}
                spent = home.run("file_worker.py", data=tool, order=order)
                # The first round fills the system's caches, and shows that each tool works.
                if number:
                    found[verb, tool]["speed"].append(_megabytes() / spent["cpu_seconds"])
                    found[verb, tool]["growth"].append(spent["growth_mib"])
            if not number and _digest(opened) != digest:
                raise RuntimeError(f"{tool} does not give back what it was given")
            sealed.unlink()
            opened.unlink()
    return found


def _megabytes() -> float:
    return FILE_MIB * MIB / 1e6


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _figures(found: Found, tools: list[str]) -> Iterator[Figure]:
    # One peer is enough for memory, whose aim is its own size.
    holder = next(tool for tool in ("tink", "pyrage", _COPY) if tool in tools)
    for kind, unit in (("speed", "MB per CPU-second"), ("growth", "MiB")):
        for verb in _VERBS:
            for tool, name in _NAMES.items():
                if tool not in tools or (kind == "growth" and tool != holder):
                    continue
                yield Figure(
                    f"{FILE_MIB} MiB file, {verb}" + _KINDS[kind],
                    unit,
                    Samples(found[verb, _OURS][kind]),
                    Samples(found[verb, tool][kind]),
                    _aim(kind, tool),
                    against=name,
                )


def _aim(kind: str, tool: str) -> Aim | None:
    if kind == "growth":
        return _GROWTH
    return _OF_COPY if tool == _COPY else _AHEAD
