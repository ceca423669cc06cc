"""Policies: which is in force, who changed it from what to what, and what a law does not allow."""

import json
import threading
from datetime import UTC, datetime
from typing import Any

import pytest
from sqlalchemy import Column, MetaData, Table, select

from backend.db_utils import session_scope
from backend.errors import ConfigurationError, NotFoundError
from backend.models import AuditEvent, PolicyVersion, RetentionPolicy, Role
from backend.models.base import UtcDateTime
from backend.privacy.data_map import DataMap
from backend.privacy.declarations import EraseMode, Retention, personal, subject_table
from backend.privacy.periods import Period
from backend.services.audit_service import Actor
from backend.services.policy_service import (
    Change,
    Policy,
    UnknownDataTypeError,
    get_policy_service,
)
from backend.services.setup_service import get_setup_service
from backend.settings import RetentionAction, load_settings
from tests.conftest import Service, clear_caches
from tests.privacy.odd_maps import mark, number
from tests.privacy.people import ADMINISTRATOR, dump

DELETE, ANONYMIZE = RetentionAction.DELETE, RetentionAction.ANONYMIZE
OTHER = Actor("another administrator", Role.ADMIN)
DATA_TYPES = ("booking", "payment", "invoice", "feedback", "user")


def put(
    data_type: str,
    period: str,
    action: RetentionAction = DELETE,
    actor: Actor = ADMINISTRATOR,
    *,
    enabled: bool = True,
    year_end: bool = False,
) -> Policy:
    with session_scope() as session:
        parsed = Period.parse(period, year_end=year_end)
        return get_policy_service().set(session, actor, data_type, parsed, action, enabled=enabled)


def changes(data_type: str) -> list[Change]:
    with session_scope(read_only=True) as session:
        return get_policy_service().changes(session, data_type)


def in_force(data_type: str) -> Policy:
    with session_scope(read_only=True) as session:
        found = get_policy_service().policies(session)
    assert {policy.data_type for policy in found} == set(DATA_TYPES)
    return next(policy for policy in found if policy.data_type == data_type)


def restart(monkeypatch: pytest.MonkeyPatch, **environment: object) -> None:
    """Open the installation anew, as a process does that is started with *environment*."""
    for name, value in environment.items():
        monkeypatch.setenv(name, str(value))
    clear_caches()
    get_setup_service().open()


def terms(period: str, action: str, source: str, **other: Any) -> dict[str, Any]:
    return {
        "retention_period": period, "year_end": False, "action": action, "enabled": True,
        "source": source,
    } | other  # fmt: skip


def test_each_change_is_kept_with_who_when_before_and_after(service: Service) -> None:
    began = datetime.now(UTC)
    put("feedback", "P30D")
    put("feedback", "P6M", ANONYMIZE, OTHER, year_end=True)
    put("booking", "P5Y")
    put("feedback", "P6M", ANONYMIZE, enabled=False)
    found = changes("feedback")
    first = terms("P30D", "delete", "api")
    second = terms("P6M", "anonymize", "api", year_end=True)
    assert [(c.version, c.before, c.after) for c in reversed(found)] == [
        (1, terms("P365D", "delete", "environment"), first),
        (2, first, second),
        (3, second, second | {"year_end": False, "enabled": False}),
    ]
    with session_scope(read_only=True) as session:
        one, other = ADMINISTRATOR.ref(session), OTHER.ref(session)
    assert [c.changed_by for c in found] == [one, other, one]
    assert one != other
    when = [began, *(c.changed_at for c in reversed(found)), datetime.now(UTC)]
    assert when == sorted(when)
    assert [c.version for c in changes("booking")] == [1]
    assert changes("invoice") == []


def test_a_change_is_in_the_audit_trail_with_what_it_was(service: Service) -> None:
    put("feedback", "P30D", ANONYMIZE)
    with session_scope(read_only=True) as session:
        trail = select(AuditEvent).where(AuditEvent.action == "retention_policy_set")
        (event,) = session.scalars(trail)
        assert event.actor_ref == ADMINISTRATOR.ref(session)
    detail = json.loads(str(event.detail))
    assert detail["data_type"] == "feedback"
    assert detail["before"] == terms("P365D", "delete", "environment")
    assert detail["after"] == terms("P30D", "anonymize", "api")


def test_a_change_that_is_not_committed_leaves_no_version(service: Service) -> None:
    before = dump()

    def give_up() -> None:
        with session_scope() as session:
            get_policy_service().set(
                session, ADMINISTRATOR, "feedback", Period.of_days(3), DELETE, enabled=True
            )
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        give_up()
    assert dump() == before


class Another(threading.Thread):
    """Another admin who sets a policy now; what they were told instead is in *failed*."""

    def __init__(self, data_type: str, period: str) -> None:
        super().__init__()
        self.data_type, self.period = data_type, period
        self.failed: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            put(self.data_type, self.period, ANONYMIZE, OTHER)
        except BaseException as err:  # noqa: BLE001 - the test looks at it
            self.failed = err


