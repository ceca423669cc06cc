"""The brake and restores: none does what was refused, nor undoes what was confirmed."""

from datetime import UTC, datetime, timedelta

import pytest

from backend.db_utils import session_scope
from backend.privacy.periods import Period
from backend.services.audit_service import COMMAND_LINE
from backend.services.brake_service import BrakeError
from backend.services.policy_service import get_policy_service
from backend.services.retention_results import RetentionRun
from backend.services.retention_service import get_retention_service
from backend.settings import RetentionAction
from tests.backup.promises import back_up, restore
from tests.conftest import Service
from tests.privacy.people import ADMINISTRATOR, dump, feedback, retire

NOW = datetime.now(UTC)
OLD = NOW - timedelta(days=7300)
# More than a run may touch without a look at the share.
MANY = 60


def apply() -> RetentionRun:
    return get_retention_service().apply(COMMAND_LINE, dry_run=False)


def keep_feedback_for(period: str) -> None:
    with session_scope() as session:
        get_policy_service().set(
            session,
            ADMINISTRATOR,
            "feedback",
            Period.parse(period),
            RetentionAction.DELETE,
            enabled=True,
        )


def test_what_the_brake_has_refused_no_restore_does(service: Service) -> None:
    keep_feedback_for("P10Y")
    service.add(*(feedback(None, NOW - timedelta(days=2920)) for _ in range(MANY)))
    service.add(feedback(None, OLD))
    assert apply().affected == 1
    keep_feedback_for("P7Y")
    with pytest.raises(BrakeError, match="of the table"):
        apply()
    backup_id = back_up()
    assert restore(backup_id).reapplied.retention == 0
    assert len(dump()["feedback"]) == MANY


def test_what_a_run_has_removed_a_restore_does_not_bring_back(service: Service) -> None:
    keep_feedback_for("P10Y")
    service.add(
        *(feedback(None, NOW - timedelta(days=2920)) for _ in range(MANY)), feedback(None, OLD)
    )
    backup_id = back_up()
    assert apply().affected == 1
    keep_feedback_for("P7Y")
    assert retire().affected == MANY
    assert restore(backup_id).reapplied.retention == MANY + 1
    assert dump()["feedback"] == {}
