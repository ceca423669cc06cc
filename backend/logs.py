"""Logs: one JSON object a line in production, readable lines in development, on stderr."""

import logging
import sys

import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

from backend.settings import Settings


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
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(settings.log_level)
    # Its progress on every start says nothing to an operator.
    logging.getLogger("alembic").setLevel(logging.WARNING)


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