@pytest.mark.parametrize("there", [False, True])
def test_two_admins_at_the_same_moment_make_two_versions_one_upon_the_other(
    service: Service, there: bool
) -> None:
    if there:
        put("feedback", "P100D")
    with session_scope() as session:
        get_policy_service().set(
            session, ADMINISTRATOR, "feedback", Period.of_days(30), DELETE, enabled=True
        )
        other = Another("feedback", "P60D")
        # They cannot be through before we are, but have time to begin.
        other.join(1)
    other.join(30)
    assert other.failed is None
    newer, older, *_ = changes("feedback")
    assert (newer.version, older.version) == (2 + there, 1 + there)
    assert older.after == terms("P30D", "delete", "api")
    assert newer.before == older.after
    assert newer.after == terms("P60D", "anonymize", "api")
    assert str(in_force("feedback").period) == "P60D"


def test_a_policy_that_was_set_is_not_touched_by_another_environment(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    restart(monkeypatch, RETENTION_FEEDBACK_DAYS=10, RETENTION_BOOKING_DAYS=20)
    before = in_force("feedback")
    assert (before.source, before.period) == ("environment", Period.of_days(10))
    put("feedback", "P5Y", ANONYMIZE)
    mine = in_force("feedback")
    versions, stored = changes("feedback"), dump()["retention_policies"]
    restart(
        monkeypatch, RETENTION_FEEDBACK_DAYS=1, RETENTION_FEEDBACK_ACTION="delete",
        RETENTION_BOOKING_DAYS=21, RETENTION_BOOKING_ACTION="delete",
    )  # fmt: skip
    assert in_force("feedback") == mine
    assert changes("feedback") == versions
    assert dump()["retention_policies"] == stored
    # What was not set follows the environment still.
    booking = in_force("booking")
    assert (booking.period, booking.action) == (Period.of_days(21), DELETE)
    assert (booking.source, booking.updated_at) == ("environment", None)


@pytest.mark.parametrize("what", ["BOOKING_DAYS", "USER_DAYS", "STATUTORY_DAYS", "NOTICE_DAYS"])
@pytest.mark.parametrize("value", ["-1", "36501", "1000000000", "P7Y", "1.5", "ten", "true"])
def test_days_of_the_environment_that_are_no_number_stop_the_start(
    monkeypatch: pytest.MonkeyPatch, what: str, value: str
) -> None:
    monkeypatch.setenv(f"RETENTION_{what}", "36500")
    assert load_settings()
    monkeypatch.setenv(f"RETENTION_{what}", value)
    with pytest.raises(ConfigurationError, match=f"^RETENTION_{what}: "):
        load_settings()


@pytest.mark.parametrize("data_type", DATA_TYPES)
def test_an_action_of_the_environment_that_is_none_stops_the_start(
    monkeypatch: pytest.MonkeyPatch, data_type: str
) -> None:
    name = f"RETENTION_{data_type.upper()}"
    for good, bad in (("delete", "shred"), ("anonymize", "DELETE"), ("delete", "true")):
        monkeypatch.setenv(f"{name}_ACTION", good)
        default = load_settings().retention_default(data_type)
        assert default is not None
        assert default[1] == good
        monkeypatch.setenv(f"{name}_ACTION", bad)
        with pytest.raises(ConfigurationError, match=f"^{name}_ACTION: "):
            load_settings()
    monkeypatch.setenv(f"{name}_ACTION", "delete")
    monkeypatch.setenv(f"{name}_DAYS", "0")
    with pytest.raises(ConfigurationError, match=f"^{name}_DAYS: "):
        load_settings()


def test_an_unknown_data_type_has_no_policy_and_no_versions(sqlite_service: Service) -> None:
    before = dump()
    for name in ("weather", "", "Feedback", "users", "feedback "):
        with pytest.raises(UnknownDataTypeError, match="booking, feedback, invoice"):
            put(name, "P1Y")
        with pytest.raises(NotFoundError):
            changes(name)
    assert dump() == before


def test_a_policy_says_what_it_does(sqlite_service: Service) -> None:
    words = in_force("booking").words
    assert words == "rows of bookings are made anonymous 2555 days from check out"
    assert put("feedback", "P1Y", enabled=False).words.startswith("off: rows of feedback")
    assert put("invoice", "P7Y").words == "rows of invoices are deleted 7 years from issued on"
    assert (
        "7 years from the end of the year of issued on"
        in put("invoice", "P7Y", year_end=True).words
    )


def test_people_come_last_so_that_no_policy_takes_what_a_later_one_has_counted(
    sqlite_service: Service,
) -> None:
    with session_scope(read_only=True) as session:
        order = [policy.data_type for policy in get_policy_service().policies(session)]
        assert order[-1] == "user"
        assert set(get_policy_service().periods(session)) == set(order)
        assert session.scalars(select(RetentionPolicy)).all() == []
        assert session.scalars(select(PolicyVersion)).all() == []


def test_a_table_of_ones_own_has_the_policy_that_the_data_map_says(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    def policies(period: str | None) -> list[Policy]:
        metadata = MetaData()
        at = Column("seen_at", UtcDateTime, info=personal("user.behavior"))
        clock = Retention("guest", "seen_at", period=period, mode=EraseMode.DELETE)
        info = subject_table(purpose="p", basis="b", source="s", retention=clock)
        Table("guests", metadata, number(), at, mark(), info=info)
        monkeypatch.setattr("backend.services.policy_service.DATA_MAP", DataMap.of(metadata))
        with session_scope(read_only=True) as session:
            return get_policy_service().policies(session)

    (policy,) = policies("P2Y")
    assert (str(policy.period), policy.action, policy.source) == ("P2Y", DELETE, "data_map")
    with pytest.raises(ConfigurationError, match="guest"):
        policies(None)
