"""`migrate` and `dev`: the database's schema, and everything at once on this machine."""

from __future__ import annotations

import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Annotated

import sqlalchemy as sa
import typer
from alembic.util import CommandError

from kino_refunds.cli.options import AsJson
from kino_refunds.cli.output import console, print_json
from kino_refunds.db.migrate import migrate as migrate_database
from kino_refunds.embedded import servers
from kino_refunds.errors import BadSettings, DependencyAway
from kino_refunds.processes import settings_for, start_beat, start_worker
from kino_refunds.settings import PREFIX, Settings, load_settings, redacted

LOOK_EVERY_S = 0.5
_ROLES_MISSING = frozenset({"42501", "42704"})
"""No right to create the schema; no such role to grant to."""


def register(app: typer.Typer) -> None:
    """Add this room's commands."""
    app.command("migrate")(migrate)
    app.command("dev")(dev)


def exports(settings: Mapping[str, str]) -> str:
    """Write what a shell must read (`. FILE`) so that `kino-refunds` there is this one, with these settings."""
    # What another ledger's file left in that shell (the demo's, then `dev`'s) must not be mixed with these.
    others = sorted({f"{PREFIX}{name.upper()}" for name in Settings.model_fields} - settings.keys())
    lines = [f"unset {' '.join(others)}\n"]
    lines += [f"export {name}={shlex.quote(value)}\n" for name, value in settings.items()]
    return "".join([*lines, f'export PATH={shlex.quote(str(Path(sys.executable).parent))}:"$PATH"\n'])


STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def stopping() -> Iterator[threading.Event]:
    """Give an event that Ctrl-C, SIGTERM and a closed terminal set while the block runs, instead of ending us."""
    told = threading.Event()

    def tell(_signal: int, _frame: FrameType | None) -> None:
        told.set()

    with _handled(STOPS, tell):
        yield told


@contextmanager
def interrupted_by_signals() -> Iterator[None]:
    """While the block runs SIGTERM and a closed terminal are as Ctrl-C: what was started is put away in order."""

    def interrupt(_signal: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    with _handled(STOPS[1:], interrupt):
        yield


@contextmanager
def _handled(numbers: Iterable[signal.Signals], handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in numbers}
    for number, old in before.items():
        if old is not signal.SIG_IGN:  # under nohup a closed terminal is nobody's business
            signal.signal(number, handler)
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def migrate(as_json: AsJson = False) -> None:
    """Bring the database to the schema of this build.

    Connects to KINO_MIGRATION_DATABASE_URL, as kino_owner. The roles must exist: a superuser
    runs kino_refunds/db/roles.sql in that database once.

    Example: kino-refunds migrate
    """
    url = load_settings().require_migration_database_url()
    try:
        before, after = migrate_database(url)
    except CommandError as error:
        raise BadSettings(f"{redacted(url)}: {error}; is this build older than that database's schema?") from error
    except sa.exc.OperationalError as error:
        text = str(error.orig).partition("\n")[0]
        raise DependencyAway(
            f"Postgres (KINO_MIGRATION_DATABASE_URL): {text}; check that it runs and can be reached"
        ) from error
    except sa.exc.ProgrammingError as error:
        advice = "is kino.alembic_version there what a migration left?"
        if getattr(error.orig, "sqlstate", None) in _ROLES_MISSING:
            advice = "run kino_refunds/db/roles.sql there as a superuser first, and connect as kino_owner"
        raise DependencyAway(
            f"{redacted(url)}: {str(error.orig).partition(chr(10))[0]}; {advice}; nothing was changed"
        ) from error
    if as_json:
        print_json({"before": before, "after": after})
    elif before == after:
        console.print(f"the schema is at {after}, nothing to do")
    else:
        console.print(f"the schema was at {before or 'nothing'} and is at {after} now")


def dev(
    data_dir: Annotated[Path, typer.Option(help="Where the data is kept across restarts.")] = Path(".kino-dev"),
) -> None:
    """Run servers, worker and beat here until Ctrl-C.

    Postgres and Valkey are real, on free loopback ports; the data is kept for the next time.

    Example: kino-refunds dev --data-dir /tmp/kino
    """
    with stopping() as stop, servers(data_dir, log=console.print) as running:
        migrate_database(running.database_url(role="kino_owner"))
        # Nobody but the events tells a development ledger how jobs ended.
        settings = settings_for(running, KINO_JOB_SOURCE="none")
        environment_file = running.data_dir / "env"
        environment_file.write_text(exports(settings), encoding="utf-8")
        worker = start_worker(settings)
        beat = start_beat(settings, running.data_dir / "beat-schedule")
        try:
            for name, value in settings.items():
                console.print(f"{name}={value}", soft_wrap=True)
            console.print(f"in another terminal: . {shlex.quote(str(environment_file))}", soft_wrap=True)
            while not stop.wait(LOOK_EVERY_S):
                worker.require_alive()
                beat.require_alive()
        finally:
            console.print("stopping")
            beat.stop()
            worker.stop()
    console.print(f"stopped; the data is kept in {data_dir}")
