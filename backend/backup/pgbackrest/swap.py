"""
Putting a restored cluster in the place of the live one: old or new, never a mix, whenever killed.

The server is stopped, both directories change names in one step of the file system, and it is
started again. A journal beside them says what is under way, so that the next start can finish it;
which directory is which is told by its inode, and never guessed.
"""

import ctypes
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Final

from backend.backup.database import moment_of, stamp
from backend.backup.pgbackrest.cluster import Cluster
from backend.backup.pgbackrest.postmaster import RunOptions, postmaster_of, run_options
from backend.backup.pgbackrest.programs import Account, sync_folder
from backend.errors import (
    BackupDamagedError,
    ConfigurationError,
    ConflictError,
    NotFoundError,
    UnavailableError,
)

_KEPT: Final = "-before-"
_JOURNAL: Final = "swap.json"
# Recovery that finds nothing to replay, and then begins a timeline of its own.
_LEAVE_TIMELINE: Final = b"restore_command = 'false'\nrecovery_target_timeline = 'current'\n"
_RENAME_EXCHANGE: Final = 2
_AT_FDCWD: Final = -100
# How a cluster is run is this machine's, and a restore brings back data. Old rules of access, and
# the settings of the recovery itself, must not come with them.
_CONFIGURATION: Final = ("*.conf", "*.crt", "*.key", "*.pem", "*.crl", "conf.d/*")


@dataclass(frozen=True, slots=True)
class _Journal:
    """What takes the place of what: names beside the live directory, and how its server runs."""

    built: str
    built_inode: int
    kept: str
    was_running: bool
    run: dict[str, Any]


def swap(cluster: Cluster, built: Path, at: datetime) -> Path:
    """
    Put *built* in the place of the live directory; return where the old one is kept.

    Should the new one not start, the old one is put back and started.

    Raises:
        ConfigurationError: See `require_swappable`.
        BackupDamagedError: *built* has not recovered and shut down in good order.
        ConflictError: A server still runs on *built*.
        UnavailableError: The live server does not stop, or the new one does not start; the old
            one runs again.
    """
    require_swappable(cluster)
    recover(cluster)
    _require_shut_down(cluster, built)
    run, was_running = run_options(cluster.data), cluster.postmaster() is not None
    _take_configuration(cluster, built)
    # Where the server's own tools look for how it is run.
    words = "".join(f' "{word}"' for word in ("-D", str(cluster.data), *run.arguments))
    cluster.account.write(built / "postmaster.opts", os.fsencode(f"{run.program}{words}\n"))
    aside = f"{cluster.data.name}{_KEPT}{stamp(at)}"
    journal = _Journal(built.name, built.stat().st_ino, aside, was_running, asdict(run))
    cluster.account.write(cluster.private / _JOURNAL, json.dumps(asdict(journal)).encode())
    try:
        cluster.stop()
        _exchange(built, cluster.data)
    except OSError as err:
        raise UnavailableError(f"the directories were not exchanged: {err.strerror}") from err
    finally:
        _finish(cluster, journal)
    return cluster.data.with_name(aside)


def recover(cluster: Cluster) -> int:
    """
    Finish what a killed swap left, and start the server that it had stopped.

    Returns:
        How many swaps were left: none or one.

    Raises:
        ConfigurationError: The journal is not what a swap writes.
        UnavailableError: The server does not start; the next call tries again.
    """
    path = cluster.private / _JOURNAL
    try:
        journal = _Journal(**json.loads(path.read_bytes()))
    except FileNotFoundError:
        return 0
    except (OSError, ValueError, TypeError):
        raise ConfigurationError(f"{path} is not what a swap writes") from None
    if not (cluster.is_restored(journal.built) and _moment_of(cluster, journal.kept)):
        raise ConfigurationError(f"{path} is not what a swap writes")
    _finish(cluster, journal)
    return 1


def is_unfinished(cluster: Cluster) -> bool:
    """Whether there is a swap for `recover` to finish."""
    return (cluster.private / _JOURNAL).exists()


def sweep(cluster: Cluster) -> int:
    """
    Clear up after a killed process: an unfinished swap, restored directories, their servers.

    Call it only while nobody else restores.

    Returns:
        How many things were left behind.
    """
    left = recover(cluster)
    for path in cluster.restored_directories():
        cluster.clear_directory(path)
        left += 1
    cluster.sweep_private()
    return left


def kept(cluster: Cluster) -> Iterator[tuple[Path, datetime]]:
    """Yield the directories that swaps have kept aside, and when those were."""
    for path in cluster.data.parent.glob(f"{cluster.data.name}{_KEPT}*"):
        if moment := _moment_of(cluster, path.name):
            yield path, moment


