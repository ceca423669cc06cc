"""Paths and queries are read strictly, too: each parameter is described and given once."""

import re
from collections.abc import Iterator
from typing import Any, Final

import pytest
from fastapi.testclient import TestClient

from tests.conftest import Service

# Put into what is sent; it must not come back.
CANARY: Final = "Kanarienvogel"
Headers = dict[str, str]


@pytest.fixture
def service(sqlite_service: Service) -> Service:
    """What is refused before the database does not depend on the engine."""
    return sqlite_service


def queries(document: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Every path that is read, and a query that it describes."""
    for path, methods in document["paths"].items():
        for parameter in methods.get("get", {}).get("parameters", ()):
            if parameter["in"] == "query":
                yield path, parameter["name"]


def test_a_query_parameter_that_is_not_described_is_refused_everywhere(
    client: TestClient, admin: Headers
) -> None:
    paths = client.get("/openapi.json").json()["paths"]
    read = [path for path, methods in paths.items() if "get" in methods and "{" not in path]
    assert len(read) >= 15
    for path in read:
        for query in (f"{CANARY}=1", f"{CANARY}", "user.role=admin", "limit%00=1"):
            answer = client.get(f"{path}?{query}", headers=admin)
            assert (answer.status_code, answer.json()["code"]) == (422, "invalid_request"), path
            assert CANARY not in answer.text
        assert client.get(f"{path}?", headers=admin).status_code == 200


def test_a_query_parameter_given_twice_is_refused(client: TestClient, admin: Headers) -> None:
    described = list(queries(client.get("/openapi.json").json()))
    assert len(described) >= 12
    for path, name in described:
        answer = client.get(f"{path}?{name}=1&{name}=1", headers=admin)
        assert (answer.status_code, answer.json()["code"]) == (422, "invalid_request"), path
        assert "twice" in answer.json()["detail"]
    assert client.get("/security/retention/logs?limit=1", headers=admin).status_code == 200


def test_every_page_has_a_bound(client: TestClient, admin: Headers) -> None:
    """However many rows there are, an answer holds a bounded number of them."""
    document = client.get("/openapi.json").json()
    limits = [
        parameter["schema"]
        for methods in document["paths"].values()
        for operation in methods.values()
        for parameter in operation.get("parameters", ())
        if re.search("limit|size|count|page", parameter["name"])
    ]
    assert len(limits) >= 3
    assert all(0 < schema["maximum"] <= 500 and schema["minimum"] == 1 for schema in limits)


@pytest.mark.parametrize("odd", ["%00", "a%00b", "%ed%a0%80", "%ff", "%0d%0aX-A:%20b", "%"])
def test_odd_bytes_in_paths_and_queries_are_refused_or_find_nothing(
    client: TestClient, admin: Headers, odd: str
) -> None:
    paths = [
        f"/{odd}", f"/static/{odd}", f"/security/holds/{odd}", f"/security/data/consent/{odd}",
        f"/security/retention/policies/{odd}/versions",
    ]  # fmt: skip
    for path in paths:
        answer = client.get(path, headers=admin)
        assert answer.status_code in {404, 422}, path
        if "%00" in odd and path.startswith("/security/"):
            assert answer.status_code == 422, path
        assert answer.headers["content-type"] == "application/problem+json", path
    for path, name in queries(client.get("/openapi.json").json()):
        answer = client.get(f"{path}?{name}={odd}", headers=admin)
        assert answer.status_code in {200, 422}, (path, name)
        if "%00" in odd:
            assert answer.status_code == 422, (path, name)


def test_every_list_has_an_end_and_the_rest_is_on_the_next_page(
    client: TestClient, admin: dict[str, str]
) -> None:
    for number in range(3):
        body = {"scope": "data_type", "data_type": "payment", "reason": f"claim {number}"}
        assert client.post("/security/holds", json=body, headers=admin).status_code == 201
    whole = client.get("/security/holds", headers=admin).json()["items"]
    pages = [
        client.get("/security/holds", params={"limit": 1, "offset": at}, headers=admin).json()
        for at in range(3)
    ]
    assert [page["items"][0]["id"] for page in pages] == [hold["id"] for hold in whole]
    for path in ("/security/holds", "/security/backup/list"):
        for wrong in ({"limit": 0}, {"limit": 501}, {"offset": -1}):
            answer = client.get(path, params=wrong, headers=admin)
            assert answer.status_code == 422, (path, wrong)


@pytest.mark.parametrize("spelled", ["3_0", "3.0", "0003", "+3", "%203", "3%0a", "3e0", "٣"])
def test_a_number_in_an_address_has_one_spelling(
    client: TestClient, admin: Headers, spelled: str
) -> None:
    """What stands before us would take another spelling for another person's, or page's."""
    for address in (
        f"/security/data/consent/{spelled}",
        f"/security/audit?limit={spelled}",
        f"/security/audit?user_id={spelled}",
        f"/security/audit?before={spelled}",
        f"/security/holds?offset={spelled}",
    ):
        assert client.get(address, headers=admin).status_code == 422
    assert client.get("/security/audit?limit=3", headers=admin).status_code == 200


@pytest.mark.parametrize("moment", ["0001-01-01T00:00:00%2B14:00", "9999-12-31T23:59:59-14:00"])
def test_a_time_that_is_none_in_utc_is_refused(
    client: TestClient, admin: Headers, moment: str
) -> None:
    for name in ("since", "until"):
        assert client.get(f"/security/audit?{name}={moment}", headers=admin).status_code == 422
    edge = moment.replace("%2B14:00", "Z").replace("-14:00", "Z")
    assert client.get(f"/security/audit?since={edge}", headers=admin).status_code == 200
    body = {"scope": "data_type", "data_type": "booking", "reason": "claim",
            "review_on": moment.replace("%2B", "+")}  # fmt: skip
    assert client.post("/security/holds", json=body, headers=admin).status_code == 422
