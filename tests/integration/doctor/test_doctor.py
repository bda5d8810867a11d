"""`doctor`: what it says where all is well, of settings, and of servers that are away."""

from __future__ import annotations

import json
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from redis import Redis

from kino_refunds.dev.embedded import LOOPBACK
from kino_refunds.doctor import findings
from kino_refunds.errors import LedgerInconsistent
from kino_refunds.events import connection as redis_connections
from kino_refunds.events.queues import QUEUE_KEYS
from kino_refunds.intake.gate import pause_intake
from kino_refunds.reconciliation.adapters import HOW_TO_CHOOSE
from tests.command_line import AWAY_PORT, Run
from tests.conftest import Database
from tests.integration.doctor.diagnosis import Diagnosis, Doctor, Found
from tests.scenario import Scene

# --- all is well


def test_what_is_well_is_said_line_by_line(run: Run, well: Scene) -> None:
    """Nothing to mend is exit code 0, and a person sees everything that was looked at."""
    result = run("doctor")

    assert well.rows("SELECT count(*) FROM kino.intake_worker")[0][0] == 1
    assert (result.code, result.err) == (0, "")
    assert {line.split()[0] for line in result.out.splitlines() if not line.startswith(" ")} == {"ok"}
    checks = [re.split(r"  +", line)[1] for line in result.out.splitlines() if not line.startswith(" ")]
    assert checks == [
        *("settings", "job source"),
        *("postgres version", "postgres writable", "durability", "triggers", "postgres clock", "roles"),
        *("rights", "migrations", "append-only", "ledger functions", "ledger closed", "ledger clock", "lot grace"),
        *("intake", "workers", *["beat"] * 5),
        "waiting messages",
        *("overdue charges", "dead letters", "breaks", "checks", "verified through", "horizon"),
        *("redis rights", "redis version", "redis role", "redis cluster", "redis eviction", "redis persistence"),
        *("redis memory", "redis clock", "queue names", "queue keys", "queues"),
    ]


def test_finding_for_a_person_has_its_advice_below_it(run: Run, well: Scene) -> None:
    """Level, check and what was found on a line; what to do under it; no line over the terminal's 80 columns."""
    with well.worker.begin() as connection:
        pause_intake(connection, reason="[red]maintenance[/red]\x1b[2J", actor="anna")

    result = run("doctor")

    lines = result.out.splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith("fail"))
    told = " ".join(" ".join(line.split()) for line in lines[first : first + 3])
    assert (result.code, result.err) == (1, "")
    assert told.startswith("fail intake paused by anna at ")
    assert r"[red]maintenance[/red]\x1b[2J when the reason is gone: `kino-refunds intake resume`" in told
    assert max(map(len, lines)) <= 80


@pytest.mark.usefixtures("well")
def test_all_is_well_for_a_program(doctor: Doctor) -> None:
    """The same in JSON: no finding, no advice, exit code 0."""
    assert doctor() == Diagnosis(0, [])


# --- settings


@pytest.mark.usefixtures("well")
def test_unknown_name_is_a_warning_that_names_the_nearest(doctor: Doctor) -> None:
    """A misspelt setting silently keeps its default, so it is named; it stops nothing."""
    found = doctor(KINO_RETRY_EVRY_S="5", KINO_COLOUR="x")

    assert found == Diagnosis(
        0,
        [
            Found(
                "settings",
                "warn",
                "KINO_COLOUR is not a setting and is ignored",
                "remove it: no program reads it",
            ),
            Found(
                "settings",
                "warn",
                "KINO_RETRY_EVRY_S is not a setting and is ignored",
                "did you mean KINO_RETRY_EVERY_S?",
            ),
        ],
    )


def test_wrong_value_is_a_finding_and_wrong_usage(doctor: Doctor) -> None:
    """Every wrong value is named; without settings nothing else can be looked at."""
    found = doctor(KINO_OVERDUE_ASKS="0", KINO_LOG_LEVEL="loud")

    ((check, level, text, advice),) = found.bad
    assert (found.code, check, level) == (2, "settings", "fail")
    assert re.fullmatch(r"KINO_OVERDUE_ASKS: .+; KINO_LOG_LEVEL: .+", text)
    assert advice == "correct it; the settings table in deploy/README.md says what each is for"


