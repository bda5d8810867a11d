"""Start the real worker and beat as processes of their own, for `dev`, the replay and the demo."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections import deque
from typing import TYPE_CHECKING

from kino_refunds.errors import ServerFailed
from kino_refunds.settings import PREFIX

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from kino_refunds.embedded import Servers

PR_SET_PDEATHSIG = 1
STOP_DEADLINE_S = 30.0
"""Twice what a worker promises for its stop; then it is killed, and its batch is recovered."""
LOG_LINES_SHOWN = 15

_libc = ctypes.CDLL(None)


class CeleryProcess:
    """A running `celery -A workers.app …`; it ends with its owner, however that ends."""

    def __init__(self, arguments: list[str], environment: Mapping[str, str], log_file: Path | None) -> None:
        self.name = arguments[0]
        self.log_file = log_file
        log = log_file.open("ab") if log_file is not None else None
        # A session of its own: Ctrl-C in our terminal reaches us, and we stop it in order.
        self._process = subprocess.Popen(  # noqa: S603 - our own interpreter and app
            [sys.executable, "-m", "celery", "--quiet", "-A", "workers.app", *arguments],
            env=environment_of(environment),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            # `-m` looks into the working folder first: a `workers` of somebody else there is not ours.
            cwd="/",
            start_new_session=True,
            preexec_fn=die_with_parent,  # noqa: PLW1509 - one system call, before exec
        )
        if log is not None:
            log.close()

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def require_alive(self) -> None:
        """Raise ServerFailed with its last log lines if it has ended."""
        if (code := self._process.poll()) is not None:
            how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
            raise ServerFailed(f"the {self.name} {how}{self._last_words()}")

    def stop(self) -> int:
        """Stop it in order and return its exit code."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            self._process.send_signal(signal.SIGCONT)  # one that somebody has stopped would not hear the first
            try:
                self._process.wait(STOP_DEADLINE_S)
            except subprocess.TimeoutExpired:
                self.kill()
        return self._process.returncode

    def kill(self) -> None:
        """End it with SIGKILL, as a lost machine would."""
        self._process.kill()
        self._process.wait()

    def _last_words(self) -> str:
        if self.log_file is None:
            return ""
        with self.log_file.open(encoding="utf-8", errors="replace") as log:
            said = "".join(deque(log, LOG_LINES_SHOWN)).rstrip()
        return f"; it said last:\n{said}" if said else ""


def start_worker(environment: Mapping[str, str], log_file: Path | None = None) -> CeleryProcess:
    """Start a worker with its intake."""
    return CeleryProcess(["worker"], environment, log_file)


def start_beat(environment: Mapping[str, str], schedule_file: Path, log_file: Path | None = None) -> CeleryProcess:
    """Start beat; it keeps when it last did what in `schedule_file`."""
    return CeleryProcess(["beat", "--schedule", str(schedule_file)], environment, log_file)


def settings_for(servers: Servers, **more: str) -> dict[str, str]:
    """Return the KINO_* variables with which a process uses these servers."""
    return {
        "KINO_DATABASE_URL": servers.database_url(role="kino_worker"),
        "KINO_MIGRATION_DATABASE_URL": servers.database_url(role="kino_owner"),
        "KINO_REDIS_URL": servers.redis_url(),
        **more,
    }


def environment_of(settings: Mapping[str, str]) -> dict[str, str]:
    """Return this environment with exactly these KINO_* variables: scratch work never meets a real ledger."""
    return {name: value for name, value in os.environ.items() if not name.startswith(PREFIX)} | dict(settings)


def die_with_parent() -> None:
    """Have this process told to stop when the one that started it ends, however it ends; call it before exec."""
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
