"""What a run of `matching` compares: how far the job source's list is complete, and where the last run ended."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import sqlalchemy as sa

from kino_refunds.errors import BadSettings, SourceBroken, SourceUnavailable
from kino_refunds.reconciliation.asking import problem_of
from kino_refunds.reconciliation.clocks import SKEW_MAX
from kino_refunds.reconciliation.comparison import Window
from kino_refunds.reconciliation.finished import FinishedSource
from kino_refunds.reconciliation.judging import written

if TYPE_CHECKING:
    from kino_refunds.reconciliation.comparison import Scope

READ_AGAIN = timedelta(hours=24)
"""Without a promise each run begins this much before the end of the last one: rows that came late are compared then."""
FIRST_MARGIN = timedelta(days=1)
"""The first run begins this much before the oldest charge: a job may have ended by a clock that is behind ours."""
NO_SOURCE = "no job source is configured: nothing knows how jobs ended"
NO_LIST = (
    "the job source lists no finished jobs: set KINO_JOB_SOURCE_FINISHED_QUERY (sql) or KINO_JOB_SOURCE_FINISHED_URL"
)


class NoList(Exception):
    """The source's list cannot be read to its end; the text says why."""


def window(
    connection: sa.Connection,
    scope: Scope,
    *,
    wanted_since: datetime | None,
    wanted_until: datetime | None,
) -> tuple[Window, str | None]:
    """Return what a run compares, and in one sentence why it cannot be compared, if so.

    A window never passes the source's promise; without a promise it ends `scope.matching_delay` before now. Raises
    ValueError for an instant without an offset, and what Postgres raises.
    """
    asked, source, now = scope.window, scope.source, scope.now
    if source is None:
        return asked, NO_SOURCE
    if not isinstance(source, FinishedSource):
        return asked, NO_LIST
    try:
        promised = read_promise(source)
    except NoList as error:
        return asked, str(error)
    if promised is not None and promised > now + SKEW_MAX:
        return asked, f"the source says that it is complete through {written(promised)}, which is in the future"
    # A job that ended within the grace may still be settled: it is compared by the next run, and skipped by none.
    end = min(now - scope.grace, now - scope.matching_delay if promised is None else promised)
    if wanted_until is not None:
        end = min(_instant(wanted_until), end)
    begin = _begin(connection, asked, wanted_since, has_promise=promised is not None)
    if begin is None:
        return asked, "the ledger has no charge yet"
    if begin > end:
        if promised is None:
            known = f"its list is taken as complete until {written(now - scope.matching_delay)}"
        else:
            known = f"it says that its list is complete through {written(promised)}"
        return asked, f"the source is not that far: the window begins at {written(begin)}, and {known}"
    numbers = connection.execute(_NUMBERS, {"begin": begin, "end": end}).one()
    # Behind the last run without a gap, whatever the samples say: one that was above the horizon then is below it now.
    # The first run begins at the first transaction.
    from_xid = asked.from_xid if asked.since is None or wanted_since else min(asked.from_xid, numbers.from_xid)
    return Window(since=begin, until=end, from_xid=from_xid, to_xid=max(from_xid, numbers.to_xid)), None


def _begin(
    connection: sa.Connection, asked: Window, wanted_since: datetime | None, *, has_promise: bool
) -> datetime | None:
    if wanted_since is not None:
        return _instant(wanted_since)
    if asked.since is not None:  # the end of the last complete run
        return asked.since if has_promise else asked.since - READ_AGAIN
    oldest: datetime | None = connection.execute(sa.text("SELECT min(opened_at) FROM kino.charge")).scalar_one()
    return None if oldest is None else oldest - FIRST_MARGIN


def _instant(given: datetime) -> datetime:
    """Return the instant in UTC: two wall clocks of a night that sets the clock back are two instants."""
    if given.utcoffset() is None:
        raise ValueError(f"{given.isoformat()} has no offset")
    return given.astimezone(UTC)


# A sample's instant is read before its number is drawn, so a settlement of a lower number was written before that
# instant, or by a transaction that ran then.
_NUMBERS = sa.text("""
    SELECT coalesce((SELECT CAST(CAST(xid AS text) AS bigint) FROM kino.xid_clock
                     WHERE sampled_at <= :begin AND xid < kino.horizon() ORDER BY xid DESC LIMIT 1), 0) AS from_xid,
           coalesce((SELECT CAST(CAST(xid AS text) AS bigint) FROM kino.xid_clock
                     WHERE sampled_at <= :end AND xid < kino.horizon() ORDER BY xid DESC LIMIT 1), 0) AS to_xid
""")


def read_promise(source: FinishedSource) -> datetime | None:
    """Return the source's promise; raises NoList if it cannot say, or says what is no instant."""
    try:
        promised = source.complete_through()
        return None if promised is None else _instant(promised)
    except Exception as error:  # a source is foreign code
        raise NoList(reason_of(error)) from error


def reason_of(error: Exception) -> str:
    """Return in words why the source cannot be compared with; the words before the colon stay the same."""
    match error:
        case SourceUnavailable() | TimeoutError():
            what = "the source is away"
        case SourceBroken():
            what = "the source breaks its contract"
        case BadSettings():
            what = "the source's settings are wrong"
        case _:
            what = "the source failed"
    return f"{what}: {problem_of(error)}"
