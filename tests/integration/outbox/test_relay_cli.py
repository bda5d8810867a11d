"""`relay rewind`: after a Redis lost its news, every refund since an instant is told again, under its id."""

from __future__ import annotations

import os
import pty
import subprocess
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta

import pytest
import sqlalchemy as sa
from redis import Redis

from kino_refunds.errors import RelayNotReady
from kino_refunds.outbox.relay import Rewind, relay_refunds, rewind_relay
from tests.command_line import SCRIPT, Run, outside
from tests.conftest import Database
from tests.integration.outbox.news import QUEUE, cursor, read_news, refund
from tests.scenario import NOW, PATIENT, Scene, make_event, until

LONG_AGO = "2001-01-01T00:00:00Z"


def settled_at(scene: Scene, job_id: str) -> datetime:
    ((at,),) = scene.rows("SELECT settled_at FROM kino.charge_status WHERE job_id = :job_id", job_id=job_id)
    assert isinstance(at, datetime)
    return at


def move_settlement(scene: Scene, job_id: str, by: timedelta) -> None:
    """Let a settlement have been written at another time than its transaction's place says."""
    scene.as_superuser(
        "ALTER TABLE kino.settlement DISABLE TRIGGER append_only",
        f"UPDATE kino.settlement SET settled_at = settled_at + interval '{by.total_seconds()} s' WHERE charge_id ="
        f" (SELECT charge_id FROM kino.charge WHERE job_id = '{job_id}')",
        "ALTER TABLE kino.settlement ENABLE TRIGGER append_only",
    )


def test_what_redis_lost_is_told_again_under_the_same_ids(run: Run, scene: Scene, redis: Redis) -> None:
    """FLUSHALL lost the news: a rewind to before it tells them again, and what came later once."""
    relay_refunds(scene.worker, redis, QUEUE)
    before = refund(scene, "job-1", at=NOW - timedelta(seconds=1))
    lost = refund(scene, "job-2", "job-3")
    relay_refunds(scene.worker, redis, QUEUE)
    redis.flushdb()
    since = settled_at(scene, "job-2")

    said = run("relay", "rewind", "--to", since.isoformat(), "--yes", "--json")
    later = refund(scene, "job-4")
    relay_refunds(scene.worker, redis, QUEUE)
    first = read_news(redis)
    everything = run("relay", "rewind", "--to", LONG_AGO, "--yes")
    relay_refunds(scene.worker, redis, QUEUE)

    assert (said.code, said.err) == (0, "")
    assert said.json == {
        "dry_run": False,
        "to": since.isoformat(),
        "told_again": 2,
        "oldest_at": since.isoformat(),
    }
    assert first == lost + later
    assert everything.out.startswith(f"4 refunds since {LONG_AGO} are sent again, the oldest settled at ")
    assert read_news(redis) == before + lost + later


def test_a_correction_is_told_again_too(scene: Scene, redis: Redis) -> None:
    """A captured charge that was refunded later counts from the instant of its correction."""
    relay_refunds(scene.worker, redis, QUEUE)
    charge = scene.charged("corrected")
    scene.settle(make_event("completed", "corrected"))
    refund(scene, "job-1")
    scene.correct(charge)
    relay_refunds(scene.worker, redis, QUEUE)
    read_news(redis)

    with scene.worker.begin() as connection:
        found = rewind_relay(connection, settled_at(scene, "corrected"))
    relay_refunds(scene.worker, redis, QUEUE)

    assert found == Rewind(1, settled_at(scene, "corrected").astimezone(UTC))
    assert read_news(redis) == [f"correction:{charge.charge_id}"]


def test_transactions_whose_times_do_not_follow_their_order_are_all_told(scene: Scene, redis: Redis) -> None:
    """A long transaction writes its refund late: a later instant in an earlier transaction is not left out."""
    relay_refunds(scene.worker, redis, QUEUE)
    slow, quick, last = refund(scene, "slow"), refund(scene, "quick"), refund(scene, "last")
    move_settlement(scene, "slow", timedelta(hours=1))
    move_settlement(scene, "last", timedelta(hours=1))
    relay_refunds(scene.worker, redis, QUEUE)
    read_news(redis)

    with scene.worker.begin() as connection:
        found = rewind_relay(connection, settled_at(scene, "quick") + timedelta(minutes=1))
    relay_refunds(scene.worker, redis, QUEUE)

    # What lies in between is told again although it is older: that is what "at least once" allows.
    assert found.told_again == 3
    assert read_news(redis) == slow + quick + last


def test_a_rewind_never_goes_forward(run: Run, scene: Scene, redis: Redis) -> None:
    """What was not told yet is told in its turn: a rewind to a later instant changes nothing and says so."""
    relay_refunds(scene.worker, redis, QUEUE)
    waits = refund(scene, "job-1", "job-2")
    before = cursor(scene)

    said = run("relay", "rewind", "--to", LONG_AGO, "--yes", "--json")

    assert (said.code, said.json["told_again"], said.json["oldest_at"]) == (0, 0, None)
    assert cursor(scene) == before
    relay_refunds(scene.worker, redis, QUEUE)
    assert read_news(redis) == waits


