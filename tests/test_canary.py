"""
A canary in every personal column and in every place of every request, and then a search for them.

What is searched: the log of a real process, errors and all headers that it answered, `/metrics`,
names of files, the audit trail in plain, alerts, what the webhook was told, what commands print.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, cast

import httpx2
from fastapi.testclient import TestClient
from httpx2 import Response
from sqlalchemy import select, text
from sqlalchemy.orm import Session

from backend.db_utils import get_engine, session_scope
from backend.models import DATA_MAP, Alert, AuditEvent, JobRun, User
from tests.api.sweeps import NOWHERE, places
from tests.backup.stores import away
from tests.conftest import ADMIN, JWT_SECRET, KEY, PASSWORD, Run, Service
from tests.privacy.people import Person, plant
from tests.services.webhook_receiver import SECRET, Receiver, receiving
from tests.test_logs_ids import run_once
from tests.test_main import serving

CANARY: Final = "Kanarienvogel"
# Made by an act, below: what the admin wrote.
_MADE: Final = {("queued_erasures", "reason")}
# It goes to the audit trail, and so must not name the person, as its description says.
_REASON: Final = "art. 17"
_DERIVED: Final = {"email_index", "phone_index"}
_HEADERS: Final = {
    "X-Forwarded-Proto": "https", "User-Agent": CANARY, "Referer": f"https://{CANARY}.example.com",
    "Cookie": f"session={CANARY}", "X-Request-ID": CANARY, "Accept-Language": CANARY,
}  # fmt: skip
_SQLITE: Final = f"""
    CREATE TRIGGER canary BEFORE INSERT ON data_consents
    BEGIN SELECT RAISE(ABORT, '{CANARY}'); END
"""
# As a constraint does, it quotes the row.
_POSTGRESQL: Final = f"""
    CREATE FUNCTION canary() RETURNS trigger AS
    $$ BEGIN RAISE EXCEPTION '{CANARY} %', NEW; END $$ LANGUAGE plpgsql;
    CREATE TRIGGER canary BEFORE INSERT ON data_consents
    FOR EACH ROW EXECUTE FUNCTION canary()
"""
_TRIGGERS: Final = {
    "sqlite": (_SQLITE, "DROP TRIGGER canary"),
    "postgresql": (_POSTGRESQL, "DROP TRIGGER canary ON data_consents; DROP FUNCTION canary()"),
}


def words(person: Person) -> list[str]:
    """What only the person's rows and our requests hold."""
    with session_scope(read_only=True) as session:
        user = session.get_one(User, person.id)
        own = [str(user.uid), str(user.date_of_birth)]
    return [word.lower() for word in [CANARY, *own, *person.words()]]


def test_a_canary_sits_in_every_personal_column_that_holds_text(sqlite_service: Service) -> None:
    planted = {(mark.table, mark.column) for mark in plant("K").marks}
    wanted = {
        (mapped.name, name)
        for mapped in DATA_MAP.tables
        for name in mapped.personal_columns
        if mapped.table.c[name].type.python_type is str and name not in _DERIVED
    }
    assert wanted - planted == _MADE


class Heard:
    """What was said where, as far as people's data have no business there."""

    def __init__(self) -> None:
        self.said: dict[str, list[str]] = {}
        self.statuses: list[int] = []

    def hear(self, where: str, what: object) -> None:
        self.said.setdefault(where, []).append(str(what).lower())

    def answer(self, answer: Response) -> Response:
        """Hear an error whole, and of a success what stands beside the body."""
        self.statuses.append(answer.status_code)
        self.hear("headers", answer.headers)
        if answer.status_code >= 400:
            self.hear("errors", answer.text)
        return answer

    def leaks(self, words: list[str]) -> dict[str, set[str]]:
        found = {
            where: {word for word in words for each in what if word in each}
            for where, what in self.said.items()
        }
        return {where: leaked for where, leaked in found.items() if leaked}


@contextmanager
def broken(service: Service) -> Iterator[None]:
    """Have the database refuse consents, in words that quote a person."""
    make, drop = _TRIGGERS[service.engine]
    with get_engine().begin() as connection:
        connection.execute(text(make))
    yield
    with get_engine().begin() as connection:
        connection.execute(text(drop))


def act(client: httpx2.Client, service: Service, person: Person, heard: Heard) -> None:
    """Everything that is done with a person's data, well and badly, and with a canary in hand."""

    def post(path: str, **body: Any) -> Response:
        return heard.answer(client.post(path, json=body))

    mail, phone = (
        next(mark.text for mark in person.marks if (mark.table, mark.column) == ("users", column))
        for column in ("email", "phone")
    )
    data, delete = "/security/data", "/security/data/delete"
    for body in ({"user_id": person.id}, {"email": mail}, {"phone": phone}, {"email": CANARY}):
        for kind in ("json", "csv", "zip"):
            post(f"{data}/export", format=kind, **body)
        post(f"{data}/find", **body)
        post(delete, mode="delete", reason=_REASON, dry_run=True, **body)
    export = client.post(f"{data}/export", json={"user_id": person.id}).json()
    post(f"{data}/import", export=export, dry_run=True)
    export["data"]["users"][0] |= {"created_at": CANARY}
    post(f"{data}/import", export=export)
    consent = {"purpose": "marketing", "granted": True, "evidence": CANARY}
    post(f"{data}/consent/{person.id}", **consent)
    with broken(service):
        failed = post(f"{data}/consent/{person.id}", **consent)
        assert failed.status_code >= 500
    hold = post("/security/holds", scope="person", user_id=person.id, reason=CANARY).json()
    for queue in (False, True):
        post(delete, user_id=person.id, mode="delete", reason=_REASON, queue=queue)
    backup = post("/security/backup/create", label=CANARY).json()
    with away(service.folder / "backups"):
        post("/security/backup/create", label=CANARY)
        heard.answer(client.delete(f"/security/holds/{hold['id']}"))
        post(delete, user_id=person.id, mode="delete", reason=_REASON)
    post("/security/backup/restore", backup_id=backup["id"], dry_run=True)
    post(delete, user_id=person.id, mode="anonymize", reason=_REASON)
    for path in ("/security/audit", "/security/retention/logs", f"/{mail}?q={phone}", "/metrics"):
        heard.answer(client.get(path, params={"limit": 5} if "security" in path else None))


