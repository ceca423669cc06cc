"""Rotation: everything moves to the new key, beside writers, after a kill, and by two at once."""

import re
import threading
from datetime import UTC, datetime
from uuid import UUID, uuid4

import pytest
from sqlalchemy import Engine, Text, select, text, type_coerce, update
from sqlalchemy.orm import Session

from backend.backup.storage import LocalStore
from backend.crypto import keyring
from backend.crypto.keyring import RootKey, parse_key
from backend.db_utils import get_engine, session_scope
from backend.errors import (
    ConfigurationError,
    ConflictError,
    KeyDisabledError,
    NotFoundError,
    TamperedError,
)
from backend.models import DATA_MAP, EncryptionKey, LedgerEntry, LedgerKind, User
from backend.models.people import BLIND_INDEXES, EMAIL_INDEX
from backend.privacy.declarations import EraseMode
from backend.services import cells, rotation_service
from backend.services.archive_service import exclusive, get_archive_service
from backend.services.audit_service import COMMAND_LINE
from backend.services.backup_service import get_backup_service
from backend.services.catalogue_service import get_catalogue_service
from backend.services.compliance_service import get_compliance_service
from backend.services.encryption_service import get_encryption_service
from backend.services.key_use_service import KeyUse, get_key_use_service
from backend.services.ledger_service import get_ledger_service
from backend.services.pruning_service import get_pruning_service
from backend.services.reference_service import reference_to
from backend.services.restore_service import get_restore_service
from backend.services.rotation_service import Rotated, get_rotation_service
from backend.services.setup_service import get_setup_service
from tests.conftest import ADMIN, KEY, OTHER_KEY, Service, clear_caches
from tests.privacy.people import cells_in_plain, plant

OLD_ID, NEW_ID = (RootKey(parse_key(key)).key_id.hex() for key in (KEY, OTHER_KEY))


def configure(monkeypatch: pytest.MonkeyPatch, primary: str, previous: str = "") -> None:
    """Start again with these keys."""
    monkeypatch.setenv("ENCRYPTION_KEY", primary)
    monkeypatch.setenv("ENCRYPTION_KEYS_PREVIOUS", previous)
    clear_caches()
    get_setup_service().open()


def rotate() -> Rotated:
    return get_rotation_service().rotate(COMMAND_LINE)


def kept() -> set[str]:
    """Every cell in plain, but index terms and digests of backups, which a rotation changes."""
    return {
        cell for cell in cells_in_plain()
        if not cell.startswith("bi1.") and not re.fullmatch("[0-9a-f]{64}", cell)
    }  # fmt: skip


def use_of(key_id: str) -> KeyUse:
    with session_scope(read_only=True) as session:
        return get_key_use_service().uses(session)[key_id]