@pytest.mark.parametrize(
    ("name", "value", "says", "example"),
    [
        ("KINO_DATABASE_URL", None, "KINO_DATABASE_URL is not set", "postgresql://kino_worker@HOST/DATABASE"),
        ("KINO_REDIS_URL", None, "KINO_REDIS_URL is not set", "redis://HOST:6379/0"),
        ("KINO_DATABASE_URL", "db:hunter2@x", "KINO_DATABASE_URL cannot be read: ", "postgresql://kino_worker@"),
        ("KINO_DATABASE_URL", "mysql://x/y", "KINO_DATABASE_URL is not Postgres by psycopg but mysql", "postgresql://"),
        ("KINO_REDIS_URL", "sentinel://x:hunter2@y", "KINO_REDIS_URL is a Sentinel URL, ", "redis://HOST:6379/0"),
    ],
)
@pytest.mark.usefixtures("well")
def test_missing_url_is_wrong_usage_and_the_other_server_is_looked_at(
    doctor: Doctor, name: str, value: str | None, says: str, example: str
) -> None:
    """The variable is named with an example, its password is not; the finding is the only one."""
    found = doctor(**{name: value})

    ((check, level, text, advice),) = found.bad
    assert (found.code, check, level) == (2, "settings", "fail")
    assert text.startswith(says)
    assert advice.startswith("for example ")
    assert example in advice
    assert "hunter2" not in text + advice


@pytest.mark.usefixtures("well")
def test_job_source_that_nobody_chose_is_wrong_usage(doctor: Doctor) -> None:
    """Without a choice no overdue sweep runs and lost jobs are never found: the doctor fails, and says what to set."""
    says = "KINO_JOB_SOURCE is not set: a job whose event is lost is never found, and stays open forever"

    unset, empty = doctor(KINO_JOB_SOURCE=None), doctor(KINO_JOB_SOURCE="")

    assert unset == empty == Diagnosis(2, [Found("settings", "fail", says, HOW_TO_CHOOSE)])


@pytest.mark.usefixtures("well")
def test_no_job_source_is_a_warning_for_as_long_as_it_is_chosen(doctor: Doctor) -> None:
    """`none` refunds what had completed: the doctor says so every time, and it stops nothing."""
    says = "KINO_JOB_SOURCE=none: a job whose event is lost counts as timed out and is refunded, completed or not"

    found = [doctor(KINO_JOB_SOURCE="none", KINO_JOB_SOURCE_URL=None) for _ in range(2)]

    assert found == [Diagnosis(0, [Found("job source", "warn", says, HOW_TO_CHOOSE)])] * 2


@pytest.mark.parametrize(
    ("swept", "level", "code", "found", "advice"),
    [
        (
            {"source_broken": 1_200, "source_errors": 34, "source_problem": "answered for 'a '", "answers": {}},
            *("fail", 1, "the last sweep got no answer for 1,234 jobs: answered for 'a '"),
            "none of these jobs is settled until the source is fixed; then `kino-refunds charges ask --dry-run`",
        ),
        (
            {"source_broken": 0, "source_errors": 2, "source_problem": "status 500", "answers": {}},
            *("away", 3, "the last sweep got no answer for 2 jobs: status 500"),
            "the sweep asks again; if this stays, check that the source runs, its URL and its password",
        ),
        (
            {"source_broken": 0, "source_errors": 2, "source_problem": "status 500", "answers": {"running": 1}},
            *("warn", 0, "the last sweep got no answer for 2 jobs: status 500"),
            "the sweep asks again; if this stays, check that the source runs, its URL and its password",
        ),
        (
            {"source_problem": "KINO_JOB_SOURCE_QUERY cannot run: \x1b[2J"},
            *("fail", 1, "the last sweep could not ask: KINO_JOB_SOURCE_QUERY cannot run: \x1b[2J"),
            "none of these jobs is settled until the source is fixed; then `kino-refunds charges ask --dry-run`",
        ),
    ],
    ids=["broken", "away", "one job", "setting"],
)
def test_what_the_last_sweep_says_of_the_source_is_found(
    doctor: Doctor, well: Scene, swept: dict[str, Any], level: str, code: int, found: str, advice: str
) -> None:
    """The worker's own sweep is what counts: its last finished one names what is wrong, until one finds it well."""
    _swept(well, {"source_problem": "mended since"}, swept)
    ill = doctor()
    _swept(well, swept, {"asked": 3, "source_broken": 0, "source_errors": 0, "source_problem": None})
    mended = doctor()

    assert ill == Diagnosis(code, [Found("job source", level, found, advice)])
    assert mended == Diagnosis(0, [])


def _swept(scene: Scene, before: dict[str, Any], last: dict[str, Any]) -> None:
    """Let two sweeps for overdue jobs have ended with these results, and another have just begun."""
    scene.as_superuser("DELETE FROM kino.schedule_slot WHERE name = 'kino.sweep_overdue'")
    scene.rows(
        "INSERT INTO kino.schedule_slot (name, slot_at, claimed_by, finished_at, result) VALUES"
        " ('kino.sweep_overdue', clock_timestamp() - interval '2 min', 'beat', clock_timestamp(), :before),"
        " ('kino.sweep_overdue', clock_timestamp() - interval '1 min', 'beat', clock_timestamp(), :last),"
        " ('kino.sweep_overdue', clock_timestamp(), 'beat', NULL, NULL)"
        " RETURNING 1",
        before=json.dumps(before),
        last=json.dumps(last),
    )


