"""Checking the audit trail: by its own links, and by the checkpoints beside the backups."""

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from functools import lru_cache

from sqlalchemy.orm import Session

from backend.crypto.signing import public_key_of, spell_public_key
from backend.db_utils import reading_any_text, session_scope, snapshot_scope
from backend.services.audit_service import Actor, get_audit_service
from backend.services.chain_service import RESUMED, get_chain_service
from backend.services.checkpoint_service import Known, Other, get_checkpoint_service
from backend.services.reference_service import chain_keys_of
from backend.services.trail_walk import Break, BreakKind, Loss, Walk
from backend.settings import get_settings

_MOST_TOLD = 10


class Verdict(StrEnum):
    """
    `incomplete`: the links hold, and no checkpoint could say what was cut off or put back; or there
    are checkpoints of another trail, of which this one says nothing.
    """

    OK = "ok"
    BROKEN = "broken"
    INCOMPLETE = "incomplete"


@dataclass(frozen=True, slots=True)
class Checked:
    """
    What a check has found.

    Attributes:
        events: How many fit, to the first break; *older* of them are of before the chain.
        breaks: The first one of the trail, and those of its checkpoints.
        losses: Events that restores are known not to have brought back.
        checkpoints: How many of ours there are; *checkpoint_at* and *checkpoint_event* are the
            newest one's.
        silent: Stores that did not answer.
        others: Trails of which the stores have checkpoints, and this trail no word: no restore has
            put it in their place.
        public_key: Whose signature the checkpoints have.
    """

    status: Verdict
    events: int
    older: int
    last: int
    breaks: list[Break]
    losses: list[Loss]
    checkpoints: int
    checkpoint_at: datetime | None
    checkpoint_event: int | None
    silent: list[str]
    others: list[Other]
    public_key: str


class TrailService:
    """Says whether the trail is what was recorded."""

    def verify(self, actor: Actor) -> Checked:
        """
        Check the whole trail, and record that it was checked.

        Manages its own transactions.
        """
        with session_scope(read_only=True) as session:
            keys = chain_keys_of(session)
        # Before the rows: so they speak of no event that comes after what is read.
        known = get_checkpoint_service().known(keys)
        walk = Walk(keys, known)
        with snapshot_scope() as session, reading_any_text(session):
            found = walk.through(session)
        breaks, newest = [*([found] if found else []), *_wrong(known)], known.newest
        # Who empties the trail and has a new one begun leaves the checkpoints of the old one.
        others = [each for each in known.others.values() if each.chain_id not in walk.replaced]
        checked = Checked(
            _verdict(breaks, known, others),
            walk.events,
            walk.older.rows,
            walk.last,
            breaks,
            walk.losses,
            len(known.good),
            newest.at if newest else None,
            newest.event_id if newest else None,
            known.silent,
            others,
            spell_public_key(public_key_of(keys.signing)),
        )
        with session_scope() as session:
            get_audit_service().record(
                session, "audit_verified", actor, outcome=checked.status, events=checked.events,
                breaks=[f"{each.kind} {each.event_id}" for each in breaks[:_MOST_TOLD]],
            )  # fmt: skip
        return checked

    def resume(self, live: Session, restored: Session, actor: Actor) -> None:
        """
        Record in a database that goes on in the place of a lost one which events it has.

        What came after them, only checkpoints know; where *live* still has them, nothing is lost.
        """
        replaced, keys = chain_keys_of(live).chain_id, chain_keys_of(restored)
        if replaced == keys.chain_id:
            return
        head = get_chain_service().head(restored)
        newest = get_checkpoint_service().known(keys).newest
        get_audit_service().record(
            restored, RESUMED, actor, after=head.id if head else 0,
            until=newest.at.isoformat() if newest else None, instead_of=replaced,
        )  # fmt: skip


def _verdict(breaks: list[Break], known: Known, others: list[Other]) -> Verdict:
    if breaks:
        return Verdict.BROKEN
    return Verdict.INCOMPLETE if known.silent or others or not known.good else Verdict.OK


def _wrong(known: Known) -> list[Break]:
    breaks = []
    for each in known.wrong:
        kind = BreakKind.CHECKPOINT_FOREIGN if each.foreign else BreakKind.CHECKPOINT_CHANGED
        what = "was signed by another key" if each.foreign else "is not as it was signed"
        breaks.append(Break(kind, each.event_id, f"{each.name} in {each.store} {what}"))
    kept_days = get_settings().backup_max_age_days
    for told in known.missing(datetime.now(UTC) - timedelta(days=kept_days)):
        detail = f"the checkpoint of {told['at']} is missing, and the next one names it"
        breaks.append(Break(BreakKind.CHECKPOINT_MISSING, told["event_id"], detail))
    return breaks


@lru_cache(maxsize=1)
def get_trail_service() -> TrailService:
    return TrailService()
