"""A backup that is not what it was is refused with its code, and the live database is as before."""

import hashlib
import json
import os
import secrets
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from uuid import UUID, uuid4

import pytest
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import text

from backend.backup.archive import write_manifest
from backend.backup.storage import LocalStore
from backend.db_utils import get_engine, session_scope
from backend.errors import HoldfastError
from backend.models import BackupRecord, Feedback
from backend.services.archive_service import get_archive_service, live_database, signer
from backend.services.audit_service import COMMAND_LINE
from backend.services.backup_service import get_backup_service
from backend.services.catalogue_service import get_catalogue_service
from backend.services.encryption_service import get_encryption_service
from backend.services.pruning_service import get_pruning_service
from backend.services.restore_service import get_restore_service
from backend.services.schema_service import get_schema_service
from backend.services.setup_service import get_setup_service
from tests.conftest import KEY, OTHER_KEY, Service, clear_caches
from tests.privacy.people import dump, plant

Damage = Callable[[Path], None]
# Whatever layer notices it first.
NOTICED = {"backup_damaged", "tampered", "malformed_token", "unknown_key", "crypto_error"}


def _create() -> UUID:
    return get_backup_service().create(COMMAND_LINE).id


def _archive(service: Service, backup_id: UUID) -> Path:
    return service.folder / "backups" / f"{backup_id}.hfb"


def _manifest(service: Service, backup_id: UUID) -> Path:
    return service.folder / "backups" / f"{backup_id}.manifest.json"


def _digest() -> str:
    """One digest over every row of every table."""
    return hashlib.sha256(repr(sorted(dump().items())).encode()).hexdigest()


def _refused(service: Service, backup_id: UUID) -> str:
    """Try to prove and to restore; return the code of the refusal."""
    before, files = _digest(), sorted(service.folder.rglob("*"))
    codes = set()
    for dry_run in (False, True):
        with pytest.raises(HoldfastError) as refusal:
            get_restore_service().restore(
                backup_id, COMMAND_LINE, dry_run=dry_run, confirm=not dry_run
            )
        codes.add(refusal.value.code)
    assert _digest() == before
    assert sorted(service.folder.rglob("*")) == files
    assert live_database().sweep() == 0
    (code,) = codes
    return code


def _truncate(to: int) -> Damage:
    def damage(path: Path) -> None:
        os.truncate(path, to if to >= 0 else path.stat().st_size + to)

    return damage


def _extend(more: bytes) -> Damage:
    def damage(path: Path) -> None:
        path.write_bytes(path.read_bytes() + more)

    return damage


def _noise(path: Path) -> None:
    path.write_bytes(os.urandom(path.stat().st_size))


def _remove_middle(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:8192] + data[8193:])


def _swap_chunks(path: Path) -> None:
    """Two sealed chunks of 16 KiB change places, tags and all."""
    data = path.read_bytes()
    size = 16 * 1024 + 16
    first, second = 4096 + size, 4096 + 2 * size
    assert len(data) > second + size
    path.write_bytes(
        data[:first] + data[second : second + size] + data[first:second] + data[second + size :]
    )


@pytest.mark.parametrize(
    "damage",
    [
        _truncate(0),
        _truncate(4095),
        _truncate(4096),
        _truncate(9000),
        _truncate(-1),
        _extend(b"\x00"),
        _extend(b"\x00" * 20_000),
        _remove_middle,
        _swap_chunks,
        _noise,
    ],
    ids=["emptied", "in header", "header", "payload", "one byte", "longer", "chunk", "hole",
         "swapped chunks", "noise"],
)  # fmt: skip
def test_an_archive_that_was_cut_or_changed_is_refused(
    sqlite_service: Service, damage: Damage
) -> None:
    # Random text, so that some chunks are left after compression.
    words = secrets.token_hex(80_000)
    sqlite_service.add(Feedback(rating=1, submitted_at=datetime.now(UTC), comment=words))
    backup_id = _create()
    damage(_archive(sqlite_service, backup_id))
    assert _refused(sqlite_service, backup_id) in NOTICED


@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), in_header=st.booleans())
def test_no_bit_of_an_archive_can_be_flipped(
    sqlite_service: Service, where: float, bit: int, in_header: bool
) -> None:
    (record,) = _listed() or [get_backup_service().create(COMMAND_LINE)]
    path = _archive(sqlite_service, record.id)
    whole = path.read_bytes()
    # Half of the flips in the first 400 bytes: the parts of the header that are not zeros.
    at = int(where * (400 if in_header else len(whole)))
    path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << bit]) + whole[at + 1 :])
    try:
        before = _digest()
        with pytest.raises(HoldfastError) as refusal:
            get_restore_service().restore(record.id, COMMAND_LINE, dry_run=False, confirm=True)
        assert refusal.value.code in NOTICED
        assert _digest() == before
    finally:
        path.write_bytes(whole)


def _listed() -> list[BackupRecord]:
    with session_scope(read_only=True) as session:
        return get_catalogue_service().records(session)


def test_a_damaged_backup_is_answered_as_damaged_and_not_as_a_fault_of_the_server(
    client: TestClient, service: Service, admin: dict[str, str]
) -> None:
    backup_id = client.post("/security/backup/create", headers=admin).json()["id"]
    path = _archive(service, UUID(backup_id))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    for answer in (
        client.post(f"/security/backup/{backup_id}/verify", headers=admin),
        client.post(
            "/security/backup/restore",
            json={"backup_id": backup_id, "confirm": True},
            headers=admin,
        ),
    ):
        assert (answer.status_code, answer.json()["code"]) == (422, "backup_damaged")
    assert client.get("/security/data/consent/1", headers=admin).status_code == 200


