"""Retention policies: which are in force, who changed them, and what the law says."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any, Final, cast

import orjson
from sqlalchemy import Row, func, select
from sqlalchemy.orm import Session

from backend.errors import ConfigurationError, NotFoundError, RefusedError
from backend.models import DATA_MAP, Installation, PolicyVersion, RetentionPolicy
from backend.privacy.clocks import anchor_of
from backend.privacy.periods import Period
from backend.services.audit_service import Actor, get_audit_service
from backend.settings import RetentionAction, get_settings

_ENVIRONMENT: Final = "environment"
_API: Final = "api"
_DATA_MAP: Final = "data_map"
_POLICIES: Final = select(RetentionPolicy.__table__)


class UnknownDataTypeError(RefusedError):
    """No table of the data map has this data type."""

    code = "unknown_data_type"


class StatutoryPeriodError(RefusedError):
    """A law asks for these rows for longer."""

    code = "statutory_period"


@dataclass(frozen=True, slots=True)
class Policy:
    """One policy in force and where it comes from (`environment`, `data_map` or `api`)."""

    data_type: str
    period: Period
    action: RetentionAction
    enabled: bool
    source: str
    updated_at: datetime | None = None

    @property
    def words(self) -> str:
        """What the policy does, in a sentence."""
        mapped = DATA_MAP.by_data_type[self.data_type]
        done = {RetentionAction.DELETE: "deleted", RetentionAction.ANONYMIZE: "made anonymous"}
        anchor = anchor_of(mapped).name.replace("_", " ")
        said = f"rows of {mapped.name} are {done[self.action]} {self.period.since(anchor)}"
        return said if self.enabled else f"off: {said}"

    @property
    def terms(self) -> dict[str, Any]:
        """What a change of the policy may change."""
        return {
            "retention_period": str(self.period),
            "year_end": self.period.year_end,
            "action": self.action,
            "enabled": self.enabled,
            "source": self.source,
        }


@dataclass(frozen=True, slots=True)
class Change:
    """One version of a policy: who changed it, when, from what to what."""

    data_type: str
    version: int
    changed_at: datetime
    changed_by: str
    before: Mapping[str, Any]
    after: Mapping[str, Any]


class PolicyService:
    """The policies of all data types; those set over the API win over the environment's."""

    def policies(self, session: Session) -> list[Policy]:
        """
        The policies in force.

        People come last, so that no policy takes rows that a later one has counted.
        """
        stored = {row.data_type: row for row in session.execute(_POLICIES)}
        return [
            _stored(stored[data_type]) if data_type in stored else _default(data_type)
            for data_type in reversed(DATA_MAP.by_data_type)
        ]

    def periods(self, session: Session) -> dict[str, Period]:
        """The retention period per data type."""
        return {policy.data_type: policy.period for policy in self.policies(session)}

    def set(
        self,
        session: Session,
        actor: Actor,
        data_type: str,
        period: Period,
        action: RetentionAction,
        *,
        enabled: bool,
    ) -> Policy:
        """
        Set the policy of one data type; it wins over the environment from now on.

        Raises:
            UnknownDataTypeError: No table has this data type.
            StatutoryPeriodError: A law keeps its rows for longer; says which.
        """
        self.require(data_type)
        _require_lawful(data_type, period)
        # One at a time: a change tells from what it was made.
        session.execute(select(Installation.id).with_for_update())
        before = next(p for p in self.policies(session) if p.data_type == data_type)
        row = RetentionPolicy(
            data_type=data_type,
            period=str(period),
            action=action,
            enabled=enabled,
            updated_at=datetime.now(UTC),
            updated_by=actor.ref(session),
            year_end=period.year_end,
        )
        session.merge(row)
        session.flush()
        policy = _stored(row)
        versions = select(func.max(PolicyVersion.version)).where(
            PolicyVersion.data_type == data_type
        )
        session.add(
            PolicyVersion(
                data_type=data_type,
                version=(session.scalar(versions) or 0) + 1,
                before=orjson.dumps(before.terms).decode(),
                after=orjson.dumps(policy.terms).decode(),
                changed_at=row.updated_at,
                changed_by=row.updated_by,
            )
        )
        get_audit_service().record(
            session, "retention_policy_set", actor, data_type=data_type,
            before=before.terms, after=policy.terms,
        )  # fmt: skip
        return policy

    def changes(self, session: Session, data_type: str) -> list[Change]:
        """
        Every version of one policy, newest first.

        Raises:
            NotFoundError: No table has this data type.
        """
        if data_type not in DATA_MAP.by_data_type:
            raise NotFoundError(f"data_type is one of {', '.join(sorted(DATA_MAP.by_data_type))}")
        rows = session.scalars(
            select(PolicyVersion)
            .where(PolicyVersion.data_type == data_type)
            .order_by(PolicyVersion.version.desc())
        )
        return [
            Change(
                row.data_type, row.version, row.changed_at, row.changed_by,
                cast("dict[str, Any]", orjson.loads(row.before)),
                cast("dict[str, Any]", orjson.loads(row.after)),
            )
            for row in rows
        ]  # fmt: skip

    def first_period(self, session: Session, data_type: str) -> Period | None:
        """Return the period that was in force before the first change, if there was one."""
        first = session.scalar(
            select(PolicyVersion.before)
            .where(PolicyVersion.data_type == data_type)
            .order_by(PolicyVersion.version)
            .limit(1)
        )
        if first is None:
            return None
        before = cast("dict[str, Any]", orjson.loads(first))
        return Period.parse(before["retention_period"], year_end=before["year_end"])

    def require_lawful(self, policy: Policy) -> None:
        """
        Refuse to apply a policy that a law has overtaken since it was set.

        Raises:
            StatutoryPeriodError: One has.
        """
        _require_lawful(policy.data_type, policy.period)

    def is_lawful(self, policy: Policy) -> bool:
        """Say whether `require_lawful` lets it pass."""
        try:
            self.require_lawful(policy)
        except StatutoryPeriodError:
            return False
        return True

    def require(self, data_type: str) -> None:
        """
        Refuse what is no data type.

        Raises:
            UnknownDataTypeError: It is none.
        """
        if data_type not in DATA_MAP.by_data_type:
            raise UnknownDataTypeError(
                f"data_type is one of {', '.join(sorted(DATA_MAP.by_data_type))}"
            )

    def require_lawful_environment(self) -> None:
        """
        Refuse periods of the environment that are shorter than a law's.

        Raises:
            ConfigurationError: One is; names the variable.
        """
        for data_type in DATA_MAP.by_data_type:
            try:
                _require_lawful(data_type, _default(data_type).period)
            except StatutoryPeriodError as err:
                name = f"RETENTION_{data_type.upper()}_DAYS"
                raise ConfigurationError(f"{name}: {err.detail}") from None


