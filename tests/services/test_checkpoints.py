"""Checkpoints lie beside the backups, and tell what the database says of itself no more."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from backend.backup.storage import Store
from backend.crypto.chain import ChainKeys
from backend.crypto.checkpoints import Checkpoint
from backend.crypto.signing import new_signing_key
from backend.errors import ConflictError, UnavailableError
from backend.services import checkpoint_service
from backend.services.audit_service import COMMAND_LINE
from backend.services.backup_service import get_backup_service
from backend.services.checkpoint_service import (
    UnlinkedError,
    get_checkpoint_service,
    is_checkpoint,
)
from backend.services.pruning_service import get_pruning_service
from backend.services.scheduler_service import SchedulerService
from backend.services.store_service import using_store
from backend.services.trail_service import Checked
from tests.backup.promises import back_up, wait_until
from tests.backup.s3_server import S3Server
from tests.backup.stores import Folders, away, folders, objects, use_stores
from tests.conftest import Run, Service
from tests.services.trail import act, anchor, keys, numbers, sql, verify

__all__ = ["folders"]  # a fixture


def stored(folder: Path) -> list[str]:
    return sorted(name for name in objects(folder) if is_checkpoint(name))


def kinds(checked: Checked) -> list[tuple[str, int]]:
    return [(str(each.kind), each.event_id) for each in checked.breaks]


@pytest.fixture
def store(sqlite_service: Service) -> Path:
    """The folder of the only store."""
    return sqlite_service.folder / "backups"


def named(store: Path, event_id: int) -> Path:
    (path,) = store.glob(f"audit-*-{event_id:016}-*.json")
    return path


def test_every_backup_leaves_a_checkpoint_in_every_store(folders: Folders) -> None:
    back_up()
    last = numbers()[-1]
    wait_until(lambda: stored(folders.second) == stored(folders.first))
    (name,) = stored(folders.first)
    assert f"-{last:016}-" in name
    # The second time there is nothing new to say.
    assert get_checkpoint_service().make() is None
    assert stored(folders.first) == [name]
    assert verify().status == "ok"


def test_a_trail_without_a_checkpoint_is_not_called_whole(sqlite_service: Service) -> None:
    checked = verify()
    assert (checked.status, checked.breaks, checked.checkpoints) == ("incomplete", [], 0)
    assert (checked.checkpoint_at, checked.checkpoint_event) == (None, None)
    anchor()
    assert verify().status == "ok"


def test_a_store_that_does_not_answer_is_told_and_what_is_wrong_all_the_same(
    folders: Folders,
) -> None:
    act()
    anchor()
    wait_until(lambda: stored(folders.second) == stored(folders.first))
    with away(folders.second):
        checked = verify()
        assert (checked.status, checked.silent) == ("incomplete", [str(folders.second)])
        sql("UPDATE audit_events SET outcome = 'denied' WHERE id = 4")
        checked = verify()
        assert (checked.status, kinds(checked)) == ("broken", [("edited", 4)])


def test_one_store_that_was_not_emptied_is_enough(folders: Folders) -> None:
    act(3)
    last = anchor()
    wait_until(lambda: stored(folders.second) == stored(folders.first))
    for name in stored(folders.first):
        (folders.first / name).unlink()
    sql("DELETE FROM audit_events WHERE id = :id", id=last)
    assert kinds(verify()) == [("truncated", last)]


def test_no_act_fails_for_want_of_a_checkpoint_and_the_next_one_is_made(folders: Folders) -> None:
    act()
    (watch,) = (job for job in SchedulerService()._jobs if job.name == "watch")
    assert watch.run_alone is not None
    with away(folders.first):
        watch.run_alone()
        with pytest.raises(UnavailableError):
            get_checkpoint_service().make()
    assert stored(folders.first) == []
    watch.run_alone()
    assert len(stored(folders.first)) == 1


def test_a_checkpoint_that_was_taken_away_is_missed_by_the_next_one(store: Path) -> None:
    made = [act() and anchor() for _ in range(3)]
    assert verify().status == "ok"
    named(store, made[1]).unlink()
    assert kinds(verify()) == [("checkpoint_missing", made[1])]
    # Without any older one it might have gone by age; and the last one says as much as all.
    named(store, made[0]).unlink()
    assert verify().status == "ok"


def test_old_checkpoints_go_with_old_backups_and_the_newest_stays(store: Path) -> None:
    made = [act() and anchor() for _ in range(3)]
    late = datetime.now(UTC) + timedelta(days=89)
    get_pruning_service().prune(COMMAND_LINE, dry_run=False, now=late)
    assert len(stored(store)) == 3
    late += timedelta(days=2)
    get_pruning_service().prune(COMMAND_LINE, dry_run=False, now=late)
    assert stored(store) == [named(store, made[-1]).name]
    assert verify().status == "ok"


def test_a_changed_checkpoint_is_named(store: Path) -> None:
    made = act() and anchor()
    path = named(store, made)
    for change in (
        path.read_bytes().replace(b'"at": "20', b'"at": "21'),
        b"",
        b"{}",
        b" " * 5000,
    ):
        path.write_bytes(change)
        assert kinds(verify()) == [("checkpoint_changed", made)]


def test_a_forged_checkpoint_is_named_and_believed_by_nobody(folders: Folders) -> None:
    last = act(2)
    made = get_checkpoint_service().make()
    assert made is not None
    wait_until(lambda: stored(folders.second) == stored(folders.first))
    forged = replace(made, event_id=last + 9, link="0" * 64)
    name = named(folders.second, last).name.replace(f"{last:016}", f"{last + 9:016}")
    name = name.replace(made.link[:16], "0" * 16)
    (folders.second / name).write_bytes(forged.document(new_signing_key()))
    # It does not spread, either.
    get_backup_service().copy()
    assert name not in stored(folders.first)
    assert kinds(verify()) == [("checkpoint_foreign", last + 9)]


def test_an_old_checkpoint_under_a_new_name_is_named(store: Path) -> None:
    first = act() and anchor()
    second = act() and anchor()
    path = named(store, second)
    path.write_bytes(named(store, first).read_bytes())
    assert kinds(verify()) == [("checkpoint_changed", second)]


def test_checkpoints_of_another_installation_are_told_and_left_alone(store: Path) -> None:
    anchor()
    for event_id in (80, 900, 9):
        other = Checkpoint("0" * 16, event_id, "1" * 64, datetime.now(UTC), None)
        path = store / f"audit-{'0' * 16}-{event_id:016}-{'1' * 16}.json"
        path.write_bytes(other.document(new_signing_key()))
    (store / "audit-of-somebody.json").write_text("{}")
    checked = verify()
    assert (checked.status, checked.breaks) == ("incomplete", [])
    assert checked.others == [("0" * 16, 900, str(store))]
    get_checkpoint_service().forget(datetime.now(UTC) + timedelta(days=1))
    assert path.exists()


def test_the_next_one_is_made_by_reading_the_newest_alone_whatever_was_put_beside_it(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(4):
        act()
        last = anchor()
    forged = store / f"audit-{keys().chain_id}-{10**15 + 7:016}-{'0' * 16}.json"
    forged.write_text("{}")
    read, tried = checkpoint_service._read, list[str]()

    def counted(where: Store, name: str, chain: ChainKeys) -> Checkpoint:
        tried.append(name)
        return read(where, name, chain)

    monkeypatch.setattr(checkpoint_service, "_read", counted)
    act()
    made = get_checkpoint_service().make()
    assert made is not None
    assert made.previous is not None
    assert made.previous["event_id"] == last
    # The forged one, which is none, and the newest.
    assert len(tried) == 2


def test_by_a_clock_that_was_set_back_the_newest_is_the_newest(store: Path) -> None:
    first = get_checkpoint_service().make()
    assert first is not None
    path = named(store, first.event_id)
    ahead = replace(first, at=first.at + timedelta(days=3))
    path.write_bytes(ahead.document(keys().signing))
    act()
    second = get_checkpoint_service().make()
    assert second is not None
    assert second.at > ahead.at
    assert second.previous == ahead.reference()


def test_no_checkpoint_is_said_to_be_made_where_something_else_has_its_name(store: Path) -> None:
    last = act(2)
    anchor()
    named(store, last).write_text("{}")
    with pytest.raises(ConflictError, match="no checkpoint of ours"):
        get_checkpoint_service().make()
    # The next event has a name of its own.
    assert act() == anchor()


def test_two_that_make_the_same_checkpoint_at_once_both_have_it(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    last = act()
    # As if the other one's had not been there yet.
    monkeypatch.setattr(checkpoint_service, "_newest", lambda *_: None)
    assert anchor() == anchor() == last
    assert len(stored(store)) == 1


@pytest.mark.parametrize("link", ["NULL", "'x'", f"'{'z' * 64}'"])
@pytest.mark.usefixtures("store")
def test_an_end_without_a_link_is_not_said_to_be_signed(run: Run, link: str) -> None:
    act(2)
    anchor()
    sql(f"UPDATE audit_events SET link = {link} WHERE id = :id", id=act(2))  # noqa: S608 - from above
    with pytest.raises(UnlinkedError):
        get_checkpoint_service().make()
    answer = run("audit", "checkpoint")
    assert (answer.code, answer.out) == (2, "")
    assert "no link" in answer.err
    # The acts go on, and so do checkpoints.
    assert act() == anchor()


def test_another_machines_store_gets_no_checkpoint_of_ours(store: Path, tmp_path: Path) -> None:
    act()
    other = tmp_path / "other"
    with using_store(str(other)):
        get_checkpoint_service().make_if_possible()
    assert (other.exists(), stored(store)) == (False, [])
    get_checkpoint_service().make_if_possible()
    assert len(stored(store)) == 1


def test_in_a_bucket_with_object_lock_checkpoints_outlive_whoever_deletes_them(
    sqlite_service: Service, aws_environment: S3Server, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    bucket = aws_environment.make_bucket(lock=True)
    monkeypatch.setenv("BACKUP_LOCK_DAYS", "30")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", aws_environment.endpoint_url)
    use_stores(monkeypatch, tmp_path / "first", f"s3://{bucket}/audit")
    act()
    last = anchor()
    wait_until(lambda: objects_in(aws_environment, bucket))
    (name,) = objects_in(aws_environment, bucket)
    locked = aws_environment.client.head_object(Bucket=bucket, Key=name)
    assert locked["ObjectLockRetainUntilDate"] > datetime.now(UTC) + timedelta(days=29)
    for path in (tmp_path / "first").iterdir():
        path.unlink()
    sql("DELETE FROM audit_events WHERE id >= :id", id=last)
    assert kinds(verify()) == [("truncated", last)]


def objects_in(server: S3Server, bucket: str) -> list[str]:
    found = server.client.list_objects_v2(Bucket=bucket).get("Contents", ())
    return [each["Key"] for each in found]
