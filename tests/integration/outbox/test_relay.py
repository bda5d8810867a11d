"""The relay: every refund is told, in its order, at least once, and never above the horizon."""

from __future__ import annotations

from datetime import UTC

import pytest
import sqlalchemy as sa
from redis import Redis
from redis.exceptions import ResponseError

from kino_refunds.ledger import settle_charges
from kino_refunds.outbox.relay import relay_refunds
from tests.integration.outbox.news import QUEUE, cursor, ids, refund, told
from tests.ledger_acts import settlement
from tests.scenario import EVENT_AT, Scene, make_event


def start_relay(scene: Scene, redis: Redis) -> None:
    """The first round only marks where to start."""
    assert relay_refunds(scene.worker, redis, QUEUE) == 0


def test_each_refund_is_told_once_in_its_order(scene: Scene, redis: Redis) -> None:
    """The product hears of every refund, oldest transaction first, and of nothing twice."""
    start_relay(scene, redis)
    refunds = [*refund(scene, "job-3"), *refund(scene, "job-1"), *refund(scene, "job-2")]
    scene.charged("captured")
    scene.settle(make_event("completed", "captured"))

    first = relay_refunds(scene.worker, redis, QUEUE)
    again = relay_refunds(scene.worker, redis, QUEUE)
    refunds += refund(scene, "job-0")
    later = relay_refunds(scene.worker, redis, QUEUE)

    assert (first, again, later) == (3, 0, 1)
    assert ids(redis) == refunds


def test_the_news_is_a_cloud_event_that_says_what_and_why(scene: Scene, redis: Redis) -> None:
    """Each refund is one CloudEvent with its account, whole credits, reason, clause and policy version."""
    start_relay(scene, redis)
    [event_id] = refund(scene, "job-1")
    ((settled_at,),) = scene.rows("SELECT settled_at FROM kino.settlement")

    relay_refunds(scene.worker, redis, QUEUE)

    assert told(redis) == [
        {
            "specversion": "1.0",
            "id": event_id,
            "source": "kino-refunds",
            "type": "kino.credits-refunded.v1",
            "time": settled_at.astimezone(UTC).isoformat(),
            "subject": "job-1",
            "data": {
                "job_id": "job-1",
                "account_id": "acct of job-1",
                "credits": 10,
                "reason": "generation_failure",
                "clause": "2.failure",
                "policy_version": "2025-12-14",
            },
        }
    ]


def test_a_correction_is_told_like_a_refund(scene: Scene, redis: Redis) -> None:
    """A captured charge that was refunded later is news under an id of its own, in its place in the order."""
    start_relay(scene, redis)
    charge = scene.charged("corrected")
    scene.settle(make_event("completed", "corrected"))
    [first] = refund(scene, "job-1")
    scene.correct(charge)
    [last] = refund(scene, "job-2")

    count = relay_refunds(scene.worker, redis, QUEUE)

    assert count == 3
    assert ids(redis) == [first, f"correction:{charge.charge_id}", last]


def test_one_transaction_s_refunds_are_told_across_rounds(scene: Scene, redis: Redis) -> None:
    """A batch of refunds larger than a round is told to its end, none left out and none twice."""
    start_relay(scene, redis)
    charges = [scene.charged(f"job-{number}") for number in range(5)]
    scene.settle(*[make_event("timeout", f"job-{number}") for number in range(5)])

    counts = [relay_refunds(scene.worker, redis, QUEUE, limit=2) for _ in range(4)]

    assert counts == [2, 2, 1, 0]
    assert ids(redis) == [f"refund:{charge.charge_id}" for charge in charges]


def test_nothing_above_the_horizon_is_told(scene: Scene, redis: Redis) -> None:
    """While an older transaction is open its refund may still come, so nobody behind it is told of first."""
    start_relay(scene, redis)
    held = scene.charged("held")
    with scene.worker.connect() as open_one:
        settle_charges(open_one, [settlement(held, at=EVENT_AT)])
        [behind] = refund(scene, "behind")

        while_open = relay_refunds(scene.worker, redis, QUEUE)
        open_one.commit()
    afterwards = relay_refunds(scene.worker, redis, QUEUE)

    assert (while_open, afterwards) == (0, 2)
    assert ids(redis) == [f"refund:{held.charge_id}", behind]


def test_what_redis_refused_is_told_later(scene: Scene, redis: Redis) -> None:
    """The cursor moves only behind what Redis took: a refusal costs time, never a refund's news."""
    start_relay(scene, redis)
    refunds = [*refund(scene, "job-1"), *refund(scene, "job-2")]
    before = cursor(scene)
    redis.set(QUEUE, "no list")

    with pytest.raises(ResponseError):
        relay_refunds(scene.worker, redis, QUEUE)
    after = cursor(scene)
    redis.delete(QUEUE)
    count = relay_refunds(scene.worker, redis, QUEUE)

    assert after == before
    assert count == 2
    assert ids(redis) == refunds


def test_what_was_pushed_and_not_committed_is_told_again_under_the_same_id(scene: Scene, redis: Redis) -> None:
    """At least once: after a COMMIT that failed the same refunds come again, and consumers know them by their ids."""
    start_relay(scene, redis)
    refunds = [*refund(scene, "job-1"), *refund(scene, "job-2")]
    # FOR UPDATE needs the right to update one column; moving the cursor needs it for both.
    scene.as_superuser(
        "REVOKE UPDATE ON kino.relay_cursor FROM kino_worker", "GRANT UPDATE (xid) ON kino.relay_cursor TO kino_worker"
    )

    with pytest.raises(sa.exc.ProgrammingError):
        relay_refunds(scene.worker, redis, QUEUE)
    scene.as_superuser("GRANT UPDATE ON kino.relay_cursor TO kino_worker")
    relay_refunds(scene.worker, redis, QUEUE)

    assert ids(redis) == refunds * 2


def test_two_relays_at_once_tell_once(scene: Scene, redis: Redis) -> None:
    """While one round is under way a second does nothing and does not wait."""
    start_relay(scene, redis)
    [news] = refund(scene, "job-1")

    with scene.worker.begin() as other:
        other.execute(sa.text("SELECT 1 FROM kino.relay_cursor FOR UPDATE"))
        second = relay_refunds(scene.worker, redis, QUEUE)
    first = relay_refunds(scene.worker, redis, QUEUE)

    assert (second, first) == (0, 1)
    assert ids(redis) == [news]


def test_whoever_switches_the_relay_on_hears_of_what_happens_from_then_on(scene: Scene, redis: Redis) -> None:
    """Years of refunds are not poured into Redis on the first day."""
    refund(scene, "long ago")

    first = relay_refunds(scene.worker, redis, QUEUE)
    [news] = refund(scene, "job-1")
    second = relay_refunds(scene.worker, redis, QUEUE)

    assert (first, second) == (0, 1)
    assert ids(redis) == [news]
