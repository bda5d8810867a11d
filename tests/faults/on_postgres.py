"""Faults of Postgres: killed, hanging, refusing, ending sessions, silent after a commit."""

from __future__ import annotations

import time
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

import psycopg
import sqlalchemy as sa

from kino_refunds.errors import KinoError
from tests.faults.harness import scenario
from tests.faults.proxy import Proxy
from tests.faults.workload import CAPTURED, FAILED, OPEN, TIMED_OUT, Message
from tests.faults.world import World, require

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from workers.intake import Intake


def _mixture(world: World) -> tuple[list[Message], list[Message]]:
    """Make a batch that reaches every statement; returns it, and those of it whose charges come later."""
    work = world.workload
    settling = work.some(6, kinds=("completed", "failed", "failed user", "timeout", "rejected before"))
    early = work.event(work.job(FAILED), "failed")
    first = work.event(work.job(CAPTURED), "completed", at_s=-5)
    against = work.event(first.job_id, "timeout", at_s=-4)
    work.breaks.add(("failed_after_capture", first.job_id))
    conflict = work.event(first.job_id, "completed", event_id=first.event_id, at_s=-3, fate="dead")
    elsewhere = work.event(work.job(OPEN), "failed", fate="dead", account_id="somebody-else")
    noise = work.add(Message(b"{not json %d" % len(work.messages), settling[0].queue, "", "", "", "dead"))
    world.open([*settling, first, elsewhere])
    # Settled before, so that whoever takes the rest apart, this one was first.
    world.publish([first])
    world.consume(world.intake())
    return [*settling, settling[0], early, early, first, against, conflict, elsewhere, noise], [early]


def _crash_at(
    world: World, batch: Sequence[Message], later: Sequence[Message], engine: sa.Engine, *, dies: bool
) -> None:
    """Settle a batch with an engine that fails once; then go on, as the same worker or as its successor."""
    world.publish(batch)
    queues = world.queues(alive_ttl_s=0.03 if dies else 30.0)
    intake = world.intake(queues=queues, engine=engine)
    with suppress(sa.exc.SQLAlchemyError):
        intake.run_once()
    if dies:
        world.until(lambda: world.queues().recover().messages or not world.in_flight(), "the worker's death")
        intake = world.intake()
    world.open(later)
    for _ in range(3 * len(batch)):
        with suppress(sa.exc.SQLAlchemyError):
            if not intake.run_once() and not world.waiting():
                break
    world.settle_down()


@scenario("session ended in settle", quick=True)
def every_statement_is_a_crash_point(world: World) -> None:
    """The session ends after any statement of a batch: settled again, by whomever, all is as if nothing was (P2)."""
    counted = 0

    def number(_: sa.Connection, statement: int) -> None:
        nonlocal counted
        counted = statement

    with world.watched(number) as engine:
        _crash_at(world, *_mixture(world), engine, dies=False)
    require(counted > 10, "a batch has many statements")
    for point in range(1, counted + 1):

        def crash(connection: sa.Connection, statement: int, point: int = point) -> None:
            if statement == point:
                world.end_session(connection)

        with world.watched(crash) as engine:
            _crash_at(world, *_mixture(world), engine, dies=point % 2 == 0)


@scenario("session ended in settle", quick=True)
def every_session_ends(world: World) -> None:
    """As long as every session ends in the middle of its transaction, the batch is kept, and no event blamed (P6)."""
    messages = world.workload.some(10)
    world.open(messages)
    world.publish(messages)
    ending = True

    def end(connection: sa.Connection, _: int) -> None:
        locked = world.sql(
            "SELECT 1 FROM pg_locks l JOIN pg_stat_activity a USING (pid) WHERE a.datname = current_database()"
            " AND a.application_name = 'kino-here' AND l.relation = 'kino.settlement'::regclass"
        )
        if ending and locked:
            world.end_session(connection)

    with world.watched(end) as engine:
        intake = world.intake(engine=engine)
        for _ in range(3):
            with suppress(sa.exc.SQLAlchemyError):
                intake.run_once()
        require(world.in_flight() == len(messages), "the batch is kept")
        ending = False
        world.drain(intake)


@scenario("commit without its answer", quick=True)
def every_commit_may_go_unheard(world: World) -> None:
    """A commit that fails, and one that is done but not heard of: settled again, nothing is lost or paid twice."""
    for point in (1, 2, 3):
        for done in (False, True):
            for dies in (False, True):
                engine, commits = world.new_engine(), 0
                dialect: Any = engine.dialect
                really = dialect.do_commit

                def commit(raw: Any, really: Any = really, point: int = point, done: bool = done) -> None:
                    nonlocal commits
                    commits += 1
                    if commits == point and not done:
                        raw.dbapi_connection.close()
                    really(raw)
                    if commits == point and done:
                        raw.dbapi_connection.close()
                        raise psycopg.OperationalError("the connection is closed")

                dialect.do_commit = commit
                world.faults["commit unheard"] += 1
                _crash_at(world, *_mixture(world), engine, dies=dies)


