"""Connections: the head of a request is bounded in size and time, which uvicorn leaves open."""

import asyncio
import json
import secrets
from collections.abc import Collection
from http import HTTPStatus
from typing import Final, NoReturn

import structlog
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from backend.api.middleware import REQUESTS, safe_headers
from backend.api.problems import MEDIA_TYPE, problem_body
from backend.errors import (
    HeadTooLargeError,
    HoldfastError,
    MalformedRequestError,
    RequestTimeoutError,
)

log = structlog.get_logger(__name__)
# More than any browser, token and path need together.
MAX_HEAD_BYTES: Final = 32 * 1024
HEAD_SECONDS: Final = 10.0
# A caller who takes nothing for so long is gone, and holds no place among those who do.
STALLED_SECONDS: Final = 20.0
_VERSIONS: Final = ("1.0", "1.1")


class BoundedConnection(HttpToolsProtocol):
    """
    A connection that is given up when a request's head is too long, or is not there in time.

    Without it one caller could fill the memory with a header that never ends, and a few could hold
    every connection there may be by sending a byte now and then.
    """

    _head_bytes = 0
    _head_timer: asyncio.TimerHandle | None = None
    _rest_timer: asyncio.TimerHandle | None = None
    _stall_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # as uvicorn
        super().connection_made(transport)
        self._expect_head()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._expect_head()

    def on_header(self, name: bytes, value: bytes) -> None:
        # RFC 9110, 6.5.1: what comes after the body is no header, whatever it calls itself.
        if self._head_timer is not None:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        if (
            len(self.url) + sum(len(name) + len(value) for name, value in self.headers)
            > MAX_HEAD_BYTES
        ):
            self._refuse(HeadTooLargeError("send shorter headers"))
        if not _is_clear(self.parser.get_http_version(), self.headers):
            self._refuse(MalformedRequestError("this is not HTTP/1.1"))
        self._head_arrived()
        super().on_headers_complete()
        if self.parser.should_upgrade():
            # There is nothing to change to, and the parser does not read what comes after.
            self.cycle.keep_alive = False

    def data_received(self, data: bytes) -> None:
        awaited = self._head_timer
        super().data_received(data)
        if awaited is not None and self._head_timer is awaited:
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES:
                self._give_up(HeadTooLargeError("send shorter headers"))
        elif (
            self._head_timer is None
            and self._rest_timer is None
            and self.cycle is not None
            and self.cycle.response_complete
        ):
            # Uvicorn stops its clock at any byte, also at one of a request that was answered.
            self._rest_timer = self.loop.call_later(HEAD_SECONDS, self.transport.close)

    def _unsupported_upgrade_warning(self) -> None:
        # Anybody may ask for one, and advice on what to install is not for them.
        log.info("upgrade_not_made")

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stall_timer = self.loop.call_later(STALLED_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        self._moves_on()
        super().resume_writing()

    def _moves_on(self) -> None:
        if self._stall_timer is not None:
            self._stall_timer.cancel()
            self._stall_timer = None

    def connection_lost(self, exc: Exception | None) -> None:
        self._head_arrived()
        self._moves_on()
        super().connection_lost(exc)

    def send_400_response(self, _msg: str) -> None:
        self._give_up(MalformedRequestError("this is not HTTP/1.1"))

    def _expect_head(self) -> None:
        if self._head_timer is None:
            self._head_bytes = 0
            late = RequestTimeoutError("the headers did not arrive in time")
            self._head_timer = self.loop.call_later(HEAD_SECONDS, self._give_up, late)

    def _head_arrived(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None
        if self._rest_timer is not None:
            self._rest_timer.cancel()
            self._rest_timer = None

    def _refuse(self, err: HoldfastError) -> NoReturn:
        self._give_up(err)
        raise ValueError("the parser stops here")

    def _give_up(self, err: HoldfastError) -> None:
        is_next = self._head_timer is not None
        self._head_arrived()
        if self.transport.is_closing():
            return
        cycle = self.cycle
        if (
            cycle is not None
            and not cycle.response_complete
            and (cycle.response_started or is_next)
        ):
            # Another answer must not be taken for a part of the one that is being sent.
            self.transport.close()
            return
        request_id = secrets.token_hex(8)
        body = json.dumps(problem_body(err, request_id)).encode()
        REQUESTS.labels("unread", "unmatched", err.status).inc()
        log.warning("request_refused", code=err.code, status=err.status, request_id=request_id)
        lines = (
            f"HTTP/1.1 {err.status} {HTTPStatus(err.status).phrase}",
            f"Content-Type: {MEDIA_TYPE}",
            f"Content-Length: {len(body)}",
            *(
                f"{name}: {value}"
                for name, value in safe_headers("", self.scheme or "", request_id)
            ),
            "Connection: close",
        )
        self.transport.write("\r\n".join(lines).encode() + b"\r\n\r\n" + body)
        self.transport.close()


def _is_clear(version: str, headers: Collection[tuple[bytes, bytes]]) -> bool:
    """
    Say whether a head can be read in one way only: what stands before us may read it in another.

    One host (RFC 9112, 3.2), one set of credentials, no transfer coding but `chunked` (6.1).
    """
    names = [name for name, _ in headers]
    codings = [value.lower() for name, value in headers if name == b"transfer-encoding"]
    return (
        version in _VERSIONS
        and names.count(b"host") in ((1,) if version == "1.1" else (0, 1))
        and names.count(b"authorization") <= 1
        and codings in ([], [b"chunked"] if version == "1.1" else [])
    )
