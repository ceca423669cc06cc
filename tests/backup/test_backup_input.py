"""What endpoints and commands of backups cannot use is refused, and reaches nothing."""

from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Final
from uuid import UUID

import pytest
from fastapi.testclient import TestClient

from backend.errors import HoldfastError
from backend.services.audit_service import COMMAND_LINE
from backend.services.backup_service import get_backup_service
from tests.backup.lives import ABSENT, PATH, SQLITE, Headers, create, listed, names
from tests.conftest import Run, Service
from tests.privacy.people import dump, without

ONE_BACKUP: Final = (("GET", ""), ("DELETE", ""), ("POST", "/verify"), ("PUT", "/hold"))
NO_IDS: Final = (
    "../../etc/passwd",
    "..%2F..%2Fetc%2Fpasswd",
    "x",
    "a\x00",
    "{id}/../{id}",
    "{id}.hfb",
)


def refused(answer: Any, status: int, code: str) -> None:
    assert (answer.status_code, answer.json()["code"]) == (status, code), answer.text
    assert answer.headers["content-type"] == "application/problem+json"


@pytest.fixture
def backup_id(service: Service) -> str:
    return str(create())


@SQLITE
@pytest.mark.parametrize("text", NO_IDS)
def test_an_id_that_is_none_reaches_no_file(
    client: TestClient, admin: Headers, backup_id: str, service: Service, text: str
) -> None:
    folder = service.folder / "backups"
    before = without(dump(), {}, "audit_events"), names(folder)
    text = text.replace("{id}", backup_id)
    body = {"backup_id": text, "confirm": True}
    refused(client.post(f"{PATH}/restore", json=body, headers=admin), 422, "invalid_request")
    in_path = text.replace("/", "%2F").replace("\x00", "%00")
    for method, tail in ONE_BACKUP:
        hold = {"until": None} if method == "PUT" else None
        answer = client.request(method, f"{PATH}/{in_path}{tail}", json=hold, headers=admin)
        assert answer.status_code in {404, 405, 422}
        assert backup_id not in answer.json()["detail"]
    assert (without(dump(), {}, "audit_events"), names(folder)) == before


@SQLITE
def test_an_id_that_names_nothing_is_not_found(client: TestClient, admin: Headers) -> None:
    answers = []
    for method, tail in ONE_BACKUP:
        hold = {"until": None} if method == "PUT" else None
        answers.append(client.request(method, f"{PATH}/{ABSENT}{tail}", json=hold, headers=admin))
    for fields in ({"dry_run": True}, {"confirm": True}):
        body: dict[str, Any] = {"backup_id": str(ABSENT), **fields}
        answers.append(client.post(f"{PATH}/restore", json=body, headers=admin))
    for answer in answers:
        refused(answer, 404, "not_found")
        assert answer.json()["detail"] == f"no backup has the id {ABSENT}"


@SQLITE
def test_an_id_may_be_spelled_in_capitals(
    client: TestClient, admin: Headers, backup_id: str
) -> None:
    found = client.get(f"{PATH}/{backup_id.upper()}", headers=admin)
    assert found.json()["id"] == backup_id


@SQLITE
def test_a_restore_wants_one_clear_word(client: TestClient, admin: Headers, backup_id: str) -> None:
    before = without(dump(), {}, "audit_events")
    refused(
        client.post(f"{PATH}/restore", json={"backup_id": backup_id}, headers=admin), 422, "refused"
    )
    for fields in (
        {"confirm": "true"}, {"confirm": 1}, {"confirm": None}, {"dry_run": "yes"},
        {"confirm": True, "confirm_empty": "true"}, {"confirm": True, "target": "other"},
    ):  # fmt: skip
        body = {"backup_id": backup_id, **fields}
        refused(client.post(f"{PATH}/restore", json=body, headers=admin), 422, "invalid_request")
    refused(client.post(f"{PATH}/restore", json={}, headers=admin), 422, "invalid_request")
    assert without(dump(), {}, "audit_events") == before


