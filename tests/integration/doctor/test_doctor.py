"""`doctor`: each thing that can be wrong is planted on real servers, and only that is found, with what to do."""

from __future__ import annotations

import json
import re
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import time_machine
from redis import Redis

from kino_refunds.db.migrate import head_revision
from kino_refunds.dev.embedded import LOOPBACK, EmbeddedPostgres, EmbeddedValkey
from kino_refunds.dev.supervisor import Orders
from kino_refunds.doctor import findings, on_postgres, on_redis
from kino_refunds.errors import LedgerInconsistent
from kino_refunds.events import connection as redis_connections
from kino_refunds.events.queues import QUEUE_KEYS, SERVED
from kino_refunds.events.schema import to_json
from kino_refunds.intake.gate import TRIPWIRE, pause_intake
from kino_refunds.ledger import ChargeRequest, Grant, LotClass, grant_lots, open_charges
from kino_refunds.reconciliation.adapters import HOW_TO_CHOOSE
from tests.clock import clock_at
from tests.command_line import Run
from tests.conftest import Database
from tests.scenario import EVENT_AT, NOW, Scene, make_event

AWAY_PORT = 1
"""Nobody listens on tcpmux here, and a connection to it is refused at once."""
MINUTE = timedelta(minutes=1)
SWEEPS = {
    "try waiting events again": "kino.sweep_retries",
    "expire lots": "kino.expire_lots",
    "note which time belongs to which transaction": "kino.sample_clock",
}
OVERDUE = ("ask about jobs without an event", "kino.sweep_overdue")


class Found(NamedTuple):
    """A finding that is not `ok`."""

    check: str
    level: str
    found: str
    advice: str


class Diagnosis(NamedTuple):
    code: int
    bad: list[Found]


Doctor = Callable[..., Diagnosis]
CHOSEN: dict[str, str | None] = {"KINO_JOB_SOURCE": "http", "KINO_JOB_SOURCE_URL": "https://jobs.example/ask"}
"""A source about which the doctor has nothing to say: it reads the setting, and asks nobody."""


@pytest.fixture
def run(run: Run) -> Run:
    """Run a command where a job source is chosen, unless the test says otherwise."""
    return lambda *arguments, stdin=b"", **environment: run(*arguments, stdin=stdin, **(CHOSEN | environment))


@pytest.fixture
def doctor(run: Run) -> Doctor:
    """Run the doctor against this test's servers, or those that are given."""

    def examine(**environment: str | None) -> Diagnosis:
        result = run("doctor", "--json", stdin=b"", **environment)
        assert set(result.json) == {"items", "next"}
        items = result.json["items"]
        assert {item["advice"] for item in items if item["level"] == "ok"} <= {None}
        return Diagnosis(result.code, [Found(**item) for item in items if item["level"] != "ok"])

    return examine


def work(scene: Scene, *, ago: timedelta = timedelta(0), started_ago: timedelta = MINUTE, name: str = "") -> None:
    """Let a worker have been seen that long ago, and every sweep (or one) have run to its end then."""
    seconds = f"interval '{ago.total_seconds()} seconds'"
    started = f"interval '{started_ago.total_seconds()} seconds'"
    scene.as_superuser(
        "DELETE FROM kino.intake_worker",
        "INSERT INTO kino.intake_worker (worker_id, host, pid, build, started_at, seen_at)"
        f" VALUES (gen_random_uuid(), 'host-1', 1, 'b1', clock_timestamp() - {started}, clock_timestamp() - {seconds})",
        *(
            "INSERT INTO kino.schedule_slot (name, slot_at, claimed_by, finished_at, result)"
            f" VALUES ('{each}', clock_timestamp() - {seconds}, 'beat', clock_timestamp(), '{{}}')"
            for each in ((name,) if name else (*SWEEPS.values(), OVERDUE[1]))
        ),
        "INSERT INTO kino.xid_clock DEFAULT VALUES",
    )


@pytest.fixture
def well(scene: Scene) -> Scene:
    """A ledger on which a worker and beat work."""
    work(scene)
    return scene


@pytest.fixture(scope="module")
def own_valkey() -> Iterator[EmbeddedValkey]:
    """A Redis whose configuration may be spoiled."""
    with tempfile.TemporaryDirectory(prefix="kino-doctor-") as folder:
        server = EmbeddedValkey(Path(folder) / "valkey", scratch=True).start()
        yield server
        server.stop()


@contextmanager
def spoiled(server: EmbeddedValkey, **options: str) -> Iterator[str]:
    """Give the URL of a server that is configured like this for as long as the block runs."""
    with Redis.from_url(server.url()) as client:
        before = {name: client.config_get(name)[name] for name in (each.replace("_", "-") for each in options)}
        for name, value in options.items():
            client.config_set(name.replace("_", "-"), value)
        try:
            yield server.url()
        finally:
            for name, value in before.items():
                client.config_set(name, value)


class OwnPostgres(EmbeddedPostgres):
    """A fresh Postgres, without roles or ledger, whose options may be spoiled."""

    options: tuple[str, ...] = ()

    def _orders(self, port: int) -> Orders:
        orders = super()._orders(port)
        return replace(orders, command=[*orders.command, *self.options])