def test_a_damaged_backup_neither_passes_verification_nor_restores(service: Service) -> None:
    plant("A")
    backup_id = _create()
    get_backup_service().verify(backup_id, COMMAND_LINE)
    for damage in (_truncate(-1), _truncate(9000)):
        damage(_archive(service, backup_id))
        with pytest.raises(HoldfastError):
            get_backup_service().verify(backup_id, COMMAND_LINE)
        assert _refused(service, backup_id) in NOTICED


def test_a_backup_under_another_ones_manifest_is_refused(sqlite_service: Service) -> None:
    first = _create()
    plant("A")
    second = _create()
    one, other = _manifest(sqlite_service, first), _manifest(sqlite_service, second)
    whole = one.read_bytes()
    one.write_bytes(other.read_bytes())
    assert _refused(sqlite_service, first) == "backup_damaged"
    one.write_bytes(whole)
    _archive(sqlite_service, first).write_bytes(_archive(sqlite_service, second).read_bytes())
    assert _refused(sqlite_service, first) == "backup_damaged"


def test_a_manifest_that_tells_another_story_is_refused(sqlite_service: Service) -> None:
    backup_id = _create()
    path = _manifest(sqlite_service, backup_id)
    document = json.loads(path.read_bytes())
    document["manifest"]["tables"]["users"] += 1
    path.write_text(json.dumps(document))
    assert _refused(sqlite_service, backup_id) == "backup_damaged"


def test_rows_that_the_manifest_does_not_count_are_refused(service: Service) -> None:
    """Also where both are ours: a dump tool that left rows out must not pass."""
    backup_id = _create()
    store = LocalStore(str(service.folder / "backups"))
    manifest = get_archive_service().manifest(backup_id)
    store.delete(f"{backup_id}.manifest.json")
    tables = manifest.tables | {"users": manifest.tables["users"] + 1}
    write_manifest(store, replace(manifest, tables=tables), signer(manifest.key_id))
    assert _refused(service, backup_id) == "backup_damaged"


def test_a_backup_without_its_archive_is_not_found(sqlite_service: Service) -> None:
    backup_id = _create()
    _archive(sqlite_service, backup_id).unlink()
    assert _refused(sqlite_service, backup_id) == "not_found"
    assert _refused(sqlite_service, uuid4()) == "not_found"


def test_a_backup_of_another_key_opens_only_while_that_key_is_configured(
    sqlite_service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    backup_id = _create()
    key_id = get_archive_service().manifest(backup_id).key_id
    monkeypatch.setenv("ENCRYPTION_KEY", OTHER_KEY)
    monkeypatch.setenv("ENCRYPTION_KEYS_PREVIOUS", KEY)
    clear_caches()
    get_setup_service().open()
    get_restore_service().restore(backup_id, COMMAND_LINE, dry_run=False, confirm=True)
    sealed_anew = _create()
    assert get_archive_service().manifest(sealed_anew).key_id != key_id
    monkeypatch.setenv("ENCRYPTION_KEY", KEY)
    monkeypatch.delenv("ENCRYPTION_KEYS_PREVIOUS")
    clear_caches()
    get_encryption_service().load()
    assert _refused(sqlite_service, sealed_anew) == "unknown_key"


def test_a_backup_of_a_newer_schema_is_refused(service: Service) -> None:
    _stamp("9999")
    newer = _create()
    _stamp(get_schema_service().wanted)
    assert _refused(service, newer) == "schema_mismatch"


def _stamp(revision: str) -> None:
    with get_engine().begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = :r"), {"r": revision})


def test_a_backup_of_the_other_engine_is_refused(sqlite_service: Service) -> None:
    backup_id = _create()
    store = LocalStore(str(sqlite_service.folder / "backups"))
    manifest = get_archive_service().manifest(backup_id)
    store.delete(f"{backup_id}.manifest.json")
    write_manifest(store, replace(manifest, engine="postgresql"), signer(manifest.key_id))
    assert _refused(sqlite_service, backup_id) == "schema_mismatch"


def test_a_damaged_manifest_does_not_keep_the_next_backup_from_being_made(
    sqlite_service: Service,
) -> None:
    damaged = _create()
    path = sqlite_service.folder / "backups" / f"{damaged}.manifest.json"
    path.write_bytes(path.read_bytes().replace(b'"size_bytes": ', b'"size_bytes": 1'))
    assert _create()


def test_a_damaged_backup_can_be_deleted(sqlite_service: Service) -> None:
    damaged, whole = _create(), _create()
    (sqlite_service.folder / "backups" / f"{damaged}.manifest.json").write_text("{}")
    with session_scope() as session:
        get_pruning_service().delete(session, damaged, COMMAND_LINE)
    assert {path.name.split(".")[0] for path in (sqlite_service.folder / "backups").iterdir()} == {
        str(whole)
    }


def test_a_stray_file_in_the_store_hides_no_backup(sqlite_service: Service) -> None:
    record = _create()
    (sqlite_service.folder / "backups" / "copy-of-monday.manifest.json").write_text("{}")
    assert [listed.id for listed in _listed()] == [record]
    assert _create()
