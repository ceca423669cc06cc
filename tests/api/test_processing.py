"""Records of processing over HTTP: for an admin alone, and by the policies in force."""

import base64
import hashlib
import html
import re

import pytest
from fastapi.testclient import TestClient

from backend.models import DATA_MAP
from tests.conftest import Run, Service, SignIn

Headers = dict[str, str]
RECORDS, PAGE = "/security/processing", "/security/processing/page"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "plain HTTP: neither this process nor a proxy that it knows of serves HTTPS"),
        ({"TRUSTED_PROXIES": "10.0.0.1"}, "HTTPS is served by whatever stands before this process"),
        (
            {"SSL_CERT_PATH": "certificate.pem", "SSL_KEY_PATH": "key.pem"},
            "HTTPS is served by this process",
        ),
    ],
    ids=["nothing", "a proxy", "a certificate"],
)
def test_who_serves_https_is_told_as_it_is_set(
    run: Run,
    sqlite_service: Service,
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, str],
    words: str,
) -> None:
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    measures = run("map", "records", "--json").json["measures"]
    assert {"name": "transport", "words": words} in measures


@pytest.mark.parametrize("path", [RECORDS, PAGE])
def test_only_an_admin_reads_them(
    client: TestClient, service: Service, admin: Headers, sign_in: SignIn, path: str
) -> None:
    service.user("jane@example.com")
    answers = [
        client.get(path, headers=headers) for headers in (admin, sign_in("jane@example.com"), {})
    ]
    assert [answer.status_code for answer in answers] == [200, 403, 401]
    assert [answer.json()["code"] for answer in answers[1:]] == ["forbidden", "unauthenticated"]
    assert {answer.headers["cache-control"] for answer in answers} == {"no-store"}


def test_every_table_of_people_is_in_one_activity_and_every_personal_column_is_counted(
    client: TestClient, admin: Headers
) -> None:
    document = client.get(RECORDS, headers=admin).json()
    assert (document["format"], document["version"]) == ("holdfast-processing-records", 1)
    assert document["generated_at"].endswith("Z")
    activities = document["activities"]
    tables = [table for activity in activities for table in activity["tables"]]
    assert sorted(tables) == sorted(mapped.name for mapped in DATA_MAP.of_people)
    personal = {f"{t.name}.{c}" for t in DATA_MAP.of_people for c in t.personal_columns}
    for found in (
        [c for a in activities for one in a["data_categories"] for c in one["columns"]],
        [c for a in activities for columns in a["protection"].values() for c in columns],
    ):
        assert len(found) == len(personal)
        assert set(found) == personal
    (stay,) = (a for a in activities if "companions" in a["tables"])
    assert [people["third_party"] for people in stay["data_subjects"]] == [False, True]
    assert stay["recipients"] == ["the authority that registers guests"]


def test_a_policy_set_over_the_api_is_told_at_once(client: TestClient, admin: Headers) -> None:
    def limit() -> dict[str, str]:
        activities = client.get(RECORDS, headers=admin).json()["activities"]
        limits = [limit for activity in activities for limit in activity["time_limits"]]
        (found,) = (one for one in limits if one["table"] == "feedback")
        return dict(found)

    assert limit()["words"] == "365 days from submitted at, then deleted"
    policy = {"data_type": "feedback", "retention_period": "P2Y", "action": "anonymize"}
    assert client.post("/security/retention/policy", json=policy, headers=admin).is_success
    assert (limit()["period"], limit()["action"]) == ("P2Y", "anonymize")
    assert "2 years from submitted at, then anonymized" in client.get(PAGE, headers=admin).text
    policy_off = policy | {"enabled": False}
    client.post("/security/retention/policy", json=policy_off, headers=admin)
    assert limit()["action"] is None
    assert "not enforced" in client.get(PAGE, headers=admin).text


def test_the_command_line_tells_the_same(client: TestClient, admin: Headers, run: Run) -> None:
    over_http = client.get(RECORDS, headers=admin).json()
    printed = run("map", "records", "--json").json
    assert printed.pop("generated_at") >= over_http.pop("generated_at")
    assert printed == over_http


def test_the_page_may_use_its_own_style_and_nothing_else(
    client: TestClient, admin: Headers
) -> None:
    answer = client.get(PAGE, headers=admin)
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    (style,) = re.findall("<style>(.*?)</style>", answer.text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    # In the page too: a saved one has no header.
    assert f'content="{policy}"' in html.unescape(answer.text)
    assert answer.headers["content-security-policy"] == f"{policy}; frame-ancestors 'none'"
