"""A row of the trail that somebody has damaged is shown as that, and hides none of the others."""

from typing import Any

import pytest
from fastapi.testclient import TestClient

from tests.conftest import Run, Service
from tests.services.trail import act, numbers, sql

Headers = dict[str, str]
BY_ENGINE = {
    "sqlite": [
        ("at", "'x'"), ("at", "7"), ("at", "x'00'"), ("action", "x'ff'"), ("outcome", "x'6162'"),
        ("request_id", "CAST(x'ff61' AS TEXT)"), ("detail", "x'00'"),
    ],
    "postgresql": [("at", "'infinity'"), ("at", "'0044-03-15 BC'")],
}  # fmt: skip


def page(client: TestClient, headers: Headers, **query: Any) -> dict[int, dict[str, Any]]:
    answer = client.get("/security/audit", params=query, headers=headers)
    assert answer.status_code == 200, answer.text
    return {one["id"]: one for one in answer.json()["items"]}


def test_a_damaged_row_is_shown_and_so_are_all_others(
    client: TestClient, service: Service, admin: Headers, run: Run
) -> None:
    last = act(4)
    whole = page(client, admin)
    assert not any(one["damaged"] for one in whole.values())
    changes = [("detail", "'enc1.none'"), ("detail", "'plain'"), *BY_ENGINE[service.engine]]
    for column, value in changes:
        sql("UPDATE audit_events SET at = (SELECT at FROM audit_events WHERE id = 4) WHERE id = 5")
        sql("UPDATE audit_events SET action = 'export', detail = NULL WHERE id = 5")
        sql(f"UPDATE audit_events SET {column} = {value} WHERE id = 5")  # noqa: S608 - from above
        shown = page(client, admin)
        one = shown[5]
        assert (one["damaged"], one["detail"]) == (True, {}), (column, value)
        assert (one["at"] is None) == (column == "at"), (column, value)
        assert one["subject_ref"] == whole[5]["subject_ref"]
        assert shown[4] == whole[4]
        assert shown[last] == whole[last]
        listed = run("audit", "list", "--json")
        assert listed.code == 0, listed.err
        (found,) = (each for each in listed.json["items"] if each["id"] == 5)
        assert found["damaged"]
        assert run("audit", "list").code == 0


# SQLite keeps bytes where text belongs.
@pytest.mark.parametrize("service", ["sqlite"], indirect=True)
@pytest.mark.usefixtures("service")
def test_what_can_be_read_of_a_damaged_row_is_shown(client: TestClient, admin: Headers) -> None:
    act(4)
    sql("UPDATE audit_events SET action = x'6162', request_id = CAST(x'61ff' AS TEXT) WHERE id = 5")
    one = page(client, admin)[5]
    assert (one["action"], one["request_id"], one["outcome"]) == ("ab", "a?", "done")
    assert one["actor_ref"] == "command line"
    assert one["at"] is not None


def test_rows_before_the_first_lead_to_no_page_that_cannot_be_asked_for(
    client: TestClient, admin: Headers
) -> None:
    act()
    sql(
        "INSERT INTO audit_events (id, at, action, outcome, actor_ref)"
        " SELECT -id, at, action, outcome, actor_ref FROM audit_events"
    )
    query: dict[str, Any] = {"limit": 1}
    seen = []
    while True:
        answer = client.get("/security/audit", params=query, headers=admin)
        assert answer.status_code == 200, answer.text
        seen += [one["id"] for one in answer.json()["items"]]
        if answer.json()["next_before"] is None:
            break
        query["before"] = answer.json()["next_before"]
    assert seen == [one for one in sorted(numbers(), reverse=True) if 0 < one <= seen[0]]


def test_what_was_edited_and_can_be_read_is_for_the_check_to_tell(
    client: TestClient, admin: Headers
) -> None:
    act(4)
    sql("UPDATE audit_events SET outcome = 'denied' WHERE id = 5")
    one = page(client, admin)[5]
    assert (one["outcome"], one["damaged"]) == ("denied", False)
