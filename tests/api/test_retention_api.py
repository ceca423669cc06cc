"""Retention over the API and the command line: what is set, shown, logged, and refused."""

from collections.abc import Callable, Iterator
from datetime import UTC, datetime, time, timedelta
from typing import Any
from zoneinfo import ZoneInfo

import httpx2 as httpx
import pytest
from fastapi.testclient import TestClient
from sqlalchemy import select

from backend.db_utils import session_scope
from backend.models import DATA_MAP, Feedback, HoldScope, LegalHold
from backend.services.audit_service import COMMAND_LINE
from backend.settings import get_settings
from tests.conftest import Run, Service, SignIn
from tests.privacy import people
from tests.privacy.people import dump

DAY = timedelta(days=1)
ROOT = "/security/retention"
GOOD = {"data_type": "feedback", "retention_days": 30, "action": "delete"}
NO_PERIOD = {"data_type": "feedback", "action": "delete"}
NO_PERIODS = (
    "", "P", "PT1H", "P1DT1H", "P1.5Y", "P1,5Y", "p7y", "P0D", "P0Y0M0D", "P-1D", "-P1D", "+P1D",
    "P7", "7Y", "P 7Y", "P7Y ", "P7Y\n", "P7Y\x00", "P1D1Y", "P1Y1Y", "P36501D", "P101Y",
    "P100Y1D", "P999999D", "P1000000000D", "P\u0667Y", "P\uff17Y", "P\u00b2Y", "30 days",
    "P7Y" * 20,
)  # fmt: skip

Ask = Callable[..., httpx.Response]


@pytest.fixture
def get(client: TestClient, admin: dict[str, str]) -> Ask:
    return lambda path, **query: client.get(f"{ROOT}/{path}", headers=admin, params=query)


@pytest.fixture
def post(client: TestClient, admin: dict[str, str]) -> Ask:
    return lambda path, **body: client.post(f"{ROOT}/{path}", headers=admin, json=body)


def item(listed: httpx.Response, data_type: str) -> dict[str, Any]:
    assert listed.status_code == 200, listed.text
    (found,) = (each for each in listed.json()["items"] if each["data_type"] == data_type)
    return dict(found)


def bad_bodies() -> Iterator[dict[str, Any]]:
    counts: tuple[Any, ...] = (0, -1, 36_501, 10**9, 10**30, True, False, "30", 30.0, 30.5, [30])
    for days in counts:
        yield GOOD | {"retention_days": days}
    for period in (*NO_PERIODS, 7, 7.5, True, ["P7Y"]):
        yield NO_PERIOD | {"retention_period": period}
    yield NO_PERIOD
    yield GOOD | {"retention_days": None}
    yield GOOD | {"retention_period": "P30D"}
    for data_type in ("weather", "", "Feedback", "users", 1, None, True, "f" * 65):
        yield GOOD | {"data_type": data_type}
    for action in ("shred", "", "DELETE", "retain", 1, True, None):
        yield GOOD | {"action": action}
    for switch in ("enabled", "year_end"):
        for value in ("true", 1, 0, "yes", None):
            yield GOOD | {switch: value}
    yield GOOD | {"days": 30}
    yield GOOD | {"updated_by": "me"}
    for name in ("data_type", "action"):
        yield {key: value for key, value in GOOD.items() if key != name}


def test_a_policy_that_makes_no_sense_is_refused_and_nothing_changes(post: Ask) -> None:
    before = dump()
    for body in bad_bodies():
        answer = post("policy", **body)
        assert answer.status_code == 422, (body, answer.text)
        assert answer.headers["content-type"] == "application/problem+json"
    assert dump() == before
    for good in (GOOD | {"retention_days": 36_500}, NO_PERIOD | {"retention_period": "P100Y"}):
        assert post("policy", **good).status_code == 201


