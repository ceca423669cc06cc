"""Around every request: an id, safe headers, one log line, one count; and what is let in at all."""

import secrets
import time
from collections.abc import Iterable
from typing import Final

import structlog
from anyio import CancelScope
from prometheus_client import Counter, Histogram
from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from backend.api.problems import problem_response, unexpected_error
from backend.errors import (
    BusyError,
    HoldfastError,
    HttpsRequiredError,
    RequestTimeoutError,
    UnavailableError,
)
from backend.services.setup_service import get_setup_service

log = structlog.get_logger("request")
REQUESTS: Final = Counter("holdfast_requests", "Requests", ("method", "route", "status"))
SECONDS: Final = Histogram("holdfast_request_seconds", "Time to the answer", ("method", "route"))
_HEADERS: Final = (
    ("X-Content-Type-Options", "nosniff"),
    ("X-Frame-Options", "DENY"),
    ("Referrer-Policy", "no-referrer"),
    ("Cross-Origin-Resource-Policy", "same-origin"),
)
_CSP: Final = "Content-Security-Policy"
_POLICY: Final = "default-src 'none'; frame-ancestors 'none'"
# Swagger UI needs its own scripts, styles and calls to this service, and nothing else.
_PAGE_POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'self'"
)
_PAGES: Final = ("/docs", "/static/")
# Answered also while the key service or the database keeps the service from being ready.
_PROBES: Final = ("/healthz", "/readyz", "/metrics")
_ALWAYS: Final = (*_PROBES, "/openapi.json", *_PAGES)
_HSTS: Final = "max-age=31536000"


def safe_headers(path: str, scheme: str, request_id: str) -> Iterable[tuple[str, str]]:
    """Yield what every answer carries."""
    yield from _HEADERS
    yield "X-Request-ID", request_id
    yield _CSP, _PAGE_POLICY if path.startswith(_PAGES) else _POLICY
    # Behind a token nothing may be kept; the pages' own files may.
    yield "Cache-Control", "max-age=3600" if path.startswith("/static/") else "no-store"
    if scheme == "https":
        yield "Strict-Transport-Security", _HSTS


class RequestMiddleware:
    """Plain ASGI: it neither buffers bodies nor adds a task per request."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = secrets.token_hex(8)
        scope["request_id"] = request_id
        started = time.perf_counter()
        answered = None
        status = 0

        async def send_with_headers(message: Message) -> None:
            nonlocal status, answered
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                # A page may bring a policy of its own, which allows its style and no more.
                own = headers.get(_CSP)
                for name, value in safe_headers(scope["path"], scope["scheme"], request_id):
                    headers[name] = value
                if own is not None:
                    headers[_CSP] = own
            elif message["type"] == "http.response.body" and not message.get("more_body"):
                # What goes on after the answer is not waited for by anybody.
                answered = time.perf_counter()
            await send(message)

        with structlog.contextvars.bound_contextvars(request_id=request_id):
            try:
                await self._app(scope, receive, send_with_headers)
            except Exception as err:
                answer = unexpected_error(Request(scope), err)
                if status:
                    # The answer has begun: the connection must break, so that it looks cut.
                    raise
                await answer(scope, receive, send_with_headers)
            finally:
                ended = answered or time.perf_counter()
                self._count(scope, status, ended - started)

    def _count(self, scope: Scope, status: int, seconds: float) -> None:
        # The route's pattern, never the path: a path may carry an id.
        route = scope.get("route")
        pattern = getattr(route, "path", "unmatched")
        REQUESTS.labels(scope["method"], pattern, status).inc()
        SECONDS.labels(scope["method"], pattern).observe(seconds)
        log.info(
            "request",
            method=scope["method"],
            route=pattern,
            status=status,
            milliseconds=round(seconds * 1000, 1),
        )


class AdmissionMiddleware:
    """Says which requests are looked at: so many at once, over HTTPS, once the service is ready."""

    def __init__(self, app: ASGIApp, *, max_concurrent: int, https_only: bool) -> None:
        self._app = app
        self._max_concurrent = max_concurrent
        self._https_only = https_only
        self._under_way = 0
        # Those that wait for more of a body, the longest first.
        self._waiting: dict[CancelScope, None] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        self._under_way += 1
        try:
            if (refusal := self._refusal(scope)) is not None:
                await problem_response(Request(scope), refusal)(scope, receive, send)
            else:
                await self._app(scope, self._aside(receive), send)
        finally:
            self._under_way -= 1

    def _refusal(self, scope: Scope) -> HoldfastError | None:
        """Say why a request is not even looked at."""
        path = scope["path"]
        if self._https_only and scope["scheme"] != "https" and path not in _PROBES:
            return HttpsRequiredError("send it again over HTTPS, and renew what was sent in clear")
        if not (get_setup_service().is_open or path.startswith(_ALWAYS)):
            return UnavailableError("the service is not ready yet")
        if self._under_way > self._max_concurrent and path not in _PROBES:
            return BusyError("too many requests are under way")
        return None

    def _aside(self, receive: Receive) -> Receive:
        """Have a request give its place back while it waits for its body."""
        arriving = True

        async def receive_aside() -> Message:
            nonlocal arriving
            message = await (self._await_body(receive) if arriving else receive())
            arriving = message.get("more_body", False)
            return message

        return receive_aside

    async def _await_body(self, receive: Receive) -> Message:
        """
        Receive a part of a body; whoever only waits for one keeps nobody from being answered.

        Raises:
            RequestTimeoutError: More wait than may be under way, and this one has for longest.
            BusyError: It is here, and by now too many others are under way.
        """
        self._under_way -= 1
        with CancelScope() as waiting:
            self._waiting[waiting] = None
            if len(self._waiting) > self._max_concurrent:
                next(iter(self._waiting)).cancel()
            try:
                message = await receive()
            finally:
                del self._waiting[waiting]
                self._under_way += 1
        if waiting.cancelled_caught:
            raise RequestTimeoutError("the body did not arrive in time")
        if self._under_way > self._max_concurrent:
            raise BusyError("too many requests are under way")
        return message
