"""The whole examination: settings first, then the servers that they lead to."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from kino_refunds.doctor.findings import bounded
from kino_refunds.doctor.on_postgres import check_postgres
from kino_refunds.doctor.on_redis import check_redis
from kino_refunds.doctor.on_settings import check_settings, unreadable
from kino_refunds.errors import BadSettings
from kino_refunds.settings import load_settings

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kino_refunds.doctor.findings import Finding


def examine() -> Iterator[Finding]:
    """Run every check and give what each found; a check that cannot be made is a finding too."""
    try:
        settings = load_settings()
    except BadSettings as error:
        yield unreadable(error)
        return
    yield from check_settings(settings)
    for check, require_url, look in (
        ("postgres", settings.require_database_url, check_postgres),
        ("redis", settings.require_redis_url, check_redis),
    ):
        try:
            url = require_url()
        except BadSettings as error:
            yield unreadable(error)
        else:
            yield from bounded(check, partial(look, url, settings))
