"""
Checkpoints of the audit trail beside the backups: what the database cannot take back.

One small object each, `audit-CHAIN-EVENT-LINK.json`, in every store. Whoever cuts the trail's end
off, or puts the whole database back, leaves a checkpoint of what is not there any more.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import Any, Final, NamedTuple

import orjson
import structlog
from sqlalchemy import select
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from backend.backup.storage import Store
from backend.backup.stores import StoreAddress, open_store
from backend.crypto.chain import ChainKeys
from backend.crypto.checkpoints import (
    MAX_BYTES,
    Checkpoint,
    CheckpointRefusedError,
    ForeignCheckpointError,
    read_checkpoint,
)
from backend.crypto.signing import public_key_of
from backend.db_utils import session_scope
from backend.errors import (
    BackupDamagedError,
    ConflictError,
    CryptoError,
    HoldfastError,
    NotFoundError,
)
from backend.models import AuditEvent
from backend.services.chain_service import RESUMED, get_chain_service
from backend.services.reference_service import chain_keys_of
from backend.services.store_service import (
    addresses,
    get_store_service,
    is_elsewhere,
    store,
)

log = structlog.get_logger(__name__)
_PREFIX: Final = "audit-"
_SUFFIX: Final = ".json"
_NUMBER: Final = re.compile("[0-9]{16,19}", re.ASCII)
_OF_ANYBODY: Final = re.compile(r"audit-([0-9a-f]{16})-([0-9]{16,19})-[0-9a-f]{16}\.json", re.ASCII)
_RESUMPTION: Final = (
    select(AuditEvent.__table__.c.detail)
    .where(AuditEvent.action == RESUMED)
    .order_by(AuditEvent.id.desc())
    .limit(1)
)


class UnlinkedError(ConflictError):
    """The trail ends with no event that a checkpoint could speak of."""

    code = "trail_unlinked"


class Other(NamedTuple):
    """Another installation's trail: which, up to which event it went, and where that is told."""

    chain_id: str
    event_id: int
    store: str


class Wrong(NamedTuple):
    """An object that is no checkpoint of ours."""

    event_id: int
    name: str
    store: str
    foreign: bool


@dataclass(slots=True)
class Known:
    """
    What the stores say of one trail.

    Attributes:
        good: The checkpoints that we have signed, by digest.
        wrong: Objects under the trail's names that it did not make: where they lie, and whether
            another key has signed them.
        others: Other trails of which there are checkpoints, by their ids; only names were read.
        silent: Stores that do not answer.
    """

    good: dict[str, Checkpoint] = field(default_factory=dict)
    wrong: list[Wrong] = field(default_factory=list)
    others: dict[str, Other] = field(default_factory=dict)
    silent: list[str] = field(default_factory=list)

    @property
    def newest(self) -> Checkpoint | None:
        return max(self.good.values(), key=lambda each: each.at, default=None)

    def note_other(self, name: str, url: str) -> None:
        if found := _OF_ANYBODY.fullmatch(name):
            chain_id, event_id = found[1], int(found[2])
            known = self.others.get(chain_id)
            if known is None or known.event_id < event_id:
                self.others[chain_id] = Other(chain_id, event_id, url)

    def missing(self, since: datetime) -> Iterator[Mapping[str, Any]]:
        """
        Yield what checkpoints say of ones before them that are gone, while older ones are there.

        Age takes the oldest first; and they are not missed, for later ones say as much.
        """
        oldest = min((each.at for each in self.good.values()), default=None)
        for each in self.good.values():
            before = each.previous
            if before is None or oldest is None or before["digest"] in self.good:
                continue
            # A store that was away for long may have a much older one still.
            if datetime.fromisoformat(before["at"]) > max(oldest, since):
                yield before


