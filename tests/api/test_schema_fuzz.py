"""Whatever is sent, the answer is one that the OpenAPI document describes, and never a failure."""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Final
from uuid import uuid4

import pytest
import requests
import schemathesis
from fastapi import APIRouter, FastAPI
from fastapi import Response as FastAPIResponse
from fastapi.responses import PlainTextResponse
from fastapi.testclient import TestClient
from httpx2 import Response
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import Case, GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.config import GenerationConfig
from schemathesis.core.failures import FailureGroup
from schemathesis.core.result import Ok
from schemathesis.schemas import APIOperation, BaseSchema
from schemathesis.specs.openapi import checks

from backend.api.bodies import StrictRoute
from backend.api.problems import add_problem_handlers
from backend.errors import UnavailableError
from backend.models import InactivityNotice
from backend.services.setup_service import get_setup_service
from main import create_app
from tests.conftest import ADMIN, PASSWORD, Service, SignIn, clear_caches

EXAMPLES: Final = 10
# Told apart so that they can run beside each other.
PARTS: Final = 4
_OF_ANSWERS: Final = [
    not_a_server_error, checks.status_code_conformance, checks.content_type_conformance,
    checks.response_schema_conformance, checks.response_headers_conformance,
]  # fmt: skip
# A second admin, or a code of this very half minute, is needed for these.
_NEVER_DONE: Final = {
    "POST /auth/codes/remove",
    "POST /security/approvals/{approval_id}", "DELETE /security/approvals/{approval_id}",
    "POST /auth/codes/confirm",
}  # fmt: skip
_OF_DRAWN: Final = [*_OF_ANSWERS, checks.negative_data_rejection, checks.unsupported_method]
Headers = dict[str, str]
Drawn = Case[Any]
Call = Callable[[Drawn], None]


def schema_of(app: FastAPI) -> BaseSchema:
    schema = schemathesis.openapi.from_dict(app.openapi())
    schema.app = app
    # A body may be refused for its length before anybody looks at what is in it.
    rejected = schema.config.checks.negative_data_rejection.expected_statuses
    schema.config.checks.negative_data_rejection.expected_statuses = [*rejected, "413"]
    return schema


def operations(schema: BaseSchema) -> list[APIOperation[Any, Any, Any, Any]]:
    return [found.ok() for found in schema.get_all_operations() if isinstance(found, Ok)]


def send(client: TestClient, case: Drawn, headers: Headers) -> Response:
    """Send *case* as it was drawn, with *headers* beside its own."""
    drawn = case.as_transport_kwargs(base_url="http://testserver")
    asked: Any = requests.Request(
        drawn["method"], drawn["url"], headers={**(drawn["headers"] or {}), **headers},
        params=drawn.get("params"), data=drawn.get("data"), json=drawn.get("json"),
        cookies=drawn.get("cookies"), files=drawn.get("files"),
    ).prepare()  # fmt: skip
    return client.request(asked.method, asked.url, headers=asked.headers, content=asked.body)


def flaw(case: Drawn, answer: Response, *, settled: bool = False) -> str | None:
    """Say what about *answer* the document does not describe."""
    try:
        case.validate_response(answer, checks=_OF_ANSWERS if settled else _OF_DRAWN)
    except FailureGroup as found:
        # A path of words may be taken for a path with an id, by another method.
        mistaken = case.path.startswith("/security/backup/") and answer.status_code == 422
        if not (mistaken and "undeclared method" in str(found)):
            return f"{case.operation.label}: {found}"[:1500]
    return None


def draw(operation: APIOperation[Any, Any, Any, Any], call: Call) -> None:
    """Make the requests: at every boundary of the description, then drawn within and beyond it."""
    for case in operation.schema.iter_coverage_cases(
        operation=operation, generation_modes=list(GenerationMode),
        generation_config=GenerationConfig(),
    ):  # fmt: skip
        call(case)
    has_input = bool(operation.body or operation.query or operation.path_parameters)
    for mode in list(GenerationMode) if has_input else ():
        # Nothing is shrunk: by then the database is another one.
        run = given(operation.as_strategy(generation_mode=mode))(call)
        settings(
            max_examples=EXAMPLES, derandomize=True, database=None, deadline=None,
            phases=[Phase.generate], suppress_health_check=list(HealthCheck),
        )(run)()  # fmt: skip


