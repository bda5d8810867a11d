from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from kino_refunds.errors import MalformedMessage
from kino_refunds.events.envelope import (
    ELEMENTS_MAX,
    MESSAGE_BYTES_MAX,
    Description,
    MalformedReason,
    contents,
    describe,
    message_key,
    opened,
    parse,
    parse_stored,
    split,
)
from kino_refunds.events.schema import (
    EDITED_ID_LENGTH_MAX,
    ID_LENGTH_MAX,
    QUEUES,
    ErrorOrigin,
    Event,
    JobCompleted,
    JobFailed,
    JobSafetyRejected,
    JobTimedOut,
    Queue,
    SafetyStage,
    fingerprint,
    queue_of,
    to_json,
)
from tests.malformed import (
    MALFORMED,
    WHITE_SPACE,
    bare,
    binary_mode,
    celery_task,
    data,
    envelope,
    event,
    without,
)

AT = datetime(2026, 11, 2, 9, 11, 12, 500_000, tzinfo=UTC)
COMMON: dict[str, Any] = {"id": "evt-1", "source": "/pipeline/eu-1", "time": AT, "job_id": "job-1"}

# One of each kind: as JSON has it, as it is built in Python, and the queue that it travels on.
KINDS: dict[str, tuple[dict[str, Any], Event, str]] = {
    "completed": (
        event(type="kino.generation.job-completed.v1", data={"job_id": "job-1"}),
        JobCompleted.of(**COMMON),
        "generation.job-completed",
    ),
    "failed": (
        event(data=without(data(), "account_id")),
        JobFailed.of(
            **COMMON,
            error={"code": "GPU_OOM", "origin": ErrorOrigin.PLATFORM, "message": "out of memory on node 7"},
        ),
        "generation.job-failed",
    ),
    "timed out": (
        event(type="kino.generation.timeout.v1", data={"job_id": "job-1", "result_produced": True}),
        JobTimedOut.of(**COMMON, result_produced=True),
        "generation.timeout",
    ),
    "rejected": (
        event(
            type="kino.generation.safety-rejection.v1",
            data={"job_id": "job-1", "stage": "after_generation", "category": "gore"},
        ),
        JobSafetyRejected.of(**COMMON, stage=SafetyStage.AFTER_GENERATION, category="gore"),
        "generation.safety-rejection",
    ),
}


def reason_of(raw: bytes) -> tuple[str, str]:
    """Parse what must be malformed, and return the code and text of it."""
    with pytest.raises(MalformedMessage) as caught:
        parse(raw)
    return caught.value.code, caught.value.text


@pytest.mark.parametrize(("document", "built", "queue"), KINDS.values(), ids=KINDS)
def test_both_wire_forms_are_the_same_event(document: dict[str, Any], built: Event, queue: str) -> None:
    """A bare CloudEvent and kombu's envelope around it are one event, equal to the one built in Python."""
    events = [parse(bare(document)), parse(envelope(document))]

    assert events == [built, built]
    assert {fingerprint(one) for one in events} == {fingerprint(built)}
    assert queue_of(built) == queue


def test_each_type_has_a_queue_of_its_own() -> None:
    """One queue per kind of event, under the names that publishers and operators know."""
    assert {kind: str(queue) for kind, queue in QUEUES.items()} == {
        "kino.generation.job-completed.v1": "generation.job-completed",
        "kino.generation.job-failed.v1": "generation.job-failed",
        "kino.generation.timeout.v1": "generation.timeout",
        "kino.generation.safety-rejection.v1": "generation.safety-rejection",
    }
    assert set(QUEUES.values()) == set(Queue)


def test_properties_name_what_settlement_asks_for() -> None:
    """An event says its job, its account and its identity without digging in its data."""
    parsed = parse(bare(event()))

    assert (parsed.job_id, parsed.account_id, parsed.identity) == (
        "job-1",
        "acct-1",
        ("/pipeline/eu-1", "evt-1"),
    )