Contest: TypeAlias = tuple[list[Message], list[Message], list[Message]]
"""What one worker has, what the other one has, and the messages whose charges come later."""


def _meet_between_any_two_statements(world: World, contest: Callable[[World], Contest]) -> None:
    """Let one worker settle; after each of its statements in turn, another one settles what it has."""
    # What reads the gate comes before the claim: from the second statement on, each has its own batch.
    statements, point = 2, 1
    while point < statements:
        point += 1
        mine, theirs, later = contest(world)
        world.publish(mine)
        other = world.intake(engine=world.new_engine())

        def meet(
            _: sa.Connection, statement: int, point: int = point, theirs: Sequence[Message] = theirs, other: Any = other
        ) -> None:
            nonlocal statements
            statements = max(statements, statement)
            if statement == point:
                world.publish(theirs)
                # What it cannot write now, because we hold it, it keeps, as its loop would.
                with suppress(sa.exc.SQLAlchemyError, KinoError):
                    other.run_once()
                world.faults["other worker first"] += 1

        with world.watched(meet) as engine:
            intake = world.intake(engine=engine)
            world.until(partial(_both_done, world, (intake, other)), "both workers")
        world.open(later)
        world.settle_down()


def _both_done(world: World, intakes: Sequence[Intake]) -> bool:
    for each in intakes:
        with suppress(sa.exc.SQLAlchemyError, KinoError):
            each.run_once()
    return not world.waiting()


@scenario("another worker in between", quick=True)
def same_events_at_two_workers(world: World) -> None:
    """Two workers with the same events, one of them without its charge, settle each once (P2)."""

    def contest(world: World) -> Contest:
        work = world.workload
        same, early = work.event(work.job(FAILED), "failed"), work.event(work.job(FAILED), "failed provider")
        world.open([same])
        return [same, early], [early, same], [early]

    _meet_between_any_two_statements(world, contest)


@scenario("another worker in between", quick=True)
def two_ends_of_a_job_at_two_workers(world: World) -> None:
    """Two workers with different ends of one job refund it once, whoever is first (P1, P3)."""

    def contest(world: World) -> Contest:
        work = world.workload
        job = work.job(FAILED, TIMED_OUT)
        failed, timed_out = work.event(job, "failed"), work.event(job, "timeout")
        world.open([failed])
        return [failed], [timed_out], []

    _meet_between_any_two_statements(world, contest)


@scenario("another worker in between", quick=True)
def one_event_id_for_two_jobs_at_two_workers(world: World) -> None:
    """Two workers with one event id and two jobs settle one of them; the other is a conflict that is kept (P2)."""

    def contest(world: World) -> Contest:
        work = world.workload
        # Of two accounts, so that they share nothing but the id.
        jobs = [work.job(FAILED, account_id=account_id) for account_id in work.accounts[:2]]
        shared = f"shared-{jobs[0].job_id}"
        left, right = (work.event(job, "failed", event_id=shared, fate="either") for job in jobs)
        work.rivals.append((jobs[0].job_id, jobs[1].job_id))
        world.open([left, right])
        return [left], [right], []

    _meet_between_any_two_statements(world, contest)


@scenario("Postgres killed and restarted")
def postgres_killed(world: World) -> None:
    """Postgres killed under load and started again: what was committed stands, the rest is settled (P1, P6)."""
    world.start_worker(KINO_INTAKE_BATCH="20")
    world.until_ready()
    messages = world.workload.some(200)
    world.open(messages)
    world.publish(messages[:100])
    world.until(lambda: world.settled() > 10, "the first settlements")
    world.servers.postgres.kill()
    world.faults["Postgres killed"] += 1
    world.publish(messages[100:])
    world.servers.postgres.start()
    world.settle_down()


@scenario("Postgres stopped")
def postgres_stopped_for_half_a_minute(world: World) -> None:
    """Postgres hangs for 30 s under a batch; its worker seems dead, another takes over, nothing is paid twice (P1)."""
    messages = world.workload.some(60)
    world.open(messages)
    with world.locked_lots():
        world.publish(messages[:30])
        world.start_worker()
        world.until_settling()
        with world.stopped_postgres():
            world.publish(messages[30:])
            world.start_worker()
            ends_at = time.monotonic() + 30.0
            world.until(lambda: time.monotonic() > ends_at, "the end of the stop")
            recovered = world.redis.keys("kino:recovered:*")
        require(recovered, "the batch was recovered from a worker that seemed dead")
    world.settle_down()


