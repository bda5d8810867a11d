"""`dev`: servers, worker and beat on this machine."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from kino_refunds.cli.output import escaped, say, tell
from kino_refunds.cli.signals import stopping
from kino_refunds.errors import BadSettings

LOOK_EVERY_S = 0.5


def exports(settings: Mapping[str, str]) -> str:
    """Return the lines that make a shell (`. FILE`) use this `kino-refunds` and these settings."""
    from kino_refunds.settings import PREFIX, Settings

    # A shell may hold the settings of another ledger (the demo's, then `dev`'s); they must not mix with these.
    others = sorted({f"{PREFIX}{name.upper()}" for name in Settings.model_fields} - settings.keys())
    lines = [f"unset {' '.join(others)}\n"]
    lines += [f"export {name}={shlex.quote(value)}\n" for name, value in settings.items()]
    return "".join([*lines, f'export PATH={shlex.quote(str(Path(sys.executable).parent))}:"$PATH"\n'])


def _folder(text: str) -> Path:
    """Return a folder. Raises a usage error for an empty name (an unset variable): it would mean the working folder."""
    if not text:
        raise typer.BadParameter("it is empty; name a folder")
    return Path(text)


def dev(
    data_dir: Annotated[
        Path, typer.Option(help="Where the data is kept across restarts.", parser=_folder, metavar="FOLDER")
    ] = Path(".kino-dev"),
) -> None:
    """Run servers, worker and beat here until Ctrl-C.

    Postgres and Valkey are real servers on free loopback ports; the data is kept for the next run. Worker and beat
    use the KINO_* settings of this shell, except the servers' addresses. A worker or beat that ends is restarted.

    Example: kino-refunds dev --data-dir /tmp/kino
    """
    from kino_refunds.desk.schema import migrate_schema
    from kino_refunds.dev.embedded import servers
    from kino_refunds.dev.processes import RestartingProcess, passed_on, settings_for, start_beat, start_worker
    from kino_refunds.reconciliation.adapters import source_of
    from kino_refunds.settings import load_settings

    chosen = load_settings()
    if chosen.job_source is not None:
        with source_of(chosen):  # a wrong source is an error here, once, instead of in every sweep
            pass
    others = passed_on()
    with stopping() as stop, servers(data_dir, log=say) as running:
        schema = migrate_schema(running.database_url(role="kino_owner"))
        if schema.newer:
            raise BadSettings(
                f"{data_dir}: its schema is at {schema.after}, of a newer build; use that build, or another folder"
            )
        addresses = settings_for(running)
        settings = addresses | {"KINO_JOB_SOURCE": "none"} | others
        environment_file = running.data_dir / "env"
        _write_private(environment_file, exports(settings))
        with ExitStack() as stack:
            kept = []
            for start in (
                lambda: start_worker(settings),
                lambda: start_beat(settings, running.data_dir / "beat-schedule"),
            ):
                kept.append(RestartingProcess(start, _tell))
                stack.callback(kept[-1].stop)
            stack.callback(say, "stopping")
            _introduce(addresses, others, environment_file)
            while not stop.wait(LOOK_EVERY_S):
                running.postgres.require_alive()
                running.redis.require_alive()
                for each in kept:
                    each.look()
    say(f"stopped; the data is kept in {data_dir}")


def _introduce(addresses: Mapping[str, str], others: Mapping[str, str], environment_file: Path) -> None:
    """Print the addresses and which settings of this shell are used; never their values: one may be a secret."""
    for name, value in addresses.items():
        say(f"{name}={value}", whole=True)
    if ignored := [name for name in addresses if os.environ.get(name) not in {None, "", addresses[name]}]:
        say(f"not used: {', '.join(ignored)} of this shell; dev has servers of its own", whole=True)
    if others:
        say(f"taken from this shell: {', '.join(others)}", whole=True)
    if "KINO_JOB_SOURCE" not in others:
        text = "job source: none, KINO_JOB_SOURCE is not set; a job without an event is refunded once it is overdue"
        say(text, whole=True)
    say(f"in another terminal: . {shlex.quote(str(environment_file))}", whole=True)


def _tell(text: str) -> None:
    tell(escaped(text))


def _write_private(file: Path, text: str) -> None:
    """Write a file that only its owner reads: settings may hold a token or a password."""
    file.touch(mode=0o600)
    file.chmod(0o600)
    file.write_text(text, encoding="utf-8")
