"""Parts that go away while a real server runs: 503, not ready, alive, and back by itself."""

import secrets
import shutil
import sqlite3
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import psycopg
import pytest

from tests.api.crowds import CONSENT, Answer, Caller, at_once, is_ready, until, writing
from tests.backup.clusters import as_server, new_folder, program
from tests.backup.s3_server import cuttable_line
from tests.backup.small_disks import small_disk
from tests.backup.stores import away
from tests.conftest import JWT_SECRET, KEY, postgres_programs
from tests.crypto.conftest import RAW, TOKEN, Keeper, bao, free_port, vault
from tests.test_main import ROOT, environment, serving

__all__ = ["bao", "vault"]  # fixtures

SECRETS: Final = {"ENCRYPTION_KEY": KEY, "JWT_SECRET_KEY": JWT_SECRET}
EXPORT: Final = "/security/data/export"
DELETE: Final = "/security/data/delete"


def is_alive(caller: Caller) -> bool:
    return caller.get("/healthz").status == 200


def not_ready(caller: Caller) -> dict[str, str]:
    """Why it is not ready."""
    answer = caller.get("/readyz")
    assert (answer.status, answer.json["status"]) == (503, "not_ready")
    checks: dict[str, str] = answer.json["checks"]
    return checks


# The database


@dataclass(frozen=True)
class Cluster:
    """A PostgreSQL of the test's own, which loses nothing that it has acknowledged."""

    folder: Path
    port: int

    @property
    def url(self) -> str:
        return f"postgresql://postgres@127.0.0.1:{self.port}/postgres"

    def start(self) -> None:
        self._ctl("start", "-o", f"-p {self.port} -k {self.folder} -h 127.0.0.1", "-l", "/dev/null")

    def stop(self) -> None:
        """As a crash: connections break in the middle of what they do."""
        self._ctl("stop", "-m", "immediate")

    def takes_writes(self, setting: str) -> None:
        """Have the server take writes or not, from the next transaction of everybody on."""
        only_reads = {"on": "off", "off": "on"}[setting]
        with psycopg.connect(self.url, autocommit=True) as connection:
            connection.execute("SET default_transaction_read_only = off")
            connection.execute(f"ALTER SYSTEM SET default_transaction_read_only = {only_reads}")
            connection.execute("SELECT pg_reload_conf()")

    def _ctl(self, *arguments: str) -> None:
        as_server(program("pg_ctl"), "-w", "-D", self.folder / "data", *arguments)


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    if postgres_programs() is None:
        pytest.skip("no PostgreSQL on this machine: see requirements-parts.txt")
    cluster = Cluster(new_folder(), free_port())
    data = cluster.folder / "data"
    as_server(program("initdb"), "-D", data, "-U", "postgres", "-A", "trust", "--no-sync")
    cluster.start()
    try:
        yield cluster
    finally:
        cluster.stop()
        shutil.rmtree(cluster.folder)


def test_a_database_that_stops_and_comes_back(tmp_path: Path, cluster: Cluster) -> None:
    settings = SECRETS | {"DATABASE_URL": cluster.url}
    with serving(tmp_path / "data", log=tmp_path / "log", **settings) as server:
        caller = Caller.signed_in(server)
        with writing(caller, 4) as written:
            written.wait(20)
            cluster.stop()
            until(lambda: len(written.refused) > 8)
            assert not_ready(caller)["database"] == "does not answer"
            assert is_alive(caller)
            for answer in (caller.get(CONSENT), caller.sign_in(server.password)):
                assert answer.is_put_off, answer.text
            cluster.start()
            until(lambda: is_ready(caller))
            written.wait(len(written.acknowledged) + 20)
        assert written.broken == []
        assert [each.text for each in written.refused if not each.is_put_off] == []
        there = Counter(caller.recorded())
        assert Counter(written.acknowledged) - there == Counter()
        assert server.process.poll() is None


def test_a_database_that_takes_no_writes_for_a_while(tmp_path: Path, cluster: Cluster) -> None:
    """As after a failover, or where a provider answers a full disk so."""
    settings = SECRETS | {"DATABASE_URL": cluster.url}
    with serving(tmp_path / "data", log=tmp_path / "log", **settings) as server:
        caller = Caller.signed_in(server)
        assert caller.consent("before").status == 201
        cluster.takes_writes("off")
        until(lambda: not is_ready(caller))
        assert not_ready(caller)["database"] == "takes no writes"
        for answer in (caller.consent("meanwhile"), caller.sign_in(server.password)):
            assert answer.is_put_off, answer.text
        assert caller.get(CONSENT).status == 200
        cluster.takes_writes("on")
        until(lambda: is_ready(caller))
        assert caller.consent("after").status == 201
        assert caller.recorded() == ["before", "after"]


def test_a_file_that_is_gone_is_not_written_on_and_not_begun_anew(tmp_path: Path) -> None:
    data, aside = tmp_path / "data", tmp_path / "aside"
    with serving(data, log=tmp_path / "log", **SECRETS) as server:
        caller = Caller.signed_in(server)
        assert caller.consent("before").status == 201
        aside.mkdir()
        for path in data.glob("holdfast.db*"):
            path.rename(aside / path.name)
        for answer in (caller.consent("lost"), caller.get(CONSENT)):
            assert answer.is_put_off, answer.text
        assert not_ready(caller)["database"] == "does not answer"
        assert is_alive(caller)
        assert not list(data.glob("holdfast.db*"))
        for path in aside.iterdir():
            path.rename(data / path.name)
        until(lambda: is_ready(caller))
        assert caller.consent("after").status == 201
        assert caller.recorded() == ["before", "after"]
        data.rename(aside / "data")
        assert not_ready(caller)["database"] == "does not answer"
        assert caller.consent("lost").is_put_off
        (aside / "data").rename(data)
        until(lambda: is_ready(caller))


