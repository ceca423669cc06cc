"""Mentions: people whom somebody else's row names, found again by reference after a restore."""

from collections.abc import Iterator, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any
from uuid import UUID

import orjson
from sqlalchemy import or_, select, tuple_
from sqlalchemy.orm import Session

from backend.models import BLIND_INDEXES, DATA_MAP, IDENTITY_INDEXES, LedgerEntry
from backend.privacy.declarations import Identity
from backend.privacy.mapped_tables import MappedTable
from backend.privacy.steps import Outcome, Step, carry_out
from backend.privacy.walk import reached, rows_of
from backend.services.reference_service import reference_to_address

_ROWS_PER_READ = 1_000
_WRITTEN_AT = "created_at"


class MentionService:
    """Redacts rows by what the ledger knows, which is no address."""

    def redact_again(
        self, session: Session, entries: Sequence[LedgerEntry], now: datetime
    ) -> dict[UUID, dict[str, int]]:
        """
        Redact the rows that named the people of *entries* when these were erased.

        A row that was written later is about them anew, and stays.

        Returns:
            By entry that changed anything, how many rows of which table.
        """
        erased: dict[str, LedgerEntry] = {}
        for entry in sorted(entries, key=lambda entry: entry.recorded_at):
            # The last erasure counts: what an earlier one reaches, it reaches too.
            erased |= dict.fromkeys(orjson.loads(entry.identity_refs or "[]"), entry)
        done: dict[UUID, dict[str, int]] = {}
        if not erased:
            return done
        for mapped in DATA_MAP.of_people:
            if not mapped.third_party_columns:
                continue
            keys = []
            for key, written_at, (identity, address) in self._named(session, mapped):
                known = erased.get(reference_to_address(session, identity, address))
                if (
                    known is not None
                    and written_at <= known.recorded_at
                    and not self._is_own(session, mapped, key, identity, address)
                ):
                    keys.append(key)
                    counts = done.setdefault(known.id, {})
                    counts[mapped.name] = counts.get(mapped.name, 0) + 1
            for at in range(0, len(keys), _ROWS_PER_READ):
                rows = tuple_(*mapped.keys).in_(keys[at : at + _ROWS_PER_READ])
                carry_out(session, DATA_MAP, [Step(mapped, Outcome.REDACTED, rows)], now)
        return done

    def _is_own(
        self,
        session: Session,
        mapped: MappedTable,
        key: tuple[Any, ...],
        identity: Identity,
        address: str,
    ) -> bool:
        """
        Whether the row is that of somebody who has this very address now.

        So it is where an erasure was put right: what came back is theirs, and is kept.
        """
        index = DATA_MAP.subject.identities[identity]
        people = index.in_(IDENTITY_INDEXES[identity].terms(address))
        mine = rows_of(DATA_MAP, mapped, people)
        if (shared := reached(DATA_MAP, mapped, people)) is not None:
            mine |= shared
        this = tuple_(*mapped.keys).in_([key])
        return session.execute(select(*mapped.keys).where(this, mine)).first() is not None

    def _named(
        self, session: Session, mapped: MappedTable
    ) -> Iterator[tuple[tuple[Any, ...], datetime, tuple[Identity, str]]]:
        """Yield key, time and address of every row that names somebody, as the walk does."""
        sources = {
            identity: next(i.source for i in BLIND_INDEXES if i.index_column is column)
            for identity, column in mapped.identities.items()
        }
        named = or_(*(source.is_not(None) for source in sources.values()))
        statement = select(*mapped.keys, mapped.table.c[_WRITTEN_AT], *sources.values())
        statement = statement.where(named).execution_options(yield_per=_ROWS_PER_READ)
        width = len(mapped.keys)
        for row in session.execute(statement):
            addresses = dict(zip(sources, row[width + 1 :], strict=True))
            # A telephone names somebody only where there is no e-mail address.
            identity = Identity.EMAIL if addresses.get(Identity.EMAIL) else Identity.PHONE
            if address := addresses.get(identity):
                yield tuple(row[:width]), row[width], (identity, address)


@lru_cache(maxsize=1)
def get_mention_service() -> MentionService:
    return MentionService()
