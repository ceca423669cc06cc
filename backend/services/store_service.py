"""
The stores of this installation: the first is the truth, the others hold copies of it.

Everything is written to the first one. Copies follow at once, and what could not be copied then
follows later: `sync` compares names, so that it may be killed and run again.
"""

import hashlib
import hmac
import io
import re
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar, copy_context
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from functools import lru_cache, partial
from pathlib import Path
from threading import Event, Thread
from typing import Final

import structlog

from backend.backup.manifest import (
    claimed_keys,
    delete_backup,
    finish_deletions,
    forget_gone,
    gone_ids,
    header_name,
    is_part,
    manifest_name,
    mark_gone,
    read_manifest,
    stored_ids,
)
from backend.backup.storage import Store
from backend.backup.stores import StoreAddress, open_store
from backend.crypto import keyring
from backend.crypto.files import HEADER_BYTES, KeyringLock, Opener
from backend.errors import (
    BackupDamagedError,
    ConflictError,
    CryptoError,
    HoldfastError,
    NotFoundError,
    UnknownKeyError,
)
from backend.settings import get_settings

log = structlog.get_logger(__name__)
_SMALL_BYTES: Final = 1024 * 1024
_ID: Final = "[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}"
# A folder may hold other things, and those are nobody's to carry elsewhere.
_OURS: Final = re.compile(
    rf"{_ID}\.(hfb|key|manifest\.json|gone\.json|zst\.gpg)|ledger-{_ID}\.enc|pgbackrest\.enc"
    r"|audit-[0-9a-f]{16}-[0-9]{16,19}-[0-9a-f]{16}\.json"
)
# Of these each must be one that we have made, by its own seal or signature.
_SIGNED: Final = ("ledger-", "audit-")

_other_address: ContextVar[StoreAddress | None] = ContextVar("other_address", default=None)


@dataclass(slots=True)
class Synced:
    """How many objects were copied and removed, and which stores could not be reached."""

    copied: int = 0
    removed: int = 0
    failed: list[str] = field(default_factory=list)


class StoreService:
    """Keeps the copies like the first store."""

    def __init__(self) -> None:
        # Set where a copy failed, until a `sync` has made up for it.
        self.sync_due = Event()

    def put_copies(self, name: str) -> None:
        """Have a small new object copied everywhere; what fails is copied by the next `sync`."""
        for address in addresses()[1:]:
            # Nobody waits for a store that is far away, or does not answer.
            copy = partial(self._put_copy, name, store(), address)
            # With the request's id in what it logs.
            Thread(target=copy_context().run, args=(copy,)).start()

    def _put_copy(self, name: str, source: Store, address: StoreAddress) -> None:
        try:
            open_store(address).copy_from(name, source)
        except ConflictError:
            return
        except HoldfastError as err:
            log.warning("copy_failed", object=name, store=address.url, code=err.code)
            self.sync_due.set()

    def remove_backup(self, backup_id: str) -> None:
        """
        Delete a backup everywhere, leaving a note that it was us.

        Raises:
            UnavailableError: The first store cannot be written; then nothing was deleted.
        """
        key_id, now = keyring.current().primary.key_id.hex(), datetime.now(UTC)
        for number, address in enumerate(addresses()):
            try:
                where = open_store(address)
                mark_gone(where, backup_id, now, key_id, signer(key_id))
                delete_backup(where, backup_id)
            except HoldfastError as err:
                if number == 0:
                    raise
                log.warning("copy_not_deleted", backup=backup_id, code=err.code)
                self.sync_due.set()

    def sign_notes_anew(self) -> None:
        """Have notes of deleted backups believed once the key that signed them is gone."""
        primary = keyring.current().primary.key_id.hex()
        for where in stores():
            for backup_id, deleted_at in gone_ids(where, signer).items():
                mark_gone(where, backup_id, deleted_at, primary, signer(primary))

    def forget_notes(self, before: datetime) -> None:
        """Drop notes of backups that would be too old by now: a gap that old misses nobody."""
        for where in stores():
            for backup_id, deleted_at in gone_ids(where, signer).items():
                if deleted_at < before:
                    forget_gone(where, backup_id)

    def sync(
        self,
        unsettled: Callable[[], Collection[str]] = tuple,
        is_ours: Callable[[Store, str], bool] = lambda _store, _name: True,
    ) -> Synced:
        """
        Make all stores hold the same: what any has, but for backups that we deleted ourselves.

        So a copy heals the first store, and a first store that was lost empties no copy. The
        ledger is never shortened: an entry that any store has is a promise.

        Args:
            unsettled: Says which objects are of acts that may still be taken back, when it is
                asked: they stay where they are.
            is_ours: Whether an object that a copy has is an entry of our ledger, or a checkpoint.
        """
        done = Synced()
        for address in addresses()[1:]:
            try:
                _sync(addresses()[0], address, unsettled, is_ours, done)
            except HoldfastError as err:
                log.warning("sync_failed", store=address.url, code=err.code)
                done.failed.append(address.url)
        if done.failed:
            self.sync_due.set()
        else:
            self.sync_due.clear()
        return done