def test_an_event_cannot_be_changed() -> None:
    """What was read is what is settled: an event is frozen."""
    parsed = parse(bare(event()))

    with pytest.raises(ValidationError):
        parsed.id = "evt-2"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("2026-11-02T10:11:12Z", datetime(2026, 11, 2, 10, 11, 12, tzinfo=UTC)),
        ("2026-11-02t10:11:12z", datetime(2026, 11, 2, 10, 11, 12, tzinfo=UTC)),
        ("2026-11-02T10:11:12-00:00", datetime(2026, 11, 2, 10, 11, 12, tzinfo=UTC)),
        ("2026-11-02T00:11:12+05:45", datetime(2026, 11, 1, 18, 26, 12, tzinfo=UTC)),
        ("2026-11-02T10:11:12.1Z", datetime(2026, 11, 2, 10, 11, 12, 100_000, tzinfo=UTC)),
        ("2026-11-02T10:11:12.123456999Z", datetime(2026, 11, 2, 10, 11, 12, 123_456, tzinfo=UTC)),
        ("0001-01-01T00:00:00Z", datetime(1, 1, 1, tzinfo=UTC)),
        ("9999-12-31T23:59:59.999999Z", datetime(9999, 12, 31, 23, 59, 59, 999_999, tzinfo=UTC)),
    ],
)
def test_a_time_is_normalised_to_utc(written: str, read: datetime) -> None:
    """Every RFC 3339 time with an offset is read, kept in UTC, and cut off at the microsecond."""
    parsed = parse(bare(event(time=written)))

    assert (parsed.time, parsed.time.tzinfo) == (read, UTC)


def test_a_time_built_in_python_needs_an_offset_too() -> None:
    """An event of our own making cannot have a naive time either, and is kept in UTC."""
    local = AT.astimezone(timezone(timedelta(hours=-7)))

    built = JobCompleted.of(**{**COMMON, "time": local})

    assert (built.time, built.time.tzinfo) == (AT, UTC)
    with pytest.raises(ValidationError):
        JobCompleted.of(**{**COMMON, "time": AT.replace(tzinfo=None)})


@pytest.mark.parametrize("value", ["x", "x" * 128, "\U0001f3ac" * 128, "with a space", "größe/Ω", '"quoted\\'])
def test_an_id_may_be_any_printable_text_up_to_128_characters(value: str) -> None:
    """The boundaries of ids lie where the contract says, counted in characters."""
    document = event(id=value, source=value, subject=value, data=data(job_id=value, account_id=value))

    parsed = parse(bare(document))

    assert (*parsed.identity, parsed.subject, parsed.job_id, parsed.account_id) == (value,) * 5
    assert parse(to_json(parsed)) == parse(to_json(parse(envelope(document))))


def test_unknown_fields_are_ignored_at_every_level() -> None:
    """The pipeline may add fields, traceparent among them, without changing what an event says."""
    extra = {
        "note": [1, {"x": None}],
        "ratio": float("nan"),
        "body": "b",
        "properties": {},
        "content-type": "x",
    }
    error = {**data()["error"], **extra}
    grown = event(**extra, traceparent="00-4bf9-00f0-01", data=data(**extra, error=error))

    parsed = [parse(bare(grown)), parse(envelope(grown))]

    assert [fingerprint(one) for one in parsed] == [fingerprint(parse(bare(event())))] * 2


def test_a_bare_event_with_the_fields_of_an_envelope_is_a_bare_event() -> None:
    """Only a message without `specversion` can be an envelope, also where it begins like one."""
    other = json.loads(envelope(event(id="inner")))
    document = {"body": other["body"], **other, **event(id="outer")}

    parsed = parse(bare(document))

    assert parsed.id == "outer"


@pytest.mark.parametrize(
    ("content_type", "content_encoding"),
    [
        ("application/json", "utf-8"),
        ("application/cloudevents+json", "utf-8"),
        ("application/cloudevents+json; charset=UTF-8", "UTF-8"),
        ("Application/JSON;charset=utf-8", "utf8"),
        ("application/cloudevents-batch+json", "utf-8"),
        ("application/json", "binary"),
        ("application/cloudevents+json", "Binary"),
    ],
)
def test_an_envelope_may_carry_either_json_type(content_type: str, content_encoding: str) -> None:
    """JSON and CloudEvents JSON are opened, however their names are written."""
    raw = envelope(event(), content_type=content_type, content_encoding=content_encoding)

    assert parse(raw) == parse(bare(event()))


