"""One event is one line, whatever is in it, and what nobody catches is told without its words."""

import json
import logging
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final
from uuid import UUID

import pytest
import structlog
from hypothesis import example, given
from hypothesis import strategies as st

from backend.logs import MAX_VALUE_CHARS
from backend.settings import AppEnv
from tests.logged import logged
from tests.test_main import ROOT, environment

CANARY: Final = "Kanarienvogel"
# A line break of each kind, what a terminal obeys, what turns the reading around, half a pair.
ODD: Final = "a\nb\r\nc\x0bd\x0ce\x1cf\x85g\u2028h\u2029i\x1b[2Jj\x07k\u202el\0m\udcffn"
FORGED: Final = '\n{"event": "sign_in", "level": "info", "user": "admin"}'


def say(text: str) -> None:
    """Put *text* wherever a caller's words may get to in a log, by our way and by libraries'."""
    ours, theirs = structlog.get_logger("ours"), logging.getLogger("theirs")
    ours.warning(text)
    ours.warning("event", value=text, many=[text, {text: text}], raw=text.encode(errors="replace"))
    theirs.warning("%s", text)
    theirs.warning(text, stack_info=True)
    with structlog.contextvars.bound_contextvars(request_id=text):
        ours.warning("event")


SAID: Final = 5


@pytest.mark.parametrize("environment", AppEnv)
@given(text=st.text(st.characters(categories=None)))
@example(ODD)
@example(FORGED)
@example("\n" * 3)
@example("")
def test_one_event_is_one_line_that_prints(environment: AppEnv, text: str) -> None:
    with logged(environment) as written:
        say(text)
    lines = written().removesuffix("\n").split("\n")
    assert len(lines) == SAID
    assert [line for line in lines if not line.isprintable()] == []


def test_a_line_in_production_is_one_json_object_that_nobody_forges() -> None:
    with logged(AppEnv.PRODUCTION) as written:
        say(FORGED)
    lines = [json.loads(line) for line in written().splitlines()]
    assert len(lines) == SAID
    assert "sign_in" not in [line["event"] for line in lines]
    assert not any("user" in line for line in lines)


@pytest.mark.parametrize("environment", AppEnv)
def test_what_is_huge_is_cut(environment: AppEnv) -> None:
    with logged(environment) as written:
        say("x" * 1_000_000)
    lines = written().splitlines()
    assert len(lines) == SAID
    # One of them has three such values.
    assert max(map(len, lines)) < 4 * MAX_VALUE_CHARS
    assert all("x" * 900 in line for line in lines)


def test_plain_values_stay_what_they_are() -> None:
    moment, number = datetime(2026, 3, 1, tzinfo=UTC), UUID(int=7)
    kept: dict[str, Any] = {"a": 1, "b": 2.5, "c": True, "d": None, "e": "Zaunkönig, 7 °C"}
    with logged(AppEnv.PRODUCTION) as written:
        structlog.get_logger("ours").warning("event", **kept, f=moment, g=number, h=[1, "b"])
    line = json.loads(written())
    assert {name: line[name] for name in kept} == kept
    assert (line["f"], line["g"], line["h"]) == (str(moment), str(number), "[1, 'b']")


def test_of_what_a_library_says_only_the_first_line_is_logged() -> None:
    # As asyncio does, which goes on with the words of an error.
    with logged(AppEnv.PRODUCTION) as written:
        logging.getLogger("theirs").error("Task exception\nfuture: %r", ValueError(CANARY))
    assert json.loads(written())["event"] == "Task exception"
    assert CANARY not in written()


STRAYS: Final = f"""
import asyncio, gc, logging, threading, warnings
import main

class Fails:
    def __del__(self): raise ValueError("{CANARY}")

def fail(): raise ValueError("{CANARY}")

async def forget():
    task = asyncio.ensure_future(asyncio.to_thread(fail))
    await asyncio.wait([task])
    del task
    gc.collect()

main._worker_app()
thread = threading.Thread(target=fail)
thread.start()
thread.join()
asyncio.run(forget())
Fails()
gc.collect()
warnings.warn("a warning\\nof two lines")
logging.getLogger("theirs").warning("%d", "{CANARY}")
fail()
"""


def test_what_nobody_catches_is_logged_by_class_and_never_by_its_words(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "default", "-c", STRAYS], cwd=tmp_path, capture_output=True,
        text=True, check=False,
        env=environment(tmp_path, APP_ENV="production", PYTHONPATH=str(ROOT)),
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (1, "")
    assert CANARY not in done.stderr
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    told = {line["event"]: line.get("error") for line in lines}
    uncaught = dict.fromkeys(("thread_failed", "unraisable", "uncaught"), "ValueError")
    assert uncaught.items() <= told.items()
    assert told["Task exception was never retrieved"] == "ValueError"
    assert any("a warning" in event for event in told)
