"""The service: `python main.py` makes what is missing and serves; `create_app` is the ASGI app."""

import gc

# What is imported stays: looking for garbage among it takes an eighth of the start.
gc.disable()

import signal
import socket
import ssl
import sys
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

import structlog
import uvicorn
from fastapi import FastAPI
from fastapi.staticfiles import StaticFiles

from backend import __version__
from backend.api import (
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
from backend.api.middleware import RequestMiddleware
from backend.api.problems import Problem, add_problem_handlers
from backend.db_utils import dispose_engine
from backend.errors import ConfigurationError, UnavailableError
from backend.logs import configure_logs
from backend.services.scheduler_service import get_scheduler_service
from backend.services.setup_service import get_setup_service
from backend.settings import Settings, get_settings

gc.freeze()
gc.enable()

DESCRIPTION: Final = """
Keeps people's data safely, proves it, and lets go of it when it must: encryption at rest, access
and erasure, consent, retention, backup and recovery.

Press **Authorize** and sign in with e-mail (as user name) and password.
"""
log = structlog.get_logger(__name__)
_STATIC: Final = Path(__file__).parent / "backend" / "web" / "static"
# How long requests under way may go on once the process was asked to stop.
_STOP_SECONDS: Final = 5
_ROUTERS: Final = (
    auth, privacy, erasures, retention, holds, scheduler, processing, backups, encryption,
    audit, operation,
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
        lifespan=_lifespan,
    )
    for module in _ROUTERS:
        app.include_router(module.router)
    app.mount("/static", StaticFiles(directory=_STATIC), name="static")
    app.add_middleware(RequestMiddleware, max_body_bytes=settings.max_body_bytes)
    add_problem_handlers(app)
    _describe_problems(app)
    return app


@asynccontextmanager
async def _lifespan(_app: FastAPI) -> AsyncIterator[None]:
    configure_logs(get_settings())
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
        # Replaced by `Problem`, which is what is really sent.
        schemas.pop("HTTPValidationError", None)
        schemas.pop("ValidationError", None)
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
    _check_certificate(settings)
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
    config = uvicorn.Config(
        create_app(),
        ssl_certfile=settings.ssl_cert_path,
        ssl_keyfile=settings.ssl_key_path,
        # Ours logs requests by route; an access log would write down paths and queries.
        access_log=False,
        log_config=None,
        server_header=False,
        timeout_graceful_shutdown=_STOP_SECONDS,
    )
    uvicorn.Server(config).run(sockets=[listener])


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


def _check_certificate(settings: Settings) -> None:
    if settings.ssl_cert_path is None or settings.ssl_key_path is None:
        return
    try:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(settings.ssl_cert_path, settings.ssl_key_path)
    except (OSError, ssl.SSLError) as err:
        reason = err.strerror or type(err).__name__
        raise ConfigurationError(
            f"SSL_CERT_PATH and SSL_KEY_PATH: not a certificate and its key: {reason}"
        ) from None


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