def test_an_envelope_is_recognised_in_any_order_of_its_fields() -> None:
    """A client in another language that writes kombu's fields in its own order is understood."""
    document = json.loads(envelope(event()))
    reordered = {name: document[name] for name in sorted(document, reverse=True)}

    assert parse(bare(reordered)) == parse(bare(event()))


def test_the_last_of_two_equal_keys_counts_in_both_forms() -> None:
    """A key given twice is read alike in both forms, as nearly every JSON parser does: the last one."""
    raw = bare(event()).replace(b'"id": "evt-1"', b'"id": "evt-0", "type": "x", "id": "evt-1"')

    assert [parse(raw), parse(envelope(raw))] == [parse(bare(event()))] * 2


@pytest.mark.parametrize(("raw", "reason"), MALFORMED.values(), ids=MALFORMED)
def test_a_malformed_message_is_named_by_its_reason(raw: bytes, reason: MalformedReason) -> None:
    """Each kind of message that cannot be understood has its stable code, and a short printable text."""
    code, text = reason_of(raw)

    assert code == reason
    assert isinstance(code, MalformedReason)
    assert text.isprintable()
    assert len(text) < 500


def test_every_reason_is_in_the_corpus() -> None:
    """No reason exists that the shared corpus, which the intake tests push, does not cover."""
    assert {reason for _, reason in MALFORMED.values()} == set(MalformedReason)


def test_the_size_limit_is_exact() -> None:
    """A message of 256 KiB is read, and one byte more is refused unread."""
    largest = bare(event()).ljust(MESSAGE_BYTES_MAX)

    assert parse(largest) == parse(bare(event()))
    assert reason_of(largest + b" ") == ("too_large", "262,145 bytes are more than the 262,144 allowed")


def test_the_text_of_an_error_quotes_little() -> None:
    """An operator sees field and short value, escaped; long values and objects stay in the dead letter."""
    private = {"prompt": "a secret"}
    wrong = event(id="e\n", source="s" * 200, time=private, data=data(error={"code": 5, "origin": "me"}))

    code, text = reason_of(bare(wrong))

    assert (code, text) == (
        "invalid_event",
        (
            "data.error.code: Input should be a valid string, not 5; "
            "data.error.origin: Input should be 'platform', 'provider', 'user' or 'unknown', not 'me'; "
            "id: Input should hold printable characters only, not 'e\\n'; and 2 more"
        ),
    )


def test_a_malformed_message_carries_no_payload_in_its_cause() -> None:
    """What reports errors by their causes must not find the message there."""
    with pytest.raises(MalformedMessage) as caught:
        parse(bare(event(id=1)))

    assert (caught.value.__cause__, caught.value.__context__) == (None, None)


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


def ids(raw: bytes) -> tuple[str | None, str | None, str | None]:
    """Whom a malformed message is about."""
    about = describe(raw)
    return about.source, about.event_id, about.job_id


@pytest.mark.parametrize("name", ["python repr", "cut off", "trailing characters", "byte order mark", "old version"])
@pytest.mark.parametrize("form", ["bare", "kombu"])
def test_a_malformed_message_still_names_its_job(name: str, form: str) -> None:
    """Whoever looks at a dead letter sees which job it was about, wherever the bytes still say it."""
    raw, _ = MALFORMED[f"{name}, {form}"]

    assert ids(raw) == ("/pipeline/eu-1", "evt-1", "job-1")


