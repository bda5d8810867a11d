"""What checks cost on a large ledger: time, rows a second, memory of our process, and what live settling feels of them.

    make bench-checks

A ledger of CHARGES settled charges (two transfers each, and those of the grants) is written by SQL. Each check then
runs as `kino-refunds reconcile run CHECK --full` does, in a process of its own, whose peak memory is read at its end;
then once more after 1,000 new events, incrementally. For a steady pace of PACE events a second, publish to commit is
measured alone and while the checks run over everything, in turn, in this one run.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from kino_refunds.demo.trace_run import scratch
from kino_refunds.dev.embedded import DATABASE, Servers
from kino_refunds.dev.processes import settings_for, start_worker
from kino_refunds.events.connection import redis_client
from kino_refunds.reconciliation.checks import CHECKS, check_named
from kino_refunds.reconciliation.runs import bench_for, run_check
from kino_refunds.reconciliation.windows import Wanted
from kino_refunds.settings import load_settings
from tests.benchmarks.backlog import grant, open_jobs
from tests.benchmarks.history import settled_before
from tests.benchmarks.latency import Latency, latency, publish_paced

CHARGES = 2_500_000
"""Five million transfers."""
PACE = 500.0
PACED = 10_000
"""Events of one measurement of the latency: 20 s."""
NEW = 1_000
MEMORY_MAX_MIB = 200
MIB = 1024

_PIPELINE = (
    "CREATE SCHEMA pipeline",
    """
    CREATE TABLE pipeline.job (job_id text COLLATE "C" PRIMARY KEY, state text, origin text, finished_at timestamptz,
                               account_id text, credits bigint)
    """,
    """
    INSERT INTO pipeline.job
    SELECT c.job_id, CASE s.kind WHEN 'captured' THEN 'completed' ELSE 'failed' END,
           CASE s.kind WHEN 'refunded' THEN 'platform' END, s.event_time, c.account_id, c.credits
    FROM kino.settlement s JOIN kino.charge c USING (charge_id)
    """,
    "CREATE INDEX job_finished ON pipeline.job (finished_at, job_id)",
    "ANALYZE pipeline.job",
    "GRANT USAGE ON SCHEMA pipeline TO kino_read",
    "GRANT SELECT ON pipeline.job TO kino_read",
)
_NEW_JOBS = b"""
    INSERT INTO pipeline.job
    SELECT c.job_id, 'failed', 'platform', s.event_time, c.account_id, c.credits
    FROM kino.settlement s JOIN kino.charge c USING (charge_id) WHERE c.job_id LIKE 'new-%'
"""
LISTED = 1_000_000
"""Jobs that `matching` compares: the newest ones."""
_LISTED_SINCE = """
    SELECT coalesce(min(finished_at), now()) FROM (
        SELECT finished_at FROM pipeline.job ORDER BY finished_at DESC LIMIT {listed}) AS newest