@pytest.fixture(scope="module")
def own_postgres() -> Iterator[OwnPostgres]:
    with tempfile.TemporaryDirectory(prefix="kino-doctor-") as folder:
        Path(folder).chmod(0o711)
        server = OwnPostgres(Path(folder) / "postgres", scratch=True).start()
        yield server
        server.stop()


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
        *("intake", "workers", "beat", "beat", "beat", "beat"),
        "waiting messages",
        *("overdue charges", "dead letters", "breaks", "verified through", "horizon"),
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
                "remove it: nobody reads it",
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
    assert advice == "correct it; the README's table of settings says what each is for"


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
    says = "KINO_JOB_SOURCE is not set: a job whose event is lost is never found, and stays open for good"

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
            "none of them is settled until the source is fixed; then `kino-refunds overdue run --dry-run`",
        ),
        (
            {"source_broken": 0, "source_errors": 2, "source_problem": "status 500", "answers": {}},
            *("away", 3, "the last sweep got no answer for 2 jobs: status 500"),
            "those jobs are asked about again; if it stays, check that the source runs, its URL and its password",
        ),
        (
            {"source_broken": 0, "source_errors": 2, "source_problem": "status 500", "answers": {"running": 1}},
            *("warn", 0, "the last sweep got no answer for 2 jobs: status 500"),
            "those jobs are asked about again; if it stays, check that the source runs, its URL and its password",
        ),
        (
            {"source_problem": "KINO_JOB_SOURCE_QUERY cannot run: \x1b[2J"},
            *("fail", 1, "the last sweep could not ask: KINO_JOB_SOURCE_QUERY cannot run: \x1b[2J"),
            "none of them is settled until the source is fixed; then `kino-refunds overdue run --dry-run`",
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
    advice = "correct it; the README's table of settings says what each is for"
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

    found = list(findings.guarded("postgres", look))
    released.set()

    advice = "check that it runs, and that this machine reaches it by the address in its URL"
    assert found == [first, findings.Finding("postgres", "away", "no answer within 0.1 s", advice)]


def test_error_in_a_check_is_not_swallowed() -> None:
    """An error of ours is a finding without advice; a mistake in the doctor itself is no finding at all."""

    def refuse() -> list[findings.Finding]:
        raise LedgerInconsistent("two marks")

    def fall() -> list[findings.Finding]:
        raise ZeroDivisionError

    assert list(findings.guarded("x", refuse)) == [findings.Finding("x", "fail", "two marks")]
    with pytest.raises(ZeroDivisionError):
        list(findings.guarded("x", fall))


# --- Postgres


@pytest.mark.usefixtures("well")
def test_old_postgres_is_found(doctor: Doctor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Below the oldest version that is supported nothing is promised."""
    monkeypatch.setattr(on_postgres, "POSTGRES_MIN", 99_00_00)

    found = doctor()

    assert (found.code, [each.check for each in found.bad]) == (1, ["postgres version"])
    assert found.bad[0].advice == "Postgres 15 or newer is needed"


@pytest.mark.parametrize("option", ["fsync", "full_page_writes"])
def test_disk_that_is_not_waited_for_is_found(doctor: Doctor, own_postgres: OwnPostgres, option: str) -> None:
    """Either of the two off: what was answered may be gone, or torn, after a power cut."""
    own_postgres.options = (f"--{option}=off",)
    own_postgres.restart()
    try:
        found = doctor(KINO_DATABASE_URL=own_postgres.url("postgres", "postgres"))
    finally:
        own_postgres.options = ()
        own_postgres.restart()

    states = {"fsync": "on", "synchronous_commit": "on", "full_page_writes": "on"} | {option: "off"}
    assert found.code == 1
    assert found.bad[0] == Found(
        "durability",
        "fail",
        ", ".join(" ".join(pair) for pair in states.items()),
        "set fsync and full_page_writes on, synchronous_commit not off: a COMMIT that is lost is a lost refund",
    )


def test_commit_that_does_not_wait_is_found(doctor: Doctor, well: Scene, database: Database) -> None:
    """synchronous_commit off for this database alone is off for every worker of it."""
    well.as_superuser(f"ALTER DATABASE {database.name} SET synchronous_commit = off")

    found = doctor()

    assert (found.code, [(each.check, each.level) for each in found.bad]) == (1, [("durability", "fail")])
    assert found.bad[0].found == "fsync on, synchronous_commit off, full_page_writes on"


def test_session_in_which_triggers_do_not_fire_is_found(doctor: Doctor, well: Scene, database: Database) -> None:
    """Some tools leave a database so: a charge would open, and no sweep would ever see it."""
    well.as_superuser(f"ALTER DATABASE {database.name} SET session_replication_role = replica")

    found = doctor()

    assert (found.code, [(each.check, each.level) for each in found.bad]) == (1, [("triggers", "fail")])
    assert found.bad[0].found == "session_replication_role is replica"


def test_standby_is_found(doctor: Doctor, own_postgres: OwnPostgres) -> None:
    """A standby answers every question and takes no settlement."""
    signal = own_postgres.data / "standby.signal"
    own_postgres.stop()
    signal.touch()
    try:
        own_postgres.start()
        found = doctor(KINO_DATABASE_URL=own_postgres.url("postgres", "postgres"))
    finally:
        own_postgres.stop()
        signal.unlink(missing_ok=True)
        own_postgres.start()

    assert found.code == 1
    assert ("postgres writable", "fail", "a standby") in [each[:3] for each in found.bad]


@pytest.mark.usefixtures("well")
@pytest.mark.parametrize(("apart_s", "level"), [(4, None), (20, "fail"), (-20, "fail")])
def test_clock_that_is_off_is_found(doctor: Doctor, apart_s: int, level: str | None) -> None:
    """A host more than 5 s from a server is not kept by NTP; at 30 s presumed timeouts and expiry stop."""
    with time_machine.travel(datetime.now(UTC) + timedelta(seconds=apart_s), tick=True):
        found = doctor()

    expected = [("postgres clock", level), ("redis clock", level)] if level else []
    assert [(each.check, each.level) for each in found.bad] == expected
    assert found.code == (1 if level else 0)
    for each in found.bad:
        assert float(each.found.removesuffix(" s from this host's")) > abs(apart_s) - 1
        assert each.advice.startswith("set both by NTP: ")


def test_a_clock_that_somebody_replaced_is_found(doctor: Doctor, well: Scene, run: Run) -> None:
    """A ledger whose `kino.clock()` is a test's decides by it: the doctor fails, and `migrate` puts ours back."""
    with clock_at(well.worker, datetime.now(UTC) + timedelta(seconds=1)):
        found = doctor()
        migrated = run("migrate")

    assert [each[:3] for each in found.bad if each.check == "ledger clock"] == [
        ("ledger clock", "fail", "kino.clock() is a test's")
    ]
    assert (found.code, migrated.code) == (1, 0)
    assert doctor() == Diagnosis(0, [])


def test_missing_roles_and_ledger_are_found(doctor: Doctor, own_postgres: OwnPostgres) -> None:
    """On a fresh server: who runs what to get the roles and the schema."""
    found = doctor(KINO_DATABASE_URL=own_postgres.url("postgres", "postgres"))

    assert found.code == 1
    assert [each[:3] for each in found.bad] == [
        ("roles", "fail", "missing: kino_ledger, kino_oncall, kino_owner, kino_product, kino_read, kino_worker"),
        ("rights", "fail", "connected as postgres, which is a superuser"),
        ("migrations", "fail", "the database has no ledger yet"),
    ]
    assert [each.advice for each in found.bad] == [
        "a superuser runs kino_refunds/db/roles.sql in this database",
        "connect workers as kino_worker: what runs must not be able to change what is only added to",
        "run `kino-refunds migrate` as kino_owner",
    ]


@pytest.mark.parametrize(
    ("role", "attribute", "says"),
    [
        ("postgres", None, "is a superuser"),
        ("kino_owner", None, "owns the ledger"),
        ("kino_strong", "CREATEROLE", "may create roles"),
        ("kino_strong", "CREATEDB", "may create databases"),
        ("kino_strong", "REPLICATION", "may replicate the server"),
        ("kino_strong", "ROLE kino_owner", "owns the ledger"),
    ],
)
def test_role_that_could_change_history_is_found(
    doctor: Doctor, well: Scene, database: Database, role: str, attribute: str | None, says: str
) -> None:
    """A worker that connects as more than kino_worker could do what no role that runs may."""
    if attribute is not None:
        in_role = attribute.startswith("ROLE")
        well.as_superuser(
            f"CREATE ROLE {role} LOGIN {'' if in_role else attribute} IN ROLE kino_worker"
            + (", kino_owner" if in_role else "")
        )
    try:
        found = doctor(KINO_DATABASE_URL=database.url(role))
    finally:
        if attribute is not None:
            well.as_superuser(f"DROP ROLE {role}")

    advice = "connect workers as kino_worker: what runs must not be able to change what is only added to"
    assert found == Diagnosis(1, [Found("rights", "fail", f"connected as {role}, which {says}", advice)])


def test_role_that_stands_for_the_worker_is_fine(doctor: Doctor, well: Scene, database: Database) -> None:
    """What counts are the rights: managed servers give every program a login of its own."""
    well.as_superuser("CREATE ROLE kino_login LOGIN IN ROLE kino_worker")
    try:
        found = doctor(KINO_DATABASE_URL=database.url("kino_login"))
    finally:
        well.as_superuser("DROP ROLE kino_login")

    assert found == Diagnosis(0, [])


REVOKE = "revoke that, as kino_owner: what runs must not be able to change what is only added to"
GRANT = "connect as kino_worker (KINO_DATABASE_URL); its rights are granted by `kino-refunds migrate`"


@pytest.mark.parametrize(
    ("change", "says", "advice"),
    [
        ("GRANT UPDATE ON kino.transfer TO kino_worker", "may also UPDATE on transfer", REVOKE),
        ("GRANT INSERT (job_id) ON kino.charge TO kino_worker", "may also INSERT on charge", REVOKE),
        ("GRANT DELETE ON kino.settlement TO kino_worker", "may also DELETE on settlement", REVOKE),
        ("GRANT TRUNCATE ON kino.inbox_event TO kino_worker", "may also TRUNCATE on inbox_event", REVOKE),
        ("GRANT TRIGGER ON kino.charge TO PUBLIC", "may also TRIGGER on charge", REVOKE),
        ("GRANT INSERT ON kino.charge TO kino_worker", "may also INSERT on charge", REVOKE),
        ("GRANT UPDATE (credits) ON kino.charge TO kino_worker", "may also UPDATE on charge", REVOKE),
        ("GRANT UPDATE ON kino.credit_lot TO kino_worker", "may also UPDATE on credit_lot", REVOKE),
        ("REVOKE INSERT ON kino.inbox_event FROM kino_worker", "may not INSERT on inbox_event", GRANT),
        ("REVOKE SELECT ON kino.charge FROM kino_worker", "may not SELECT on charge", GRANT),
        ("REVOKE DELETE ON kino.pending_event FROM kino_worker", "may not DELETE on pending_event", GRANT),
    ],
)
def test_rights_are_those_of_a_worker_and_no_more(
    doctor: Doctor, well: Scene, change: str, says: str, advice: str
) -> None:
    """One right too many is found as one that is missing, with its table."""
    well.as_superuser(change)

    found = doctor()

    ((check, level, text, told),) = found.bad
    assert (found.code, check, level, told) == (1, "rights", "fail", advice)
    assert f"{text}, ".startswith(f"kino_worker {says}, ")


def test_right_to_create_in_the_ledger_is_found(doctor: Doctor, well: Scene) -> None:
    """Who may make a table or function beside the ledger's can stand in front of them."""
    well.as_superuser("GRANT CREATE ON SCHEMA kino TO kino_worker")

    found = doctor()

    assert (found.code, [each[:3] for each in found.bad]) == (
        1,
        [("rights", "fail", "connected as kino_worker, which may create tables in the ledger")],
    )


@pytest.mark.parametrize("role", ["kino_read", "kino_product"])
@pytest.mark.usefixtures("well")
def test_role_of_somebody_else_is_found(doctor: Doctor, database: Database, role: str) -> None:
    """A worker with another's URL would keep every batch: the first rights that it lacks are named."""
    found = doctor(KINO_DATABASE_URL=database.url(role))

    assert found.code == 1
    assert found.bad[0][:2] == ("rights", "fail")
    assert found.bad[0].found.startswith(f"{role} may not DELETE on intake_worker, ")
    assert re.search(r" and \d+ more$", found.bad[0].found)
    assert found.bad[0].advice == GRANT


def test_role_that_may_not_even_look_is_found(doctor: Doctor, well: Scene) -> None:
    """Without a right to the schema nothing in it can be looked at; no error is taken for a server that is away."""
    well.as_superuser("REVOKE USAGE ON SCHEMA kino FROM kino_worker")

    found = doctor()

    assert found == Diagnosis(1, [Found("rights", "fail", "kino_worker may not look into the ledger", GRANT)])


def test_rights_of_tables_of_a_newer_build_are_not_judged(doctor: Doctor, well: Scene) -> None:
    """An older build works on a newer schema, whose tables it cannot know."""
    well.as_superuser("CREATE TABLE kino.invoice (n integer)", "GRANT ALL ON kino.invoice TO kino_worker")

    assert doctor() == Diagnosis(0, [])


@pytest.mark.parametrize("instead", [[], ["CREATE SCHEMA kino AUTHORIZATION kino_owner"]])
def test_database_without_a_ledger_is_found(doctor: Doctor, well: Scene, instead: list[str]) -> None:
    """Where nothing was migrated, or only begun, that is the one thing to do; rights and workers come after it."""
    well.as_superuser("DROP SCHEMA kino CASCADE", *instead)

    found = doctor()

    advice = "run `kino-refunds migrate` as kino_owner"
    assert found == Diagnosis(1, [Found("migrations", "fail", "the database has no ledger yet", advice)])


def test_schema_that_is_behind_is_found(doctor: Doctor, well: Scene) -> None:
    """This build needs what was not migrated yet."""
    well.as_superuser("UPDATE kino.alembic_version SET version_num = '0001'")

    found = doctor()

    advice = "run `kino-refunds migrate` as kino_owner; until then workers keep what needs the new schema"
    head = head_revision()
    says = f"the schema is at 0001, this build is at {head}"
    assert found == Diagnosis(1, [Found("migrations", "fail", says, advice)])


def test_schema_that_is_ahead_is_a_warning(doctor: Doctor, well: Scene) -> None:
    """An old build on a newer schema works: an upgrade is under way, or this build was left behind."""
    well.as_superuser("UPDATE kino.alembic_version SET version_num = '9999'")

    found = doctor()

    advice = "fine while an upgrade is under way; then replace this build, which is older than the schema"
    says = "the schema is at 9999, of which this build does not know"
    assert found == Diagnosis(0, [Found("migrations", "warn", says, advice)])


@pytest.mark.parametrize("change", ["DISABLE TRIGGER append_only", "ENABLE REPLICA TRIGGER append_only"])
def test_table_that_can_be_changed_again_is_found(doctor: Doctor, well: Scene, change: str) -> None:
    """A trigger that was switched off for an hour and forgotten leaves P5 to the grants alone."""
    well.as_superuser(f"ALTER TABLE kino.transfer {change}", "DROP TRIGGER append_only ON kino.settlement")

    found = doctor()

    assert (found.code, [each[:3] for each in found.bad]) == (
        1,
        [("append-only", "fail", "the trigger is off or gone: settlement, transfer")],
    )
    assert "ENABLE TRIGGER append_only" in found.bad[0].advice


# --- who works on it


FAILING_BUILD = (
    "our own code fails, see `kino-refunds dead-letters list --reason apply_error`; a build that works reopens it"
)


@pytest.mark.parametrize(
    ("actor", "advice"),
    [
        ("anna", "when the reason is gone: `kino-refunds intake resume`"),
        (TRIPWIRE, FAILING_BUILD),
    ],
)
def test_paused_intake_is_found_and_who_can_open_it(doctor: Doctor, well: Scene, actor: str, advice: str) -> None:
    """What a person closed a person opens; what the tripwire closed opens by itself once the build works."""
    with well.worker.begin() as connection:
        pause_intake(connection, reason="51 of the last 1000", actor=actor)

    found = doctor()

    at = well.rows("SELECT to_char(changed_at AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI:SS') FROM kino.intake_state")
    says = f"paused by {actor} at {at[0][0]}Z: 51 of the last 1000"
    assert found == Diagnosis(1, [Found("intake", "fail", says, advice)])


START = "start `celery -A workers.app worker`; one that runs and is not seen says why in its log"


@pytest.mark.parametrize("ago", ["31 seconds", "3 days"])
def test_worker_that_is_silent_is_found(doctor: Doctor, well: Scene, ago: str) -> None:
    """Nobody takes events, and when somebody last did."""
    well.as_superuser(f"UPDATE kino.intake_worker SET seen_at = clock_timestamp() - interval '{ago}'")

    found = doctor()

    seen = well.rows("SELECT to_char(seen_at AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI:SS') FROM kino.intake_worker")
    says = f"0 alive; the last was seen {seen[0][0]}Z"
    assert found == Diagnosis(1, [Found("workers", "fail", says, START)])


def test_worker_that_ended_or_never_was_is_found(doctor: Doctor, well: Scene) -> None:
    """A worker that said that it ends is not alive, however fresh its heartbeat; nor is one that never started."""
    well.as_superuser("UPDATE kino.intake_worker SET stopped_at = seen_at")
    ended = doctor()
    well.as_superuser("DELETE FROM kino.intake_worker")
    never = doctor()

    assert [(each.code, [bad[:2] for bad in each.bad]) for each in (ended, never)] == [(1, [("workers", "fail")])] * 2
    assert ended.bad[0].found.startswith("0 alive; the last was seen ")
    assert never.bad == [Found("workers", "fail", "0 alive; none was ever seen", START)]


LATE = "see that `celery -A workers.app beat` and a worker run, and that Redis is not full"


@pytest.mark.parametrize(
    ("ago_s", "late"),
    [(20, []), (31, ["try waiting events again"]), (181, [*SWEEPS, OVERDUE[0]])],
)
def test_sweep_that_stands_still_is_found(doctor: Doctor, scene: Scene, ago_s: int, late: list[str]) -> None:
    """Three slots without a run, and never less than half a minute, mean that beat is dead."""
    work(scene, ago=timedelta(seconds=ago_s))
    scene.as_superuser("UPDATE kino.intake_worker SET seen_at = clock_timestamp()")

    found = doctor()

    assert found.code == (1 if late else 0)
    assert [(each.check, each.level, each.found.partition(": last 2")[0], each.advice) for each in found.bad] == [
        ("beat", "fail", what, LATE) for what in late
    ]


@pytest.mark.parametrize(("started_s_ago", "level", "code"), [(10, "warn", 0), (181, "fail", 1)])
def test_sweep_that_never_ran_is_late_once_a_worker_was_there(
    doctor: Doctor, scene: Scene, started_s_ago: int, level: str, code: int
) -> None:
    """Just after the start it is too early to say; a worker that waited for three slots says that beat is missing."""
    work(scene, started_ago=timedelta(seconds=started_s_ago), name="kino.sweep_retries")

    found = doctor()

    assert found.code == code
    assert [each[:3] for each in found.bad] == [
        ("beat", level, "expire lots: last never"),
        ("beat", level, "note which time belongs to which transaction: last never"),
        ("beat", level, f"{OVERDUE[0]}: last never"),
    ]


def test_sweep_that_begins_and_never_ends_is_a_warning(doctor: Doctor, well: Scene) -> None:
    """A sweep that raises takes its slot every time, so it looks alive; that none came to its end shows it."""
    well.as_superuser(
        "UPDATE kino.schedule_slot SET slot_at = slot_at - interval '10 minutes' WHERE name = 'kino.expire_lots'",
        "INSERT INTO kino.schedule_slot (name, slot_at, claimed_by) VALUES ('kino.expire_lots', now(), 'beat')",
    )

    found = doctor()

    ((check, level, text, advice),) = found.bad
    assert (found.code, check, level, advice) == (0, "beat", "warn", "a worker's log says what stops it")
    assert re.fullmatch(r"expire lots: last \S+ \S+Z, to its end \S+ \S+Z", text)


# --- work


def test_work_that_waits_for_a_person_is_found(doctor: Doctor, well: Scene) -> None:
    """Overdue charges, letters with credits at stake and breaks fail the doctor, each with the command to type."""
    well.grant("acct-1")
    with well.product.begin() as connection:
        late = ChargeRequest("job-late", "acct-1", 5, NOW - timedelta(hours=2))
        open_charges(connection, [late, ChargeRequest("job-letter", "acct-1", 3, NOW + timedelta(hours=2))])
    well.charged("job-2")
    well.settle(make_event("failed platform", "job-2"), now=None)
    wrong = make_event("timeout", "job-letter", account_id="somebody else")
    well.settle(make_event("completed", "job-2"), wrong, now=None)

    found = doctor()

    assert found.code == 1
    assert found.bad == [
        Found(
            "overdue charges",
            "fail",
            "1 charge with 5 credits stood open more than 5 min past deadline and grace",
            "`kino-refunds overdue run --dry-run` says what is known of them, and what withholds them",
        ),
        Found(
            "dead letters",
            "fail",
            "1 open (account_mismatch 1), 3 credits at stake",
            "`kino-refunds dead-letters list`",
        ),
        Found("breaks", "fail", "1 break open", "a job's ending disagrees with the ledger: `kino-refunds breaks list`"),
    ]


def test_a_charge_that_is_being_asked_about_is_a_warning(doctor: Doctor, well: Scene) -> None:
    """For 5 minutes past deadline and grace the sweep asks: that is said, and nothing has to be mended."""
    well.grant("acct-1")
    with well.product.begin() as connection:
        open_charges(connection, [ChargeRequest("job-1", "acct-1", 5, datetime.now(UTC) - timedelta(minutes=2))])

    found = doctor()

    assert (found.code, [each[:3] for each in found.bad]) == (
        0,
        [("overdue charges", "warn", "1 charge past deadline and grace")],
    )


@pytest.mark.parametrize(("minutes", "level", "code"), [(4, None, 0), (6, "warn", 0), (61, "fail", 1)])
def test_who_holds_the_horizon_is_named(
    doctor: Doctor, well: Scene, minutes: int, level: str | None, code: int
) -> None:
    """A writing transaction that stays open holds back statements and relay: its session is named with its program."""
    well.as_superuser(f"UPDATE kino.xid_clock SET sampled_at = kino.clock() - interval '{minutes} minutes'")
    with well.product.begin() as forgotten:
        grant_lots(forgotten, [Grant("never committed", "acct-1", 5, LotClass.COURTESY)])
        pid = forgotten.exec_driver_sql("SELECT pg_backend_pid()").scalar_one()
        well.as_superuser("INSERT INTO kino.xid_clock DEFAULT VALUES")

        found = doctor()

        forgotten.rollback()
    assert (found.code, [each[:2] for each in found.bad]) == (code, [("horizon", level)] if level else [])
    for each in found.bad:
        assert each.found == f"stands still since {minutes} min, held by pid {pid} (kino_product, kino-refunds)"


# --- Redis


@pytest.mark.parametrize(
    ("options", "check", "says", "advice"),
    [
        (
            {"maxmemory_policy": "allkeys-lru"},
            "redis eviction",
            "allkeys-lru",
            "set maxmemory-policy noeviction: any other throws events away without a word",
        ),
        (
            {"appendonly": "no"},
            "redis persistence",
            "append-only file off",
            "set appendonly yes: what a restart forgets is found only after its job's deadline",
        ),
    ],
)
@pytest.mark.usefixtures("well")
def test_redis_that_would_lose_events_is_found(
    doctor: Doctor, own_valkey: EmbeddedValkey, options: dict[str, str], check: str, says: str, advice: str
) -> None:
    """A Redis that evicts or forgets is a cache, and events are not."""
    with spoiled(own_valkey, **options) as url:
        found = doctor(KINO_REDIS_URL=url)

    assert found == Diagnosis(1, [Found(check, "fail", says, advice)])


FULL = (
    "a full Redis refuses publishers, and beat cannot hand out sweeps, while workers still drain it:"
    " see what waits with `kino-refunds intake status`"
)


@pytest.mark.usefixtures("well")
def test_full_redis_is_found_with_what_it_means(doctor: Doctor, own_valkey: EmbeddedValkey) -> None:
    """At its limit it refuses publishers; that no right is missing is told apart from it."""
    with spoiled(own_valkey, maxmemory="1mb") as url:
        found = doctor(KINO_REDIS_URL=url)

    ((check, level, text, advice),) = found.bad
    assert (found.code, check, level, advice) == (1, "redis memory", "fail", FULL)
    assert re.fullmatch(r"full: \d+\.\d MiB of 1\.0 MiB", text)


@pytest.mark.usefixtures("well")
def test_redis_that_fills_up_is_a_warning(doctor: Doctor, own_valkey: EmbeddedValkey) -> None:
    """Above four fifths there is still time to look at what waits."""
    with Redis.from_url(own_valkey.url()) as client:
        used = client.info("memory")["used_memory"]
    with spoiled(own_valkey, maxmemory=str(int(used * 1.12))) as url:
        found = doctor(KINO_REDIS_URL=url)

    ((check, level, text, advice),) = found.bad
    assert (found.code, check, level, advice) == (0, "redis memory", "warn", FULL)
    assert not text.startswith("full")


@pytest.mark.usefixtures("well")
def test_replica_is_found(doctor: Doctor, own_valkey: EmbeddedValkey) -> None:
    """A replica answers and takes no writes: the URL must follow the primary."""
    with Redis.from_url(own_valkey.url()) as client:
        client.replicaof(LOOPBACK, AWAY_PORT)
        try:
            found = doctor(KINO_REDIS_URL=own_valkey.url())
        finally:
            client.replicaof("NO", "ONE")

    advice = "a replica takes no writes: give KINO_REDIS_URL an address that follows the primary"
    assert found == Diagnosis(1, [Found("redis role", "fail", "replica; rights and queues were not looked at", advice)])


@pytest.mark.parametrize(
    ("oldest", "level", "code", "advice"),
    [
        ("REDIS_MIN", "fail", 1, "Redis 6.2 or newer, or Valkey, is needed"),
        (None, "warn", 0, "deploy/users.acl needs 7.0 (selectors), and nothing is tried with less than 7.2: upgrade"),
    ],
)
@pytest.mark.usefixtures("well")
def test_old_redis_is_found(
    doctor: Doctor, monkeypatch: pytest.MonkeyPatch, oldest: str | None, level: str, code: int, advice: str
) -> None:
    """Without LMOVE nothing works; without ACL selectors deploy/users.acl does not, and the rest does."""
    monkeypatch.setattr(on_redis, "ACL_SELECTORS_SINCE", (99, 0))
    if oldest is not None:
        monkeypatch.setattr(on_redis, oldest, (99, 0))

    found = doctor()

    assert (found.code, [(each.check, each.level, each.advice) for each in found.bad]) == (
        code,
        [("redis version", level, advice)],
    )


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ({"cluster_enabled": 1}, ("redis cluster", "on", "the scripts span keys: ")),
        (
            {"aof_last_write_status": "err"},
            ("redis persistence", "the append-only file cannot be written", "see Redis' log and its disk: "),
        ),
    ],
)
@pytest.mark.usefixtures("well")
def test_redis_that_says_so_of_itself_is_found(
    doctor: Doctor, monkeypatch: pytest.MonkeyPatch, said: dict[str, Any], expected: tuple[str, str, str]
) -> None:
    """A cluster, and a disk that is full, as INFO reports them: neither can be had here for real."""
    info = Redis.info
    monkeypatch.setattr(Redis, "info", lambda client: info(client) | said)

    found = doctor()

    ((check, level, text, advice),) = found.bad
    assert (found.code, level, check, text) == (1, "fail", *expected[:2])
    assert advice.startswith(expected[2])


