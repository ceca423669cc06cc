"""Killed processes and crowds: nothing that was acknowledged is lost, everybody is answered."""

import os
import re
import signal
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Final

import pytest
from fastapi.testclient import TestClient

from main import create_app
from tests.api.crowds import (
    CONSENT,
    PATIENCE_SECONDS,
    Answer,
    Caller,
    at_once,
    is_ready,
    until,
    writing,
)
from tests.conftest import JWT_SECRET, KEY, PostgresServer, Service, clear_caches
from tests.test_main import serving

SECRETS: Final = {"ENCRYPTION_KEY": KEY, "JWT_SECRET_KEY": JWT_SECRET}
CROWD: Final = 200


@pytest.fixture(params=["sqlite", "postgresql"])
def settings(request: pytest.FixtureRequest) -> dict[str, str]:
    """Settings of an installation that is not there yet, on each engine in turn."""
    if request.param == "sqlite":
        return dict(SECRETS)
    server: PostgresServer = request.getfixturevalue("postgres_server")
    for left in server.names("test_faults"):
        server.run(f'DROP DATABASE "{left}" WITH (FORCE)')
    server.run("CREATE DATABASE test_faults")
    return SECRETS | {"DATABASE_URL": server.url("test_faults")}


def workers(log: Path) -> list[int]:
    """The processes that have served, the newest last."""
    return [
        int(found) for found in re.findall(r"Started server process \[(\d+)\]", log.read_text())
    ]


def is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def test_what_was_acknowledged_before_a_kill_is_there_after_it(
    tmp_path: Path, settings: dict[str, str]
) -> None:
    with serving(tmp_path / "data", log=tmp_path / "log", **settings) as server:
        caller = Caller.signed_in(server)
        with writing(caller, 4) as written:
            written.wait(40)
            assert server.stop(signal.SIGKILL) == -signal.SIGKILL
            # The kill must have come between writes, not after them.
            until(lambda: written.broken)
    assert written.refused == []
    with serving(tmp_path / "data", log=tmp_path / "log", **settings) as server:
        caller.url = server.url
        until(lambda: is_ready(caller))
        there = Counter(caller.recorded())
    assert Counter(written.acknowledged) - there == Counter()
    assert set(there.values()) == {1}


def test_a_killed_worker_takes_nothing_with_it_and_is_replaced(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with serving(tmp_path / "data", log=log, WORKERS="2", **SECRETS) as server:
        caller = Caller.signed_in(server)
        until(lambda: len(workers(log)) == 2)
        with writing(caller, 4) as written:
            written.wait(20)
            killed, _ = workers(log)
            os.kill(killed, signal.SIGKILL)
            until(lambda: len(workers(log)) == 3)
            written.wait(len(written.acknowledged) + 20)
        assert written.refused == []
        there = Counter(caller.recorded())
        assert Counter(written.acknowledged) - there == Counter()
        assert is_ready(caller)
        assert server.stop() in (0, -signal.SIGTERM, 128 + signal.SIGTERM)
        assert not any(map(is_alive, workers(log)))


def test_several_workers_answer_and_count_together(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with serving(tmp_path / "data", log=log, WORKERS="2", **SECRETS) as server:
        caller = Caller.signed_in(server)
        until(lambda: len(workers(log)) == 2)
        at_once(*[partial(caller.get, CONSENT)] * 40)
        metrics = caller.get("/metrics").text
        # Nor do they go on when the one that watches them was killed.
        server.stop(signal.SIGKILL)
        until(lambda: not any(map(is_alive, workers(log))))
    counted = re.search(r'requests_total\{.*route="(.*user_id.*)",status="200"\} (\S+)', metrics)
    assert counted
    assert (counted[1], float(counted[2])) == ("/security/data/consent/{user_id}", 40)
    # One sample per name and labels, whichever process is asked.
    names = [line.rpartition(" ")[0] for line in metrics.splitlines() if not line.startswith("#")]
    assert [name for name, count in Counter(names).items() if count > 1] == []


def test_a_crowd_is_answered_and_nothing_of_it_is_lost(
    tmp_path: Path, settings: dict[str, str]
) -> None:
    with serving(tmp_path / "data", log=tmp_path / "log", **settings) as server:
        caller = Caller.signed_in(server)
        kinds: list[Callable[[int], Answer]] = [
            lambda number: caller.consent(f"crowd-{number}"),
            lambda _: caller.get(CONSENT),
            lambda _: caller.post("/security/data/export", {"user_id": 1}),
            lambda _: caller.sign_in(server.password),
            lambda _: caller.get("/healthz"),
        ]
        acts = [partial(kinds[number % len(kinds)], number) for number in range(CROWD)]
        answers = at_once(*acts)
        odd = [each for each in answers if each.status >= 300 and not each.is_put_off]
        assert odd == []
        assert {each.status for each in answers[4 :: len(kinds)]} == {200}
        given = {f"crowd-{number}" for number, each in enumerate(answers) if each.status == 201}
        assert given
        assert set(caller.recorded()) == given
        assert is_ready(caller)


def test_whoever_waits_for_a_lock_takes_no_thread_from_those_who_hold_it(
    sqlite_service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With fewer threads than requests, they would wait for each other until they give up."""
    monkeypatch.setenv("MAX_CONCURRENT_REQUESTS", "60")
    clear_caches()
    app, everybody = create_app(), threading.Barrier(60)
    app.add_api_route("/meet", lambda: everybody.wait(PATIENCE_SECONDS) >= 0)
    with TestClient(app) as client, ThreadPoolExecutor(60) as callers:
        met = callers.map(lambda _: client.get("/meet").text, range(60))
        assert set(met) == {"true"}