@pytest.mark.parametrize(
    ("raw", "found"),
    [
        (b"", (None, None, None)),
        (b"\xff\xfe", (None, None, None)),
        (bare({"id": "evt-1\n", "source": "s" * 129, "data": {"job_id": 7}}), (None, None, None)),
        (bare({"subject": "job-1"}), (None, None, "job-1")),
        (bare({"subject": "job-1", "data": {"job_id": "job-2"}}), (None, None, "job-2")),
        (b'{"data": {"job_id": "job-', (None, None, None)),
        (b'{"id": "e\xff"} "subject": "job-1"', (None, None, "job-1")),
        (envelope(event(), body=5), (None, None, None)),
        (envelope(event())[:200], ("/pipeline/eu-1", "evt-1", None)),
    ],
)
def test_ids_are_found_only_where_they_can_be_trusted(
    raw: bytes, found: tuple[str | None, str | None, str | None]
) -> None:
    """An id that is cut off, too long, unprintable or not text is not shown as one."""
    assert ids(raw) == found


COMPLETED = event(type="kino.generation.job-completed.v1", data={"job_id": "job-1"})


def completed(job_id: str, **changes: Any) -> dict[str, Any]:
    return {**COMPLETED, "id": f"{job_id}-end", "subject": job_id, "data": {"job_id": job_id}, **changes}


NAMES_ONE_JOB = {
    "naive time": completed("job-1", time="2026-11-02T10:11:12"),
    "unknown type": completed("job-1", type="kino.generation.job-completed.v2"),
    "old version": completed("job-1", specversion="0.3"),
    "no type": without(completed("job-1"), "type"),
    "data missing": without(completed("job-1"), "data"),
    "data_base64": {
        **without(completed("job-1", time="x"), "data"),
        "data_base64": base64.b64encode(bare({"job_id": "job-1"})).decode(),
    },
}
TWO_JOBS = ("job-1", "job-2")
ODD_JOBS = ("o'brien/1", 'said "no"', "caf\u00e9", "a\\b")

MAY_HOLD_OTHERS: dict[str, tuple[bytes, tuple[str | None, ...]]] = {
    "two events on lines": (bare(completed("job-1")) + b"\n" + bare(completed("job-2")), ("job-1", "job-2")),
    "two jobs": (bare(completed("job-1", subject="job-2")), ("job-1", "job-2")),
    "a job deep inside": (
        bare(completed("job-1", time="x", extra=[{"more": {"job_id": "job-2"}}])),
        ("job-1", "job-2"),
    ),
    "several in one object": (
        bare({"specversion": "1.0", "events": [completed("job-1"), completed("job-2")]}),
        ("job-1", "job-2"),
    ),
    "no job": (bare(without(without(completed("job-1"), "subject"), "data")), ()),
    "a number for a job": (bare(completed("job-1", data={"job_id": 7})), ("job-1",)),
    "a job too long": (bare(completed("job-1", subject="x" * 129)), ("job-1",)),
    "white space": (bare(completed("job-1 ")), ("job-1 ", "job-1")),
    "a no-break space": (bare(completed("job-1\xa0")), ("job-1",)),
    "data as a string": (bare(completed("job-1", data=json.dumps({"job_id": "job-2"}))), ("job-1", "job-2")),
    "data_base64 of something": (
        bare({**without(completed("job-1"), "data"), "data_base64": "am9iLTE="}),
        ("job-1",),
    ),
    "cut off": (bare(completed("job-1"))[:-20], ("job-1",)),
    "too large": (bare([completed("job-1", padding="x" * MESSAGE_BYTES_MAX)]), ("job-1",)),
    "nothing": (b"", ()),
    "gzip": (MALFORMED["gzip, bare"][0], ()),
    "body not base64": (MALFORMED["body not base64"][0], ()),
    "compressed": (MALFORMED["compressed by zlib"][0], ()),
    "envelope in an envelope": (envelope(envelope(completed("job-1"))), ("job-1",)),
    "envelopes in an array": (bare([json.loads(envelope(completed(job))) for job in TWO_JOBS]), (None, *TWO_JOBS)),
    "json in json in json": (bare(json.dumps(json.dumps(completed("job-1")))), ("job-1",)),
    "json in json, cut off": (bare({"text": json.dumps(completed("job-1"))})[:-20], ("job-1",)),
    "json in a field": (bare(event(extra=json.dumps(completed("job-2")))), ("job-1", "job-2")),
    "json in a field, cut off": (bare(event(extra=json.dumps(completed("job-2"))[:-10])), ("job-1", "job-2")),
    "escaped ids on lines": (b"\n".join(map(bare, map(completed, ODD_JOBS))).replace(b"/", b"\\/"), ODD_JOBS),
    "utf-16 on lines": ("\n".join(json.dumps(completed(job)) for job in TWO_JOBS).encode("utf-16"), TWO_JOBS),
    "utf-16 without its mark, on lines": (
        "\n".join(json.dumps(completed(job)) for job in TWO_JOBS).encode("utf-16-be"),
        TWO_JOBS,
    ),
    "binary mode of two jobs": (binary_mode(**{"ce-subject": "job-2"}), ("job-2", "job-1")),
}