def _sync(
    first_at: StoreAddress,
    copy_at: StoreAddress,
    unsettled: Callable[[], Collection[str]],
    is_ours: Callable[[Store, str], bool],
    done: Synced,
) -> None:
    first, copy = open_store(first_at), open_store(copy_at)
    gone = gone_ids(first, signer).keys() | gone_ids(copy, signer).keys()
    for target_at, source in ((first_at, copy), (copy_at, first)):
        there = open_store(target_at).names("", "")
        missing = set(source.names("", "")) - set(there)
        # Asked after the names: what came to be there in between may be taken back, too.
        missing -= set(unsettled())
        whole = set(stored_ids(source)) - gone
        for name in sorted(filter(_OURS.fullmatch, missing), key=_manifests_last):
            # Whoever can write into a copy must not stop us with what we cannot open.
            if source is copy and name.startswith(_SIGNED) and not is_ours(copy, name):
                log.warning("not_copied", object=name, code="not_of_ours")
                continue
            # What a killed process left of a backup is none, and must not spread.
            if is_part(name) and name.split(".")[0] not in whole:
                continue
            target = open_store(_with_lock_left(target_at, name.split(".")[0], source))
            try:
                target.copy_from(name, source)
            except (NotFoundError, ConflictError):
                # Deleted, or written by another process, meanwhile.
                log.info("not_copied", object=name)
            except BackupDamagedError as err:
                # No plain object: the others are copied all the same.
                log.warning("not_copied", object=name, code=err.code)
            else:
                done.copied += 1
    for backup_id in set(stored_ids(copy)) - gone:
        done.copied += _refreshed(copy, first, backup_id)
    # Asked again: one may have been deleted meanwhile.
    gone = gone_ids(first, signer).keys() | gone_ids(copy, signer).keys()
    done.removed += sum(finish_deletions(where, gone) for where in (first, copy))
    # What a killed process left half-written, and this one did not go on with.
    copy.sweep()


def _with_lock_left(address: StoreAddress, backup_id: str, source: Store) -> StoreAddress:
    """Lock a copy that is made late for no longer than the backup itself: its end was promised."""
    if not address.lock_days:
        return address
    try:
        made_at = read_manifest(source, backup_id, signer).moment
    except NotFoundError:
        # An entry of the ledger, or a note.
        return address
    except (BackupDamagedError, UnknownKeyError):
        return replace(address, lock_days=0)
    # One made within the hour is no late copy.
    past_days = (datetime.now(UTC) - made_at + timedelta(hours=23)).days
    return replace(address, lock_days=max(0, address.lock_days - past_days))


def _refreshed(copy: Store, first: Store, backup_id: str) -> bool:
    """Replace header and manifest of a backup that was given to another key meanwhile."""
    name = manifest_name(backup_id)
    try:
        current = read_manifest(first, backup_id, signer)
        with suppress(BackupDamagedError):
            if copy.read(name, _SMALL_BYTES) == first.read(name, _SMALL_BYTES):
                return False
        header = first.read(header_name(backup_id), HEADER_BYTES)
        opener = Opener(io.BytesIO(header), KeyringLock(keyring.current()))
    except (NotFoundError, BackupDamagedError, CryptoError):
        # What is wrong here must not spread.
        return False
    if opener.meta.get("backup") != backup_id:
        return False
    copy.replace(header_name(backup_id), header)
    copy.replace(name, current.document(signer(current.key_id)))
    return True


def _manifests_last(name: str) -> tuple[bool, str]:
    return name.endswith(manifest_name("")), name


def signer(key_id: str) -> Callable[[bytes], str]:
    """
    Return what signs manifests with a key.

    Raises:
        UnknownKeyError: It is not configured.
    """
    try:
        key = keyring.current().find(bytes.fromhex(key_id))
    except ValueError:
        raise BackupDamagedError("the manifest of the backup was changed") from None
    secret = key.derive("backup manifest")
    return lambda body: hmac.new(secret, body, hashlib.sha256).hexdigest()


def addresses() -> list[StoreAddress]:
    """The addresses of this installation's stores, the first one first."""
    settings, other = get_settings(), _other_address.get()
    return [other] if other else [_address(url) for url in settings.backup_locations]


def store() -> Store:
    """The place where backups and ledger objects lie."""
    return open_store(addresses()[0])


def stores() -> list[Store]:
    """All stores, the first one first."""
    return [open_store(address) for address in addresses()]


def claimed_by_backups() -> dict[str, set[str]]:
    """Return which keys the backups in all stores say they need, by id; not authenticated."""
    claimed: dict[str, set[str]] = {}
    for where in stores():
        for backup_id, key_ids in claimed_keys(where).items():
            claimed.setdefault(backup_id, set()).update(key_ids)
    return claimed


def is_elsewhere() -> bool:
    """Say whether this context works with another store than the installation's own."""
    return _other_address.get() is not None


@contextmanager
def using_store(url: str) -> Iterator[None]:
    """Work with the store at *url* in this context, in the place of all others."""
    token = _other_address.set(_address(url if "://" in url else str(Path(url).absolute())))
    try:
        yield
    finally:
        _other_address.reset(token)


def _address(url: str) -> StoreAddress:
    settings = get_settings()
    return StoreAddress(
        url,
        settings.aws_endpoint_url_s3 or settings.aws_endpoint_url,
        settings.aws_region,
        settings.backup_lock_days,
    )


@lru_cache(maxsize=1)
def get_store_service() -> StoreService:
    return StoreService()
