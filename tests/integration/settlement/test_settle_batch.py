"""One bad event among many: it is found and kept, its neighbours settle, and what is not its fault is nobody's."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
import sqlalchemy as sa

from kino_refunds.db.engine import SessionLimits, create_engine
from kino_refunds.db.faults import Fault, classify
from kino_refunds.events.schema import to_json
from kino_refunds.ledger import Balance
from kino_refunds.settlement import decide as decide_module
from kino_refunds.settlement.batch import settle_batch, settle_parts
from kino_refunds.settlement.deliveries import GIVE_UP_AFTER
from kino_refunds.settlement.pending import LONGEST_DELAY
from tests.failing import mend, refuse
from tests.scenario import EVENT_AT, KINDS, NOW, Dead, Scene, Story, Waits, deliveries_of, make_event, make_rules

if TYPE_CHECKING:
    from kino_refunds.events.schema import Event
    from tests.conftest import Database

JOBS = [f"job-{number}" for number in range(9)]
BAD = "job-4"


def charge_all(scene: Scene) -> list[Event]:
    """Charge every job to an account of its own; returns the event that refunds each."""
    for job_id in JOBS:
        scene.charged(job_id)
    return [make_event("timeout", job_id) for job_id in JOBS]


def balances(scene: Scene) -> dict[str, Balance]:
    return {job_id: scene.balance(f"acct of {job_id}") for job_id in JOBS}


REFUNDED = Balance(100, 0)
OPEN = Balance(90, 10)
ALL_BUT_BAD = {job_id: OPEN if job_id == BAD else REFUNDED for job_id in JOBS}


@pytest.mark.parametrize(
    ("table", "condition"),
    [
        ("inbox_event", f"NEW.job_id = '{BAD}'"),
        ("settlement", f"NEW.event_id = '{BAD} timeout'"),
        ("transfer", "NEW.reason = 'timeout' AND NEW.credits = 11"),
    ],
)
def test_a_database_that_refuses_one_event_settles_the_others(scene: Scene, table: str, condition: str) -> None:
    """The event that Postgres refuses is a dead letter with the whole story; all its neighbours are refunded."""
    for job_id in JOBS:
        scene.charged(job_id, credits=11 if job_id == BAD else 10)
    refuse(scene, table, condition, "RAISE EXCEPTION USING MESSAGE = 'not this one, ' || TG_TABLE_NAME")

    said = scene.settle_batch(*(make_event("timeout", job_id) for job_id in JOBS))

    [(detail, trace)] = scene.rows("SELECT detail, exception FROM kino.dead_letter")
    assert said == {f"{job_id} timeout": "refunded" for job_id in JOBS if job_id != BAD}
    assert scene.dead_letters() == [Dead(f"{BAD} timeout", BAD, "apply_error", 1, "open")]
    assert f"not this one, {table}" in detail
    assert trace.startswith("Traceback (most recent call last):")
    assert "psycopg.errors.RaiseException" in trace
    assert balances(scene) == {**ALL_BUT_BAD, BAD: Balance(89, 11)}
    assert scene.story(BAD) == Story(dead_letters={f"{BAD} timeout": "apply_error"})


def test_an_event_that_was_refused_is_settled_once_the_database_takes_it(scene: Scene) -> None:
    """A dead letter is no ruling: the same event again, when nothing is in its way, is refunded."""
    events = charge_all(scene)
    refuse(scene, "inbox_event", f"NEW.job_id = '{BAD}'", "RAISE EXCEPTION 'not this one'")
    scene.settle_batch(*events)
    mend(scene)

    said = scene.settle_batch(*events)

    assert said == {event.id: "refunded" if event.job_id == BAD else "duplicate" for event in events}
    assert balances(scene) == dict.fromkeys(JOBS, REFUNDED)


def test_several_bad_events_are_each_found(scene: Scene) -> None:
    """However many events are bad, exactly those are kept, and a batch of nothing else is no endless loop."""
    events = charge_all(scene)
    bad = {"job-0", "job-3", "job-4", "job-8"}
    refuse(scene, "settlement", "NEW.event_id ~ '^job-[0348] '", "RAISE EXCEPTION 'not these'")

    said = scene.settle_batch(*events)
    again = scene.settle_batch(*(event for event in events if event.job_id in bad))

    assert said == {event.id: "refunded" for event in events if event.job_id not in bad}
    assert again == {}
    assert {(dead.job_id, dead.reason, dead.seen) for dead in scene.dead_letters()} == {
        (job_id, "apply_error", 2) for job_id in bad
    }


def test_an_exception_of_ours_is_held_against_one_event(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mistake in our own code, met by one event, costs that event and no other."""
    events = charge_all(scene)
    rule = decide_module._rule

    def stumbles(delivery: Any, *rest: Any, **named: Any) -> Any:
        if delivery.event.job_id == BAD:
            raise ZeroDivisionError("planted \x00\x1b[2J")
        return rule(delivery, *rest, **named)

    monkeypatch.setattr(decide_module, "_rule", stumbles)
    said = scene.settle_batch(*events)

    [(detail, trace)] = scene.rows("SELECT detail, exception FROM kino.dead_letter")
    assert said == {event.id: "refunded" for event in events if event.job_id != BAD}
    assert detail == r"ZeroDivisionError: planted \x00\x1b[2J"
    assert trace.endswith(r"ZeroDivisionError: planted \x00\x1b[2J" + "\n")
    assert balances(scene) == ALL_BUT_BAD