RIGHTS = "connect as the user `worker` of this build's deploy/users.acl; `ACL LOG` names what was refused"


@pytest.mark.parametrize(
    ("rules", "says"),
    [
        ("+@all ~* -lmove", "refused: LMOVE generation.job-failed, LMOVE kino:inflight:doctor:generation.job-failed,"),
        ("+@all ~* -evalsha", "refused: EVALSHA 0000"),
        ("+@all ~* -script|load", "refused: SCRIPT LOAD return 0"),
        ("+@all ~generation.* ~_kombu.* ~kino:celery:*", "refused: LMOVE generation.job-failed,"),
        ("+@all ~generation.* ~_kombu.* ~kino:*", None),
        ("+@all ~generation.* ~kino:*", "refused: SMEMBERS _kombu.binding.generation.job-failed,"),
        ("+@all ~* -zadd", "refused: ZADD kino:celery:unacked_index"),
        ("+@all ~* -time", "refused: TIME"),
    ],
)
@pytest.mark.usefixtures("well")
def test_right_that_a_worker_lacks_is_found_and_nothing_is_tried_for_real(
    doctor: Doctor, own_valkey: EmbeddedValkey, rules: str, says: str | None
) -> None:
    """The server is asked inside a transaction that is thrown away: every key is as it was."""
    with Redis.from_url(own_valkey.url()) as client:
        client.flushall()
        client.lpush(QUEUE_KEYS[0], to_json(make_event("completed", at=datetime.now(UTC))))
        client.execute_command("ACL", "SETUSER", "limited", "reset", "on", ">secret", *rules.split())
        before = {key: client.dump(key) for key in client.scan_iter()}
        try:
            found = doctor(KINO_REDIS_URL=own_valkey.url().replace("redis://", "redis://limited:secret@"))
            after = {key: client.dump(key) for key in client.scan_iter()}
        finally:
            client.execute_command("ACL", "DELUSER", "limited")
            client.flushall()

    assert after == before
    assert found.code == (1 if says else 0)
    if says is None:
        assert found.bad == []
    else:
        assert (found.bad[0].check, found.bad[0].level, found.bad[0].advice) == ("redis rights", "fail", RIGHTS)
        assert found.bad[0].found.startswith(says)


