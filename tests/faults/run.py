"""Run every fault, then every planted bug, and print what came of them: `python -m tests.faults.run`.

Exit code 1 if anything was lost or paid twice, a scenario got stuck, or a planted bug was not caught. A
seed gives the workload, the step at which a fault happens, and every interleaving inside this process;
the timing of real processes is the machine's.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter, defaultdict
from typing import TYPE_CHECKING

import structlog

from tests.faults import incident, on_clocks, on_events, on_postgres, on_valkey, on_workers
from tests.faults.harness import SCENARIOS, Result, Scenario, arena
from tests.faults.planted import HALTED, PLANTED, Caught, Planted, catch

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

DEFAULT_SEED = 1
CRITICAL = 50
INCIDENT_JOBS = 10_000
# Importing them registers their scenarios.
MODULES = (on_workers, on_postgres, on_valkey, on_events, on_clocks)


def main() -> int:
    """Read the command line, run, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=DEFAULT_SEED, help="of the workload and the schedule")
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="a scenario, or a planted bug")
    parser.add_argument("--quick", action="store_true", help="the scenarios of `make test`, and no planted bugs")
    parser.add_argument("--planted", action="store_true", help="only the planted bugs")
    parser.add_argument("--json", action="store_true", help="the last line is one JSON array of results")
    arguments = parser.parse_args()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(CRITICAL))

    scenarios = [] if arguments.planted else _chosen(arguments.only, quick=arguments.quick)
    planted = [] if arguments.quick else [p for p in PLANTED if not arguments.only or p.name in arguments.only]
    if not scenarios and not planted:
        parser.error(f"nothing is called {', '.join(arguments.only)}")
    results = _play(scenarios, arguments.seed) if scenarios else []
    incident_wrong = [] if arguments.only or arguments.quick or arguments.planted else _play_incident(arguments.seed)
    caught = _plant(planted, arguments.seed)
    _say("")
    if results:
        _report(results)
    if caught:
        _report_planted(caught)
    passed = all(result.passed for result in results) and all(each.passed for each in caught) and not incident_wrong
    _say(f"\nseed {arguments.seed}: {'every promise held' if passed else 'FAILED'}")
    if arguments.json:
        _say(
            json.dumps(
                [
                    {"name": r.name, "error": r.error, "findings": [": ".join(f) for f in r.verdict.findings]}
                    for r in results
                ]
            )
        )
    return 0 if passed else 1


def _chosen(only: Sequence[str], *, quick: bool) -> list[Scenario]:
    return [s for s in SCENARIOS.values() if (s.name in only if only else s.quick or not quick)]


def _play(scenarios: Sequence[Scenario], seed: int) -> list[Result]:
    results = []
    with arena() as place:
        for number, each in enumerate(scenarios, start=1):
            result = place.run(each, seed)
            results.append(result)
            mark = "ok  " if result.passed else "FAIL"
            _say(f"{mark} {number:>2}/{len(scenarios)} {result.seconds:6.1f} s  {each.name}: {each.promise}")
            if not result.passed:
                _say("          " + result.why().replace("\n", "\n          "))
    return results


def _play_incident(seed: int) -> list[str]:
    """Play the incident with INCIDENT_JOBS jobs, and print what was typed; return what is wrong at its end."""
    with arena() as place:
        played = incident.play(place.servers, jobs=INCIDENT_JOBS, seed=seed)
    mark = "FAIL" if played.wrong else "ok  "
    _say(f"{mark} the incident: {INCIDENT_JOBS:,} jobs, {len(played.typed)} commands")
    _table("what happened", {name: f"{number:,}" for name, number in played.faults.items()})
    _table("how it stood", {name: f"{number:,}" for name, number in played.before.items()})
    _say(played.transcript())
    for each in played.wrong:
        _say(f"          {each}")
    return played.wrong


def _plant(planted: Sequence[Planted], seed: int) -> list[Caught]:
    caught = []
    for number, each in enumerate(planted, start=1):
        found = catch(each, seed)
        caught.append(found)
        mark = "ok  " if found.passed else "FAIL"
        _say(f"{mark} {number:>2}/{len(planted)} planted: {each.name} {found.error}".rstrip())
    return caught


def _report(results: Iterable[Result]) -> None:
    """Print the table: faults by kind, jobs, lost, twice, dead letters by reason, worst lateness by cause."""
    faults: Counter[str] = Counter()
    letters: Counter[str] = Counter()
    findings: Counter[str] = Counter()
    late: dict[str, float] = defaultdict(float)
    jobs = 0
    for result in results:
        faults.update(result.faults)
        letters.update(result.verdict.dead_letters)
        findings.update(finding.kind for finding in result.verdict.findings)
        jobs += result.verdict.jobs
        cause = SCENARIOS[result.name].cause
        late[cause] = max(late[cause], result.verdict.lateness_s)
    _table("faults", {name: f"{number:,}" for name, number in faults.most_common()})
    _table(
        "came of them",
        {
            "jobs": f"{jobs:,}",
            "lost": f"{findings.pop('lost', 0):,}",
            "twice": f"{findings.pop('twice', 0):,}",
            **{kind: f"{number:,}" for kind, number in findings.items()},
        },
    )
    _table("dead letters", {name: f"{number:,}" for name, number in letters.most_common()})
    _table("worst lateness, event to settlement", {cause: f"{late[cause]:.1f} s" for cause in sorted(late)})


def _report_planted(caught: Sequence[Caught]) -> None:
    """Print what caught each planted bug."""
    _say("planted bug -> caught by")
    for each in caught:
        _say(f"  {each.planted.name}")
        for name in (*each.planted.scenarios, *each.planted.tests):
            _say(f"    {'' if name in each.by else 'NOT '}{name}: {each.by.get(name, each.error)[:110]}")
    halted = sum(by.startswith(HALTED) for each in caught for by in each.by.values())
    _say(f"  {halted} of these catches are scenarios that could not go on; the others ran to their end and were judged")


def _table(title: str, rows: dict[str, str]) -> None:
    _say(title)
    for name, value in rows.items():
        _say(f"  {name:<40} {value:>10}")


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