def test_the_remaining_events_of_a_bad_event_s_job_are_settled(scene: Scene) -> None:
    """Within one job only the bad event is kept; what else is known of the job decides it, oldest first."""
    scene.charged()
    refuse(scene, "inbox_event", "NEW.event_id = 'job-1 timeout'", "RAISE EXCEPTION 'not this one'")

    said = scene.settle_batch(
        make_event("completed", at=EVENT_AT + (NOW - EVENT_AT)),
        make_event("timeout", at=EVENT_AT),
        make_event("failed platform", at=EVENT_AT + (NOW - EVENT_AT) / 2),
    )

    assert said == {"job-1 failed platform": "refunded", "job-1 completed": "completed_after_refund"}
    assert scene.dead_letters() == [Dead("job-1 timeout", "job-1", "apply_error", 1, "open")]


def test_a_bad_event_that_waited_waits_no_more(scene: Scene) -> None:
    """A retry that Postgres refuses becomes a dead letter and leaves the pending rows."""
    scene.settle(make_event("timeout"))
    scene.charged()
    refuse(scene, "inbox_event", "true", "RAISE EXCEPTION 'not this one'")

    said = scene.sweep()

    assert said == {}
    assert scene.story() == Story(dead_letters={"job-1 timeout": "apply_error"})


def test_a_bad_message_under_a_waiting_event_s_id_leaves_that_event_waiting(scene: Scene) -> None:
    """Giving up on one content of an id does not give up the other content, which is still tried again."""
    scene.settle(make_event("timeout", event_id="evt"))
    refuse(scene, "dead_letter", "NEW.reason = 'conflicting_duplicate'", "RAISE EXCEPTION 'not this one'")

    said = scene.settle_batch(make_event("completed", event_id="evt"))

    assert said == {}
    assert scene.story() == Story(pending={"evt": "charge_not_found"}, dead_letters={"evt": "apply_error"})


def test_a_charge_whose_lines_do_not_add_up_moves_nothing(scene: Scene) -> None:
    """A ledger that contradicts itself is not made worse: the event is kept and its neighbour refunded."""
    scene.charged("job-1")
    bad = scene.charged("job-2")
    scene.as_superuser(
        "ALTER TABLE kino.charge_line DISABLE TRIGGER append_only",
        f"UPDATE kino.charge_line SET credits = credits - 1 WHERE charge_id = {bad.charge_id}",
    )

    said = scene.settle_batch(make_event("timeout", "job-1"), make_event("timeout", "job-2"))

    assert said == {"job-1 timeout": "refunded"}
    assert scene.story("job-2") == Story(dead_letters={"job-2 timeout": "apply_error"})


def test_an_event_whose_letter_is_refused_too_is_kept_as_its_bytes(scene: Scene) -> None:
    """What is wrong with an event may keep its letter away too; its bytes are kept and its neighbours refunded."""
    events = charge_all(scene)
    refuse(scene, "inbox_event", f"NEW.job_id = '{BAD}'", "RAISE EXCEPTION 'not this one'")
    scene.as_superuser(
        f"CREATE TRIGGER planted BEFORE INSERT ON kino.dead_letter FOR EACH ROW WHEN (NEW.job_id = '{BAD}')"
        " EXECUTE FUNCTION kino.planted()"
    )

    said = scene.settle_batch(*events)

    [(raw, detail, *unsaid)] = scene.rows(
        "SELECT raw, detail, exception, source, event_id, job_id FROM kino.dead_letter"
    )
    assert said == {event.id: "refunded" for event in events if event.job_id != BAD}
    assert raw == to_json(events[JOBS.index(BAD)])
    assert "not this one" in detail
    assert unsaid == [None] * 4


