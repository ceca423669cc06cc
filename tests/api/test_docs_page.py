"""In a real browser: the API page works from this service alone, and an export's page is safe."""

import io
import json
import re
import shutil
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import pytest
from fastapi.testclient import TestClient

from backend.db_utils import session_scope
from backend.models import Feedback, User
from main import create_app
from tests.conftest import ADMIN, PASSWORD
from tests.privacy.people import plant
from tests.test_main import Server, serving

pytest.importorskip("playwright", reason="playwright is not installed: see requirements-parts.txt")
from playwright.sync_api import (
    Browser,
    ConsoleMessage,
    Locator,
    Page,
    expect,
    sync_playwright,
)

# How long a page may take on a loaded machine; it decides nothing about a good one.
_PATIENCE_MS: Final = 60_000
_ARGUMENTS: Final = (
    "--headless=new",
    "--no-sandbox",
    "--disable-quic",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
)


@dataclass
class Seen:
    """What a page asked for, and what the browser complained of."""

    requests: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)

    def watch(self, page: Page) -> None:
        page.on("request", lambda request: self.requests.append(request.url))
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("console", self._hear)

    def _hear(self, message: ConsoleMessage) -> None:
        # Chromium reports each breach of a page's policy here as an error.
        if message.type in {"error", "warning"}:
            self.complaints.append(message.text)

    def elsewhere(self, home: str) -> list[str]:
        return [url for url in self.requests if not url.startswith(home)]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    path = shutil.which("chromium")
    if path is None:
        pytest.skip("chromium is not installed on this machine")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=list(_ARGUMENTS))
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    expect.set_options(timeout=_PATIENCE_MS)
    with browser.new_context() as context:
        context.set_default_timeout(_PATIENCE_MS)
        yield context.new_page()


@pytest.fixture
def seen(page: Page) -> Seen:
    seen = Seen()
    seen.watch(page)
    return seen