@pytest.mark.usefixtures("well")
def test_job_source_that_cannot_be_asked_is_wrong_usage(doctor: Doctor) -> None:
    """A source without its query fails in every sweep, so it is found before."""
    found = doctor(KINO_JOB_SOURCE="sql", KINO_JOB_SOURCE_URL="postgresql://x/y")

    says = "KINO_JOB_SOURCE=sql needs KINO_JOB_SOURCE_QUERY with the parameter :job_ids"
    advice = "correct it; the settings table in deploy/README.md says what each is for"
    assert found == Diagnosis(2, [Found("settings", "fail", says, advice)])


# --- servers that are away


@pytest.mark.usefixtures("well")
def test_server_that_is_away_is_exit_3_and_the_other_is_looked_at(doctor: Doctor) -> None:
    """Which of the two is away is said, without its password, and a paused intake would still be found."""
    postgres = doctor(KINO_DATABASE_URL=f"postgresql://kino_worker:hunter2@{LOOPBACK}:{AWAY_PORT}/kino")
    redis = doctor(KINO_REDIS_URL=f"redis://:hunter2@{LOOPBACK}:{AWAY_PORT}/0")

    for server, found in (("postgres", postgres), ("redis", redis)):
        ((check, level, text, advice),) = found.bad
        assert (found.code, check, level) == (3, server, "away")
        assert "refused" in text
        assert advice == "check that it runs, its URL, and the user and password in it"
        assert "hunter2" not in text


@pytest.mark.usefixtures("well")
def test_user_that_is_not_let_in_is_exit_3(doctor: Doctor, database: Database, redis_url: str) -> None:
    """A role that does not exist or a wrong password is told as the server tells it."""
    wrong = redis_url.replace("redis://", "redis://nobody:hunter2@")

    found = doctor(KINO_DATABASE_URL=database.url("kino_nobody"), KINO_REDIS_URL=wrong)

    assert (found.code, [(each.check, each.level) for each in found.bad]) == (
        3,
        [("postgres", "away"), ("redis", "away")],
    )
    assert 'role "kino_nobody" does not exist' in found.bad[0].found
    assert "invalid username-password pair" in found.bad[1].found


@contextmanager
def silent_server() -> Iterator[int]:
    """A port that takes connections and never says a word, as a stopped server does."""
    with socket.create_server((LOOPBACK, 0)) as listener:
        yield listener.getsockname()[1]


def test_server_that_swallows_everything_is_away(doctor: Doctor, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client's own time-outs end the wait for a server that accepts and does not answer."""
    monkeypatch.setattr(redis_connections, "ANSWER_TIMEOUT_S", 0.1)
    with silent_server() as port:
        found = doctor(
            KINO_DATABASE_URL=f"postgresql://kino_worker@{LOOPBACK}:{port}/kino",
            KINO_REDIS_URL=f"redis://{LOOPBACK}:{port}/0",
        )

    assert found.code == 3
    assert [(each.check, each.level) for each in found.bad] == [("postgres", "away"), ("redis", "away")]
    assert "timeout" in found.bad[0].found
    assert "Timeout" in found.bad[1].found


def test_check_that_does_not_end_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """What no client's time-out sees, a name server for one, does not hang the doctor; what was found is kept."""
    monkeypatch.setattr(findings, "CHECK_WITHIN_S", 0.1)
    released = threading.Event()
    first = findings.Finding("postgres version", "ok", "18")

    def look() -> Iterator[findings.Finding]:
        yield first
        released.wait(60)

    found = list(findings.bounded("postgres", look))
    released.set()

    advice = "check that it runs, and that this machine reaches it by the address in its URL"
    assert found == [first, findings.Finding("postgres", "away", "no answer within 0.1 s", advice)]


def test_error_in_a_check_is_not_swallowed() -> None:
    """An error of ours is a finding without advice; a mistake in the doctor itself is no finding at all."""

    def refuse() -> list[findings.Finding]:
        raise LedgerInconsistent("two marks")

    def fall() -> list[findings.Finding]:
        raise ZeroDivisionError

    assert list(findings.bounded("x", refuse)) == [findings.Finding("x", "fail", "two marks")]
    with pytest.raises(ZeroDivisionError):
        list(findings.bounded("x", fall))


# --- queues


@pytest.mark.usefixtures("well")
def test_settings_come_before_servers_and_servers_before_findings(doctor: Doctor, redis: Redis, redis_url: str) -> None:
    """With several exit codes to choose from, the one that names what to do first: 2, then 3, then 1."""
    redis.set(QUEUE_KEYS[0], "x")
    away = f"postgresql://kino_worker@{LOOPBACK}:{AWAY_PORT}/kino"

    codes = [
        doctor(KINO_JOB_SOURCE="sql", KINO_DATABASE_URL=away, KINO_REDIS_URL=redis_url).code,
        doctor(KINO_DATABASE_URL=away).code,
        doctor().code,
    ]

    assert codes == [2, 3, 1]
