"""The service: `python main.py` makes what is missing and serves; `create_app` is the ASGI app."""

import gc

# What is imported stays: looking for garbage among it takes an eighth of the start.
gc.disable()

import multiprocessing
import os
import signal
import socket
import ssl
import sys
import tempfile
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Final

import structlog
import uvicorn
from anyio import to_thread
from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware
from fastapi.staticfiles import StaticFiles
from uvicorn.supervisors import Multiprocess

from backend import __version__
from backend.api import (
    approvals,
    audit,
    auth,
    backups,
    encryption,
    erasures,
    holds,
    operation,
    privacy,
    processing,
    retention,
    scheduler,
)
from backend.api.access import require_declared
from backend.api.connections import BoundedConnection
from backend.api.middleware import AdmissionMiddleware, RequestMiddleware
from backend.api.problems import Problem, add_problem_handlers
from backend.crypto.tls import server_context
from backend.db_utils import dispose_engine
from backend.errors import ConfigurationError, UnavailableError
from backend.logs import configure_logs, log_what_nobody_catches
from backend.services.scheduler_service import get_scheduler_service
from backend.services.setup_service import get_setup_service
from backend.settings import Settings, get_settings

gc.freeze()
gc.enable()

DESCRIPTION: Final = """
Keeps people's data safely, proves it, and lets go of it when it must: encryption at rest, access
and erasure, consent, retention, backup and recovery.

Press **Authorize** and sign in with e-mail (as user name) and password; a one-time code goes into
the field client_secret.
"""
log = structlog.get_logger(__name__)
_STATIC: Final = Path(__file__).parent / "backend" / "web" / "static"
# How long requests under way may go on once the process was asked to stop.
_STOP_SECONDS: Final = 5
# How long a worker may take to start, or say nothing, before another takes its place.
_WORKER_SECONDS: Final = 60
_ROUTERS: Final = (
    auth, privacy, erasures, retention, holds, scheduler, processing, backups, encryption,
    audit, approvals, operation,
)  # fmt: skip


def create_app() -> FastAPI:
    """Build the application; nothing is read or opened before it starts."""
    settings = get_settings()
    app = FastAPI(
        title="Holdfast",
        version=__version__,
        description=DESCRIPTION,
        docs_url=None,
        redoc_url=None,
        # A redirect would be to whatever host the caller names.
        redirect_slashes=False,
        lifespan=_lifespan,
    )
    for module in _ROUTERS:
        require_declared(module.router)
        app.include_router(module.router)
    app.mount("/static", StaticFiles(directory=_STATIC), name="static")
    app.add_middleware(
        AdmissionMiddleware,
        max_concurrent=settings.max_concurrent_requests,
        https_only=settings.is_production,
    )
    # Around it, so that a page may read what is refused, and when to come back.
    if settings.allowed_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.allowed_origins,
            allow_methods=("GET", "POST", "PUT", "DELETE"),
            allow_headers=("Authorization", "Content-Type"),
            expose_headers=("Content-Disposition", "Retry-After", "X-Request-ID"),
        )
    # Added last, it is around all others.
    app.add_middleware(RequestMiddleware)
    add_problem_handlers(app)
    _describe_problems(app)
    return app


@asynccontextmanager
async def _lifespan(_app: FastAPI) -> AsyncIterator[None]:
    settings = get_settings()
    configure_logs(settings)
    # A thread for each request: with fewer, one that holds a lock or a connection of the database
    # waits for a thread, and all threads wait for what it holds.
    to_thread.current_default_thread_limiter().total_tokens = settings.max_concurrent_requests
    stopping = threading.Event()
    if not _opened():
        threading.Thread(target=_open_later, args=(stopping,), daemon=True).start()
    yield
    stopping.set()
    get_scheduler_service().stop()
    dispose_engine()


def _opened() -> bool:
    """Get ready; say no where a service that keeps our key does not answer now."""
    try:
        get_setup_service().open()
    except UnavailableError as err:
        log.error("not_ready", code=err.code)
        return False
    if get_settings().scheduler_enabled:
        get_scheduler_service().start()
    return True


def _open_later(stopping: threading.Event) -> None:
    """Try again until it works; requests are answered with 503 until then."""
    while not stopping.wait(UnavailableError.retry_after_seconds):
        if _opened():
            return


def _describe_problems(app: FastAPI) -> None:
    """Put the one shape of errors into the OpenAPI document."""
    build = app.openapi

    def with_problem() -> dict[str, object]:
        document = build()
        schemas = document.setdefault("components", {}).setdefault("schemas", {})
        schemas["Problem"] = Problem.model_json_schema()
        return document

    app.openapi = with_problem  # type: ignore[method-assign] # FastAPI's documented way


