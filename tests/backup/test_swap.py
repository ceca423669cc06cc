"""A restored cluster in the place of the live one: old or new, whole, whenever killed."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Final
from uuid import uuid4

import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.pool import NullPool

from backend.backup.pgbackrest.cluster import Cluster
from backend.backup.pgbackrest.postmaster import postmaster_of, run_options
from backend.backup.pgbackrest.private_server import private_server
from backend.backup.pgbackrest.says import Kind
from backend.backup.pgbackrest.swap import (
    copy_kept,
    forget_previous,
    kept,
    require_swappable,
    swap,
    sweep,
)
from backend.errors import (
    BackupDamagedError,
    ConfigurationError,
    ConflictError,
    NotFoundError,
    UnavailableError,
)
from tests.backup.clusters import (
    PASSPHRASE,
    SERVER_USER,
    STANZA,
    Site,
    are_gone,
    copy_to,
    new_folder,
    notes_in,
    processes_of,
    restored_server,
    site,
)
from tests.backup.commands import is_running

__all__ = ["site"]

ROOT: Final = Path(__file__).resolve().parents[2]
NOW: Final = datetime(2026, 1, 2, tzinfo=UTC)
TRIES: Final = 5


def _rebuild(site: Site, label: str | None) -> Path:
    """Restore beside the live cluster, change something there as a migration would, and stop."""
    built = site.cluster.new_directory()
    site.backups.restore(label, built)
    with private_server(site.cluster, built) as server:
        engine = create_engine(server.url("postgres", "postgres"), poolclass=NullPool)
        with engine.begin() as connection:
            connection.execute(text("INSERT INTO notes VALUES ('promised')"))
        server.stop()
    return built


def _notes_in_directory(site: Site, data: Path) -> list[str]:
    with private_server(site.cluster, data) as server:
        return notes_in(server)


def test_a_swap_puts_the_restored_cluster_in_place_and_keeps_the_old_one(site: Site) -> None:
    port = site.cluster.postmaster()
    rows_before = site.notes()
    built = _rebuild(site, site.labels[Kind.FULL])
    site.write("acknowledged")
    moment = site.now()
    site.write("later")
    aside = swap(site.cluster, built, NOW)
    assert site.notes() == ["in full", "promised"]
    assert (site.cluster.data.name, aside.name) == ("data", "data-before-20260102t000000000000")
    assert not built.exists()
    running = site.cluster.postmaster()
    assert running is not None
    assert port is not None
    assert (running.port, running.socket_folder) == (port.port, port.socket_folder)
    # It archives, on a timeline of its own whose beginning is in the archive as well.
    site.backups.prepare()
    assert (site.repository / f"archive/{STANZA}/15-1/00000002.history").exists()
    # The old timeline has not become unreachable by that.
    with restored_server(site, None, target_time=moment) as server:
        assert notes_in(server) == ["acknowledged", *rows_before]
    assert _notes_in_directory(site, aside) == ["acknowledged", *rows_before, "later"]
    assert forget_previous(site.cluster, NOW) == 0
    assert forget_previous(site.cluster, NOW + timedelta(seconds=1)) == 1
    assert not aside.exists()


def test_every_restore_gets_a_timeline_that_no_other_had(site: Site) -> None:
    """The archive knows nothing of the one before: it could take nothing when that began."""
    settings = site.cluster.data / "holdfast.conf"
    right = settings.read_bytes()
    site.cluster.account.write(settings, right + b"archive_command = ''\n")
    site.sql("SELECT pg_reload_conf()")
    for number in range(2):
        swap(site.cluster, _rebuild(site, site.labels[Kind.FULL]), NOW + timedelta(days=number))
    site.cluster.account.write(settings, right)
    site.sql("SELECT pg_reload_conf()")
    site.backups.prepare()
    archive = site.repository / f"archive/{STANZA}/15-1"
    assert [path.name for path in archive.glob("*.history")] == ["00000003.history"]
    site.backups.create(Kind.INCR, uuid4())
    site.write("after")
    # Only from the next second on it is sure that the backup had ended.
    time.sleep(1)
    with restored_server(site, None, target_time=site.now()) as server:
        assert notes_in(server) == ["after", "in full", "promised"]


def _archives(site: Site) -> bool:
    """Whether the archive takes what is written now: pgBackRest only looks for its name there."""
    segment = site.sql("SELECT pg_walfile_name(pg_switch_wal())")
    for _ in range(3000):
        archived = site.sql("SELECT last_archived_wal, failed_count FROM pg_stat_archiver")
        if archived == f"{segment}|0":
            return True
        time.sleep(0.02)
    return False


def test_a_restore_can_be_undone_more_than_once_and_the_archive_goes_on(site: Site) -> None:
    site.write("only before")
    rows = site.notes()
    swap(site.cluster, _rebuild(site, site.labels[Kind.FULL]), NOW)
    for days in (1, 2):
        built = site.cluster.new_directory()
        copy_kept(site.cluster, NOW, built)
        with private_server(site.cluster, built) as server:
            assert notes_in(server) == rows
            server.stop()
        swap(site.cluster, built, NOW + timedelta(days=days))
        assert site.notes() == rows
        site.write(f"after {days}")
        assert _archives(site)
    assert [moment for _, moment in sorted(kept(site.cluster))] == [
        NOW + timedelta(days=days) for days in range(3)
    ]
    with pytest.raises(NotFoundError):
        copy_kept(site.cluster, NOW + timedelta(days=9), site.cluster.new_directory())


def test_a_swap_brings_back_data_and_not_how_the_cluster_was_run(site: Site) -> None:
    """Access was tightened since the backup, and the server was started with options."""
    data = site.cluster.data
    (data / "pg_hba.conf").write_text("local all postgres trust\n")
    (data / "conf.d").mkdir(mode=0o700)
    (data / "conf.d/more.conf").write_text("work_mem = '5MB'\n")
    (data / "server.key").write_text("a key")
    site.cluster.account.write(data / "holdfast.conf", (data / "holdfast.conf").read_bytes())
    site.sql("ALTER SYSTEM SET maintenance_work_mem = '7MB'")
    site.cluster.stop()
    run = run_options(data)
    site.cluster.start(replace(run, arguments=("-c", "cluster_name=it's a name", "-p", "5499")))
    before = run_options(data)
    built = _rebuild(site, site.labels[Kind.FULL])
    (built / "leftover.conf").touch()
    swap(site.cluster, built, NOW)
    assert (data / "pg_hba.conf").read_text() == "local all postgres trust\n"
    assert (data / "conf.d/more.conf").read_text() == "work_mem = '5MB'\n"
    assert (data / "server.key").read_text() == "a key"
    assert not (data / "leftover.conf").exists()
    assert "recovery_target" not in (data / "postgresql.auto.conf").read_text()
    for setting, value in (
        ("cluster_name", "it's a name"), ("port", "5499"), ("maintenance_work_mem", "7MB"),
        ("archive_mode", "on"), ("archive_command", site.stanza.archive_command),
    ):  # fmt: skip
        assert site.sql(f"SHOW {setting}") == value
    assert run_options(data) == before
    assert {path.owner() for path in data.rglob("*")} == {data.owner()}


def test_a_cluster_whose_configuration_lies_elsewhere_is_restored_and_swapped(site: Site) -> None:
    """As Debian has it: the configuration names the data directory."""
    data, elsewhere = site.cluster.data, site.folder / "etc"
    site.cluster.stop()
    site.cluster.account.make_folder(elsewhere)
    for name in ("postgresql.conf", "pg_hba.conf", "pg_ident.conf", "holdfast.conf"):
        (data / name).rename(elsewhere / name)
    with (elsewhere / "postgresql.conf").open("a") as file:
        file.write(f"data_directory = '{data}'\nhba_file = '{elsewhere}/pg_hba.conf'\n")
        file.write(f"ident_file = '{elsewhere}/pg_ident.conf'\n")
        file.write(f"external_pid_file = '{site.folder}/pid'\n")
        file.write(f"recovery_end_command = 'touch {site.folder}/acted'\n")
    options = ("-c", f"config_file={elsewhere}/postgresql.conf")
    site.cluster.start(replace(run_options(data), arguments=options))
    pid = (site.folder / "pid").read_text()
    # The backup holds a configuration that is none any more.
    built = _rebuild(site, None)
    assert (site.folder / "pid").read_text() == pid
    assert not (site.folder / "acted").exists()
    assert site.notes() == ["in diff", "in full", "in incr"]
    swap(site.cluster, built, NOW)
    assert site.notes() == ["in diff", "in full", "in incr", "promised"]
    assert site.sql("SHOW config_file") == f"{elsewhere}/postgresql.conf"


def test_a_restored_cluster_that_does_not_start_is_taken_back(site: Site) -> None:
    rows = site.notes()
    built = _rebuild(site, site.labels[Kind.FULL])
    for segment in (built / "pg_wal").glob("0000*0*[0-9A-F]"):
        segment.unlink()
    with pytest.raises(UnavailableError, match="the old one was put back"):
        swap(site.cluster, built, NOW)
    assert site.notes() == rows
    assert sweep(site.cluster) == 1
    site.backups.prepare()


def test_what_has_not_recovered_and_shut_down_is_never_swapped_in(site: Site) -> None:
    rows, server = site.notes(), site.cluster.postmaster()
    built = site.cluster.new_directory()
    site.backups.restore(site.labels[Kind.FULL], built)
    with pytest.raises(BackupDamagedError):
        swap(site.cluster, built, NOW)
    with private_server(site.cluster, built), pytest.raises(ConflictError):
        swap(site.cluster, built, NOW)
    # The block ended without stopping it in good order.
    with pytest.raises(BackupDamagedError):
        swap(site.cluster, built, NOW)
    (built / "global/pg_control").write_bytes(bytes(8192))
    with pytest.raises(BackupDamagedError):
        swap(site.cluster, built, NOW)
    assert (site.notes(), site.cluster.postmaster()) == (rows, server)
    assert sweep(site.cluster) == 1


def test_a_cluster_that_cannot_be_exchanged_is_refused_at_the_start(site: Site) -> None:
    tablespace = site.folder / "tablespace"
    site.cluster.account.make_folder(tablespace)
    require_swappable(site.cluster)
    site.sql(f"CREATE TABLESPACE elsewhere LOCATION '{tablespace}'")
    with pytest.raises(ConfigurationError, match="tablespaces"):
        site.backups.prepare()
    site.sql("DROP TABLESPACE elsewhere")
    require_swappable(site.cluster)


def test_the_commands_of_a_service_manager_start_and_stop_it(site: Site) -> None:
    run, user = run_options(site.cluster.data), site.cluster.account.uid
    wrapped = Path(run.program).with_name("pg_ctl")
    as_owner = ["setpriv", f"--reuid={user}", "--clear-groups"] if os.geteuid() == 0 else []
    command = [*as_owner, str(wrapped), "-D", str(site.cluster.data), "-s"]
    cluster = Cluster(
        site.cluster.data,
        start_command=[*command, "-W", "-l", str(site.folder / "log"), "start"],
        stop_command=[*command, "stop"],
    )
    built = _rebuild(site, site.labels[Kind.FULL])
    swap(cluster, built, NOW)
    assert site.notes() == ["in full", "promised"]
    broken = Cluster(site.cluster.data, stop_command=["false"])
    with pytest.raises(UnavailableError, match="false failed"):
        broken.stop()
    assert site.notes() == ["in full", "promised"]


# Runs restores and backups in processes that can be killed, without the second that imports take.
STARTER: Final = """
import os, sys
from datetime import UTC, datetime
from pathlib import Path
from uuid import uuid4
from sqlalchemy import create_engine, text
from sqlalchemy.pool import NullPool
from backend.backup.pgbackrest.cluster import Cluster
from backend.backup.pgbackrest.repository import Pgbackrest
from backend.backup.pgbackrest.says import Kind
from backend.backup.pgbackrest.stanza import Stanza
from backend.backup.pgbackrest.postmaster import postmaster_of, run_options
from backend.backup.pgbackrest.private_server import private_server
from backend.backup.pgbackrest.swap import swap, sweep

