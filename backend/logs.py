"""Logs: one JSON object a line in production, readable lines in development, on stderr."""

import logging
import sys
import threading
from typing import Final

import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

from backend.settings import Settings

# No event of ours has a longer value; an error of a library may quote a whole request.
MAX_VALUE_CHARS: Final = 1000


def configure_logs(settings: Settings) -> None:
    """Send every log of this process, uvicorn's included, through one renderer."""
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        _name_exception,
    ]
    renderer: Processor = (
        structlog.processors.JSONRenderer()
        if settings.is_production
        else structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())
    )
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        wrapper_class=structlog.make_filtering_bound_logger(
            logging.getLevelNamesMapping()[settings.log_level]
        ),
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler()
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[_first_line, *shared],
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                _on_one_line,
                renderer,
            ],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(settings.log_level)
    # Its progress on every start says nothing to an operator.
    logging.getLogger("alembic").setLevel(logging.WARNING)


def log_what_nobody_catches() -> None:
    """Log, by class and place, what Python would print with its words and over many lines."""
    log = structlog.get_logger("uncaught")
    sys.excepthook = lambda _kind, err, _trace: log.error("uncaught", exc_info=err)
    threading.excepthook = lambda args: log.error("thread_failed", exc_info=args.exc_value)
    sys.unraisablehook = lambda args: log.error("unraisable", exc_info=args.exc_value)
    logging.captureWarnings(capture=True)
    # Else a line that cannot be written is printed with all that was to be in it.
    logging.raiseExceptions = False


def where(err: BaseException) -> str:
    """Name the last line of ours that *err* passed."""
    trace, place = err.__traceback__, "unknown"
    while trace is not None:
        file = trace.tb_frame.f_code.co_filename
        if "/backend/" in file:
            place = f"{file.rsplit('/backend/', 1)[1]}:{trace.tb_lineno}"
        trace = trace.tb_next
    return place


def _name_exception(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """
    Say which error it was and where, not its words.

    A traceback and the words of an error may quote a row of a person's data.
    """
    info = event.pop("exc_info", None)
    if info is True:
        info = sys.exc_info()
    err = info[1] if isinstance(info, tuple) else info
    if isinstance(err, BaseException):
        event["error"] = type(err).__name__
        event["where"] = where(err)
    return event


def _first_line(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """Take the first line of what a library says: the others quote words of errors."""
    event["event"] = str(event["event"]).partition("\n")[0]
    return event


def _on_one_line(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """
    Cut what is long, and write what does not print as an escape.

    A line break in a value would begin a line that reads as one of ours, and a terminal obeys
    other signs.
    """
    return {
        name: value if isinstance(value, int | float | None) else _printable(str(value))
        for name, value in event.items()
    }


def _printable(text: str) -> str:
    if len(text) > MAX_VALUE_CHARS:
        text = f"{text[:MAX_VALUE_CHARS]}…"
    if text.isprintable():
        return text
    return "".join(
        sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in text
    )
