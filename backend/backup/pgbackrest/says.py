"""
What pgBackRest says, read: its list of backups, its verdict on them, and how it fails.

Its words are never quoted where it could not read a file: there it prints what it found, and that
may be the key inside the repository.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any, Final
from uuid import UUID

from backend.backup.pgbackrest.programs import Outcome
from backend.errors import (
    BackupDamagedError,
    ConfigurationError,
    ConflictError,
    HoldfastError,
    UnavailableError,
)

# What its exit codes mean, and what to say: src/build/error/error.yaml.
_MEANINGS: Final[tuple[tuple[tuple[int, ...], type[HoldfastError], str], ...]] = (
    (
        (26, 29, 95, 98, 99),
        BackupDamagedError,
        "pgBackRest cannot read the repository: another passphrase, or damage",
    ),
    ((55,), BackupDamagedError, "a file that the repository of pgBackRest should have is missing"),
    ((28, 44, 51, 58), ConfigurationError, "the stanza of pgBackRest is another cluster's"),
    ((27, 30, 31, 32, 37, 46), ConfigurationError, "pgBackRest: {said}"),
    ((68, 87), ConfigurationError, "the cluster does not archive its WAL: {said}"),
    ((50,), ConflictError, "pgBackRest is busy with this stanza"),
    ((75,), ConflictError, "pgBackRest: {said}"),
    ((82,), UnavailableError, "WAL does not reach the repository: {said}"),
)
# `info`: fine; nothing there yet; no backup yet; no stanza yet; one repository is not like the
# others, each of which is asked.
_SOUND: Final = (0, 1, 2, 3, 4)
_CANNOT_OPEN: Final = re.compile(r"\[(Format|Crypto|Checksum|JsonFormat)Error\]")
_SEGMENT: Final = "[0-9A-F]{24}"


class Kind(StrEnum):
    """Everything; what changed since the last full one; what changed since the last of any."""

    FULL = "full"
    DIFF = "diff"
    INCR = "incr"


@dataclass(frozen=True, slots=True)
class BackupSet:
    """
    One backup in a repository of pgBackRest.

    *references* are the sets that its files also lie in. *size_bytes* is what it added to the
    repository. *record* is the annotation that we gave it. *damaged_pages* says that pages of the
    live cluster had wrong checksums when it was made.
    """

    label: str
    kind: Kind
    started_at: datetime
    stopped_at: datetime
    first_wal: str
    last_wal: str
    first_lsn: str
    last_lsn: str
    database_bytes: int
    size_bytes: int
    prior: str | None
    references: tuple[str, ...]
    record: UUID | None
    damaged_pages: bool
    repository: int
    archive: str
    system_id: str
    version: int


@dataclass(frozen=True, slots=True)
class Verdict:
    """
    That a set is whole: how many files were read, and which WAL outside of it is damaged.

    Such WAL does not hurt the set itself, only recovery to a moment behind it.
    """

    files: int
    damaged_wal: tuple[str, ...]


def sets_of(info: bytes) -> list[BackupSet]:
    """
    Read the answer of `info --output=json` on one stanza, oldest set first.

    Raises:
        ConfigurationError: The repository is not encrypted, or cannot be opened: another
            passphrase, or damage.
        UnavailableError: The repository cannot be reached, or the answer is none.
    """
    try:
        (stanza,) = _read(info)
        for repo in stanza["repo"]:
            _require_sound(repo)
        clusters = {(db["id"], db["repo-key"]): db for db in stanza["db"]}
        return [_set_of(entry, clusters) for entry in stanza["backup"]]
    except (ValueError, TypeError, KeyError, AttributeError):
        raise UnavailableError("pgBackRest's list of backups cannot be read") from None


def _read(info: bytes) -> list[dict[str, Any]]:
    # Where it could not decrypt a file, the message holds bytes of it.
    document: list[dict[str, Any]] = json.loads(info.decode(errors="replace"), strict=False)
    return document


def _require_sound(repository: Mapping[str, Any]) -> None:
    status = repository["status"]
    if repository["cipher"] == "none":
        raise ConfigurationError("the repository of pgBackRest is not encrypted")
    if status["code"] in _SOUND:
        return
    if _CANNOT_OPEN.search(status["message"]):
        raise ConfigurationError(
            "the repository of pgBackRest cannot be opened: another passphrase, or damage"
        )
    if "Permission denied" in status["message"]:
        raise ConfigurationError(
            "the owner of the cluster may not enter the repository of pgBackRest"
        )
    raise UnavailableError("the repository of pgBackRest cannot be read")


def _set_of(entry: Mapping[str, Any], clusters: Mapping[Any, Any]) -> BackupSet:
    database, repository = entry["database"]["id"], entry["database"]["repo-key"]
    cluster = clusters[database, repository]
    # Neither is said of one that somebody made without a running server.
    archive, lsn = entry.get("archive") or {}, entry.get("lsn") or {}
    record = None
    with suppress(ValueError):
        record = UUID((entry.get("annotation") or {}).get("record", ""))
    return BackupSet(
        label=entry["label"],
        kind=Kind(entry["type"]),
        started_at=datetime.fromtimestamp(entry["timestamp"]["start"], UTC),
        stopped_at=datetime.fromtimestamp(entry["timestamp"]["stop"], UTC),
        first_wal=archive.get("start") or "",
        last_wal=archive.get("stop") or "",
        first_lsn=lsn.get("start") or "",
        last_lsn=lsn.get("stop") or "",
        database_bytes=entry["info"]["size"],
        size_bytes=entry["info"]["repository"]["delta"],
        prior=entry["prior"],
        references=tuple(entry.get("reference") or ()),
        record=record,
        damaged_pages=bool(entry.get("error")),
        repository=repository,
        archive=f"{cluster['version']}-{database}",
        system_id=str(cluster["system-id"]),
        version=int(str(cluster["version"]).partition(".")[0]),
    )


def tablespaces_of(info: bytes) -> Sequence[str]:
    """Read the names of the tablespaces from `info --set=… --output=json`."""
    try:
        (stanza,) = _read(info)
        return [space["name"] for s in stanza["backup"] for space in s.get("tablespace") or ()]
    except (ValueError, TypeError, KeyError, AttributeError):
        raise UnavailableError("pgBackRest's description of the backup cannot be read") from None


def verdict_on(found: BackupSet, said: str) -> Verdict:
    """
    Read what `verify --verbose --output=text` found out about one set, with its detailed log.

    It ends with 0 whatever it finds, and says that all is well where WAL is missing: the ranges
    that it lists tell. What it does not say is taken as damage.

    Raises:
        BackupDamagedError: The set, or WAL without which it is not consistent, is damaged.
    """
    label = re.escape(found.label)
    files = re.search(
        rf"backup: {label}, status: valid, total files checked: (\d+), total valid files: \1\b",
        said,
    )
    if "status: ok" not in said and "status: error" not in said:
        raise BackupDamagedError("pgBackRest gives no verdict on the backup")
    if files is None or files[1] == "0":
        raise BackupDamagedError("files of the backup are missing or damaged")
    needed = (found.first_wal, found.last_wal)
    if not any(a <= needed[0] and needed[1] <= b for a, b in _ranges(found.archive, said)):
        raise BackupDamagedError("WAL that the backup needs is missing")
    damaged = sorted(set(re.findall(rf"\b({_SEGMENT})-[0-9a-f]{{40}}", said)))
    if any(needed[0] <= segment <= needed[1] for segment in damaged):
        raise BackupDamagedError("WAL that the backup needs is damaged")
    return Verdict(int(files[1]), tuple(damaged))


def _ranges(archive: str, said: str) -> Iterator[tuple[str, str]]:
    """Yield the first and last segment of every stretch of WAL without a gap."""
    words = rf"archiveId: {re.escape(archive)}, wal start: ({_SEGMENT}), wal stop: ({_SEGMENT})"
    for found in re.finditer(words, said):
        yield found[1], found[2]


def percent_of(line: str) -> float | None:
    """Read how far a backup or restore is from a line of its detailed log."""
    found = re.search(r"\bfile .*\((?:.*, )?(\d{1,3}(?:\.\d+)?)%\)", line)
    return float(found[1]) if found else None


def failure(outcome: Outcome, secret: str) -> HoldfastError:
    """Say what an exit code means."""
    # `expire` ends with a code that only says that there were errors; those come first.
    first = re.search(r"ERROR: \[(\d{3})\]", outcome.errors)
    code = int(first[1]) if first else outcome.code
    for codes, error, words in _MEANINGS:
        if code in codes:
            return error(words.format(said=outcome.said(secret)))
    return UnavailableError(f"pgBackRest failed: {outcome.said(secret)}")
