"""Settings: whether every name is known and every value can be read, and whether there is a job source."""

from __future__ import annotations

from collections.abc import Iterator

from kino_refunds.doctor.findings import Finding
from kino_refunds.errors import BadSettings
from kino_refunds.reconciliation.adapters import HOW_TO_CHOOSE, NONE_CHOSEN, NOT_CHOSEN, source_of
from kino_refunds.settings import Settings, unknown_names

SETTINGS = "settings"
JOB_SOURCE = "job source"


def check_settings(settings: Settings) -> Iterator[Finding]:
    """Check the environment, without connecting to anything."""
    yield from list(_unknown()) or [Finding(SETTINGS, "ok", "every KINO_* variable is known and can be read")]
    yield from _job_source(settings)


def unreadable(error: BadSettings) -> Finding:
    """Return a finding that names the wrong settings, with an example of a right one."""
    found, _, example = str(error).partition("; for example ")
    return Finding(
        SETTINGS,
        "fail",
        found,
        f"for example {example}"
        if example
        else "correct it; the settings table in deploy/README.md says what each is for",
    )


def _unknown() -> Iterator[Finding]:
    for name, advice in unknown_names():
        yield Finding(SETTINGS, "warn", f"{name} is not a setting and is ignored", advice)


def _job_source(settings: Settings) -> Iterator[Finding]:
    if settings.job_source is None:
        # Reported under `settings`: a job source that was not chosen is a missing setting, exit code 2.
        yield Finding(SETTINGS, "fail", NOT_CHOSEN, HOW_TO_CHOOSE)
        return
    try:
        with source_of(settings) as source:
            pass
    except BadSettings as error:
        yield unreadable(error)
        return
    if source is None:
        # A warning while it is set: in the incident it gave away 583 credits, and every line of the doctor was `ok`.
        yield Finding(JOB_SOURCE, "warn", NONE_CHOSEN, HOW_TO_CHOOSE)
    else:
        yield Finding(JOB_SOURCE, "ok", f"{settings.job_source}: is asked about overdue jobs")
