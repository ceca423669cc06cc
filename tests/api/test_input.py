"""Input is read strictly: one meaning for each body, and nothing that is not described."""

import json
from typing import Any, Final
from urllib.parse import urlencode

import pytest
from fastapi import APIRouter, FastAPI
from fastapi.routing import APIRoute, iter_route_contexts
from fastapi.testclient import TestClient
from sqlalchemy import select

from backend.api.bodies import StrictRoute, parse_form
from backend.api.strict_json import MAX_DEPTH, parse_json
from backend.db_utils import session_scope
from backend.errors import InvalidRequestError
from backend.models import DataConsent
from backend.services.account_service import get_account_service
from backend.services.audit_service import COMMAND_LINE
from main import create_app
from tests.conftest import ADMIN, PASSWORD, Service

JANE: Final = "jane@example.com"
# Put into what is sent; it must not come back.
CANARY: Final = "Kanarienvogel"
JSON: Final = {"Content-Type": "application/json"}
FORM: Final = {"Content-Type": "application/x-www-form-urlencoded"}
Headers = dict[str, str]


@pytest.fixture
def service(sqlite_service: Service) -> Service:
    """What is refused before the database does not depend on the engine."""
    return sqlite_service


@pytest.fixture
def jane(service: Service) -> int:
    return service.user(JANE)


def lenient(app: FastAPI) -> list[str]:
    """Routes of *app* that read their requests as FastAPI does by default."""
    return [
        str(context.path)
        for context in iter_route_contexts(app.routes)
        if isinstance(context.original_route, APIRoute)
        and not isinstance(context.original_route, StrictRoute)
    ]


def test_every_route_reads_strictly(sqlite_service: Service) -> None:
    app = create_app()
    assert sum(isinstance(c.original_route, StrictRoute) for c in iter_route_contexts(app.routes))
    assert lenient(app) == []


def test_a_router_that_forgets_it_is_found() -> None:
    app, router = FastAPI(openapi_url=None, docs_url=None, redoc_url=None), APIRouter()
    router.get("/forgotten")(lambda: None)
    app.include_router(router)
    assert lenient(app) == ["/forgotten"]


# JSON


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("{}", {}),
        (' {"a": [1, -2.5e3, true, null, "\\u00e4\\ud83d\\ude00"]}\n', {"a": [1, -2500.0, True,
                                                                   None, "ä😀"]}),
        ('{"a": {"b": 1}, "b": {"b": 1}}', {"a": {"b": 1}, "b": {"b": 1}}),
        ('"\\\\ud800"', "\\ud800"),
        ("1e308", 1e308),
        (f"[{'9' * 4300}]", [int("9" * 4300)]),
        ("[" * MAX_DEPTH + "]" * MAX_DEPTH, None),
        (json.dumps("[{" * 100 + '"' + "[{" * 100), "[{" * 100 + '"' + "[{" * 100),
        (json.dumps([[]] * 1000), [[]] * 1000),
    ],
)  # fmt: skip
def test_json_is_read_as_it_is(text: str, value: Any) -> None:
    found = parse_json(text.encode())
    assert found == (json.loads(text) if value is None else value)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b'{"a": 1, "a": 1}', "twice"),
        (b'{"a": 1, "\\u0061": 2}', "twice"),
        (b'{"x": [{"a": {}, "b": 1, "a": {}}]}', "twice"),
        (b'{"a": NaN}', "no numbers"),
        (b"[Infinity]", "no numbers"),
        (b"-Infinity", "no numbers"),
        (b"1e309", "too large"),
        (b'{"a": -1.0e999999999}', "too large"),
        (b"9" * 4301, "digits"),
        (b"-" + b"9" * 60_000, "digits"),
        (b'"\\ud800"', "surrogate"),
        (b'{"\\uDFFF": 1}', "surrogate"),
        (b'"\\ude00\\ud83d"', "surrogate"),
        (b'"\xff"', "UTF-8"),
        (b'"\xed\xa0\x80"', "UTF-8"),
        (b'"\xc0\xaf"', "UTF-8"),
        ('"ä"'.encode("latin-1"), "UTF-8"),
        (b"\xef\xbb\xbf{}", "not JSON"),
        ("{}".encode("utf-16"), "UTF-8"),
        ("{}".encode("utf-16-le"), "not JSON"),
        ("{}".encode("utf-32-be"), "not JSON"),
        (b"", "not JSON"),
        (b" ", "not JSON"),
        (b"{", "not JSON"),
        (b"{}{}", "not JSON"),
        (b"{'a': 1}", "not JSON"),
        (b'{"a": 1,}', "not JSON"),
        (b"[01]", "not JSON"),
        (b'"a\nb"', "not JSON"),
        (b'"a\x00b"', "not JSON"),
        (b"{} // no", "not JSON"),
        (b"[" * 33 + b"]" * 33, "deeper"),
        (b'{"a":' * 33 + b"1" + b"}" * 33, "deeper"),
        (b"[" * 60_000, "deeper"),
        (b"[[]," * 15_000, "deeper"),
        (b'["]",' * 33 + b"1" + b"]" * 33, "deeper"),
        (b'["\\"]",' * 33 + b"1" + b"]" * 33, "deeper"),
        (b'["\\\\",' * 33 + b"1" + b"]" * 33, "deeper"),
    ],
)
def test_what_readers_take_differently_is_refused(content: bytes, reason: str) -> None:
    with pytest.raises(InvalidRequestError, match=reason):
        parse_json(content)