def test_a_command_that_makes_no_sense_is_refused_in_a_line_and_nothing_changes(
    run: Run, sqlite_service: Service
) -> None:
    before = dump()
    bad = [
        *(("feedback", period, "delete") for period in NO_PERIODS if "\x00" not in period),
        ("weather", "P7Y", "delete"), ("", "P7Y", "delete"), ("feedback", "P7Y", "shred"),
        ("feedback", "30", "delete"), ("feedback", "P7Y"), ("feedback", "P7Y", "delete", "--year"),
    ]  # fmt: skip
    for arguments in bad:
        # What begins with a dash would be an option.
        answer = run("retention", "policy", "--", *arguments)
        assert (answer.code, answer.out) == (2, ""), arguments
    assert run("retention", "policy", "feedback", "PT1H", "delete").err.count("\n") == 1
    assert dump() == before
    assert run("retention", "policy", "feedback", "P7Y", "delete").code == 0
    assert run("retention", "versions", "weather").code == 2


@pytest.mark.parametrize("action", ["delete", "anonymize"])
def test_what_a_law_keeps_is_refused_with_the_ground(
    post: Ask, run: Run, action: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RETENTION_STATUTORY_DAYS", "2555")
    get_settings.cache_clear()
    before = dump()
    for data_type in ("invoice", "payment"):
        body = {"data_type": data_type, "retention_days": 2554, "action": action}
        refused = post("policy", **body)
        assert (refused.status_code, refused.json()["code"]) == (422, "statutory_period")
        assert "GDPR art. 17(3)(b)" in refused.json()["detail"]
        command = run("retention", "policy", data_type, "P2554D", action)
        assert (command.code, command.out) == (2, "")
        assert command.err == f"holdfast: {refused.json()['detail']}\n"
        assert dump() == before
    for data_type in ("invoice", "payment"):
        body = {"data_type": data_type, "retention_days": 2555, "action": action}
        assert post("policy", **body).status_code == 201
        assert run("retention", "policy", data_type, "P2555D", action).code == 0


def test_what_was_set_is_answered_listed_and_kept_as_versions(
    post: Ask, get: Ask, run: Run, sign_in: SignIn
) -> None:
    made = post("policy", **NO_PERIOD, retention_period="P24M", year_end=True)
    assert made.status_code == 201
    said = made.json()
    terms = {"retention_period": "P2Y", "year_end": True, "action": "delete", "enabled": True,
             "source": "api"}  # fmt: skip
    assert {name: said[name] for name in terms} == terms
    listed = item(get("policies"), "feedback")
    assert {name: listed[name] for name in said} == said
    assert run("retention", "policy", "feedback", "P3Y", "anonymize", "--no-enabled").code == 0
    versions = get("policies/feedback/versions").json()["items"]
    assert [each["version"] for each in versions] == [2, 1]
    assert versions[1]["after"] == versions[0]["before"] == terms
    assert versions[1]["before"]["source"] == "environment"
    assert versions[0]["after"] == terms | {
        "retention_period": "P3Y", "year_end": False, "action": "anonymize", "enabled": False,
    }  # fmt: skip
    with session_scope(read_only=True) as session:
        assert versions[0]["changed_by"] == COMMAND_LINE.ref(session)
    assert versions[1]["changed_by"] != versions[0]["changed_by"]
    shown = run("retention", "versions", "feedback", "--json").json["items"]
    assert [dict(one, changed_at="") for one in shown] == [dict(v, changed_at="") for v in versions]
    assert get("policies/invoice/versions").json() == {"items": []}
    unknown = get("policies/weather/versions")
    assert (unknown.status_code, unknown.json()["code"]) == (404, "not_found")


def test_the_table_of_policies_shows_what_the_job_would_find(
    post: Ask, get: Ask, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = datetime.now(UTC)
    ages = (800, 500, 366, 365 - 5, 365 - 29, 365 - 31, 1)
    service.add(*(people.feedback(None, now - age * DAY) for age in ages))
    with session_scope() as session:
        held = session.scalars(select(Feedback.id).order_by(Feedback.submitted_at)).first()
        session.add(LegalHold(scope=HoldScope.ROW, data_type="feedback", row_id=held,
                              placed_by="an administrator", placed_at=now, reason="x"))  # fmt: skip
    counts = ("rows", "due", "due_soon", "held")
    found = item(get("policies"), "feedback")
    assert [found[name] for name in counts] == [7, 3, 2, 1]
    assert (found["last_run_at"], found["next_run_at"]) == (None, None)
    empty = item(get("policies"), "invoice")
    assert [empty[name] for name in counts] == [0, 0, 0, 0]
    began = datetime.now(UTC)
    done = post("apply", dry_run=False, data_type="feedback").json()
    assert (done["results"][0]["matched"], done["results"][0]["affected"]) == (3, 2)
    monkeypatch.setenv("SCHEDULER_ENABLED", "true")
    monkeypatch.setenv("RETENTION_TIME", "05:15")
    monkeypatch.setenv("TIMEZONE", "Europe/Berlin")
    get_settings.cache_clear()
    found = item(get("policies"), "feedback")
    assert [found[name] for name in counts] == [5, 1, 2, 1]
    assert began <= datetime.fromisoformat(found["last_run_at"]) <= datetime.now(UTC)
    following = datetime.fromisoformat(found["next_run_at"])
    assert following.astimezone(ZoneInfo("Europe/Berlin")).time() == time(5, 15)
    assert timedelta(0) < following - began <= timedelta(hours=25)
    assert item(get("policies"), "invoice")["last_run_at"] is None
    post("policy", **GOOD, enabled=False)
    off = item(get("policies"), "feedback")
    assert (off["enabled"], off["next_run_at"]) == (False, None)
    assert off["last_run_at"] == found["last_run_at"]


def test_the_log_is_asked_by_data_type_and_run_and_page(post: Ask, get: Ask) -> None:
    first = post("apply", dry_run=False).json()["run_id"]
    second = post("apply", dry_run=False, data_type="feedback").json()["run_id"]
    third = post("apply", dry_run=False).json()["run_id"]
    types = len(DATA_MAP.by_data_type)

    def asked(**query: Any) -> tuple[int, list[tuple[str, str]]]:
        answer = get("logs", **query)
        assert answer.status_code == 200, answer.text
        items = answer.json()["items"]
        return answer.json()["total"], [(each["run_id"], each["data_type"]) for each in items]

    total, everything = asked()
    assert total == len(everything) == len(set(everything)) == 2 * types + 1
    assert [run for run, _ in everything] == [third] * types + [second] + [first] * types
    assert asked(run_id=second) == (1, [(second, "feedback")])
    assert asked(run_id=first) == (types, everything[-types:])
    feedback = [(run, "feedback") for run in (third, second, first)]
    assert asked(data_type="feedback") == (3, feedback)
    assert asked(data_type="feedback", run_id=third) == (1, feedback[:1])
    assert asked(data_type="invoice", run_id=second) == (0, [])
    assert asked(data_type="feedback", limit=1, offset=1) == (3, feedback[1:2])
    pages = [asked(limit=3, offset=at)[1] for at in range(0, total + 3, 3)]
    assert [row for page in pages for row in page] == everything
    bad: list[dict[str, Any]] = [
        {"run_id": "1"}, {"data_type": ""}, {"limit": 0}, {"limit": 501}, {"offset": -1},
        {"limit": "ten"}, {"offset": 10**10},
    ]  # fmt: skip
    assert [get("logs", **query).status_code for query in bad] == [422] * len(bad)


def test_nobody_but_an_admin_sees_or_sets_anything(
    client: TestClient, service: Service, admin: dict[str, str], sign_in: SignIn
) -> None:
    service.user("jane@example.com")
    jane = sign_in("jane@example.com")
    before = dump()
    routes: list[tuple[str, str, dict[str, Any]]] = [
        ("GET", "policies", {}), ("GET", "policies/feedback/versions", {}), ("GET", "forecast", {}),
        ("GET", "logs", {}), ("GET", "notices", {}), ("POST", "policy", {"json": GOOD}),
        ("POST", "apply", {"json": {"dry_run": True}}),
    ]  # fmt: skip
    for method, path, body in routes:
        for headers, status in ((jane, 403), ({}, 401)):
            answer = client.request(method, f"{ROOT}/{path}", headers=headers, **body)
            assert answer.status_code == status, path
    # That it was denied is recorded, and nothing else.
    assert people.without(dump(), {}, "users", "audit_events") == people.without(
        before, {}, "users", "audit_events"
    )
    for method, path, body in routes:
        answer = client.request(method, f"{ROOT}/{path}", headers=admin, **body)
        assert answer.status_code in (200, 201), path
