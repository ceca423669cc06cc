"""Restores of a whole cluster by pgBackRest: the rows of then, the promises and roles of now."""

import gc
import shutil
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from http import HTTPStatus
from pathlib import Path
from uuid import UUID

import psycopg
import pytest
from fastapi.testclient import TestClient
from sqlalchemy import select, text

from backend.backup.pgbackrest.cluster import Cluster
from backend.backup.pgbackrest.postmaster import RunOptions
from backend.backup.pgbackrest.says import Kind
from backend.db_utils import session_scope
from backend.errors import BackupDamagedError
from backend.models import AuditEvent, BackupRecord, BackupStatus
from backend.services.account_service import get_account_service
from backend.services.archive_service import database_for, get_archive_service
from backend.services.audit_service import COMMAND_LINE
from backend.services.auth_service import get_auth_service
from backend.services.backup_service import get_backup_service
from backend.services.cluster_service import get_cluster_service
from backend.services.pruning_service import get_pruning_service
from backend.services.restore_service import get_restore_service
from backend.services.setup_service import get_setup_service
from tests.backup.beside import beside
from tests.backup.cluster_installations import (
    ROLE,
    Installation,
    hotels,
    installation,
    new_machine,
    rename,
    service,
    stop_at_once,
)
from tests.backup.clusters import STANZA
from tests.backup.lives import Configure, configured, flip
from tests.backup.promises import consent, erase, has_consent, is_there, restore, wait_until
from tests.backup.refusals import code_of, error_of
from tests.conftest import ADMIN, Run, clear_caches

__all__ = ["configured", "installation", "service"]

Headers = dict[str, str]


def _beside(installation: Installation) -> set[str]:
    """What lies beside the live directory."""
    return {path.name for path in installation.site.folder.glob("data-*")}


def test_every_promise_made_since_is_kept(installation: Installation) -> None:
    password, before = "a new long pass phrase", _control_rows()
    consent(3, granted=False)
    erase(2)
    with session_scope() as session:
        get_account_service().set_password(session, ADMIN, password, COMMAND_LINE)
    restored = restore(installation.backups[Kind.INCR])
    assert hotels() == {"in incr"}
    assert not is_there(2)
    assert not has_consent(3)
    assert (restored.reapplied.erasures, restored.reapplied.consents) == (1, 1)
    assert get_auth_service().sign_in(ADMIN, password)
    events, records = _control_rows()
    assert events[: len(before[0])] == before[0]
    assert events[-2:] == ["restore", "sign_in"]
    # When it was taken, its own record was still running.
    assert records == before[1]
    assert {status for _, status in records} == {BackupStatus.COMPLETE}


def _control_rows() -> tuple[list[str], set[tuple[UUID, BackupStatus]]]:
    with session_scope(read_only=True) as session:
        events = list(session.scalars(select(AuditEvent.action).order_by(AuditEvent.id)))
        return events, {(each.id, each.status) for each in session.scalars(select(BackupRecord))}


def test_the_old_cluster_is_kept_aside_and_undo_puts_it_back(installation: Installation) -> None:
    restored = restore(installation.backups[Kind.FULL])
    assert hotels() == {"in full"}
    assert restored.previous is not None
    kept = Path(restored.previous)
    assert (kept / "PG_VERSION").exists()
    assert _beside(installation) == {"data-holdfast", kept.name}
    left = {path.name for path in installation.site.cluster.private.iterdir()}
    assert left == {"pgbackrest", "lock"}
    erase(2)
    undone = get_restore_service().undo(COMMAND_LINE, dry_run=False, confirm=True)
    assert hotels() == {"live"}
    assert not is_there(2)
    assert undone.reapplied.erasures == 1
    assert len(_beside(installation)) == 3


def test_a_dry_run_says_the_same_and_changes_nothing(installation: Installation) -> None:
    erase(2)
    running = installation.site.cluster.postmaster()
    tried = restore(installation.backups[Kind.DIFF], dry_run=True)
    assert (tried.status, tried.reapplied.erasures, tried.previous) == ("planned", 1, None)
    assert hotels() == {"live"}
    assert installation.site.cluster.postmaster() == running
    assert _beside(installation) == {"data-holdfast"}


