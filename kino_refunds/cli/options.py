"""Options that several commands share, and the connections they open."""

from __future__ import annotations

import getpass
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Annotated

import sqlalchemy as sa
import typer

from kino_refunds.cli.exit_codes import FINDING
from kino_refunds.cli.output import errors, shown
from kino_refunds.db.engine import create_engine
from kino_refunds.settings import Settings, load_settings
from kino_refunds.settlement.gate import TRIPWIRE, read_gate

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


@contextmanager
def ledger_engine(settings: Settings | None = None) -> Iterator[sa.Engine]:
    """Give an engine for KINO_DATABASE_URL; raises BadSettings if it is not set."""
    settings = settings or load_settings()
    url = settings.require_database_url()
    engine = create_engine(url, limits=settings.session_limits, application_name="kino-cli")
    try:
        yield engine
    finally:
        engine.dispose()


@contextmanager
def ledger_connection() -> Iterator[sa.Connection]:
    """Give a connection to KINO_DATABASE_URL; what is done in it is committed at the end."""
    with ledger_engine() as engine, engine.begin() as connection:
        yield connection


def warn_if_paused(connection: sa.Connection) -> None:
    """Say on standard error that intake is paused, where a person is about to settle something all the same."""
    gate = read_gate(connection)
    if gate.paused:
        text = f"warning: intake is paused by {gate.actor} ({gate.reason}); what you run settles all the same"
        errors.print(shown(text), soft_wrap=True)


def read_time(text: str | None) -> datetime | None:
    """Read an instant from the command line; one without an offset is taken as UTC."""
    if text is None:
        return None
    try:
        value = datetime.fromisoformat(text)
        value = value.replace(tzinfo=UTC) if value.utcoffset() is None else value
        return value.astimezone(UTC)
    except (ValueError, OverflowError) as error:
        raise typer.BadParameter(f"{text!r} is not a time; for example 2026-01-31T12:00:00Z") from error


Yes = Annotated[bool, typer.Option("--yes", help="Do not ask; needed where there is no terminal.")]


def _login() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user often has no name
        return f"uid {os.getuid()}"


def said(text: str) -> str:
    """Refuse a text of blanks: whoever looks next must find a word there."""
    if not text.strip():
        raise typer.BadParameter("it is empty; say it for whoever looks next")
    return text


def _person(name: str) -> str:
    if name == TRIPWIRE:
        raise typer.BadParameter(f"{TRIPWIRE} is not a person: what it closes opens by itself")
    return said(name)


By = Annotated[
    str,
    typer.Option(
        "--by", help="Who does this; kept with it.", default_factory=_login, show_default="your login", callback=_person
    ),
]


def confirm(question: str, *, yes: bool) -> None:
    """Ask before something that others will feel; raises a usage error where nobody can answer."""
    if yes:
        return
    if not sys.stdin.isatty():
        raise typer.BadParameter("there is no terminal to ask on: add --yes if you mean it")
    if not typer.confirm(question, err=True):
        errors.print("nothing was done")
        raise typer.Exit(FINDING)
