"""What belongs together in the logs says so: a request's id, a job's name and the id of its run."""

import json
import threading
from collections.abc import Callable, Iterator
from contextvars import copy_context
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import structlog
from fastapi.testclient import TestClient
from sqlalchemy.orm import Session

from backend.errors import ConflictError
from backend.services import scheduler_service, store_service
from backend.services.scheduler_service import Job, SchedulerService
from backend.settings import AppEnv
from main import create_app
from tests.backup.promises import wait_until
from tests.backup.stores import Folders, away, folders
from tests.conftest import Service, SignIn, sign_in
from tests.logged import logged

__all__ = ["folders", "sign_in"]  # fixtures

Line = dict[str, Any]
log = structlog.get_logger(__name__)


def lines(written: str) -> list[Line]:
    """All but what the test client says of its own requests."""
    found = [json.loads(line) for line in written.splitlines()]
    return [line for line in found if not line["event"].startswith("HTTP Request")]


# Requests


@pytest.fixture
def service(sqlite_service: Service) -> Service:
    return sqlite_service


@pytest.fixture
def client(folders: Folders, sign_in: SignIn) -> Iterator[TestClient]:
    """An admin of an installation with two stores."""
    with TestClient(create_app(), raise_server_exceptions=False) as client:
        client.headers |= sign_in("admin@example.com")
        yield client


def test_work_in_threads_is_logged_with_the_id_of_its_request(
    service: Service, client: TestClient, folders: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A logger keeps the level that it was first used with, which may be another test's.
    monkeypatch.setattr(store_service, "log", structlog.get_logger(store_service.__name__))
    guest = service.user("guest@example.com")
    with logged(AppEnv.PRODUCTION) as written:
        with away(folders.second):
            body = {"user_id": guest, "mode": "delete", "reason": "art. 17"}
            erased = client.post("/security/data/delete", json=body)
            assert erased.status_code == 200
            # The copy of its entry is written by a thread that nobody waits for.
            wait_until(lambda: "copy_failed" in written())
        with away(folders.first):
            # So is a backup, by one that its request waits for only until it has begun.
            begun = client.post("/security/backup/create", json={"wait": False})
            wait_until(lambda: "backup_failed" in written())
    found = {
        answer: [
            line["event"]
            for line in lines(written())
            if line.get("request_id") == answer.headers["x-request-id"]
        ]
        for answer in (erased, begun)
    }
    assert {"copy_failed", "request"} <= set(found[erased])
    assert {"backup_failed", "request"} <= set(found[begun])
    assert sum(map(len, found.values())) == len(lines(written()))


def test_two_requests_at_once_do_not_mix_their_ids(client: TestClient) -> None:
    both = threading.Barrier(2)
    app = client.app

    def meet() -> None:
        log.warning("here", number=both.wait(60))
        both.wait(60)
        log.warning("there")

    app.add_api_route("/meet", meet)  # type: ignore[attr-defined] # it is a FastAPI
    with logged(AppEnv.PRODUCTION) as written:
        threads = [threading.Thread(target=client.get, args=("/meet",)) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    by_id: dict[str, list[str]] = {}
    for line in lines(written()):
        by_id.setdefault(line["request_id"], []).append(line["event"])
    assert list(by_id.values()) == [["here", "there", "request"]] * 2


# Jobs


def work(_session: Session) -> None:
    """Log here and in a thread, as jobs do."""
    log.warning("working")
    thread = threading.Thread(target=copy_context().run, args=(log.warning, "beside"))
    thread.start()
    thread.join()


def fail(_session: Session) -> None:
    log.warning("working")
    raise RuntimeError


def wait(_session: Session) -> None:
    log.warning("working")
    raise ConflictError("a backup is running")


def run_once(job: str, run: Callable[[Session], object]) -> list[Line]:
    """Run *job*, which is due, and return what was logged meanwhile."""
    runner = SchedulerService()
    made = Job(job, lambda settings: settings.retention_time, run=run)
    vars(runner)["_jobs"] = (made,)
    # Soon after the time; and of the first that is due only a note is taken.
    now = datetime.now(UTC).replace(hour=2, minute=10)
    runner.tick(now)
    with logged(AppEnv.PRODUCTION) as written:
        assert runner.tick(now + timedelta(days=1)) == [job]
        log.warning("after")
    return lines(written())


@pytest.mark.parametrize(
    ("run", "events"),
    [
        (work, ["job_started", "working", "beside", "job_done"]),
        (fail, ["job_started", "working", "job_failed", "alert"]),
        (wait, ["job_started", "working", "job_waits"]),
    ],
)
def test_all_that_a_job_logs_names_it_and_its_run(
    sqlite_service: Service, run: Callable[[Session], object], events: list[str]
) -> None:
    *of_job, after = run_once("tidy", run)
    assert [line["event"] for line in of_job] == events
    assert {line["job"] for line in of_job} == {"tidy"}
    (run_id,) = {line["run_id"] for line in of_job}
    assert run_id
    assert (after["event"], after.keys() & {"job", "run_id"}) == ("after", set())
    assert run_once("other", run)[0]["run_id"] != run_id


def test_a_heartbeat_that_fails_is_logged_with_the_run_that_it_is_for(
    sqlite_service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    beaten = threading.Event()

    def beat(_self: SchedulerService, *_: object) -> None:
        log.warning("beating")
        beaten.set()

    monkeypatch.setattr(scheduler_service.SchedulerService, "_beat", beat)
    found = run_once("tidy", lambda _: beaten.wait(60))
    assert ("beating", "tidy") in {(line["event"], line.get("job")) for line in found}
