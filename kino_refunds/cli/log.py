"""What a command says beside its answer: on standard error, and as one line where logs are collected."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any, Final

from kino_refunds.cli.tree import command_words

if TYPE_CHECKING:
    from collections.abc import Sequence

_noted: Final[dict[str, Any]] = {}


def note(**facts: object) -> None:
    """Keep facts for the command's line in the log: who ran it, and how much it did."""
    _noted.update(facts)


def forget() -> None:
    """Forget what was noted of the command before."""
    _noted.clear()


def begin() -> None:
    """Prepare the logs of a command that is about to run, and warn of variables that are no settings.

    Not before: help, completion and usage errors need neither, and both take a while to load.
    """
    from kino_refunds.cli.output import escaped, tell
    from kino_refunds.settings import unknown_names

    if _noted:
        # So the log lines of the rooms name the person too.
        import structlog

        structlog.contextvars.bind_contextvars(**_noted)
    for name, advice in unknown_names():
        tell(escaped(f"warning: {name} is not a setting and is ignored; {advice}"))


def write_line(arguments: Sequence[str], code: int, took_s: float) -> None:
    """Write one canonical line for the command, where logs are collected; at a terminal the answer is enough."""
    if os.environ.get("KINO_LOG_FORMAT") != "json":
        return
    import structlog

    logger = structlog.wrap_logger(
        structlog.PrintLogger(sys.stderr),
        processors=[structlog.processors.TimeStamper(fmt="iso", utc=True), structlog.processors.JSONRenderer()],
        wrapper_class=structlog.BoundLogger,
    )
    words = " ".join(command_words(arguments))
    logger.info("command", command=words, exit_code=code, took_ms=round(took_s * 1000), **_noted)