def test_a_locked_database_holds_no_probe_and_no_reader_up(tmp_path: Path) -> None:
    with serving(tmp_path / "data", log=tmp_path / "log", **SECRETS) as server:
        caller = Caller.signed_in(server)
        waiting: list[Answer] = []
        with closing(sqlite3.connect(tmp_path / "data" / "holdfast.db")) as other:
            other.execute("BEGIN IMMEDIATE")
            writers = [partial(caller.consent, f"{number}") for number in range(30)]
            crowd = threading.Thread(target=lambda: waiting.extend(at_once(*writers)))
            crowd.start()
            assert is_alive(caller)
            assert caller.get(CONSENT).status == 200
            assert waiting == []
            crowd.join()
            other.rollback()
        assert [each.text for each in waiting if not each.is_put_off] == []
        assert caller.consent("later").status == 201
        assert caller.recorded() == ["later"]


def test_a_full_disk(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    with (
        small_disk(tmp_path / "data", 32) as disk,
        serving(disk.folder, log=tmp_path / "log", **SECRETS) as server,
    ):
        caller = Caller.signed_in(server)
        assert caller.consent("before").status == 201
        disk.leave(0)
        # What is open has room left in its file, so the first ones may still be taken.
        taken = until_put_off(caller)
        assert caller.sign_in(server.password).is_put_off
        assert not_ready(caller)["disk"] == "full"
        assert is_alive(caller)
        assert caller.get(CONSENT).status == 200
        disk.empty()
        until(lambda: is_ready(caller))
        assert caller.consent("after").status == 201
        assert caller.recorded() == ["before", *taken, "after"]
        assert server.process.poll() is None


def until_put_off(caller: Caller) -> list[str]:
    """Write until there is no room; return what was acknowledged."""
    taken: list[str] = []
    while (answer := caller.consent(f"full-{len(taken)}")).status == 201:
        taken.append(f"full-{len(taken)}")
        assert len(taken) < 20_000, "it never gets full"
    assert answer.is_put_off, answer.text
    return taken


# The store


def test_a_store_that_goes_away_puts_off_what_needs_it_and_nothing_else(tmp_path: Path) -> None:
    store = tmp_path / "store"
    settings = SECRETS | {"BACKUP_URL": str(store), "BACKUP_VERIFY": "off"}
    with serving(tmp_path / "data", log=tmp_path / "log", **settings) as server:
        caller = Caller.signed_in(server)
        assert caller.post("/security/backup/create").status == 201
        guest = new_guest(tmp_path / "data", settings)
        erasure = {"user_id": guest, "mode": "delete", "reason": "art. 17"}
        with away(store):
            for path, body in (("/security/backup/create", {}), (DELETE, erasure)):
                assert caller.post(path, body).is_put_off
            assert is_alive(caller)
            # Whoever asks for their data, or takes a consent back, needs no store.
            assert caller.post(EXPORT, {"user_id": guest}).status == 200
            assert caller.consent("meanwhile").status == 201
        assert caller.post("/security/backup/create").status == 201
        assert caller.post(DELETE, erasure).status == 200
        assert caller.post(EXPORT, {"user_id": guest}).json["code"] == "subject_not_found"


def new_guest(folder: Path, settings: dict[str, str]) -> int:
    """Create an account beside the running server; return its number."""
    command = [sys.executable, str(ROOT / "db_cli.py"), "create-user", "guest@example.com"]
    done = subprocess.run(
        [*command, "--password-stdin"], input=secrets.token_urlsafe(24), cwd=folder.parent,
        env=environment(folder, **settings), capture_output=True, text=True, check=True,
    )  # fmt: skip
    return int(done.stdout.split()[-1])


# The key service


def test_a_key_service_is_waited_for_at_the_start_and_not_needed_after_it(
    tmp_path: Path, vault: Keeper
) -> None:
    data, log = tmp_path / "data", tmp_path / "log"
    with serving(data, log=log, **SECRETS) as server:
        password = server.password
        server.stop()
    services = vault.services
    with cuttable_line(str(services.vault_addr)) as line:
        line.is_open = False
        settings = {
            "ENCRYPTION_KEY": vault.seal(RAW), "JWT_SECRET_KEY": JWT_SECRET, "VAULT_ADDR": line.url,
            "VAULT_TOKEN": TOKEN, "VAULT_TRANSIT_KEY": str(services.vault_transit_key),
        }  # fmt: skip
        with serving(data, log=log, **settings) as server:
            caller = Caller(server.url)
            assert caller.sign_in(password).is_put_off
            assert caller.get(CONSENT).is_put_off
            assert "does not answer" in not_ready(caller)["key"]
            assert is_alive(caller)
            line.is_open = True
            until(lambda: is_ready(caller))
            caller.token = caller.sign_in(password).json["access_token"]
            line.hang_up()
            # The key is in memory: what does not need the service does not wait for it.
            assert caller.consent("meanwhile").status == 201
            assert is_ready(caller)
            assert server.process.poll() is None