@pytest.mark.usefixtures("well")
def test_relay_needs_a_right_to_its_queue(doctor: Doctor, own_valkey: EmbeddedValkey) -> None:
    """Only where the product is told of refunds is the right to tell it asked for."""
    with Redis.from_url(own_valkey.url()) as client:
        rules = ["+@all", "~generation.*", "~_kombu.*", "~kino:*"]
        client.execute_command("ACL", "SETUSER", "limited", "reset", "on", ">secret", *rules)
        url = own_valkey.url().replace("redis://", "redis://limited:secret@")
        try:
            found = doctor(KINO_REDIS_URL=url, KINO_RELAY_QUEUE="product.refunds")
        finally:
            client.execute_command("ACL", "DELUSER", "limited")

    assert [each[:3] for each in found.bad if each.check != "beat"] == [
        ("redis rights", "fail", "refused: LPUSH product.refunds")
    ]


# --- queues

FOREIGN = "somebody else writes under our names: RENAME that key away, as admin, and look at what it is"


@pytest.mark.usefixtures("well")
def test_key_that_is_not_a_queue_is_found(doctor: Doctor, redis: Redis) -> None:
    """A queue's name that holds something else is never read; its control characters are shown escaped."""
    redis.set(QUEUE_KEYS[1], "x")

    found = doctor()

    says = r"they hold something foreign: 'generation.job-failed\x06\x163'"
    assert found == Diagnosis(1, [Found("queue keys", "fail", says, FOREIGN)])


