"""Fingerprints of events and keys of messages: the same content has the same one, other content another."""

from __future__ import annotations

import json
from typing import Any

import pytest

from kino_refunds.events.envelope import ELEMENTS_MAX, message_key, parse
from kino_refunds.events.schema import Event, fingerprint, queue_of, to_json
from tests.event_kinds import KINDS
from tests.malformed import MALFORMED, bare, celery_task, data, envelope, event, without


def test_the_fingerprint_is_what_was_stored_before() -> None:
    """A fingerprint in the database compares with one of today: the recipe is fixed under its version."""
    fingerprints = {name: fingerprint(built) for name, (_, built, _) in KINDS.items()}

    assert fingerprints == {
        "completed": "v1:b9bcd6a2a2a1efd1340280d4aad22c2712c0e268301f941b957c209e38ba89c7",
        "failed": "v1:61b29cd91dc480edfdc4f74d936ea80118a887737cd7bcde0bc60f8db9f4a9ca",
        "timed out": "v1:0e0e2db7094f40d2d53f662f0582657d0d36c05fc8caabbd12ff636aca7c8b3c",
        "rejected": "v1:ea07bbf6f6181a8a24ca5e6de03c914c80fcd80a388d59d32b86165267879169",
    }


def test_the_fingerprint_is_made_of_sorted_compact_json() -> None:
    """The canonical form is sorted-key compact JSON of the known fields, without the message."""
    parsed = parse(envelope(event(extra=1)))

    canonical = event(time="2026-11-02T09:11:12.500000Z", data=data(error={"code": "GPU_OOM", "origin": "platform"}))
    assert to_json(parsed).decode() == json.dumps(canonical, sort_keys=True, separators=(",", ":"))


@pytest.mark.parametrize("document", [document for document, *_ in KINDS.values()], ids=KINDS)
def test_the_canonical_form_is_sorted_for_every_kind(document: dict[str, Any]) -> None:
    """No kind of event declares its fields in an order that would change the fingerprint's recipe."""
    parsed = parse(bare({**document, "data": {**document["data"], "account_id": "ü"}}))

    written = to_json(parsed).decode()

    expected = json.dumps(json.loads(written), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    assert written == expected


@pytest.mark.parametrize(("document", "built", "queue"), KINDS.values(), ids=KINDS)
def test_the_canonical_form_reads_back(document: dict[str, Any], built: Event, queue: str) -> None:
    """A pending event, stored in canonical form, settles later as the event that it was."""
    stored = to_json(parse(bare(document)))

    again = parse(stored)

    assert (fingerprint(again), again.identity, queue_of(again)) == (
        fingerprint(built),
        built.identity,
        queue,
    )
    assert to_json(again) == stored


@pytest.mark.parametrize(
    "same",
    [
        event(time="2026-11-02T09:11:12.500Z"),
        event(time="2026-11-02T09:11:12.5000001Z"),
        event(data=data(error={"code": "GPU_OOM", "origin": "platform"})),
        event(data=data(error={"code": "GPU_OOM", "origin": "platform", "message": "another"})),
        event(extra=1),
    ],
)
def test_the_fingerprint_ignores_how_it_was_said(same: dict[str, Any]) -> None:
    """Another zone, another message or an unknown field is not other content."""
    assert fingerprint(parse(bare(same))) == fingerprint(parse(bare(event())))


def test_a_default_that_is_spelled_out_is_not_other_content() -> None:
    """`result_produced: false` and its absence are one fingerprint, and so are null and no account."""
    kind = "kino.generation.timeout.v1"
    documents = [{"job_id": "job-1"}, {"job_id": "job-1", "result_produced": False, "account_id": None}]

    fingerprints = {fingerprint(parse(bare(event(type=kind, data=one)))) for one in documents}

    assert len(fingerprints) == 1


@pytest.mark.parametrize(
    "other",
    [
        event(id="evt-2"),
        event(source="/pipeline/eu-2"),
        event(time="2026-11-02T10:11:12.500001+01:00"),
        event(subject="job-2", data=data(job_id="job-2")),
        event(data=data(account_id="acct-2")),
        event(data=without(data(), "account_id")),
        event(data=data(error={"code": "GPU_OOM", "origin": "user"})),
        event(data=data(error={"code": "OTHER", "origin": "platform"})),
        event(type="kino.generation.job-completed.v1"),
        event(type="kino.generation.timeout.v1"),
    ],
)
def test_the_fingerprint_differs_where_the_content_does(other: dict[str, Any]) -> None:
    """What settlement could decide by changes the fingerprint: a conflict cannot pass as a duplicate."""
    assert fingerprint(parse(bare(other))) != fingerprint(parse(bare(event())))


@pytest.mark.parametrize(
    ("first", "again"),
    [
        (envelope(event()), envelope(event(), delivery_tag="tag-2")),
        (envelope(b"not json"), envelope(b"not json", delivery_tag="tag-2")),
        (
            envelope(event(), content_type="text/plain"),
            envelope(event(), content_type="text/plain", delivery_tag="tag-2"),
        ),
        (envelope(event(), body="%"), envelope(event(), body="%", delivery_tag="tag-2")),
        (b"\xff", b"\xff"),
    ],
)
def test_the_same_content_sent_again_has_the_same_key(first: bytes, again: bytes) -> None:
    """A redelivered message counts as the one before, although kombu gives it a new delivery tag."""
    keys = {message_key(first), message_key(again)}

    assert [len(key) for key in keys] == [32]


def test_other_content_has_another_key() -> None:
    """Two dead letters are one only where nothing but the delivery tag tells them apart: the other's bytes are gone."""
    messages = {raw for raw, _ in MALFORMED.values()}

    assert len({message_key(raw) for raw in messages}) == len(messages)


def test_tasks_of_celery_with_one_body_are_kept_apart() -> None:
    """What differs between two tasks stands in their headers: 33 messages are 33 keys, and one sent again is one."""
    tasks = [celery_task(f"tasks.{number % 11}", task_id=f"task-{number}") for number in range(33)]
    again = [raw.replace(b'"delivery_tag": "task-', b'"delivery_tag": "again-') for raw in tasks]

    assert len({message_key(raw) for raw in tasks}) == 33
    assert [message_key(raw) for raw in again] == [message_key(raw) for raw in tasks]
    assert again != tasks


def test_each_element_of_a_message_has_a_key_of_its_own() -> None:
    """The letter of one event of several is not that of another, nor that of the whole message."""
    raw = bare([event()] * ELEMENTS_MAX)

    keys = {message_key(raw, index) for index in (None, *range(ELEMENTS_MAX))}

    assert len(keys) == ELEMENTS_MAX + 1
