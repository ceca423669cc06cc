"""Backups taken beside fifty writers: each is one consistent state, and nobody waits for it."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Final
from uuid import UUID

from sqlalchemy import Engine, func, select

from backend.db_utils import BUSY_TIMEOUT_SECONDS, get_engine, make_engine, session_scope
from backend.models import Feedback, Payment
from backend.services.audit_service import COMMAND_LINE
from backend.services.backup_service import get_backup_service
from backend.services.restore_service import get_restore_service
from tests.backup.aftermath import fill
from tests.backup.beside import beside
from tests.conftest import PostgresServer, Service
from tests.privacy.people import feedback, payment

WRITERS: Final = 50
_LOOK: Final = "test_holdfast_look"


class Till:
    """Writes to two tables in one transaction, again and again; knows how long that took."""

    def __init__(self) -> None:
        self.done = 0
        self.longest_seconds = 0.0
        self._changed = threading.Condition()

    def write(self) -> None:
        started, now = time.monotonic(), datetime.now(UTC)
        with session_scope() as session:
            session.add(feedback(None, now))
            # Whoever looked in between would see a half.
            session.flush()
            session.add(payment(None, now))
        self._note(started)

    def read(self) -> None:
        started = time.monotonic()
        balance(get_engine())
        self._note(started)

    def _note(self, started: float) -> None:
        with self._changed:
            self.longest_seconds = max(self.longest_seconds, time.monotonic() - started)
            self.done += 1
            self._changed.notify_all()
        time.sleep(0.2)

    def wait_for(self, more: int) -> None:
        with self._changed:
            wanted = self.done + more
            assert self._changed.wait_for(lambda: self.done >= wanted, timeout=120)


def balance(engine: Engine) -> int:
    """Rows of the one table without a row in the other: a transaction does not change it."""
    with session_scope(engine, read_only=True) as session:
        tills = select(
            select(func.count()).select_from(Feedback).scalar_subquery()
            - select(func.count()).select_from(Payment).scalar_subquery()
        )
        found: int = session.scalars(tills).one()
    return found


@contextmanager
def looked_into(service: Service, backup_id: UUID, folder: Path) -> Iterator[Engine]:
    """The database in a backup, restored to another place."""
    target = str(folder / "look.db")
    if service.engine == "postgresql":
        target = service.url.rpartition("/")[0] + f"/{_LOOK}"
    get_restore_service().restore_to(backup_id, COMMAND_LINE, target)
    engine = make_engine(target if "://" in target else f"sqlite:///{target}")
    try:
        yield engine
    finally:
        engine.dispose()
        (folder / "look.db").unlink(missing_ok=True)
        if service.engine == "postgresql":
            PostgresServer(get_engine().url.port or 0).run(f"DROP DATABASE {_LOOK}")


def test_every_backup_holds_whole_transactions_and_no_request_waits_for_it(
    service: Service, tmp_path: Path
) -> None:
    fill()
    expected, till, made, meanwhile = balance(get_engine()), Till(), [], []
    with beside(*[till.write] * WRITERS, till.read, till.read) as raised:
        for _ in range(2):
            till.wait_for(WRITERS)
            before = till.done
            made.append(get_backup_service().create(COMMAND_LINE).id)
            meanwhile.append(till.done - before)
    assert raised == []
    assert any(meanwhile)
    assert till.longest_seconds < BUSY_TIMEOUT_SECONDS
    rows = []
    for backup_id in made:
        with looked_into(service, backup_id, tmp_path) as engine:
            assert balance(engine) == expected
            with session_scope(engine, read_only=True) as session:
                rows.append(session.scalar(select(func.count()).select_from(Payment)) or 0)
    assert rows[0] < rows[1]
