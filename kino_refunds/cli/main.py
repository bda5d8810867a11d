"""`kino-refunds`: the command line. Commands are thin; what they do lives in the rooms beside."""

from __future__ import annotations

import io
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import typer

from kino_refunds.cli import log
from kino_refunds.cli.exit_codes import INTERRUPTED, USAGE, explained
from kino_refunds.cli.output import escaped, print_error, tell
from kino_refunds.cli.tree import Root
from kino_refunds.errors import ServerFailed

app = typer.Typer(
    name="kino-refunds",
    cls=Root,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def kino_refunds() -> None:
    """Return the credits of failed generations automatically.

    Settings are KINO_* variables; see the README.

    Example: kino-refunds status
    """


LAST_WORDS_MAX, LAST_WORD_LENGTH = 5, 160
"""How much of the log of a server or worker that ended is shown: lines, and characters a line."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command and exit: 0 fine, 1 a finding, 2 usage, 3 a dependency is away, 130 interrupted."""
    _make_streams_usable()
    log.forget()
    started = time.monotonic()
    code = _run(arguments, begin=log.begin)
    log.write_line(sys.argv[1:] if arguments is None else arguments, code, time.monotonic() - started)
    sys.exit(code)


def _make_streams_usable() -> None:
    """Replace streams that the parent process closed (`>&-`): Python has None there, and libraries write to it.

    The others are made to accept every character.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open(mode, encoding="utf-8"))  # noqa: SIM115 - for as long as we live
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A terminal may lack a character of an id: it is shown escaped, and the command goes on.
            stream.reconfigure(errors="backslashreplace")


def _run(arguments: Sequence[str] | None, *, begin: Callable[[], None] | None = None) -> int:
    """Run a command and return its exit code; `begin` is called once its arguments are known to be right."""
    for argument in sys.argv[1:] if arguments is None else arguments:
        if any(c == "\0" or "\ud800" <= c <= "\udfff" for c in argument):
            print_error(f"{argument!a} is not text: write it in UTF-8, without NUL")
            return USAGE
    try:
        result: Any = app(args=arguments, standalone_mode=False, obj=begin)
    except typer.Abort:  # Ctrl-C or Ctrl-D at a question
        tell("\ninterrupted")
        return INTERRUPTED
    except KeyboardInterrupt:  # before typer looks out for it
        tell("interrupted")
        return INTERRUPTED
    except typer.TyperException as error:  # typer carries a click of its own: click's classes never match
        _show_usage_error(error)
        return USAGE
    except Exception as error:
        if (known := explained(error)) is None:
            raise
        code, text = known
        said = text.splitlines() if isinstance(error, ServerFailed) else [text]
        print_error(said[0])
        for line in said[1:][-LAST_WORDS_MAX:]:
            tell(escaped(f"  {line[:LAST_WORD_LENGTH]}"), style="dim")
        return code
    if result == INTERRUPTED:  # what typer makes of a KeyboardInterrupt
        tell("interrupted")
    return result if isinstance(result, int) else 0


def _show_usage_error(error: Any) -> None:
    """Print one line that names the usage error; for a command without any argument, print its help."""
    message, context = error.format_message(), getattr(error, "ctx", None)
    if context is not None and message == context.get_help():
        tell(message)
    else:
        command = context.command_path if context is not None else "kino-refunds"
        print_error(f"{message.rstrip('.')}; see {command} --help")