@pytest.mark.usefixtures("well")
def test_key_of_ours_that_holds_something_else_is_found(doctor: Doctor, redis: Redis) -> None:
    """Every script of intake refuses then, and kombu's publishers too, while nothing seems to wait."""
    redis.sadd("kino:workers", "w")
    redis.set("kino:inflight:w:generation.timeout", "x")
    redis.set("kino:recovered:generation.job-failed", "x")
    for queue in SERVED:
        redis.set(f"_kombu.binding.{queue}", "x")

    found = doctor()
    redis.set("kino:workers", "x")
    registry = doctor()

    says = (
        "they hold something foreign: 'kino:inflight:w:generation.timeout', 'kino:recovered:generation.job-failed', "
        + ", ".join(f"'_kombu.binding.{queue}'" for queue in SERVED)
    )
    assert found == Diagnosis(1, [Found("queue keys", "fail", says, FOREIGN)])
    assert "'kino:workers'" in registry.bad[0].found


@pytest.mark.usefixtures("well")
def test_queue_whose_name_is_misspelt_is_found(doctor: Doctor, redis: Redis) -> None:
    """A publisher's typo is a list that nobody reads; lists of other people are none of our business."""
    redis.lpush("generation.job-complete", "{}")
    redis.lpush("generation.time-out", "{}")
    for name in ("jobs.to-do", "generation.jobs", "generation.timeouts", "kino:inflight:w:generation.job-failed"):
        redis.lpush(name, "{}")

    found = doctor(KINO_RELAY_QUEUE="generation.timeouts")

    advice = (
        "if those are events: mend their publisher, then move each, as admin: LMOVE 'generation.job-complete'"
        " generation.job-completed RIGHT LEFT, LMOVE 'generation.time-out' generation.timeout RIGHT LEFT"
    )
    says = "no worker reads 'generation.job-complete', 'generation.time-out'"
    assert [each for each in found.bad if each.check != "beat"] == [Found("queue names", "warn", says, advice)]


