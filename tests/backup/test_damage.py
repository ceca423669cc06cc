"""A backup of which a byte was changed, cut or added is refused, and the live one is as before."""

import json
import os
import secrets
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final
from uuid import UUID

import pytest
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from backend.backup.manifest import header_name, manifest_name
from backend.models import Feedback
from backend.services import transfer_service
from backend.services.archive_service import get_archive_service
from tests.backup.refusals import (
    DAMAGED,
    Damage,
    code_of,
    create,
    damaged,
    digest_of_rows,
    error_of,
    listed,
    object_of,
    refused,
    restore,
    verify,
)
from tests.conftest import Run, Service
from tests.privacy.people import plant

Headers = dict[str, str]
# A sealed chunk of Cobblestone: 16 KiB and a tag.
CHUNK_BYTES: Final = 16 * 1024 + 16


def _cut(to: int) -> Damage:
    def damage(path: Path) -> None:
        os.truncate(path, to if to >= 0 else path.stat().st_size + to)

    return damage


def _append(more: bytes) -> Damage:
    def damage(path: Path) -> None:
        path.write_bytes(path.read_bytes() + more)

    return damage


def _flip(at: int, bit: int = 0) -> Damage:
    def damage(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[at] ^= 1 << bit
        path.write_bytes(data)

    return damage


def _noise(path: Path) -> None:
    path.write_bytes(os.urandom(path.stat().st_size))


def _make_hole(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:8192] + data[8193:])


def _swap_chunks(path: Path) -> None:
    """Two sealed chunks change places, tags and all."""
    data = path.read_bytes()
    first, second = CHUNK_BYTES, 2 * CHUNK_BYTES
    assert len(data) > second + CHUNK_BYTES
    path.write_bytes(
        data[:first]
        + data[second : second + CHUNK_BYTES]
        + data[first:second]
        + data[second + CHUNK_BYTES :]
    )


def _repeat_chunk(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: 2 * CHUNK_BYTES] + data[CHUNK_BYTES:])


@pytest.fixture
def large(sqlite_service: Service) -> UUID:
    """A backup of some 400 KiB: random text, so that compression leaves enough of it."""
    words = secrets.token_hex(400_000)
    sqlite_service.add(Feedback(rating=1, submitted_at=datetime.now(UTC), comment=words))
    return create()


@pytest.mark.parametrize(
    "damage",
    [
        _cut(0),
        _cut(4096),
        _cut(CHUNK_BYTES),
        _cut(-1),
        _append(b"\x00"),
        _append(b"\x00" * CHUNK_BYTES),
        _make_hole,
        _swap_chunks,
        _repeat_chunk,
        _noise,
    ],
    ids=["emptied", "cut", "cut between chunks", "cut by one byte", "longer", "chunk of zeros",
         "hole", "swapped chunks", "repeated chunk", "noise"],
)  # fmt: skip
def test_an_archive_that_was_cut_or_changed_is_refused(
    sqlite_service: Service, large: UUID, damage: Damage
) -> None:
    with damaged(object_of(sqlite_service, large), damage):
        assert refused(sqlite_service, large) == DAMAGED
    assert verify(large).error is None


def test_a_bit_flipped_in_any_64_kib_of_an_archive_is_noticed(
    sqlite_service: Service, large: UUID
) -> None:
    path = object_of(sqlite_service, large)
    size = path.stat().st_size
    assert size > 5 * 64 * 1024
    for at in [*range(0, size, 64 * 1024), size - 1]:
        with damaged(path, _flip(at, at % 8)):
            assert refused(sqlite_service, large) == DAMAGED, at
    restore(large)


def test_the_process_that_carries_notices_damage_as_well(
    sqlite_service: Service, large: UUID, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer_service, "SMALL_BYTES", 0)
    path = object_of(sqlite_service, large)
    manifest, before = get_archive_service().manifest(large), digest_of_rows()
    for damage in (_flip(200_000), _cut(-1), _swap_chunks):
        with damaged(path, damage):
            assert code_of(lambda: get_archive_service().read_through(manifest)) == DAMAGED
            assert code_of(lambda: restore(large)) == DAMAGED
    assert digest_of_rows() == before
    get_archive_service().read_through(manifest)


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), used=st.booleans())
def test_no_bit_of_a_header_can_be_flipped(
    sqlite_service: Service, where: float, bit: int, used: bool
) -> None:
    backup_id = listed()[0].id if listed() else create()
    path = object_of(sqlite_service, backup_id, header_name)
    # Half of the flips in the first 400 bytes: what follows is zeros.
    at = int(where * (400 if used else path.stat().st_size))
    with damaged(path, _flip(at, bit)):
        # In the id of the key it is told as needing one that is not there.
        assert code_of(lambda: restore(backup_id, dry_run=True)) in {DAMAGED, "unknown_key"}


