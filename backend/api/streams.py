"""Answers that are read while they are sent, and let go of what they read from."""

from collections.abc import Generator, Mapping
from contextlib import closing
from inspect import GEN_CLOSED, getgeneratorstate
from itertools import chain, islice
from typing import Final

import anyio
from anyio import CapacityLimiter, to_thread
from fastapi.responses import StreamingResponse
from starlette.concurrency import iterate_in_threadpool
from starlette.types import Message, Receive, Scope, Send

# A caller who takes nothing for so long is gone: its snapshot must not be kept for it.
STALLED_SECONDS: Final = 20
CHUNK_BYTES: Final = 64 * 1024


class ClosingResponse(StreamingResponse):
    """
    A stream whose source is closed at its end, also when the caller hangs up before.

    What fits into one chunk is read whole before the answer begins: it has a length, and what
    goes wrong while it is read is answered as such.

    Args:
        turns: Where the first chunk takes long to make: how many may be made at once.
    """

    def __init__(
        self,
        chunks: Generator[bytes],
        *,
        media_type: str,
        headers: Mapping[str, str],
        turns: CapacityLimiter | None = None,
    ) -> None:
        self._turns = turns
        self._chunks = _gathered(chunks)
        super().__init__(self._chunks, media_type=media_type, headers=headers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_in_time(message: Message) -> None:
            with anyio.fail_after(STALLED_SECONDS):
                await send(message)

        try:
            first, *rest = await to_thread.run_sync(self._begin, limiter=self._turns)
            if rest:
                self.body_iterator = iterate_in_threadpool(chain((first, *rest), self._chunks))
                await super().__call__(scope, receive, send_in_time)
            else:
                await self._send_whole(first, send_in_time)
        finally:
            # What was read to its end is closed; a change of threads costs more than to ask.
            if getgeneratorstate(self._chunks) != GEN_CLOSED:
                # Shielded: the request of a caller who has hung up is cancelled.
                with anyio.CancelScope(shield=True):
                    await to_thread.run_sync(self._chunks.close)

    def _begin(self) -> list[bytes]:
        """Read the first chunk and, where there is one, the second; without it, to the end."""
        return list(islice(self._chunks, 2)) or [b""]

    async def _send_whole(self, body: bytes, send: Send) -> None:
        self.headers["Content-Length"] = str(len(body))
        start = {"status": self.status_code, "headers": self.raw_headers}
        await send({"type": "http.response.start", **start})
        await send({"type": "http.response.body", "body": body})


def _gathered(chunks: Generator[bytes]) -> Generator[bytes]:
    """Join small chunks: each that is sent costs two changes of threads."""
    with closing(chunks):
        waiting = bytearray()
        for chunk in chunks:
            waiting += chunk
            if len(waiting) >= CHUNK_BYTES:
                yield bytes(waiting)
                waiting.clear()
        if waiting:
            yield bytes(waiting)
