"""What one session does by itself: charges opened per second, and a ledger that grows from empty.

    python -m tests.benchmarks.in_process

No worker and no queue: the calls that a product and a worker make, one after the other, each timed from its first
statement to its COMMIT. `make bench` has these lines too; alone they can be run on another commit beside this one.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from kino_refunds.db.migrate import migrate
from kino_refunds.demo.trace_run import scratch
from kino_refunds.dev.embedded import Servers
from kino_refunds.ledger import ChargeRequest, open_charges
from kino_refunds.settings import Settings
from kino_refunds.settlement.batch import settle_batch
from kino_refunds.settlement.deliveries import delivery_of
from kino_refunds.settlement.rules import rules_of
from tests.benchmarks.backlog import CREDITS_A_JOB, account_of, chunks, digest, engine_of, grant, refund

CALL = 500
"""Charges a call where they come in calls, and events a batch."""
GROWING = "bench_growing"
SHARE = 10
"""The first and the last of so many equal parts are compared."""
OLD_TABLES = ("account", "credit_lot", "charge", "charge_line", "open_charge", "settlement", "transfer", "inbox_event")


@dataclass(frozen=True)
class Opening:
    """Charges opened per second, one a transaction and so many a call."""

    one_per_second: float
    call_per_second: float


@dataclass(frozen=True)
class Growing:
    """Refunds per second while the ledger grows, over all and in the last part beside the first."""

    per_second: float
    last_to_first: float


def opening(servers: Servers, *, one: int, many: int) -> Opening:
    """Open charges for accounts that `grant` has filled."""
    deadline = datetime.now(UTC) + timedelta(hours=1)

    def requests(name: str, count: int) -> list[ChargeRequest]:
        jobs = [f"{name}-{digest(f'{name}-{number}')}" for number in range(count)]
        return [ChargeRequest(job_id, account_of(job_id), CREDITS_A_JOB, deadline) for job_id in jobs]

    def per_second(calls: Sequence[Sequence[ChargeRequest]]) -> float:
        started = time.monotonic()
        for each in calls:
            with engine.begin() as connection:
                open_charges(connection, each)
        return sum(map(len, calls)) / (time.monotonic() - started)

    with engine_of(servers, "kino_product") as engine:
        per_second([requests("warm", CALL)] * 2)
        alone = per_second([[request] for request in requests("alone", one)])
        return Opening(alone, per_second(list(chunks(requests("called", many), CALL))))


def growing(servers: Servers, events: int) -> Growing:
    """Charge and refund batch after batch in a database that began empty, which nobody analyzes meanwhile."""
    servers.create_database(GROWING)
    migrate(servers.database_url(role="kino_owner", database=GROWING))
    with servers.postgres.connect(GROWING) as superuser:
        for table in OLD_TABLES:
            superuser.execute(f"ALTER TABLE kino.{table} SET (autovacuum_enabled = off)".encode())
    grant(servers, GROWING)
    deadline = datetime.now(UTC) + timedelta(hours=1)
    rules = rules_of(Settings.model_construct())
    took = []
    with engine_of(servers, "kino_product", GROWING) as product, engine_of(servers, database=GROWING) as worker:
        for first in range(0, events, CALL):
            jobs = [f"grows-{digest(f'grows-{number}')}" for number in range(first, first + CALL)]
            with product.begin() as connection:
                open_charges(connection, [ChargeRequest(j, account_of(j), CREDITS_A_JOB, deadline) for j in jobs])
            deliveries = [delivery_of(refund(job_id, number)) for number, job_id in enumerate(jobs)]
            started = time.monotonic()
            settled = settle_batch(worker, deliveries, rules)
            took.append(time.monotonic() - started)
            assert len(settled) == CALL, "every event of the batch was decided"
    part = max(1, len(took) // SHARE)
    return Growing(len(took) * CALL / sum(took), sum(took[:part]) / sum(took[-part:]))


def told(opened: Opening, grown: Growing) -> dict[str, float]:
    """Print both, and return them for the last line."""
    print(f"charges opened, one a transaction  {opened.one_per_second:>10,.0f} per second")
    print(f"charges opened, {CALL} a call         {opened.call_per_second:>10,.0f} per second")
    print(
        f"refunds, a ledger that grows       {grown.per_second:>10,.0f} per second,"
        f" last tenth {grown.last_to_first:.2f}x first"
    )
    return {
        "opened_one_per_second": round(opened.one_per_second),
        "opened_call_per_second": round(opened.call_per_second),
        "growing_per_second": round(grown.per_second),
        "growing_last_to_first": round(grown.last_to_first, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=int, default=20_000, help="events of the growing ledger, charges in calls")
    parser.add_argument("--single", type=int, default=1_000, help="charges where each has its own transaction")
    options = parser.parse_args()
    with scratch() as servers:
        grant(servers)
        opened = opening(servers, one=options.single, many=options.events)
        print(json.dumps(told(opened, growing(servers, options.events))))


if __name__ == "__main__":
    main()
