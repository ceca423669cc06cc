"""
The process that carries the bytes of one backup, so that requests in the service's own stay quick.

It is told one job on its standard input, reports on its standard output a JSON document a line,
and ends by itself when its parent does. It has the key of one archive and no other.
"""

import base64
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from queue import SimpleQueue
from typing import Any, Final

from backend.backup.archive import Stored, read_archive, write_archive
from backend.backup.priority import step_back
from backend.backup.stores import StoreAddress, open_store
from backend.crypto.files import PayloadKey
from backend.errors import HoldfastError, UnavailableError

READ_BYTES: Final = 1024 * 1024
WHOLE: Final = "whole"
_REPORT_SECONDS: Final = 0.2


class _Parent:
    """The process that gave the job."""

    def __init__(self) -> None:
        self.job: dict[str, Any] = json.loads(sys.stdin.readline())
        self._words: SimpleQueue[str] = SimpleQueue()
        self._reported = 0.0
        threading.Thread(target=self._listen, daemon=True).start()

    def say(self, **what: object) -> None:
        sys.stdout.write(json.dumps(what) + "\n")
        sys.stdout.flush()

    def report(self, done: int) -> None:
        if time.monotonic() - self._reported >= _REPORT_SECONDS:
            self._reported = time.monotonic()
            self.say(bytes=done)

    def wait_for_whole(self) -> None:
        """Ask whether the dump ended well: what follows makes the archive one that opens."""
        self.say(eof=True)
        if self._words.get().strip() != WHOLE:
            raise UnavailableError("the dump failed")

    def _listen(self) -> None:
        for line in sys.stdin:
            self._words.put(line)
        # Our parent is gone, or wants no more of it.
        os._exit(1)


def main() -> int:
    """Do the job; say how it ended."""
    step_back(os.getpid())
    parent = _Parent()
    try:
        parent.say(done=_carry(parent))
    except BrokenPipeError:
        parent.say(broken_pipe=True)
    except HoldfastError as err:
        parent.say(error=type(err).__name__, detail=err.detail)
    except OSError as err:
        parent.say(error="UnavailableError", detail=f"the disk takes no more: {err.strerror}")
    else:
        return 0
    return 1


def _carry(parent: _Parent) -> dict[str, object] | None:
    job = parent.job
    store = open_store(StoreAddress(**job["store"]))
    key = PayloadKey(*(base64.b64decode(job[part]) for part in ("data_key", "context")))
    if job["kind"] == "write":
        with os.fdopen(job["descriptor"], "rb", buffering=0) as source:

            def plain() -> Iterator[bytes]:
                yield from iter(lambda: source.read(READ_BYTES), b"")
                parent.wait_for_whole()

            written = write_archive(store, job["name"], plain(), key, parent.report)
        return {"plain": written.plain_bytes, "size": written.size_bytes, "sha256": written.sha256}
    with os.fdopen(job["descriptor"], "wb", buffering=0) as target:
        read_archive(store, Stored(**job["stored"]), key, _whole_writes(target), parent.report)
    return None


def _whole_writes(target: Any) -> Any:
    def write(data: bytes) -> None:
        left = memoryview(data)
        while left:
            left = left[target.write(left) :]

    return write


if __name__ == "__main__":
    sys.exit(main())