@pytest.mark.parametrize("form", [bare, envelope], ids=["bare", "kombu"])
@pytest.mark.parametrize("document", NAMES_ONE_JOB.values(), ids=NAMES_ONE_JOB)
def test_a_message_that_is_read_whole_and_names_one_job_is_that_job_s(document: dict[str, Any], form: Any) -> None:
    """A letter about one job holds up no other job's verdict."""
    about = describe(form(document))

    assert (about.job_id, about.other_job_ids, about.may_hold_others) == ("job-1", (), False)


@pytest.mark.parametrize(("raw", "jobs"), MAY_HOLD_OTHERS.values(), ids=MAY_HOLD_OTHERS)
def test_a_message_that_could_be_anybody_s_says_so(raw: bytes, jobs: tuple[str | None, ...]) -> None:
    """What cannot be read to its end, or names no job or several, may hold any job's end; it names what it can."""
    about = describe(raw)

    assert (about.job_id, *about.other_job_ids) == (jobs or (None,))
    assert about.may_hold_others


@pytest.mark.parametrize("form", [bare, envelope], ids=["bare", "kombu"])
def test_an_array_that_is_no_batch_is_one_nameless_letter(form: Any) -> None:
    """More events than one message may hold are nobody's by name, and guard every job that they name."""
    jobs = [f"job-{number}" for number in range(ELEMENTS_MAX + 1)]

    about = describe(form([completed(job) for job in jobs]))

    assert about == Description(None, None, None, tuple(jobs), may_hold_others=True)


# --- several events in one message


@pytest.mark.parametrize("size", [1, 2, ELEMENTS_MAX])
@pytest.mark.parametrize("form", [bare, envelope], ids=["bare", "kombu"])
def test_an_array_of_events_is_several_events(size: int, form: Any) -> None:
    """One to a hundred events in an array are read each by itself, as the events that they are alone."""
    documents = [event(id=f"evt-{number}", extra=float("nan"), note="ü\u2028") for number in range(size)]

    found = split(form(documents))

    assert found is not None
    assert [each.index for each in found] == list(range(size))
    assert [fingerprint(parse(each.content)) for each in found] == [fingerprint(parse(bare(one))) for one in documents]
    assert contents(form(documents)) == [each.content for each in found]


def test_one_bad_event_of_several_leaves_the_others() -> None:
    """An element that is wrong, or no event at all, is so by itself."""
    found = split(bare([event(), event(time="x"), {}, event(id="evt-2")]))

    assert found is not None
    reasons: list[str | None] = []
    for each in found:
        try:
            parse(each.content)
        except MalformedMessage as malformed:
            reasons.append(malformed.code)
        else:
            reasons.append(None)
    assert reasons == [None, "invalid_event", "invalid_event", None]


@pytest.mark.parametrize(("raw", "reason"), MALFORMED.values(), ids=MALFORMED)
def test_what_is_malformed_is_one_message(raw: bytes, reason: MalformedReason) -> None:
    """Nothing of the corpus is taken for a batch, so each is one letter."""
    assert split(raw) is None, reason
    assert contents(raw) == [raw]


