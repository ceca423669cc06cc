"""Import and other people: what is shared, what merely names the person, whose a row is."""

from datetime import UTC, date, datetime

from sqlalchemy import delete, select, update

from backend.db_utils import session_scope
from backend.models import BillingAddress, Booking, Companion, Feedback, Invoice, Payment
from backend.privacy.import_plan import Imported
from tests.conftest import Service
from tests.privacy import people
from tests.privacy.exports import contents, erase, export, take_back
from tests.privacy.people import dump


def household(service: Service) -> tuple[int, int, int]:
    """Two people, whose bookings are paid from one address; return their numbers and its."""
    users = [service.user(f"{name}@example.com") for name in ("jane", "joe")]
    at = datetime(2026, 1, 2, tzinfo=UTC)
    address = BillingAddress(
        street="1 Low Road", contact_name="Joe", email="joe@example.com", created_at=at
    )
    service.add(address)
    service.add(*(people.booking(u, at.date(), billing_address_id=address.id) for u in users))
    return users[0], users[1], address.id


def bookings_of(user_id: int) -> list[Booking]:
    with session_scope(read_only=True) as session:
        return list(session.scalars(select(Booking).where(Booking.user_id == user_id)))


def test_an_address_that_others_still_share_stays_as_it_is_and_is_shared_again(
    service: Service,
) -> None:
    jane, _joe, address_id = household(service)
    document = export(jane)
    assert document["redactions"]
    erase(jane)
    before = contents()
    assert take_back(document)["billing_addresses"] == Imported(unchanged=1)
    (stay,) = bookings_of(jane)
    assert stay.billing_address_id == address_id
    assert contents()["billing_addresses"] == before["billing_addresses"]


def test_an_address_that_is_gone_comes_back_without_what_was_about_others(
    service: Service,
) -> None:
    jane, joe, address_id = household(service)
    document = export(jane)
    erase(joe)
    erase(jane)
    assert not contents()["billing_addresses"]
    planned = take_back(document, dry_run=True)
    assert not contents()["billing_addresses"]
    done = take_back(document)
    assert done == planned
    assert done["billing_addresses"] == Imported(restored=1, incomplete=1)
    with session_scope(read_only=True) as session:
        address = session.get_one(BillingAddress, address_id)
    assert (address.street, address.contact_name, address.email_index) == ("1 Low Road", None, None)
    assert [stay.billing_address_id for stay in bookings_of(jane)] == [address_id]


def test_nobody_is_hung_on_an_address_that_is_another_one_by_now(service: Service) -> None:
    jane, joe, address_id = household(service)
    document = export(jane)
    erase(jane)
    with session_scope() as session:
        session.execute(
            update(BillingAddress).where(BillingAddress.id == address_id).values(street="2 Other")
        )
    before = contents()
    assert take_back(document)["billing_addresses"] == Imported(skipped=1)
    assert [stay.billing_address_id for stay in bookings_of(jane)] == [None]
    assert [stay.billing_address_id for stay in bookings_of(joe)] == [address_id]
    assert contents()["billing_addresses"] == before["billing_addresses"]


def test_an_address_on_which_one_is_merely_named_is_nobody_s_to_bring_back(
    service: Service,
) -> None:
    jane, joe, address_id = household(service)
    stranger = service.user("june@example.com")
    with session_scope() as session:
        session.get_one(BillingAddress, address_id).email = "june@example.com"
    service.add(people.booking(stranger, date(2026, 1, 2)))
    document = export(stranger)
    (row,) = document["data"]["billing_addresses"]
    assert row["street"] is None
    # Hand-edited: whoever is named there claims the address for a stay of their own.
    document["data"]["bookings"][0]["billing_address_id"] = address_id

    def claim() -> list[int | None]:
        with session_scope() as session:
            session.execute(delete(Booking).where(Booking.user_id == stranger))
        assert take_back(document)["billing_addresses"] == Imported(skipped=1)
        return [stay.billing_address_id for stay in bookings_of(stranger)]

    assert claim() == [None]
    assert [stay.billing_address_id for stay in bookings_of(joe)] == [address_id]
    # Nor once it is gone.
    erase(jane)
    erase(joe)
    assert not contents()["billing_addresses"]
    assert claim() == [None]
    assert not contents()["billing_addresses"]


def test_the_companion_of_another_guest_is_not_brought_back(service: Service) -> None:
    jane, joe, _address_id = household(service)
    (theirs,), (own,) = bookings_of(joe), bookings_of(jane)
    at = datetime(2026, 1, 2, tzinfo=UTC)
    for stay in (theirs, own):
        service.add(
            Companion(booking_id=stay.id, email="jane@example.com", phone="1", created_at=at)
        )
    service.add(Companion(booking_id=own.id, full_name="A third", created_at=at))
    document = export(jane)
    before = dump()["companions"]
    with session_scope() as session:
        session.execute(delete(Companion))
    assert take_back(document)["companions"] == Imported(restored=2, skipped=1, incomplete=1)
    after = dump()["companions"]
    assert {row["booking_id"] for row in after.values()} == {own.id}
    # Search terms are computed anew, names of third parties are not invented.
    for key, row in after.items():
        named = row["email_index"] is not None
        assert row["full_name"] is None
        assert row["email_index"] == (before[key]["email_index"] if named else None)
        assert row["phone_index"] == (before[key]["phone_index"] if named else None)
    assert sum(row["email_index"] is not None for row in after.values()) == 1


def test_the_first_link_that_is_there_decides_whose_a_row_is(service: Service) -> None:
    jane, joe, _address_id = household(service)
    (own,), (theirs,) = bookings_of(jane), bookings_of(joe)
    at = datetime(2026, 1, 2, tzinfo=UTC)
    service.add(
        people.payment(None, at, booking_id=own.id, amount_minor=1),
        people.payment(jane, at, booking_id=theirs.id, amount_minor=2),
        people.invoice(None, at.date(), booking_id=own.id),
        people.feedback(jane, at),
    )
    document = export(jane)
    document["data"]["feedback"][0] |= {"user_id": joe, "booking_id": own.id}
    with session_scope() as session:
        for model in (Payment, Invoice, Feedback):
            session.execute(delete(model))
    done = take_back(document)
    assert done["payments"] == Imported(restored=2)
    assert done["invoices"] == Imported(restored=1)
    assert done["feedback"] == Imported(skipped=1)
    links = {row["amount_minor"]: row["booking_id"] for row in dump()["payments"].values()}
    assert links == {1: own.id, 2: None}