def act(what, folder, passphrase):
    cluster = Cluster(Path(folder, "data"))
    stanza = Stanza(cluster, "holdfast", passphrase, repository=Path(folder, "repository"))
    backups = Pgbackrest(cluster, stanza)
    if what == "create":
        backups.create(Kind.FULL, uuid4())
        return
    built = cluster.new_directory()
    backups.restore(what, built)
    with private_server(cluster, built) as server:
        engine = create_engine(server.url("postgres", "postgres"), poolclass=NullPool)
        with engine.begin() as connection:
            connection.execute(text("INSERT INTO notes VALUES ('promised')"))
        server.stop()
    swap(cluster, built, datetime.now(UTC))

print(0, flush=True)
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        act(*line.split())
        os._exit(0)
    print(child, flush=True)
    print(os.waitpid(child, 0)[1], flush=True)
"""


class Acts:
    """Restores and backups of a site, in processes of their own."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process
        assert self._answer() == 0

    def kill(self, site: Site, what: str, when: Callable[[], bool]) -> bool:
        """
        Kill an act once *when* holds; return whether it was still running.

        A busy machine may look again only when it has ended.
        """
        print(what, site.folder, PASSPHRASE, file=self._process.stdin, flush=True)
        child = self._answer()
        while is_running(child) and not when():
            time.sleep(0.0005)
        with suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        return self._answer() == signal.SIGKILL

    def _answer(self) -> int:
        assert self._process.stdout is not None
        return int(self._process.stdout.readline())


