"""What takes more than one transaction is recorded before its first step, and again at its end."""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from backend.db_utils import session_scope
from backend.models import BackupRecord
from backend.services.audit_service import COMMAND_LINE
from backend.services.backup_service import get_backup_service
from backend.services.pruning_service import get_pruning_service
from backend.services.restore_service import get_restore_service
from backend.services.retention_service import get_retention_service
from backend.services.rotation_service import get_rotation_service
from backend.services.setup_service import get_setup_service
from tests.backup.aftermath import records
from tests.backup.lives import acts
from tests.backup.promises import back_up
from tests.conftest import KEY, OTHER_KEY, Service, clear_caches
from tests.privacy.people import feedback
from tests.services.trail import found, raw_rows, refuse_events, take_events_again

OLD: Final = timedelta(days=4000)


def delete_the_oldest() -> None:
    get_pruning_service().delete(records()[-1].id, COMMAND_LINE)


def prune() -> None:
    get_pruning_service().prune(COMMAND_LINE, dry_run=False)


def retire() -> None:
    get_retention_service().apply(COMMAND_LINE, dry_run=False, data_type="feedback")


def rotate() -> None:
    get_rotation_service().rotate(COMMAND_LINE)


ACTS: Final = {
    "backup_created": back_up,
    "backup_deleted": delete_the_oldest,
    "backups_pruned": prune,
    "retention_applied": retire,
    "keys_rotated": rotate,
}
# What no engine does otherwise is shown on the one that is faster.
SQLITE: Final = pytest.mark.parametrize("service", ["sqlite"], indirect=True)
SAME: Final = pytest.mark.parametrize(("action", "act"), ACTS.items(), ids=ACTS)


@pytest.fixture
def _with_something_to_do(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """Backups to delete, a row that retention is due on, and cells that an old key has sealed."""
    service.add(feedback(None, datetime.now(UTC) - OLD))
    back_up()
    back_up()
    monkeypatch.setenv("BACKUP_KEEP_LAST", "1")
    monkeypatch.setenv("ENCRYPTION_KEY", OTHER_KEY)
    monkeypatch.setenv("ENCRYPTION_KEYS_PREVIOUS", KEY)
    clear_caches()
    get_setup_service().open()


def state(service: Service) -> tuple[Any, ...]:
    """What is stored of backups, rows of retention, and cells as they are sealed."""
    with session_scope(read_only=True) as session:
        cells = session.execute(text("SELECT email, email_index FROM users")).all()
        return stored(service), session.execute(text("SELECT * FROM feedback")).all(), cells


def stored(service: Service) -> set[Path]:
    return set((service.folder / "backups").iterdir())


@SAME
@pytest.mark.usefixtures("_with_something_to_do")
def test_what_cannot_be_recorded_is_not_begun(
    service: Service, action: str, act: Callable[[], object]
) -> None:
    before, recorded = state(service), acts(action)
    refuse_events()
    with pytest.raises(DBAPIError, match="no room"):
        act()
    assert (state(service), acts(action)) == (before, recorded)
    take_events_again()
    act()
    assert state(service) != before
    assert acts(action) == [*recorded, "begun", "done"]
    assert found() is None


@SAME
@SQLITE
@pytest.mark.usefixtures("_with_something_to_do")
def test_what_was_begun_is_in_the_trail_also_when_its_end_is_not(
    service: Service, action: str, act: Callable[[], object]
) -> None:
    before, recorded = state(service), acts(action)
    refuse_events(f"NEW.action = '{action}' AND NEW.outcome = 'done'")
    with pytest.raises(DBAPIError, match="no room"):
        act()
    assert state(service) != before
    assert acts(action) == [*recorded, "begun"]


def done_by_the_service_itself(action: str) -> int:
    return sum(
        (row["action"], row["outcome"], row["actor_ref"]) == (action, "done", "service")
        for row in raw_rows()
    )


@SQLITE
@pytest.mark.parametrize("action", ["backup_created", "backup_deleted", "backups_pruned"])
@pytest.mark.usefixtures("_with_something_to_do")
def test_what_a_start_finds_done_it_records(service: Service, action: str) -> None:
    refuse_events(f"NEW.action = '{action}' AND NEW.outcome = 'done'")
    with pytest.raises(DBAPIError, match="no room"):
        ACTS[action]()
    take_events_again()
    assert service
    get_backup_service().recover()
    # Of what was pruned, each backup by itself.
    told = "backup_deleted" if action == "backups_pruned" else action
    assert done_by_the_service_itself(told) == 1
    get_backup_service().recover()
    assert done_by_the_service_itself(told) == 1
    assert found() is None


@SQLITE
def test_a_backup_that_became_none_is_recorded_by_the_next_start(service: Service) -> None:
    def killed(_record: BackupRecord) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        get_backup_service().create(COMMAND_LINE, begun=killed)
    assert acts("backup_created") == ["begun"]
    get_backup_service().recover()
    assert acts("backup_created") == ["begun", "interrupted"]
    assert service


def test_a_look_that_cannot_be_recorded_leaves_nobodys_data_there(
    sqlite_service: Service, tmp_path: Path
) -> None:
    backup_id, look = back_up(), tmp_path / "look.db"
    refuse_events()
    with pytest.raises(DBAPIError, match="no room"):
        get_restore_service().restore_to(backup_id, COMMAND_LINE, str(look))
    assert (list(tmp_path.iterdir()), acts("restore")) == ([], [])
    take_events_again()
    get_restore_service().restore_to(backup_id, COMMAND_LINE, str(look))
    assert (look.exists(), acts("restore")) == (True, ["beside"])
    assert sqlite_service


def test_a_deletion_that_fails_is_recorded_with_why(sqlite_service: Service) -> None:
    back_up()
    back_up()
    folder = sqlite_service.folder / "backups"
    oldest = records()[-1]
    note = folder / f"{oldest.id}.gone.json"
    # In the place of the note that is written first.
    note.mkdir()
    with pytest.raises(Exception, match=r"."):
        delete_the_oldest()
    begun, why = acts("backup_deleted")
    assert (begun, why) == ("begun", "unavailable")
    note.rmdir()
    get_pruning_service().delete(oldest.id, COMMAND_LINE)
    assert acts("backup_deleted")[2:] == ["begun", "done"]
