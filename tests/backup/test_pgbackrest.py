"""pgBackRest driven on a real cluster: what it makes, keeps, finds damaged and gives back."""

import os
import re
import shutil
import stat
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final
from uuid import uuid4

import pytest

from backend.backup.pgbackrest.cluster import Cluster
from backend.backup.pgbackrest.private_server import private_server
from backend.backup.pgbackrest.repository import Pgbackrest
from backend.backup.pgbackrest.says import BackupSet, Kind
from backend.backup.pgbackrest.stanza import Stanza
from backend.errors import (
    BackupDamagedError,
    ConfigurationError,
    ConflictError,
    NotFoundError,
    RefusedError,
    UnavailableError,
)
from tests.backup.clusters import (
    OTHER_PASSPHRASE,
    PASSPHRASE,
    SERVER_USER,
    STANZA,
    Site,
    are_gone,
    configure,
    initdb,
    new_folder,
    notes_in,
    restored_server,
    running_copy,
    shared_site,
    site,
    site_in,
)

__all__ = ["shared_site", "site"]

_FOREVER: Final = datetime(9999, 1, 1, tzinfo=UTC)


@contextmanager
def flipped(path: Path) -> Iterator[None]:
    """Change one bit in the middle of a file, for as long as the block lasts."""
    before = path.read_bytes()
    changed = bytearray(before)
    changed[len(changed) // 2] ^= 1
    path.write_bytes(changed)
    yield
    path.write_bytes(before)


@contextmanager
def without(path: Path) -> Iterator[None]:
    """Take a file away for as long as the block lasts."""
    aside = path.with_name(f"{path.name}.aside")
    path.rename(aside)
    yield
    aside.rename(path)


def _wal(site: Site, segment: str) -> Path:
    (found,) = (site.repository / "archive" / STANZA).rglob(f"{segment}-*")
    return found


def _file_of(site: Site, label: str) -> Path:
    """A file of the table `notes` in the repository."""
    path = site.sql("SELECT pg_relation_filepath('notes')")
    return site.repository / "backup" / STANZA / label / "pg_data" / f"{path}.zst"


def test_a_backup_restores_what_was_committed_when_it_was_made(shared_site: Site) -> None:
    committed: list[str] = []
    for kind in Kind:
        committed.append(f"in {kind}")
        with restored_server(shared_site, shared_site.labels[kind]) as server:
            assert notes_in(server) == sorted(committed)


def test_the_list_says_of_each_backup_what_it_is_and_builds_on(shared_site: Site) -> None:
    full, diff, incr = shared_site.backups.sets()
    assert [(s.label, s.kind, s.record) for s in (full, diff, incr)] == [
        (shared_site.labels[kind], kind, shared_site.records[kind]) for kind in Kind
    ]
    assert (full.prior, full.references) == (None, ())
    assert (diff.prior, diff.references) == (full.label, (full.label,))
    assert (incr.prior, incr.references) == (diff.label, (full.label, diff.label))
    assert full.started_at.tzinfo is UTC
    assert full.started_at <= full.stopped_at <= diff.started_at
    assert full.size_bytes > 500_000 > diff.size_bytes > 0
    assert full.database_bytes > full.size_bytes
    assert full.first_wal <= full.last_wal < diff.first_wal
    assert full.system_id == shared_site.cluster.system_id
    assert not full.damaged_pages


def test_a_moment_between_two_commits_has_the_first_and_not_the_second(site: Site) -> None:
    site.write("first")
    moment = site.now()
    time.sleep(0.01)
    site.write("second")
    with restored_server(site, None, target_time=moment) as server:
        assert notes_in(server) == ["first", "in diff", "in full", "in incr"]
    # Nothing was committed since: an idle cluster can be restored to now, too.
    moment = site.now()
    with restored_server(site, site.labels[Kind.FULL], target_time=moment) as server:
        assert "second" in notes_in(server)


def test_a_moment_that_no_backup_leads_to_is_refused(shared_site: Site) -> None:
    full = shared_site.backups.get(shared_site.labels[Kind.FULL])
    just_before = full.stopped_at + timedelta(milliseconds=999)
    for label, moment in (
        (None, datetime.now(UTC) + timedelta(seconds=30)),
        (None, just_before),
        (full.label, just_before),
        (None, datetime.now()),  # noqa: DTZ005 - no time zone is what is refused
    ):
        into = shared_site.cluster.new_directory()
        with pytest.raises(RefusedError):
            shared_site.backups.restore(label, into, target_time=moment)
        assert not into.exists()


def test_a_moment_that_the_archive_does_not_reach_is_refused(shared_site: Site) -> None:
    built = shared_site.cluster.new_directory()
    moment = datetime.now(UTC) + timedelta(hours=1)
    shared_site.backups.restore(None, built, target_time=moment, now=_FOREVER)
    with (
        pytest.raises(RefusedError, match="no WAL up to the target time"),
        private_server(shared_site.cluster, built),
    ):
        pytest.fail("it recovered to the future")
    shared_site.cluster.clear_directory(built)


def test_an_unknown_backup_is_not_found(shared_site: Site) -> None:
    into = shared_site.cluster.new_directory()
    acts: list[Callable[[str], object]] = [
        shared_site.backups.get,
        shared_site.backups.verify,
        shared_site.backups.digest,
        shared_site.backups.expire,
        lambda label: shared_site.backups.restore(label, into),
    ]
    for act in acts:
        with pytest.raises(NotFoundError):
            act("20200101-000000F")
    assert not into.exists()


def test_nothing_in_the_repository_can_be_read_without_the_passphrase(shared_site: Site) -> None:
    def found(words: bytes) -> bool:
        files = [path for path in shared_site.repository.rglob("*") if path.is_file()]
        assert len(files) > 100
        return any(words in path.read_bytes() for path in files)

    assert not found(b"in full")
    assert not found(PASSPHRASE.encode())
    assert found(b"Salted__")
    assert stat.S_IMODE(shared_site.repository.stat().st_mode) == 0o700


def test_a_wrong_passphrase_is_refused_and_never_reaches_the_server(shared_site: Site) -> None:
    own = shared_site.cluster.private / "pgbackrest/holdfast.conf"
    before = own.read_bytes()
    wrong = site_in(shared_site.folder, OTHER_PASSPHRASE).backups
    label, into = shared_site.labels[Kind.FULL], shared_site.cluster.new_directory()
    acts: list[Callable[[], object]] = [
        wrong.prepare,
        wrong.sets,
        lambda: wrong.create(Kind.FULL, uuid4()),
        lambda: wrong.digest(label),
        lambda: wrong.restore(label, into),
    ]
    for act in acts:
        with pytest.raises(ConfigurationError, match="another passphrase, or damage") as refused:
            act()
        assert OTHER_PASSPHRASE not in str(refused.value)
    assert own.read_bytes() == before
    shared_site.backups.prepare()


@dataclass
class Observed:
    """A full backup as it was seen while it was made on a site of its own."""

    site: Site
    made: BackupSet
    progress: list[float]
    refused: list[str]
    processes: list[bytes]


@pytest.fixture(scope="module")
def observed() -> Iterator[Observed]:
    progress, refused, processes = list[float](), list[str](), list[bytes]()
    stop = threading.Event()

    def watch() -> None:
        while not stop.is_set():
            for process in Path("/proc").glob("[0-9]*"):
                with suppress(OSError):
                    command = (process / "cmdline").read_bytes()
                    if b"pgbackrest" in command or b"psql" in command:
                        processes.append(command + (process / "environ").read_bytes())

    with running_copy() as own:

        def at(percent: float) -> None:
            if not progress:
                with pytest.raises(ConflictError) as err:
                    own.backups.create(Kind.FULL, uuid4())
                refused.append(err.value.detail)
            progress.append(percent)

        own.cluster.account.make_folder(own.folder / "tablespace")
        own.sql(f"CREATE TABLESPACE elsewhere LOCATION '{own.folder}/tablespace'")
        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            made = own.backups.create(Kind.FULL, uuid4(), progress=at)
        finally:
            stop.set()
            watcher.join()
        yield Observed(own, made, progress, refused, processes)


def test_a_backup_tells_how_far_it_is(observed: Observed) -> None:
    assert observed.progress == sorted(observed.progress)
    assert observed.progress[-1] == 100


def test_a_backup_that_would_be_restored_outside_its_directory_is_refused(
    observed: Observed,
) -> None:
    into = observed.site.cluster.new_directory()
    with pytest.raises(RefusedError, match="tablespaces"):
        observed.site.backups.restore(observed.made.label, into)
    assert not into.exists()


def test_two_backups_at_once_are_refused(observed: Observed) -> None:
    assert observed.refused == ["pgBackRest is busy with this stanza"]
    assert len(observed.site.backups.sets()) == 4


def test_the_passphrase_is_in_one_private_file_and_in_no_process(observed: Observed) -> None:
    assert any(b"backup\0" in found for found in observed.processes)
    assert not [found for found in observed.processes if PASSPHRASE.encode() in found]
    # Nor do they get what else is in our environment.
    assert not [found for found in observed.processes if b"PYTEST_CURRENT_TEST" in found]
    holding = [
        path
        for path in observed.site.folder.rglob("*")
        if path.is_file() and PASSPHRASE.encode() in path.read_bytes()
    ]
    assert holding == [observed.site.cluster.private / "pgbackrest/holdfast.conf"]
    assert stat.S_IMODE(holding[0].stat().st_mode) == 0o600
    assert holding[0].stat().st_uid == observed.site.cluster.data.stat().st_uid


def test_what_is_removed_takes_the_wal_with_it_that_nothing_else_needs(observed: Observed) -> None:
    site, newest = observed.site, observed.made
    for kind in (Kind.INCR, Kind.DIFF, Kind.FULL):
        site.backups.expire(site.labels[kind])
    assert site.backups.sets() == [newest]
    wal = [path.name[:24] for path in (site.repository / "archive").rglob("*.zst")]
    assert min(wal) == newest.first_wal
    site.backups.verify(newest.label)


def test_the_last_backup_can_be_removed_too_and_the_server_goes_on_archiving(
    observed: Observed,
) -> None:
    site = observed.site
    for found in reversed(site.backups.sets()):
        site.backups.expire(found.label)
    assert site.backups.sets() == []
    assert [path for path in site.repository.rglob("*.zst") if path.is_file()] == []
    site.sql("DROP TABLESPACE elsewhere")
    site.backups.prepare()
    assert list((site.repository / "archive").rglob("*.zst"))


def test_damage_is_found_although_pgbackrest_ends_with_success(shared_site: Site) -> None:
    label = shared_site.labels[Kind.INCR]
    found = shared_site.backups.get(label)
    whole = shared_site.backups.verify(label)
    assert whole.files > 300
    assert whole.damaged_wal == ()
    own = _file_of(shared_site, label)
    of_full = next(
        path
        for path in own.parents[2].parent.parent.joinpath(found.references[0]).rglob("*.zst")
        if path.stat().st_size > 100_000
    )
    for damage in (
        flipped(own), without(own), flipped(of_full), without(of_full),
        flipped(_wal(shared_site, found.first_wal)), without(_wal(shared_site, found.last_wal)),
    ):  # fmt: skip
        with damage:
            command = shared_site.stanza.archive_command.partition(" archive-push")[0].split()
            says = subprocess.run(
                [*command, "verify"], cwd="/", capture_output=True, check=False, **SERVER_USER
            )
            assert says.returncode == 0
            with pytest.raises(BackupDamagedError):
                shared_site.backups.verify(label)
    assert shared_site.backups.verify(label) == whole


def test_wal_that_a_backup_does_not_need_is_told_and_does_not_condemn_it(site: Site) -> None:
    full, incr = site.labels[Kind.FULL], site.backups.get(site.labels[Kind.INCR])
    with flipped(_wal(site, incr.first_wal)):
        assert site.backups.verify(full).damaged_wal == (incr.first_wal,)
        with restored_server(site, full) as server:
            assert notes_in(server) == ["in full"]


def test_a_changed_manifest_has_another_digest(shared_site: Site) -> None:
    label = shared_site.labels[Kind.FULL]
    digest = shared_site.backups.digest(label)
    assert re.fullmatch("[0-9a-f]{64}", digest)
    assert digest == shared_site.backups.digest(label)
    manifest = shared_site.repository / "backup" / STANZA / label / "backup.manifest"
    with flipped(manifest):
        # It takes the copy of the manifest instead, and says nothing of it.
        assert shared_site.backups.verify(label)
        assert shared_site.backups.digest(label) != digest


def test_a_damaged_backup_does_not_restore_and_leaves_nothing(shared_site: Site) -> None:
    found = shared_site.backups.get(shared_site.labels[Kind.FULL])
    path = _file_of(shared_site, found.label)
    for damage in (flipped(path), without(path)):
        into = shared_site.cluster.new_directory()
        with damage, pytest.raises(BackupDamagedError):
            shared_site.backups.restore(found.label, into)
        assert not into.exists()
    # WAL is read only when the server recovers.
    with (
        flipped(_wal(shared_site, found.first_wal)),
        pytest.raises(BackupDamagedError),
        restored_server(shared_site, found.label),
    ):
        pytest.fail("it recovered from damaged WAL")
    assert shared_site.cluster.restored_directories() == []


def test_only_we_reach_a_private_server_and_it_gives_the_archive_nothing(site: Site) -> None:
    archived = set((site.repository / "archive").rglob("*"))
    with restored_server(site, site.labels[Kind.FULL]) as server:
        (sockets,) = site.cluster.private.glob("run-*")
        assert stat.S_IMODE(sockets.stat().st_mode) == 0o700
        assert server.url("postgres", "postgres").query["host"] == str(sockets)
        pid = int((server.data / "postmaster.pid").read_text().split()[0])
        listening = subprocess.run(
            ["ss", "-Hltnp"], capture_output=True, text=True, check=True
        ).stdout  # fmt: skip
        assert f"pid={pid}," not in listening
        assert site.notes() == ["in diff", "in full", "in incr"]
        server.stop()
    assert list(site.cluster.private.glob("run-*")) == []
    assert set((site.repository / "archive").rglob("*")) == archived


def test_a_base_of_others_and_the_only_full_backup_cannot_be_removed(shared_site: Site) -> None:
    for kind in (Kind.FULL, Kind.DIFF):
        with pytest.raises(ConflictError, match="build on"):
            shared_site.backups.expire(shared_site.labels[kind])
    assert len(shared_site.backups.sets()) == 3


def test_an_interrupted_backup_ends_its_program_and_is_not_listed(site: Site) -> None:
    def interrupt(_percent: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        site.backups.create(Kind.FULL, uuid4(), progress=interrupt)
    assert are_gone(site)
    assert len(site.backups.sets()) == 3


def test_without_pgbackrest_it_says_so(
    shared_site: Site, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UnavailableError, match="pgbackrest is not on this machine"):
        site_in(shared_site.folder).backups.sets()


def test_a_pgbackrest_without_annotations_is_too_old(
    shared_site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = shared_site.folder / "bin/pgbackrest"
    old.parent.mkdir()
    old.write_text("#!/bin/sh\necho pgBackRest 2.40\n")
    old.chmod(0o755)
    monkeypatch.setenv("PATH", f"{old.parent}:{os.environ['PATH']}")
    with pytest.raises(ConfigurationError, match=r"2\.41 or newer"):
        site_in(shared_site.folder).backups.prepare()


def test_a_cluster_that_does_not_archive_is_told_what_to_set(site: Site) -> None:
    site.cluster.stop()
    configure(site, "archive_mode = off\n")
    site.start()
    with pytest.raises(ConfigurationError) as refused:
        site.backups.prepare()
    assert "archive_mode must be enabled" in refused.value.detail
    assert site.stanza.archive_command in refused.value.detail


def test_a_stopped_server_is_told_from_a_broken_one(site: Site) -> None:
    site.cluster.stop()
    for act in (site.backups.prepare, lambda: site.backups.create(Kind.FULL, uuid4())):
        with pytest.raises(UnavailableError, match="does not run"):
            act()
    # What is stored can still be listed, proven and restored.
    site.backups.verify(site.labels[Kind.FULL])
    with restored_server(site, None) as server:
        assert notes_in(server) == ["in diff", "in full", "in incr"]
    assert site.cluster.postmaster() is None


def test_a_stanza_of_another_cluster_is_refused_and_its_backups_restore(site: Site) -> None:
    """As on a new machine: an empty cluster, and the backups of one that is lost."""
    site.cluster.stop()
    shutil.rmtree(site.cluster.data)
    initdb(site.cluster.data)
    configure(site)
    new = site_in(site.folder)
    new.start()
    with pytest.raises(ConfigurationError, match="another cluster"):
        new.backups.prepare()
    with restored_server(new, None) as server:
        assert notes_in(server) == ["in diff", "in full", "in incr"]


def test_an_operators_configuration_is_used_as_it_is_and_encrypted(site: Site) -> None:
    config = site.folder / "operator.conf"
    options = [
        "[global]", f"repo1-path={site.folder}/theirs", "log-level-file=off", "start-fast=y",
        f"lock-path={site.folder}/lock", f"spool-path={site.folder}/spool", "compress-type=zst",
        "[theirs]", f"pg1-path={site.cluster.data}", "pg1-user=postgres",
        f"pg1-socket-path={site.folder}",
    ]  # fmt: skip
    site.cluster.account.write(config, "\n".join(options).encode())
    stanza = Stanza(site.cluster, "theirs", PASSPHRASE, config=config)
    settings = site.cluster.data / "holdfast.conf"
    command = f"archive_command = '{stanza.archive_command}'\n"
    site.cluster.account.write(settings, settings.read_bytes() + command.encode())
    site.sql("SELECT pg_reload_conf()")
    backups = Pgbackrest(site.cluster, stanza)
    backups.prepare()
    made = backups.create(Kind.FULL, uuid4())
    backups.verify(made.label)
    files = [path for path in (site.folder / "theirs").rglob("*") if path.is_file()]
    assert len(files) > 100
    assert not [path for path in files if b"in full" in path.read_bytes()]
    # Its owner may choose a cipher, but not to have none.
    options.insert(1, "repo1-cipher-type=none")
    site.cluster.account.write(config, "\n".join(options).encode())
    with pytest.raises(ConfigurationError, match="not encrypted"):
        backups.sets()


def test_a_stanza_takes_one_place_and_a_long_passphrase(tmp_path: Path, shared_site: Site) -> None:
    for name, passphrase, repository, config in (
        (STANZA, PASSPHRASE, None, None),
        (STANZA, PASSPHRASE, tmp_path, tmp_path),
        (STANZA, "short", tmp_path, None),
        (STANZA, f"{PASSPHRASE}\nrepo1-path=/", tmp_path, None),
        ("a\n[b]", PASSPHRASE, tmp_path, None),
    ):
        with pytest.raises(ConfigurationError) as refused:
            Stanza(shared_site.cluster, name, passphrase, repository=repository, config=config)
        assert passphrase not in str(refused.value)


def test_a_folder_that_is_no_cluster_is_refused(tmp_path: Path) -> None:
    folder = new_folder()
    for path in (folder, folder / "nothing", tmp_path):
        with pytest.raises(ConfigurationError):
            Cluster(path)
    folder.rmdir()
