"""What the rivals have in common: a queue of their own, and a real process that works on it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import redis

from kino_refunds.dev.processes import die_with_parent, environment_of
from kino_refunds.events.schema import Event

ROOT = Path(__file__).resolve().parents[2]


class Left(NamedTuple):
    """What of a backlog is still on its queue, and what is not finished with, wherever it is."""

    queued: int
    unfinished: int


class Rival(NamedTuple):
    """`python -m command` settles what `publish` has queued; `left` counts what it has still to do."""

    name: str
    command: Sequence[str]
    publish: Callable[[str, Sequence[Event]], None]
    left: Callable[[redis.Redis], Left]


@contextmanager
def running(command: Sequence[str], settings: Mapping[str, str], log_file: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run `python -m command` with these KINO_* variables; it ends with the block, or with us."""
    with log_file.open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", *command],
            # Forked pools look for this package by its path, not by the folder they were started in.
            env=environment_of(settings) | {"PYTHONPATH": str(ROOT)},
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            preexec_fn=die_with_parent,  # noqa: PLW1509 - one system call, before exec
        )
    try:
        yield process
    finally:
        # All at once, children included: nothing is in their hands any more, or the bench has failed anyway.
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