@SQLITE
def test_a_hold_wants_a_moment_with_its_zone(
    client: TestClient, admin: Headers, backup_id: str, now: datetime
) -> None:
    path, naive = f"{PATH}/{backup_id}/hold", (now + timedelta(days=1)).replace(tzinfo=None)
    bodies: tuple[Any, ...] = (
        {}, {"until": naive.isoformat()}, {"until": "tomorrow"}, {"until": True}, {"until": []},
        {"until": None, "reason": "a claim"},
    )  # fmt: skip
    for bad in bodies:
        refused(client.put(path, json=bad, headers=admin), 422, "invalid_request")
    for late in (timedelta(seconds=-1), timedelta(days=90, minutes=1), timedelta(days=10**6)):
        body = {"until": (now + late).isoformat()}
        refused(client.put(path, json=body, headers=admin), 422, "refused")
    assert client.get(f"{PATH}/{backup_id}", headers=admin).json()["held_until"] is None


@SQLITE
def test_what_is_no_description_of_a_backup_makes_none(client: TestClient, admin: Headers) -> None:
    bodies: tuple[Any, ...] = (
        {"label": "x" * 101}, {"label": "a\x00b"}, {"label": 7},
        {"wait": "false"}, {"wait": None}, {"path": "elsewhere"}, [], "label",
    )  # fmt: skip
    for bad in bodies:
        answer = client.post(f"{PATH}/create", json=bad, headers=admin)
        refused(answer, 422, "invalid_request")
    assert client.get(f"{PATH}/list", headers=admin).json()["total"] == 0
    for label in ("ü" * 100, "[b]no markup[/b]", None):
        answer = client.post(f"{PATH}/create", json={"label": label}, headers=admin)
        assert (answer.status_code, answer.json()["label"]) == (201, label)


@SQLITE
def test_what_pgbackrest_alone_can_do_is_refused_without_it(
    client: TestClient, admin: Headers, backup_id: str, run: Run, now: datetime
) -> None:
    for kind, code in (("diff", "refused"), ("incr", "refused"), ("half", "invalid_request")):
        answer = client.post(f"{PATH}/create", json={"kind": kind}, headers=admin)
        refused(answer, 422, code)
    assert run("backup", "create", "--type", "diff").code == 2
    for moment, code in (
        (now.isoformat(), "refused"),
        (now.replace(tzinfo=None).isoformat(), "invalid_request"),
    ):
        body = {"backup_id": backup_id, "confirm": True, "target_time": moment}
        refused(client.post(f"{PATH}/restore", json=body, headers=admin), 422, code)
    assert listed() == [UUID(backup_id)]


def test_a_label_that_is_too_long_is_refused_whoever_gives_it(sqlite_service: Service) -> None:
    for label in ("x" * 101, "a\x00b"):
        for make in (get_backup_service().create, get_backup_service().start):
            with pytest.raises(HoldfastError) as refusal:
                make(COMMAND_LINE, label)
            assert refusal.value.status == 422
    assert listed() == []


@pytest.mark.parametrize("text", [*NO_IDS[:4], str(ABSENT)])
def test_every_command_refuses_an_id_that_names_nothing(
    sqlite_service: Service, run: Run, tmp_path: Path, text: str
) -> None:
    create()
    before, files = dump(), names(sqlite_service.folder / "backups")
    for command in (
        ("verify", text), ("restore", text, "--dry-run"), ("restore", text, "--confirm"),
        ("restore", text, "--to", str(tmp_path / "look.db")), ("delete", text),
        ("hold", text, "--release"),
        ("copy", text, "-o", str(tmp_path / "copy"), "--recipient", "k"),
    ):  # fmt: skip
        answer = run("backup", *command)
        assert (answer.code, answer.out) == (2, ""), command
        if text == str(ABSENT):
            assert answer.err.startswith("holdfast: ")
            assert answer.err.count("\n") == 1
    unchanged = without(dump(), {}, "audit_events") == without(before, {}, "audit_events")
    assert (unchanged, names(sqlite_service.folder / "backups")) == (True, files)
    assert list(tmp_path.iterdir()) == []


def test_the_command_that_restores_wants_one_clear_word(
    sqlite_service: Service, run: Run, tmp_path: Path
) -> None:
    backup_id, look = str(create()), str(tmp_path / "look.db")
    for options, words in (
        ((), "add --confirm, or --dry-run"),
        (("--to", look, "--confirm"), "leaves the live database alone"),
        (("--to", look, "--dry-run"), "leaves the live database alone"),
        (("--confirm-empty",), "add --confirm, or --dry-run"),
    ):
        answer = run("backup", "restore", backup_id, *options)
        assert (answer.code, answer.err.count("\n")) == (2, 1)
        assert words in answer.err
    assert list(tmp_path.iterdir()) == []
