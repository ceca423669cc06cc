"""The OpenAPI document: sound, described, with examples, its errors included."""

import json
import re
from collections.abc import Iterator
from typing import Any, Final

import pytest
from fastapi.testclient import TestClient
from pydantic import BaseModel

from backend.api.dependencies import Answer, Body
from main import create_app
from tests.conftest import Service

Document = dict[str, Any]
Operation = tuple[str, str, dict[str, Any]]
PROBLEM: Final = "application/problem+json"
METHODS: Final = {"get", "put", "post", "delete", "patch"}
# Who is let in, by the contract's table: everybody, and everybody with a token.
OPEN: Final = {"/auth/token", "/healthz", "/readyz", "/metrics"}
ANY_SIGNED_IN: Final = {
    "/auth/me",
    "/auth/logout",
    "/auth/logout/everywhere",
    "/auth/password",
    "/auth/codes/confirm",
    "/auth/codes/remove",
}
# These name a person or a backup in the body.
BY_ID: Final = {
    "/security/data/find",
    "/security/data/export",
    "/security/data/delete",
    "/security/backup/restore",
}
# These find a person by number or address: two may share an address, one may be erased.
BY_ADDRESS: Final = BY_ID - {"/security/backup/restore"}


@pytest.fixture
def document(sqlite_service: Service) -> Document:
    with TestClient(create_app()) as client:
        answer = client.get("/openapi.json")
    assert answer.status_code == 200
    found: Document = answer.json()
    return found


def operations(document: Document) -> list[Operation]:
    return [
        (method, path, operation)
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    ]


def everything(node: Any) -> Iterator[dict[str, Any]]:
    """Every object in the document."""
    match node:
        case dict():
            yield node
            for value in node.values():
                yield from everything(value)
        case list():
            for value in node:
                yield from everything(value)


def resolve(document: Document, node: dict[str, Any]) -> dict[str, Any]:
    """Follow `$ref`, which this document uses for its own components only."""
    while "$ref" in node:
        found: Any = document
        for part in node["$ref"].removeprefix("#/").split("/"):
            found = found[part]
        node = found
    return node


def test_the_document_is_openapi_3_1(document: Document) -> None:
    assert document["openapi"].startswith("3.1.")
    assert document["info"]["title"]
    assert document["info"]["version"]
    found = operations(document)
    assert len(found) >= 32
    ids = [operation["operationId"] for _, _, operation in found]
    assert len(set(ids)) == len(ids)
    for method, path, operation in found:
        assert method in METHODS
        assert operation["responses"]
        declared = {p["name"] for p in operation.get("parameters", ()) if p["in"] == "path"}
        assert declared == set(re.findall(r"\{(\w+)\}", path)), path
        for parameter in operation.get("parameters", ()):
            assert parameter["schema"]
            assert parameter["required"] or parameter["in"] != "path"
        for status, response in operation["responses"].items():
            assert re.fullmatch("[1-5][0-9][0-9]", status)
            assert response["description"]


def test_every_reference_leads_somewhere(document: Document) -> None:
    references = [node for node in everything(document) if "$ref" in node]
    assert len(references) > 50
    for node in references:
        assert resolve(document, node)


def test_every_component_is_used(document: Document) -> None:
    used = {node["$ref"].rsplit("/", 1)[1] for node in everything(document) if "$ref" in node}
    assert set(document["components"]["schemas"]) == used


def test_every_operation_says_what_it_does(document: Document) -> None:
    for method, path, operation in operations(document):
        assert operation["summary"], (method, path)
        assert len(operation["description"]) > 10, (method, path)
        assert operation["tags"], (method, path)


def test_every_operation_documents_its_errors_as_problems(document: Document) -> None:
    missing = [
        f"{method} {path}: {status}"
        for method, path, operation in operations(document)
        for status in _errors(path, operation)
        if set(operation["responses"].get(str(status), {}).get("content", ())) != {PROBLEM}
    ]
    assert missing == []


def _errors(path: str, operation: dict[str, Any]) -> Iterator[int]:
    """The errors that can happen at *path*."""
    if path not in OPEN:
        yield 401
    if path not in OPEN | ANY_SIGNED_IN:
        yield 403
    if path in BY_ID or "{" in path:
        yield 404
    if path in BY_ADDRESS:
        yield from (409, 410)
    if "requestBody" in operation or operation.get("parameters"):
        yield 422


def test_every_error_is_a_problem_document_with_our_fields(document: Document) -> None:
    for method, path, operation in operations(document):
        for status, response in operation["responses"].items():
            # Readiness answers 503 with its checks: a probe reads those.
            if int(status) >= 400 and path != "/readyz":
                (content,) = response["content"].items()
                assert content[0] == PROBLEM, (method, path, status)
                schema = resolve(document, content[1]["schema"])
                fields = {"type", "title", "status", "detail", "code", "request_id"}
                assert set(schema["required"]) >= fields
                assert content[1]["example"].keys() == fields
                assert content[1]["example"]["status"] == int(status)