@pytest.fixture(scope="module")
def acts() -> Iterator[Acts]:
    with subprocess.Popen(
        [sys.executable, "-c", STARTER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)}, cwd="/",
    ) as process:  # fmt: skip
        yield Acts(process)
        assert process.stdin is not None
        process.stdin.close()


def test_a_restore_killed_at_any_point_leaves_the_old_cluster_or_the_new_one(
    site: Site, acts: Acts
) -> None:
    cluster, seen = site.cluster, set[bool]()
    journal = cluster.private / "swap.json"

    def restored(name: str) -> bool:
        return any((path / name).exists() for path in cluster.restored_directories())

    def is_new() -> bool:
        return cluster.data.stat().st_ino != inode

    def is_killed(when: Callable[[], bool]) -> bool:
        site.write("live")
        before = site.notes()
        killed = acts.kill(site, site.labels[Kind.FULL], when)
        was_new, left = is_new(), journal.exists() or cluster.restored_directories() != []
        assert (sweep(cluster) >= 1) == left
        assert is_new() == was_new
        assert site.notes() == (["in full", "promised"] if was_new else before)
        seen.add(was_new)
        assert cluster.restored_directories() == []
        assert not journal.exists()
        assert list(cluster.private.glob("run-*")) == []
        assert are_gone(site)
        assert sweep(cluster) == 0
        return killed and left

    for when in (
        lambda: restored("backup.manifest"),
        lambda: restored("backup_label"),
        lambda: restored("postmaster.pid"),
        lambda: restored("pg_wal/00000002.history") or restored("pg_wal/00000003.history"),
        journal.exists,
        lambda: journal.exists() and cluster.postmaster() is None,
        is_new,
        lambda: is_new() and cluster.postmaster() is not None,
    ):
        for _ in range(TRIES):
            inode = cluster.data.stat().st_ino
            if is_killed(when):
                break
        else:
            pytest.fail("it was never killed half way")
    assert seen == {True, False}
    site.backups.prepare()


