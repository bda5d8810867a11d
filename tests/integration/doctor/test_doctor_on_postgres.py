"""What can be wrong with Postgres is planted on real servers, and only that is found, with what to do."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta

import pytest
import time_machine

from kino_refunds.db.migrate import head_revision
from kino_refunds.doctor import on_postgres
from tests.clock import clock_at
from tests.command_line import Run
from tests.conftest import Database
from tests.integration.doctor.diagnosis import Diagnosis, Doctor, Found, OwnPostgres
from tests.scenario import Scene


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
        "connect workers as kino_worker: a worker must not be able to change tables that are append-only",
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

    advice = "connect workers as kino_worker: a worker must not be able to change tables that are append-only"
    assert found == Diagnosis(1, [Found("rights", "fail", f"connected as {role}, which {says}", advice)])


def test_role_that_stands_for_the_worker_is_fine(doctor: Doctor, well: Scene, database: Database) -> None:
    """What counts are the rights: managed servers give every program a login of its own."""
    well.as_superuser("CREATE ROLE kino_login LOGIN IN ROLE kino_worker")
    try:
        found = doctor(KINO_DATABASE_URL=database.url("kino_login"))
    finally:
        well.as_superuser("DROP ROLE kino_login")

    assert found == Diagnosis(0, [])


REVOKE = "revoke that, as kino_owner: a worker must not be able to change tables that are append-only"
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

    advice = "fine during an upgrade; then replace this build, which is older than the schema"
    says = "the schema is at 9999, which this build does not know"
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