def sweep(client: httpx2.Client, person: Person, heard: Heard) -> None:
    """Put a canary, and then a person's address, in every place of every request."""
    mail = next(mark.text for mark in person.marks if mark.column == "email")
    document = client.get("/openapi.json").json()
    for place in places(document):
        for canary in (CANARY, mail):
            heard.answer(place.send(cast("TestClient", client), canary, {}))
    wrong = {"username": ADMIN, "password": CANARY}
    for form in (wrong, wrong | {"username": mail}, {"username": CANARY}, {CANARY: mail}):
        heard.answer(client.post("/auth/token", data=form))
    for raw in (f'{{"{CANARY}": "{mail}"}}', f'"{mail}"', f"{mail}", f'{{"user_id": {mail}'):
        headers = {"Content-Type": "application/json"}
        heard.answer(client.post("/security/data/find", content=raw, headers=headers))


def fail(_session: Session) -> None:
    raise RuntimeError(CANARY)


def command(run: Run, heard: Heard, *arguments: str | Path, stdin: str = "") -> None:
    done = run(*arguments, stdin=stdin)
    heard.hear("commands", done.out + done.err)


def act_by_commands(run: Run, person: Person, tmp_path: Path, heard: Heard) -> None:
    mail = next(mark.text for mark in person.marks if mark.column == "email")
    out, junk = tmp_path / "out", tmp_path / "junk"
    junk.write_text(f'{{"{CANARY}": "{mail}"}}')
    for stdin in (mail, CANARY):
        command(run, heard, "find", stdin=stdin)
        command(run, heard, "export", "--address-stdin", "-o", out, stdin=stdin)
        command(
            run, heard, "erase", "--address-stdin", "--dry-run", "--reason", _REASON, stdin=stdin
        )
        command(run, heard, "create-user", "c@example.com", "--password-stdin", stdin=stdin)
    for arguments in (("import", junk), ("open", junk, "-o", out), ("load", "--bookings", junk)):
        command(run, heard, *arguments)
    command(run, heard, "erase", str(person.id), "--reason", _REASON)
    command(run, heard, "audit", "list", "--json")
    command(run, heard, "audit", "verify")


def look(heard: Heard, folder: Path) -> None:
    """Hear what is kept for a long time and seen by many."""
    for path in folder.rglob("*"):
        heard.hear("names of files", path.name)
    with session_scope(read_only=True) as session:
        for table in (AuditEvent, Alert, JobRun):
            for row in session.execute(select(table.__table__)):
                heard.hear(table.__tablename__, list(row))


def environment_of(service: Service, receiver: Receiver) -> dict[str, str]:
    return {
        "APP_ENV": "production", "TRUSTED_PROXIES": "127.0.0.1", "LOG_LEVEL": "DEBUG",
        "ENCRYPTION_KEY": KEY, "JWT_SECRET_KEY": JWT_SECRET, "DATABASE_URL": service.url,
        "SCHEDULER_ENABLED": "true", "BACKUP_VERIFY": "off", "ALERT_WEBHOOK_URL": receiver.url,
        "ALERT_WEBHOOK_SECRET": SECRET, "ALERT_WEBHOOK_ALLOW_PRIVATE": "true",
    }  # fmt: skip


def test_no_canary_is_found_where_people_have_no_business(
    service: Service, tmp_path: Path, run: Run
) -> None:
    person, heard, log = plant("K"), Heard(), tmp_path / "log"
    sought = words(person)
    run_once("failing", fail)
    with receiving() as receiver:
        settings = environment_of(service, receiver)
        with (
            serving(service.folder, log=log, **settings) as server,
            httpx2.Client(base_url=server.url, headers=_HEADERS, timeout=120) as client,
        ):
            form = {"username": ADMIN, "password": PASSWORD}
            token = client.post("/auth/token", data=form).json()["access_token"]
            client.headers["Authorization"] = f"Bearer {token}"
            sweep(client, person, heard)
            act(client, service, person, heard)
            heard.hear("metrics", client.get("/metrics").text)
            receiver.wait()
            server.stop()
            heard.hear("output", server.output)
        for received in receiver.received:
            heard.hear("webhook", [received.path, received.headers, received.body])
    heard.hear("log", log.read_text())
    act_by_commands(run, person, tmp_path, heard)
    look(heard, service.folder)
    assert {200, 201, 401, 404, 409, 422, 503} <= set(heard.statuses)
    assert set(heard.said) >= {
        "headers", "errors", "metrics", "webhook", "log", "commands", "names of files",
        "audit_events", "alerts", "job_runs",
    }  # fmt: skip
    assert heard.leaks(sought) == {}


def test_a_canary_is_found_wherever_it_sits(sqlite_service: Service) -> None:
    """The search itself: without it, the rest would prove nothing."""
    person, heard = plant("K"), Heard()
    heard.hear("here", f"x{person.marks[0].text.upper()}x")
    heard.hear("there", {"a": [CANARY]})
    heard.hear("nowhere", NOWHERE)
    assert set(heard.leaks(words(person))) == {"here", "there"}
