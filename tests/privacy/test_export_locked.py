"""An export as an AES zip: 7-Zip opens it with the passphrase, and nobody without."""

import importlib.util
import io
import json
import shutil
import struct
import subprocess
import tracemalloc
import zipfile
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import pyzipper  # type: ignore[import-untyped] # It ships no types.
from fastapi.testclient import TestClient
from sqlalchemy import insert, select

from backend.db_utils import session_scope
from backend.errors import RefusedError
from backend.models import DATA_MAP, AuditEvent, Feedback
from backend.privacy.export import ExportContainer, ExportFormat
from backend.services.compliance_service import get_compliance_service
from tests.conftest import Service
from tests.privacy.people import ADMINISTRATOR, plant
from tests.privacy.test_export import is_shown

PASSPHRASE = "correct horse battery & staple"
LOCKED = {"format": "zip", "encrypt": True, "passphrase": PASSPHRASE, "container": "zip"}


def export(user_id: int, passphrase: str | None = PASSPHRASE) -> bytes:
    """A locked export; without a passphrase the plain zip."""
    container = ExportContainer.ZIP if passphrase else ExportContainer.HOLDFAST
    with session_scope() as session:
        chunks = get_compliance_service().export(
            session, ADMINISTRATOR, user_id, ExportFormat.ZIP, encrypt=passphrase is not None,
            passphrase=passphrase, container=container,
        )  # fmt: skip
    return b"".join(chunks)


# Opened by a program that we did not write


@pytest.fixture(scope="session")
def seven_zip() -> Path:
    """7-Zip: of the machine first, else the package from PyPI."""
    for name in ("7zz", "7z", "7za"):
        if found := shutil.which(name):
            return Path(found)
    part = importlib.util.find_spec("p7z")
    programs = list(Path(part.origin).parent.rglob("7zz")) if part and part.origin else []
    if not programs:
        pytest.skip("no 7-Zip on this machine: see requirements-parts.txt")
    return programs[0]


def run(program: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [program, *arguments], capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL
    )


def extract(program: Path, file: Path, to: Path, passphrase: str) -> tuple[int, dict[str, bytes]]:
    """Extract with 7-Zip: its exit code, and what it has written."""
    answer = run(program, "x", "-y", f"-p{passphrase}", f"-o{to}", file)
    files = [path for path in to.rglob("*") if path.is_file()]
    return answer.returncode, {p.relative_to(to).as_posix(): p.read_bytes() for p in files}