def test_a_bad_event_whose_pending_row_is_held_is_kept_beside_it(scene: Scene) -> None:
    """A pending row that another session holds keeps no letter away, and no neighbour waiting."""
    scene.settle(make_event("timeout", BAD))
    events = charge_all(scene)
    refuse(scene, "inbox_event", f"NEW.job_id = '{BAD}'", "RAISE EXCEPTION 'not this one'")

    with scene.superuser.begin() as other:
        other.exec_driver_sql("SELECT FROM kino.pending_event FOR UPDATE")
        said = scene.settle_batch(*events)

    assert said == {event.id: "refunded" for event in events if event.job_id != BAD}
    assert scene.dead_letters() == [Dead(f"{BAD} timeout", BAD, "apply_error", 1, "open")]
    assert scene.pending() == {f"{BAD} timeout": Waits(BAD, "charge_not_found", 0)}


def test_an_event_that_seems_decided_elsewhere_for_ever_waits_alone(scene: Scene) -> None:
    """A row that can never be inserted looks as if another session were faster: its event waits, the others settle."""
    events = charge_all(scene)
    refuse(scene, "inbox_event", f"NEW.job_id = '{BAD}'", "RETURN NULL")

    said = scene.settle_batch(*events)

    assert said == {event.id: "busy" if event.job_id == BAD else "refunded" for event in events}
    assert scene.pending() == {f"{BAD} timeout": Waits(BAD, "busy", 0)}
    assert balances(scene) == ALL_BUT_BAD


def test_a_waiting_event_that_this_build_cannot_read_stops_no_other(scene: Scene) -> None:
    """An event parked by a newer build that was taken back is a dead letter; the sweep goes on with the others."""
    events = [make_event("timeout", job_id) for job_id in JOBS]
    scene.settle_batch(*events)
    charge_all(scene)
    scene.as_superuser(
        "UPDATE kino.pending_event SET event = jsonb_set(event, '{type}', '\"kino.generation.job-paused.v1\"')"
        f" WHERE job_id = '{BAD}'"
    )

    said = scene.sweep()

    assert said == {"refunded": len(JOBS) - 1}
    assert scene.pending() == {}
    assert scene.dead_letters() == [Dead(f"{BAD} timeout", BAD, "unknown_type", 1, "open")]


# What is not the events' fault.


KEPT: dict[str, Callable[[Scene], None]] = {
    "read-only": lambda scene: refuse(
        scene, "inbox_event", f"NEW.job_id = '{BAD}'", "RAISE EXCEPTION 'a standby' USING ERRCODE = '25006'"
    ),
    "no right to the inbox": lambda scene: scene.as_superuser("REVOKE INSERT ON kino.inbox_event FROM kino_worker"),
    "no right to settle": lambda scene: scene.as_superuser(
        "REVOKE EXECUTE ON FUNCTION kino.settle_charges(jsonb) FROM kino_worker"
    ),
    "the function's own right to lots": lambda scene: scene.as_superuser(
        "REVOKE UPDATE (remaining) ON kino.credit_lot FROM kino_ledger"
    ),
    "no function": lambda scene: scene.as_superuser("ALTER FUNCTION kino.settle_charges(jsonb) RENAME TO of_then"),
    "no schema": lambda scene: scene.as_superuser("ALTER SCHEMA kino RENAME TO elsewhere"),
    "table missing": lambda scene: scene.as_superuser("ALTER TABLE kino.break RENAME TO broken"),
    "column missing": lambda scene: scene.as_superuser("ALTER TABLE kino.inbox_event RENAME COLUMN outcome TO word"),
    "session terminated": lambda scene: refuse(
        scene, "inbox_event", f"NEW.job_id = '{BAD}'", "PERFORM pg_terminate_backend(pg_backend_pid())"
    ),
    "serialization failure": lambda scene: refuse(
        scene, "inbox_event", f"NEW.job_id = '{BAD}'", "RAISE EXCEPTION 'planted' USING ERRCODE = '40001'"
    ),
    "disk full": lambda scene: refuse(
        scene, "inbox_event", f"NEW.job_id = '{BAD}'", "RAISE EXCEPTION 'planted' USING ERRCODE = '53100'"
    ),
}
MENDED: dict[str, Callable[[Scene], None]] = {
    "no schema": lambda scene: scene.as_superuser("ALTER SCHEMA elsewhere RENAME TO kino"),
    "table missing": lambda scene: scene.as_superuser("ALTER TABLE kino.broken RENAME TO break"),
    "column missing": lambda scene: scene.as_superuser("ALTER TABLE kino.inbox_event RENAME COLUMN word TO outcome"),
    "no function": lambda scene: scene.as_superuser("ALTER FUNCTION kino.of_then(jsonb) RENAME TO settle_charges"),
}