def test_everything_moves_to_the_new_key_and_the_old_one_can_go(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    person, gone = plant("A"), plant("B")
    with session_scope() as session:
        get_compliance_service().erase(
            session, COMMAND_LINE, gone.id, EraseMode.DELETE, reason="art. 17", dry_run=False
        )
    backup_id = get_backup_service().create(COMMAND_LINE).id
    before = kept()
    old = use_of(OLD_ID)
    assert old.backups == old.ledger == 1
    assert old.terms["users.email_index"] == 2
    assert old.columns["data_consents.evidence"] > 0

    configure(monkeypatch, OTHER_KEY, KEY)
    with pytest.raises(ConflictError, match="still protects"):
        get_rotation_service().disable(OLD_ID, COMMAND_LINE)
    told: list[tuple[int, int]] = []
    done = get_rotation_service().rotate(COMMAND_LINE, lambda seen, of: told.append((seen, of)))
    assert done.finished
    assert done.failed == {}
    assert done.changed["users.email_index"] == 2
    assert done.changed["backups"] == done.changed["ledger"] == 1
    # Telephones, and the addresses of whom others name, are searched too.
    terms = {f"{one.index_column.table.name}.{one.index_column.name}" for one in BLIND_INDEXES}
    assert terms <= done.changed.keys()
    cells = done.changed.keys() - terms - {"backups", "ledger"}
    assert told[-1][0] == told[-1][1] == sum(done.changed[name] for name in cells)
    assert use_of(OLD_ID).total == 0
    assert use_of(NEW_ID).columns.keys() == old.columns.keys()
    assert person.texts() <= cells_in_plain()
    assert before - kept() == set()
    assert rotate().changed == {}

    get_rotation_service().disable(OLD_ID, COMMAND_LINE)
    configure(monkeypatch, OTHER_KEY)
    assert person.texts() <= cells_in_plain()
    get_backup_service().verify(backup_id, COMMAND_LINE)
    get_restore_service().restore(backup_id, COMMAND_LINE, dry_run=False, confirm=True)
    with session_scope(read_only=True) as session:
        assert session.get(User, gone.id) is None
        assert session.get_one(User, person.id).email in person.texts()


def test_people_sign_in_before_during_and_after(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    def found() -> bool:
        with session_scope(read_only=True) as session:
            terms = EMAIL_INDEX.terms(ADMIN.upper())
            return session.scalar(select(User).where(User.email_index.in_(terms))) is not None

    assert found()
    configure(monkeypatch, OTHER_KEY, KEY)
    assert found()
    rotate()
    with pytest.raises(ConfigurationError, match=OLD_ID):
        configure(monkeypatch, OTHER_KEY)
    configure(monkeypatch, OTHER_KEY, KEY)
    get_rotation_service().disable(OLD_ID, COMMAND_LINE)
    configure(monkeypatch, OTHER_KEY)
    assert found()


def test_a_value_that_a_writer_changes_meanwhile_is_kept(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    person = plant("A")
    configure(monkeypatch, OTHER_KEY, KEY)
    carry_out = cells.swap

    def after_a_writer(
        engine: Engine | None, statement: object, changes: list[dict[str, object]]
    ) -> int:
        if any("old" in change and change["row"] == person.id for change in changes):
            with session_scope() as session:
                session.execute(update(User).where(User.id == person.id).values(city="newer"))
        return carry_out(engine, statement, changes)

    monkeypatch.setattr(rotation_service, "swap", after_a_writer)
    assert rotate().finished
    with session_scope(read_only=True) as session:
        assert session.get_one(User, person.id).city == "newer"


def test_two_at_once_do_each_other_no_harm(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    people = [plant(letter) for letter in "AB"]
    get_backup_service().create(COMMAND_LINE)
    before = kept()
    configure(monkeypatch, OTHER_KEY, KEY)
    raised: list[BaseException] = []

    def run() -> None:
        try:
            rotate()
        except BaseException as err:  # noqa: BLE001 - looked at by the test
            raised.append(err)

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert raised == []
    assert rotate().finished
    assert before - kept() == set()
    assert all(person.texts() <= cells_in_plain() for person in people)


def test_a_run_that_was_cut_short_is_gone_on_with(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant("A")
    before = kept()
    configure(monkeypatch, OTHER_KEY, KEY)
    monkeypatch.setattr(cells, "BATCH", 1)

    def cut(seen: int, _of: int) -> None:
        if seen == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        get_rotation_service().rotate(COMMAND_LINE, cut)
    assert use_of(OLD_ID).total > 0
    assert sum(use_of(NEW_ID).columns.values()) >= 5
    assert rotate().finished
    assert before - kept() == set()


def test_a_cell_that_does_not_open_is_left_and_told(
    sqlite_service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    person = plant("A")
    with session_scope() as session:
        session.execute(
            text("UPDATE users SET city = substr(city, 1, 60) || 'AAAA' WHERE id = :i"),
            {"i": person.id},
        )
    configure(monkeypatch, OTHER_KEY, KEY)
    done = rotate()
    assert done.failed == {"users.city": 1}
    assert not done.finished
    assert done.left[OLD_ID].columns == {"users.city": 1}
    with pytest.raises(ConflictError, match="1 values"):
        get_rotation_service().disable(OLD_ID, COMMAND_LINE)


def test_an_address_that_does_not_open_is_left_with_its_term_and_told(
    sqlite_service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    person = plant("A")
    with session_scope() as session:
        session.execute(
            text("UPDATE users SET email = substr(email, 1, 60) || 'AAAA' WHERE id = :i"),
            {"i": person.id},
        )
    configure(monkeypatch, OTHER_KEY, KEY)
    done = rotate()
    assert done.failed == {"users.email": 1, "users.email_index": 1}
    assert done.changed["users.email_index"] == 1
    assert not done.finished


def test_the_object_of_an_act_under_way_is_left_to_it(
    sqlite_service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = get_ledger_service()
    with Session(get_engine()) as session:
        # Never committed, as if its process were still at it.
        ref = reference_to(session, uuid4())
        ledger.enter(session, LedgerKind.ERASE, ref, COMMAND_LINE, at=datetime.now(UTC))
    configure(monkeypatch, OTHER_KEY, KEY)
    assert "ledger" not in rotate().changed
    assert use_of(OLD_ID).ledger == 1
    get_setup_service().prepare()
    assert rotate().changed["ledger"] == 1


def test_a_disabled_key_opens_nothing_and_cannot_come_back(
    sqlite_service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = get_encryption_service().encrypt("kept by the caller")
    configure(monkeypatch, OTHER_KEY, KEY)
    assert get_encryption_service().decrypt(token) == "kept by the caller"
    rotate()
    get_rotation_service().disable(OLD_ID, COMMAND_LINE)
    for _ in range(2):
        with pytest.raises(KeyDisabledError):
            get_encryption_service().decrypt(token)
        configure(monkeypatch, OTHER_KEY, KEY)
    with pytest.raises(ConfigurationError, match="was disabled"):
        configure(monkeypatch, KEY, OTHER_KEY)


def test_what_may_not_be_disabled_is_refused(sqlite_service: Service) -> None:
    with pytest.raises(ConflictError, match="primary"):
        get_rotation_service().disable(OLD_ID, COMMAND_LINE)
    with pytest.raises(NotFoundError):
        get_rotation_service().disable("00000000", COMMAND_LINE)
    with session_scope(read_only=True) as session:
        assert set(session.scalars(select(EncryptionKey.disabled_at))) == {None}


def test_a_rewrap_that_was_cut_short_is_finished_or_dropped(
    sqlite_service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    backup_id = get_backup_service().create(COMMAND_LINE).id
    configure(monkeypatch, OTHER_KEY, KEY)
    replace = LocalStore.replace
    # Before the header is replaced, and between it and the manifest.
    for whole_ones in (0, 1):
        replaced: list[str] = []

        def dying(
            self: LocalStore, name: str, data: bytes, *,
            replaced: list[str] = replaced, whole_ones: int = whole_ones,
        ) -> None:  # fmt: skip
            if len(replaced) == whole_ones:
                raise KeyboardInterrupt
            replaced.append(name)
            replace(self, name, data)

        with monkeypatch.context() as patch:
            patch.setattr(LocalStore, "replace", dying)
            with pytest.raises(KeyboardInterrupt):
                get_archive_service().rewrap(backup_id)
        assert replaced == [f"{backup_id}.key"] * whole_ones
        # It opens as it is, and counts as one that still needs the old key.
        get_backup_service().verify(backup_id, COMMAND_LINE)
        assert use_of(OLD_ID).backups == 1
    assert rotate().finished
    assert use_of(OLD_ID).total == 0
    get_rotation_service().disable(OLD_ID, COMMAND_LINE)
    configure(monkeypatch, OTHER_KEY)
    get_backup_service().verify(backup_id, COMMAND_LINE)


def test_only_the_header_and_the_manifest_of_a_backup_change(
    sqlite_service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = (get_backup_service().create(COMMAND_LINE).id for _ in range(2))
    folder = sqlite_service.folder / "backups"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    chained = get_archive_service().manifest(second)
    configure(monkeypatch, OTHER_KEY, KEY)
    assert rotate().changed["backups"] == 2
    after = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert {name for name in after if after[name] != before.get(name)} == {
        f"{backup_id}.{part}" for backup_id in (first, second) for part in ("key", "manifest.json")
    }
    # What is linked stays linked, though every signature is another.
    assert get_archive_service().manifest(second).link == chained.link
    with session_scope(read_only=True) as session:
        assert get_catalogue_service().breaks(session) == []


def test_a_deleted_backup_is_known_as_deleted_by_the_new_key_alone(
    sqlite_service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, _second = (get_backup_service().create(COMMAND_LINE).id for _ in range(2))
    get_pruning_service().delete(first, COMMAND_LINE)
    configure(monkeypatch, OTHER_KEY, KEY)
    rotate()
    get_rotation_service().disable(OLD_ID, COMMAND_LINE)
    configure(monkeypatch, OTHER_KEY)
    with session_scope(read_only=True) as session:
        assert get_catalogue_service().breaks(session) == []


def test_rotating_beside_a_backup_leaves_backups_for_later(
    sqlite_service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    backup_id = get_backup_service().create(COMMAND_LINE).id
    configure(monkeypatch, OTHER_KEY, KEY)
    with exclusive():
        done = rotate()
    assert (done.failed, done.finished) == ({"backups": 1}, False)
    assert rotate().finished
    get_backup_service().verify(backup_id, COMMAND_LINE)


def test_a_value_moved_to_another_row_does_not_open_where_it_is_bound(service: Service) -> None:
    plant("A"), plant("B")
    consents = DATA_MAP["data_consents"].table
    raw = type_coerce(consents.c.evidence, Text)
    with session_scope() as session:
        (one, token), (other, _) = session.execute(
            select(consents.c.id, raw).where(raw.is_not(None)).limit(2)
        ).all()
        session.execute(
            update(consents).where(consents.c.id == other).values(evidence=type_coerce(token, Text))
        )
    assert isinstance(one, UUID)
    moved = select(consents.c.evidence).where(consents.c.id == other)
    with session_scope(read_only=True) as session, pytest.raises(TamperedError):
        session.scalars(moved).one()


def test_the_ledger_still_finds_its_people_after_a_rotation(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    person = plant("A")
    backup_id = get_backup_service().create(COMMAND_LINE).id
    with session_scope() as session:
        get_compliance_service().erase(
            session, COMMAND_LINE, person.id, EraseMode.DELETE, reason="art. 17", dry_run=False
        )
    configure(monkeypatch, OTHER_KEY, KEY)
    assert rotate().finished
    get_rotation_service().disable(OLD_ID, COMMAND_LINE)
    configure(monkeypatch, OTHER_KEY)
    restored = get_restore_service().restore(backup_id, COMMAND_LINE, dry_run=False, confirm=True)
    assert restored.reapplied.erasures == 1
    with session_scope(read_only=True) as session:
        assert session.get(User, person.id) is None
        assert session.scalars(select(LedgerEntry)).one()
    assert keyring.current().primary.key_id.hex() == NEW_ID
