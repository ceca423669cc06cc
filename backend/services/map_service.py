"""The data map itself: shown, compared with the live database, and as records of processing."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any, Final

from sqlalchemy import Column, select
from sqlalchemy.orm import Session

from backend.crypto.columns import Encrypted
from backend.models import BLIND_INDEXES, DATA_MAP, ColumnMigration, LedgerEntry
from backend.privacy.catalogue import Drift, drift, unknown
from backend.privacy.data_map import DataMap
from backend.privacy.declarations import Disclosure, Personal, TableRole
from backend.privacy.mapped_tables import Link, MappedTable
from backend.privacy.processing import (
    Clock,
    Controller,
    Measure,
    Protection,
    Protections,
    Records,
    records,
)
from backend.services.policy_service import Policy, get_policy_service
from backend.settings import Settings, get_settings

FORMAT_NAME: Final = "holdfast-data-map"
FORMAT_VERSION: Final = 1
_HASHED: Final = frozenset(
    (str(one.index_column.table.name), str(one.index_column.name)) for one in BLIND_INDEXES
)


@dataclass(frozen=True, slots=True)
class Way:
    """
    One way from a row to its person, by *column*.

    Attributes:
        steps: Each column on it, and the subject table at its end.
        in_circle: It leads through a table that leads back here.
    """

    column: str
    steps: tuple[str, ...]
    in_circle: bool


@dataclass(frozen=True, slots=True)
class ColumnFacts:
    """What the map says of a column: the rule of a personal one, or why it is none."""

    name: str
    personal: Personal | None
    not_personal_because: str | None
    protection: Protection


@dataclass(frozen=True, slots=True)
class TableFacts:
    """
    What the map says of a table.

    Attributes:
        ways: To the person; the first that is not NULL decides whose a row is.
        referred_by: The columns that lead to a shared row.
        clock: The table whose retention period the rows follow.
    """

    name: str
    role: TableRole
    purpose: str
    lawful_basis: str
    source: str
    primary_key: tuple[str, ...]
    ways: tuple[Way, ...]
    referred_by: tuple[str, ...]
    clock: str | None
    data_type: str | None
    anchor: str | None
    only: Mapping[str, Any] | None
    kept_by_law: str | None
    always_delete: bool
    carried_over: bool
    disclosure: Disclosure
    columns: tuple[ColumnFacts, ...]


@dataclass(frozen=True, slots=True)
class MapFacts:
    """The whole data map, parents before their children."""

    format: str
    version: int
    subject: str
    tables: tuple[TableFacts, ...]


@dataclass(frozen=True, slots=True)
class MapCheck:
    """How database and map differ; *left_out* the operator keeps out of every act knowingly."""

    drift: tuple[Drift, ...]
    left_out: tuple[str, ...]


class MapService:
    """Shows the data map, checks it, and draws up the records of processing."""

    def describe(self, data_map: DataMap = DATA_MAP) -> MapFacts:
        """Say everything that *data_map* holds; the database is not asked."""
        tables = tuple(_table_facts(data_map, mapped) for mapped in data_map.tables)
        return MapFacts(FORMAT_NAME, FORMAT_VERSION, data_map.subject.name, tables)

    def check(self, session: Session) -> MapCheck:
        """Compare the live database with the map."""
        # By the same rule as an erasure, so that what passes here does not stop one.
        left_out = get_settings().ignored_tables.intersection(unknown(session, DATA_MAP))
        found = tuple(one for one in drift(session, DATA_MAP) if one.where not in left_out)
        return MapCheck(found, tuple(sorted(left_out)))

    def records(self, session: Session, now: datetime | None = None) -> Records:
        """Draw up the records of processing (GDPR art. 30), by the policies now in force."""
        settings, policies = get_settings(), get_policy_service().policies(session)
        return records(
            DATA_MAP,
            controller=Controller(settings.controller_name, settings.controller_contact),
            clocks={p.data_type: Clock(p.period, p.action.value, p.enabled) for p in policies},
            protections=_protections_now(session),
            measures=_measures(policies),
            now=now or datetime.now(UTC),
        )


def protection_of(column: Column[Any]) -> Protection:
    """Say what *column* stores, by its type in the model."""
    if isinstance(column.type, Encrypted):
        return Protection.ENCRYPTED
    if (column.table.name, column.name) in _HASHED:
        return Protection.KEYED_HASH
    return Protection.NOT_ENCRYPTED


def _protections_now(session: Session) -> Protections:
    """Protection by the model, but for columns of which rows may still be in plain."""
    found = {
        (mapped.name, str(column.name)): protection_of(column)
        for mapped in DATA_MAP.of_people
        for column in mapped.table.columns
    }
    unfinished = select(ColumnMigration.table_name, ColumnMigration.column_name).where(
        ColumnMigration.finished_at.is_(None)
    )
    for table, column in session.execute(unfinished):
        found[table, column] = Protection.BEING_ENCRYPTED
    return found


def _measures(policies: list[Policy]) -> tuple[Measure, ...]:
    settings = get_settings()
    stored = " and ".join(
        "S3 storage" if url.startswith("s3:") else "a folder" for url in settings.backup_locations
    )
    enforced = sum(policy.enabled for policy in policies)
    runs = (
        f"daily at {settings.retention_time} ({settings.timezone})"
        if settings.scheduler_enabled
        else "not by this process, whose scheduler is off"
    )
    return (
        Measure(
            "backups",
            f"encrypted before they are stored in {stored}; each is deleted after at most "
            f"{settings.backup_max_age_days} days; a restore carries out again what was erased "
            "or withdrawn since",
        ),
        Measure(
            "erasure ledger",
            f"erasures and withdrawals are written to {LedgerEntry.__tablename__} and beside the "
            "backups before anything is destroyed, by keyed references that name nobody; "
            f"{len(DATA_MAP.carried_over)} tables outlive a restore",
        ),
        Measure("retention", f"{enforced} of {len(policies)} policies are enforced, {runs}"),
        Measure("transport", _transport(settings)),
    )


def _transport(settings: Settings) -> str:
    if settings.ssl_cert_path:
        return "HTTPS is served by this process"
    if settings.proxies:
        return "HTTPS is served by whatever stands before this process"
    return "plain HTTP: neither this process nor a proxy that it knows of serves HTTPS"


def _table_facts(data_map: DataMap, mapped: MappedTable) -> TableFacts:
    rule, clock = mapped.rule, mapped.clock
    retention = None if clock is None else clock.rule.retention
    shared = rule.role is TableRole.SHARED
    referring = data_map.references_to(mapped) if shared else ()
    return TableFacts(
        name=mapped.name,
        role=rule.role,
        purpose=rule.purpose,
        lawful_basis=rule.basis,
        source=rule.source,
        primary_key=tuple(str(column.name) for column in mapped.keys),
        ways=tuple(_way(data_map, mapped, link) for link in data_map.links(mapped)),
        referred_by=tuple(f"{other.name}.{column.name}" for other, column in referring),
        clock=None if clock is None else clock.name,
        data_type=None if retention is None else retention.data_type,
        anchor=None if retention is None else retention.anchor,
        only=None if retention is None else retention.only,
        kept_by_law=mapped.statute,
        always_delete=rule.always_delete,
        carried_over=rule.carried_over,
        disclosure=rule.disclosure,
        columns=tuple(_column_facts(mapped, column) for column in mapped.table.columns),
    )


def _way(data_map: DataMap, mapped: MappedTable, link: Link) -> Way:
    steps, at = [f"{mapped.name}.{link.column.name}"], link.target
    # The first link of each table leads to the person without a circle.
    while at.link is not None and at.parent is not None:
        steps.append(f"{at.name}.{at.link.name}")
        at = at.parent
    in_circle = link.target.name in data_map.circle(mapped)
    return Way(str(link.column.name), (*steps, at.name), in_circle)


def _column_facts(mapped: MappedTable, column: Column[Any]) -> ColumnFacts:
    rule, protection = mapped.columns[column.name], protection_of(column)
    if isinstance(rule, Personal):
        return ColumnFacts(str(column.name), rule, None, protection)
    return ColumnFacts(str(column.name), None, rule.reason, protection)


@lru_cache(maxsize=1)
def get_map_service() -> MapService:
    return MapService()
