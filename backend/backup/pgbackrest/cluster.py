"""A PostgreSQL cluster on this machine, and the data directories beside it that we made."""

import os
import re
import secrets
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

from backend.backup.pgbackrest.postmaster import (
    Postmaster,
    RunOptions,
    is_starting,
    is_told,
    postmaster_of,
    run_options,
    version_of,
)
from backend.backup.pgbackrest.programs import Account, Outcome, plain_environment
from backend.errors import BackupDamagedError, ConfigurationError, UnavailableError

_POLL_SECONDS: Final = 0.05
_STOP_SECONDS: Final = 60
_START_SECONDS: Final = 300
_CLEAR_SECONDS: Final = 10
_RESTORED: Final = "-restore-"
# Folders of sockets, of trials and of probes, and files that are being written.
_PASSING: Final = ("run-", "trial-", "probe-", ".")


class Cluster:
    """
    The cluster whose data directory is *data*.

    Args:
        superuser: The role that `initdb` made.
        password: Its password, where the server asks for one over the socket.
        start_command: Starts the server where a service manager keeps it (`systemctl start …`);
            without it `pg_ctl` does, with the options that it ran with.
        stop_command: Stops it.

    Raises:
        ConfigurationError: No cluster lies there, or this process may not drive it.
    """

    def __init__(
        self,
        data: Path,
        *,
        superuser: str = "postgres",
        password: str | None = None,
        start_command: Sequence[str] = (),
        stop_command: Sequence[str] = (),
    ) -> None:
        # A link would be exchanged itself; what it points at is the directory.
        self.data = data.resolve()
        self.account = Account.owning(self.data)
        self.superuser = superuser
        self._password = password
        self._start_command, self._stop_command = tuple(start_command), tuple(stop_command)
        self.version = version_of(self.data)
        # What is ours lies beside the data, on the same file system.
        self.private = self.data.with_name(f"{self.data.name}-holdfast")

    def postmaster(self) -> Postmaster | None:
        """Return the running server, if there is one."""
        return postmaster_of(self.data)

    def program(self, name: str) -> str:
        """Return the path of one of PostgreSQL's programs, of the version that runs here."""
        return str(Path(run_options(self.data).program).with_name(name))

    def password_entry(self) -> dict[str, str]:
        """Return the superuser's password as libpq takes it from the environment."""
        return {} if self._password is None else {"PGPASSWORD": self._password}

    def ask(self, statement: str) -> str:
        """
        Run a statement as superuser and return what it answers.

        Raises:
            UnavailableError: The server does not run, or refuses.
        """
        server = self.postmaster()
        if server is None:
            raise UnavailableError(f"the server of {self.data} does not run")
        place = ["-h", server.socket_folder, "-p", server.port, "-U", self.superuser]
        done = self.account.run(
            [self.program("psql"), "-XAtqw", *place, "-d", "postgres", "-c", statement],
            environment=plain_environment() | self.password_entry(),
        )
        if done.code != 0:
            raise UnavailableError(f"PostgreSQL refused: {done.said(self._password or '')}")
        return done.output.decode(errors="replace").strip()

    def control(self, data: Path | None = None) -> dict[str, str]:
        """
        Read the control file of this or another data directory, as `pg_controldata` spells it.

        Raises:
            BackupDamagedError: There is none, or its checksum is wrong.
        """
        directory = data or self.data
        done = self.account.run([self.program("pg_controldata"), str(directory)])
        pairs = (line.partition(":") for line in done.output.decode(errors="replace").splitlines())
        found = {name.strip(): value.strip() for name, _, value in pairs}
        if done.code != 0 or any(name.startswith("WARNING") for name in found):
            raise BackupDamagedError(f"{directory} has no sound control file")
        return found

    @property
    def system_id(self) -> str:
        """The number that tells this cluster from every other, through backups and restores."""
        return self.system_id_of(self.data)

    def system_id_of(self, data: Path) -> str:
        """Read it from this or another data directory; see `control`."""
        return self.control(data)["Database system identifier"]

    def start(self, options: RunOptions) -> None:
        """
        Start the server; return once it accepts connections.

        Raises:
            UnavailableError: It does not start.
        """
        self._wait_for_orders()
        if self.postmaster() is None:
            self._launch(options)
        self._wait_until_ready()

    def _wait_for_orders(self) -> None:
        """Let the server follow what a process told it that was killed since."""
        while is_told(self.data):
            time.sleep(_POLL_SECONDS)
        if server := self.postmaster():
            place = ["-q", "-h", server.socket_folder, "-p", server.port]
            # Whatever it answers, it has seen by then every signal that came before.
            self.account.run([self.program("pg_isready"), *place])
        while (server := self.postmaster()) is not None and server.state == "stopping":
            time.sleep(_POLL_SECONDS)

    def _launch(self, options: RunOptions) -> None:
        if self._start_command:
            self._tell_service(self._start_command)
            return
        pg_ctl = str(Path(options.program).with_name("pg_ctl"))
        command = [pg_ctl, "start", "-s", "-w", "-t", str(_START_SECONDS), "-D", str(self.data)]
        command += ["-l", options.log, "-p", options.program]
        done = self.account.run(
            [*command, "-o", shlex.join(options.arguments)],
            environment=options.environment or None,
        )
        # A process that was killed may have started one a moment ago, which then is in our way.
        if done.code != 0 and not self._appears():
            raise UnavailableError(f"PostgreSQL does not start: {done.said()}")

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + _START_SECONDS
        while self._appears() and time.monotonic() < deadline:
            server = self.postmaster()
            if server is not None and server.state in ("ready", "standby"):
                return
            time.sleep(_POLL_SECONDS)
        raise UnavailableError("PostgreSQL does not start: its log says why")

    def _appears(self) -> bool:
        """Whether a server is there, or about to be."""
        while is_starting(self.data):
            time.sleep(_POLL_SECONDS)
        return self.postmaster() is not None

    def stop(self) -> None:
        """
        Stop the server: connections are ended, and every acknowledged write is on disk.

        Raises:
            UnavailableError: It does not stop.
        """
        if not self._appears():
            return
        if self._stop_command:
            self._tell_service(self._stop_command)
        else:
            stop = [self.program("pg_ctl"), "stop", "-s", "-D", str(self.data)]
            # Immediate only if it must be: the next start then recovers from its WAL.
            for mode in ("fast", "immediate"):
                if self.account.run([*stop, "-t", str(_STOP_SECONDS), "-m", mode]).code == 0:
                    break
        if self.postmaster() is not None:
            raise UnavailableError("PostgreSQL does not stop")

    def _tell_service(self, command: Sequence[str]) -> None:
        # As ourselves: the owner of the cluster may have no say over services.
        try:
            done = subprocess.run(
                command, stdin=subprocess.DEVNULL, capture_output=True, check=False
            )
        except OSError as err:
            raise ConfigurationError(f"{command[0]} cannot be run: {err.strerror}") from None
        if done.returncode != 0:
            said = Outcome(done.returncode, b"", done.stderr.decode(errors="replace")).said()
            raise UnavailableError(f"{Path(command[0]).name} failed: {said}")

    def new_directory(self) -> Path:
        """
        Make an empty data directory beside the live one.

        Raises:
            UnavailableError: The disk is full, or no folder may be made there.
        """
        path = self.data.with_name(f"{self.data.name}{_RESTORED}{secrets.token_hex(4)}")
        self.account.make_folder(path)
        return path

    def restored_directories(self) -> list[Path]:
        """Return the data directories that `new_directory` made and nobody cleared away."""
        found = self.data.parent.glob(f"{self.data.name}{_RESTORED}*")
        return sorted(path for path in found if self.is_restored(path.name))

    def is_restored(self, name: str) -> bool:
        """Whether `new_directory` gives such a name."""
        return bool(re.fullmatch(re.escape(self.data.name + _RESTORED) + "[0-9a-f]{8}", name))

    def bring_histories(self, into: Path) -> None:
        """
        Tell a restored directory of the timelines that were, for it to choose a new number.

        It asks the archive, too, which may lag behind. The same number twice would mean WAL of
        the same names, and the archive would take no more.

        Raises:
            UnavailableError: The disk is full.
        """
        for history in (self.data / "pg_wal").glob("*.history"):
            self.account.write(into / "pg_wal" / history.name, history.read_bytes())

    def clear_directory(self, path: Path) -> None:
        """
        Remove a restored data directory; a server that a killed process left on it is ended.

        Raises:
            UnavailableError: It cannot be removed.
        """
        while (server := postmaster_of(path)) is not None:
            with suppress(ProcessLookupError):
                os.kill(server.pid, signal.SIGQUIT)
            time.sleep(_POLL_SECONDS)
        deadline = time.monotonic() + _CLEAR_SECONDS
        while path.exists():
            # A program that was told to end a moment ago may still be writing.
            shutil.rmtree(path, ignore_errors=True)
            if time.monotonic() > deadline:
                raise UnavailableError(f"{path} cannot be removed")

    def sweep_private(self) -> None:
        """Remove what killed processes left half-done in `private`; call it while none runs."""
        for folder in (self.private, self.private / "pgbackrest"):
            for left in folder.glob("*"):
                if left.name.startswith(_PASSING):
                    shutil.rmtree(left) if left.is_dir() else left.unlink()