"""
_COMPARED = b"SELECT max(until) FROM kino.check_run WHERE \"check\" = 'matching' AND state = 'complete'"
_COLUMNS = "job_id, state, origin, finished_at"


def main() -> int:
    """Read the command line, write the ledger, measure, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--charges", type=int, default=CHARGES, help="settled charges before the first check")
    parser.add_argument("--child", metavar="CHECK", help=argparse.SUPPRESS)
    parser.add_argument("--incremental", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--since", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        since = None if arguments.since is None else datetime.fromisoformat(arguments.since)
        _child(arguments.child, Wanted(since=since, full=since is None and not arguments.incremental))
        return 0
    found = _measure(arguments.charges)
    _say(json.dumps(found))
    return 0


def _measure(charges: int) -> dict[str, Any]:
    _say(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    with scratch() as running:
        grant(running)
        settled_before(running, charges, _say)
        with running.postgres.connect(DATABASE) as superuser:
            for statement in _PIPELINE:
                superuser.execute(statement.encode())
            [(listed_since,)] = superuser.execute(_LISTED_SINCE.format(listed=LISTED).encode()).fetchall()
            [(transfers,)] = superuser.execute("SELECT count(*) FROM kino.transfer").fetchall()
        _say(f"{transfers:,} transfers, {charges:,} settlements, as many jobs of the source")
        environment = _environment(running)
        found: dict[str, Any] = {"transfers": transfers, "settlements": charges}
        # The first run of `seals` appends them all; the one below computes them again.
        found["sealed"] = _run(environment, "seals", incremental=True)
        found["full"] = {
            check.name: _run(environment, check.name, since=_for_matching(check.name, listed_since)) for check in CHECKS
        }
        found["new"] = _after_new_events(running, environment)
        found["live"] = _live(running, environment)
    worst = max(each["peak_mib"] for each in found["full"].values())
    _say(f"peak memory of our process: {worst:,.0f} MiB (at most {MEMORY_MAX_MIB})")
    return found


def _for_matching(name: str, since: object) -> datetime | None:
    """Return the instant for the one check that goes by a source's times."""
    assert isinstance(since, datetime), "Postgres gives an instant"
    return since if name == "matching" else None


def _environment(running: Servers) -> dict[str, str]:
    return settings_for(running) | {
        "KINO_JOB_SOURCE": "sql",
        "KINO_JOB_SOURCE_URL": running.database_url(role="kino_read"),
        "KINO_JOB_SOURCE_QUERY": f"SELECT {_COLUMNS} FROM pipeline.job WHERE job_id = ANY(:job_ids)",
        "KINO_JOB_SOURCE_FINISHED_QUERY": f"SELECT {_COLUMNS}, account_id, credits FROM pipeline.job"
        " WHERE finished_at >= :since AND finished_at < :until ORDER BY finished_at, job_id",
        "KINO_JOB_SOURCE_COMPLETE_QUERY": "SELECT clock_timestamp()",
        "KINO_JOB_SOURCE_TIMEOUT_S": "60",
        "KINO_RELAY_QUEUE": "kino.credits-refunded",
        "KINO_CHECK_GRACE_S": "0",
    }


def _child(name: str, wanted: Wanted) -> None:
    """Run one check in this process, and print its figures as JSON."""
    check = check_named(name)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.monotonic()
    with bench_for(check, load_settings(), actor="bench") as bench:
        run = run_check(check, bench, wanted)
    seconds = time.monotonic() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    _say(
        json.dumps(
            {
                "seconds": round(seconds, 2),
                "compared": run.compared,
                "broken": run.broken,
                "not_comparable": run.uncomparable,
                "state": run.state,
                "start_mib": round(before / MIB),
                "peak_mib": round(peak / MIB),
            }
        )
    )


def _run(
    environment: Mapping[str, str], name: str, *, incremental: bool = False, since: datetime | None = None
) -> dict[str, Any]:
    asked = ["--incremental"] * incremental + (["--since", since.isoformat()] if since is not None else [])
    ended = subprocess.run(
        [sys.executable, "-m", "tests.benchmarks.reconcile", "--child", name, *asked],
        env={**environment},
        capture_output=True,
        text=True,
        check=False,
    )
    if ended.returncode:
        raise SystemExit(f"{name}: {ended.stderr[-2_000:]}")
    found: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    rate = found["compared"] / found["seconds"] if found["seconds"] else 0.0
    _say(
        f"{'new ' if incremental else 'full'} {name:<15} {found['seconds']:>8.2f} s {found['compared']:>12,} compared"
        f" {rate:>10,.0f}/s {found['broken']:>6,} broken {found['not_comparable']:>9,} not comparable"
        f" {found['peak_mib']:>4} MiB  {found['state']}"
    )
    return found


def _after_new_events(running: Servers, environment: Mapping[str, str]) -> dict[str, Any]:
    """Settle some events by a worker, and run every check over what is new."""
    jobs = open_jobs(running, "new", NEW)
    worker = start_worker({**environment})
    try:
        with redis_client(running.redis_url()) as client:
            publish_paced(client, jobs, PACE)
        latency(running, jobs, PACE)
    finally:
        worker.stop()
    with running.postgres.connect(DATABASE) as superuser:
        superuser.execute(_NEW_JOBS)
        [(since,)] = superuser.execute(_COMPARED).fetchall()
    return {
        check.name: _run(environment, check.name, incremental=True, since=_for_matching(check.name, since))
        for check in CHECKS
    }


def _live(running: Servers, environment: Mapping[str, str]) -> dict[str, Any]:
    """Measure publish to commit alone and beside the checks, in turn: alone, beside, alone, beside."""
    worker = start_worker({**environment})
    found: dict[str, list[dict[str, float]]] = {"alone": [], "beside": []}
    try:
        with redis_client(running.redis_url()) as client:
            _paced(running, client, "warm-up")
            for turn in ("alone", "beside") * 2:
                checks = _checks_going_on(environment) if turn == "beside" else None
                measured = _paced(running, client, f"{turn}-{len(found[turn])}")
                if checks is not None:
                    if checks.poll() is not None:
                        _say("(the checks ended before the measurement did)")
                    os.killpg(checks.pid, signal.SIGKILL)
                    checks.wait()
                found[turn].append(measured.as_json())
                figures = ", ".join(f"{name} {value:,}" for name, value in measured.as_json().items())
                _say(f"{turn:<7} {figures}")
    finally:
        worker.stop()
    return found


def _paced(running: Servers, client: Any, name: str) -> Latency:
    jobs: Sequence[str] = open_jobs(running, name, PACED)
    _, kept = publish_paced(client, jobs, PACE)
    return latency(running, jobs, kept)


def _checks_going_on(environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """Run the checks over everything, one after the other and for ever, in a process of their own."""
    program = (
        "import subprocess, sys\n"
        "while True:\n"
        "    for name in ('integrity', 'decisions', 'matching', 'seals'):\n"
        "        subprocess.run([sys.executable, '-m', 'tests.benchmarks.reconcile', '--child', name])\n"
    )
    return subprocess.Popen(
        [sys.executable, "-c", program],
        env={**environment},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