@pytest.fixture(scope="module")
def server(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    base = tmp_path_factory.mktemp("docs")
    with serving(base / "data", log=base / "log") as server:
        yield server


def open_docs(page: Page, server: Server) -> None:
    page.goto(f"{server.url}/docs")
    expect(page.locator(".opblock").first).to_be_visible()


def operation(page: Page, path: str) -> Locator:
    return page.locator(".opblock", has=page.locator(f'[data-path="{path}"]'))


def authorize(page: Page, password: str) -> Locator:
    """Fill in the form behind Authorize and send it; return the dialog."""
    page.locator(".auth-wrapper .btn.authorize").click()
    dialog = page.locator(".modal-ux")
    dialog.locator("#oauth_username").fill(ADMIN)
    dialog.locator("#oauth_password").fill(password)
    dialog.get_by_role("button", name="Apply given OAuth2 credentials").click()
    return dialog


def execute_me(page: Page) -> tuple[str, Any]:
    """Try out `GET /auth/me`; return the status and the body that the page shows."""
    me = operation(page, "/auth/me")
    me.locator(".opblock-summary-control").click()
    me.get_by_role("button", name="Try it out").click()
    me.get_by_role("button", name="Execute").click()
    live = me.locator(".live-responses-table .response")
    body = live.locator(".highlight-code code").first
    return live.locator(".response-col_status").inner_text().strip(), json.loads(body.inner_text())


_OPERATIONS: Final = """() => [...document.querySelectorAll(".opblock")].map(block => [
  block.querySelector(".opblock-summary-method").innerText,
  block.querySelector("[data-path]").dataset.path])"""


def test_the_page_shows_every_operation_and_needs_nobody_else(
    page: Page, seen: Seen, server: Server
) -> None:
    open_docs(page, server)
    document = page.request.get(f"{server.url}/openapi.json").json()
    expected = sorted(
        [method.upper(), path]
        for path, operations in document["paths"].items()
        for method in operations
    )
    assert sorted(page.evaluate(_OPERATIONS)) == expected
    erasure = operation(page, "/security/data/delete")
    erasure.locator(".opblock-summary-control").click()
    expect(erasure.locator(".opblock-section-request-body")).to_contain_text('"dry_run"')
    assert seen.elsewhere(server.url) == []
    assert f"{server.url}/static/swagger/swagger-ui-bundle.js" in seen.requests
    assert seen.complaints == []


# Resolves when the policy has stopped both; until then it waits.
_SLIP_IN: Final = """() => new Promise(resolve => {
  const stopped = [];
  document.addEventListener("securitypolicyviolation", event => {
    stopped.push(event.effectiveDirective);
    if (stopped.length === 2) resolve(stopped);
  });
  const script = document.createElement("script");
  script.textContent = "window.ran = true";
  const image = document.createElement("img");
  image.src = "http://127.0.0.1:1/elsewhere.png";
  document.body.append(script, image);
})"""


def test_the_pages_policy_stops_a_script_that_somebody_slipped_in(
    page: Page, server: Server
) -> None:
    open_docs(page, server)
    assert sorted(page.evaluate(_SLIP_IN)) == ["img-src", "script-src-elem"]
    assert page.evaluate("() => window.ran") is None


def test_signed_in_on_the_page_an_admin_is_told_who_they_are(
    page: Page, seen: Seen, server: Server
) -> None:
    open_docs(page, server)
    dialog = authorize(page, server.password)
    expect(dialog.get_by_text("Authorized", exact=True)).to_be_visible()
    dialog.locator(".btn-done").click()
    assert execute_me(page) == ("200", {"user_id": 1, "role": "admin"})
    assert seen.elsewhere(server.url) == []
    assert seen.complaints == []
    # The token is kept by the open page alone.
    assert page.evaluate("() => localStorage.length + sessionStorage.length") == 0


def test_a_wrong_password_is_said_and_signs_nobody_in(page: Page, server: Server) -> None:
    open_docs(page, server)
    dialog = authorize(page, f"{server.password}x")
    expect(dialog.locator(".errors")).to_contain_text("Unauthorized")
    expect(dialog.get_by_text("Authorized", exact=True)).to_have_count(0)
    dialog.locator(".btn-done").click()
    status, body = execute_me(page)
    assert (status, body["code"]) == ("401", "unauthenticated")


_SCRIPT: Final = "<script>window.ran = true</script>"
_IMAGE: Final = """"><img src="http://127.0.0.1:1/x.png" onerror='window.ran = true'>"""


@pytest.fixture
def exported(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """The unpacked export of a person with rows in every table, two of which bring HTML."""
    monkeypatch.setenv("CONTROLLER_NAME", f"Hotel {_SCRIPT}")
    request.getfixturevalue("sqlite_service")
    person = plant("a")
    with session_scope() as session:
        session.get_one(User, person.id).full_name = _SCRIPT
        session.get_one(Feedback, person.keys["feedback"][0]).comment = _IMAGE
    with TestClient(create_app()) as client:
        form = {"username": ADMIN, "password": PASSWORD}
        token = client.post("/auth/token", data=form).json()["access_token"]
        answer = client.post(
            "/security/data/export",
            json={"user_id": person.id, "format": "zip"},
            headers={"Authorization": f"Bearer {token}"},
        )
    with zipfile.ZipFile(io.BytesIO(answer.content)) as archive:
        archive.extractall(tmp_path / "export")
    return tmp_path / "export"


# Each table of the page as an object: the heading of a line, and its text.
_TABLES: Final = """() => [...document.querySelectorAll("table")].map(table =>
  Object.fromEntries([...table.rows].map(row => [...row.cells].map(cell => cell.innerText))))"""


def _told(value: Any) -> str:
    match value:
        case bool():
            return "yes" if value else "no"
        case str() if re.fullmatch(r"\d{4}-\d\d-\d\dT[\d:.]+Z", value):
            return f"{value[:10]} {value[11:16]} UTC"
        case _:
            return str(value)


def _named(field: str) -> str:
    words = field.removesuffix("_minor").replace("_", " ")
    return words + (" (in the smallest unit, as cents)" if field.endswith("_minor") else "")


def test_the_page_of_an_export_shows_every_value_that_is_held(page: Page, exported: Path) -> None:
    data = json.loads((exported / "export.json").read_text())["data"]
    page.goto((exported / "index.html").as_uri())
    shown = page.evaluate(_TABLES)
    headings = page.locator("h2").all_inner_texts()
    assert sum(map(len, data.values())) > len(data)
    for name, rows in data.items():
        heading = f"{name.replace('_', ' ').capitalize()} ({len(rows)})"
        assert (heading in headings) == bool(rows)
        for row in rows:
            cells = {_named(name): _told(cell) for name, cell in row.items() if cell is not None}
            # Cells that were left out are shown as that, beside these.
            assert any(cells.items() <= table.items() for table in shown)


def test_html_in_a_value_is_shown_as_text_and_does_not_run(
    page: Page, seen: Seen, exported: Path
) -> None:
    address = (exported / "index.html").as_uri()
    page.goto(address)
    text = page.locator("body").inner_text()
    assert text.count(_SCRIPT) == 2
    assert text.count(_IMAGE) == 1
    assert page.locator("script, img").count() == 0
    assert page.evaluate("() => window.ran") is None
    assert (seen.requests, seen.complaints) == ([address], [])
    # Here scripts do run: were the value not escaped, the lines above would notice.
    page.goto("about:blank")
    page.set_content(f"<p>{_SCRIPT}")
    assert page.evaluate("() => window.ran") is True
