"""Getting ready: folder, keys, schema, first admin; and clearing up after a crash."""

from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import lru_cache

import structlog
from sqlalchemy import Engine, func, inspect, select
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.orm import Session

from backend.backup.escrow import read_recipient
from backend.backup.manifest import stored_ids
from backend.backup.storage import LocalStore
from backend.crypto.references import new_reference_key
from backend.db_utils import database_may_exist, get_engine, session_scope, use_write_ahead_log
from backend.errors import ConfigurationError, ConflictError, UnavailableError
from backend.folders import make_private_folder, may_be_folder
from backend.models import EncryptionKey, Installation, User
from backend.services.account_service import get_account_service
from backend.services.audit_service import COMMAND_LINE, ITSELF, get_audit_service
from backend.services.auth_service import get_auth_service
from backend.services.backup_service import get_backup_service
from backend.services.chain_service import get_chain_service
from backend.services.checkpoint_service import get_checkpoint_service
from backend.services.cluster_service import is_known, recover_cluster
from backend.services.column_service import get_column_service
from backend.services.encryption_service import get_encryption_service
from backend.services.ledger_service import get_ledger_service
from backend.services.policy_service import get_policy_service
from backend.services.queue_service import get_queue_service
from backend.services.reference_service import chain_keys_of
from backend.services.restore_service import get_restore_service
from backend.services.rotation_service import get_rotation_service
from backend.services.schema_service import get_schema_service
from backend.services.store_service import addresses, get_store_service, store, stores
from backend.services.throttle_service import get_throttle_service
from backend.settings import get_settings

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Prepared:
    """What was done; *admin* is address and password of a new admin, to be shown once."""

    migrated: bool
    admin: tuple[str, str] | None = field(repr=False)


class SetupService:
    """Brings a machine to where the service can run, and refuses where it cannot."""

    def __init__(self) -> None:
        # Not before `open` has worked: until then there are no keys to serve with.
        self.is_open = False
        self._recovery_due = False

    def prepare(self) -> Prepared:
        """
        Make the folder, the keys, the schema and the first admin, whichever is missing.

        Raises:
            ConfigurationError: The folder cannot be written, a key is wrong or missing, or the
                database is ahead of this version; nothing is changed then.
        """
        self._look()
        self._make()
        migrated = get_schema_service().upgrade(get_engine())
        with session_scope() as session:
            get_encryption_service().enter_primary(session)
            if session.scalar(select(Installation.id)) is None:
                _make_installation(session)
            admin = get_account_service().first_admin(session, COMMAND_LINE)
            get_chain_service().begin(session)
        if migrated:
            get_rotation_service().index_missing(None)
        self.recover()
        # A store that does not answer was waited for once.
        if not self._recovery_due:
            get_checkpoint_service().make_if_possible()
        return Prepared(migrated, admin)

    def open(self) -> None:
        """
        Get ready to use what `prepare` has made.

        Raises:
            ConfigurationError: As `prepare`, and where the database is behind.
        """
        if not database_may_exist():
            raise ConfigurationError("there is no database yet: run `python db_cli.py init`")
        self._look()
        get_schema_service().require_current(get_engine())
        self._make()
        with session_scope() as session:
            get_encryption_service().enter_primary(session)
            get_column_service().apply(session)
        self.is_open = True

    def recover(self) -> None:
        """Finish or clear up what a killed process left; later, if the store is not there now."""
        if len(addresses()) > 1:
            # What a process that has ended could not copy, nobody else knows of.
            get_store_service().sync_due.set()
        try:
            settled = self._recover_backups()
            self._finish_acts()
        except UnavailableError as err:
            log.error("recovery_postponed", code=err.code, detail=err.detail)
            self._recovery_due = True
        else:
            self._recovery_due = not settled

    def recover_if_due(self) -> None:
        """Do what `recover` had to leave for later."""
        if self._recovery_due:
            self.recover()

    def _recover_backups(self) -> bool:
        """Clear up; no where another process is at it, and has to end first."""
        try:
            left = get_backup_service().recover() + get_restore_service().sweep_target()
        except ConflictError:
            return False
        if left:
            log.warning("recovered", removed=left)
        return True

    def _finish_acts(self) -> None:
        try:
            with session_scope(read_only=True) as session:
                get_ledger_service().mirror(session)
                unfinished = get_ledger_service().unfinished(session)
            if unfinished:
                replayed = get_restore_service().finish_ledger()
                log.warning("ledger_replayed", erasures=replayed.erasures)
        except IntegrityError:
            # Not left by a killed process: another one was at it, and has finished meanwhile.
            log.info("ledger_finished_elsewhere")
        if erased := get_queue_service().run():
            log.warning("queue_finished", erasures=erased)

    def _look(self) -> None:
        """Refuse what cannot work before anything is made or changed."""
        folder = get_settings().data_dir.absolute()
        if not may_be_folder(folder):
            raise ConfigurationError(f"DATA_DIR: {folder} cannot be a folder of ours")
        first, *_ = stores()
        if isinstance(first, LocalStore):
            first.require_usable()
        _require_recipient()
        get_auth_service().find_secret()
        get_throttle_service().prepare()
        get_policy_service().require_lawful_environment()
        if is_known():
            # A swap that was cut may have left the server stopped, and it does not need our key.
            recover_cluster()
        engine = get_engine() if database_may_exist() else None
        if engine is not None:
            self._connect(engine)
        keys = get_encryption_service().find()
        if engine is not None:
            get_schema_service().refuse_foreign(engine)
            if keys is not None and inspect(engine).has_table(EncryptionKey.__tablename__):
                with session_scope(read_only=True) as session:
                    get_encryption_service().check(session, keys)

    def _connect(self, engine: Engine) -> None:
        try:
            engine.connect().close()
        except DBAPIError as err:
            reason = str(err.orig).splitlines()[0]
            raise ConfigurationError(
                f"DATABASE_URL: the database cannot be opened: {reason}"
            ) from None

    def _make(self) -> None:
        """Make what everything else needs."""
        folder = get_settings().data_dir
        try:
            make_private_folder(folder)
        except OSError as err:
            raise ConfigurationError(f"DATA_DIR: {folder} cannot be made: {err.strerror}") from None
        get_encryption_service().load()
        get_auth_service().prepare_secret()
        use_write_ahead_log(get_engine())


def _make_installation(session: Session) -> None:
    """Give the database a key of its own; where there seems to have been one before, say so."""
    session.add(Installation(created_at=datetime.now(UTC), reference_key=new_reference_key()))
    session.flush()
    people, backups = session.scalar(select(func.count(User.id))), _count_backups()
    trails = sorted(get_checkpoint_service().known(chain_keys_of(session)).others)
    if people or backups or trails:
        log.warning("installation_made", people=people, backups=backups, trails=len(trails))
        get_audit_service().record(
            session, "installation_made", ITSELF, people=people, backups=backups, trails=trails
        )


def _count_backups() -> int | None:
    try:
        return len(stored_ids(store()))
    except UnavailableError:
        return None


def _require_recipient() -> None:
    recipient = get_settings().backup_gpg_recipient
    if recipient is None:
        return
    try:
        read_recipient(recipient)
    except ConfigurationError as err:
        raise ConfigurationError(f"BACKUP_GPG_RECIPIENT: {err.detail}") from None


@lru_cache(maxsize=1)
def get_setup_service() -> SetupService:
    return SetupService()
