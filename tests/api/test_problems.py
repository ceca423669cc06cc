"""Errors: always one shape, never what was sent, and never a success that is none."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

import pytest
from fastapi.testclient import TestClient
from httpx2 import Response
from sqlalchemy import event, func, select
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from backend.db_utils import get_engine, session_scope
from backend.errors import ConfigurationError
from backend.models import BackupRecord, Base, DataConsent, Feedback, LegalHold, RetentionPolicy
from backend.services.encryption_service import EncryptionService
from main import create_app
from tests.conftest import PostgresServer, Service, SignIn

JANE: Final = "jane@example.com"
# Put into what is sent; it must not come back.
CANARY: Final = "Kanarienvogel"
JSON: Final = {"Content-Type": "application/json"}
NOBODY: Final = 999_999
NO_UUID: Final = "11111111-2222-4333-8444-555555555555"
FIELDS: Final = {"type", "title", "status", "detail", "code", "request_id"}
Headers = dict[str, str]


@dataclass
class Refusal:
    """A request that must be refused, and how."""

    method: str
    path: str
    status: int
    body: Any = None
    raw: bytes | None = None
    headers: Headers | None = None
    code: str | None = None


def flaws(client: TestClient, headers: Headers, refusals: list[Refusal]) -> list[str]:
    """Make the requests; say what is wrong with the answers."""
    return [
        f"{r.method} {r.path} {str(r.body or r.raw)[:80]}: {flaw}"
        for r in refusals
        for flaw in _flaws(client, headers, r)
    ]


def _flaws(client: TestClient, headers: Headers, r: Refusal) -> Iterator[str]:
    sent: dict[str, Any] = {"json": r.body} if r.raw is None else {"content": r.raw}
    given = headers | (JSON if r.raw is not None else {}) | (r.headers or {})
    answer = client.request(r.method, r.path, headers=given, **sent)
    if answer.status_code != r.status:
        yield f"{answer.status_code} instead of {r.status}: {answer.text[:200]}"
    if answer.headers.get("content-type") != "application/problem+json":
        yield f"{answer.headers.get('content-type')}: {answer.text[:80]}"
        return
    yield from _flaws_of_shape(answer)
    if r.code is not None and answer.json()["code"] != r.code:
        yield f"code {answer.json()['code']} instead of {r.code}"
    for word in (CANARY, "Traceback", "sqlalchemy", "SELECT ", "pydantic"):
        if word in answer.text:
            yield f"shows {word}"


def _flaws_of_shape(answer: Response) -> Iterator[str]:
    problem = answer.json()
    if not set(problem) >= FIELDS:
        yield f"lacks {FIELDS - set(problem)}"
    if problem["status"] != answer.status_code:
        yield f"says {problem['status']}"
    if problem["request_id"] != answer.headers.get("x-request-id"):
        yield "another request id than in the header"
    if not all(isinstance(problem[name], str) and problem[name] for name in FIELDS - {"status"}):
        yield "an empty field"
    if (answer.status_code == 401) != ("www-authenticate" in answer.headers):
        yield "WWW-Authenticate"


def rows() -> dict[str, int]:
    with session_scope(read_only=True) as session:
        return {
            table.name: session.scalar(select(func.count()).select_from(table)) or 0
            for table in Base.metadata.sorted_tables
        }


@pytest.fixture
def jane(service: Service) -> int:
    return service.user(JANE)


def test_a_missing_or_bad_token_is_refused_with_a_challenge(client: TestClient) -> None:
    bad = [None, {"Authorization": f"Bearer {CANARY}"}, {"Authorization": f"Basic {CANARY}"}]
    refusals = [Refusal("GET", "/auth/me", 401, headers=h, code="unauthenticated") for h in bad]
    refusals.append(Refusal("POST", "/security/data/export", 401, {"user_id": 1}))
    assert flaws(client, {}, refusals) == []


def test_an_unknown_path_method_person_or_number_is_refused(
    client: TestClient, admin: Headers
) -> None:
    erase = {"user_id": NOBODY, "mode": "delete", "reason": "request under art. 17"}
    consent = {"purpose": "marketing", "granted": True, "evidence": "form"}
    restore = {"backup_id": NO_UUID, "dry_run": True}
    missing = [
        Refusal("GET", f"/{CANARY}", 404, code="not_found"),
        Refusal("GET", f"/static/{CANARY}", 404),
        Refusal("GET", "/static/..%2f..%2fmain.py", 404),
        Refusal("PUT", "/auth/me", 405, code="method_not_allowed"),
        Refusal("GET", "/auth/token", 405),
        Refusal("DELETE", "/healthz", 405),
        Refusal("POST", "/security/data/export", 404, {"user_id": NOBODY}),
        Refusal("POST", "/security/data/delete", 404, erase, code="subject_not_found"),
        Refusal("GET", f"/security/data/consent/{NOBODY}", 404, code="subject_not_found"),
        Refusal("POST", f"/security/data/consent/{NOBODY}", 404, consent),
        Refusal("GET", f"/security/holds/{NO_UUID}", 404, code="not_found"),
        Refusal("DELETE", f"/security/holds/{NO_UUID}", 404),
        Refusal("GET", f"/security/backup/{NO_UUID}", 404),
        Refusal("DELETE", f"/security/backup/{NO_UUID}", 404),
        Refusal("POST", f"/security/backup/{NO_UUID}/verify", 404),
        Refusal("POST", "/security/backup/restore", 404, restore),
    ]
    before = rows()
    assert flaws(client, admin, missing) == []
    assert rows() == before


def test_anothers_data_is_refused(client: TestClient, jane: int, sign_in: SignIn) -> None:
    denied = [
        Refusal("POST", "/security/data/export", 403, {"user_id": 1}, code="forbidden"),
        Refusal("GET", "/security/data/consent/1", 403, code="forbidden"),
        Refusal("GET", "/security/encryption/status", 403, code="forbidden"),
    ]
    assert flaws(client, sign_in(JANE), denied) == []


def test_an_export_is_refused_for_what_is_no_person_or_format(
    client: TestClient, jane: int, admin: Headers
) -> None:
    bodies: list[Any] = [
        {},
        {"user_id": CANARY},
        {"user_id": "1"},
        {"user_id": True},
        {"user_id": 1.0},
        {"user_id": 1.5},
        {"user_id": None},
        {"user_id": 0},
        {"user_id": -1},
        {"user_id": 2**31},
        {"user_id": 10**40},
        {"user_id": [jane]},
        {"user_id": jane, "format": "xml"},
        {"user_id": jane, "format": CANARY},
        {"user_id": jane, "format": None},
        {"user_id": jane, "format": 1},
        {"user_id": jane, "encrypt": "true"},
        {"user_id": jane, "encrypt": 1},
        {"user_id": jane, "encrypt": True, "passphrase": "short"},
        {"user_id": jane, "passphrase": CANARY},
        {"user_id": jane, "surname": CANARY},
        {"user_id": jane, CANARY: 1},
        [{"user_id": jane}],
        CANARY,
        None,
    ]
    refusals = [Refusal("POST", "/security/data/export", 422, body) for body in bodies]
    assert flaws(client, admin, refusals) == []
    good = {"user_id": jane, "format": "json"}
    assert client.post("/security/data/export", json=good, headers=admin).status_code == 200


def test_a_policy_is_refused_unless_it_has_one_sound_period(
    client: TestClient, admin: Headers
) -> None:
    policy: dict[str, Any] = {"data_type": "feedback", "action": "delete"}
    bodies: list[Any] = [
        policy,
        *(policy | {"retention_days": days} for days in (-1, 0, 36_501, 10**9, 10**30)),
        *(policy | {"retention_days": days} for days in ("7", 7.0, True, None, CANARY)),
        *(
            policy | {"retention_period": period}
            for period in ("", "P", "P0D", "-P1D", "P1H", "PT1H", "7Y", "p7y", CANARY, 7, "P٣D")
        ),
        policy | {"retention_period": "P9999Y"},
        policy | {"retention_period": "P1Y", "retention_days": 1},
        {"data_type": CANARY, "retention_days": 7, "action": "delete"},
        {"data_type": "", "retention_days": 7, "action": "delete"},
        {"data_type": "feedback", "retention_days": 7},
        {"data_type": "feedback", "retention_days": 7, "action": CANARY},
        {"data_type": "feedback", "retention_days": 7, "action": "DELETE"},
        policy | {"retention_days": 7, "enabled": "false"},
        policy | {"retention_days": 7, "legal_basis": CANARY},
    ]
    refusals = [Refusal("POST", "/security/retention/policy", 422, body) for body in bodies]
    before = rows()
    assert flaws(client, admin, refusals) == []
    assert rows() == before
    good = client.post(
        "/security/retention/policy", json=policy | {"retention_days": 36_500}, headers=admin
    )
    assert good.status_code == 201


def test_consent_is_refused_unless_it_is_a_plain_yes_or_no(
    client: TestClient, jane: int, sign_in: SignIn
) -> None:
    not_plain: list[Any] = ["true", "yes", 1, 0, 1.0, None, [], {}, CANARY]
    bodies: list[Any] = [
        {"purpose": "marketing"},
        *({"purpose": "marketing", "granted": granted} for granted in not_plain),
        {"purpose": CANARY, "granted": True},
        {"purpose": "", "granted": True},
        {"granted": True},
        {"purpose": "marketing", "granted": True, "user_id": 1},
        {"purpose": "marketing", "granted": True, "notice_version": "v" * 65},
    ]
    path = f"/security/data/consent/{jane}"
    assert flaws(client, sign_in(JANE), [Refusal("POST", path, 422, b) for b in bodies]) == []
    assert rows()["data_consents"] == 0
    good = client.post(path, json={"purpose": "marketing", "granted": True}, headers=sign_in(JANE))
    assert good.status_code == 201


def test_bodies_of_admins_acts_are_as_strict(client: TestClient, jane: int, admin: Headers) -> None:
    erase = {"user_id": jane, "mode": "delete", "reason": "request under art. 17"}
    hold = {"scope": "person", "user_id": jane, "reason": "claim"}
    bodies: list[tuple[str, Any]] = [
        ("/security/data/delete", erase | {"mode": CANARY}),
        ("/security/data/delete", erase | {"user_id": str(jane)}),
        ("/security/data/delete", erase | {"reason": ""}),
        ("/security/data/delete", erase | {"dry_run": "no"}),
        ("/security/data/delete", erase | {"plan_digest": CANARY}),
        ("/security/data/delete", erase | {"note": CANARY}),
        ("/security/retention/apply", {}),
        ("/security/retention/apply", {"dry_run": 0}),
        ("/security/retention/apply", {"dry_run": True, "data_type": CANARY}),
        ("/security/holds", hold | {"scope": CANARY}),
        ("/security/holds", hold | {"reason": "x" * 501}),
        ("/security/holds", hold | {"review_on": CANARY}),
        # A time without a zone is no point in time.
        ("/security/holds", hold | {"review_on": "2027-01-01T00:00:00"}),
        ("/security/backup/create", {"label": "x" * 101}),
        ("/security/backup/create", {"path": CANARY}),
        ("/security/backup/restore", {"backup_id": NO_UUID, "confirm": "true"}),
        ("/security/data/import", {}),
        ("/security/data/import", {"export": []}),
        ("/security/data/import", {"export": {}}),
        ("/security/data/import", {"export": {CANARY: 1}}),
    ]
    before = rows()
    assert flaws(client, admin, [Refusal("POST", path, 422, body) for path, body in bodies]) == []
    assert rows() == before


def test_an_import_that_is_no_whole_export_is_refused(
    client: TestClient, jane: int, admin: Headers
) -> None:
    body = {"user_id": jane, "format": "json"}
    whole: dict[str, Any] = client.post("/security/data/export", json=body, headers=admin).json()
    user = whole["data"]["users"][0]

    def with_user(**columns: Any) -> dict[str, Any]:
        return whole | {"data": whole["data"] | {"users": [user | columns]}}

    documents = [
        whole | {"format": CANARY},
        whole | {"version": 99},
        whole | {"subject": {}},
        whole | {"subject": {"user_id": CANARY}},
        whole | {"data": []},
        whole | {"data": whole["data"] | {CANARY: []}},
        whole | {"data": whole["data"] | {"users": CANARY}},
        whole | {"data": whole["data"] | {"users": [CANARY]}},
        whole | {"data": whole["data"] | {"users": []}},
        with_user(**{CANARY: 1}),
        with_user(created_at=CANARY),
        with_user(created_at=None),
        with_user(is_active=1),
        with_user(full_name=7),
        with_user(uid=CANARY),
        with_user(id=10**30),
    ]
    path = "/security/data/import"
    before = rows()
    refusals = [Refusal("POST", path, 422, {"export": document}) for document in documents]
    assert flaws(client, admin, refusals) == []
    assert rows() == before
    good = client.post(path, json={"export": whole, "dry_run": True}, headers=admin)
    assert good.status_code == 200


def test_an_import_of_values_that_no_column_takes_is_refused(
    client: TestClient, jane: int, admin: Headers, service: Service
) -> None:
    said = Feedback(user_id=jane, rating=4, submitted_at=datetime.now(UTC))
    service.add(said)
    body = {"user_id": jane, "format": "json"}
    whole: dict[str, Any] = client.post("/security/data/export", json=body, headers=admin).json()
    erase = {"user_id": jane, "mode": "delete", "reason": "request under art. 17"}
    assert client.post("/security/data/delete", json=erase, headers=admin).status_code == 200

    def changed(table: str, **columns: Any) -> dict[str, Any]:
        (row,) = whole["data"][table]
        return {"export": whole | {"data": whole["data"] | {table: [row | columns]}}}

    path = "/security/data/import"
    before = rows()
    refusals = [
        Refusal("POST", path, 422, changed("users", country="X" * 500)),
        Refusal("POST", path, 422, changed("users", country="\x00")),
        Refusal("POST", path, 422, changed("users", full_name="\x00")),
        Refusal("POST", path, 422, raw=json.dumps(changed("users", country="\ud800")).encode()),
        Refusal("POST", path, 422, raw=json.dumps(changed("users", city="\ud800")).encode()),
        Refusal("POST", path, 422, changed("feedback", rating=10**30)),
        Refusal("POST", path, 422, changed("feedback", id=10**30)),
        Refusal("POST", path, 409, changed("feedback", rating=9)),
    ]
    assert flaws(client, admin, refusals) == []
    assert rows() == before
    assert client.post(path, json={"export": whole}, headers=admin).status_code == 200


@pytest.mark.parametrize(
    "number", ["../../etc/passwd", "..%2F..%2Fetc%2Fpasswd", "x", "1", f"{NO_UUID}%00"]
)
def test_a_backup_id_that_is_none_reaches_no_file(
    client: TestClient, admin: Headers, number: str
) -> None:
    bodies = [Refusal("POST", "/security/backup/restore", 422, {"backup_id": number})]
    assert flaws(client, admin, bodies) == []
    for method, tail in (("GET", ""), ("DELETE", ""), ("POST", "/verify")):
        answer = client.request(method, f"/security/backup/{number}{tail}", headers=admin)
        # Slashes make it another path; the rest is no id.
        assert answer.status_code == (404 if "/" in number or "%2F" in number else 422)
        assert "root:" not in answer.text
    with session_scope(read_only=True) as session:
        assert session.scalars(select(BackupRecord)).all() == []


def test_paths_and_queries_with_bad_numbers_are_refused(client: TestClient, admin: Headers) -> None:
    numbers = ["0", "-1", "1.5", "1e3", "2147483648", "9" * 5000, CANARY, "%D9%A1", "1%00", "%20"]
    refusals = [Refusal("GET", f"/security/data/consent/{n}", 422) for n in numbers]
    queries = ["limit=0", "limit=501", f"limit={CANARY}", "offset=-1", "offset=1" + "0" * 40]
    refusals += [Refusal("GET", f"/security/retention/logs?{query}", 422) for query in queries]
    refusals += [Refusal(m, f"/security/holds/{CANARY}", 422) for m in ("GET", "DELETE")]
    assert flaws(client, admin, refusals) == []


def test_what_is_no_json_is_refused(client: TestClient, jane: int, admin: Headers) -> None:
    path = "/security/data/export"
    raw = [
        b"",
        b"{",
        b"null",
        b'{"user_id": %d, "format": "%s' % (jane, CANARY.encode()),
        b'{"user_id": NaN}',
        b'{"user_id": Infinity}',
        b'{"user_id": 1e400}',
        b'{"user_id": %d, "format": "\\ud800"}' % jane,
        b'{"user_id": %d, "\\ud800": 1}' % jane,
        b"user_id=%d" % jane,
    ]
    refusals = [Refusal("POST", path, 422, raw=body) for body in raw]
    # These fail before there is a body: a number of too many digits, bytes that are no text.
    unread = [b'{"user_id": %s}' % (b"9" * 5000), b"\xff\xfe\x00", b'{"format": "\xff"}']
    refusals += [Refusal("POST", path, 422, raw=body) for body in unread]
    good = json.dumps({"user_id": jane}).encode()
    refusals += [
        Refusal("POST", path, 415, raw=good, headers={"Content-Type": kind})
        for kind in ("text/plain", "application/xml", "multipart/form-data; boundary=x")
    ]
    assert flaws(client, admin, refusals) == []
    assert client.post(path, content=good, headers=admin | JSON).status_code == 200


def test_lone_surrogates_and_nul_are_refused_wherever_text_is_stored(
    client: TestClient, jane: int, admin: Headers
) -> None:
    paths: list[tuple[str, dict[str, Any], str]] = [
        (f"/security/data/consent/{jane}", {"purpose": "marketing", "granted": True,
                                            "evidence": "form"}, "notice_version"),
        (f"/security/data/consent/{jane}", {"purpose": "marketing", "granted": True}, "evidence"),
        ("/security/backup/create", {}, "label"),
        ("/security/holds", {"scope": "person", "user_id": jane}, "reason"),
        ("/security/data/delete", {"user_id": jane, "mode": "delete"}, "reason"),
        ("/security/retention/policy", {"retention_days": 7, "action": "delete"}, "data_type"),
    ]  # fmt: skip
    refusals = [
        Refusal("POST", path, 422, raw=json.dumps(body | {field: f"a{bad}b"}).encode())
        for path, body, field in paths
        for bad in ("\ud800", "\x00")
    ]
    before = rows()
    assert flaws(client, admin, refusals) == []
    assert rows() == before


def test_deep_nesting_is_refused(client: TestClient, admin: Headers) -> None:
    deep = b"[" * 5_000_000 + b"]" * 5_000_000
    refusals = [
        Refusal("POST", "/security/data/import", 422, raw=b'{"export": {"data": %s}}' % deep),
        Refusal("POST", "/security/data/export", 413, raw=b'{"user_id": %s}' % deep),
    ]
    assert flaws(client, admin, refusals) == []


def test_a_huge_body_is_refused_whether_it_says_so_or_not(
    client: TestClient, admin: Headers
) -> None:
    kib = b" " * 1024
    for path, limit in (("/security/data/export", 64), ("/security/data/import", 16 * 1024)):
        huge = Refusal("POST", path, 413, raw=kib * limit + b" ", code="content_too_large")
        assert flaws(client, admin, [huge]) == []
        sent = (kib for _ in range(limit + 1))
        answer = client.post(path, content=sent, headers=admin | JSON)
        assert answer.status_code == 413
        assert answer.headers["content-type"] == "application/problem+json"
        assert answer.json()["code"] == "content_too_large"
        # At the limit it is read.
        assert flaws(client, admin, [Refusal("POST", path, 422, raw=kib * limit)]) == []


def test_sign_in_forms_that_are_none_are_refused(client: TestClient) -> None:
    form = {"Content-Type": "application/x-www-form-urlencoded"}
    multipart = {"Content-Type": "multipart/form-data; boundary=x"}
    path = "/auth/token"
    refusals = [
        Refusal("POST", path, 415, {"username": CANARY, "password": CANARY}),
        Refusal("POST", path, 422, raw=b"", headers=form),
        Refusal("POST", path, 422, raw=f"username={CANARY}".encode(), headers=form),
        Refusal("POST", path, 415, raw=CANARY.encode(), headers=multipart),
        Refusal("POST", path, 422, raw=b"username=%ed%a0%80&password=%ff%00", headers=form),
        Refusal("POST", path, 422, raw=b"username=\xff\x00&password=\xff", headers=form),
        Refusal(
            "POST", path, 401, headers=form, code="wrong_credentials",
            raw=f"username={CANARY}&password={CANARY}".encode(),
        ),
    ]  # fmt: skip
    assert flaws(client, {}, refusals) == []


def test_an_unforeseen_failure_shows_nothing_of_itself(
    client: TestClient, admin: Headers, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_service: EncryptionService) -> str:
        raise RuntimeError(CANARY)

    path = "/security/encryption/key/generate"
    assert client.get(path, headers=admin).status_code == 200
    monkeypatch.setattr(EncryptionService, "generate_key", fail)
    assert flaws(client, admin, [Refusal("GET", path, 500, code="internal_error")]) == []


# The commit and the database


@contextmanager
def failing_commits() -> Iterator[None]:
    """Every commit fails, as on a full disk or a broken connection."""

    def fail(_session: Session) -> None:
        raise OperationalError("COMMIT", None, Exception(CANARY))

    event.listen(Session, "before_commit", fail)
    try:
        yield
    finally:
        event.remove(Session, "before_commit", fail)


def test_a_commit_that_fails_is_never_answered_with_success(
    client: TestClient, jane: int, admin: Headers, sign_in: SignIn
) -> None:
    hers = sign_in(JANE)
    hold = {"scope": "data_type", "data_type": "invoice", "reason": "audit"}
    placed = client.post("/security/holds", json=hold, headers=admin).json()["id"]
    erase = {"user_id": jane, "mode": "delete", "reason": "request under art. 17"}
    policy = {"data_type": "feedback", "retention_days": 7, "action": "delete"}
    consent = {"purpose": "marketing", "granted": True}
    requests = [
        ("POST", f"/security/data/consent/{jane}", consent, hers),
        ("POST", "/security/data/export", {"user_id": jane}, hers),
        ("POST", "/auth/logout", None, hers),
        ("POST", "/security/retention/policy", policy, admin),
        ("POST", "/security/retention/apply", {"dry_run": False}, admin),
        ("POST", "/security/holds", hold, admin),
        ("DELETE", f"/security/holds/{placed}", None, admin),
        ("POST", "/security/backup/create", None, admin),
        ("POST", "/security/data/delete", erase, admin),
    ]
    before = rows()
    for method, path, body, headers in requests:
        with failing_commits():
            refusal = Refusal(method, path, 503, body, code="unavailable")
            assert flaws(client, headers, [refusal]) == []
    assert rows() == before
    with session_scope(read_only=True) as session:
        assert session.scalars(select(DataConsent)).all() == []
        assert session.scalars(select(RetentionPolicy)).all() == []
        assert session.scalars(select(LegalHold)).one().released_at is None
    # The same requests succeed where the commit does; the token was not revoked either.
    for method, path, body, headers in requests:
        answer = client.request(method, path, json=body, headers=headers)
        assert answer.status_code < 300 or path == "/security/data/delete", answer.text


@contextmanager
def database_gone(service: Service, request: pytest.FixtureRequest) -> Iterator[None]:
    """Take the database away, and bring it back."""
    get_engine().dispose()
    if service.engine == "sqlite":
        live, aside = service.folder / "holdfast.db", service.folder / "aside"
        live.rename(aside)
        live.mkdir()
        yield
        live.rmdir()
        aside.rename(live)
        return
    server: PostgresServer = request.getfixturevalue("postgres_server")
    name = service.url.rsplit("/", 1)[1]
    server.run(f"ALTER DATABASE {name} RENAME TO {name}_aside")
    yield
    server.run(f"ALTER DATABASE {name}_aside RENAME TO {name}")


def test_without_its_database_the_service_says_so_and_recovers(
    client: TestClient, admin: Headers, service: Service, request: pytest.FixtureRequest
) -> None:
    form = {"Content-Type": "application/x-www-form-urlencoded"}
    sign_in = Refusal("POST", "/auth/token", 503, raw=b"username=a@b.c&password=x", headers=form)
    with database_gone(service, request):
        assert flaws(client, admin, [Refusal("GET", "/auth/me", 503, code="unavailable")]) == []
        assert flaws(client, {}, [sign_in]) == []
        assert int(client.get("/auth/me", headers=admin).headers["retry-after"]) > 0
        ready = client.get("/readyz")
        assert (ready.status_code, ready.json()["status"]) == (503, "not_ready")
        assert ready.json()["checks"]["database"] != "ok"
        # A probe that asks whether the process lives must not have it killed.
        assert client.get("/healthz").status_code == 200
    assert client.get("/auth/me", headers=admin).status_code == 200
    assert client.get("/readyz").status_code == 200


def test_a_database_that_is_behind_is_not_ready(client: TestClient, service: Service) -> None:
    with session_scope() as session:
        session.connection().exec_driver_sql("UPDATE alembic_version SET version_num = '0000'")
    ready = client.get("/readyz")
    assert (ready.status_code, ready.json()["status"]) == (503, "not_ready")
    assert ready.json()["checks"]["migrations"] != "ok"


def test_the_application_does_not_start_on_a_database_that_is_behind(service: Service) -> None:
    with session_scope() as session:
        session.connection().exec_driver_sql("UPDATE alembic_version SET version_num = '0000'")
    with pytest.raises(ConfigurationError, match="0000"), TestClient(create_app()):
        pass


def test_a_method_that_a_path_has_not_is_told_those_that_it_has(client: TestClient) -> None:
    for path, methods in (
        ("/security/data/consent/3", "GET, POST"),
        ("/security/holds", "GET, POST"),
        ("/auth/token", "POST"),
    ):
        answer = client.patch(path)
        assert (answer.status_code, answer.headers["allow"]) == (405, methods)