MISSPELT = {
    "GENERATION.JOB-FAILED": "generation.job-failed",
    "Generation.Timeout": "generation.timeout",
    "generation_job-failed": "generation.job-failed",
    "generation:job-failed": "generation.job-failed",
    "generation.job_completed": "generation.job-completed",
    "generation/safety-rejection": "generation.safety-rejection",
    "generationJobFailed": "generation.job-failed",
    "prod:generation.timeout": "generation.timeout",
    "myapp_generation.job-failed": "generation.job-failed",
    "generation.timeout\x06\x165": "generation.timeout",
}


@pytest.mark.parametrize("name", MISSPELT)
def test_each_form_of_a_misspelt_name_is_found(redis: Redis, name: str) -> None:
    """Another case, another separator, a prefix and a priority that kombu has elsewhere: each with how to move it."""
    redis.lpush(name, "{}")

    found = on_redis._misspelt(redis, None)

    move = f"LMOVE {name!a} {MISSPELT[name]} RIGHT LEFT"
    advice = f"if those are events: mend their publisher, then move each, as admin: {move}"
    assert found == findings.Finding("queue names", "warn", f"no worker reads {name!a}", advice)


OTHER_LIBRARIES = {
    "bull:generation.job-failed:*": ("bull:generation.job-failed:wait", "bull:generation.job-failed:meta"),
    "{bull}:generation.timeout:*": ("{bull}:generation.timeout:events",),
    "bq:generation.timeout:*": ("bq:generation.timeout:waiting",),
    "rq:queue:generation.timeout": ("rq:queue:generation.timeout",),
    "dramatiq:generation.timeout": ("dramatiq:generation.timeout",),
    "dramatiq:generation.timeout.msgs": ("dramatiq:generation.timeout.msgs",),
    "resque:queue:generation.job-completed": ("resque:queue:generation.job-completed",),
    "queue:generation.safety-rejection": ("queue:generation.safety-rejection",),
    "queues:generation.job-failed": ("queues:generation.job-failed",),
    "laravel_database_queues:generation.job-failed": ("laravel_database_queues:generation.job-failed",),
    "arq:queue:Generation.Job_Failed": ("arq:queue:Generation.Job_Failed",),
    "generation-timeout": ("generation-timeout",),
}


