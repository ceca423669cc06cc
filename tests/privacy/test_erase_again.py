"""The ledger replayed: who was erased stays erased in any copy, and nobody else is touched."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import select

from backend.db_utils import dispose_engine, get_engine, session_scope, sqlite_path
from backend.models import BillingAddress, Companion, User
from backend.privacy.declarations import EraseMode
from backend.services.audit_service import COMMAND_LINE
from backend.services.backup_service import get_backup_service
from backend.services.certificate_service import get_certificate_service
from backend.services.erasure_service import get_erasure_service
from backend.services.restore_service import get_restore_service
from backend.services.setup_service import get_setup_service
from backend.services.subject_service import Who
from tests.conftest import PostgresServer, Run, Service, clear_caches
from tests.privacy.people import booking, cells_in_plain, dump, left_of, plant

JANE, JANES_PHONE = "jane@example.com", "+351 912 345 678"
KIM, LOU = "kim@example.com", "lou@example.com"
LAST_WEEK = datetime.now(UTC) - timedelta(days=7)


@dataclass
class World:
    """Jane has an account, Kim is only named, and Lou must stay as he is."""

    service: Service
    jane: int
    stay: int
    erased: list[UUID]


@pytest.fixture
def world(service: Service) -> World:
    jane = service.user(JANE, phone=JANES_PHONE, full_name="Jane Known")
    address = BillingAddress(contact_name="Jane Known", email=JANE.upper(), created_at=LAST_WEEK)
    service.add(address)
    stay = booking(plant("B").id, LAST_WEEK.date(), billing_address_id=address.id)
    service.add(stay)
    service.add(
        named(stay.id, "Jane Known", email="Jane@Example.com"),
        named(stay.id, "Jane Known", phone="00351912345678"),
        # A family's telephone names nobody where there is an address of somebody else.
        named(stay.id, "Lou Known", email=LOU, phone=JANES_PHONE),
        named(stay.id, "Kim Known", email=KIM),
    )
    return World(service, jane, stay.id, [])


def named(stay: int, name: str, **address: str) -> Companion:
    return Companion(booking_id=stay, full_name=name, created_at=LAST_WEEK, **address)


def erase_both(world: World) -> None:
    for who in (Who(world.jane), Who(email=KIM)):
        with session_scope() as session:
            done = get_erasure_service().erase(
                session, COMMAND_LINE, who, EraseMode.DELETE, reason="request", dry_run=False
            )
        world.erased.append(done.erasure_id)


def companions(world: World) -> list[tuple[str | None, ...]]:
    """Name and addresses of those who stay."""
    statement = select(Companion.full_name, Companion.email, Companion.phone)
    with session_scope(read_only=True) as session:
        rows = session.execute(statement.where(Companion.booking_id == world.stay)).all()
    return sorted((tuple(row) for row in rows), key=str)


AFTER = [("Lou Known", LOU, JANES_PHONE), *[(None, None, None)] * 3]


def assert_forgotten(world: World) -> None:
    with session_scope(read_only=True) as session:
        assert session.get(User, world.jane) is None
    assert companions(world) == AFTER
    assert left_of({JANE, JANE.upper(), "Jane Known", KIM, "Kim Known"}, cells_in_plain()) == set()


def restored_by_us(world: World) -> None:
    backup_id = get_backup_service().create(COMMAND_LINE).id
    erase_both(world)
    get_restore_service().restore(backup_id, COMMAND_LINE, dry_run=False, confirm=True)


@pytest.fixture
def copied_by_hand(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    run: Run,
    capsys: pytest.CaptureFixture[str],
) -> Callable[[World], None]:
    """A copy of the database from before, in the place of the one that knows."""

    def copy(world: World) -> None:
        dispose_engine()
        if world.service.engine == "sqlite":
            path = sqlite_path(get_engine())
            shutil.copy(path, tmp_path / "copy.db")
            url = f"sqlite:///{tmp_path / 'copy.db'}"
        else:
            server: PostgresServer = request.getfixturevalue("postgres_server")
            name = world.service.url.rpartition("/")[2]
            server.run(f"CREATE DATABASE {name}_copy TEMPLATE {name}")
            request.addfinalizer(
                lambda: server.run(f"DROP DATABASE IF EXISTS {name}_copy WITH (FORCE)")
            )
            url = f"{world.service.url}_copy"
        erase_both(world)
        monkeypatch.setenv("DATABASE_URL", url)
        clear_caches()
        get_setup_service().open()
        with session_scope(read_only=True) as session:
            assert session.get_one(User, world.jane).email == JANE
        assert replay(run, capsys) == {"erasures": 2, "consents": 0}

    return copy


def replay(run: Run, capsys: pytest.CaptureFixture[str]) -> Any:
    # What was logged before there was anybody to set up logs.
    capsys.readouterr()
    answer = run("erase", "--replay", "--json")
    assert answer.code == 0, answer.err
    return answer.json


@pytest.mark.parametrize("how", ["our restore", "by hand"])
def test_whom_a_copy_brings_back_the_ledger_takes_away_and_only_them(
    world: World,
    how: str,
    request: pytest.FixtureRequest,
    run: Run,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if how == "by hand":
        request.getfixturevalue("copied_by_hand")(world)
    else:
        restored_by_us(world)
    assert_forgotten(world)
    # What is written from now on is about people anew, whatever address they have.
    again = world.service.user(JANE, phone=JANES_PHONE)
    assert again > world.jane
    now = datetime.now(UTC)
    world.service.add(
        *(Companion(booking_id=world.stay, full_name=name, created_at=now, **address)
          for name, address in (("New Jane", {"email": JANE}), ("New Kim", {"email": KIM}),
                                ("New Jane", {"phone": JANES_PHONE})))
    )  # fmt: skip
    written = dump()
    for _again in range(2):
        assert replay(run, capsys) == {"erasures": 0, "consents": 0}
        assert dump() == written
    with session_scope(read_only=True) as session:
        assert session.get_one(User, again).email == JANE


def test_in_a_copy_that_knows_nothing_of_an_erasure_its_certificate_can_be_had(
    world: World, copied_by_hand: Callable[[World], None]
) -> None:
    copied_by_hand(world)
    with session_scope() as session:
        jane, kim = (get_certificate_service().of(session, each) for each in world.erased)
    assert b"applied_again" in jane
    assert b"applied_again" in kim
