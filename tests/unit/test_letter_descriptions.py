"""What a letter says of a message that cannot be read: its ids, its jobs, and the mistake it is grouped by."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest

from kino_refunds.events.envelope import ELEMENTS_MAX, MESSAGE_BYTES_MAX, Description, describe
from tests.event_kinds import ids, malformed, reason_of
from tests.malformed import MALFORMED, bare, binary_mode, celery_task, data, envelope, event, without


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
