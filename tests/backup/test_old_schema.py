"""A backup of an older schema is migrated; of a newer one, or another engine's, it is refused."""

from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from uuid import UUID, uuid4

import pytest
from alembic.config import main as alembic
from sqlalchemy import inspect

from backend.backup.manifest import (
    Manifest,
    archive_name,
    header_name,
    manifest_name,
    write_manifest,
)
from backend.crypto import keyring
from backend.crypto.files import Sealer
from backend.db_utils import get_engine, session_scope
from backend.errors import SchemaMismatchError
from backend.models import Role, User
from backend.models.people import PHONE_INDEX
from backend.services.archive_service import get_archive_service, live_database
from backend.services.encryption_service import get_encryption_service
from backend.services.schema_service import _ROOT, get_schema_service
from backend.services.store_service import addresses, signer, store
from backend.services.transfer_service import get_transfer_service
from tests.backup.promises import back_up, erase, is_there, restore, texts
from tests.conftest import Service
from tests.privacy.people import dump, plant, without


def _alembic(*arguments: str) -> None:
    alembic(["-c", str(_ROOT / "alembic.ini"), *arguments])


def _back_up_as_it_is() -> UUID:
    """Back up tables that today's models do not fit, as a version did that knew them."""
    backup_id, now, key_id = str(uuid4()), datetime.now(UTC), keyring.current().primary.key_id.hex()
    meta = {"kind": "backup", "backup": backup_id}
    sealer = Sealer(meta, [get_encryption_service().file_lock()], now=now)
    tables = [name for name in inspect(get_engine()).get_table_names() if name != "alembic_version"]
    with live_database().snapshot(tables) as snapshot:
        store().replace(header_name(backup_id), sealer.header)
        written = get_transfer_service().write(
            addresses()[0], archive_name(backup_id), snapshot.source, sealer.payload,
            size_bytes=snapshot.size_bytes, require_whole=snapshot.require_whole,
            report=lambda _done: None,
        )  # fmt: skip
    manifest = Manifest(
        backup_id, None, now.isoformat(), live_database().engine_name, snapshot.schema_revision,
        dict(snapshot.tables), written.plain_bytes, written.size_bytes, written.sha256, None,
        key_id=key_id, row_keys=[key_id],
    )  # fmt: skip
    write_manifest(store(), manifest, signer(key_id))
    return UUID(backup_id)


def test_a_backup_of_an_older_schema_is_migrated_and_keeps_every_promise(service: Service) -> None:
    jane, joe = plant("A"), plant("B")
    phone = "+49 30 1234567"
    tom = service.user("tom@example.com", phone=phone)
    _alembic("downgrade", "0001")
    backup_id = _back_up_as_it_is()
    _alembic("upgrade", "head")
    erase(jane.id)
    kept_by_law = texts() & jane.words()
    late = plant("C")
    tried = restore(backup_id, dry_run=True)
    assert tried.migrations == ["0002", "0003", "0004", "0005", "0006"]
    # Tables that the old version did not have.
    assert tried.emptied == ["billing_addresses", "companions"]
    done = restore(backup_id, confirm_empty=True)
    assert (done.migrations, done.tables) == (tried.migrations, tried.tables)
    get_schema_service().require_current(get_engine())
    _alembic("check")
    assert [is_there(person.id) for person in (jane, joe, late)] == [False, True, False]
    assert texts() & jane.words() <= kept_by_law
    assert texts() & late.words() == set()
    with session_scope(read_only=True) as session:
        # Computed for rows that are older than the index.
        assert session.get_one(User, tom).phone_index == PHONE_INDEX.term(phone)
    erase(tom)
    restore(back_up())
    assert not is_there(tom)


def _of_a_newer_version(manifest: Manifest) -> Manifest:
    return replace(manifest, schema_revision="9999")


def _of_another_engine(manifest: Manifest) -> Manifest:
    other = {"sqlite": "postgresql", "postgresql": "sqlite"}
    return replace(manifest, engine=other[manifest.engine])


@pytest.mark.parametrize("change", [_of_a_newer_version, _of_another_engine])
def test_what_does_not_fit_is_refused_and_nothing_is_changed(
    service: Service, change: Callable[[Manifest], Manifest]
) -> None:
    backup_id = back_up()
    manifest = change(get_archive_service().manifest(backup_id))
    document = manifest.document(signer(manifest.key_id))
    store().replace(manifest_name(manifest.id), document)
    service.user("jane@example.com", role=Role.USER)
    before = dump()
    for dry_run in (True, False):
        with pytest.raises(SchemaMismatchError):
            restore(backup_id, dry_run=dry_run, confirm_empty=True)
    assert without(dump(), {}, "audit_events") == without(before, {}, "audit_events")
    told = [row for row in dump()["audit_events"].values() if row["action"] == "restore"]
    assert [row["outcome"] for row in told] == ["schema_mismatch"] * 2
    assert live_database().sweep() == 0