def plain_files(data: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_seven_zip_opens_the_export_with_its_passphrase_and_no_other(
    client: TestClient, admin: dict[str, str], tmp_path: Path, seven_zip: Path
) -> None:
    person = plant("A")
    body = LOCKED | {"user_id": person.id}
    answer = client.post("/security/data/export", json=body, headers=admin)
    assert answer.headers["content-type"] == "application/zip"
    assert answer.headers["content-disposition"] == 'attachment; filename="export.zip"'
    file = tmp_path / "export.zip"
    file.write_bytes(answer.content)
    code, files = extract(seven_zip, file, tmp_path / "right", PASSPHRASE)
    assert code == 0
    expected = plain_files(export(person.id, None))
    assert files.keys() == expected.keys()
    for name in expected:
        if name.startswith("tables/"):
            assert files[name] == expected[name]
    document = json.loads(files["export.json"])
    assert document["data"] == json.loads(expected["export.json"])["data"]
    page = files["index.html"].decode()
    told = {mark.text for mark in person.marks if is_shown(mark)}
    assert {text for text in told if text not in page} == set()
    for number, wrong in enumerate(("", PASSPHRASE + "s", PASSPHRASE[:-1], PASSPHRASE.upper())):
        code, files = extract(seven_zip, file, tmp_path / f"wrong{number}", wrong)
        assert code != 0
        assert b"".join(files.values()) == b""


def test_the_longest_passphrase_and_every_sign_of_ascii_open_with_seven_zip(
    sqlite_service: Service, tmp_path: Path, seven_zip: Path
) -> None:
    signs = "".join(map(chr, range(32, 127)))
    for number, passphrase in enumerate((signs, "x" * 99)):
        file = tmp_path / f"{number}.zip"
        file.write_bytes(export(1, passphrase))
        assert run(seven_zip, "t", f"-p{passphrase}", file).returncode == 0


def test_seven_zip_refuses_a_file_with_one_changed_byte_or_a_cut_end(
    sqlite_service: Service, tmp_path: Path, seven_zip: Path
) -> None:
    whole = export(plant("A").id)
    member = next(m for m in shown(whole) if m.name == "export.json")
    file = tmp_path / "export.zip"
    file.write_bytes(whole)
    assert run(seven_zip, "t", f"-p{PASSPHRASE}", file).returncode == 0
    # The salt, the first and last byte of the content, and its seal.
    for place in (member.start, member.start + 18, member.end - 11, member.end - 1):
        changed = bytearray(whole)
        changed[place] ^= 1
        file.write_bytes(changed)
        assert run(seven_zip, "t", f"-p{PASSPHRASE}", file).returncode != 0, place
    for length in (len(whole) - 1, len(whole) // 2, member.start + 100):
        file.write_bytes(whole[:length])
        assert run(seven_zip, "t", f"-p{PASSPHRASE}", file).returncode != 0, length


# Opened by the library that wrote it


@dataclass(frozen=True)
class Shown:
    """A file in a zip as anybody sees it, and where its content lies."""

    name: str
    info: zipfile.ZipInfo
    local_crc: int
    late_crc: int
    start: int
    end: int


def shown(data: bytes) -> list[Shown]:
    found = []
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        for info in archive.infolist():
            (crc,) = struct.unpack_from("<I", data, info.header_offset + 14)
            name_bytes, extra_bytes = struct.unpack_from("<HH", data, info.header_offset + 26)
            start = info.header_offset + 30 + name_bytes + extra_bytes
            end = start + info.compress_size
            # What was not known when the file began comes after it: a mark, then the CRC.
            assert data[end : end + 4] == b"PK\x07\x08"
            (late_crc,) = struct.unpack_from("<I", data, end + 4)
            found.append(Shown(info.filename, info, crc, late_crc, start, end))
    return found


def locked_files(data: bytes, passphrase: str = PASSPHRASE) -> dict[str, bytes]:
    with pyzipper.AESZipFile(io.BytesIO(data)) as archive:
        archive.setpassword(passphrase.encode())
        return {name: archive.read(name) for name in archive.namelist()}


def test_the_library_reads_back_what_it_wrote_and_each_member_has_a_salt_of_its_own(
    service: Service,
) -> None:
    person = plant("A")
    first, second = export(person.id), export(person.id)
    files, expected = locked_files(first), plain_files(export(person.id, None))
    assert list(files) == list(expected)
    for name in expected:
        if name.startswith("tables/"):
            assert files[name] == expected[name]
    document = json.loads(files["export.json"])
    assert document["data"] == json.loads(expected["export.json"])["data"]
    with pytest.raises(RuntimeError, match="Bad password"):
        locked_files(first, PASSPHRASE + "s")
    salts = {data[m.start : m.start + 16] for data in (first, second) for m in shown(data)}
    assert len(salts) == 2 * len(files)


def test_what_is_readable_without_the_passphrase_says_nothing_of_the_person(
    service: Service,
) -> None:
    person, other = plant("A"), service.user("jane@example.com", full_name="Jane")
    locked = export(person.id)
    assert not [text for text in person.words() if text.encode() in locked]
    # The same names for everybody, also for one of whom nothing but the account is held.
    names = ["index.html", "export.json", *(f"tables/{t.name}.csv" for t in DATA_MAP.of_people)]
    assert [m.name for m in shown(locked)] == [m.name for m in shown(export(other))] == names
    for member in shown(locked):
        # AE-2 with 256 bits, and not even a sum of the plain text.
        assert member.info.compress_type == 99
        assert struct.pack("<HHH2sBH", 0x9901, 7, 2, b"AE", 3, 8) in member.info.extra
        assert member.info.CRC == member.local_crc == member.late_crc == 0
        assert member.info.comment == b""


# What is refused

REFUSED: list[tuple[str, dict[str, Any]]] = [
    ("refused", {"format": "json"}),
    ("refused", {"format": "csv"}),
    ("refused", {"encrypt": False}),
    ("refused", {"encrypt": False, "passphrase": None}),
    ("refused", {"passphrase": None}),
    ("refused", {"passphrase": "x" * 100}),
    ("refused", {"passphrase": "ein längerer Satz"}),
    ("refused", {"passphrase": "a line\nand another"}),
    ("invalid_request", {"passphrase": "eleven char"}),
    ("invalid_request", {"container": "7z"}),
    ("invalid_request", {"container": None}),
]


def test_a_locked_zip_is_refused_unless_all_that_it_needs_is_there(
    client: TestClient, admin: dict[str, str]
) -> None:
    for code, change in REFUSED:
        body = LOCKED | {"user_id": 1} | change
        answer = client.post("/security/data/export", json=body, headers=admin)
        assert (answer.status_code, answer.json()["code"]) == (422, code), change
        passphrase = change.get("passphrase")
        assert passphrase is None or passphrase not in answer.text
    assert exports_on_record() == []
    body = LOCKED | {"user_id": 1, "passphrase": "x" * 12}
    assert client.post("/security/data/export", json=body, headers=admin).status_code == 200
    expected = {"format": "zip", "encrypted": True, "container": "zip"}
    assert exports_on_record() == [expected]


@pytest.mark.parametrize("service", ["sqlite"], indirect=True)
def test_a_passphrase_of_a_wrong_length_is_refused_and_not_told_how_long_it_was(
    client: TestClient, admin: dict[str, str]
) -> None:
    for length, status in ((11, 422), (12, 200), (1024, 200), (1025, 422)):
        body = {"user_id": 1, "encrypt": True, "passphrase": "x" * length}
        answer = client.post("/security/data/export", json=body, headers=admin)
        assert answer.status_code == status
        if status == 422:
            said = answer.json()["detail"]
            assert said == "body.passphrase: a passphrase has 12 to 1024 characters"


def exports_on_record() -> list[Any]:
    with session_scope(read_only=True) as session:
        events = session.scalars(select(AuditEvent).where(AuditEvent.action == "export"))
        return [json.loads(event.detail or "") for event in events]


@pytest.mark.parametrize("container", list(ExportContainer))
def test_a_short_passphrase_is_refused_by_the_service_itself(
    sqlite_service: Service, container: ExportContainer
) -> None:
    for short in ("", "eleven char"):
        with session_scope() as session, pytest.raises(RefusedError, match="12 characters"):
            get_compliance_service().export(
                session, ADMINISTRATOR, 1, ExportFormat.ZIP, encrypt=True,
                passphrase=short, container=container,
            )  # fmt: skip


# Memory


def peak_of_export(service: Service, rows: int) -> int:
    user_id = service.user(f"jane{rows}@example.com")
    row = {"user_id": user_id, "rating": 5, "submitted_at": datetime.now(UTC)}
    with session_scope() as session:
        session.execute(insert(Feedback), [row] * rows)
        chunks = get_compliance_service().export(
            session, ADMINISTRATOR, user_id, ExportFormat.ZIP, encrypt=True,
            passphrase=PASSPHRASE, container=ExportContainer.ZIP,
        )  # fmt: skip
    tracemalloc.start()
    for _ in chunks:
        pass
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def test_memory_does_not_grow_with_the_rows_of_a_locked_zip(sqlite_service: Service) -> None:
    # What is imported and cached at the first export is no part of the measure.
    peak_of_export(sqlite_service, 1)
    small = peak_of_export(sqlite_service, 500)
    assert peak_of_export(sqlite_service, 2_000) < 1.5 * small
