"""
The manifest of one backup, written last: it is the commit mark, and it is signed.

One JSON document: `{"format": 2, "manifest": {...}, "keys": {...}, "mac": HEX}`. What `manifest`
holds never changes, and its digest is what the next backup's manifest names, so that a backup that
was taken away or put back shows. `keys` changes when the backup is given to another key.
"""

import hashlib
import hmac
import json
import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import MISSING, asdict, dataclass, field, fields
from datetime import datetime
from typing import Any, Final

from backend.backup.storage import Store
from backend.errors import BackupDamagedError, NotFoundError, SchemaMismatchError, UnknownKeyError

_FORMAT: Final = 2
_MAX_BYTES: Final = 1024 * 1024
_MANIFEST: Final = ".manifest.json"
_GONE: Final = ".gone.json"
_ID: Final = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.ASCII)
# The first format held the header in the archive itself.
_FIRST_HEADER_BYTES: Final = 4096
_KEYS: Final = ("key_id", "row_keys")
_KEY_ID: Final = re.compile(r"[0-9a-f]{8}", re.ASCII)

Sign = Callable[[bytes], str]
SignWith = Callable[[str], Sign]


@dataclass(frozen=True, slots=True)
class Manifest:
    """
    What one backup is: sizes in bytes, digests as hex, times in ISO 8601 UTC.

    Attributes:
        size_bytes: Of the archive as it is stored, and *sha256* its digest.
        previous: The backup before: its `id`, `created_at` and the `link` of its manifest.
        payload_offset: Where in the archive the encrypted payload begins.
        kind: `full`, or what another engine than ours makes: `diff`, `incr`.
        repository_label: By which that engine's own repository knows the backup.
        builds_on: Ids of the backups that must stay for this one to restore.
        row_keys: Keys that the rows need beside *key_id*, which the header needs.
    """

    id: str
    label: str | None
    created_at: str
    engine: str
    schema_revision: str
    tables: dict[str, int]
    plain_bytes: int
    size_bytes: int
    sha256: str
    previous: dict[str, str] | None
    payload_offset: int = 0
    kind: str = "full"
    repository_label: str | None = None
    builds_on: list[str] = field(default_factory=list)
    key_id: str = ""
    row_keys: list[str] = field(default_factory=list)

    @property
    def moment(self) -> datetime:
        return datetime.fromisoformat(self.created_at)

    @property
    def link(self) -> str:
        """The digest by which the next manifest names this one."""
        return hashlib.sha256(_canonical(self._lasting())).hexdigest()

    def reference(self) -> dict[str, str]:
        """What the next manifest says of this one."""
        return {"id": self.id, "created_at": self.created_at, "link": self.link}

    def _lasting(self) -> dict[str, Any]:
        # Without what is as it is by default: so a field that comes later changes no link.
        return {
            name: value
            for name, value in asdict(self).items()
            if name not in _KEYS and not (name in _DEFAULTS and value == _DEFAULTS[name])
        }

    def document(self, sign: Sign) -> bytes:
        """Spell it with its signature."""
        keys = {name: getattr(self, name) for name in _KEYS}
        body: dict[str, Any] = {"format": _FORMAT, "manifest": self._lasting(), "keys": keys}
        return json.dumps(body | {"mac": sign(_canonical(body))}, indent=1).encode()


_DEFAULTS: Final[dict[str, object]] = {
    each.name: each.default if each.default_factory is MISSING else each.default_factory()
    for each in fields(Manifest)
    if not (each.default is MISSING and each.default_factory is MISSING)
}


@dataclass(frozen=True, slots=True)
class Break:
    """A place at which the chain of backups does not hold."""

    backup_id: str
    why: str


def archive_name(backup_id: str) -> str:
    return f"{backup_id}.hfb"


def header_name(backup_id: str) -> str:
    return f"{backup_id}.key"


def escrow_name(backup_id: str) -> str:
    return f"{backup_id}.zst.gpg"


def manifest_name(backup_id: str) -> str:
    return f"{backup_id}{_MANIFEST}"


def write_manifest(store: Store, manifest: Manifest, sign: Sign) -> None:
    """Write the manifest: from here on the backup exists."""
    with store.create(manifest_name(manifest.id)) as file:
        file.write(manifest.document(sign))


def read_manifest(store: Store, backup_id: str, sign_with: SignWith) -> Manifest:
    """
    Read and authenticate one manifest.

    Args:
        sign_with: Returns the signing function for a key id; raises for an unknown key.

    Raises:
        NotFoundError: No such backup.
        BackupDamagedError: It was changed, or is another backup's.
        UnknownKeyError: Its key is not configured.
        SchemaMismatchError: A newer version made it.
    """
    raw = store.read(manifest_name(backup_id), _MAX_BYTES + 1)
    damaged = BackupDamagedError("the manifest of the backup was changed")
    if len(raw) > _MAX_BYTES:
        raise damaged
    try:
        document: dict[str, Any] = json.loads(raw)
        mac = str(document.pop("mac")).encode()
        manifest = _parse(document)
        signed = _canonical(document if "format" in document else document["manifest"])
        sign = sign_with(manifest.key_id)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise damaged from None
    if not hmac.compare_digest(mac, sign(signed).encode()):
        raise damaged
    if manifest.id != backup_id:
        raise BackupDamagedError("the manifest is another backup's")
    return manifest


