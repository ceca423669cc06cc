"""How requests are read: within limits of size, time and depth, and only as what they say."""

import asyncio
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import parse_qsl

from fastapi import Request, Response, params
from fastapi.dependencies.utils import get_flat_params
from fastapi.routing import APIRoute
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import FormData

from backend.api.dependencies import LargeBody, bearer, signed_in
from backend.api.problems import invalid, problems
from backend.api.strict_json import parse_json
from backend.errors import (
    BodyTooLargeError,
    RequestTimeoutError,
    UnsupportedMediaTypeError,
)
from backend.services.auth_service import require_admin
from backend.settings import get_settings

JSON: Final = "application/json"
FORM: Final = "application/x-www-form-urlencoded"
# No body but an import needs more than a few KiB.
MAX_BODY_BYTES: Final = 64 * 1024
MAX_FORM_FIELDS: Final = 20
BODY_SECONDS: Final = 15.0
# 16 MiB at half a megabit a second.
LARGE_BODY_SECONDS: Final = 300.0

_Handler = Callable[[Request], Coroutine[Any, Any, Response]]


class StrictRoute(APIRoute):
    """A route that reads its requests strictly; every router makes its routes of this class."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        # What any route, and any with a body, can answer need not be said at each.
        common = problems(422, 503, *((408, 413, 415) if self.body_field else ()))
        self.responses = dict(sorted({**common, **self.responses}.items(), key=_status))

    def get_route_handler(self) -> _Handler:
        handle = super().get_route_handler()
        known = frozenset(
            one.alias
            for one in get_flat_params(self.dependant)
            if isinstance(one.field_info, params.Query)
        )
        kind = _body_kind(self)

        async def handle_strictly(request: Request) -> Response:
            _check_target(request, known)
            _check_length(request, MAX_BODY_BYTES if kind is None else kind.max_bytes)
            return await handle(request if kind is None else await _read(request, kind))

        return handle_strictly


def _status(response: tuple[int | str, Any]) -> int:
    return int(response[0])


@dataclass(frozen=True)
class _BodyKind:
    """The body that a route takes."""

    media_type: str
    is_large: bool

    @property
    def max_bytes(self) -> int:
        configured = get_settings().max_body_bytes
        return configured if self.is_large else min(configured, MAX_BODY_BYTES)

    @property
    def seconds(self) -> float:
        return LARGE_BODY_SECONDS if self.is_large else BODY_SECONDS


def _body_kind(route: APIRoute) -> _BodyKind | None:
    if route.body_field is None:
        return None
    info = route.body_field.field_info
    is_large = isinstance(info.annotation, type) and issubclass(info.annotation, LargeBody)
    return _BodyKind(FORM if isinstance(info, params.Form) else JSON, is_large)


class _ReadRequest(Request):
    """A request whose body has been read: FastAPI takes it from here."""

    def __init__(self, request: Request, content: bytes, value: Any) -> None:
        super().__init__(request.scope, request.receive)
        self._content, self._value = content, value

    async def body(self) -> bytes:
        return self._content

    async def json(self) -> Any:
        return self._value

    async def form(self, **_limits: Any) -> FormData:  # type: ignore[override] # FastAPI awaits it
        return FormData(self._value)


async def _read(request: Request, kind: _BodyKind) -> _ReadRequest:
    given = request.headers.getlist("content-type")
    if given and (len(given) > 1 or not _says(given[0], kind.media_type)):
        raise UnsupportedMediaTypeError(f"send {kind.media_type} in UTF-8")
    if kind.is_large:
        await _let_in(request)
    content = await _receive(request, kind)
    if not content:
        return _ReadRequest(request, b"", ())
    if not given:
        raise UnsupportedMediaTypeError(f"send {kind.media_type} in UTF-8, and say so")
    read = parse_form if kind.media_type == FORM else parse_json
    return _ReadRequest(request, content, read(content))


async def _let_in(request: Request) -> None:
    """Let an admin alone send a large body: reading 16 MiB of brackets takes seconds."""
    token = await bearer(request)
    require_admin((await run_in_threadpool(signed_in, request, token or "")).actor)


def _says(content_type: str, media_type: str) -> bool:
    if content_type == media_type:
        return True
    said, *parameters = content_type.lower().split(";")
    pairs = (parameter.partition("=") for parameter in parameters)
    charsets = [value.strip(' \t"') for name, _, value in pairs if name.strip() == "charset"]
    return said.strip() == media_type and all(name in {"utf-8", "utf8"} for name in charsets)


async def _receive(request: Request, kind: _BodyKind) -> bytes:
    chunks: list[bytes] = []
    left, more = kind.max_bytes, True
    try:
        async with asyncio.timeout(kind.seconds):
            while more:
                message = await request.receive()
                if message["type"] == "http.disconnect":
                    raise invalid("body", "cut short")
                chunks.append(message.get("body", b""))
                left -= len(chunks[-1])
                if left < 0:
                    raise BodyTooLargeError("send less at once")
                more = message.get("more_body", False)
    except TimeoutError:
        raise RequestTimeoutError("the body did not arrive in time") from None
    return b"".join(chunks)


def _check_length(request: Request, max_bytes: int) -> None:
    said = request.headers.get("content-length", "0")
    if not (said.isascii() and said.isdecimal()):
        raise invalid("headers", "Content-Length is no number")
    if len(said) > len(str(max_bytes)) or int(said) > max_bytes:
        raise BodyTooLargeError("send less at once")


def _check_target(request: Request, known: frozenset[str]) -> None:
    # No column, file or log takes it.
    if "\x00" in request.scope["path"]:
        raise invalid("path", "holds NUL")
    if not request.scope["query_string"]:
        return
    pairs = request.query_params.multi_items()
    _refuse_twice("query", (name for name, _ in pairs))
    if not known.issuperset(name for name, _ in pairs):
        raise invalid("query", "holds a parameter that is not described")
    if any("\x00" in value for _, value in pairs):
        raise invalid("query", "holds NUL")


def parse_form(content: bytes) -> list[tuple[str, str]]:
    """
    Read *content* as a form in which no field comes twice.

    Unknown fields are left alone: RFC 6749, 3.2, wants them ignored, and the others not repeated.
    """
    try:
        pairs = parse_qsl(
            content.decode(), keep_blank_values=True, errors="strict",
            max_num_fields=MAX_FORM_FIELDS,
        )  # fmt: skip
    except UnicodeDecodeError:
        raise invalid("body", "is no text in UTF-8") from None
    except ValueError:
        raise invalid("body", "too many fields") from None
    _refuse_twice("body", (name for name, _ in pairs))
    return pairs


def _refuse_twice(at: str, names: Iterable[str]) -> None:
    found = list(names)
    if len(set(found)) != len(found):
        raise invalid(at, "the same name comes twice")
