"""Options that several commands share, and the connections they open."""

from __future__ import annotations

import getpass
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, date, datetime, timedelta
from enum import Enum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kino_refunds.cli import log
from kino_refunds.cli.exit_codes import FINDING
from kino_refunds.cli.output import escaped, tell
from kino_refunds.errors import DependencyAway

if TYPE_CHECKING:
    from kino_refunds.db.engine import Connection, Engine
    from kino_refunds.intake.gate import Gate
    from kino_refunds.reconciliation.repairs import Workshop
    from kino_refunds.settings import Settings

READING_S = 600
"""How long a report may read, in seconds: a large ledger takes a minute or two. Nobody waits for it."""
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


@contextmanager
def ledger_engine(settings: Settings | None = None) -> Iterator[Engine]:
    """Give an engine for KINO_DATABASE_URL; raises BadSettings if it is not set."""
    from kino_refunds.settings import load_settings

    settings = settings or load_settings()
    with _engine(settings.require_database_url(), settings) as engine:
        yield engine


@contextmanager
def ledger_connection(settings: Settings | None = None) -> Iterator[Connection]:
    """Give a connection to KINO_DATABASE_URL in a transaction that is committed at the end."""
    with ledger_engine(settings) as engine, engine.begin() as connection:
        yield connection


@contextmanager
def reading_engine() -> Iterator[Engine]:
    """Give an engine for KINO_DATABASE_URL whose statements may read the whole ledger: up to READING_S seconds."""
    from kino_refunds.settings import load_settings

    settings = load_settings()
    long = {"statement_timeout_ms": READING_S * 1_000, "transaction_timeout_ms": READING_S * 1_000}
    settings = settings.model_copy(update={"session_limits": settings.session_limits.model_copy(update=long)})
    with ledger_engine(settings) as engine:
        yield engine


@contextmanager
def reading_connection() -> Iterator[Connection]:
    """Give a connection of `reading_engine`, in a transaction."""
    with reading_engine() as engine, engine.begin() as connection:
        yield connection


@contextmanager
def product_connection() -> Iterator[Connection]:
    """Give a connection for the product's work, to KINO_PRODUCT_DATABASE_URL or else to KINO_DATABASE_URL.

    Its transaction is committed at the end. Raises DependencyAway that names the setting if the server is away or the
    login has no right: a worker's login may not open charges.
    """
    from kino_refunds.db.faults import Meaning, explain
    from kino_refunds.settings import PRODUCT_DATABASE_URL, load_settings

    settings = load_settings()
    url, name = settings.require_product_database_url()
    try:
        with _engine(url, settings) as engine, engine.begin() as connection:
            yield connection
    except Exception as error:
        match explain(error, setting=name):
            case Meaning.AWAY, text:
                raise DependencyAway(text) from error
            case Meaning.NO_RIGHT, text:
                need = f"the product's work needs {PRODUCT_DATABASE_URL}, a login of kino_product"
                raise DependencyAway(f"{text}; {need}") from error
            case _:
                raise


@contextmanager
def repair_shop() -> Iterator[Workshop]:
    """Give what a repair works with; reversals go to KINO_ONCALL_DATABASE_URL or else to KINO_DATABASE_URL.

    Raises DependencyAway that names the setting if a server is away or the login has no right: a worker's login may not
    reverse charges.
    """
    from contextlib import nullcontext

    from kino_refunds.db.faults import Meaning, explain
    from kino_refunds.reconciliation.adapters import source_of
    from kino_refunds.reconciliation.repairs import Workshop
    from kino_refunds.settings import DATABASE_URL, ONCALL_DATABASE_URL, load_settings
    from kino_refunds.settlement.rules import rules_of

    settings = load_settings()
    url, _ = settings.require_oncall_database_url()
    try:
        with (
            _engine(settings.require_database_url(), settings) as worker,
            _engine(url, settings) as oncall,
            nullcontext() if settings.job_source is None else source_of(settings) as source,
        ):
            yield Workshop(worker=worker, oncall=oncall, rules=rules_of(settings), settings=settings, source=source)
    except Exception as error:
        match explain(error, setting=DATABASE_URL):
            case Meaning.NO_RIGHT, text:
                need = f"a reversal needs {ONCALL_DATABASE_URL}, a login of kino_oncall; all else a worker's login"
                raise DependencyAway(f"{text}; {need}") from error
            case _:
                raise


