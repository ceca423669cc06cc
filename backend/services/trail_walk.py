"""
Going through the audit trail's rows in order, to the first that is not what was recorded.

One pass, in as much memory as a thousand rows take; a second one only to say what was done there.
"""

from contextlib import closing
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from itertools import islice
from typing import Final

import orjson
from sqlalchemy.orm import Session

from backend.crypto.chain import START, ChainKeys, Event, canonical, link
from backend.crypto.checkpoints import Checkpoint
from backend.services.chain_service import BEGUN, RESUMED, Older, StoredEvent, get_chain_service
from backend.services.checkpoint_service import Known

# So many events that were taken away are found by the numbers that the later ones had.
_MOST_TAKEN: Final = 1000


class BreakKind(StrEnum):
    """What somebody has done to the trail, or to its checkpoints."""

    EDITED = "edited"
    REMOVED = "removed"
    REORDERED = "reordered"
    TRUNCATED = "truncated"
    ROLLED_BACK = "rolled_back"
    BEGUN_AGAIN = "begun_again"
    CHECKPOINT_FOREIGN = "checkpoint_foreign"
    CHECKPOINT_CHANGED = "checkpoint_changed"
    CHECKPOINT_MISSING = "checkpoint_missing"


@dataclass(frozen=True, slots=True)
class Break:
    """A place at which the trail does not hold; *event_id* is the first event that it is about."""

    kind: BreakKind
    event_id: int
    detail: str


@dataclass(slots=True)
class Loss:
    """
    Events that a restore is known not to have brought back: those after *after*, until *at*.

    Attributes:
        until: When the last checkpoint was made that the restore found, by the clock of then.
    """

    after: int
    at: datetime
    until: datetime | None
    known_until: int | None = None


class Walk:
    """
    One pass over the rows.

    Attributes:
        last: Number of the last row that fits, and *link* its link: none before the chain.
        agreed: The last event of which a checkpoint says the same as its row.
        replaced: Trails of databases in the place of which a restore has put this one.
    """

    def __init__(self, keys: ChainKeys, known: Known) -> None:
        self.keys = keys
        self.older = Older()
        self.events = self.last = self.agreed = 0
        self.link: bytes | None = None
        self.losses: list[Loss] = []
        self.replaced: set[str] = set()
        self._awaited: dict[int, list[Checkpoint]] = {}
        for each in known.good.values():
            self._awaited.setdefault(each.event_id, []).append(each)
        self._contradicted: list[tuple[Checkpoint, StoredEvent]] = []

    def through(self, session: Session) -> Break | None:
        """Return the first break of the trail that *session* sees."""
        with closing(get_chain_service().stored(session)) as rows:
            found = next(filter(None, map(self._step, rows)), None)
        if found is not None:
            found = _explained(session, self, found)
        return self._by_checkpoints(cut_short=found is not None) or found or self._unlinked()

    def _step(self, stored: StoredEvent) -> Break | None:
        found = self._fit(stored)
        if found is None:
            self.events, self.last = self.events + 1, stored.id
            self._compare(stored)
        return found

    def _fit(self, stored: StoredEvent) -> Break | None:
        if self.link is not None:
            return self._next(stored)
        if stored.link is not None:
            return self._first(stored)
        if stored.event is not None and stored.event.action == BEGUN:
            return _begun_again(stored.id)
        self.older.add(stored, self.keys)
        return None

    def _first(self, stored: StoredEvent) -> Break | None:
        event = self._fitting(stored, START)
        if event is None and stored.event is not None and stored.event.action == BEGUN:
            return _edited(stored.id)
        if self.older.first is not None and event is None and stored.id == self.last + 1:
            # No number is missing, so the chain began with one of them.
            return Break(
                BreakKind.EDITED, self.older.first,
                f"or one after it, up to {self.last}, was linked, and is not what was recorded",
            )  # fmt: skip
        if event is None or event.action != BEGUN:
            return Break(BreakKind.REMOVED, self.last + 1, "the beginning of the chain is missing")
        told = orjson.loads(event.detail or "{}")
        return None if told == self.older.told() else self._other_older(told["rows"], stored.id)

    def _other_older(self, rows: int, begun: int) -> Break:
        if not rows and self.older.first is not None:
            return Break(BreakKind.EDITED, self.older.first, "was put before the chain's beginning")
        kind = BreakKind.REMOVED if self.older.rows < rows else BreakKind.EDITED
        return Break(kind, begun, "the events of before the chain are not what they were")

    def _next(self, stored: StoredEvent) -> Break | None:
        if stored.id != self.last + 1:
            return Break(BreakKind.REMOVED, self.last + 1, "is missing")
        event = self._fitting(stored, self.link or START)
        if event is None:
            return _edited(stored.id)
        if event.action == BEGUN:
            return _begun_again(stored.id)
        if event.action == RESUMED:
            self._resumed(event)
        return None

    def _resumed(self, event: Event) -> None:
        told = orjson.loads(event.detail or "{}")
        until = told.get("until")
        self.losses.append(Loss(told["after"], event.at, until and datetime.fromisoformat(until)))
        self.replaced.add(told.get("instead_of", ""))

    def _fitting(self, stored: StoredEvent, previous: bytes) -> Event | None:
        """Return the event, if its link is the one that it has to have, and go on from there."""
        if stored.event is None:
            return None
        expected = link(self.keys.link, previous, stored.spelled)
        if expected.hex() != stored.link:
            return None
        self.link = expected
        return stored.event

    def _compare(self, stored: StoredEvent) -> None:
        for each in self._awaited.pop(stored.id, ()):
            if each.link == stored.link:
                self.agreed = stored.id
            else:
                self._contradicted.append((each, stored))

    def _by_checkpoints(self, *, cut_short: bool) -> Break | None:
        """Return the first break that only checkpoints show, of before the walk's end."""
        for each, stored in self._contradicted:
            if not self._is_lost(each):
                return self._put_back(each, stored)
        if cut_short:
            return None
        ahead = [each for parts in self._awaited.values() for each in parts]
        if missing := [each.event_id for each in ahead if not self._is_lost(each)]:
            return Break(
                BreakKind.TRUNCATED,
                self.last + 1,
                f"is missing, and so are those up to {max(missing)} at least, of which a "
                "checkpoint speaks: cut off, or the database was put back to an earlier state",
            )
        return None

    def _put_back(self, told: Checkpoint, stored: StoredEvent) -> Break:
        if stored.link is None:
            return _begun_again(stored.id)
        return Break(
            BreakKind.ROLLED_BACK,
            stored.id,
            f"is another one than at {told.at.isoformat(timespec='seconds')}: after event "
            f"{self.agreed}, the last that a checkpoint confirms, the trail was put back to an "
            "earlier state and went on from there",
        )

    def _is_lost(self, told: Checkpoint) -> bool:
        """Whether *told* is about events of which a restore has recorded that they are lost."""
        for loss in self.losses:
            # Compared are two checkpoints' own times: the clock may have been wrong at the restore.
            if told.event_id > loss.after and loss.until is not None and told.at <= loss.until:
                loss.known_until = max(told.event_id, loss.known_until or 0)
                return True
        return False

    def _unlinked(self) -> Break | None:
        if self.link is not None:
            return None
        return Break(BreakKind.TRUNCATED, self.last + 1, "no event is left that has a link")