class CheckpointService:
    """Makes checkpoints, and reads them."""

    def make(self) -> Checkpoint | None:
        """
        Sign how the trail ends now, in every store; `None` if the newest checkpoint says it.

        Raises:
            UnavailableError: The first store does not answer, or cannot be written.
            UnlinkedError: No event is left, or the last one has lost its link.
            ConflictError: Something else lies under the checkpoint's name.
        """
        with session_scope(read_only=True) as session:
            keys, head = chain_keys_of(session), get_chain_service().head(session)
            known_lost_until = _known_lost_until(session)
        if head is None or head.link is None or not head.is_linked:
            raise UnlinkedError("the trail's last event has no link: `audit verify` says more")
        newest = _newest(addresses()[0], keys, head.id)
        if newest is not None and (newest.event_id, newest.link) == (head.id, head.link):
            return None
        made = Checkpoint(
            keys.chain_id,
            head.id,
            head.link,
            _moment_after(newest.at if newest else None, known_lost_until),
            newest.reference() if newest else None,
        )
        _write(made, keys)
        get_store_service().put_copies(_name(made))
        return made

    def make_if_possible(self) -> None:
        """Make one after an act that must not fail for it: the next one makes up for it."""
        # Another store may be of an installation that goes on with the same trail.
        if is_elsewhere():
            return
        try:
            self.make()
        except (HoldfastError, SQLAlchemyError) as err:
            code = err.code if isinstance(err, HoldfastError) else type(err).__name__
            log.error("checkpoint_not_made", code=code)

    def known(self, keys: ChainKeys) -> Known:
        """Read what all stores say of the trail that has these *keys*."""
        known = Known()
        for address in addresses():
            try:
                _read_store(address, keys, known)
            except HoldfastError as err:
                log.warning("checkpoints_not_read", store=address.url, code=err.code)
                known.silent.append(address.url)
        return known

    def is_ours(self, where: Store, name: str) -> bool:
        """Whether an object is a checkpoint that we have signed, under its own name."""
        with session_scope(read_only=True) as session:
            keys = chain_keys_of(session)
        try:
            _read(where, name, keys)
        except HoldfastError:
            return False
        return True

    def forget(self, before: datetime) -> None:
        """Delete the checkpoints of before *before* in every store, but the newest of each."""
        with session_scope(read_only=True) as session:
            keys = chain_keys_of(session)
        for address in addresses():
            try:
                found = _read_store(address, keys, Known()).good.values()
                # The oldest first: cut short, this leaves no gap.
                for each in sorted(found, key=lambda each: each.at)[:-1]:
                    if each.at < before:
                        open_store(address).delete(_name(each))
            except HoldfastError as err:
                log.warning("checkpoints_not_deleted", store=address.url, code=err.code)


def is_checkpoint(name: str) -> bool:
    """Say whether an object has the name of a checkpoint, whoever's."""
    return name.startswith(_PREFIX)


def _known_lost_until(session: Session) -> datetime | None:
    """Return when the last checkpoint was made that the last restore knows to be of lost events."""
    # What somebody has damaged tells nothing, and the trail's check will say so.
    with suppress(CryptoError, ValueError, TypeError, KeyError):
        return datetime.fromisoformat(orjson.loads(session.scalar(_RESUMPTION) or "{}")["until"])
    return None


def _moment_after(*others: datetime | None) -> datetime:
    """Return the time, or one after all *others*, which a clock that was ahead has given."""
    after = [each + timedelta(microseconds=1) for each in others if each is not None]
    return max([datetime.now(UTC), *after])


def _write(made: Checkpoint, keys: ChainKeys) -> None:
    try:
        with store().create(_name(made)) as file:
            file.write(made.document(keys.signing))
    except ConflictError:
        # Another process may have been as fast.
        try:
            _read(store(), _name(made), keys)
        except (CheckpointRefusedError, BackupDamagedError):
            raise ConflictError(f"{_name(made)} is there, and no checkpoint of ours") from None


def _newest(address: StoreAddress, keys: ChainKeys, last: int) -> Checkpoint | None:
    """
    Return the newest checkpoint of a store, as a rule by reading that one alone.

    It is the one of the highest event, unless a restore has lost events that checkpoints know.
    """
    where = open_store(address)
    for name in reversed(where.names(f"{_PREFIX}{keys.chain_id}-", _SUFFIX)):
        with suppress(NotFoundError, CheckpointRefusedError, BackupDamagedError):
            found = _read(where, name, keys)
            if found.event_id <= last:
                return found
            break
    return _read_store(address, keys, Known()).newest


def _read_store(address: StoreAddress, keys: ChainKeys, known: Known) -> Known:
    where = open_store(address)
    for name in where.names(_PREFIX, _SUFFIX):
        if not name.startswith(f"{_PREFIX}{keys.chain_id}-"):
            known.note_other(name, address.url)
            continue
        try:
            found = _read(where, name, keys)
        except NotFoundError:
            # Deleted for its age meanwhile.
            continue
        except (CheckpointRefusedError, BackupDamagedError) as err:
            foreign = isinstance(err, ForeignCheckpointError)
            known.wrong.append(Wrong(_event_id(name), name, address.url, foreign))
        else:
            known.good[found.digest] = found
    return known


def _read(where: Store, name: str, keys: ChainKeys) -> Checkpoint:
    document = where.read(name, MAX_BYTES + 1)
    found = read_checkpoint(document, public_key_of(keys.signing))
    if _name(found) != name:
        raise CheckpointRefusedError("another checkpoint lies under this name")
    return found


def _name(made: Checkpoint) -> str:
    return f"{_PREFIX}{made.chain_id}-{made.event_id:016}-{made.link[:16]}{_SUFFIX}"


def _event_id(name: str) -> int:
    """Return what a name tells, which anybody may have given: 0 for nothing."""
    told = name.removesuffix(_SUFFIX).split("-")[2:3]
    return int(told[0]) if told and _NUMBER.fullmatch(told[0]) else 0


@lru_cache(maxsize=1)
def get_checkpoint_service() -> CheckpointService:
    return CheckpointService()