PUT = {
    "list": ("LPUSH", "{0}", "x"),
    "stream": ("XADD", "{0}", "*", "a", "b"),
    "zset": ("ZADD", "{0}", "1", "a"),
    "hash": ("HSET", "{0}", "a", "b"),
}


@pytest.mark.parametrize("family", OTHER_LIBRARIES)
@pytest.mark.parametrize("held", PUT)
def test_queue_of_another_library_is_found_once(redis: Redis, family: str, held: str) -> None:
    """Whatever type a library keeps its messages in; they are not events that could be moved, but published again."""
    put: Any = redis.execute_command
    for name in OTHER_LIBRARIES[family]:
        put(*(word.format(name) for word in PUT[held]))

    found = on_redis._misspelt(redis, None)

    assert (found.level, found.found) == ("warn", f"no worker reads {family!a}")
    if held == "list" and family == "generation-timeout":
        assert found.advice is not None
        assert "LMOVE 'generation-timeout' generation.timeout" in found.advice
    else:
        ways = "EventPublisher, kombu without a key prefix, or a bare LPUSH"
        assert found.advice == (
            f"another library wrote {family!a} in a form of its own: publish by {ways}, and publish those events again"
        )


def test_key_that_only_speaks_of_a_queue_is_not_named(redis: Redis) -> None:
    """Counters, caches and other people's queues are none of our business, nor are keys of our own."""
    redis.set("metrics:generation.timeout", 1)
    redis.hset("metrics:generation.job-failed", "count", "1")
    redis.set("generation.timeouts", "1")
    redis.lpush("bull:emails:wait", "1")
    redis.lpush("rq:queue:default", "1")
    redis.lpush("queue:generation.jobs", "1")
    redis.lpush("generation.jobs", "1")
    redis.lpush("kino.credits-refunded.generation.timeout", "1")

    assert on_redis._misspelt(redis, None).level == "ok"