def test_a_moment_between_two_commits_has_the_first_and_nobody_who_was_erased_later(
    installation: Installation, run: Run
) -> None:
    rename("first")
    moment = (installation.site.now() + timedelta(seconds=1)).astimezone(UTC).replace(microsecond=0)
    wait_until(lambda: installation.site.now() > moment)
    rename("second")
    erase(2)
    at = moment.strftime("%Y-%m-%dT%H:%M:%S")
    answer = run("backup", "restore", "--at", at, "--confirm", "--json")
    assert answer.json["reapplied"]["erasures"] == 1
    assert answer.json["backup_id"] == str(installation.backups[Kind.INCR])
    assert hotels() == {"first"}
    assert not is_there(2)


def test_with_another_engine_its_backups_and_old_clusters_are_still_known(
    installation: Installation, configured: Configure
) -> None:
    configured(backup_engine="holdfast")
    restored = restore(installation.backups[Kind.DIFF])
    assert hotels() == {"in diff"}
    late = datetime.now(UTC) + timedelta(days=91)
    get_pruning_service().prune(COMMAND_LINE, dry_run=False, now=late)
    assert restored.previous is not None
    assert _beside(installation) == {"data-holdfast"}
    assert get_cluster_service().database().repository.sets() == []


def _file_of_the_full_one(installation: Installation) -> Path:
    found = _set_of(installation, Kind.FULL)
    # Of the table that all of them need.
    (relation,) = _asked(installation, "SELECT pg_relation_filepath('users')")
    return found / "pg_data" / f"{relation}.zst"


def _asked(installation: Installation, statement: str) -> list[str]:
    with psycopg.connect(installation.url, autocommit=True) as connection:
        return [str(row[0]) for row in connection.execute(statement.encode()).fetchall()]


def _set_of(installation: Installation, kind: Kind) -> Path:
    label = get_archive_service().manifest(installation.backups[kind]).repository_label
    return installation.site.repository / "backup" / STANZA / str(label)


def _flip(installation: Installation) -> None:
    flip(_file_of_the_full_one(installation))


def _take_away(installation: Installation) -> None:
    shutil.rmtree(_set_of(installation, Kind.INCR))


def _put_another_in_its_place(installation: Installation) -> None:
    # Made with the same passphrase, and sound in itself.
    theirs, ours = (_set_of(installation, kind) for kind in (Kind.DIFF, Kind.INCR))
    shutil.rmtree(ours)
    theirs.rename(ours)


@pytest.mark.parametrize("damage", [_flip, _take_away, _put_another_in_its_place])
def test_a_backup_that_is_not_what_was_recorded_is_refused_and_the_cluster_left_alone(
    installation: Installation, damage: Callable[[Installation], None]
) -> None:
    backup_id = installation.backups[Kind.INCR]
    running = installation.site.cluster.postmaster()
    damage(installation)
    manifest = get_archive_service().manifest(backup_id)
    codes = {
        code_of(lambda: restore(backup_id)),
        code_of(lambda: get_backup_service().verify(backup_id, COMMAND_LINE)),
        code_of(lambda: get_archive_service().read_through(manifest)),
    }
    assert codes == {BackupDamagedError.code}
    assert hotels() == {"live"}
    assert installation.site.cluster.postmaster() == running
    assert _beside(installation) == {"data-holdfast"}
    assert error_of(backup_id) == BackupDamagedError.code


def test_a_moment_that_no_backup_reaches_is_refused(
    installation: Installation, client: TestClient, admin: Headers
) -> None:
    body = {"backup_id": str(installation.backups[Kind.FULL]), "confirm": True}
    for days in (1, -1):
        moment = datetime.now(UTC) + timedelta(days=days)
        answer = client.post(
            "/security/backup/restore",
            json=body | {"target_time": moment.isoformat()},
            headers=admin,
        )
        assert (answer.status_code, answer.json()["code"]) == (422, "refused")
    assert hotels() == {"live"}
    assert _beside(installation) == {"data-holdfast"}