@scenario("sessions terminated")
def sessions_terminated(world: World) -> None:
    """Somebody ends the workers' sessions again and again: each batch is kept and settled (P6)."""
    world.start_worker(KINO_INTAKE_BATCH="10")
    world.until_ready()
    for _ in world.stream(200):
        world.until(lambda: world.terminate_sessions("kino-intake"), "a session to end")
    world.settle_down()


@scenario("Postgres read-only")
def postgres_read_only(world: World) -> None:
    """A server that came back as a standby is waited for, and gone on with once it is promoted (P6)."""
    messages = world.workload.some(60)
    world.open(messages)
    world.start_worker()
    world.until_ready()
    world.servers.postgres.stop()
    (world.servers.postgres.data / "standby.signal").touch()
    world.servers.postgres.start()
    world.faults["Postgres read-only"] += 1
    world.publish(messages)
    world.until(lambda: world.in_flight() == len(messages) and "read-only" in world.last_words(), "a kept batch")
    require(world.settled() == 0, "nothing could be written")
    world.sql("SELECT pg_promote()")
    world.settle_down()


@scenario("Postgres out of disk", quick=True)
def postgres_out_of_disk(world: World) -> None:
    """Postgres refuses rows for want of space: the batch is kept, not blamed, and settled when there is room (P6).

    The error is raised by a trigger of the test's: a full file system cannot be had without mounting one.
    """
    messages = world.workload.some(40)
    world.open(messages)
    world.sql(
        "CREATE FUNCTION public.no_space() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
        " RAISE EXCEPTION 'could not extend file: No space left on device' USING ERRCODE = '53100'; END $$"
    )
    world.sql(
        "CREATE TRIGGER no_space BEFORE INSERT ON kino.settlement FOR EACH STATEMENT EXECUTE FUNCTION public.no_space()"
    )
    world.faults["Postgres out of disk"] += 1
    world.publish(messages)
    intake = world.intake()
    for _ in range(5):
        with suppress(sa.exc.OperationalError):
            intake.run_once()
    require(world.in_flight() == len(messages), "the batch is kept")
    world.sql("DROP FUNCTION public.no_space CASCADE")
    world.drain(intake)


@scenario("commit without its answer")
def answer_to_the_commit_lost(world: World) -> None:
    """The network loses the answer to a worker's COMMIT: the batch settles again, as duplicates (P2)."""
    messages = world.workload.some(30)
    world.open(messages)
    with Proxy(world.servers.postgres.port) as proxy:
        database_url = world.port_in(world.servers.database_url(database=world.database), proxy.port)
        with world.locked_lots():
            world.publish(messages)
            world.start_worker(KINO_DATABASE_URL=database_url)
            world.until_settling()
            lost = proxy.lose_answer(answer=b"COMMIT\0")
        world.until(lost.is_set, "the lost answer")
        world.faults["commit unheard"] += 1
        world.settle_down()


@scenario("half-open connection")
def half_open_to_postgres(world: World) -> None:
    """A connection to Postgres that says nothing more, then breaks: another worker takes over, nothing twice (P1)."""
    messages = world.workload.some(30)
    world.open(messages)
    with Proxy(world.servers.postgres.port) as proxy:
        database_url = world.port_in(world.servers.database_url(database=world.database), proxy.port)
        with world.locked_lots():
            world.publish(messages)
            world.start_worker(KINO_DATABASE_URL=database_url)
            world.until_settling()
            proxy.freeze()
            world.faults["half-open connection"] += 1
        world.start_worker()
        world.settle_down()
        proxy.cut()
        proxy.thaw()
        for _ in world.stream(40):
            pass
        world.settle_down()


DEFAULTS = (
    "datestyle = 'SQL, DMY'",
    "datestyle = 'German'",
    "intervalstyle = 'sql_standard'",
    "timezone = 'Asia/Tokyo'",
    "client_encoding = 'LATIN1'",
    "bytea_output = 'escape'",
    "search_path = 'nowhere'",
    "default_transaction_isolation = 'serializable'",
    "default_transaction_read_only = on",
    "standard_conforming_strings = off",
    "plan_cache_mode = 'force_generic_plan'",
    "statement_timeout = '1ms'",
)


@scenario("session defaults", quick=True)
def defaults_of_the_database(world: World) -> None:
    """Whatever a database's sessions begin with, the same events settle the same way (P8)."""

    def alter(what: str) -> None:
        with world.servers.postgres.connect() as superuser:  # of another database: under this default it may be refused
            superuser.execute(f'ALTER DATABASE "{world.database}" {what}'.encode())

    for default in DEFAULTS:
        alter(f"SET {default}")
        world.faults["session default"] += 1
        messages = world.workload.some(10)
        world.open(messages)
        world.publish(messages)
        world.consume(world.intake(engine=world.new_engine()))
        alter("RESET ALL")
        require(world.settled() == len(world.workload.messages), f"all is settled under {default}")
