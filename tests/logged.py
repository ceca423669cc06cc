"""What this process logs, as it would be written to a file."""

import io
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from backend.logs import configure_logs
from backend.settings import AppEnv, load_settings


@contextmanager
def logged(environment: AppEnv) -> Iterator[Callable[[], str]]:
    """Log as a process does in *environment*; give what it has written."""
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    configure_logs(load_settings(app_env=environment, trusted_proxies="127.0.0.1"))
    (handler,) = root.handlers
    assert isinstance(handler, logging.StreamHandler)
    # As a file: in half a pair of surrogates there is nothing that could be written.
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, "utf-8", errors="strict")
    handler.setStream(stream)

    def written() -> str:
        stream.flush()
        return raw.getvalue().decode()

    try:
        yield written
    finally:
        root.handlers[:], root.level = before, level