class World:
    """People and records to ask about, so that requests get past the question whether they are."""

    def __init__(self, client: TestClient, service: Service, admin: Headers) -> None:
        self._service, self._persons = service, 0
        hold = {"scope": "data_type", "data_type": "invoice", "reason": "audit"}
        erase = {"user_id": self.person(), "mode": "delete", "reason": "request under art. 17"}

        def made(path: str, body: Any, name: str) -> str:
            answer = client.post(path, json=body, headers=admin)
            assert answer.is_success, answer.text
            return str(answer.json()[name])

        self.backup = made("/security/backup/create", {}, "id")
        self.erasure = made("/security/data/delete", erase, "erasure_id")
        self.hold = made("/security/holds", hold, "id")
        whose = {"user_id": self.person()}
        self.export = client.post("/security/data/export", json=whose, headers=admin).json()
        self._now = datetime.now(UTC)

    def notice(self) -> str:
        told = {"queued_at": self._now, "ends_at": self._now + timedelta(days=30)}
        notice = InactivityNotice(id=uuid4(), user_id=self.person(), **told)
        found = str(notice.id)
        self._service.add(notice)
        return found

    def person(self) -> int:
        self._persons += 1
        return self._service.user(f"p{self._persons}@example.com", created_at=datetime.now(UTC))

    def settle(self, case: Drawn) -> None:
        """Put in what exists for what was drawn."""
        known: dict[str, Callable[[], object]] = {
            "user_id": self.person,
            "backup_id": lambda: self.backup,
            "erasure_id": lambda: self.erasure,
            "hold_id": lambda: self.hold,
            "notice_id": self.notice,
            "export": lambda: self.export,
            "data_type": lambda: "feedback",
            "present_password": lambda: PASSWORD,
            "username": lambda: ADMIN,
            "password": lambda: PASSWORD,
            "grant_type": lambda: "password",
            "purpose": lambda: "marketing",
        }
        body = case.body if isinstance(case.body, dict) else {}
        named = [name for name in ("user_id", "email", "phone") if body.pop(name, None)]
        if named and "export" not in body:
            # One way to name a person is enough; an export names its own.
            body["user_id"] = 0
        for values in (case.path_parameters or {}, body):
            values |= {name: known[name]() for name in values.keys() & known.keys()}


@dataclass
class Watch:
    """Makes the requests of operations, and keeps what it saw."""

    client: TestClient
    token: Callable[[], Headers]
    world: World
    flaws: set[str] = field(default_factory=set)
    statuses: dict[str, set[int]] = field(default_factory=lambda: defaultdict(set))

    def ask(self, case: Drawn) -> None:
        """Send *case* as it was drawn, without a token and with one, then about what exists."""
        if "security" in case.operation.definition.raw:
            self._note(case, send(self.client, case, {}))
        self._note(case, send(self.client, case, self.token()))
        self.world.settle(case)
        self._note(case, send(self.client, case, self.token()), settled=True)

    def _note(self, case: Drawn, answer: Response, *, settled: bool = False) -> None:
        self.statuses[case.operation.label].add(int(answer.status_code))
        if found := flaw(case, answer, settled=settled):
            self.flaws.add(found)


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch, sqlite_service: Service) -> Service:
    """What is described does not depend on the engine."""
    monkeypatch.setenv("LOG_LEVEL", "ERROR")
    clear_caches()
    get_setup_service().open()
    return sqlite_service


@pytest.fixture
def world(client: TestClient, service: Service, admin: Headers) -> World:
    return World(client, service, admin)


@pytest.mark.parametrize("part", range(PARTS))
def test_every_answer_is_described(
    client: TestClient, sign_in: SignIn, world: World, part: int
) -> None:
    watch = Watch(client, lambda: sign_in(ADMIN), world)
    drawn = operations(schema_of(create_app()))[part::PARTS]
    for operation in drawn:
        draw(operation, watch.ask)
        # What was drawn has not taken away what the rest needs.
        assert client.get("/auth/me", headers=sign_in(ADMIN)).status_code == 200
    assert watch.flaws == set()
    # Each was asked for more than refusals: its success is described, too.
    refused = {label for label, found in watch.statuses.items() if not {200, 201, 204} & found}
    assert refused <= _NEVER_DONE
    assert len(watch.statuses) == len(drawn) > 10


def test_an_answer_that_is_not_described_is_found() -> None:
    router = APIRouter(route_class=StrictRoute)

    @router.get("/described")
    def described(cups: int) -> int:
        return cups

    @router.get("/undescribed", response_model=int)
    def undescribed(cups: int) -> FastAPIResponse:
        if cups == 0:
            raise UnavailableError("no tea")
        return PlainTextResponse("tea") if cups % 2 else FastAPIResponse(status_code=418)

    app = FastAPI()
    app.include_router(router)
    add_problem_handlers(app)
    found: dict[str, list[str]] = defaultdict(list)
    with TestClient(app, raise_server_exceptions=False) as client:

        def ask(case: Drawn) -> None:
            if words := flaw(case, send(client, case, {})):
                found[case.path].append(words)

        for operation in operations(schema_of(app)):
            draw(operation, ask)
    assert list(found) == ["/undescribed"]
    told = " ".join(found["/undescribed"])
    for words in ("Server error", "Undocumented status code", "Undocumented Content-Type"):
        assert words in told