@pytest.mark.parametrize(
    "damage", [_cut(0), _cut(-1), _flip(0), _flip(300), _flip(-1), _noise, Path.unlink],
    ids=["emptied", "cut", "first byte", "wrapped key", "last byte", "noise", "missing"],
)  # fmt: skip
def test_a_header_that_was_changed_or_lost_is_refused(
    sqlite_service: Service, damage: Damage
) -> None:
    backup_id = create()
    with damaged(object_of(sqlite_service, backup_id, header_name), damage):
        assert refused(sqlite_service, backup_id) == DAMAGED
    assert verify(backup_id).error is None


def test_a_header_with_more_behind_its_end_is_refused(sqlite_service: Service) -> None:
    backup_id = create()
    _append(b"\x00")(object_of(sqlite_service, backup_id, header_name))
    assert refused(sqlite_service, backup_id) == DAMAGED


def _set(*path: str, to: object) -> Damage:
    """Change one value of a manifest."""

    def damage(file: Path) -> None:
        document: Any = json.loads(file.read_bytes())
        place = document
        for name in path[:-1]:
            place = place[name]
        place[path[-1]] = to
        file.write_text(json.dumps(document))

    return damage


@pytest.mark.parametrize(
    "damage",
    [
        _cut(0),
        _cut(-1),
        _append(b"}"),
        _noise,
        _set("manifest", "tables", "users", to=0),
        _set("manifest", "sha256", to="0" * 64),
        _set("manifest", "plain_bytes", to=2**60),
        _set("manifest", "tables", to=[[1]]),
        _set("mac", to=""),
        lambda path: path.write_bytes(b"[" * 1_000_000),
        lambda path: os.truncate(path, 100 * 1024 * 1024),
    ],
    ids=["emptied", "cut", "longer", "noise", "rows", "digest", "size", "type",
         "unsigned", "deep", "100 MiB"],
)  # fmt: skip
def test_a_manifest_that_tells_another_story_is_refused(
    sqlite_service: Service, damage: Damage
) -> None:
    backup_id = create()
    with damaged(object_of(sqlite_service, backup_id, manifest_name), damage):
        assert refused(sqlite_service, backup_id, readable=False) == DAMAGED
    assert verify(backup_id).error is None


def test_a_damaged_backup_neither_passes_verification_nor_restores(service: Service) -> None:
    plant("A")
    backup_id = create()
    path = object_of(service, backup_id)
    for damage in (_flip(9000), _cut(-1)):
        with damaged(path, damage):
            assert refused(service, backup_id) == DAMAGED
    assert verify(backup_id).error is None


def test_a_damaged_backup_is_answered_as_damaged_and_not_as_a_fault_of_the_server(
    client: TestClient, service: Service, admin: Headers
) -> None:
    backup_id = client.post("/security/backup/create", headers=admin).json()["id"]
    body = {"backup_id": backup_id, "confirm": True}
    for name in (header_name, manifest_name):
        with damaged(object_of(service, UUID(backup_id), name), _flip(10)):
            for answer in (
                client.post("/security/backup/restore", json=body, headers=admin),
                client.post(f"/security/backup/{backup_id}/verify", headers=admin),
            ):
                assert (answer.status_code, answer.json()["code"]) == (422, DAMAGED)
                assert answer.headers["content-type"] == "application/problem+json"
                members = {"type", "title", "status", "detail", "code", "request_id"}
                assert answer.json().keys() == members
                words = ("/", "Error", "Traceback", "backend", "line", "Tag")
                assert [word for word in words if word in answer.json()["detail"]] == []
        one = client.get(f"/security/backup/{backup_id}", headers=admin).json()
        assert (one["error"], one["verified_at"]) == (DAMAGED, None)
    assert client.get("/security/data/consent/1", headers=admin).status_code == 200


def test_damage_that_a_restore_meets_is_in_the_record(sqlite_service: Service) -> None:
    backup_id = create()
    _cut(-1)(object_of(sqlite_service, backup_id))
    assert code_of(lambda: restore(backup_id, dry_run=True)) == DAMAGED
    assert error_of(backup_id) == DAMAGED


@pytest.mark.parametrize("act", [("verify",), ("restore", "--confirm")], ids=["verify", "restore"])
def test_the_command_line_says_in_one_line_what_is_wrong(
    sqlite_service: Service, run: Run, act: tuple[str, ...]
) -> None:
    backup_id = create()
    before = digest_of_rows()
    _flip(-1)(object_of(sqlite_service, backup_id))
    command, *options = act
    answer = run("backup", command, str(backup_id), *options)
    assert answer.code == 2
    assert answer.err.splitlines()[-1].startswith("holdfast: the backup is damaged")
    assert (answer.out, "Traceback" in answer.err) == ("", False)
    assert digest_of_rows() == before
