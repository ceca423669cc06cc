"""Backups of a whole cluster by pgBackRest: in our list, with our signature, keys and rules."""

import stat
from datetime import UTC, datetime, timedelta
from http import HTTPStatus
from pathlib import Path
from uuid import UUID

import pytest
from fastapi.testclient import TestClient

from backend.backup.manifest import Manifest, header_name
from backend.backup.pgbackrest.says import Kind
from backend.errors import ConflictError, RefusedError
from backend.models import BackupRecord, BackupStatus
from backend.services.archive_service import get_archive_service
from backend.services.audit_service import COMMAND_LINE
from backend.services.backup_service import get_backup_service
from backend.services.checkpoint_service import is_checkpoint
from backend.services.cluster_service import get_cluster_service
from backend.services.pruning_service import get_pruning_service
from backend.services.rotation_service import get_rotation_service
from backend.services.setup_service import get_setup_service
from backend.services.store_service import store
from tests.backup.cluster_installations import Installation, hotels, installation, service
from tests.backup.clusters import configure as configure_server
from tests.backup.lives import Configure, change, configured, listed, names, record, remove
from tests.backup.promises import restore
from tests.conftest import KEY, OTHER_KEY, Run, Service
from tests.services.test_rotation import NEW_ID, OLD_ID, configure, rotate, use_of

__all__ = ["configured", "installation", "service"]

Headers = dict[str, str]


def _manifest(backup_id: UUID) -> Manifest:
    return get_archive_service().manifest(backup_id)


def _in_repository() -> list[str]:
    """Our ids of what pgBackRest lists."""
    return [str(found.record) for found in get_cluster_service().database().repository.sets()]


def test_a_backup_is_recorded_and_signed_for_with_what_it_builds_on(
    installation: Installation,
) -> None:
    full, diff, incr = (installation.backups[kind] for kind in Kind)
    assert listed() == [incr, diff, full]
    assert [record(each).kind for each in (full, diff, incr)] == list(Kind)
    builds_on = {full: set(), diff: {full}, incr: {full, diff}}
    repository = get_cluster_service().database().repository
    for backup_id, found in zip((full, diff, incr), repository.sets(), strict=True):
        manifest = _manifest(backup_id)
        assert manifest.engine == "pgbackrest"
        assert (manifest.repository_label, manifest.kind) == (found.label, found.kind)
        assert manifest.sha256 == repository.digest(found.label)
        assert set(map(UUID, manifest.builds_on)) == builds_on[backup_id]
        assert manifest.size_bytes == found.size_bytes
        assert record(backup_id).size_bytes == found.size_bytes
    previous = _manifest(incr).previous
    assert previous is not None
    assert previous["link"] == _manifest(diff).link


def test_over_http_a_backup_of_any_kind_is_made_listed_and_proven(
    installation: Installation, run: Run, client: TestClient, admin: Headers
) -> None:
    body = {"kind": "diff", "label": "by http"}
    answer = client.post("/security/backup/create", json=body, headers=admin)
    assert (answer.status_code, answer.json()["kind"]) == (HTTPStatus.CREATED, "diff")
    backup_id = answer.json()["id"]
    assert _manifest(UUID(backup_id)).builds_on == [str(installation.backups[Kind.FULL])]
    proven = client.post(f"/security/backup/{backup_id}/verify", headers=admin).json()
    assert proven["verified_at"]
    items = run("backup", "list", "--json").json
    assert [each["kind"] for each in items["items"]] == ["diff", "incr", "diff", "full"]
    assert items["breaks"] == []
    assert items["newest_proven_at"] == items["items"][0]["created_at"]
    get_archive_service().read_through(_manifest(UUID(backup_id)))


def test_kinds_are_refused_where_backups_are_dumps(sqlite_service: Service, run: Run) -> None:
    with pytest.raises(RefusedError, match="pgbackrest"):
        get_backup_service().create(COMMAND_LINE, kind=Kind.DIFF)
    assert listed() == []


def test_nothing_that_is_stored_can_be_read_without_the_key(installation: Installation) -> None:
    (config,) = (installation.site.cluster.private / "pgbackrest").glob("*.conf")
    passphrase = config.read_text().partition("cipher-pass=")[2].split()[0].encode()
    files = [p for p in installation.site.folder.rglob("*") if p.is_file()]
    stored = [p for p in files if installation.site.cluster.data not in p.parents]
    assert len(stored) > 100
    holding = {
        words: [p for p in stored if words in p.read_bytes()]
        for words in (b"in full", b"admin@example.com", passphrase)
    }
    assert holding == {b"in full": [], b"admin@example.com": [], passphrase: [config]}
    assert any(b"in full" in p.read_bytes() for p in set(files) - set(stored))
    assert stat.S_IMODE(config.stat().st_mode) == 0o600


