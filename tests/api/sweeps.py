"""Every place of every request that takes text, to put something into."""

import copy
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final
from urllib.parse import quote

import pytest
from fastapi.testclient import TestClient
from httpx2 import Response

NOWHERE: Final = "11111111-2222-4333-8444-555555555555"
# They end sign-ins, wait for a hash or take long; they are tested by themselves.
_LEFT_OUT: Final = ("/auth/logout", "/auth/token", "/auth/password", "/security/backup/create")
_NAMES: Final = ("user_id", "email", "phone")
Headers = dict[str, str]


@dataclass(frozen=True)
class Place:
    """One place of a request: in its path, its query, or its body."""

    method: str
    path: str
    where: str
    name: str
    # The rest of the request, as its description exemplifies it.
    body: dict[str, Any] | None = field(default=None, hash=False)

    def __str__(self) -> str:
        return f"{self.method} {self.path} {self.where}.{self.name}"

    def send(self, client: TestClient, text: str, headers: Headers) -> Response:
        path, body, query = self.path, copy.deepcopy(self.body), ""
        if self.where == "path":
            path = path.replace(f"{{{self.name}}}", quote(text, safe=""))
        elif self.where == "query":
            query = f"?{self.name}={quote(text, safe='')}"
        else:
            # A person is named in one way.
            taken = _NAMES if self.name in _NAMES else ()
            body = {name: value for name, value in (body or {}).items() if name not in taken}
            body[self.name] = text
        path = re.sub(r"\{user_id\}", "1", path).replace("{data_type}", "feedback")
        path = re.sub(r"\{\w+\}", NOWHERE, path)
        return client.request(self.method, path + query, json=body, headers=headers)


def places(document: Mapping[str, Any]) -> Iterator[Place]:
    """Every parameter and every field of a body in *document*, whatever its type."""
    for path, methods in document["paths"].items():
        if path.startswith(_LEFT_OUT):
            continue
        for method, operation in methods.items():
            body = _body(document, operation)
            example = body.get("example", {}) if body else None
            for parameter in operation.get("parameters", ()):
                yield Place(method.upper(), path, parameter["in"], parameter["name"], example)
            for name in body.get("properties", ()) if body else ():
                yield Place(method.upper(), path, "body", name, example)


def bodies(document: Mapping[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Method, path and example of every body of JSON in *document*."""
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            if body := _body(document, operation):
                yield method.upper(), path, body["example"]


def _body(document: Mapping[str, Any], operation: Mapping[str, Any]) -> dict[str, Any] | None:
    content = operation.get("requestBody", {}).get("content", {}).get("application/json")
    if content is None:
        return None
    for schema in (content["schema"], *content["schema"].get("anyOf", ())):
        if name := schema.get("$ref"):
            found: dict[str, Any] = document["components"]["schemas"][name.rsplit("/", 1)[1]]
            return found
    return None


@pytest.fixture
def swept(client: TestClient) -> list[Place]:
    found = list(places(client.get("/openapi.json").json()))
    assert len(found) >= 50
    assert {place.where for place in found} == {"path", "query", "body"}
    return found