@contextmanager
def _engine(url: str, settings: Settings) -> Iterator[Engine]:
    from kino_refunds.db.engine import create_engine

    engine = create_engine(url, limits=settings.session_limits, application_name="kino-cli")
    try:
        yield engine
    finally:
        engine.dispose()


def warn_if_paused(gate: Gate) -> None:
    """Print on standard error that intake is paused, for a command that settles in spite of it."""
    if gate.paused:
        text = f"warning: intake is paused by {gate.actor} ({gate.reason}); this command settles events in spite of it"
        tell(escaped(text))


class Edge(Enum):
    """Which end of a day is meant by a day that is typed in place of an instant."""

    START = "start"
    END = "end"


_TIME_EXAMPLE = "2026-01-31T12:00:00Z"


def read_time(text: str, edge: Edge) -> datetime:
    """Read an instant from the command line and return it in UTC.

    Raises a usage error for a day without a time and for a time without an offset, with what to type instead: taken as
    UTC midnight, a customer's credits would expire a day early. `edge` is the end of the day that is offered.
    """
    try:
        day = date.fromisoformat(text)
        if edge is Edge.END:
            day += timedelta(days=1)
    except (ValueError, OverflowError):
        pass
    else:
        where = "begins" if edge is Edge.START else "ends"
        raise typer.BadParameter(f"{text!r} is a day, not an instant; in UTC it {where} at {day}T00:00:00Z: type that")
    try:
        value = datetime.fromisoformat(text)
        if value.utcoffset() is None:
            written = value.isoformat()
            raise typer.BadParameter(f"{text!r} has no offset; type {written}Z for UTC, or for example {written}+01:00")
        return value.astimezone(UTC)
    except (ValueError, OverflowError) as error:
        raise typer.BadParameter(f"{text!r} is not a time; for example {_TIME_EXAMPLE}") from error


def written(instant: datetime) -> str:
    """Write an instant as it can be typed again: RFC 3339, in UTC."""
    return instant.astimezone(UTC).isoformat().replace("+00:00", "Z")


AlthoughPast = Annotated[bool, typer.Option("--although-past", help="Take an instant that lies in the past.")]


def require_future(name: str, instant: datetime, *, now: datetime, although_past: bool) -> None:
    """Raise a usage error if an instant has passed by the ledger's clock, unless `although_past` is set."""
    if instant <= now and not although_past:
        raise typer.BadParameter(
            f"{name} {written(instant)} lies in the past (it is {written(now)}): add --although-past if you mean it"
        )


def require_past(name: str, instant: datetime, *, now: datetime) -> None:
    """Raise a usage error if an instant has not come yet by the ledger's clock."""
    if instant > now:
        raise typer.BadParameter(f"{name} {written(instant)} lies in the future (it is {written(now)})")


TRIPWIRE = "tripwire"
"""As in `intake/gate.py`, which takes a while to load."""

Yes = Annotated[bool, typer.Option("--yes", help="Do not ask; needed where there is no terminal.")]


def _login() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user often has no name
        return f"uid {os.getuid()}"


def said(text: str) -> str:
    """Return the text; raises a usage error if it is blank, because the next person has to find a reason there."""
    if not text.strip():
        raise typer.BadParameter("it is empty; the next person has to find a reason here")
    return text


def _person(name: str) -> str:
    if name == TRIPWIRE:
        raise typer.BadParameter(f"{TRIPWIRE} is not a person: a pause by the tripwire ends automatically")
    # For the command's line in the log.
    log.note(actor=name)
    return said(name)


def _by(kept: str) -> Any:
    text = f"Who does this; {kept}."
    return typer.Option("--by", help=text, default_factory=_login, show_default="your login", callback=_person)


By = Annotated[str, _by("kept with it")]
ByInTheLog = Annotated[str, _by("in the log, where each command has a line")]
"""For commands that write no row that could name the person."""


def require_terminal() -> None:
    """Raise a usage error if there is no terminal to ask on."""
    if not sys.stdin.isatty():
        raise typer.BadParameter("there is no terminal to ask on: add --yes if you mean it")


def confirm(question: str, *, yes: bool) -> None:
    """Ask before an act that others notice; raises a usage error if there is no terminal to ask on."""
    if yes:
        return
    require_terminal()
    if not typer.confirm(question, err=True):
        tell("nothing was done")
        raise typer.Exit(FINDING)
