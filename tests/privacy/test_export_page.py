"""The page of an export: for a person to read, and nothing in it runs or loads."""

import base64
import hashlib
import re
from datetime import UTC, date, datetime
from html.parser import HTMLParser

from sqlalchemy import select

from backend.db_utils import session_scope
from backend.models import AuditEvent
from backend.services.consent_service import get_consent_service
from backend.services.subject_service import Who
from tests.conftest import Service
from tests.privacy import people
from tests.privacy.people import ADMINISTRATOR, plant
from tests.privacy.reading_back import export, members

MARKUP = "<script>alert(1)</script>&amp;<img src=x onerror=alert(1)>\n  \x01second line"


class Page(HTMLParser):
    """The elements of a page with their attributes, its style, and its text."""

    def __init__(self, who: int | Who) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.style = self.text = ""
        self._inside = ""
        self.feed(members(export(who, "zip"))["index.html"].decode())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._inside = tag
        self.text += "\n" if tag in ("br", "dd", "td", "th") else ""

    def handle_data(self, data: str) -> None:
        if self._inside == "style":
            self.style += data
        else:
            self.text += data

    def handle_endtag(self, tag: str) -> None:
        self._inside = self._inside if tag != self._inside else ""


def test_nothing_on_the_page_runs_or_loads_and_its_policy_says_so(sqlite_service: Service) -> None:
    user_id = sqlite_service.user("jane@example.com", full_name=MARKUP)
    page = Page(user_id)
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "img", "link", "iframe", "object", "form", "base"}
    names = {name for _, attributes in page.elements for name in attributes}
    assert not {name for name in names if name.startswith("on")} | (names & {"src", "style"})
    links = [attributes["href"] or "" for tag, attributes in page.elements if tag == "a"]
    ids = {attributes["id"] for _, attributes in page.elements if "id" in attributes}
    assert links
    assert {link.removeprefix("#") for link in links} == ids
    assert all(link.startswith("#") for link in links)
    assert not re.search(r"url\(|@import|https?:", page.style)
    (policy,) = (a["content"] for tag, a in page.elements if "http-equiv" in a)
    digest = base64.b64encode(hashlib.sha256(page.style.encode()).digest()).decode()
    assert policy == (
        f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    )


def test_words_of_a_person_are_text_on_the_page_and_no_sign_of_them_is_hidden(
    service: Service,
) -> None:
    page = Page(service.user("jane@example.com", full_name=MARKUP))
    assert MARKUP.replace("\x01", "\u2401") in page.text


def test_the_page_tells_purposes_recipients_days_rights_consents_requests_and_what_is_left_out(
    service: Service,
) -> None:
    guest = plant("A")
    with session_scope() as session:
        get_consent_service().record(
            session, ADMINISTRATOR, guest.id, purpose="marketing", granted=True, evidence="a form"
        )
    export(guest.id)
    text = " ".join(Page(guest.id).text.split())
    for told in (
        "Keeping a guest account: contact, stays and wishes. Lawful basis: contract",
        "the payment provider; tax authorities",
        "contact, address, city",
        "2555 days from check out. The last of it until 20",
        "GDPR art. 17(3)(b): tax law keeps the records of a sale until the period ends: the last",
        "Objection GDPR art. 21",
        "It reaches: companions, feedback.",
        "Complaint GDPR art. 77",
        "No decision about you is made by automated means alone",
        "Nothing is held about you in: inactivity notices, queued erasures.",
        "Marketing given since 20",
        "export done",
        "Left out: it is about another person whom the row names (GDPR art. 15(4)).",
    ):
        assert told in text, told
    with session_scope(read_only=True) as session:
        asked = session.scalars(select(AuditEvent.at).where(AuditEvent.action == "export")).all()
    assert all(f"{at:%Y-%m-%d %H:%M} UTC" in text for at in asked)


def test_the_page_of_somebody_without_an_account_says_so(sqlite_service: Service) -> None:
    guest = plant("A")
    named = next(m.text for m in guest.marks if (m.table, m.column) == ("companions", "email"))
    text = " ".join(Page(Who(email=named)).text.split())
    assert "holds about you, who are known here from what others have said alone" in text
    assert "You were asked for none." in text
    assert "Left out: it is about the person whose row it is" in text
    assert named in text


def test_a_table_in_print_repeats_its_heading_and_no_row_is_cut(sqlite_service: Service) -> None:
    user_id = sqlite_service.user("jane@example.com")
    sqlite_service.add(people.booking(user_id, date(2026, 1, 2)))
    page = Page(user_id)
    tags = [tag for tag, _ in page.elements]
    assert tags.count("thead") == tags.count("table") > 2
    assert "thead { display: table-header-group; }" in page.style
    assert "tr { break-inside: avoid; }" in page.style
    assert "overflow-wrap: anywhere" in page.style
    assert f"{datetime.now(UTC):%Y-%m-%d}" in page.text
