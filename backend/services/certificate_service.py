"""Certificates of erasures: signed statements that name nobody and can be checked offline."""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import Any, Final
from uuid import UUID

import orjson
from sqlalchemy import select
from sqlalchemy.orm import Session

from backend.crypto import certificates, signing
from backend.errors import ConfigurationError, ConflictError, NotFoundError
from backend.models import (
    BackupRecord,
    BackupStatus,
    ErasureRecord,
    ErasureStatus,
    Installation,
)
from backend.privacy.scan import Scan
from backend.settings import get_settings

# How long a scan may take before its process is taken for dead: reading a table of 10**8 cells.
SCAN_GIVEN_UP_AFTER: Final = timedelta(hours=1)
_NOT_FINISHED: Final = "not_finished"


class CertificateService:
    """Issues certificates and says by which key."""

    def public_key(self, session: Session) -> bytes:
        """The key that certificates of this installation are checked with."""
        return signing.public_key_of(self._signing_key(session))

    def issue(
        self,
        session: Session,
        record: ErasureRecord,
        scan: Scan | None,
        *,
        sampled: Sequence[str] = (),
        state: str = _NOT_FINISHED,
    ) -> ErasureStatus:
        """
        Sign what became of an erasure, with what the scan after it found.

        Args:
            scan: `None` where none was finished; *state* then says why.
            sampled: Tables of which the scan looked for the values of some rows only.
        """
        statement: dict[str, Any] = orjson.loads(record.statement)
        statement["scan"] = {"state": state} if scan is None else _told(scan, sampled)
        if state == _NOT_FINISHED if scan is None else not scan.clean:
            record.status = ErasureStatus.PARTIAL
        statement["status"] = record.status
        record.certificate = certificates.issue(statement, self._signing_key(session)).decode()
        return record.status

    def of(self, session: Session, erasure_id: UUID) -> bytes:
        """
        Return the certificate of an erasure.

        Raises:
            NotFoundError: There was no such erasure.
            ConflictError: The scan after it has not ended yet.
        """
        record = session.get(ErasureRecord, erasure_id)
        if record is None:
            raise NotFoundError(f"no erasure has the id {erasure_id}")
        if record.certificate is None:
            if datetime.now(UTC) - record.erased_at < SCAN_GIVEN_UP_AFTER:
                raise ConflictError("the scan after this erasure has not ended yet")
            self.issue(session, record, None)
        return (record.certificate or "").encode()

    def backups_there(self, session: Session) -> list[dict[str, Any]]:
        """Name the backups that were made, or begun, until now."""
        there = select(BackupRecord.id, BackupRecord.created_at).where(
            BackupRecord.status != BackupStatus.FAILED
        )
        return [row._asdict() for row in session.execute(there.order_by(BackupRecord.created_at))]

    def name_backups(self, record: ErasureRecord, backups: Sequence[dict[str, Any]]) -> None:
        """Name in a statement further *backups*, which were begun before its act was committed."""
        statement = orjson.loads(record.statement)
        named = {each["id"] for each in statement["backups"]}
        later = [each for each in backups if each["created_at"] >= record.erased_at]
        if new := [each for each in later if str(each["id"]) not in named]:
            days = timedelta(days=get_settings().backup_max_age_days)
            statement["backups"] += new
            statement["backups_expire_at"] = max(each["created_at"] for each in new) + days
            record.statement = orjson.dumps(statement, option=orjson.OPT_UTC_Z).decode()

    def backup_gone(self, session: Session, backup_id: UUID, kept_aside: Sequence[datetime]) -> int:
        """
        Tell earlier dates in certificates that name a backup which is no more; return how many.

        Those whose date has passed stay as they are: what they say has come true.

        Args:
            kept_aside: When old databases that still exist were put aside by a restore; those of
                before an erasure hold the person too.
        """
        days = timedelta(days=get_settings().backup_max_age_days)
        now, name = datetime.now(UTC), str(backup_id)
        named = select(ErasureRecord).where(ErasureRecord.statement.contains(name))
        changed = 0
        for record in session.scalars(named):
            statement: dict[str, Any] = orjson.loads(record.statement)
            if datetime.fromisoformat(statement["backups_expire_at"]) <= now:
                continue
            left = [each for each in statement["backups"] if each["id"] != name]
            held = [datetime.fromisoformat(each["created_at"]) for each in left]
            # A restore after the erasure keeps aside what was live then, without the person.
            held += [moment for moment in kept_aside if moment <= record.erased_at]
            last = max((moment + days for moment in held), default=now)
            told = {"backups": left, "backups_expire_at": last.isoformat(timespec="seconds")}
            self._tell(session, record, statement, told)
            changed += 1
        return changed

    def promised_ends(self, session: Session, since: datetime) -> dict[UUID, datetime]:
        """
        Return by when the backups that certificates name must be gone, whatever is set now.

        Args:
            since: Erasures of before it are left out: no backup that is left is older.
        """
        ends: dict[UUID, datetime] = {}
        told = select(ErasureRecord.statement).where(ErasureRecord.erased_at >= since)
        for text in session.scalars(told.execution_options(yield_per=1000)):
            statement = orjson.loads(text)
            end = datetime.fromisoformat(statement["backups_expire_at"])
            for named in map(UUID, (each["id"] for each in statement.get("backups", ()))):
                ends[named] = min(end, ends.get(named, end))
        return ends

    def _tell(
        self, session: Session, record: ErasureRecord, before: dict[str, Any], told: dict[str, Any]
    ) -> None:
        record.statement = orjson.dumps(before | told).decode()
        if record.certificate is not None:
            signed = orjson.loads(record.certificate)["statement"]
            key = self._signing_key(session)
            record.certificate = certificates.issue(signed | told, key).decode()

    def _signing_key(self, session: Session) -> bytes:
        """Return the installation's own key; it is made when the first certificate needs it."""
        installation = session.scalar(select(Installation).with_for_update())
        if installation is None:
            raise ConfigurationError("the database was not prepared: run `python db_cli.py init`")
        if installation.signing_key is None:
            installation.signing_key = signing.new_signing_key()
        return installation.signing_key


def _told(scan: Scan, sampled: Sequence[str]) -> dict[str, Any]:
    return {
        "state": "clean" if scan.clean else "found" if scan.found else "partial",
        "finished_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "tables": scan.tables,
        "cells": scan.cells,
        "found": [{"table": f.table, "column": f.column, "cells": f.cells} for f in scan.found],
        "own_values_of_others": scan.namesakes,
        "unread": [
            {"table": u.table, "column": u.column, "cells": u.cells, "why": u.why}
            for u in scan.unread
        ],
        "values_too_short_to_look_for": scan.skipped_words,
        "sampled": list(sampled),
    }


@lru_cache(maxsize=1)
def get_certificate_service() -> CertificateService:
    return CertificateService()
