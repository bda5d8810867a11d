"""What a check is given and what it gives: a scope to compare, and pages of what it found (design, part B)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import sqlalchemy as sa

    from kino_refunds.policy.document import Policy
    from kino_refunds.reconciliation.sources import JobSource
    from kino_refunds.settlement.breaks import Break

PAGE = 1_000
"""Things that a page compares: a kill costs one page, and memory stays flat."""


@dataclass(frozen=True, slots=True)
class Window:
    """What a run compares.

    `from_xid` to before `to_xid` are numbers of transactions, all of which have ended: they decide for every check that
    reads only the ledger. `since` to before `until` are the same for people, and decide for what has times only, such
    as the job source. `since` None is the beginning.
    """

    since: datetime | None
    until: datetime
    from_xid: int
    to_xid: int


@dataclass(frozen=True, slots=True)
class Scope:
    """What a check may use: sessions that may run for long, the window, and what the settings say."""

    engine: sa.Engine
    window: Window
    full: bool
    """Whether everything is compared, from the beginning, and not only what is new."""
    now: datetime
    """`kino.clock()` when the run, or its present part, began."""
    policy: Policy
    overdue_grace: timedelta
    grace: timedelta
    """What the pipeline and the relay have this long for before a difference counts."""
    source: JobSource | None = None
    """None: no job source is configured."""
    dry_run: bool = False
    """Whether nothing may be written; only `seals` writes anything of its own."""
    relay_queue: str | None = None
    matching_delay: timedelta = timedelta(minutes=15)
    """How much of the present `matching` leaves out where the source does not say how far its list is complete."""


@dataclass(frozen=True, slots=True)
class Page:
    """One page of a run, which is stored with the breaks that it found, in one transaction.

    `compared` counts what had two sides; `broken` of them have a break or more in `breaks`; the others matched.
    `not_comparable` counts what had one side only, by the reason, in words. `cursor` is where the next page begins: a
    run that was killed gets it back as it was, as JSON. `detail` is merged into what the run stores of itself, such as
    how far a source says that it is complete.
    """

    cursor: Mapping[str, Any]
    compared: int = 0
    broken: int = 0
    breaks: Sequence[Break] = ()
    not_comparable: Mapping[str, int] = field(default_factory=dict)
    detail: Mapping[str, Any] = field(default_factory=dict)
    is_comparable: bool = True
    """False ends the run as `not_comparable`: nothing is verified by it, and the next run compares the same window."""


@dataclass(frozen=True, slots=True)
class LiveBreak:
    """A break that is open, investigated or repaired, as a check looks at it again, by its key."""

    break_id: int
    kind: str
    subject: str
    """`job:JOB`, or `lot:7` and the like."""
    job_id: str | None
    charge_id: int | None


def rows_in_pages(
    engine: sa.Engine, statement: sa.TextClause, wanted: Mapping[str, Any]
) -> Iterator[Sequence[sa.Row[Any]]]:
    """Give the rows of a query, PAGE at a time, by a cursor of the server: memory is the same for any number of rows.

    The transaction reads only: it has no number, so it holds back no horizon while the pages are worked on.
    """
    with engine.connect() as connection:
        streaming = connection.execution_options(stream_results=True, max_row_buffer=PAGE)
        with streaming.execute(statement, wanted) as result:
            yield from result.partitions(PAGE)
