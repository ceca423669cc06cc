"""Getting ready makes what is missing, once; and where it must refuse, it makes nothing."""

import shutil
from pathlib import Path
from uuid import uuid4

import pytest
from sqlalchemy import inspect, select, text

from backend.crypto.keyring import RootKey, parse_key
from backend.db_utils import get_engine, session_scope
from backend.errors import ConfigurationError
from backend.models import Base, EncryptionKey, LedgerKind, Role, User
from backend.services.audit_service import COMMAND_LINE
from backend.services.auth_service import get_auth_service
from backend.services.backup_service import get_backup_service
from backend.services.ledger_service import get_ledger_service
from backend.services.reference_service import reference_to
from backend.services.setup_service import get_setup_service
from tests.conftest import ADMIN, JWT_SECRET, KEY, OTHER_KEY, PASSWORD, Service, clear_caches
from tests.privacy.people import dump, plant

KEY_ID = RootKey(parse_key(KEY)).key_id.hex()
OTHER_ID = RootKey(parse_key(OTHER_KEY)).key_id.hex()


def _set(monkeypatch: pytest.MonkeyPatch, **values: object) -> None:
    """Start anew with other settings; `None` takes one away."""
    for name, value in values.items():
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, str(value))
    clear_caches()


@pytest.fixture
def new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is not there yet, and development settings that name it."""
    _set(monkeypatch, DATA_DIR=tmp_path / "new")
    return tmp_path / "new"


def _files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and not path.name.endswith(("-wal", "-shm"))
    }


def test_a_first_start_makes_keys_schema_and_admin_for_their_owner_alone(new: Path) -> None:
    prepared = get_setup_service().prepare()
    assert prepared.migrated
    assert prepared.admin is not None
    email, password = prepared.admin
    assert email == ADMIN
    assert get_auth_service().sign_in(email, password)
    assert set(inspect(get_engine()).get_table_names()) == {
        *Base.metadata.tables,
        "alembic_version",
    }
    assert new.stat().st_mode & 0o777 == 0o700
    for name in ("holdfast.db", "encryption.key", "jwt.secret"):
        assert (new / name).stat().st_mode & 0o777 == 0o600


def test_preparing_twice_is_preparing_once(new: Path) -> None:
    get_setup_service().prepare()
    secrets = {name: data for name, data in _files(new).items() if name != "holdfast.db"}
    before = dump()
    for _again in range(2):
        clear_caches()
        again = get_setup_service().prepare()
        assert (again.migrated, again.admin) == (False, None)
    clear_caches()
    get_setup_service().open()
    assert dump() == before
    assert {name: data for name, data in _files(new).items() if name != "holdfast.db"} == secrets


def test_an_admin_is_made_only_where_there_is_none(service: Service) -> None:
    with session_scope() as session:
        user = session.scalars(select(User)).one()
        user.role, user.email = Role.USER, "other@example.com"
    prepared = get_setup_service().prepare()
    assert prepared.admin is not None
    assert prepared.admin[0] == ADMIN
    assert get_setup_service().prepare().admin is None


def test_another_key_is_refused_with_both_ids_and_changes_nothing(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant("A")
    before = dump()
    _set(monkeypatch, ENCRYPTION_KEY=OTHER_KEY)
    for refused in (get_setup_service().prepare, get_setup_service().open):
        with pytest.raises(ConfigurationError) as refusal:
            refused()
        assert KEY_ID in refusal.value.detail
        assert OTHER_ID in refusal.value.detail
        assert OTHER_KEY not in refusal.value.detail
    _set(monkeypatch, ENCRYPTION_KEY=KEY)
    get_setup_service().open()
    assert dump() == before


def test_a_new_key_beside_the_old_one_is_taken_and_both_are_needed_from_then(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    _set(monkeypatch, ENCRYPTION_KEY=OTHER_KEY, ENCRYPTION_KEYS_PREVIOUS=KEY)
    get_setup_service().prepare()
    with session_scope(read_only=True) as session:
        keys = {row.key_id: row.is_primary for row in session.scalars(select(EncryptionKey))}
        assert keys == {KEY_ID: False, OTHER_ID: True}
    assert get_auth_service().sign_in(ADMIN, PASSWORD)
    _set(monkeypatch, ENCRYPTION_KEY=KEY, ENCRYPTION_KEYS_PREVIOUS=None)
    with pytest.raises(ConfigurationError, match=OTHER_ID):
        get_setup_service().open()


def test_no_key_is_made_where_a_database_needs_one(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = dump()
    _set(monkeypatch, ENCRYPTION_KEY=None)
    for refused in (get_setup_service().prepare, get_setup_service().open):
        with pytest.raises(ConfigurationError, match=KEY_ID):
            refused()
    assert not (service.folder / "encryption.key").exists()
    assert dump() == before


def test_no_key_is_made_where_backups_need_one(
    sqlite_service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    get_backup_service().create(COMMAND_LINE)
    _move_to_new_machine(sqlite_service, tmp_path, monkeypatch)
    with pytest.raises(ConfigurationError, match=KEY_ID):
        get_setup_service().prepare()
    assert not (tmp_path / "new" / "encryption.key").exists()
    _set(monkeypatch, ENCRYPTION_KEY=KEY)
    assert get_setup_service().prepare().migrated


def test_no_key_is_made_where_promises_need_one(
    sqlite_service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with session_scope() as session:
        now = session.scalars(select(User)).one().created_at
        ref = reference_to(session, uuid4())
        get_ledger_service().enter(session, LedgerKind.ERASE, ref, COMMAND_LINE, at=now)
    _move_to_new_machine(sqlite_service, tmp_path, monkeypatch)
    with pytest.raises(ConfigurationError):
        get_setup_service().prepare()
    assert not (tmp_path / "new" / "encryption.key").exists()


def _move_to_new_machine(service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that is left is the folder of backups."""
    shutil.copytree(service.folder / "backups", tmp_path / "backups")
    _set(
        monkeypatch,
        DATA_DIR=tmp_path / "new",
        BACKUP_URL=tmp_path / "backups",
        ENCRYPTION_KEY=None,
    )