def test_one_event_is_read_where_one_is_expected() -> None:
    """An array is no event to whom asks for one, such as a publisher, and it is told the number."""
    assert reason_of(bare([event(), event()])) == (
        "invalid_event",
        "an array of 2 events, where one is expected",
    )


# --- foreign forms


@pytest.mark.parametrize("form", [bare, envelope], ids=["bare", "kombu"])
@pytest.mark.parametrize(("document", "built", "queue"), KINDS.values(), ids=KINDS)
def test_data_in_base64_are_data(document: dict[str, Any], built: Event, queue: str, form: Any) -> None:
    """A publisher whose data are bytes to it says the same event."""
    content = bare(document["data"])
    encoded = {**without(document, "data"), "data_base64": base64.b64encode(content).decode()}

    parsed = parse(form(encoded))

    assert (parsed, fingerprint(parsed), queue_of(parsed)) == (built, fingerprint(built), queue)
    assert [parse(each) for each in contents(form([encoded]))] == [built]


TRUTHS = {
    "time in a leap second, bare": "time: Input should not lie in a leap second, which cannot be stored: say second 59,"
    " not '2016-12-31T23:59:60Z'",
    "time on 30 February, bare": "time: Input should be a day of the calendar, in the years 1 to 9999 in UTC,"
    " not '2026-02-30T10:11:12Z'",
    "time in year 0, bare": "time: Input should be a day of the calendar, in the years 1 to 9999 in UTC,"
    " not '0000-01-01T00:00:00Z'",
    "byte order mark, bare": "it begins with a byte order mark, which JSON does not allow: send it without",
    "binary mode of http": "a CloudEvent in binary mode, whose attributes are headers of the message:"
    " publish it in structured mode",
    "a celery task": "a task of Celery, 'video.render': an array of 3, not of CloudEvents",
    "a celery task of the older protocol, bare": "a task of Celery, 'video.render': type: Field required, a string",
    "an array of too many events, bare": "an array of 101, more than the 100 events that one message may hold",
    "data_base64 that is not base64, bare": "data_base64 (3 characters) is not base64",
    "data_base64 that holds no json, bare": "data_base64 (5 bytes) does not hold JSON",
    "id that ends with a space, bare": "id: Input should not begin or end with white space, not 'evt-1 '",
}


@pytest.mark.parametrize(("name", "text"), TRUTHS.items(), ids=TRUTHS)
def test_a_letter_says_what_is_true_of_the_message(name: str, text: str) -> None:
    """Whoever reads a letter hears what is wrong with the message, and what its publisher can do."""
    assert reason_of(MALFORMED[name][0])[1] == text


@pytest.mark.parametrize("prefix", ["ce-", "ce_", "cloudEvents:", "cloudEvents_", "CE-"])
def test_an_event_in_binary_mode_keeps_its_ids(prefix: str) -> None:
    """The ids of an event whose attributes are headers are read from there."""
    assert describe(binary_mode(prefix)) == Description("/pipeline/eu-1", "evt-1", "job-1", (), may_hold_others=False)


# What letters are grouped by: messages of one mistake have one cause, whatever their values are.
SAME_CAUSE: list[list[bytes]] = [
    [bare(event(time=value)) for value in ("x", 7, None)] + [bare(without(event(id="e-2"), "time"))],
    [bare(event(data=data(error={"code": "E", "origin": value}))) for value in ("nobody", 1)],
    [bare(event(subject="job-2")), envelope(event(subject="job-3"))],
    [celery_task("tasks.a", task_id=str(number)) for number in range(3)],
    [celery_task("tasks.b", body=[[number], {}, {}]) for number in range(3)],
    [binary_mode(), binary_mode("ce_", ce_id="evt-2")],
    [envelope(event(), content_type="text/plain"), envelope(event(id="e-2"), content_type="text/plain")],
    [envelope(event(), content_type="application/data")],
    [bare(event(type="kino.other.v1")), bare(event(id="e-2", type="kino.other.v1"))],
    [bare(event(type="kino.another.v1"))],
    [b"[]", b"[1]", bare([event()] * 101)],
    [b"{", b"nonsense"],
    [b"\xef\xbb\xbf{}"],
]


