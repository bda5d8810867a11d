"""What is settled in a run: accounts, jobs whose charges are open, and the events that end them."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from typing import Any, TypeAlias, TypeVar

import sqlalchemy as sa

from kino_refunds.db.engine import create_engine
from kino_refunds.dev.embedded import DATABASE, Servers
from kino_refunds.events.schema import ErrorOrigin, Event, JobCompleted, JobFailed, JobTimedOut
from kino_refunds.ledger import ChargeRequest, Grant, LotClass, grant_lots, open_charges

ACCOUNTS = 5_000
"""Enough that two batches rarely share a lot; what they all share is measured by the hot account."""
HOT_ACCOUNT = "account-hot"
CREDITS_A_JOB = 2
CHUNK = 1_000

Maker: TypeAlias = Callable[[str, int], Event]
Item = TypeVar("Item")


def grant(servers: Servers, database: str = DATABASE) -> None:
    """Two lots an account; the first is small, so that some charges span both. The hot account has one."""
    soon = datetime.now(UTC) + timedelta(days=30)
    grants = [Grant("pack-hot", HOT_ACCOUNT, 100_000_000, LotClass.PURCHASED)]
    for number in range(ACCOUNTS):
        account_id = f"account-{number}"
        grants.append(Grant(f"welcome-{number}", account_id, 3, LotClass.PROMOTIONAL, soon, priority=50))
        grants.append(Grant(f"pack-{number}", account_id, 10_000_000, LotClass.PURCHASED))
    with engine_of(servers, "kino_product", database) as engine, engine.begin() as connection:
        grant_lots(connection, grants)


def open_jobs(servers: Servers, name: str, count: int, *, hot: bool = False) -> list[str]:
    """Open a charge for each of `count` new jobs; return their ids."""
    deadline = datetime.now(UTC) + timedelta(hours=1)
    # Digests, because real ids are random too: neighbours in time are no neighbours in an index.
    jobs = [f"{name}-{digest(f'{name}-{number}')}" for number in range(count)]
    with engine_of(servers, "kino_product") as engine:
        for chunk in chunks(jobs):
            with engine.begin() as connection:
                open_charges(
                    connection,
                    [
                        ChargeRequest(job_id, HOT_ACCOUNT if hot else account_of(job_id), CREDITS_A_JOB, deadline)
                        for job_id in chunk
                    ],
                )
    with servers.postgres.connect(DATABASE) as superuser:
        # As autovacuum would a minute later, and then for some contestants only: plans of a young ledger are no
        # contestant's doing.
        superuser.execute(b"ANALYZE kino.charge, kino.charge_line, kino.credit_lot, kino.settlement, kino.transfer")
        superuser.execute(b"ANALYZE kino.inbox_event, kino.pending_event")
    return jobs


def account_of(job_id: str) -> str:
    """Name the account whose job this is: any of them, and always the same."""
    return f"account-{zlib.crc32(job_id.encode()) % ACCOUNTS}"


def refund(job_id: str, number: int) -> Event:
    """Every job fails on our side."""
    return JobFailed.of(error={"code": f"gpu_{number % 7}", "origin": ErrorOrigin.PLATFORM}, **_common(job_id))


def mixture(job_id: str, number: int) -> Event:
    """Eight in ten complete, one fails, one times out."""
    match number % 10:
        case 0:
            return refund(job_id, number)
        case 5:
            return JobTimedOut.of(**_common(job_id))
        case _:
            return JobCompleted.of(**_common(job_id))


def chunks(items: Sequence[Item], size: int = CHUNK) -> Iterator[Sequence[Item]]:
    """Cut `items` into pieces of `size`, the last one shorter."""
    for start in range(0, len(items), size):
        yield items[start : start + size]


@contextmanager
def engine_of(servers: Servers, role: str = "kino_worker", database: str = DATABASE) -> Iterator[sa.Engine]:
    """Give an engine for `role`, and close its connections."""
    engine = create_engine(servers.database_url(role=role, database=database), application_name="kino-bench")
    try:
        yield engine
    finally:
        engine.dispose()


def digest(text: str) -> str:
    """Sixteen characters that look random."""
    return sha256(text.encode()).hexdigest()[:16]


def _common(job_id: str) -> dict[str, Any]:
    return {"id": digest(job_id), "source": "bench", "time": datetime.now(UTC), "job_id": job_id}