def _parse(document: dict[str, Any]) -> Manifest:
    body = dict(document["manifest"])
    if "format" not in document:
        # The first format named its predecessor by a digest that changed with the key.
        return Manifest(**body | {"previous": None, "payload_offset": _FIRST_HEADER_BYTES})
    if document["format"] != _FORMAT:
        raise SchemaMismatchError("the backup was made by a newer version")
    return Manifest(**body, **document["keys"])


def stored_ids(store: Store) -> list[str]:
    """List the backups that exist: those with a manifest. A stray file is none."""
    return _ids(store, _MANIFEST)


def claimed_keys(store: Store) -> dict[str, set[str]]:
    """Return which keys each stored backup says it needs, by id; not authenticated."""
    claimed = {}
    for backup_id in stored_ids(store):
        # What cannot be read claims nothing; that it is no manifest, its own reader says.
        with suppress(
            ValueError, TypeError, KeyError, AttributeError, RecursionError,
            NotFoundError, BackupDamagedError,
        ):  # fmt: skip
            document = json.loads(store.read(manifest_name(backup_id), _MAX_BYTES))
            said = document.get("keys", document["manifest"])
            needed = [said["key_id"], *said.get("row_keys", ())]
            claimed[backup_id] = {one for one in needed if _KEY_ID.fullmatch(str(one))}
    return claimed


def delete_backup(store: Store, backup_id: str) -> None:
    """Remove a backup: its manifest first, so that it is never listed without its archive."""
    store.delete(manifest_name(backup_id))
    for name in store.names(f"{backup_id}.", ""):
        if not name.endswith(_GONE):
            store.delete(name)


def finish_deletions(store: Store, gone: Iterable[str]) -> int:
    """Delete what a killed process left of backups that it had noted as gone; return how many."""
    left = {name.split(".")[0] for name in store.names("", "") if is_part(name)}
    cut = left.intersection(gone)
    for backup_id in cut:
        delete_backup(store, backup_id)
    return len(cut)


def mark_gone(store: Store, backup_id: str, at: datetime, key_id: str, sign: Sign) -> None:
    """Leave a signed note that we delete this backup ourselves, before it is deleted."""
    body = {"id": backup_id, "deleted_at": at.isoformat(), "key_id": key_id}
    document = {"gone": body, "mac": sign(_canonical(body))}
    store.replace(f"{backup_id}{_GONE}", json.dumps(document, indent=1).encode())


def gone_ids(store: Store, sign_with: SignWith) -> dict[str, datetime]:
    """Return when we deleted which backups; a note that was forged or changed says nothing."""
    gone = {}
    for backup_id in _ids(store, _GONE):
        # A store that fails now (`UnavailableError`) has not said that there is no note: taking it
        # so would bring the backup back from a copy.
        with suppress(
            ValueError, TypeError, KeyError, RecursionError,
            NotFoundError, BackupDamagedError, UnknownKeyError,
        ):  # fmt: skip
            document = json.loads(store.read(f"{backup_id}{_GONE}", _MAX_BYTES))
            body = document["gone"]
            mac = sign_with(body["key_id"])(_canonical(body))
            if body["id"] == backup_id and hmac.compare_digest(mac, str(document["mac"])):
                gone[backup_id] = datetime.fromisoformat(body["deleted_at"])
    return gone


def is_part(name: str) -> bool:
    """Whether an object is a part of a backup; a note that we deleted one is none."""
    return bool(_ID.fullmatch(name.split(".", maxsplit=1)[0])) and not name.endswith(_GONE)


def without_manifest(store: Store) -> set[str]:
    """The ids of backups of which parts are stored and no manifest: nobody can restore them."""
    parts = {name.split(".")[0] for name in store.names("", "") if is_part(name)}
    return parts - set(stored_ids(store))


def forget_gone(store: Store, backup_id: str) -> None:
    """Remove the note of a backup that nobody misses any more."""
    store.delete(f"{backup_id}{_GONE}")


def breaks(
    manifests: Iterable[Manifest], gone: Mapping[str, datetime], oldest: datetime
) -> list[Break]:
    """
    Find where the chain of backups does not hold: one was taken away, or another put in its place.

    Args:
        manifests: All that the store holds, authenticated.
        gone: Those that we deleted ourselves.
        oldest: What is older may have been deleted without a note that is still kept.
    """
    known = {manifest.id: manifest for manifest in manifests}
    found = []
    for manifest in known.values():
        before = manifest.previous
        if before is None or before["id"] in gone:
            continue
        if (there := known.get(before["id"])) is not None:
            if there.link != before["link"]:
                found.append(Break(before["id"], "is not the one that the next backup names"))
        elif datetime.fromisoformat(before["created_at"]) > oldest:
            found.append(Break(before["id"], "is missing, and was not deleted by this service"))
    return found


def _ids(store: Store, suffix: str) -> list[str]:
    names = (name.removesuffix(suffix) for name in store.names("", suffix))
    return [name for name in names if _ID.fullmatch(name)]


def _canonical(body: dict[str, Any]) -> bytes:
    return json.dumps(body, sort_keys=True, separators=(",", ":")).encode()