def test_letters_have_the_cause_of_their_mistake() -> None:
    """One mistake is one cause, and two mistakes are two: neither values nor queues count."""
    causes = [{(error.code, error.cause) for error in map(malformed, raws)} for raws in SAME_CAUSE]

    assert [len(each) for each in causes] == [1] * len(SAME_CAUSE)
    assert len(set.union(*causes)) == len(SAME_CAUSE)


def malformed(raw: bytes) -> MalformedMessage:
    with pytest.raises(MalformedMessage) as caught:
        parse(raw)
    return caught.value


@pytest.mark.parametrize(
    ("raw", "body"),
    [
        (envelope(event()), bare(event())),
        (envelope(b"\x80\x04N.", content_type="application/x-python-serialize"), b"\x80\x04N."),
        (celery_task(body=[]), b"[]"),
        (envelope(event(), body=5), None),
        (bare(event()), None),
        (b"{", None),
    ],
)
def test_what_kombu_wrote_can_be_looked_at(raw: bytes, body: bytes | None) -> None:
    """The body in an envelope is shown to people decoded, also where it is no event."""
    assert opened(raw) == body


# --- ids


def leaves(document: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Every place of a document that holds text."""
    for name, value in document.items():
        if isinstance(value, dict):
            yield from leaves(value, (*path, name))
        elif isinstance(value, str):
            yield (*path, name)


def changed(document: dict[str, Any], path: tuple[str, ...], change: Any) -> dict[str, Any]:
    name, *rest = path
    return {**document, name: changed(document[name], tuple(rest), change) if rest else change(document[name])}


WHOLE = {name: {**document, "data": {**document["data"], "account_id": "a"}} for name, (document, *_) in KINDS.items()}


@pytest.mark.parametrize("space", WHITE_SPACE.values(), ids=WHITE_SPACE)
@pytest.mark.parametrize("document", WHOLE.values(), ids=WHOLE)
def test_no_text_of_an_event_but_its_message_has_white_space_at_its_ends(document: dict[str, Any], space: str) -> None:
    """`order-1 ` beside `order-1` would be two: whatever field holds text refuses it, a field of tomorrow too."""
    paths = [path for path in leaves(document) if path[-1] != "message"]

    for path in paths:
        for change in (lambda text: text + space, lambda text: space + text):
            with pytest.raises(MalformedMessage):
                parse(bare(changed(document, path, change)))

    assert {("id",), ("source",), ("subject",), ("data", "job_id"), ("data", "account_id")} <= set(paths)


def test_what_is_stored_is_read_by_the_rule_of_before() -> None:
    """A charge, a waiting event or a letter with such an id can still be settled; the wire refuses it as before."""
    old = event(id="e " * 64, source=" s", subject="job-1 ", data=data(job_id="job-1 ", account_id=" a"))

    parsed = parse_stored(bare(old))

    assert (*parsed.identity, parsed.job_id, parsed.account_id) == (" s", "e " * 64, "job-1 ", " a")
    assert to_json(parse_stored(to_json(parsed))) == to_json(parsed)
    assert reason_of(bare(old))[0] == "invalid_event"


def test_a_corrected_copy_s_id_may_be_longer() -> None:
    """`<id>+edit.N` of the longest id is stored and read again, and cannot be published."""
    longest = event(id="x" * ID_LENGTH_MAX + "+edit.12345"[: EDITED_ID_LENGTH_MAX - ID_LENGTH_MAX])
    too_long = event(id="x" * (EDITED_ID_LENGTH_MAX + 1))

    parsed = parse_stored(bare(longest))

    assert to_json(parse_stored(to_json(parsed))) == to_json(parsed)
    assert reason_of(bare(longest)) == (
        "invalid_event",
        f"id: String should have at most 128 characters, not a string of {len(longest['id'])} characters",
    )
    with pytest.raises(MalformedMessage):
        parse_stored(bare(too_long))


@pytest.mark.parametrize("old", [{"id": "e\n"}, {"id": ""}, {"source": "x" * 129}, {"id": "\xa0e"}])
def test_what_was_never_an_id_is_none_in_storage_either(old: dict[str, Any]) -> None:
    """The rule of before is about white space and length, not about what garbles a terminal."""
    with pytest.raises(MalformedMessage):
        parse_stored(bare(event(**old)))


# Fuzzing. Numbers and texts beyond what JSON likes are in the strategies on purpose.
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.text(st.characters(categories=["Cs", "Cc"])),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
FIELDS = st.dictionaries(st.sampled_from([*event(), "body", "properties", "content-type"]), JSON, max_size=3)
DATA = st.dictionaries(
    st.sampled_from([*data(), "result_produced", "stage", "category"]),
    JSON | st.sampled_from([True, "after_generation", {"code": "E", "origin": "user"}]),
    max_size=3,
)
TYPES = st.sampled_from(sorted(QUEUES))


@st.composite
def nearly_events(draw: st.DrawFn) -> bytes:
    """Write an event with some fields replaced, in either form."""
    document = {**event(type=draw(TYPES), data=data(**draw(DATA))), **draw(FIELDS)}
    return envelope(document) if draw(st.booleans()) else bare(document)


@st.composite
def nearly_envelopes(draw: st.DrawFn) -> bytes:
    """Write an envelope with some fields replaced."""
    document = json.loads(envelope(draw(st.binary() | st.just(bare(event())))))
    return bare({**document, **draw(st.dictionaries(st.sampled_from(sorted(document)), JSON, max_size=3))})


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """Write a valid message, then overwrite a piece of it."""
    raw = draw(st.sampled_from([bare(event()), envelope(event())]))
    start = draw(st.integers(0, len(raw)))
    return raw[:start] + draw(st.binary(max_size=6)) + raw[draw(st.integers(start, len(raw))) :]


# A slow machine is no failure.
FUZZ = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
ARRAYS = st.lists(nearly_events(), max_size=3).map(lambda raws: b"[" + b",".join(raws) + b"]")
MESSAGES = st.one_of(st.binary(), JSON.map(bare), nearly_events(), nearly_envelopes(), damaged(), ARRAYS)


@FUZZ
@given(MESSAGES)
@example(b"[" * MESSAGE_BYTES_MAX)
@example(b'{"a":' * 50_000)
@example(b"9" * MESSAGE_BYTES_MAX)
@example(b'{"body":"","properties":{},"content-type":' + b"9" * 4300 + b"}")
@example(b'{"body":"","properties":{},"content-type":' + b"[" * 150 + b"]" * 150 + b"}")
def test_any_bytes_are_an_event_or_malformed(raw: bytes) -> None:
    """Whatever lies on a queue is an event that reads back as itself, or a MalformedMessage."""
    with suppress(MalformedMessage):
        parsed = parse(raw)
        assert fingerprint(parse(to_json(parsed))) == fingerprint(parsed)

    assert len(message_key(raw)) == 32
    about = describe(raw)
    assert all(one is None or (0 < len(one) <= 128 and one.isprintable()) for one in (*ids(raw), *about.other_job_ids))
    assert about.job_id is not None or about.may_hold_others


@FUZZ
@given(nearly_events())
def test_a_wrong_value_is_explained_in_bounds(raw: bytes) -> None:
    """The text of an error is printable and short, whatever value it quotes."""
    text = ""
    try:
        parse(raw)
    except MalformedMessage as malformed:
        text = malformed.text

    assert text.isprintable()
    assert len(text) < 800


@FUZZ
@given(JSON.map(lambda value: event(extra=value)))
def test_kombu_s_form_says_what_the_bare_form_says(document: dict[str, Any]) -> None:
    """For any content, the two wire forms give the same event or the same reason."""
    outcomes: list[object] = []
    for raw in (bare(document), envelope(document)):
        try:
            outcomes.append(fingerprint(parse(raw)))
        except MalformedMessage as malformed:
            outcomes.append((malformed.code, malformed.text))

    assert outcomes[0] == outcomes[1]
