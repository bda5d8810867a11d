"""Events and messages: which fields they have, what is refused, and by which reason."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
from pydantic import ValidationError

from kino_refunds.errors import MalformedMessage
from kino_refunds.events.envelope import (
    ELEMENTS_MAX,
    MESSAGE_BYTES_MAX,
    MalformedReason,
    contents,
    opened,
    parse,
    parse_stored,
    split,
)
from kino_refunds.events.schema import (
    EDITED_ID_LENGTH_MAX,
    ID_LENGTH_MAX,
    QUEUES,
    Event,
    JobCompleted,
    Queue,
    fingerprint,
    queue_of,
    to_json,
)
from tests.event_kinds import AT, COMMON, KINDS, reason_of
from tests.malformed import MALFORMED, WHITE_SPACE, bare, celery_task, data, envelope, event, without


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
