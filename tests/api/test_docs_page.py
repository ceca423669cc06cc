"""In a real browser: the API page works from this service alone, and an export's page is safe."""

import io
import json
import shutil
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import pytest
from fastapi.testclient import TestClient

from main import create_app
from tests.conftest import ADMIN, PASSWORD, Service
from tests.privacy.people import plant
from tests.test_main import Server, serving

pytest.importorskip("playwright", reason="playwright is not installed: see requirements-parts.txt")
from playwright.sync_api import Browser, Locator, Page, expect, sync_playwright  # noqa: E402 - there

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
        # Chromium reports each breach of a page's policy here as an error.
        page.on(
            "console",
            lambda message: (
                self.complaints.append(message.text) if message.type in {"error", "warning"} else 0
            ),
        )

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


def test_the_page_shows_every_operation_and_needs_nobody_else(
    page: Page, seen: Seen, server: Server
) -> None:
    open_docs(page, server)
    document = page.request.get(f"{server.url}/openapi.json").json()
    expected = {
        (method.upper(), path)
        for path, operations in document["paths"].items()
        for method in operations
    }
    shown = {
        (
            block.locator(".opblock-summary-method").inner_text(),
            block.locator("[data-path]").first.get_attribute("data-path"),
        )
        for block in page.locator(".opblock").all()
    }
    assert shown == expected
    for block in page.locator(".opblock-summary-control").all():
        block.click()
    expect(page.locator(".opblock.is-open .responses-inner")).to_have_count(len(expected))
    assert seen.elsewhere(server.url) == []
    assert f"{server.url}/static/swagger/swagger-ui-bundle.js" in seen.requests
    assert seen.complaints == []


def test_the_pages_policy_stops_a_script_that_somebody_slipped_in(
    page: Page, seen: Seen, server: Server
) -> None:
    open_docs(page, server)
    page.evaluate(
        """() => {
          const script = document.createElement("script");
          script.textContent = "window.ran = true";
          document.body.append(script);
          const image = document.createElement("img");
          image.src = "http://127.0.0.1:1/elsewhere.png";
          document.body.append(image);
        }"""
    )
    assert page.evaluate("() => window.ran") is None
    assert len([text for text in seen.complaints if "Content Security Policy" in text]) == 2


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


@dataclass(frozen=True)
class Exported:
    """An export's page as a file, and the same export's data."""

    page: Path
    data: dict[str, list[dict[str, Any]]]


_SCRIPT: Final = "<script>window.ran = true</script>"
_IMAGE: Final = '"><img src="http://127.0.0.1:1/x.png" onerror="window.ran = true">'


@pytest.fixture
def exported(
    sqlite_service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Exported:
    person = plant("a")
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
    data = json.loads((tmp_path / "export" / "export.json").read_text())["data"]
    return Exported(tmp_path / "export" / "index.html", data)
