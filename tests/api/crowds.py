"""Callers of real servers: one that asks, crowds of them, and writers who keep what they wrote."""

import http.client
import json
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

from tests.conftest import ADMIN
from tests.test_main import Server

# Bounds what hangs; how long a good answer takes decides nothing.
PATIENCE_SECONDS: Final = 120
FORM: Final = "application/x-www-form-urlencoded"
CONSENT: Final = "/security/data/consent/1"


@dataclass(frozen=True)
class Answer:
    """A whole answer."""

    status: int
    headers: http.client.HTTPMessage
    text: str

    @property
    def json(self) -> Any:
        return json.loads(self.text)

    @property
    def is_put_off(self) -> bool:
        """Whether it says, in the form of every error, to come back later."""
        return (
            self.status in (429, 503)
            and int(self.headers["Retry-After"]) > 0
            and self.headers["Content-Type"] == "application/problem+json"
            and self.json["status"] == self.status
        )


@dataclass
class Caller:
    """Somebody who is signed in as the first admin; each request has a connection of its own."""

    url: str
    token: str = ""

    @classmethod
    def signed_in(cls, server: Server) -> "Caller":
        caller = cls(server.url)
        signed = caller.sign_in(server.password)
        assert signed.status == 200, signed.text
        caller.token = signed.json["access_token"]
        return caller

    def sign_in(self, password: str) -> Answer:
        form = urllib.parse.urlencode({"username": ADMIN, "password": password})
        return self._send("POST", "/auth/token", form, FORM)

    def get(self, path: str) -> Answer:
        return self._send("GET", path, None, None)

    def post(self, path: str, body: Any = None) -> Answer:
        return self._send("POST", path, json.dumps(body or {}), "application/json")

    def consent(self, version: str) -> Answer:
        """Give consent, under a version of the notice that tells this act from others."""
        body = {"purpose": "marketing", "granted": True, "notice_version": version}
        return self.post(CONSENT, body)

    def recorded(self) -> list[str]:
        """The versions under which consent is on record."""
        return [event["notice_version"] for event in self.get(CONSENT).json["history"]]

    def _send(self, method: str, path: str, body: str | None, media: str | None) -> Answer:
        netloc = urllib.parse.urlsplit(self.url).netloc
        connection = http.client.HTTPConnection(netloc, timeout=PATIENCE_SECONDS)
        headers = {"Authorization": f"Bearer {self.token}"} if self.token else {}
        if media is not None:
            headers["Content-Type"] = media
        try:
            connection.request(
                method, path, body, headers | ({"Content-Type": media} if media else {})
            )
            answer = connection.getresponse()
            return Answer(answer.status, answer.headers, answer.read().decode())
        finally:
            connection.close()


@dataclass
class Written:
    """What writers were told: the versions that were acknowledged, and every other answer."""

    acknowledged: list[str] = field(default_factory=list)
    refused: list[Answer] = field(default_factory=list)
    broken: list[OSError | http.client.HTTPException] = field(default_factory=list)

    def wait(self, count: int) -> None:
        """Wait until so many writes were acknowledged."""
        until(lambda: len(self.acknowledged) >= count)


@contextmanager
def writing(caller: Caller, writers: int) -> Iterator[Written]:
    """Record consents without a pause, in threads, until the block ends."""
    written, stop = Written(), threading.Event()

    def write(writer: int) -> None:
        number = 0
        while not stop.is_set():
            number += 1
            version = f"{writer}-{number}"
            try:
                answer = caller.consent(version)
            except (OSError, http.client.HTTPException) as err:
                written.broken.append(err)
                stop.wait(0.05)
                continue
            if answer.status == 201:
                written.acknowledged.append(version)
            else:
                written.refused.append(answer)

    threads = [threading.Thread(target=write, args=(writer,)) for writer in range(writers)]
    for thread in threads:
        thread.start()
    try:
        yield written
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def at_once(*acts: Callable[[], Answer]) -> list[Answer]:
    """Do all *acts* at the same moment, each in a thread; return the answers in their order."""
    together = threading.Barrier(len(acts))
    answers: dict[int, Answer] = {}

    def act(number: int) -> None:
        together.wait(PATIENCE_SECONDS)
        answers[number] = acts[number]()

    threads = [threading.Thread(target=act, args=(number,)) for number in range(len(acts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(answers) == len(acts), "somebody was not answered"
    return [answers[number] for number in range(len(acts))]


def until(condition: Callable[[], object]) -> None:
    """Wait for what has to come; that it never does fails the test."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "it has not come"
        time.sleep(0.05)


def is_ready(caller: Caller) -> bool:
    return caller.get("/readyz").status == 200
