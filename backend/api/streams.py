"""Answers that are read while they are sent, and let go of what they read from."""

from collections.abc import Generator, Mapping

import anyio
from anyio import to_thread
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send


class ClosingResponse(StreamingResponse):
    """A stream whose source is closed at its end, also when the caller hangs up before."""

    def __init__(
        self, chunks: Generator[bytes], *, media_type: str, headers: Mapping[str, str]
    ) -> None:
        super().__init__(chunks, media_type=media_type, headers=headers)
        self._chunks = chunks

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            # Shielded: the request of a caller who has hung up is cancelled.
            with anyio.CancelScope(shield=True):
                await to_thread.run_sync(self._chunks.close)