def serve() -> None:
    """
    Make what is missing, then serve until stopped.

    Raises:
        ConfigurationError: This machine is not set up so that it can; nothing was changed.
    """
    settings = get_settings()
    configure_logs(settings)
    _require_https(settings)
    with _listen(settings) as listener:
        _serve(listener, settings)


def _serve(listener: socket.socket, settings: Settings) -> None:
    try:
        admin = get_setup_service().prepare().admin
    except UnavailableError as err:
        # Started all the same: it answers 503 until what it needs is back.
        print(f"holdfast: not ready: {err.detail}", file=sys.stderr)
        admin = None
    if admin is not None:
        email, password = admin
        print(f"\n  First admin: {email}\n  Password, shown this once: {password}\n", flush=True)
    scheme = "https" if settings.ssl_cert_path else "http"
    host, port = listener.getsockname()[:2]
    host = f"[{host}]" if ":" in host else host
    print(f"  Holdfast is at {scheme}://{host}:{port} and its API page at /docs", flush=True)
    config = _server_config(settings)
    if settings.workers == 1:
        uvicorn.Server(config).run(sockets=[listener])
    else:
        _run_workers(config, listener)


def _server_config(settings: Settings) -> uvicorn.Config:
    return uvicorn.Config(
        _worker_app,
        factory=True,
        workers=settings.workers,
        http=BoundedConnection,
        # There is no route for them.
        ws="none",
        ssl_context_factory=_tls_context if settings.ssl_cert_path else None,
        # Said in full: by default it believes every caller on this machine.
        proxy_headers=bool(settings.proxies),
        forwarded_allow_ips=list(settings.proxies),
        # Ours logs requests by route; an access log would write down paths and queries.
        access_log=False,
        log_config=None,
        server_header=False,
        timeout_graceful_shutdown=_STOP_SECONDS,
        timeout_worker_healthcheck=_WORKER_SECONDS,
    )


def _run_workers(config: uvicorn.Config, listener: socket.socket) -> None:
    """Serve by several processes; one that dies is replaced."""
    dispose_engine()
    with tempfile.TemporaryDirectory(prefix="holdfast-metrics-") as folder:
        # Where they count together: whichever is asked for the metrics answers for all.
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = folder
        _Workers(config, [listener]).run()


class _Workers(Multiprocess):
    """Workers whose death is seen at once, also while one is asked whether it lives."""

    def init_processes(self) -> None:
        super().init_processes()
        self._hang_up()

    def keep_subprocess_alive(self) -> None:
        super().keep_subprocess_alive()
        self._hang_up()

    def _hang_up(self) -> None:
        # With its end of the line open here, too, a dead worker's answer would be waited for.
        for process in self.processes:
            process.child_conn.close()


def _worker_app() -> FastAPI:
    configure_logs(get_settings())
    log_what_nobody_catches()
    if (parent := multiprocessing.parent_process()) is not None:
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    return create_app()


def _end_with(parent: BaseProcess) -> None:
    """Stop in order once *parent* was killed: nobody else would, and the port would stay taken."""
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)


def _tls_context(_config: uvicorn.Config, _default: Callable[[], ssl.SSLContext]) -> ssl.SSLContext:
    settings = get_settings()
    if settings.ssl_cert_path is None or settings.ssl_key_path is None:
        raise ConfigurationError("SSL_CERT_PATH and SSL_KEY_PATH are not set")
    return server_context(settings.ssl_cert_path, settings.ssl_key_path, datetime.now(UTC))


def _listen(settings: Settings) -> socket.socket:
    """Take the port first: with another process on it nothing must be made."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((settings.host, settings.port))
        listener.listen(2048)
    except OSError as err:
        listener.close()
        raise ConfigurationError(
            f"HOST and PORT: cannot listen on {settings.host}:{settings.port}: {err.strerror}"
        ) from None
    return listener


def _require_https(settings: Settings) -> None:
    """Refuse a certificate that cannot be served, and production without any TLS."""
    if settings.ssl_cert_path and settings.ssl_key_path:
        server_context(settings.ssl_cert_path, settings.ssl_key_path, datetime.now(UTC))
    elif settings.is_production and not settings.proxies:
        raise ConfigurationError(
            "APP_ENV=production serves HTTPS only: set SSL_CERT_PATH and SSL_KEY_PATH, or, where a "
            "proxy ends TLS, its address in TRUSTED_PROXIES"
        )


def main() -> int:
    """Serve; a machine that is not set up gives one line and exit code 2."""
    try:
        serve()
    except ConfigurationError as err:
        print(f"holdfast: {err.detail}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        # Uvicorn has stopped in order and passes the signal on.
        return 128 + signal.SIGINT
    finally:
        dispose_engine()
    return 0


def __getattr__(name: str) -> FastAPI:
    """Offer `main:app` to `uvicorn main:app`, built only when it is asked for."""
    if name == "app":
        return create_app()
    raise AttributeError(name)


if __name__ == "__main__":
    sys.exit(main())
