"""Settings: every name is known, every value can be read, and the job source could be asked."""

from __future__ import annotations

from collections.abc import Iterator

from kino_refunds.doctor.findings import Finding
from kino_refunds.errors import BadSettings
from kino_refunds.reconciliation.adapters import source_of
from kino_refunds.settings import Settings, unknown_names

SETTINGS = "settings"


def check_settings(settings: Settings) -> Iterator[Finding]:
    """Look at what the environment says, without connecting to anything."""
    yield from list(_unknown()) or [Finding(SETTINGS, "ok", "every KINO_* variable is known and can be read")]
    yield from _job_source(settings)


def unreadable(error: BadSettings) -> Finding:
    """Say which settings cannot be what they are, and how they look when they can."""
    found, _, example = str(error).partition("; for example ")
    return Finding(
        SETTINGS,
        "fail",
        found,
        f"for example {example}" if example else "correct it; the README's table of settings says what each is for",
    )


def _unknown() -> Iterator[Finding]:
    for name, nearest in unknown_names():
        advice = f"did you mean {nearest}?" if nearest else "remove it: nobody reads it"
        yield Finding(SETTINGS, "warn", f"{name} is not a setting and is ignored", advice)


def _job_source(settings: Settings) -> Iterator[Finding]:
    check = "job source"
    if settings.job_source is None:
        advice = "set KINO_JOB_SOURCE: without it a job whose event is lost stays open for good"
        yield Finding(check, "warn", "not configured", advice)
        return
    try:
        with source_of(settings) as source:
            asked = "is asked about overdue jobs" if source else "nobody is asked, an overdue job counts as timed out"
            yield Finding(check, "ok", f"{settings.job_source}: {asked}")
    except BadSettings as error:
        yield unreadable(error)
