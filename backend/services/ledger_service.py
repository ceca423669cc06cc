"""
The ledger: erasures and withdrawals that a restore must not undo.

Each entry is a row of the control tables and a small encrypted object beside the backups, so it
survives the loss of the database. The object is written first, before anything is destroyed: one
without a row is an act that was cut short, and is finished at the next start.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import Any, Final
from uuid import UUID, uuid4

import orjson
from sqlalchemy import event, select
from sqlalchemy.orm import Session

from backend.backup.storage import Store
from backend.crypto import keyring
from backend.crypto.keyring import KEY_ID_BYTES
from backend.crypto.values import Scope
from backend.errors import BackupDamagedError, ConflictError, HoldfastError
from backend.models import DataConsent, LedgerEntry, LedgerKind, User
from backend.privacy.declarations import EraseMode
from backend.services.audit_service import ITSELF, Actor, get_audit_service
from backend.services.reference_service import reference_to
from backend.services.store_service import get_store_service, store, stores

_SCOPE: Final = Scope("ledger")
_PREFIX: Final = "ledger-"
_SUFFIX: Final = ".enc"
_MAX_OBJECT_BYTES: Final = 4096

MODES: Final = {LedgerKind.ERASE: EraseMode.DELETE, LedgerKind.ANONYMIZE: EraseMode.ANONYMIZE}

EraseAgain = Callable[[Session, Sequence[LedgerEntry], Mapping[str, int]], int]


class LedgerDamagedError(BackupDamagedError):
    """An entry of the ledger beside the backups is not what was written."""

    code = "ledger_damaged"


@dataclass(frozen=True, slots=True)
class Replayed:
    """How many people were erased again, and how many consents withdrawn again."""

    erasures: int
    consents: int


class LedgerService:
    """Writes entries and applies them to a database that may not know them."""

    def enter(
        self,
        session: Session,
        kind: LedgerKind,
        subject_ref: str,
        actor: Actor,
        *,
        at: datetime,
        purpose: str | None = None,
        identity_refs: Sequence[str] = (),
    ) -> LedgerEntry:
        """
        Write an entry: the object at once and durably, the row with the session's transaction.

        Args:
            identity_refs: References of the addresses by which others' rows name the person.

        Raises:
            UnavailableError: The store cannot be written; then the act must not happen.
        """
        entry = LedgerEntry(
            id=uuid4(),
            kind=kind,
            subject_ref=subject_ref,
            purpose=purpose,
            recorded_at=at,
            recorded_by=actor.ref(session),
            identity_refs=orjson.dumps(identity_refs).decode() if identity_refs else None,
        )
        name = self._store_object(entry)
        session.add(entry)
        _when_committed(session, lambda: get_store_service().put_copies(name))
        return entry

    def withdraw_object(self, entry: LedgerEntry) -> None:
        """Take back the object of an act that did not happen."""
        store().delete(_name(entry.id))

    def replay(self, session: Session, erase: EraseAgain) -> Replayed:
        """
        Apply every entry that lies in the store to the database of *session*; idempotent.

        A person is found by the keyed reference of their random `uid`, never by a number that
        another person may have by now.

        Args:
            erase: Carries erasures out in the session's transaction, given the numbers of the
                people who are there, by reference; returns how many acts changed anything.

        Raises:
            BackupDamagedError: An entry cannot be read; the promises could not be kept.
        """
        entries = self._stored_entries(session)
        known = set(session.scalars(select(LedgerEntry.id)))
        session.add_all(entry for entry in entries if entry.id not in known)
        people = self._people_of(session, entries)
        consents = sum(
            self._withdraw(session, entry, people[entry.subject_ref])
            for entry in entries
            if entry.kind is LedgerKind.WITHDRAW_CONSENT and entry.subject_ref in people
        )
        acts = [entry for entry in entries if entry.kind in MODES]
        erasures = erase(session, acts, people)
        session.flush()
        return Replayed(erasures, consents)

    def mirror(self, session: Session) -> None:
        """Write the objects of rows whose objects are missing: a store that was replaced."""
        present = set(store().names(_PREFIX, _SUFFIX))
        for entry in session.scalars(select(LedgerEntry)):
            if _name(entry.id) not in present:
                # Another process may be at it, too.
                with suppress(ConflictError):
                    self._store_object(entry)

    def is_ours(self, where: Store, name: str) -> bool:
        """Whether an object is an entry that one of our keys sealed, under its own name."""
        try:
            _read_object(name, where)
        except HoldfastError:
            return False
        return True

    def reseal(self, session: Session) -> int:
        """
        Seal anew the objects that a previous key sealed; return how many.

        Only of entries that *session* knows: an act that is under way may still take its object
        back, and writing that again would carry the act out after all.
        """
        primary = keyring.current().primary.key_id.hex()
        known = {_name(key) for key in session.scalars(select(LedgerEntry.id))}
        old = [
            (where, name) for where, name, key_id in sealed_with()
            if key_id != primary and name in known
        ]  # fmt: skip
        for where, name in old:
            cipher = keyring.current().cipher(_SCOPE)
            body = cipher.open(where.read(name, _MAX_OBJECT_BYTES), name.encode())
            where.replace(name, cipher.seal(body, name.encode()))
        return len(old)

    def unfinished(self, session: Session) -> set[str]:
        """The objects in the store whose entries this database does not know."""
        known = {_name(key) for key in session.scalars(select(LedgerEntry.id))}
        return set(store().names(_PREFIX, _SUFFIX)) - known

    def _store_object(self, entry: LedgerEntry) -> str:
        name = _name(entry.id)
        body = {
            "id": entry.id,
            "kind": entry.kind,
            "subject_ref": entry.subject_ref,
            "purpose": entry.purpose,
            "recorded_at": entry.recorded_at,
            "recorded_by": entry.recorded_by,
            "identity_refs": entry.identity_refs,
        }
        sealed = keyring.current().cipher(_SCOPE).seal(orjson.dumps(body), name.encode())
        with store().create(name) as file:
            file.write(sealed)
        return name

    def _stored_entries(self, session: Session) -> list[LedgerEntry]:
        """Read the store's entries and add this database's own, oldest first."""
        entries = {entry.id: entry for entry in session.scalars(select(LedgerEntry))}
        for name in store().names(_PREFIX, _SUFFIX):
            entry = _read_object(name)
            entries.setdefault(entry.id, entry)
        return sorted(entries.values(), key=lambda entry: entry.recorded_at)

    def _people_of(self, session: Session, entries: Iterable[LedgerEntry]) -> dict[str, int]:
        """Find which people of this database the entries speak of."""
        wanted = {entry.subject_ref for entry in entries}
        people: dict[str, int] = {}
        if wanted:
            statement = select(User.id, User.uid).where(User.anonymized_at.is_(None))
            for user_id, uid in session.execute(statement.execution_options(yield_per=5000)):
                ref = reference_to(session, uid)
                if ref in wanted:
                    people[ref] = user_id
        return people

    def _withdraw(self, session: Session, entry: LedgerEntry, user_id: int) -> bool:
        if session.get(DataConsent, entry.id) is not None:
            return False
        session.add(
            DataConsent(
                id=entry.id,
                user_id=user_id,
                purpose=entry.purpose or "",
                granted=False,
                method="ledger",
                recorded_at=entry.recorded_at,
            )
        )
        get_audit_service().record(
            session, "consent", ITSELF, outcome="applied_again",
            subject=entry.subject_ref, purpose=entry.purpose, granted=False,
        )  # fmt: skip
        return True


def _when_committed(session: Session, put_copies: Callable[[], None]) -> None:
    """Elsewhere only what has happened: an act that is taken back must not be found there."""
    waiting = [put_copies]

    def tell(session: Session) -> None:
        # The release of a savepoint is told like a commit, and settles nothing.
        if waiting and not session.in_nested_transaction():
            waiting.pop()()

    event.listen(session, "after_commit", tell)


def sealed_with() -> list[tuple[Store, str, str]]:
    """Return each stored entry: where it lies, its name, and the key it says it needs."""
    return [
        (where, name, where.read(name, 1 + KEY_ID_BYTES)[1:].hex())
        for where in stores()
        for name in where.names(_PREFIX, _SUFFIX)
    ]


def _name(entry_id: UUID) -> str:
    return f"{_PREFIX}{entry_id}{_SUFFIX}"


def _read_object(name: str, where: Store | None = None) -> LedgerEntry:
    sealed = (where or store()).read(name, _MAX_OBJECT_BYTES)
    body: dict[str, Any] = orjson.loads(
        keyring.current().cipher(_SCOPE).open(sealed, name.encode())
    )
    entry = LedgerEntry(
        id=UUID(body["id"]),
        kind=LedgerKind(body["kind"]),
        subject_ref=body["subject_ref"],
        purpose=body["purpose"],
        recorded_at=datetime.fromisoformat(body["recorded_at"]),
        recorded_by=body["recorded_by"],
        # Entries of before there were any lack it.
        identity_refs=body.get("identity_refs"),
    )
    if _name(entry.id) != name:
        raise LedgerDamagedError(f"{name} is another entry of the ledger")
    return entry


@lru_cache(maxsize=1)
def get_ledger_service() -> LedgerService:
    return LedgerService()
