"""
What runs inside a Holdfast process of its own to measure access and erasure.

Reads one JSON object (`task` and what it takes) and writes another. `prepare` makes an
installation with other people in it; `access` and `erase` measure in rounds in which all take
turns; `scan` searches the whole database for an erased person; `memory` does one thing once and
says how much more the process held meanwhile.
"""

import gc
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

import orjson

from backend.db_utils import get_engine, session_scope
from backend.models import DATA_MAP
from backend.privacy.declarations import EraseMode
from backend.privacy.export import ExportFormat
from backend.privacy.scan import scan as search
from backend.services.audit_service import COMMAND_LINE, get_audit_service
from backend.services.compliance_service import get_compliance_service
from backend.services.erasure_service import Erasure
from backend.services.setup_service import get_setup_service
from benchmarks import privacy_rows as rows
from benchmarks.memory import begin_memory, peak_mib
from benchmarks.privacy_peers import (
    Driver,
    Selects,
    Statements,
    count_everything,
    fingerprint,
    read_everything,
)

Call = Callable[[], object]
Seconds = dict[str, list[float]]
_TABLES: Final = ("users", *rows.STAY_TABLES)
_WARM_STAYS: Final = 4
# Where a round is long, what is met for the first time in it is nothing beside the rest.
_WARM_UPS: Final = 3


def prepare(order: dict[str, Any]) -> dict[str, Any]:
    get_setup_service().prepare()
    guests = rows.guests(order["rows"])
    rows.fill(guests)
    return {"rows": guests.rows}


def access(order: dict[str, Any]) -> Seconds:
    get_setup_service().open()
    person = rows.person(0, order["stays"])
    rows.plant([person])
    selects = Selects(person.first)

    def audited() -> None:
        with session_scope() as session:
            get_audit_service().record(session, "export", COMMAND_LINE)
        selects()

    calls: dict[str, Call] = {
        "holdfast": lambda: _export(person.first),
        "selects": selects,
        "driver": Driver(person.first),
    }
    # Beside many rows, one more for the audit trail is not seen.
    if order["is_short"]:
        calls["audited"] = audited
    _require_same_answer(person.first, selects)
    found = _alternate(calls, order["rounds"], _WARM_UPS if order["is_short"] else 0)
    rows.clear()
    return found


def erase(order: dict[str, Any]) -> Seconds:
    get_setup_service().open()
    mode = EraseMode(order["mode"])
    found: Seconds = {"holdfast": [], "statements": []}
    # The first round is a small one, and warms up.
    for number in range(order["rounds"] + 1):
        stays = order["stays"] if number else _WARM_STAYS
        ours, theirs = rows.person(0, stays), rows.person(1, stays)
        rows.plant([ours, theirs])
        calls: dict[str, Call] = {
            "holdfast": lambda ours=ours: _erase(ours.first, mode),  # type: ignore[misc] # Bound now.
            "statements": Statements(theirs.first, mode),
        }
        for name in _turn(calls, number):
            rows.checkpoint()
            seconds = _wall_seconds(calls[name])
            if number:
                found[name].append(seconds)
        _require_same_end(ours, theirs)
        rows.clear()
    return found


def scan(order: dict[str, Any]) -> Seconds:
    """Search the whole database for what an erased person's rows held; rows a second."""
    get_setup_service().open()
    person = rows.person(0, order["stays"])
    rows.plant([person])
    words = _erase(person.first, EraseMode.DELETE).words
    if words is None:
        raise RuntimeError("the erasure left nothing to look for")
    every = count_everything()
    calls: dict[str, Call] = {
        "holdfast": lambda: search(get_engine(), DATA_MAP, words),
        "reading": read_everything,
    }
    found = _alternate(calls, order["rounds"], 0)
    rows.clear()
    return {name: [every / seconds for seconds in taken] for name, taken in found.items()}


def memory(order: dict[str, Any]) -> dict[str, float]:
    get_setup_service().open()
    warm, person = rows.person(0, _WARM_STAYS), rows.person(1, order["stays"])
    rows.plant([warm, person])
    acts: dict[str, Callable[[int], Call]] = {
        "export": lambda user: lambda: _export(user),
        "selects": Selects,
        "erase": lambda user: lambda: _erase(user, EraseMode.DELETE),
        "statements": lambda user: Statements(user, EraseMode.DELETE),
    }
    act = acts[order["act"]]
    act(warm.first)()
    big = act(person.first)
    gc.collect()
    before = begin_memory()
    big()
    grown = peak_mib() - before
    rows.clear()
    return {"growth_mib": grown}


def _export(user_id: int) -> int:
    with session_scope() as session:
        chunks = get_compliance_service().export(session, COMMAND_LINE, user_id, ExportFormat.JSON)
    return sum(map(len, chunks))


def _erase(user_id: int, mode: EraseMode) -> Erasure:
    with session_scope() as session:
        return get_compliance_service().erase(
            session, COMMAND_LINE, user_id, mode, reason="benchmark", dry_run=False
        )


def _alternate(calls: Mapping[str, Call], rounds: int, warm_ups: int) -> Seconds:
    found: Seconds = {name: [] for name in calls}
    for number in range(warm_ups + rounds):
        for name in _turn(calls, number):
            seconds = _wall_seconds(calls[name])
            if number >= warm_ups:
                found[name].append(seconds)
    return found


def _turn(calls: Mapping[str, Call], number: int) -> Iterator[str]:
    """Let another one begin each round."""
    names = list(calls)
    first = number % len(names)
    yield from names[first:] + names[:first]


def _wall_seconds(call: Call) -> float:
    # The server's time counts too, and what the collector finds is nobody's own.
    gc.collect()
    gc.disable()
    try:
        started = time.perf_counter()
        call()
        return time.perf_counter() - started
    finally:
        gc.enable()


def _require_same_answer(user_id: int, selects: Selects) -> None:
    with session_scope() as session:
        chunks = get_compliance_service().export(session, COMMAND_LINE, user_id, ExportFormat.JSON)
    ours, theirs = orjson.loads(b"".join(chunks))["data"], orjson.loads(selects())
    for table in _TABLES:
        one, other = (sorted(found[table], key=lambda row: row["id"]) for found in (ours, theirs))
        if one != other or not one:
            raise RuntimeError(f"the two did not read the same rows of {table}")


def _require_same_end(ours: rows.People, theirs: rows.People) -> None:
    one, other = (
        fingerprint(_TABLES, person.first, person.first + person.stays) for person in (ours, theirs)
    )
    if one != other:
        differ = ", ".join(name for name in one if one[name] != other[name])
        raise RuntimeError(f"the two left other things: {differ}")


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep what libraries print out of the answer."""
    out, sys.stdout = sys.stdout, sys.stderr
    try:
        yield
    finally:
        sys.stdout = out


_TASKS: Final[dict[str, Callable[[dict[str, Any]], Mapping[str, Any]]]] = {
    "prepare": prepare,
    "access": access,
    "erase": erase,
    "memory": memory,
    "scan": scan,
}


def main() -> None:
    order = json.load(sys.stdin)
    with _quiet():
        found = _TASKS[order["task"]](order)
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
