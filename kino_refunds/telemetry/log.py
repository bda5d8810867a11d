"""Logs: one line for each batch and command, with ids and never payloads; readable on a terminal, else JSON."""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING

import structlog

if TYPE_CHECKING:
    from kino_refunds.settings import Settings


def _to_standard_error(*_: object) -> structlog.PrintLogger:
    return structlog.PrintLogger(sys.stderr)


# Until `configure_logging` is called, lines go to standard error. By default structlog writes them to standard output,
# which is a command's answer alone: `--json | jq` must work.
if not structlog.is_configured():
    structlog.configure(logger_factory=_to_standard_error)


def configure_logging(settings: Settings) -> None:
    """Send the log lines of this program and its libraries to standard error, in one format."""
    console = settings.log_format == "console" or (settings.log_format == "auto" and sys.stderr.isatty())
    shared: list[structlog.typing.Processor] = [
        structlog.stdlib.add_logger_name,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    renderer: structlog.typing.Processor = (
        structlog.dev.ConsoleRenderer() if console else structlog.processors.JSONRenderer()
    )
    exceptions = [] if console else [structlog.processors.format_exc_info]
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *exceptions, renderer],
        )
    )
    handler.addFilter(_shortened)
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(settings.log_level.upper())
    for name in ("celery.app.trace", "celery.worker.strategy", "celery.beat"):
        # Celery would write three lines for each sweep that found nothing. A sweep that did something logs it itself.
        logging.getLogger(name).setLevel(max(root.level, logging.WARNING))
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )


def _shortened(record: logging.LogRecord) -> bool:
    """Shorten to one line what Celery logs of a Redis that is away or refuses, because its traceback says no more."""
    error = record.exc_info[1] if record.exc_info else None
    if record.name.partition(".")[0] in {"celery", "kombu"} and _is_of_redis(error):
        said = record.getMessage().partition("\n")[0]
        record.msg = f"{said} ({type(error).__name__}: {error})".partition("\n")[0]
        record.args, record.exc_info, record.exc_text = (), None, None
    return True


def _is_of_redis(error: BaseException | None) -> bool:
    # Only a record of Celery or kombu comes here, so these are loaded by then: a command does not pay for them.
    import redis  # noqa: PLC0415
    from billiard.exceptions import RestartFreqExceeded  # noqa: PLC0415
    from kombu.exceptions import KombuError  # noqa: PLC0415

    while error is not None and not isinstance(error, (redis.RedisError, KombuError, RestartFreqExceeded)):
        error = error.__cause__ or error.__context__
    return error is not None


def get_logger(name: str) -> structlog.stdlib.BoundLogger:
    """Return the logger of a module."""
    logger: structlog.stdlib.BoundLogger = structlog.get_logger(name)
    return logger


def one_line(error: BaseException) -> str:
    """Return an exception's type and the first line of its text: SQLAlchemy's second line has the parameters."""
    return f"{type(error).__name__}: {error}".partition("\n")[0]