def test_roles_stay_as_they_are_now(
    installation: Installation, monkeypatch: pytest.MonkeyPatch
) -> None:
    site, secret = installation.site, "changed-since-the-backup"
    hba = site.cluster.data / "pg_hba.conf"
    hba.write_text(f"local all {ROLE} scram-sha-256\nlocal all all trust\n")
    site.sql(f"ALTER ROLE {ROLE} PASSWORD '{secret}' CONNECTION LIMIT 60")
    site.sql(f"ALTER ROLE {ROLE} SET work_mem = '5MB'")
    site.sql('CREATE ROLE "new; \'comer" LOGIN IN ROLE pg_monitor')
    site.sql("SELECT pg_reload_conf()")
    monkeypatch.setenv("DATABASE_URL", installation.url.replace("@", f":{secret}@"))
    clear_caches()
    get_setup_service().open()
    roles = (
        "SELECT rolname, rolcanlogin, rolsuper, rolpassword, rolconnlimit FROM pg_authid"
        " WHERE rolname <> 'leaver' ORDER BY 1"
    )
    members = "SELECT roleid::regrole, member::regrole FROM pg_auth_members ORDER BY 1, 2"
    settings = "SELECT setrole::regrole, setconfig FROM pg_db_role_setting"
    before = [site.sql(each) for each in (roles, members, settings)]
    restore(installation.backups[Kind.FULL])
    assert hotels() == {"in full"}
    assert [site.sql(each) for each in (roles, members, settings)] == before
    # Dropped since, and so without any right now: it may own what the backup brings back.
    leaver = "SELECT rolcanlogin, rolsuper, rolpassword FROM pg_authid WHERE rolname = 'leaver'"
    assert site.sql(leaver) == "f|f|"
    left = [
        p for p in site.cluster.private.rglob("*") if p.is_file() and b"SCRAM" in p.read_bytes()
    ]
    assert left == []


def test_a_restored_cluster_is_worked_on_as_the_services_own_role(
    installation: Installation,
) -> None:
    # What a migration makes there as a superuser, the service could not read afterwards.
    manifest = get_archive_service().manifest(installation.backups[Kind.FULL])
    with (
        get_archive_service().rebuilt(database_for(manifest), manifest) as built,
        built.connect() as connection,
    ):
        assert connection.execute(text("SELECT current_user")).scalar() == ROLE


def test_while_the_server_is_exchanged_callers_are_told_to_try_again(
    installation: Installation,
    client: TestClient,
    admin: Headers,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    old, new = frozenset({"live"}), frozenset({"in full"})
    seen: list[frozenset[str]] = []
    statuses: list[int] = []
    reads: list[int] = []

    def read() -> None:
        answer = client.post(
            "/security/data/export", json={"user_id": 3, "format": "json"}, headers=admin
        )
        statuses.append(answer.status_code)
        if answer.status_code == HTTPStatus.OK:
            seen.append(frozenset(row["hotel"] for row in answer.json()["data"]["bookings"]))
        else:
            assert answer.headers["Retry-After"]

    def only_read() -> None:
        answer = client.get("/security/data/consent/3", headers=admin)
        reads.append(answer.status_code)

    start = Cluster.start

    def start_late(cluster: Cluster, options: RunOptions) -> None:
        # A quick exchange would meet nobody.
        wait_until(lambda: raised or all(unavailable in each for each in (statuses, reads)))
        start(cluster, options)

    unavailable = HTTPStatus.SERVICE_UNAVAILABLE
    with beside(read, only_read) as raised:
        monkeypatch.setattr(Cluster, "start", start_late)
        wait_until(lambda: raised or (old in seen and reads))
        body = {"backup_id": str(installation.backups[Kind.FULL]), "confirm": True}
        answer = client.post("/security/backup/restore", json=body, headers=admin)
        wait_until(lambda: raised or (new in seen and reads[-1] == HTTPStatus.OK))
    assert (raised, answer.status_code) == ([], HTTPStatus.OK)
    both = {HTTPStatus.OK, unavailable}
    assert set(statuses) == set(reads) == both
    assert statuses[-1] == reads[-1] == HTTPStatus.OK
    assert set(seen) == {old, new}
    # Connections that were ended, that of the lock among them, are no news.
    assert [each for each in caplog.records if each.name.startswith("sqlalchemy")] == []
    # One that was dropped without being closed warns here, and not in another test.
    gc.collect()


def test_a_lost_machine_comes_back_on_another_cluster(
    installation: Installation, monkeypatch: pytest.MonkeyPatch, run: Run
) -> None:
    # Nobody who was erased since is back; the ledger lies beside the backups.
    erase(2)
    stop_at_once(installation.site)
    with new_machine(monkeypatch) as machine:
        monkeypatch.setenv("PGBACKREST_REPOSITORY", str(installation.site.repository))
        backups = str(installation.folder / "backups")
        answer = run("backup", "restore", "--from", backups, "--confirm", "--json")
        assert answer.json["backup_id"] == str(installation.backups[Kind.INCR])
        assert hotels() == {"in incr"}
        assert not is_there(2)
        # What is not there yet stays as the backup has it.
        leaver = "SELECT rolcanlogin FROM pg_authid WHERE rolname = 'leaver'"
        assert machine.site.sql(leaver) == "t"
        monkeypatch.setenv("BACKUP_URL", backups)
        made = run("backup", "create", "--type", "incr", "--json").json
        assert made["kind"] == "incr"