@pytest.mark.parametrize("fault", KEPT)
def test_a_fault_of_the_server_keeps_the_whole_batch(scene: Scene, fault: str) -> None:
    """What Postgres cannot do for anybody is raised to intake: no event is blamed and no row has changed."""
    events = [*charge_all(scene), make_event("timeout", "job without charge")]
    # The break of this one makes the batch write every table.
    scene.charged("broken")
    scene.settle(make_event("completed", "broken"))
    events.append(make_event("timeout", "broken"))
    before = scene.everything()
    scene.worker.dispose()
    KEPT[fault](scene)

    with pytest.raises(sa.exc.DBAPIError) as raised:
        scene.settle_batch(*events)

    if fault in MENDED:
        MENDED[fault](scene)
    assert classify(raised.value) is Fault.KEEP
    assert scene.everything() == before


def test_a_database_that_is_gone_keeps_the_batch(scene: Scene, database: Database) -> None:
    """A server that cannot be reached at all is no event's fault either."""
    event = make_event("timeout")
    nobody = create_engine(database.url().replace(database.name, "no_such_database"))

    with pytest.raises(sa.exc.OperationalError) as raised:
        settle_batch(nobody, deliveries_of([event]), make_rules())

    nobody.dispose()
    assert classify(raised.value) is Fault.KEEP
    assert scene.dead_letters() == []


def deallocate(scene: Scene) -> None:
    with scene.worker.begin() as connection:
        # Inside a block, or psycopg would see it and forget them too.
        connection.exec_driver_sql("DO $$ BEGIN DEALLOCATE ALL; END $$")


FORGOTTEN: dict[str, Callable[[Scene], None]] = {
    "a migration changes a column's type": lambda scene: scene.as_superuser(
        "ALTER TABLE kino.charge ALTER COLUMN opened_at TYPE timestamptz(3)"
    ),
    "a pooler gives another session": deallocate,
}


@pytest.mark.parametrize("what", FORGOTTEN)
def test_a_prepared_statement_that_went_stale_is_no_event_s_fault(scene: Scene, what: str) -> None:
    """A session's statements are prepared after five uses; when they go stale the batch is kept, and then settles."""
    jobs = [f"job-{number}" for number in range(8)]
    for job_id in jobs:
        scene.charged(job_id)
    for job_id in jobs[:-1]:
        scene.settle_batch(make_event("failed platform", job_id))
    FORGOTTEN[what](scene)

    with pytest.raises(sa.exc.DBAPIError) as raised:
        scene.settle_batch(make_event("failed platform", jobs[-1]))

    assert classify(raised.value) is Fault.KEEP
    assert scene.settle_batch(make_event("failed platform", jobs[-1])) == {f"{jobs[-1]} failed platform": "refunded"}
    assert scene.dead_letters() == []


# Too slow.

HURRIED = SessionLimits(statement_timeout_ms=1000)
HURRIED_AS_A_WHOLE = SessionLimits(transaction_timeout_ms=1000)


def stall(scene: Scene, table: str, condition: str) -> None:
    """Make a statement that inserts rows which fulfil `condition` take longer than anybody waits."""
    scene.as_superuser(
        "CREATE FUNCTION kino.slow() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
        f" IF (SELECT {condition} FROM fresh) THEN PERFORM pg_sleep(60); END IF; RETURN NULL; END $$",
        "GRANT EXECUTE ON FUNCTION kino.slow() TO PUBLIC",
        f"CREATE TRIGGER slow AFTER INSERT ON kino.{table} REFERENCING NEW TABLE AS fresh"
        " FOR EACH STATEMENT EXECUTE FUNCTION kino.slow()",
    )