def _require_lawful(data_type: str, period: Period) -> None:
    ground = DATA_MAP.by_data_type[data_type].statute
    least = get_settings().retention_statutory_days
    if ground is not None and period.shortest_days < least:
        raise StatutoryPeriodError(
            f"{data_type} is kept for at least {least} days ({ground}), not for {period}; "
            "RETENTION_STATUTORY_DAYS says how long the law asks for"
        )


def _default(data_type: str) -> Policy:
    """Return what the environment says, or, for a type that it does not know, the data map."""
    retention = DATA_MAP.by_data_type[data_type].rule.retention
    if (default := get_settings().retention_default(data_type)) is not None:
        days, action = default
        return Policy(data_type, Period.of_days(days), action, enabled=True, source=_ENVIRONMENT)
    if retention is None or retention.period is None:
        raise ConfigurationError(f"the data map says for no period how long to keep {data_type}")
    period, action = Period.parse(retention.period), RetentionAction(retention.mode.value)
    return Policy(data_type, period, action, enabled=True, source=_DATA_MAP)


def _stored(row: RetentionPolicy | Row[Any]) -> Policy:
    period = Period.parse(row.period, year_end=row.year_end)
    return Policy(row.data_type, period, row.action, row.enabled, _API, row.updated_at)


@lru_cache(maxsize=1)
def get_policy_service() -> PolicyService:
    return PolicyService()