def test_a_killed_backup_is_never_listed_and_the_next_one_is_whole(site: Site, acts: Acts) -> None:
    def copied() -> int:
        return sum(1 for _ in (site.repository / "backup" / STANZA).glob("*F/pg_data/base/*/*"))

    before, killed = site.backups.sets(), 0
    for when in (
        lambda _already: bool(processes_of(site)),
        lambda already: copied() > already + 100,
    ):
        for _ in range(TRIES):
            already, known = copied(), site.backups.sets()
            is_killed = acts.kill(site, "create", partial(when, already))
            assert are_gone(site)
            # One may have been done, and its process not yet have ended.
            assert len(site.backups.sets()) <= len(known) + 1
            killed += is_killed
            if is_killed:
                break
    assert killed == 2
    listed = site.backups.sets()
    assert listed[: len(before)] == before
    for done in listed[len(before) :]:
        site.backups.verify(done.label)
    record = uuid4()
    made = site.backups.create(Kind.FULL, record)
    assert made.record == record
    site.backups.verify(made.label)


def test_a_server_that_a_killed_process_left_is_ended_and_cleared_away(site: Site) -> None:
    """As where the system cannot end it with its parent."""
    built = _rebuild(site, site.labels[Kind.FULL])
    run = run_options(site.cluster.data)
    command = [run.program, "-D", str(built), "-c", "listen_addresses=", "-c", "archive_command="]
    left = subprocess.Popen(
        [*command, "-c", f"unix_socket_directories={built}"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd="/", **SERVER_USER,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while postmaster_of(built) is None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert sweep(site.cluster) == 1
    # Told to, and not because its files were gone.
    assert left.wait(60) == 0
    assert not built.exists()
    assert site.notes() == ["in diff", "in full", "in incr"]


def test_a_journal_that_no_swap_wrote_is_refused_and_kept(site: Site) -> None:
    journal, aside = site.cluster.private / "swap.json", "data-before-20260102t000000000000"
    for words in (
        "{", "[]", "{}",
        f'{{"built": "../x", "built_inode": 1, "kept": "{aside}", "was_running": 1, "run": {{}}}}',
    ):  # fmt: skip
        journal.write_text(words)
        with pytest.raises(ConfigurationError, match="not what a swap writes"):
            sweep(site.cluster)
        assert journal.read_text() == words


def test_what_was_being_written_when_its_process_was_killed_is_cleared_away(site: Site) -> None:
    private = site.cluster.private
    for folder in ("trial-01234567", "probe-01234567", "run-0123456789abcdef"):
        site.cluster.account.make_folder(private / folder)
        site.cluster.account.write(private / folder / "holdfast.conf", b"half")
    (private / "pgbackrest/.holdfast.conf-01234567").touch()
    before = {path for path in private.rglob("*") if "01234567" not in str(path)}
    sweep(site.cluster)
    assert set(private.rglob("*")) == before
    site.backups.sets()


def test_a_deep_folder_is_no_hindrance_to_the_socket() -> None:
    deep = new_folder()
    copy = copy_to(deep / ("d" * 90))
    with restored_server(copy, None) as server:
        assert notes_in(server) == ["in diff", "in full", "in incr"]
    shutil.rmtree(deep)