@pytest.mark.usefixtures("well")
@pytest.mark.parametrize(("user", "level"), [("default", "warn"), ("worker", "ok"), ("", "ok")])
def test_queue_names_are_looked_at_where_the_user_may(
    run: Run, own_valkey: EmbeddedValkey, user: str, level: str
) -> None:
    """Who says that it is `default` may list keys as a rule; who may not is told that nothing was looked at."""
    with Redis.from_url(own_valkey.url()) as admin:
        admin.lpush("generation.job-complete", "{}")
        admin.acl_setuser("worker", enabled=True, nopass=True, keys=["*"], channels=["*"], categories=["+@all"])
        if not user:
            admin.execute_command("ACL", "SETUSER", "default", "-scan")
        url = own_valkey.url().replace("//", f"//{user}:x@" if user else "//")
        try:
            items = run("doctor", "--json", KINO_REDIS_URL=url).json["items"]
        finally:
            admin.execute_command("ACL", "SETUSER", "default", "+@all")
            admin.flushall()

    ((found, told),) = [(each["level"], each["found"]) for each in items if each["check"] == "queue names"]
    assert found == level
    assert ("not looked at" in told) == (level == "ok")
    assert [each["level"] for each in items if each["check"] == "queue keys"] == ["ok"]


@pytest.mark.usefixtures("well")
def test_old_event_that_waits_is_a_warning(doctor: Doctor, redis: Redis) -> None:
    """The oldest of all is what counts, on whatever queue and priority; what cannot be parsed has no age."""
    redis.lpush(QUEUE_KEYS[0], "{", to_json(make_event("completed", at=datetime.now(UTC))))
    redis.lpush(QUEUE_KEYS[5], to_json(make_event("timeout", at=EVENT_AT - 10 * MINUTE)))

    found = doctor()

    ((check, level, text, advice),) = found.bad
    assert (found.code, check, level) == (0, "queues", "warn")
    assert advice == "see `kino-refunds intake status`: is intake open, are workers alive? Then start more of them"
    counts, age_s = text.split("; the oldest event is ")
    assert counts == "3 wait (generation.job-failed 2, generation.timeout 1)"
    assert int(age_s.removesuffix(" s old")) >= 660


@pytest.mark.usefixtures("well")
def test_events_of_one_message_have_their_age(doctor: Doctor, redis: Redis) -> None:
    """The oldest event of a message that holds several counts as any other."""
    events = [make_event("completed", at=datetime.now(UTC)), make_event("timeout", at=EVENT_AT - 10 * MINUTE)]
    redis.lpush(QUEUE_KEYS[0], b"[%s]" % b",".join(map(to_json, events)))

    found = doctor()

    assert [each[:2] for each in found.bad] == [("queues", "warn")]


def test_message_that_waits_for_more_than_a_day_is_named(doctor: Doctor, well: Scene) -> None:
    """What no longer holds back other jobs' verdicts is shown, with the jobs that it still does hold back."""
    well.as_superuser(
        "INSERT INTO kino.waiting_message VALUES"
        " ('\\x01', clock_timestamp() - interval '25 hours', ARRAY['job-1', E'job\\x1b2']),"
        " ('\\x02', clock_timestamp() - interval '2 days', '{}'),"
        " ('\\x03', clock_timestamp() - interval '23 hours', ARRAY['job-3'])"
    )

    found = doctor()

    ((check, level, text, advice),) = found.bad
    assert (found.code, check, level) == (0, "waiting messages", "warn")
    assert re.fullmatch(
        r"2 wait in Redis for more than a day, the first since [\d :-]+Z, about 'job-1', 'job\\x1b2'", text
    )
    assert advice is not None
    assert "kino-refunds intake status" in advice


@pytest.mark.usefixtures("well")
def test_young_events_that_wait_are_fine(doctor: Doctor, run: Run, redis: Redis) -> None:
    """Waiting for a moment is what a queue is for; how much waits where is said all the same."""
    redis.lpush(QUEUE_KEYS[0], to_json(make_event("completed", at=datetime.now(UTC))))
    redis.sadd("kino:workers", "w")
    redis.lpush(f"kino:inflight:w:{QUEUE_KEYS[0]}", "no event")

    found = doctor()
    said = json.loads(run("doctor", "--json").out)["items"][-1]["found"]

    assert found == Diagnosis(0, [])
    assert re.fullmatch(r"2 wait \(generation\.job-failed 1, in-flight 1\); the oldest event is \d s old", said)


@pytest.mark.usefixtures("well")
def test_backlog_that_is_not_read_to_its_end_says_so(doctor: Doctor, redis: Redis) -> None:
    """Of a large backlog only the first part is read; the age is then that of those."""
    old = to_json(make_event("completed", at=EVENT_AT - MINUTE))
    redis.lpush(QUEUE_KEYS[0], *[old] * 10_001)

    found = doctor()

    assert [each[:2] for each in found.bad] == [("queues", "warn")]
    assert found.bad[0].found.startswith("10,001 wait (generation.job-failed 10,001); the oldest event is ")
    assert found.bad[0].found.endswith(" s old, of those that were read")


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