def test_a_dry_run_counts_and_writes_nothing(run: Run, scene: Scene, redis: Redis) -> None:
    """How many would be sent again is known before anybody does it, also while a round holds the cursor."""
    relay_refunds(scene.worker, redis, QUEUE)
    refund(scene, "job-1", "job-2")
    relay_refunds(scene.worker, redis, QUEUE)
    before = scene.everything()

    with scene.superuser.begin() as round_of_the_relay:
        round_of_the_relay.execute(sa.text("SELECT 1 FROM kino.relay_cursor FOR UPDATE"))
        said = run("relay", "rewind", "--to", LONG_AGO, "--dry-run")

    assert (said.code, said.err) == (0, "")
    assert said.out.startswith(f"2 refunds since {LONG_AGO} would be sent again, the oldest settled at ")
    assert scene.everything() == before


def test_without_a_cursor_there_is_nothing_to_rewind(run: Run, scene: Scene) -> None:
    """A relay that never ran has told nobody anything: that is said, and no cursor is made."""
    said = [run("relay", "rewind", "--to", LONG_AGO, *how) for how in (["--yes"], ["--dry-run"])]

    assert [(each.code, each.out, each.err.count("\n")) for each in said] == [(1, "", 1)] * 2
    assert all("no cursor" in each.err and "KINO_RELAY_QUEUE" in each.err for each in said)
    assert cursor(scene) == []


@pytest.mark.parametrize(
    ("to", "says"),
    [
        ("2040-01-01T00:00:00Z", "--to 2040-01-01T00:00:00Z lies in the future (it is "),
        ("2026-01-31", "'2026-01-31' is a day, not an instant; in UTC it begins at 2026-01-31T00:00:00Z"),
        ("2026-01-31T12:00", "'2026-01-31T12:00' has no offset; type 2026-01-31T12:00:00Z for UTC"),
        ("yesterday", "'yesterday' is not a time; for example 2026-"),
    ],
)
def test_an_instant_that_cannot_be_meant_moves_nothing(
    run: Run, scene: Scene, redis: Redis, to: str, says: str
) -> None:
    """A day is not taken for its midnight, nor a time without an offset for one in UTC."""
    relay_refunds(scene.worker, redis, QUEUE)
    before = cursor(scene)

    said = run("relay", "rewind", "--to", to, "--yes")

    assert (said.code, said.out, said.err.count("\n")) == (2, "", 1)
    assert says in said.err
    assert cursor(scene) == before


def test_a_rewind_waits_for_a_round_and_takes_back_what_it_told(database: Database, redis: Redis) -> None:
    """(1) a round pushes and moves the cursor, (2) the rewind waits, (3) it commits, (4) its news are told again."""
    with Scene.of(database, limits=PATIENT) as scene:
        relay_refunds(scene.worker, redis, QUEUE)
        news = refund(scene, "job-1")

        def rewind() -> Rewind:
            with scene.worker.begin() as connection:
                return rewind_relay(connection, datetime.fromisoformat(LONG_AGO))

        with ThreadPoolExecutor(1) as pool, scene.superuser.begin() as round_of_the_relay:
            round_of_the_relay.execute(
                sa.text("UPDATE kino.relay_cursor SET (xid, charge_id) = (SELECT xid, charge_id FROM kino.settlement)")
            )
            rewinding = pool.submit(rewind)
            until(lambda: scene.waiting_for_locks() == 1)
            round_of_the_relay.commit()
            found = rewinding.result(60)
        relay_refunds(scene.worker, redis, QUEUE)

        assert found.told_again == 1
        assert read_news(redis) == news


def test_a_round_that_does_not_end_is_said(scene: Scene, redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind a round that hangs at Redis the rewind gives up, says so, and has moved nothing."""
    monkeypatch.setattr("kino_refunds.outbox.relay.CURSOR_WAIT_MS", 1)
    relay_refunds(scene.worker, redis, QUEUE)
    before = cursor(scene)

    with scene.superuser.begin() as round_of_the_relay, scene.worker.connect() as connection:
        round_of_the_relay.execute(sa.text("SELECT 1 FROM kino.relay_cursor FOR UPDATE"))
        with pytest.raises(RelayNotReady) as refused:
            rewind_relay(connection, datetime.fromisoformat(LONG_AGO))

    assert "a round of the relay holds its cursor" in str(refused.value)
    assert cursor(scene) == before


@pytest.mark.parametrize(("answer", "code", "again"), [(b"n\n", 1, []), (b"y\n", 0, ["job-1"])])
def test_a_person_is_asked_with_the_count(
    database: Database, scene: Scene, redis: Redis, answer: bytes, code: int, again: list[str]
) -> None:
    """Who is asked reads how many will be told again before it is done."""
    relay_refunds(scene.worker, redis, QUEUE)
    news = refund(scene, "job-1")
    relay_refunds(scene.worker, redis, QUEUE)
    read_news(redis)
    ours, theirs = pty.openpty()
    program = subprocess.Popen(
        [SCRIPT, "relay", "rewind", "--to", LONG_AGO],
        stdin=theirs,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=outside() | {"KINO_DATABASE_URL": database.url()},
    )
    os.close(theirs)
    os.write(ours, answer)

    out, err = program.communicate(timeout=60)

    os.close(ours)
    asked = (out + err).decode()
    assert program.returncode == code
    assert f"1 refund since {LONG_AGO} would be sent again" in asked
    relay_refunds(scene.worker, redis, QUEUE)
    assert read_news(redis) == (news if again else [])