def test_every_request_body_has_an_example_or_examples_of_its_fields(document: Document) -> None:
    bodies = [
        (f"{method} {path}", content)
        for method, path, operation in operations(document)
        if "requestBody" in operation
        for content in operation["requestBody"]["content"].values()
    ]
    assert len(bodies) >= 9
    without = [where for where, content in bodies if not _has_example(document, content)]
    assert without == []


def _has_example(document: Document, content: dict[str, Any]) -> bool:
    schemas = [content["schema"], *content["schema"].get("anyOf", ())]
    resolved = [content, *(resolve(document, schema) for schema in schemas)]
    fields = [f for schema in resolved for f in schema.get("properties", {}).values()]
    return any("example" in part or "examples" in part for part in [*resolved, *fields])


def _with_example(base: type[BaseModel]) -> Iterator[tuple[type[BaseModel], dict[str, Any]]]:
    for model in base.__subclasses__():
        extra = model.model_config.get("json_schema_extra")
        if isinstance(extra, dict):
            yield model, extra
        yield from _with_example(model)


def test_every_example_is_what_its_model_takes_and_shows_every_field_of_an_answer() -> None:
    bodies, answers = list(_with_example(Body)), list(_with_example(Answer))
    assert len(bodies) >= 8
    assert len(answers) >= 10
    for model, extra in bodies + answers:
        assert model.model_validate_json(json.dumps(extra["example"])), model
    for model, extra in answers:
        assert set(extra["example"]) == set(model.model_fields), model


def test_what_needs_a_token_says_so_and_the_rest_does_not(document: Document) -> None:
    schemes = document["components"]["securitySchemes"]
    ((name, scheme),) = schemes.items()
    assert scheme["flows"]["password"]["tokenUrl"] == "/auth/token"
    for method, path, operation in operations(document):
        secured = operation.get("security") == [{name: []}]
        assert secured is (path not in OPEN), (method, path)


def test_the_export_documents_each_kind_of_file(document: Document) -> None:
    answer = document["paths"]["/security/data/export"]["post"]["responses"]["200"]
    assert set(answer["content"]) == {
        "application/json",
        "text/csv",
        "application/zip",
        "application/octet-stream",
    }


def test_a_person_is_named_in_each_way_wherever_one_may_be_sought(document: Document) -> None:
    for path in BY_ADDRESS:
        body = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]
        fields = resolve(document, body["schema"])["properties"]
        for name in ("email", "phone"):
            assert "any spelling" in fields[name]["description"], (path, name)


def test_no_address_goes_into_a_url(document: Document) -> None:
    names = {
        parameter["name"]
        for _method, _path, operation in operations(document)
        for parameter in operation.get("parameters", ())
    }
    assert "erasure_id" in names
    assert not {name for name in names if re.search("mail|phone|address|name", name)}


def test_an_erasure_documents_its_queue_and_a_certificate_its_file(document: Document) -> None:
    answers = document["paths"]["/security/data/delete"]["post"]["responses"]
    queued = resolve(document, answers["202"]["content"]["application/json"]["schema"])
    assert {"request_id", "status", "queued_at", "holds"} <= set(queued["properties"])
    done = resolve(document, answers["200"]["content"]["application/json"]["schema"])
    assert {"not_reached", "backups_expire_at"} <= set(done["properties"])
    certificate = document["paths"]["/security/data/erasures/{erasure_id}"]["get"]["responses"]
    assert set(certificate["200"]["content"]) == {"application/json"}
    # Until the scan has ended.
    assert set(certificate["409"]["content"]) == {PROBLEM}


def test_what_reaches_the_store_of_backups_documents_that_it_may_be_gone(
    document: Document,
) -> None:
    for method, path, operation in operations(document):
        if path.startswith("/security/backup"):
            assert set(operation["responses"]["503"]["content"]) == {PROBLEM}, (method, path)
        if path.startswith("/security/backup/{"):
            # For want of its key, too.
            assert set(operation["responses"]["409"]["content"]) == {PROBLEM}, (method, path)


def test_bodies_refuse_unknown_fields_and_say_so(document: Document) -> None:
    for method, path, operation in operations(document):
        content = operation.get("requestBody", {}).get("content", {}).get("application/json")
        if content is not None:
            schemas = content["schema"].get("anyOf", [content["schema"]])
            objects = [resolve(document, s) for s in schemas if s.get("type") != "null"]
            closed = [schema["additionalProperties"] for schema in objects]
            assert closed == [False], (method, path)
