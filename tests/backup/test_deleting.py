"""What is deleted is gone everywhere and stays so; what is needed cannot be deleted."""

import shutil
import threading
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import delete, select

from backend.backup import manifest
from backend.backup.manifest import Manifest, SignWith, delete_backup, mark_gone
from backend.backup.storage import LocalStore, Store
from backend.crypto import keyring
from backend.db_utils import session_scope
from backend.errors import ConflictError
from backend.models import BackupRecord
from backend.services import pruning_service, store_service
from backend.services.audit_service import COMMAND_LINE
from backend.services.backup_service import get_backup_service
from backend.services.checkpoint_service import is_checkpoint
from backend.services.setup_service import get_setup_service
from backend.services.store_service import get_store_service, signer
from tests.backup.lives import (
    PATH,
    SQLITE,
    WHOLE,
    Configure,
    Headers,
    after_writing,
    configured,
    create,
    failed,
    flip,
    listed,
    names,
    parts_of,
    remove,
)
from tests.conftest import Run, Service, SignIn

__all__ = ["after_writing", "configured"]  # fixtures


@SQLITE
def test_what_is_needed_cannot_be_deleted_over_the_api(
    client: TestClient, admin: Headers, now: datetime
) -> None:
    def refused(backup_id: UUID, words: str) -> None:
        answer = client.delete(f"{PATH}/{backup_id}", headers=admin)
        assert (answer.status_code, answer.json()["code"]) == (409, "conflict")
        assert words in answer.json()["detail"]
        assert client.get(f"{PATH}/{backup_id}", headers=admin).status_code == 200

    proven = create()
    refused(proven, "the last good backup")
    get_backup_service().verify(proven, COMMAND_LINE)
    second = create()
    refused(proven, "the last backup that was proven")
    body = {"until": (now + timedelta(days=1)).isoformat()}
    assert client.put(f"{PATH}/{second}/hold", json=body, headers=admin).status_code == 200
    refused(second, "is held")
    third = get_backup_service().create(
        COMMAND_LINE, begun=lambda running: refused(running.id, "backup or restore is running")
    )
    assert client.delete(f"{PATH}/{third.id}", headers=admin).status_code == 204


@SQLITE
def test_what_is_damaged_or_failed_can_be_deleted(
    client: TestClient, admin: Headers, service: Service
) -> None:
    good = create()
    folder = service.folder / "backups"
    damaged, unreadable = create(), create()
    flip(folder / f"{damaged}.hfb")
    assert client.post(f"{PATH}/{damaged}/verify", headers=admin).status_code == 422
    manifest = folder / f"{unreadable}.manifest.json"
    manifest.write_text("{}")
    # As on a machine that has never known it.
    with session_scope() as session:
        session.execute(delete(BackupRecord).where(BackupRecord.id == unreadable))
    broken = failed()
    for backup_id in (damaged, unreadable, broken):
        assert client.delete(f"{PATH}/{backup_id}", headers=admin).status_code == 204
        assert client.delete(f"{PATH}/{backup_id}", headers=admin).status_code == 404
        assert parts_of(backup_id, folder) == []
    found = client.get(f"{PATH}/list", headers=admin).json()
    assert ([item["id"] for item in found["items"]], found["breaks"]) == ([str(good)], [])


@SQLITE
def test_a_failed_backup_is_neither_proven_nor_restored_nor_held(
    client: TestClient, admin: Headers, now: datetime
) -> None:
    broken = failed()
    body = {"backup_id": str(broken), "confirm": True}
    until = {"until": (now + timedelta(days=1)).isoformat()}
    for answer in (
        client.post(f"{PATH}/{broken}/verify", headers=admin),
        client.post(f"{PATH}/restore", json=body, headers=admin),
        client.put(f"{PATH}/{broken}/hold", json=until, headers=admin),
    ):
        assert (answer.status_code, answer.json()["code"]) == (409, "conflict")
        assert "is not complete" in answer.json()["detail"]
    assert client.get(f"{PATH}/{broken}", headers=admin).json()["error"] == "interrupted"


@SQLITE
def test_nobody_but_an_admin_deletes_or_holds(
    client: TestClient, service: Service, sign_in: SignIn
) -> None:
    service.user("guest@example.com")
    first, _second = create(), create()
    until = {"until": None}
    with session_scope(read_only=True) as session:
        before = session.execute(select(BackupRecord.id)).all()
    for headers, status in (({}, 401), (sign_in("guest@example.com"), 403)):
        assert client.delete(f"{PATH}/{first}", headers=headers).status_code == status
        held = client.put(f"{PATH}/{first}/hold", json=until, headers=headers)
        assert held.status_code == status
    with session_scope(read_only=True) as session:
        assert session.execute(select(BackupRecord.id)).all() == before


@pytest.fixture
def two_stores(sqlite_service: Service, configured: Configure, tmp_path: Path) -> tuple[Path, Path]:
    first, copy = tmp_path / "first", tmp_path / "copy"
    configured(backup_url=f"{first},{copy}")
    return first, copy


def test_a_deleted_backup_is_gone_in_every_store_and_does_not_come_back(
    two_stores: tuple[Path, Path], tmp_path: Path
) -> None:
    old, kept = create(), create()
    for folder in two_stores:
        assert parts_of(old, folder) == WHOLE
    taken = tmp_path / "taken"
    shutil.copytree(two_stores[1], taken)
    remove(old)
    for folder in two_stores:
        assert parts_of(old, folder) == []
        assert f"{old}.gone.json" in names(folder)
    # Somebody puts it back into the copy: what we deleted is not healed from there.
    for path in taken.glob(f"{old}.*"):
        shutil.copy(path, two_stores[1])
    get_backup_service().copy()
    for folder in two_stores:
        assert parts_of(old, folder) == []
        assert parts_of(kept, folder) == WHOLE
    assert listed() == [kept]


