"""Errors as `application/problem+json` (RFC 9457), the same shape for every one."""

from collections.abc import Mapping
from http import HTTPStatus
from typing import Any, Final

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import iter_route_contexts
from pydantic import BaseModel, ConfigDict
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.routing import compile_path

from backend.errors import (
    BodyTooLargeError,
    ConflictError,
    ForbiddenError,
    HoldfastError,
    InvalidRequestError,
    RefusedError,
    RequestTimeoutError,
    StaleSignInError,
    SubjectErasedError,
    SubjectNotFoundError,
    TooManyAttemptsError,
    UnauthenticatedError,
    UnavailableError,
    UnsupportedMediaTypeError,
)
from backend.logs import where
from backend.services.auth_service import get_auth_service

log = structlog.get_logger(__name__)
# Of PostgreSQL (its appendix A): a read-only transaction, and what was left idle for too long.
_READS_ONLY: Final = ("25006", "25P03", "25P04")
MEDIA_TYPE = "application/problem+json"


_EXAMPLES: Final[tuple[HoldfastError, ...]] = (
    UnauthenticatedError("the bearer token is not valid"),
    ForbiddenError("only an admin may do this"),
    SubjectNotFoundError("no person has the id 7"),
    RequestTimeoutError("the body did not arrive in time"),
    ConflictError("another backup or restore is running"),
    SubjectErasedError("person 7 was erased"),
    BodyTooLargeError("send less at once"),
    UnsupportedMediaTypeError("send application/json in UTF-8"),
    RefusedError("a retention period is between 1 day and 100 years, not P101Y"),
    TooManyAttemptsError("too many wrong passwords: try again later", 900),
    UnavailableError("the database does not answer now"),
)


class Problem(BaseModel):
    """What went wrong: `code` is stable for programs, `detail` is for people."""

    model_config = ConfigDict(extra="allow")

    type: str
    title: str
    status: int
    detail: str
    code: str
    request_id: str


def problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Describe, for OpenAPI, the errors that an endpoint answers with beside its success."""
    schema = {"$ref": "#/components/schemas/Problem"}
    return {
        example.status: {
            "description": HTTPStatus(example.status).phrase,
            "content": {
                MEDIA_TYPE: {"schema": schema, "example": problem_body(example, "8c1f0e0f3c9d4f0e")}
            },
        }
        for example in _EXAMPLES
        if example.status in statuses
    }


def invalid(at: str, problem: str) -> InvalidRequestError:
    """Make the error that says what is wrong where in a request, and not what was there."""
    return InvalidRequestError(f"{at}: {problem}", errors=[{"at": at, "problem": problem}])


def add_problem_handlers(app: FastAPI) -> None:
    """Answer the errors of *app* as problem documents; `RequestMiddleware` does the unforeseen."""
    app.add_exception_handler(HoldfastError, _holdfast_error)
    app.add_exception_handler(RequestValidationError, _invalid_request)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(DBAPIError, _database_error)
    app.add_exception_handler(PoolTimeoutError, _database_error)


def problem_response(request: Request, err: HoldfastError) -> JSONResponse:
    headers = {}
    if isinstance(err, UnauthenticatedError):
        headers["WWW-Authenticate"] = err.challenge
    if isinstance(err, RequestTimeoutError):
        # What may still come is not waited for.
        headers["Connection"] = "close"
    if isinstance(err, UnavailableError | TooManyAttemptsError):
        headers["Retry-After"] = str(err.retry_after_seconds)
    body = problem_body(err, request.scope.get("request_id", ""))
    return JSONResponse(body, err.status, headers=headers, media_type=MEDIA_TYPE)


def problem_body(err: HoldfastError, request_id: str) -> dict[str, Any]:
    return {
        "type": "about:blank",
        "title": err.title,
        "status": err.status,
        "detail": err.detail,
        "code": err.code,
        "request_id": request_id,
        **err.extra,
    }


async def _holdfast_error(request: Request, err: Exception) -> JSONResponse:
    if not isinstance(err, HoldfastError):
        raise err
    if err.status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        log.error("request_failed", code=err.code)
    if isinstance(err, ForbiddenError | StaleSignInError) and hasattr(request.state, "actor"):
        try:
            await run_in_threadpool(_record_denial, request, err)
        except DBAPIError as failure:
            return await _database_error(request, failure)
    return problem_response(request, err)


def _record_denial(request: Request, err: ForbiddenError | StaleSignInError) -> None:
    route = getattr(request.scope.get("route"), "path", "unmatched")
    get_auth_service().record_denial(request.state.actor, err, act=f"{request.method} {route}")


async def _invalid_request(request: Request, err: Exception) -> JSONResponse:
    if not isinstance(err, RequestValidationError):
        raise err
    # What was sent is left out: it may be somebody's data.
    errors = [{"at": _place(e), "problem": _words(e)} for e in err.errors()]
    detail = "; ".join(f"{e['at']}: {e['problem']}" for e in errors[:3])
    return problem_response(request, InvalidRequestError(detail, errors=errors[:20]))


def _words(error: Mapping[str, Any]) -> str:
    if error["type"] == "uuid_parsing":
        # Pydantic would quote the first character that is wrong.
        return "Input should be a valid UUID"
    words: str = error["msg"]
    return words.removeprefix("Value error, ")[:200]


def _place(error: Mapping[str, Any]) -> str:
    """Say where in the request an error is; a name that we did not give is not repeated."""
    parts = error["loc"][:-1] if error["type"] == "extra_forbidden" else error["loc"]
    return ".".join(str(part) for part in parts)


async def _http_error(request: Request, err: Exception) -> JSONResponse:
    if not isinstance(err, HTTPException):
        raise err
    status = HTTPStatus(err.status_code)
    if status is HTTPStatus.UNAUTHORIZED:
        return problem_response(request, UnauthenticatedError("send a bearer token"))
    body = {
        "type": "about:blank",
        "title": status.phrase,
        "status": status.value,
        "detail": status.description,
        "code": status.name.lower(),
        "request_id": request.scope.get("request_id", ""),
    }
    headers = dict(err.headers or {})
    if status is HTTPStatus.METHOD_NOT_ALLOWED:
        headers["Allow"] = ", ".join(_methods(request))
    return JSONResponse(body, status, headers=headers, media_type=MEDIA_TYPE)


def _methods(request: Request) -> list[str]:
    """Say by which methods a path can be called: one route knows of its own alone."""
    routes = iter_route_contexts(request.app.routes)
    at_path = (c for c in routes if c.path and compile_path(c.path)[0].match(request.url.path))
    return sorted({method for each in at_path for method in each.methods or ()})


async def _database_error(request: Request, err: Exception) -> JSONResponse:
    if isinstance(err, OperationalError | InterfaceError | PoolTimeoutError) or _only_reads(err):
        log.error("database_unavailable", error=type(err).__name__)
        return problem_response(request, UnavailableError("the database does not answer now"))
    return unexpected_error(request, err)


def _only_reads(err: Exception) -> bool:
    """Say whether PostgreSQL takes no writes now, as after a failover or with its disk full."""
    return getattr(getattr(err, "orig", None), "sqlstate", None) in _READS_ONLY


def unexpected_error(request: Request, err: Exception) -> JSONResponse:
    """Answer what nobody foresaw: with its request id, and nothing of its words."""
    # The class alone: the words of an error may quote a row.
    log.error("unexpected_error", error=type(err).__name__, where=where(err))
    return problem_response(request, HoldfastError("the failure was logged under this request id"))
