"""Holds beside a retention run: what comes after them stays, and is counted as kept."""

import pytest

from backend.db_utils import session_scope
from backend.models import HoldScope, LegalHold, RetentionStatus
from backend.services.hold_service import get_hold_service
from backend.services.pace import Pace
from backend.settings import RetentionAction
from tests.conftest import Service
from tests.privacy import people
from tests.privacy.people import ADMINISTRATOR, dump, feedback
from tests.services.test_retention_runs import (
    ANONYMIZE,
    BATCH,
    DELETE,
    NOW,
    OLD,
    apply,
    at_rests,
    logs,
    set_policy,
)


@pytest.fixture
def _small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    for limit in ("_FIRST", "_LEAST", "MOST"):
        monkeypatch.setattr(Pace, limit, BATCH)


def hold(data_type: str) -> None:
    with session_scope() as session:
        get_hold_service().place(
            session, ADMINISTRATOR, scope=HoldScope.DATA_TYPE, reason="a claim", user_id=None,
            data_type=data_type, row_id=None, review_on=None,
        )  # fmt: skip


@pytest.mark.usefixtures("_small_batches")
def test_a_hold_placed_between_two_batches_keeps_what_comes_after(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [feedback(None, OLD) for _ in range(4 * BATCH)]
    service.add(*rows)
    at_rests(monkeypatch, before_3=lambda: hold("feedback"))
    assert apply("feedback").affected == 2 * BATCH
    assert set(dump()["feedback"]) == {(row.id,) for row in rows[2 * BATCH :]}
    (logged,) = logs("feedback")
    assert (logged.status, logged.affected) == (RetentionStatus.DONE, 2 * BATCH)
    again = apply("feedback").results[0]
    assert (again.matched, again.held, again.affected) == (2 * BATCH, 2 * BATCH, 0)


@pytest.mark.usefixtures("_small_batches")
def test_what_a_hold_keeps_that_was_placed_between_two_batches_is_counted(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    service.add(*(feedback(None, OLD) for _ in range(4 * BATCH)))
    at_rests(monkeypatch, before_3=lambda: hold("feedback"))
    apply("feedback")
    (logged,) = logs("feedback")
    assert (logged.matched, logged.held, logged.affected) == (12, 6, 6)


@pytest.mark.parametrize(("action", "theirs"), [(DELETE, True), (DELETE, False), (ANONYMIZE, True)])
def test_a_held_row_that_leads_to_a_due_person_stays_as_it_is(
    service: Service, action: RetentionAction, *, theirs: bool
) -> None:
    guest = service.user("jane@example.com", last_activity_at=OLD)
    payer = service.user("joe@example.com", last_activity_at=NOW)
    stay = people.booking(guest, NOW.date())
    service.add(stay)
    # By its booking it leads to the guest, whether somebody else has paid or nobody is named.
    paid = people.payment(None if theirs else payer, NOW, booking_id=stay.id, card_last4="1234")
    service.add(paid)
    service.add(LegalHold(scope=HoldScope.ROW, data_type="payment", row_id=paid.id, reason="x",
                          placed_by="an administrator", placed_at=NOW))  # fmt: skip
    set_policy("user", action)
    before = dump()["payments"]
    apply("user")
    assert dump()["payments"] == before