def copy_kept(cluster: Cluster, moment: datetime, into: Path) -> None:
    """
    Copy the directory that the swap at *moment* kept aside, ready for `private_server`.

    The copy leaves the timeline where the old cluster was stopped. Going on with it, it would
    write WAL under names that another copy may have taken already, and that the archive then
    refuses.

    Raises:
        NotFoundError: None is kept from then.
        ConflictError: Somebody runs a server on it.
        UnavailableError: There is no room for it.
    """
    source = cluster.data.with_name(f"{cluster.data.name}{_KEPT}{stamp(moment)}")
    if not source.exists():
        raise NotFoundError(f"no cluster is kept aside from {moment.isoformat()}")
    if postmaster_of(source) is not None:
        raise ConflictError("a server runs on the cluster that is kept aside")
    cluster.account.copy_tree(source, into)
    cluster.bring_histories(into)
    settings = into / "postgresql.auto.conf"
    cluster.account.write(settings, settings.read_bytes() + _LEAVE_TIMELINE)
    cluster.account.write(into / "recovery.signal", b"")


def forget_previous(cluster: Cluster, before: datetime) -> int:
    """Remove the directories that swaps before *before* have kept aside; return how many."""
    gone = 0
    for path, moment in kept(cluster):
        if moment < before and postmaster_of(path) is None:
            shutil.rmtree(path)
            gone += 1
    return gone


def require_swappable(cluster: Cluster) -> None:
    """
    Make sure that the live directory can change names with another.

    Raises:
        ConfigurationError: It is a mount, parts of it lie elsewhere, or its file system cannot.
        UnavailableError: Nothing can be written beside it.
    """
    if cluster.data.is_mount():
        raise ConfigurationError(
            f"{cluster.data} is a mount, which cannot be exchanged: let the data lie one below"
        )
    if any((cluster.data / "pg_tblspc").iterdir()):
        raise ConfigurationError(
            "the cluster has tablespaces outside its directory, which cannot be exchanged with it"
        )
    cluster.account.make_folder(cluster.private, exist_ok=True)
    probes = [cluster.private / f"probe-{secrets.token_hex(4)}" for _ in range(2)]
    try:
        for probe in probes:
            cluster.account.make_folder(probe)
        _exchange(*probes)
    except OSError as err:
        raise ConfigurationError(
            f"directories beside {cluster.data} cannot be exchanged at once: {err.strerror}"
        ) from None
    finally:
        for probe in probes:
            shutil.rmtree(probe, ignore_errors=True)


def _require_shut_down(cluster: Cluster, built: Path) -> None:
    if postmaster_of(built) is not None:
        raise ConflictError("the restored cluster is still running")
    if cluster.control(built).get("Database cluster state") != "shut down":
        raise BackupDamagedError("the restored cluster has not recovered in good order")


def _finish(cluster: Cluster, journal: _Journal) -> None:
    """Go on from where the exchange is: forward if the new directory is the live one, else back."""
    built, aside = (cluster.data.with_name(name) for name in (journal.built, journal.kept))
    run = RunOptions(**journal.run)
    refused = False
    if cluster.data.stat().st_ino == journal.built_inode:
        try:
            cluster.start(run)
        except UnavailableError:
            refused = True
            _put_back(cluster, built if built.exists() else aside, built)
        else:
            if built.exists():
                built.rename(aside)
    if journal.was_running:
        cluster.start(run)
    sync_folder(aside.parent)
    (cluster.private / _JOURNAL).unlink(missing_ok=True)
    sync_folder(cluster.private)
    if refused:
        raise UnavailableError(
            "the restored cluster does not start as the live one; the old one was put back"
        )


def _put_back(cluster: Cluster, old: Path, built: Path) -> None:
    cluster.stop()
    _exchange(old, cluster.data)
    if old != built:
        old.rename(built)


def _exchange(one: Path, other: Path) -> None:
    """Let two directories change names at once: nobody ever finds neither, or one of them twice."""
    names = (os.fsencode(one), os.fsencode(other))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    sync_folder(other.parent)


def _take_configuration(cluster: Cluster, built: Path) -> None:
    """Let *built* be run as the live directory is: by its configuration files, and no others."""
    for path in _configuration(built):
        path.unlink()
    for path in _configuration(cluster.data):
        copy = built / path.relative_to(cluster.data)
        cluster.account.make_folder(copy.parent, exist_ok=True)
        _copy(cluster.account, path, copy)


def _configuration(data: Path) -> list[Path]:
    found = [path for pattern in _CONFIGURATION for path in data.glob(pattern)]
    return [path for path in found if path.is_symlink() or path.is_file()]


def _copy(account: Account, path: Path, copy: Path) -> None:
    if path.is_symlink():
        copy.symlink_to(path.readlink())
        return
    account.write(copy, path.read_bytes())
    copy.chmod(path.stat().st_mode & 0o777)


def _moment_of(cluster: Cluster, name: str) -> datetime | None:
    with suppress(ValueError):
        return moment_of(name.removeprefix(f"{cluster.data.name}{_KEPT}"))
    return None
