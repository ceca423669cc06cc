"""
A stanza of pgBackRest: its configuration, which the server shares, and running commands on it.

The passphrase stands in a file that the owner of the cluster alone may read, and in no
environment: the server archives WAL on its own, also after a restart that we know nothing of, and
must find it. Who can read that file can read the cluster itself.
"""

import re
import secrets
import shlex
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from backend.backup.pgbackrest.cluster import Cluster
from backend.backup.pgbackrest.programs import Outcome, plain_environment
from backend.backup.pgbackrest.says import failure, percent_of, sets_of
from backend.errors import ConfigurationError

# The first that annotates backups.
_OLDEST: Final = (2, 41)
_PROGRAM: Final = "pgbackrest"
_PASSPHRASE: Final = re.compile(r"[A-Za-z0-9+/=_-]{32,}")
_NAME: Final = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}")
_FILE: Final = "holdfast.conf"
# What goes is decided by us; this only keeps pgBackRest from warning that nobody decides.
_KEEP_ALL: Final = "9999999"

Progress = Callable[[float], None]
Take = Callable[[bytes], object]


class Stanza:
    """
    The backups of one cluster.

    Args:
        passphrase: Of the repositories, at least 32 characters of base64 or base64url.
        repository: A folder of our own, for which everything is configured here; or
        config: the operator's configuration, which says everything (also S3 and other hosts); if
            it names no cipher, cipher and passphrase are added to it.

    Raises:
        ConfigurationError: Neither or both of them, or a passphrase or name of another form.
    """

    def __init__(
        self,
        cluster: Cluster,
        name: str,
        passphrase: str,
        *,
        repository: Path | None = None,
        config: Path | None = None,
    ) -> None:
        if (repository is None) == (config is None):
            raise ConfigurationError("pgBackRest needs either a repository or a configuration")
        if not _PASSPHRASE.fullmatch(passphrase):
            raise ConfigurationError("the passphrase is not 32 characters of base64 or more")
        if not _NAME.fullmatch(name):
            raise ConfigurationError("the stanza has a name that pgBackRest does not take")
        self.name = name
        self._cluster, self._passphrase = cluster, passphrase
        self._repository = repository and repository.absolute()
        self._config = config and config.absolute()
        self._folder = cluster.private / "pgbackrest"
        self._version: tuple[int, int] | None = None

    @property
    def archive_command(self) -> str:
        """What `archive_command` must be for the server to archive into the repository."""
        words = [shutil.which(_PROGRAM) or _PROGRAM, *self._place(self._folder), "archive-push"]
        return shlex.join(words).replace("%", "%%") + ' "%p"'

    @property
    def is_configured_by_us(self) -> bool:
        return self._config is None

    def version(self) -> tuple[int, int]:
        """
        Return the version of pgBackRest on this machine.

        Raises:
            UnavailableError: It is not on this machine.
            ConfigurationError: It is too old.
        """
        if self._version is None:
            said = self._cluster.account.run([_PROGRAM, "version"]).output.decode(errors="replace")
            found = re.search(r"(\d+)\.(\d+)", said)
            self._version = (int(found[1]), int(found[2])) if found else (0, 0)
        if self._version < _OLDEST:
            raise ConfigurationError("pgBackRest {}.{} or newer is needed".format(*_OLDEST))
        return self._version

    def run(
        self, command: str, *arguments: str, take: Take | None = None, meter: Progress | None = None
    ) -> Outcome:
        """
        Run a command of pgBackRest on this stanza; `failure` says what it may raise.

        Args:
            take: Gets the output as it comes.
            meter: Is told how many percent are done; there is no output then.

        Raises:
            ConfigurationError: The repository does not open with the passphrase.
        """
        self.version()
        self._configure()
        if meter is not None:
            arguments, take = (*arguments, "--log-level-console=detail"), _Meter(meter).take
        return self._run_in(self._folder, command, *arguments, take=take)

    def _run_in(
        self, folder: Path, command: str, *arguments: str, take: Take | None = None
    ) -> Outcome:
        always = ["--log-level-stderr=warn", "--no-log-timestamp"]
        if not any(word.startswith("--log-level-console=") for word in arguments):
            always.append("--log-level-console=off")
        outcome = self._cluster.account.run(
            [_PROGRAM, *self._place(folder), command, *arguments, *always],
            environment=plain_environment() | self._cluster.password_entry(),
            take=take,
        )
        if outcome.code != 0:
            raise failure(outcome, self._passphrase)
        return outcome

    def _place(self, folder: Path) -> list[str]:
        if self._config is None:
            return [f"--config={folder / _FILE}", f"--stanza={self.name}"]
        return [
            f"--config={self._config}", f"--config-include-path={folder}", f"--stanza={self.name}"
        ]  # fmt: skip

    def _configure(self) -> None:
        """
        Write what pgBackRest and the archiving server read.

        It is tried first: a wrong passphrase must not reach the server, which could not archive
        any more.
        """
        wanted = self._spelled().encode()
        account, own = self._cluster.account, self._folder / _FILE
        try:
            if own.read_bytes() == wanted:
                return
        except FileNotFoundError:
            account.make_folder(self._cluster.private, exist_ok=True)
            account.make_folder(self._folder, exist_ok=True)
        if self._repository is not None and not self._repository.exists():
            account.make_folder(self._repository)
        trial = self._cluster.private / f"trial-{secrets.token_hex(4)}"
        account.make_folder(trial)
        try:
            account.write(trial / _FILE, wanted)
            sets_of(self._run_in(trial, "info", "--output=json").output)
        finally:
            shutil.rmtree(trial, ignore_errors=True)
        account.write(own, wanted)

    def _spelled(self) -> str:
        if self._config is not None:
            return _spell({"global": self._missing_ciphers(self._config)})
        work = self._cluster.private
        options = {
            "repo1-path": str(self._repository),
            **self._ciphers("1"),
            "repo1-retention-full": _KEEP_ALL,
            "compress-type": "zst",
            "compress-level": "3",
            "start-fast": "y",
            # It would wait 15 s before it reads the same damaged file again.
            "job-retry": "0",
            "log-level-file": "off",
            "lock-path": str(work / "lock"),
            "spool-path": str(work / "spool"),
        }
        stanza = {"pg1-path": str(self._cluster.data), "pg1-user": self._cluster.superuser}
        return _spell({"global": options, self.name: stanza})

    def _missing_ciphers(self, config: Path) -> dict[str, str]:
        """Return what encrypts the repositories of a configuration that names no cipher."""
        try:
            theirs = config.read_text(errors="replace")
        except OSError as err:
            raise ConfigurationError(f"{config} cannot be read: {err.strerror}") from None
        if re.search(r"^\s*repo\d+-cipher-", theirs, re.MULTILINE):
            return {}
        numbers = set(re.findall(r"^\s*repo(\d+)-", theirs, re.MULTILINE)) or {"1"}
        return {k: v for number in sorted(numbers) for k, v in self._ciphers(number).items()}

    def _ciphers(self, number: str) -> dict[str, str]:
        return {
            f"repo{number}-cipher-type": "aes-256-cbc",
            f"repo{number}-cipher-pass": self._passphrase,
        }


class _Meter:
    """Reads progress out of a detailed log as it comes."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._rest = ""

    def take(self, data: bytes) -> None:
        *lines, self._rest = (self._rest + data.decode(errors="replace")).split("\n")
        told = [found for line in lines if (found := percent_of(line)) is not None]
        if told:
            self._progress(told[-1])


def _spell(sections: Mapping[str, Mapping[str, str]]) -> str:
    return "".join(
        f"[{name}]\n" + "".join(f"{key}={value}\n" for key, value in options.items())
        for name, options in sections.items()
    )
