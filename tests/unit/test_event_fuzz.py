"""Any bytes are an event or malformed (hypothesis)."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from kino_refunds.errors import MalformedMessage
from kino_refunds.events.envelope import MESSAGE_BYTES_MAX, describe, message_key, parse
from kino_refunds.events.schema import QUEUES, fingerprint, to_json
from tests.event_kinds import ids
from tests.malformed import bare, data, envelope, event

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