@pytest.mark.parametrize("limits", [HURRIED, HURRIED_AS_A_WHOLE], ids=["statement", "transaction"])
def test_a_batch_that_is_too_slow_as_a_whole_is_settled_in_parts(database: Database, limits: SessionLimits) -> None:
    """A time-out splits the batch: parts that are fast enough are settled, and nobody becomes a dead letter."""
    with Scene.of(database, limits=limits) as scene:
        events = charge_all(scene)
        stall(scene, "inbox_event", "count(*) > 3")

        said = scene.settle_batch(*events)

        assert said == {event.id: "refunded" for event in events}
        assert scene.dead_letters() == []
        assert balances(scene) == dict.fromkeys(JOBS, REFUNDED)


def test_an_event_that_is_too_slow_by_itself_waits(database: Database) -> None:
    """An event that times out alone is put off: it may be the hour, so it is neither lost nor in the way."""
    with Scene.of(database, limits=HURRIED) as scene:
        events = charge_all(scene)
        stall(scene, "inbox_event", f"bool_or(job_id = '{BAD}')")

        said = scene.settle_batch(*events)

        assert said == {event.id: "busy" if event.job_id == BAD else "refunded" for event in events}
        assert scene.pending() == {f"{BAD} timeout": Waits(BAD, "busy", 0)}
        assert balances(scene) == ALL_BUT_BAD


def test_a_later_event_of_a_job_that_was_too_slow_is_put_off_as_well(database: Database) -> None:
    """A completion must not overtake the failure before it because the failure took too long."""
    with Scene.of(database, limits=HURRIED) as scene:
        scene.charged()
        stall(scene, "inbox_event", "bool_or(event_id = 'job-1 timeout')")

        said = scene.settle_batch(make_event("completed", at=NOW), make_event("timeout", at=EVENT_AT))

        assert said == {"job-1 timeout": "busy", "job-1 completed": "busy"}


def test_an_event_that_is_always_too_slow_is_given_up_after_a_day(database: Database) -> None:
    """Waiting ends for a busy event too: after a day it is a dead letter that says it was busy."""
    with Scene.of(database, limits=HURRIED) as scene:
        scene.charged()
        stall(scene, "inbox_event", "true")
        scene.settle_batch(make_event("timeout"))

        scene.sweep(now=NOW + LONGEST_DELAY)
        scene.sweep(now=NOW + GIVE_UP_AFTER)

        assert scene.pending() == {}
        assert scene.dead_letters() == [Dead("job-1 timeout", "job-1", "busy", 1, "open")]


# Between the parts.


def test_intake_gets_a_word_in_between_the_parts(scene: Scene) -> None:
    """While a batch is taken apart, intake gets a word in after every part, so that it is not taken for dead."""
    events = charge_all(scene)
    refuse(scene, "inbox_event", f"NEW.job_id = '{BAD}'", "RAISE EXCEPTION 'not this one'")

    settled_so_far = [len(scene.inbox()) for _ in settle_parts(scene.worker, deliveries_of(events), make_rules())]

    assert settled_so_far == sorted(settled_so_far)
    assert settled_so_far[0] == 0
    assert settled_so_far[-1] == len(JOBS) - 1


def test_a_bisection_that_is_stopped_leaves_what_is_settled(scene: Scene) -> None:
    """Stopping between two parts loses nothing: what is settled is told so again, the rest is settled then."""
    events = charge_all(scene)
    refuse(scene, "inbox_event", f"NEW.job_id = '{BAD}'", "RAISE EXCEPTION 'not this one'")

    for part in settle_parts(scene.worker, deliveries_of(events), make_rules()):
        if part.parts_left and scene.inbox():
            break
    settled = scene.inbox()
    mend(scene)
    said = scene.settle_batch(*events)

    assert 0 < len(settled) < len(JOBS)
    assert said == {event.id: "duplicate" if event.id in settled else "refunded" for event in events}
    assert balances(scene) == dict.fromkeys(JOBS, REFUNDED)


def test_a_batch_of_every_kind_with_a_bad_one_ends_as_it_would_without_it(scene: Scene) -> None:
    """Being taken apart changes no outcome: every kind of ending comes to its own word."""
    for kind in KINDS:
        scene.charged(kind)
    scene.charged(BAD)
    refuse(scene, "settlement", f"NEW.event_id = '{BAD} timeout'", "RAISE EXCEPTION 'not this one'")

    said = scene.settle_batch(make_event("timeout", BAD), *(make_event(kind, kind) for kind in KINDS))

    assert {event_id.partition(" ")[0]: None for event_id in said}.keys() == {
        "completed",
        "failed",
        "timeout",
        "safety",
    }
    assert sorted(said.values()) == ["captured", *["captured_not_covered"] * 3, *["refunded"] * 6]
