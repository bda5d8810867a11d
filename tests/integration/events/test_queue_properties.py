"""No order of the commands of several workers loses a message or makes one (hypothesis)."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from typing import Any, cast

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test
from redis import Redis

from kino_refunds.events.queues import QUEUE_KEYS, Claim, Message, read_queued
from kino_refunds.events.schema import Queue
from tests.intake import A, B, die, queues_of
from tests.integration.events.claims import contents, messages


class Conservation(RuleBasedStateMachine):
    """Two workers that publish, claim, drop, release, die and come back, in any order."""

    def __init__(self, client: Redis) -> None:
        super().__init__()
        client.flushdb()
        self.client = client
        self.workers = {name: queues_of(client, name) for name in (A, B)}
        self.published: Counter[Message] = Counter()
        self.dropped: Counter[Message] = Counter()
        self.claims: list[tuple[str, Claim]] = []

    def on_server(self, pattern: str = "*generation.*") -> Counter[Message]:
        """Read every message on any list, whether or not anybody is registered for it."""
        keys: Any = self.client.keys(pattern)
        found: Counter[Message] = Counter()
        for key in keys:
            raws: Any = self.client.lrange(key, 0, -1)
            found.update(messages(Queue(re.sub("\x06.*|kino:.*:", "", key.decode())), *raws))
        return found

    def in_flight(self, name: str) -> Counter[Message]:
        return self.on_server(f"kino:inflight:{name}:*")

    @rule(key=st.sampled_from(QUEUE_KEYS), raws=st.lists(st.sampled_from([b"a", b"b", b"c"]), min_size=1))
    def publish(self, key: str, raws: list[bytes]) -> None:
        self.client.lpush(key, *raws)
        self.published.update(messages(Queue(key.partition("\x06")[0]), *raws))

    @rule(
        name=st.sampled_from([A, B]),
        limit=st.sampled_from([1, 4, 10]),
        max_bytes=st.sampled_from([1, 5, 100]),
    )
    def claim(self, name: str, limit: int, max_bytes: int) -> None:
        before = self.in_flight(name)
        claim = self.workers[name].claim(limit, max_bytes)
        assert claim.again == bool(before)
        assert Counter(claim.messages) == self.in_flight(name)
        if claim.again:
            assert Counter(claim.messages) == before
        if claim.messages:
            self.claims.append((name, claim))
        if claim.recovered:
            assert len(claim.messages) == 1

    @rule(name=st.sampled_from([A, B]))
    def claim_and_lose_the_answer(self, name: str) -> None:
        made = self.workers[name].claim()
        before = contents(self.client)
        claim = self.workers[name].claim()
        if made.messages:
            assert claim == replace(made, again=True)
            self.claims.append((name, claim))
        assert contents(self.client) == before

    @precondition(lambda self: self.claims)
    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        """Any token there ever was: of the batch in flight, of an older one, of one that was recovered."""
        name, claim = data.draw(st.sampled_from(self.claims))
        if self.workers[name].drop(claim.token):
            self.dropped.update(claim.messages)

    @precondition(lambda self: self.claims)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        name, claim = data.draw(st.sampled_from(self.claims))
        assert self.workers[name].release(claim.token) in (0, len(claim.messages))

    @precondition(lambda self: self.claims)
    @rule(data=st.data(), index=st.none() | st.sampled_from([0, 7, 99]))
    def begin(self, data: st.DataObject, index: int | None) -> None:
        name, claim = data.draw(st.sampled_from(self.claims))
        if self.workers[name].begin(claim.token, index) is not None:
            assert Counter(claim.messages) == self.in_flight(name)
            assert claim.recovered

    @rule(name=st.sampled_from([A, B]))
    def expire(self, name: str) -> None:
        die(self.client, name)

    @rule(name=st.sampled_from([A, B]))
    def refresh(self, name: str) -> None:
        self.workers[name].refresh()

    @rule(name=st.sampled_from([A, B]))
    def recover(self, name: str) -> None:
        self.workers[name].recover()

    @rule(name=st.sampled_from([A, B]))
    def leave(self, name: str) -> None:
        self.workers[name].leave()

    @rule(name=st.sampled_from([A, B]))
    def restart(self, name: str) -> None:
        self.workers[name] = queues_of(self.client, name)

    @invariant()
    def nothing_is_lost_or_made(self) -> None:
        assert self.on_server() + self.dropped == self.published

    @invariant()
    def everything_can_be_found(self) -> None:
        found = read_queued(self.client)
        assert Counter(found.messages) == self.on_server()
        assert found.complete


def test_no_order_of_commands_loses_or_makes_a_message(redis: Redis) -> None:
    """A published message is on a queue, in flight, recovered, or was dropped under the token it came by."""
    run_state_machine_as_test(
        cast("type[RuleBasedStateMachine]", lambda: Conservation(redis)),  # any factory will do
        settings=settings(
            max_examples=60,
            stateful_step_count=30,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
