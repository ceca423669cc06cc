"""
A server on a restored data directory that only we, and the owner of the cluster, can reach.

Nothing in it acts by itself: it archives no WAL, calls no publisher, runs no command when it has
recovered, loads no library that works in the background, and waits for no standby.
"""

import os
import re
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from sqlalchemy import URL

from backend.backup.pgbackrest.cluster import Cluster
from backend.backup.pgbackrest.postmaster import postmaster_of, run_options, version_of
from backend.errors import (
    BackupDamagedError,
    HoldfastError,
    RefusedError,
    SchemaMismatchError,
    UnavailableError,
)

_POLL_SECONDS: Final = 0.02
_STOP_SECONDS: Final = 60
_PORT: Final = "5432"
# The path of a socket holds 107 bytes.
_MAX_FOLDER_BYTES: Final = 107 - len(f"/.s.PGSQL.{_PORT}")
_WITH_ARCHIVE_LIBRARY: Final = 15

_OPTIONS: Final = {
    "listen_addresses": "",
    "port": _PORT,
    "unix_socket_permissions": "0700",
    "ssl": "off",
    # WAL is kept for the archive, and given to it only if this directory becomes the live one.
    # Were archiving off, the archive would miss the history of this timeline, and the next
    # restore would give the same number to another one.
    "archive_mode": "on",
    "archive_command": "",
    # It lets nobody in before it has recovered, and does not mind older limits on connections.
    "hot_standby": "off",
    "synchronous_standby_names": "",
    "primary_conninfo": "",
    "recovery_min_apply_delay": "0",
    "recovery_end_command": "",
    "archive_cleanup_command": "",
    "shared_preload_libraries": "",
    "session_preload_libraries": "",
    "local_preload_libraries": "",
    "max_logical_replication_workers": "0",
    "autovacuum": "off",
    "default_transaction_read_only": "off",
    "statement_timeout": "0",
    "idle_in_transaction_session_timeout": "0",
    "restart_after_crash": "off",
    # Beside the live server there may be no room for as much memory again.
    "shared_buffers": "128MB",
    "huge_pages": "off",
    "jit": "off",
    "fsync": "on",
    "full_page_writes": "on",
    # Why it does not start is read from its log, where no row may stand.
    "logging_collector": "off",
    "log_destination": "stderr",
    "log_min_messages": "log",
    "log_min_error_statement": "panic",
    "log_statement": "none",
    "log_min_duration_statement": "-1",
    "lc_messages": "C",
}


class PrivateServer:
    """A server that has recovered and accepts writes."""

    def __init__(self, data: Path, sockets: Path, process: "subprocess.Popen[bytes]") -> None:
        self.data = data
        self.sockets = sockets
        self.port = _PORT
        self._process = process

    def url(self, database: str, user: str) -> URL:
        """Return the address of a database for SQLAlchemy; no password is asked for."""
        place = {"host": str(self.sockets), "port": self.port}
        return URL.create("postgresql", username=user, database=database, query=place)

    def stop(self) -> None:
        """
        Stop it in good order, so that its directory can be taken as it is.

        Raises:
            UnavailableError: It did not stop in good order.
        """
        self._process.send_signal(signal.SIGINT)
        try:
            code = self._process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            # The end of the block does not wait for it.
            code = None
        if code != 0:
            raise UnavailableError("the restored cluster did not shut down in good order")


@contextmanager
def private_server(cluster: Cluster, data: Path) -> Iterator[PrivateServer]:
    """
    Run a server on *data*, which was restored for *cluster*, until the block ends or stops it.

    Raises:
        SchemaMismatchError: *data* is of another major version.
        BackupDamagedError: It does not recover to a consistent state.
        RefusedError: The archive does not reach the target time.
        UnavailableError: It does not start.
    """
    if version_of(data) != cluster.version:
        raise SchemaMismatchError(
            f"the backup is of PostgreSQL {version_of(data)}, the cluster of {cluster.version}"
        )
    sockets = _socket_folder(cluster)
    try:
        cluster.account.write(sockets / "hba.conf", b"local all all trust\n")
        log = sockets / "log"
        cluster.account.write(log, b"")
        with log.open("ab") as out:
            process = cluster.account.start(
                _command(cluster, data, sockets), out=out, last_signal="INT"
            )
        with process:
            try:
                _wait_until_ready(data, process, log)
                yield PrivateServer(data, sockets, process)
            finally:
                if process.poll() is None:
                    process.send_signal(signal.SIGQUIT)
    finally:
        shutil.rmtree(sockets, ignore_errors=True)


def _wait_until_ready(data: Path, process: "subprocess.Popen[bytes]", log: Path) -> None:
    # However long that takes: between backup and target there may be days of WAL.
    while (server := postmaster_of(data)) is None or server.state != "ready":
        if process.poll() is not None:
            raise _why(log.read_text(errors="replace"))
        time.sleep(_POLL_SECONDS)


def _command(cluster: Cluster, data: Path, sockets: Path) -> list[str]:
    live = run_options(cluster.data)
    options = _OPTIONS | {
        # A configuration that lies elsewhere names the live directory.
        "data_directory": str(data),
        "external_pid_file": str(sockets / "pid"),
        "hba_file": str(sockets / "hba.conf"),
        "unix_socket_directories": str(sockets),
    }
    if cluster.version >= _WITH_ARCHIVE_LIBRARY:
        options["archive_library"] = ""
    settings = [part for name, value in options.items() for part in ("-c", f"{name}={value}")]
    # The live server's options come first, for later ones win.
    return [live.program, *live.arguments, "-D", str(data), *settings]


def _socket_folder(cluster: Cluster) -> Path:
    cluster.account.make_folder(cluster.private, exist_ok=True)
    name = f"run-{secrets.token_hex(8)}"
    shorter = (Path(tempfile.gettempdir()), Path("/tmp"))  # noqa: S108 - made 0700, and no name to guess
    places = (folder / name for folder in (cluster.private, *shorter))
    folder = next(place for place in places if len(os.fsencode(place)) <= _MAX_FOLDER_BYTES)
    cluster.account.make_folder(folder)
    return folder


def _why(log: str) -> HoldfastError:
    """Say why a server ended before it had recovered."""
    if "recovery ended before configured recovery target was reached" in log:
        return RefusedError("the archive holds no WAL up to the target time")
    if "recovery stop point is before consistent recovery point" in log:
        return RefusedError("the target time is before the end of the backup")
    damaged = ("WAL ends before", "could not locate", "invalid checkpoint", "incorrect checksum")
    if any(words in log for words in damaged):
        return BackupDamagedError("the backup does not recover to a consistent state")
    told = re.search(r"(?:FATAL|PANIC): +(.{1,150})", log)
    return UnavailableError(f"the restored cluster does not start: {told[1] if told else 'unsaid'}")