def test_a_refused_body_is_not_repeated_and_changes_nothing(
    client: TestClient, jane: int, admin: Headers
) -> None:
    path = f"/security/data/consent/{jane}"
    good = '{"purpose": "marketing", "granted": true, "evidence": "form"}'
    bad = [
        good.replace("}", f', "evidence": "{CANARY}"}}'),
        good.replace("form", f"{CANARY}\\ud800"),
        good.replace("true", f'[{"[" * 40}"{CANARY}"{"]" * 40}]'),
        good.replace("true", "NaN"),
        good.replace("true", "1e999"),
        good.replace("true", "9" * 5000),
        f"\ufeff{good}",
        f"{good}{CANARY}",
        "",
    ]
    for text in bad:
        answer = client.post(path, content=text.encode(), headers=admin | JSON)
        problem = answer.json()
        assert (answer.status_code, problem["code"]) == (422, "invalid_request"), text
        assert answer.headers["content-type"] == "application/problem+json"
        assert problem["errors"][0]["at"] == "body"
        assert CANARY not in answer.text
    with session_scope(read_only=True) as session:
        assert session.scalars(select(DataConsent)).all() == []
    assert client.post(path, content=good, headers=admin | JSON).status_code == 201


# Content types


@pytest.mark.parametrize(
    ("content_type", "taken"),
    [
        ("application/json", True),
        ("application/json;charset=utf-8", True),
        ('Application/JSON; Charset="UTF-8"', True),
        ("application/json; profile=x; charset=utf8", True),
        ("application/json; charset=utf-16", False),
        ("application/json; charset=iso-8859-1", False),
        ("application/json; charset=utf-8; charset=utf-7", False),
        ("application/problem+json", False),
        ("application/jsonp", False),
        ("text/json", False),
        ("text/plain", False),
        ("application/x-www-form-urlencoded", False),
        ("multipart/form-data; boundary=x", False),
        ("application/json, text/plain", False),
        (CANARY, False),
        ("", False),
        (None, False),
    ],
)
def test_a_json_body_must_say_that_it_is_one(
    client: TestClient, jane: int, admin: Headers, content_type: str | None, taken: bool
) -> None:
    headers = admin if content_type is None else admin | {"Content-Type": content_type}
    body = json.dumps({"user_id": jane}).encode()
    answer = client.post("/security/data/find", content=body, headers=headers)
    assert answer.status_code == (200 if taken else 415)
    if not taken:
        assert answer.json()["code"] == "unsupported_media_type"
        assert CANARY not in answer.text


def test_two_content_types_are_none(client: TestClient, jane: int, admin: Headers) -> None:
    headers = [*admin.items(), ("Content-Type", JSON["Content-Type"])]
    body = json.dumps({"user_id": jane}).encode()
    path = "/security/data/find"
    assert client.post(path, content=body, headers=headers).status_code == 200
    headers.append(("Content-Type", "text/plain"))
    assert client.post(path, content=body, headers=headers).status_code == 415


@pytest.mark.parametrize(
    ("content_type", "status"),
    [
        (FORM["Content-Type"], 200),
        (f"{FORM['Content-Type']}; charset=UTF-8", 200),
        (f"{FORM['Content-Type']}; charset=utf-7", 415),
        ("application/json", 415),
        ("multipart/form-data; boundary=x", 415),
        (None, 415),
    ],
)
def test_the_sign_in_form_must_say_that_it_is_one(
    client: TestClient, content_type: str | None, status: int
) -> None:
    form = f"username={ADMIN}&password={PASSWORD}".replace(" ", "+").encode()
    headers = {} if content_type is None else {"Content-Type": content_type}
    assert client.post("/auth/token", content=form, headers=headers).status_code == status


def test_an_optional_body_may_be_left_out_without_a_type(
    client: TestClient, admin: Headers
) -> None:
    assert client.post("/security/backup/create", headers=admin).status_code == 201
    odd = admin | {"Content-Type": "text/plain"}
    assert client.post("/security/backup/create", headers=odd).status_code == 415


# Forms


def test_a_form_with_a_field_twice_is_refused(client: TestClient) -> None:
    form = f"username={ADMIN}&password={PASSWORD}".replace(" ", "+")
    assert client.post("/auth/token", content=form, headers=FORM).status_code == 200
    for field in ("username", "password", "scope", CANARY):
        twice = f"{form}&{field}=a&{field}=b" if field not in form else f"{form}&{field}=a"
        answer = client.post("/auth/token", content=twice, headers=FORM)
        assert (answer.status_code, answer.json()["code"]) == (422, "invalid_request"), field
        assert CANARY not in answer.text


def test_a_form_of_many_fields_is_refused() -> None:
    fields = [f"a{i}=" for i in range(21)]
    assert len(parse_form("&".join(fields[:20]).encode())) == 20
    with pytest.raises(InvalidRequestError, match="too many"):
        parse_form("&".join(fields).encode())


def test_a_form_is_read_as_utf_8_however_it_is_spelled(
    client: TestClient,
) -> None:
    password = "ünter hohen Föhren schläft 7 Igel"
    with session_scope() as session:
        get_account_service().create(session, "jürgen@example.com", password, COMMAND_LINE)
    for spelled in (
        f"username=jürgen@example.com&password={password}".encode(),
        urlencode({"username": "jürgen@example.com", "password": password}).encode(),
    ):
        assert client.post("/auth/token", content=spelled, headers=FORM).status_code == 200
    for cut in (b"username=a&password=%ff", b"username=a&password=\xff"):
        refused = client.post("/auth/token", content=cut, headers=FORM)
        assert (refused.status_code, refused.json()["code"]) == (422, "invalid_request")