def test_after_a_rotation_older_backups_open_with_the_new_key_alone(
    installation: Installation, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    configure(monkeypatch, OTHER_KEY, KEY)
    with pytest.raises(ConflictError, match="still protects"):
        get_rotation_service().disable(OLD_ID, COMMAND_LINE)
    assert rotate().finished
    assert use_of(OLD_ID).total == 0
    get_rotation_service().disable(OLD_ID, COMMAND_LINE)
    configure(monkeypatch, OTHER_KEY)
    # The passphrase of the repository is one object more.
    assert use_of(NEW_ID).backups == len(installation.backups) + 1
    get_backup_service().verify(installation.backups[Kind.INCR], COMMAND_LINE)
    restore(installation.backups[Kind.DIFF])
    assert hotels() == {"in diff"}
    made = run("backup", "create", "--type", "incr", "--json").json
    assert (made["kind"], _manifest(UUID(made["id"])).row_keys) == ("incr", [NEW_ID])


def test_what_others_build_on_cannot_be_deleted_before_them(
    installation: Installation, client: TestClient, admin: Headers
) -> None:
    full, diff, incr = (installation.backups[kind] for kind in Kind)
    for backup_id in (full, diff):
        answer = client.delete(f"/security/backup/{backup_id}", headers=admin)
        assert (answer.status_code, answer.json()["code"]) == (HTTPStatus.CONFLICT, "conflict")
    assert listed() == [incr, diff, full]
    remove(incr)
    assert listed() == [diff, full]
    assert _in_repository() == [str(full), str(diff)]
    remove(diff)
    get_backup_service().verify(full, COMMAND_LINE)
    with pytest.raises(ConflictError, match="last good"):
        remove(full)
    assert _in_repository() == [str(full)]


def test_what_is_kept_keeps_what_it_builds_on(
    installation: Installation, configured: Configure
) -> None:
    full, diff, incr = (installation.backups[kind] for kind in Kind)
    configured(backup_keep_last=1)
    verdicts = get_pruning_service().prune(COMMAND_LINE, dry_run=False)
    assert {each.backup_id: each.keep for each in verdicts} == {full: True, diff: True, incr: True}
    change(incr, error="backup_damaged")
    get_pruning_service().prune(COMMAND_LINE, dry_run=False)
    assert listed() == [diff, full]
    assert _in_repository() == [str(full), str(diff)]


def test_the_maximum_age_takes_along_what_builds_on_the_old_one_and_the_last_one_too(
    installation: Installation,
) -> None:
    full, diff, incr = (installation.backups[kind] for kind in Kind)
    change(full, created_at=datetime.now(UTC) - timedelta(days=91))
    verdicts = get_pruning_service().prune(COMMAND_LINE, dry_run=False)
    assert {each.reason for each in verdicts} == {"older than 90 days"}
    assert listed() == []
    stored = [p for p in installation.site.repository.rglob("*.zst") if p.is_file()]
    assert stored == []
    left = [name for name in names(installation.folder / "backups") if not is_checkpoint(name)]
    assert left == sorted([
        *(f"{each}.gone.json" for each in (full, diff, incr)), "pgbackrest.enc"
    ])  # fmt: skip
    assert _in_repository() == []


def test_a_backup_that_fails_at_the_end_leaves_nothing_in_the_repository(
    installation: Installation,
) -> None:
    before = _in_repository()

    def take_its_place(record: BackupRecord) -> None:
        with store().create(header_name(str(record.id))) as file:
            file.write(b"somebody else's")

    with pytest.raises(ConflictError):
        get_backup_service().create(COMMAND_LINE, kind=Kind.INCR, begun=take_its_place)
    assert _in_repository() == before
    failed = record(listed()[0])
    assert (failed.status, failed.error) == (BackupStatus.FAILED, "conflict")


def test_without_pgbackrest_the_service_starts_and_backups_say_what_is_missing(
    installation: Installation, run: Run, client: TestClient, admin: Headers,
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
) -> None:  # fmt: skip
    monkeypatch.setenv("PATH", str(tmp_path))
    get_setup_service().prepare()
    answer = run("backup", "create")
    assert (answer.code, answer.err.splitlines()[-1]) == (
        1, "holdfast: pgbackrest is not on this machine"
    )  # fmt: skip
    made = client.post("/security/backup/create", headers=admin)
    assert made.status_code == HTTPStatus.SERVICE_UNAVAILABLE
    backup_id = str(installation.backups[Kind.FULL])
    assert run("backup", "verify", backup_id).code == 1
    assert run("backup", "restore", backup_id, "--confirm").code == 1
    assert hotels() == {"live"}


def test_a_cluster_that_is_none_is_told_at_the_start(
    installation: Installation, run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for setting, said in (("", "PGBACKREST_CLUSTER"), (str(tmp_path / "x"), str(tmp_path / "x"))):
        monkeypatch.setenv("PGBACKREST_CLUSTER", setting)
        answer = run("backup", "create")
        assert answer.code == 2
        assert said in answer.err
        assert answer.err.count("\n") == 1


def test_a_server_that_archives_nothing_is_told_how_to_set_it_up(
    installation: Installation, run: Run
) -> None:
    installation.site.cluster.stop()
    configure_server(installation.site, "archive_mode = off\n")
    installation.site.start()
    answer = run("backup", "create")
    assert answer.code == 2
    (said,) = [line for line in answer.err.splitlines() if line.startswith("holdfast: ")]
    assert "set archive_mode = on and archive_command = '" in said
    assert said.endswith("and restart the server")
