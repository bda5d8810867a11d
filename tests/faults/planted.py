"""Planted bugs: mistakes that somebody could make, each of which the harness must catch.

Each is put into a copy of the project; the scenarios run there, with its workers, its tests and its oracle.
A text that is no longer in its file is an error: the list has to follow the code.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tests.faults.harness import Edit, copy_project

DEADLINE_S = 600.0
HALTED = "halted, "


@dataclass(frozen=True)
class Planted:
    """A mistake, and the scenarios or tests that must catch it."""

    name: str
    edit: Edit
    scenarios: tuple[str, ...] = ()
    tests: tuple[str, ...] = ()
    """What pytest is told to run: the mistake shows in no outcome of a scenario, or only to somebody hostile."""


@dataclass(frozen=True)
class Caught:
    """Which of its scenarios caught a planted bug, and by which finding."""

    planted: Planted
    by: dict[str, str]
    error: str = ""

    @property
    def passed(self) -> bool:
        """Whether every scenario that must catch it did."""
        return not self.error and set(self.by) == {*self.planted.scenarios, *self.planted.tests}


SETTLE = "kino_refunds/settlement/settle.py"
DECIDE = "kino_refunds/settlement/decide.py"
INBOX = "kino_refunds/settlement/inbox.py"
CHARGES = "kino_refunds/ledger/charges.sql"
ENDINGS = "kino_refunds/ledger/endings.sql"
LOTS = "kino_refunds/ledger/lots.sql"
PURCHASE_LOTS = "kino_refunds/ledger/purchase_lots.sql"
INPUT = "kino_refunds/ledger/input.sql"
SCRIPTS = "kino_refunds/events/scripts"
IS_DEAD = "if worker ~= me and redis.call('EXISTS', alive(worker)) == 0 then"
INTAKE = "workers/intake.py"
TRIPWIRE = "kino_refunds/intake/tripwire.py"
OVERDUE = "kino_refunds/reconciliation/overdue.py"
GUARD = "kino_refunds/reconciliation/guard.py"

PLANTED = [
    Planted(
        "drop before commit",
        Edit(
            INTAKE,
            "        deliveries, unreadable = read_claim(claim)\n",
            "        deliveries, unreadable = read_claim(claim)\n        self._queues.drop(claim.token)\n",
        ),
        ("every_statement_is_a_crash_point", "postgres_out_of_disk"),
    ),
    Planted(
        "no inbox count check",
        Edit(INBOX, "if len(inserted) < len(rows):", "if len(inserted) > len(rows):"),
        ("one_event_id_for_two_jobs_at_two_workers",),
    ),
    Planted(
        "no settlement count check",
        Edit(ENDINGS, "ELSIF v_bad IS NOT NULL THEN", "ELSIF v_bad = 0 THEN"),
        ("two_ends_of_a_job_at_two_workers",),
    ),
    Planted(
        "inbox is not asked",
        Edit(DECIDE, "elif known is not None and known.outcome is not None:", "elif known is not None and not known:"),
        ("everything_ten_times",),
    ),
    Planted(
        "same id, other content: a duplicate",
        Edit(
            DECIDE,
            "if known is not None and known.fingerprint != delivery.fingerprint:",
            "if known is not None and not known:",
        ),
        ("every_statement_is_a_crash_point",),
    ),
    Planted(
        "a refund to another lot",
        Edit(
            ENDINGS,
            "    FROM (SELECT u.lot_id, sum(u.credits)::bigint",
            "    FROM (SELECT (SELECT max(x) FROM unnest(v_lots) x) AS lot_id, sum(u.credits)::bigint",
        ),
        ("everything_ten_times",),
    ),
    Planted(
        "a line forgotten",
        Edit(
            ENDINGS,
            "AS u (place, account_id, lot_id, credits, nth);",
            "AS u (place, account_id, lot_id, credits, nth) WHERE u.nth <> 2;",
        ),
        ("everything_ten_times",),
    ),
    Planted(
        "more refunded than taken",
        Edit(ENDINGS, "l.remaining + back.credits", "l.remaining + back.credits + 1"),
        ("everything_ten_times",),
    ),
    Planted(
        "successors expire with the old lot's credits still in it",
        Edit(ENDINGS, "WHERE u.fate = 'back' GROUP", "WHERE u.fate IN ('back', 'onward') GROUP"),
        ("everything_ten_times",),
    ),
    Planted(
        "capture for an unknown origin",
        Edit(
            "kino_refunds/policy/versions/2025-12-14.toml",
            '["platform", "provider", "unknown"]',
            '["platform", "provider"]',
        ),
        ("everything_ten_times",),
    ),
    Planted(
        "account mismatch ignored",
        Edit(
            DECIDE,
            "if event.account_id is not None and event.account_id != charge.account_id:",
            "if charge.account_id is None:",
        ),
        ("every_statement_is_a_crash_point",),
    ),
    Planted(
        "order of arrival instead of the events' times",
        Edit(DECIDE, "key=lambda index: (deliveries[index].event.time, index)", "key=lambda index: -index"),
        ("several_ends_of_one_job",),
    ),
    Planted(
        "breaks not raised",
        Edit(
            "kino_refunds/settlement/outcomes.py",
            "BREAKS = frozenset({Outcome.COMPLETED_AFTER_REFUND, Outcome.FAILED_AFTER_CAPTURE})",
            "BREAKS: frozenset[Outcome] = frozenset()",
        ),
        ("late_completion_after_an_overdue_refund", "several_ends_of_one_job"),
    ),
    Planted(
        "pending not written",
        Edit(SETTLE, "if identity not in record.pending])", "if identity in record.pending])"),
        ("events_before_their_charge",),
    ),
    Planted(
        "malformed dropped silently",
        Edit(
            "kino_refunds/settlement/deliveries.py",
            "return [], [malformed_letter(raw, queue, malformed)]",
            "return [], []",
        ),
        ("everything_malformed",),
    ),
    Planted(
        "an ended session is the event's fault",
        Edit(
            "kino_refunds/db/faults.py",
            "return Fault.SPLIT if cause.sqlstate in _SPLIT else Fault.KEEP",
            "return Fault.BISECT",
        ),
        ("every_session_ends",),
    ),
    Planted(
        "a full disk is the event's fault",
        Edit("kino_refunds/db/faults.py", '        "53",  #', '        "5_",  #'),
        ("postgres_out_of_disk",),
    ),
    Planted(
        "recover without the alive check",
        Edit(
            f"{SCRIPTS}/recover.lua",
            "if worker ~= me and redis.call('EXISTS', alive(worker)) == 0 then",
            "if worker ~= me then",
        ),
        ("slow_worker_keeps_its_batch",),
    ),
    Planted(
        "recover takes nothing",
        Edit(
            f"{SCRIPTS}/recover.lua",
            "if worker ~= me and redis.call('EXISTS', alive(worker)) == 0 then",
            "if worker == me then",
        ),
        ("killed_between_claim_and_commit",),
    ),
    Planted(
        "poison counted per batch",
        Edit(f"{SCRIPTS}/recover.lua", "if is_alone(held) and redis.call('EXISTS'", "if redis.call('EXISTS'"),
        ("poisonous_message",),
    ),
    Planted(
        "drop without token",
        Edit(
            f"{SCRIPTS}/drop.lua",
            "if token ~= ARGV[2] then return 0 end\n\nredis.call('DEL', token_of(me))\n"
            "for _, queue in ipairs(queues) do\n  local message",
            "redis.call('DEL', token_of(me))\nfor _, queue in ipairs(queues) do\n  local message",
        ),
        ("late_drop",),
    ),
    Planted(
        "claim writes before its DEL",
        Edit(
            f"{SCRIPTS}/own.lua",
            "  redis.call('DEL', alive(me))\n  redis.call('SET', alive(me), '1', 'PX', alive_ms)",
            "  redis.call('SET', alive(me), '1', 'PX', alive_ms)",
        ),
        ("full_before_the_claim",),
    ),
    Planted(
        "tripwire cut",
        Edit(TRIPWIRE, "sum(self._failures) > ERRORS_MAX", "sum(self._failures) > WINDOW"),
        ("tripwire_and_probe",),
    ),
    Planted(
        "sweep without guards",
        Edit(
            OVERDUE,
            "        if reason is None:\n            presumed",
            "        if reason is None or reason:\n            presumed",
        ),
        ("paused_past_every_deadline", "backlog_past_every_deadline"),
    ),
    Planted(
        "sweep does not look at the gate",
        Edit(GUARD, "refused = WithheldReason.INTAKE_PAUSED", "refused = None"),
        ("paused_past_every_deadline",),
    ),
    Planted(
        "a host's clock in the sweep",
        Edit(OVERDUE, "    now = clocks.decides\n", "    now = clocks.host\n"),
        ("host_that_is_fast",),
    ),
    Planted(
        "clocks not compared",
        Edit(OVERDUE, "if guard.refused is None and disagreement is not None:", 'if disagreement == "":'),
        ("host_that_is_fast", "clock_that_jumps_and_is_set_back"),
    ),
    Planted(
        "an open charge without its row",
        Edit(
            CHARGES,
            "SELECT c.* FROM unnest(v_charges, v_accounts, v_deadlines, v_credits) AS c;",
            "SELECT c.* FROM unnest(v_charges, v_accounts, v_deadlines, v_credits) AS c (i, a, d, n) WHERE n > 4;",
        ),
        ("host_that_is_slow",),
    ),
    Planted(
        "the first name only",
        Edit(
            "kino_refunds/events/envelope.py",
            "        jobs[1:],\n        may_hold_others=not (readable and sure and len(jobs) == 1),",
            "        (),\n        may_hold_others=not jobs,",
        ),
        ("completions_that_nobody_can_read",),
    ),
    Planted(
        "bindings not looked after",
        Edit(f"{SCRIPTS}/bind.lua", "      if not found then\n", "      if not members then\n"),
        ("flushed_beside_a_simple_queue",),
    ),
    Planted(
        "a demoted primary keeps its connections",
        Edit(
            "kino_refunds/events/connection.py",
            "            if not _is_not_primary(error):\n",
            "            if error:\n",
        ),
        ("failover_with_a_living_old_primary",),
    ),
    Planted(
        "dates as the database writes them",
        Edit("kino_refunds/db/engine.py", '    "DateStyle": "ISO, MDY",\n', ""),
        ("defaults_of_the_database",),
    ),
    Planted(
        "an error of the source is an answer",
        Edit(
            "kino_refunds/reconciliation/asking.py",
            "                _note_problem(error, part, so_far)\n",
            "                from kino_refunds.reconciliation import sources\n"
            "                found |= dict.fromkeys(part, sources.Answer(sources.JobState.UNKNOWN))\n",
        ),
        ("source_that_errs",),
    ),
    Planted(
        "lots burn in the wrong order",
        Edit(
            CHARGES, "locked.priority, locked.expires_at NULLS LAST", "locked.priority, locked.expires_at NULLS FIRST"
        ),
        tests=("tests/integration/ledger/test_burn_order.py",),
    ),
    Planted(
        "the grace is ignored",
        Edit(ENDINGS, "AND (l.expires_at > s.now + s.grace\n", "AND (l.expires_at > s.now\n"),
        tests=("tests/integration/ledger/test_endings.py::TestRefund",),
    ),
    Planted(
        "a charge locks no lot",
        Edit(CHARGES, "            ORDER BY l.lot_id FOR NO KEY UPDATE\n", "            ORDER BY l.lot_id\n"),
        tests=("tests/integration/ledger/test_ledger_races.py::TestSharedLots",),
    ),
    Planted(
        "a refund locks no lot",
        Edit(ENDINGS, "    ORDER BY l.lot_id FOR NO KEY UPDATE;\n", "    ORDER BY l.lot_id;\n"),
        tests=("tests/integration/ledger/test_ledger_races.py::TestLotsThatChangeMeanwhile",),
    ),
    Planted(
        "a charge looks at lots before it has them",
        Edit(CHARGES, "FROM locked WHERE locked.expires_at IS NULL OR locked.expires_at > kino.clock()", "FROM locked"),
        tests=("tests/integration/ledger/test_ledger_races.py::TestLotsThatChangeMeanwhile",),
    ),
    Planted(
        "a search_path without pg_temp",
        Edit(CHARGES, "SET search_path = pg_catalog, pg_temp", "SET search_path = pg_catalog"),
        tests=("tests/integration/db/test_ledger_rights.py",),
    ),
    Planted(
        "a table without its schema",
        Edit(CHARGES, "        INSERT INTO kino.charge_line (", "        INSERT INTO charge_line ("),
        tests=("tests/integration/db/test_ledger_install.py::test_every_name_is_written_whole",),
    ),
    Planted(
        "a source that is away agrees",
        Edit("kino_refunds/reconciliation/matching.py", "        is_comparable=False,\n", ""),
        tests=("tests/integration/reconciliation/test_matching_sources.py",),
    ),
    Planted(
        "a captured failure matches",
        Edit(
            "kino_refunds/reconciliation/judging.py",
            "    if not booked.is_refunded:\n        kind,",
            "    if not booked.is_refunded:\n        return\n    if not booked.is_refunded:\n        kind,",
        ),
        tests=("tests/integration/cli/test_reconcile_commands.py",),
    ),
    Planted(
        "an accepted difference opens again",
        Edit("kino_refunds/settlement/breaks.py", "sorted(first.keys() - accepted)", "sorted(first.keys())"),
        tests=("tests/integration/reconciliation/test_check_runs.py",),
    ),
    Planted(
        "a page is stored over another's",
        Edit("kino_refunds/reconciliation/run_rows.py", " AND cursor = CAST(:before AS jsonb)", ""),
        tests=("tests/integration/reconciliation/test_check_runs.py",),
    ),
    Planted(
        "a gap counts as covered",
        Edit("kino_refunds/reconciliation/windows.py", "FROM islands WHERE island = 0", "FROM islands"),
        tests=("tests/integration/reconciliation/test_check_runs.py",),
    ),
    Planted(
        "clause 6 keeps what was taken wrongly",
        Edit(
            "kino_refunds/reconciliation/repairs.py",
            "facts.kind not in NEEDS_REFERENCE and facts.judged_status",
            "facts.judged_status",
        ),
        tests=("tests/integration/reconciliation/test_repairs.py",),
    ),
    Planted(
        "a proof forgets live breaks",
        Edit("kino_refunds/reconciliation/proof.py", "    if live.live:\n", "    if live.live > 9:\n"),
        tests=("tests/integration/reconciliation/test_proof.py",),
    ),
    Planted(
        "a product may settle",
        Edit(
            "kino_refunds/db/functions.py",
            '"settle_charges": ("kino_worker",),',
            '"settle_charges": ("kino_worker", "kino_product"),',
        ),
        tests=("tests/integration/db/test_ledger_rights.py",),
    ),
    Planted(
        "negative credits",
        Edit(INPUT, "BETWEEN p_least AND", "BETWEEN p_least - 2 AND"),
        tests=("tests/integration/ledger/test_ledger_input.py",),
    ),
    Planted(
        "a line of successors without end",
        Edit(
            ENDINGS,
            "OR p_reversal OR c.opened_at < last.at THEN 'onward'",
            "OR c.opened_at > '0001-01-01' THEN 'onward'",
        ),
        tests=("tests/integration/ledger/test_lot_lives.py::TestSuccessors",),
    ),
    Planted(
        "one lot more a refund",
        Edit(ENDINGS, "s.now + interval '24 hours'))", "s.now + interval '24 years'))"),
        tests=("tests/integration/ledger/test_lot_lives.py::TestSuccessors",),
    ),
    Planted(
        "a hold revives what had expired",
        Edit(
            PURCHASE_LOTS,
            "nobody had swept yet.\n    PERFORM kino.expire_due(v_lots);\n",
            "nobody had swept yet.\n",
        ),
        tests=("tests/integration/ledger/test_lot_lives.py::TestCauses",),
    ),
    Planted(
        "a lot's history is not kept",
        Edit(LOTS, "old.expires_at IS DISTINCT FROM new.expires_at)", "false)"),
        tests=("tests/integration/ledger/test_lot_lives.py::TestThePast",),
    ),
    Planted(
        "what waits is overtaken",
        Edit(
            "kino_refunds/settlement/batch.py",
            "busy=busy, alone=joined)",
            "busy=busy)",
        ),
        tests=("tests/integration/settlement/test_waiting_together.py",),
    ),
]


def catch(planted: Planted, seed: int) -> Caught:
    """Run a planted bug's scenarios in a copy that has it, and say which caught it."""
    with tempfile.TemporaryDirectory(prefix="kino-planted-") as name:
        folder = Path(name)
        # As root, Postgres may run as somebody who must get through here.
        folder.chmod(0o711)
        try:
            copy_project(folder, [planted.edit])
        except Exception as error:  # noqa: BLE001 - said with its name in the table
            return Caught(planted, {}, str(error))
        try:
            by = (_caught_by_scenarios(planted, folder, seed) if planted.scenarios else {}) | (
                _caught_by_tests(planted, folder) if planted.tests else {}
            )
        except (subprocess.TimeoutExpired, IndexError, ValueError) as error:
            return Caught(planted, {}, f"{type(error).__name__}: its run ended without results")
    return Caught(planted, by)


def _caught_by_scenarios(planted: Planted, folder: Path, seed: int) -> dict[str, str]:
    only = [part for scenario in planted.scenarios for part in ("--only", scenario)]
    ran = _run([sys.executable, "-m", "tests.faults.run", "--seed", str(seed), "--json", *only], folder)
    results = json.loads(ran.splitlines()[-1])
    # A scenario that broke off leaves open jobs behind, which prove nothing: then what stopped it is what is said.
    return {
        result["name"]: HALTED + result["error"].partition("\n")[0] if result["error"] else result["findings"][0]
        for result in results
        if result["error"] or result["findings"]
    }


def _caught_by_tests(planted: Planted, folder: Path) -> dict[str, str]:
    """Say which test failed of each that must catch it; one that could not even begin has caught nothing."""
    by = {}
    for test in planted.tests:
        said = _run(
            [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", test], folder
        )
        failed = [line for line in said.splitlines() if line.startswith("FAILED ")]
        if failed:
            by[test] = failed[0].removeprefix("FAILED ").partition(" - ")[0].rpartition("::")[2]
    return by


def _run(command: list[str], folder: Path) -> str:
    ran = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    return ran.stdout
