"""Statutory periods: no policy, of whichever source, ends what a law still keeps."""

from datetime import UTC, datetime, timedelta

import pytest

from backend.db_utils import session_scope
from backend.errors import ConfigurationError
from backend.privacy.periods import Period
from backend.services.policy_service import (
    Policy,
    StatutoryPeriodError,
    get_policy_service,
)
from backend.services.retention_service import get_retention_service
from backend.services.setup_service import get_setup_service
from backend.settings import RetentionAction
from tests.conftest import Service, clear_caches
from tests.privacy import people
from tests.privacy.people import ADMINISTRATOR, dump

DELETE = RetentionAction.DELETE
ACTIONS = pytest.mark.parametrize("action", list(RetentionAction))
# What a law asks to be kept.
STATUTORY = pytest.mark.parametrize("data_type", ["payment", "invoice"])


def put(
    data_type: str, period: str, action: RetentionAction = DELETE, *, enabled: bool = True
) -> Policy:
    with session_scope() as session:
        return get_policy_service().set(
            session, ADMINISTRATOR, data_type, Period.parse(period), action, enabled=enabled
        )


def restart(monkeypatch: pytest.MonkeyPatch, **environment: object) -> None:
    """Open the installation anew, as a process does that is started with *environment*."""
    for name, value in environment.items():
        monkeypatch.setenv(name, str(value))
    clear_caches()
    get_setup_service().open()


@STATUTORY
@ACTIONS
def test_what_a_law_keeps_is_refused_a_day_short_of_it_and_accepted_at_it(
    service: Service, monkeypatch: pytest.MonkeyPatch, data_type: str, action: RetentionAction
) -> None:
    restart(monkeypatch, RETENTION_STATUTORY_DAYS=2555)
    before = dump()
    for short in ("P2554D", "P83M", "P1D", "P6Y300D"):
        with pytest.raises(StatutoryPeriodError, match="2555 days") as refused:
            put(data_type, short, action)
        assert "GDPR art. 17(3)(b)" in refused.value.detail
    with pytest.raises(StatutoryPeriodError):
        put(data_type, "P2554D", action, enabled=False)
    assert dump() == before
    for lawful in ("P2555D", "P7Y", "P84M", "P6Y365D", "P100Y"):
        assert put(data_type, lawful, action).period == Period.parse(lawful)
    # No law asks for these.
    assert put("feedback", "P1D", action).period == Period.of_days(1)


@STATUTORY
def test_how_long_a_law_keeps_is_what_the_setting_says(
    service: Service, monkeypatch: pytest.MonkeyPatch, data_type: str
) -> None:
    restart(monkeypatch, **{f"RETENTION_{t.upper()}_DAYS": 3650 for t in ("payment", "invoice")},
            RETENTION_STATUTORY_DAYS=3650)  # fmt: skip
    with pytest.raises(StatutoryPeriodError, match="3650"):
        put(data_type, "P3649D")
    assert put(data_type, "P3650D").enabled
    restart(monkeypatch, RETENTION_STATUTORY_DAYS=10)
    with pytest.raises(StatutoryPeriodError, match="10 days"):
        put(data_type, "P9D")
    assert put(data_type, "P10D").enabled


@STATUTORY
def test_an_environment_below_the_law_stops_the_start_and_names_the_variable(
    service: Service, monkeypatch: pytest.MonkeyPatch, data_type: str
) -> None:
    name = f"RETENTION_{data_type.upper()}_DAYS"
    restart(monkeypatch, **{"RETENTION_STATUTORY_DAYS": 2555, name: 2555})
    before = dump()
    with pytest.raises(ConfigurationError, match=f"^{name}: ") as refused:
        restart(monkeypatch, **{name: 2554})
    assert "GDPR art. 17(3)(b)" in refused.value.detail
    assert dump() == before
    # No law asks for these.
    restart(monkeypatch, **{name: 2555, "RETENTION_BOOKING_DAYS": 1, "RETENTION_USER_DAYS": 1})


@STATUTORY
def test_a_policy_that_a_longer_law_overtakes_takes_nothing_within_it(
    service: Service, monkeypatch: pytest.MonkeyPatch, data_type: str
) -> None:
    put(data_type, "P30D")
    paid = datetime.now(UTC) - timedelta(days=400)
    service.add(people.payment(None, paid), people.invoice(None, paid.date()))
    before = dump()
    try:
        restart(monkeypatch, RETENTION_STATUTORY_DAYS=2555)
        get_retention_service().apply(ADMINISTRATOR, dry_run=False, data_type=data_type)
    except (ConfigurationError, StatutoryPeriodError):
        pass
    assert dump()["payments"] == before["payments"]
    assert dump()["invoices"] == before["invoices"]