def _edited(event_id: int) -> Break:
    return Break(BreakKind.EDITED, event_id, "is not what was recorded")


def _begun_again(event_id: int) -> Break:
    return Break(
        BreakKind.BEGUN_AGAIN, event_id, "has lost its link: the chain was begun again after it"
    )


def _explained(session: Session, walk: Walk, found: Break) -> Break:
    """Tell an event that was moved, or whose successors were renumbered, from an edited one."""
    if found.kind not in (BreakKind.EDITED, BreakKind.REMOVED):
        return found
    wanted, previous = walk.last + 1, walk.link or START
    here, after = _two(session, walk.last)
    with closing(get_chain_service().stored(session, walk.last)) as rows:
        for stored in rows:
            if stored.event is None or stored.id == wanted:
                continue
            spelled = canonical(stored.event._replace(id=wanted))
            moved = link(walk.keys.link, previous, spelled).hex()
            if moved == stored.link or (here.id == wanted and moved == here.link):
                return Break(BreakKind.REORDERED, wanted, f"stands at number {stored.id}")
    if taken := _taken(walk, here, after):
        return Break(
            BreakKind.REMOVED, wanted, f"is missing with {taken - 1} after it, and what came then "
            "has its number",
        )  # fmt: skip
    return found


def _two(session: Session, after: int) -> list[StoredEvent]:
    with closing(get_chain_service().stored(session, after)) as rows:
        found = list(islice(rows, 2))
    return found + [StoredEvent(0, None)] * (2 - len(found))


def _taken(walk: Walk, here: StoredEvent, after: StoredEvent) -> int:
    """Return how many events were taken away before *here*, by the number that *after* had."""
    if after.event is None or here.id != walk.last + 1 or not here.link:
        return 0
    try:
        previous = bytes.fromhex(here.link)
    except ValueError:
        return 0
    for number in range(after.id, after.id + _MOST_TAKEN):
        spelled = canonical(after.event._replace(id=number))
        if link(walk.keys.link, previous, spelled).hex() == after.link:
            return number - 1 - here.id
    return 0