def test_production_without_a_key_or_a_secret_refuses_and_makes_nothing(
    new: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for given, missing in (
        ({"JWT_SECRET_KEY": JWT_SECRET}, "ENCRYPTION_KEY"),
        ({"ENCRYPTION_KEY": KEY}, "JWT_SECRET_KEY"),
    ):
        names = ("ENCRYPTION_KEY", "JWT_SECRET_KEY")
        _set(monkeypatch, APP_ENV="production", **{name: given.get(name) for name in names})
        with pytest.raises(ConfigurationError, match=missing):
            get_setup_service().prepare()
        assert _files(new) == {}
    _set(monkeypatch, JWT_SECRET_KEY=JWT_SECRET)
    assert get_setup_service().prepare().admin is not None
    # Beside the first checkpoint of the audit trail.
    made = {name for name in _files(new) if not name.startswith("backups/audit-")}
    assert made == {"holdfast.db", "backup.lock"}


def test_a_newer_database_is_refused_and_left_as_it_is(service: Service) -> None:
    with get_engine().begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    before = dump()
    for refused in (get_setup_service().prepare, get_setup_service().open):
        with pytest.raises(ConfigurationError, match="9999"):
            refused()
    assert dump() == before


def test_opening_refuses_a_missing_database_and_makes_nothing(new: Path) -> None:
    with pytest.raises(ConfigurationError, match="init"):
        get_setup_service().open()
    assert not new.exists()


def test_opening_refuses_a_database_without_a_schema(new: Path) -> None:
    new.mkdir()
    (new / "holdfast.db").touch(mode=0o600)
    with pytest.raises(ConfigurationError, match="init"):
        get_setup_service().open()
    assert inspect(get_engine()).get_table_names() == []
    assert not (new / "encryption.key").exists()