def test_a_store_that_was_lost_is_filled_again_from_its_copy(
    two_stores: tuple[Path, Path],
) -> None:
    backup_id = create()
    before = names(two_stores[1])
    shutil.rmtree(two_stores[0])
    assert listed() == []
    get_backup_service().copy()
    assert names(two_stores[0]) == names(two_stores[1]) == before
    assert get_backup_service().verify(backup_id, COMMAND_LINE).verified_at is not None


def test_a_copy_that_cannot_be_reached_is_filled_later(two_stores: tuple[Path, Path]) -> None:
    two_stores[1].write_text("not mounted")
    backup_id = create()
    two_stores[1].unlink()
    get_backup_service().copy()
    assert names(two_stores[1]) == names(two_stores[0])
    assert parts_of(backup_id, two_stores[1]) == WHOLE


def test_the_scheduler_knows_of_a_copy_that_could_not_be_made(
    two_stores: tuple[Path, Path],
) -> None:
    get_store_service().sync_due.clear()
    two_stores[1].write_text("not mounted")
    create()
    assert get_store_service().sync_due.is_set()


def test_the_command_that_copies_fails_where_a_store_cannot_be_reached(
    sqlite_service: Service, run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("boto3")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "made up")
    # Nobody listens there.
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
    monkeypatch.setenv("BACKUP_URL", f"{tmp_path / 'first'},s3://bucket/copies")
    done = run("backup", "sync", "--json")
    assert done.json["failed"] == ["s3://bucket/copies"]
    assert done.code == 1


def test_a_copy_that_cannot_be_reached_is_deleted_later(two_stores: tuple[Path, Path]) -> None:
    old, _kept = create(), create()
    away = two_stores[1].with_name("away")
    two_stores[1].rename(away)
    two_stores[1].write_text("not mounted")
    remove(old)
    assert parts_of(old, two_stores[0]) == []
    two_stores[1].unlink()
    away.rename(two_stores[1])
    get_backup_service().copy()
    assert parts_of(old, two_stores[1]) == []


def test_a_deletion_that_was_cut_short_in_a_copy_is_finished(
    two_stores: tuple[Path, Path],
) -> None:
    old, _kept = create(), create()
    left = {name: (two_stores[1] / name).read_bytes() for name in (f"{old}.hfb", f"{old}.key")}
    remove(old)
    # As a process leaves it that was killed behind the manifest.
    for name, data in left.items():
        (two_stores[1] / name).write_bytes(data)
    get_backup_service().copy()
    assert parts_of(old, two_stores[1]) == []


def test_a_deletion_beside_a_copy_is_not_undone_by_it(
    two_stores: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    old, kept = create(), create()
    key_id = keyring.current().primary.key_id.hex()
    find_gone, looked = manifest.gone_ids, list[Store]()

    def delete_in(folder: Path) -> None:
        where = LocalStore(str(folder))
        mark_gone(where, str(old), datetime.now(UTC), key_id, signer(key_id))
        delete_backup(where, str(old))

    def gone_ids(where: Store, sign_with: SignWith) -> dict[str, datetime]:
        found = find_gone(where, sign_with)
        looked.append(where)
        if len(looked) == 2:
            # Another process has just deleted it in the first store, and not yet in the copy.
            delete_in(two_stores[0])
        return found

    with monkeypatch.context() as patch:
        patch.setattr(store_service, "gone_ids", gone_ids)
        get_backup_service().copy()
    delete_in(two_stores[1])
    get_backup_service().copy()
    assert [parts_of(old, folder) for folder in two_stores] == [[], []]
    assert listed() == [kept]


@pytest.mark.parametrize(
    "service",
    [
        "sqlite",
        "postgresql",
    ],
    indirect=True,
)
def test_of_two_deletions_at_once_one_leaves_the_last_good_backup(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    check, together = pruning_service._refuse_needed, threading.Barrier(2)

    def checked(*arguments: Any) -> None:
        check(*arguments)
        with suppress(threading.BrokenBarrierError):
            together.wait(timeout=0.3)

    monkeypatch.setattr(pruning_service, "_refuse_needed", checked)

    def delete_quietly(backup_id: UUID) -> None:
        with suppress(ConflictError):
            remove(backup_id)

    threads = [threading.Thread(target=delete_quietly, args=(create(),)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(listed()) == 1


def test_what_a_killed_backup_left_does_not_spread(
    two_stores: tuple[Path, Path], after_writing: Any
) -> None:
    def die(made: Manifest) -> None:
        (two_stores[0] / f"{made.id}.manifest.json").unlink()
        raise KeyboardInterrupt

    # As a process leaves it that was killed before it could write the manifest, or clear up.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("backend.services.backup_service.delete_backup", lambda *_: None)
        patch.setattr(get_backup_service(), "_fail", lambda *_: None)
        after_writing(die)
        with pytest.raises(KeyboardInterrupt):
            create()
    get_backup_service().copy()
    get_setup_service().prepare()
    get_backup_service().copy()
    left = [name for folder in two_stores for name in names(folder)]
    assert [name for name in left if not is_checkpoint(name)] == []
