"""Where `kino-refunds` and `python -m kino_refunds` begin: Ctrl-C is understood before the first import is done."""

from __future__ import annotations

import os
import re
import signal
import sys

INTERRUPTED = 130
"""As in `cli/exit_codes.py`, which is not imported yet."""


def main() -> None:
    """Run the command line; see `kino_refunds.cli.main`."""
    _forget_impossible_sizes()
    before = signal.getsignal(signal.SIGINT)
    if before is not signal.SIG_IGN:  # a script's background job ignores Ctrl-C, and so must this
        signal.signal(signal.SIGINT, _leave)
    # Ctrl-C during this import must not end in a traceback. Later typer catches it, also while a command imports what
    # it runs with.
    from kino_refunds.cli.main import main as run  # noqa: PLC0415

    signal.signal(signal.SIGINT, before)
    run()


def _forget_impossible_sizes() -> None:
    """Drop a terminal's size that is none (`COLUMNS=0`): libraries take it, and then show nothing or fail."""
    for name in ("COLUMNS", "LINES"):
        if not re.fullmatch("[1-9][0-9]{0,4}", os.environ.get(name, "1")):
            del os.environ[name]


def _leave(*_: object) -> None:
    """Leave at once: nothing was started that would have to be stopped."""
    if sys.stderr is not None:
        sys.stderr.write("interrupted\n")
        sys.stderr.flush()
    os._exit(INTERRUPTED)


if __name__ == "__main__":
    main()
