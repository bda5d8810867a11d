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
    """A mistake, and the scenarios that must catch it."""

    name: str
    edit: Edit
    scenarios: tuple[str, ...]


@dataclass(frozen=True)
class Caught:
    """Which of its scenarios caught a planted bug, and by which finding."""

    planted: Planted
    by: dict[str, str]
    error: str = ""

    @property
    def passed(self) -> bool:
        """Whether every scenario that must catch it did."""
        return not self.error and set(self.by) == set(self.planted.scenarios)


SETTLE = "kino_refunds/settlement/settle.py"
INBOX = "kino_refunds/settlement/inbox.py"
CHARGES = "kino_refunds/ledger/charges.py"
QUEUES = "kino_refunds/events/queues.py"
INTAKE = "workers/intake.py"
MIGRATION = "kino_refunds/db/migrations/versions/0003_one_clock.py"
OVERDUE = "kino_refunds/reconciliation/overdue.py"
GUARD = "kino_refunds/reconciliation/guard.py"

PLANTED = [
    Planted(
        "drop before commit",
        Edit(
            INTAKE,
            "        deliveries, dead = read_claim(claim)\n",
            "        deliveries, dead = read_claim(claim)\n        self._queues.drop(claim.token)\n",
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
        Edit(SETTLE, "if len(inserted) < len(rows):", "if len(inserted) > len(rows):"),
        ("two_ends_of_a_job_at_two_workers",),
    ),
    Planted(
        "inbox is not asked",
        Edit(SETTLE, "elif said is not None and said.outcome is not None:", "elif said is not None and not said:"),
        ("everything_ten_times",),
    ),
    Planted(
        "same id, other content: a duplicate",
        Edit(
            SETTLE,
            "if said is not None and said.fingerprint != delivery.fingerprint:",
            "if said is not None and not said:",
        ),
        ("every_statement_is_a_crash_point",),
    ),
    Planted(
        "a refund to another lot",
        Edit(CHARGES, "            back[lot_id] += credits\n", "            back[max(lots)] += credits\n"),
        ("everything_ten_times",),
    ),
    Planted(
        "a line forgotten",
        Edit(
            CHARGES,
            "        for lot_id, credits in ending.lines:\n            to_lot_id",
            "        for lot_id, credits in ending.lines[:1]:\n            to_lot_id",
        ),
        ("everything_ten_times",),
    ),
    Planted(
        "more refunded than taken",
        Edit(CHARGES, "            back[lot_id] += credits\n", "            back[lot_id] += credits + 1\n"),
        ("everything_ten_times",),
    ),
    Planted(
        "successors expire with the old lot's credits still in it",
        Edit(
            CHARGES,
            "            onward[lot_id] += credits\n",
            "            onward[lot_id] += credits\n            back[lot_id] += credits\n",
        ),
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
            SETTLE,
            "if event.account_id is not None and event.account_id != charge.account_id:",
            "if charge.account_id is None:",
        ),
        ("every_statement_is_a_crash_point",),
    ),
    Planted(
        "order of arrival instead of the events' times",
        Edit(SETTLE, "key=lambda index: (deliveries[index].event.time, index)", "key=lambda index: -index"),
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
        Edit(QUEUES, "if worker ~= me and redis.call('EXISTS', alive(worker)) == 0 then", "if worker ~= me then"),
        ("slow_worker_keeps_its_batch",),
    ),
    Planted(
        "recover takes nothing",
        Edit(QUEUES, "if worker ~= me and redis.call('EXISTS', alive(worker)) == 0 then", "if worker == me then"),
        ("killed_between_claim_and_commit",),
    ),
    Planted(
        "poison counted per batch",
        Edit(QUEUES, "if is_alone(held) and redis.call('EXISTS'", "if redis.call('EXISTS'"),
        ("poisonous_message",),
    ),
    Planted(
        "drop without token",
        Edit(
            QUEUES,
            "if token ~= ARGV[2] then return 0 end\n\nredis.call('DEL', token_of(me))\n"
            "for _, queue in ipairs(queues) do\n  local message",
            "redis.call('DEL', token_of(me))\nfor _, queue in ipairs(queues) do\n  local message",
        ),
        ("late_drop",),
    ),
    Planted(
        "claim writes before its DEL",
        Edit(
            QUEUES,
            "  redis.call('DEL', alive(me))\n  redis.call('SET', alive(me), '1', 'PX', alive_ms)",
            "  redis.call('SET', alive(me), '1', 'PX', alive_ms)",
        ),
        ("full_before_the_claim",),
    ),
    Planted(
        "tripwire cut",
        Edit(INTAKE, "sum(self._failures) > TRIPWIRE_ERRORS_MAX", "sum(self._failures) > TRIPWIRE_WINDOW"),
        ("tripwire_and_probe",),
    ),
    Planted(
        "sweep without guards",
        Edit(
            OVERDUE,
            "        if reason is None:\n            verdicts",
            "        if reason is None or reason:\n            verdicts",
        ),
        ("paused_past_every_deadline", "backlog_past_every_deadline"),
    ),
    Planted(
        "sweep does not look at the gate",
        Edit(GUARD, 'refused = "intake_paused"', "refused = None"),
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
        Edit(MIGRATION, "n.credits FROM new_rows n;", "n.credits FROM new_rows n WHERE n.credits > 4;"),
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
        Edit(QUEUES, "      if not found then\n", "      if not members then\n"),
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
            OVERDUE,
            "                _note_problem(error, part, report)\n",
            "                answers |= dict.fromkeys(part, Answer(JobState.UNKNOWN))\n",
        ),
        ("source_that_errs",),
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
        only = [part for scenario in planted.scenarios for part in ("--only", scenario)]
        try:
            ran = subprocess.run(
                [sys.executable, "-m", "tests.faults.run", "--seed", str(seed), "--json", *only],
                cwd=folder,
                env={**os.environ, "PYTHONPATH": str(folder)},
                capture_output=True,
                text=True,
                timeout=DEADLINE_S,
                check=False,
            )
            results = json.loads(ran.stdout.splitlines()[-1])
        except (subprocess.TimeoutExpired, IndexError, ValueError) as error:
            return Caught(planted, {}, f"{type(error).__name__}: its run ended without results")
    # A scenario that broke off leaves open jobs behind, which prove nothing: then what stopped it is what is said.
    by = {
        result["name"]: HALTED + result["error"].partition("\n")[0] if result["error"] else result["findings"][0]
        for result in results
        if result["error"] or result["findings"]
    }
    return Caught(planted, by)
