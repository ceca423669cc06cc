"""Erasures and rotations of keys, killed half way: undone or finished, and nothing is lost."""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta, tzinfo
from typing import Final

import pytest
from sqlalchemy import select

from backend.crypto.certificates import verify
from backend.db_utils import session_scope
from backend.errors import ConflictError
from backend.models import ErasureRecord, User
from backend.services import certificate_service
from backend.services.audit_service import COMMAND_LINE
from backend.services.backup_service import get_backup_service
from backend.services.certificate_service import get_certificate_service
from backend.services.rotation_service import get_rotation_service
from backend.services.setup_service import get_setup_service
from tests.backup.aftermath import fill, people, settle
from tests.backup.commands import Commands, running_commands
from tests.conftest import KEY, OTHER_KEY, Service, clear_caches
from tests.privacy.people import booking, cells_in_plain, dump, keys_of

MOMENTS: Final = 8
NOW: Final = datetime(2026, 1, 2, tzinfo=UTC)


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    with running_commands(tmp_path_factory.mktemp("commands")) as commands:
        yield commands


@pytest.fixture
def _filled(service: Service) -> None:
    fill(600)


@pytest.fixture
def _filled_sqlite(sqlite_service: Service) -> None:
    fill(600)


def _moments(seconds: float) -> list[float]:
    return [seconds * (step + 0.5) / MOMENTS for step in range(MOMENTS)]


@pytest.mark.usefixtures("_filled_sqlite")
def test_a_killed_erasure_changed_nothing_or_is_finished_at_the_next_start(
    sqlite_service: Service, commands: Commands
) -> None:
    seconds = commands.run("erase", "2").seconds
    for user_id, moment in enumerate(_moments(seconds), 3):
        before, promised = people(), _entries(sqlite_service)
        commands.kill("erase", str(user_id), after=moment)
        promised = _entries(sqlite_service) - promised
        if not promised:
            assert people() == before
        get_setup_service().prepare()
        if promised:
            _assert_gone(user_id)
        else:
            assert people() == before


@pytest.mark.usefixtures("_filled_sqlite")
def test_an_erasure_killed_once_it_was_promised_is_finished_at_the_next_start(
    sqlite_service: Service, commands: Commands
) -> None:
    sqlite_service.add(*(booking(2, NOW.date()) for _ in range(15)))
    before = keys_of(dump(), 2)
    # The object is durable before the first row goes; here all are gone, and not committed.
    assert commands.end("erase", "2", at_path=("link", "DELETE", "do_commit")).killed
    assert len(_entries(sqlite_service)) == 1
    assert keys_of(dump(), 2) == before
    get_setup_service().prepare()
    _assert_gone(2)


@pytest.mark.usefixtures("_filled")
def test_an_erasure_killed_before_its_scan_ended_is_done_and_has_a_certificate_that_says_so(
    service: Service, commands: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Once it is committed, what is changed next is its certificate: the scan has ended then.
    assert commands.end("erase", "3", at_path=("link", "do_commit", "UPDATE")).killed
    settle(service)
    assert _erasures() == [False]
    get_setup_service().prepare()
    _assert_gone(3)
    assert _erasures() == [False]
    with session_scope() as session:
        (erasure_id,) = session.scalars(select(ErasureRecord.id))
        with pytest.raises(ConflictError):
            get_certificate_service().of(session, erasure_id)
    # An hour later nobody is taken to be at it still.
    monkeypatch.setattr(certificate_service, "datetime", _HourLater)
    with session_scope() as session:
        document = get_certificate_service().of(session, erasure_id)
        key = get_certificate_service().public_key(session)
    assert verify(document, key)["scan"] == {"state": "not_finished"}
    assert _erasures() == [True]


def _erasures() -> list[bool]:
    """Of each erasure that was committed, whether it has a certificate."""
    with session_scope(read_only=True) as session:
        return [found is not None for found in session.scalars(select(ErasureRecord.certificate))]


class _HourLater(datetime):
    @classmethod
    def now(cls, tz: tzinfo | None = None) -> "_HourLater":
        later = datetime.now(tz) + timedelta(hours=1)
        return cls.fromisoformat(later.isoformat())


@pytest.mark.usefixtures("_filled_sqlite")
def test_a_killed_rotation_is_gone_on_with_and_no_value_or_backup_is_lost(
    sqlite_service: Service, commands: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    backup_id = get_backup_service().create(COMMAND_LINE).id
    before = len(cells_in_plain())
    primary, previous = OTHER_KEY, KEY
    for moment in (0.02, 0.05, 0.1, 0.2, 0.35, 0.5, None):
        # Back and forth, so that each run has everything to do that the one before did.
        monkeypatch.setenv("ENCRYPTION_KEY", primary)
        monkeypatch.setenv("ENCRYPTION_KEYS_PREVIOUS", previous)
        if moment is None:
            commands.run("keys", "rotate")
        else:
            commands.kill("keys", "rotate", after=moment)
        clear_caches()
        get_setup_service().open()
        assert len(cells_in_plain()) >= before
        get_backup_service().verify(backup_id, COMMAND_LINE)
        primary, previous = previous, primary
    assert get_rotation_service().rotate(COMMAND_LINE).finished


def _entries(service: Service) -> set[str]:
    return {path.name for path in (service.folder / "backups").glob("ledger-*")}


def _assert_gone(user_id: int) -> None:
    keys = keys_of(dump(), user_id)
    assert keys.pop("users") == {(user_id,)}
    assert set().union(*keys.values()) == set()
    with session_scope(read_only=True) as session:
        assert session.get(User, user_id) is None
