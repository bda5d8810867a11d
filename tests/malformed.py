"""Every kind of message that no worker can understand, by name: (bytes on the queue, expected reason).

A new kind belongs here: the unit tests parse each, and the intake tests push each on each queue.
"""

from __future__ import annotations

import base64
import bz2
import gzip
import json
import zlib
from collections.abc import Callable
from typing import Any

from kino_refunds.events.envelope import ELEMENTS_MAX, MESSAGE_BYTES_MAX, MalformedReason

NOT_UTF_8 = b"\xff"
TEN_KB = "x" * 10_000
WHITE_SPACE = {
    "a space": " ",
    "a tab": "\t",
    "a line feed": "\n",
    "a no-break space": "\xa0",
    "an em space": "\u2003",
    "a zero width space": "\u200b",
    "an ideographic space": "\u3000",
    "a zero width no-break space": "\ufeff",
}


def event(**changes: Any) -> dict[str, Any]:
    """Return a valid failed event as JSON has it, with top-level fields changed."""
    return {
        "specversion": "1.0",
        "id": "evt-1",
        "source": "/pipeline/eu-1",
        "type": "kino.generation.job-failed.v1",
        "time": "2026-11-02T10:11:12.5+01:00",
        "subject": "job-1",
        "data": data(),
        **changes,
    }


def data(**changes: Any) -> dict[str, Any]:
    """Return the data of `event`, with fields changed."""
    return {
        "job_id": "job-1",
        "account_id": "acct-1",
        "error": {"code": "GPU_OOM", "origin": "platform", "message": "out of memory on node 7"},
        **changes,
    }


def bare(document: object) -> bytes:
    """Write a message as any language would."""
    return json.dumps(document).encode()


def envelope(body: object, /, *, delivery_tag: str = "tag-1", **changes: Any) -> bytes:
    """Write a message as kombu does; `body` is bytes or a document, `changes` are envelope fields."""
    content = body if isinstance(body, bytes) else bare(body)
    document = {
        "body": base64.b64encode(content).decode(),
        "content-encoding": "utf-8",
        "content-type": "application/json",
        "headers": {},
        "properties": {
            "delivery_mode": 2,
            "delivery_info": {"exchange": "", "routing_key": "generation.job-failed"},
            "priority": 0,
            "body_encoding": "base64",
            "delivery_tag": delivery_tag,
        },
    }
    changed = {name.replace("_", "-"): value for name, value in changes.items()}
    return bare({**document, **changed})


WIRE_FORMS: dict[str, Callable[[bytes], bytes]] = {"bare": lambda raw: raw, "kombu": envelope}
"""What carries the bytes of an event on a queue."""


def celery_task(name: str = "video.render", *, task_id: str = "task-1", body: object = None) -> bytes:
    """Write a task as Celery does: what it is stands in the headers."""
    arguments = [[], {"job_id": "job-1"}, {"callbacks": None}] if body is None else body
    return envelope(arguments, headers={"lang": "py", "task": name, "id": task_id, "retries": 0}, delivery_tag=task_id)


def binary_mode(prefix: str = "ce-", **headers: Any) -> bytes:
    """Write an event in CloudEvents' binary mode: its attributes are headers, its data is the body."""
    attributes = {**without(without(event(), "data"), "type"), "type": event()["type"]}
    named = {f"{prefix}{name}": value for name, value in attributes.items()}
    return envelope(data(), headers={**named, **headers})


def without(document: dict[str, Any], name: str) -> dict[str, Any]:
    """Return a copy that lacks one field."""
    return {key: value for key, value in document.items() if key != name}


def _kind(kind: str, **extra: Any) -> dict[str, Any]:
    return event(type=f"kino.generation.{kind}.v1", data={"job_id": "job-1", **extra})


_PADDED = bare(event(padding="x" * MESSAGE_BYTES_MAX))
_DEEP = b'{"specversion":"1.0","deep":' + b"[" * 5000 + b"]" * 5000 + b"}"

# Contents that are wrong by themselves: each is sent bare and in kombu's envelope.
_CONTENTS: dict[str, tuple[bytes, MalformedReason]] = {
    "empty": (b"", MalformedReason.BAD_JSON),
    "blank": (b" \n", MalformedReason.BAD_JSON),
    "not json": (b"job-1 failed", MalformedReason.BAD_JSON),
    "python repr": (str(event()).encode(), MalformedReason.BAD_JSON),
    "cut off": (bare(event())[:-10], MalformedReason.BAD_JSON),
    "trailing characters": (bare(event()) + b"}", MalformedReason.BAD_JSON),
    "two events on lines": (bare(event()) + b"\n" + bare(event()), MalformedReason.BAD_JSON),
    "byte order mark": (b"\xef\xbb\xbf" + bare(event()), MalformedReason.BAD_JSON),
    "nul byte": (bare(event()).replace(b"evt-1", b"evt\x001"), MalformedReason.BAD_JSON),
    "lone surrogate": (bare(event(id="evt-\ud800")), MalformedReason.BAD_JSON),
    "lone surrogate in an unknown field": (bare(event(extra="\udfff")), MalformedReason.BAD_JSON),
    "huge integer": (b'{"specversion":"1.0","n":' + b"9" * 5000 + b"}", MalformedReason.BAD_JSON),
    "deep nesting": (_DEEP, MalformedReason.BAD_JSON),
    "deeper nesting": (b"[" * 100_000, MalformedReason.BAD_JSON),
    "not utf-8": (bare(event()).replace(b"evt-1", NOT_UTF_8), MalformedReason.BAD_ENCODING),
    "not utf-8 in an unknown field": (
        bare(event(extra="?")).replace(b"?", b"\xc0\xaf"),
        MalformedReason.BAD_ENCODING,
    ),
    "utf-16": (json.dumps(event()).encode("utf-16"), MalformedReason.BAD_ENCODING),
    "gzip": (gzip.compress(bare(event()), mtime=0), MalformedReason.BAD_ENCODING),
    "null": (b"null", MalformedReason.INVALID_EVENT),
    "a number": (b"42", MalformedReason.INVALID_EVENT),
    "a huge number": (b"9" * 4300, MalformedReason.INVALID_EVENT),
    "not a number": (b"NaN", MalformedReason.INVALID_EVENT),
    "json in a string": (bare(json.dumps(event())), MalformedReason.INVALID_EVENT),
    "an empty array": (b"[]", MalformedReason.INVALID_EVENT),
    "an array of too many events": (
        bare([event(id=f"evt-{number}") for number in range(ELEMENTS_MAX + 1)]),
        MalformedReason.INVALID_EVENT,
    ),
    "an array of numbers": (b"[1, 2]", MalformedReason.INVALID_EVENT),
    "an event and a number": (bare([event(), 42]), MalformedReason.INVALID_EVENT),
    "an array in an array": (bare([[event()]]), MalformedReason.INVALID_EVENT),
    "an array of objects that are no events": (bare([{"job_id": "job-1"}, {}]), MalformedReason.INVALID_EVENT),
    "an array of envelopes": (bare([json.loads(envelope(event()))]), MalformedReason.INVALID_EVENT),
    "an array cut off": (bare([event(), event(id="evt-2")])[:-20], MalformedReason.BAD_JSON),
    "a celery task of the older protocol": (
        bare({"task": "video.render", "id": "task-1", "args": [], "kwargs": {"job_id": "job-1"}}),
        MalformedReason.INVALID_EVENT,
    ),
    "a celery task's body": (bare([[], {"job_id": "job-1"}, {"callbacks": None}]), MalformedReason.INVALID_EVENT),
    "an empty object": (b"{}", MalformedReason.INVALID_EVENT),
    "old version": (bare(event(specversion="0.3")), MalformedReason.UNKNOWN_VERSION),
    "version as a number": (bare(event(specversion=1.0)), MalformedReason.UNKNOWN_VERSION),
    "version null": (bare(event(specversion=None)), MalformedReason.UNKNOWN_VERSION),
    "unknown type": (bare(event(type="kino.generation.job-started.v1")), MalformedReason.UNKNOWN_TYPE),
    "unknown version of a type": (
        bare(event(type="kino.generation.job-failed.v2")),
        MalformedReason.UNKNOWN_TYPE,
    ),
    "queue name as type": (bare(event(type="generation.job-failed")), MalformedReason.UNKNOWN_TYPE),
    "type as a number": (bare(event(type=1)), MalformedReason.INVALID_EVENT),
    "data missing": (bare(without(event(), "data")), MalformedReason.INVALID_EVENT),
    "data as a string": (bare(event(data="job-1")), MalformedReason.INVALID_EVENT),
    **{
        f"data_base64 {name}": (bare({**without(event(), "data"), "data_base64": value}), reason)
        for name, value, reason in (
            ("of nothing", "e30=", MalformedReason.INVALID_EVENT),
            ("as an object", data(), MalformedReason.INVALID_EVENT),
            ("null", None, MalformedReason.INVALID_EVENT),
            ("that holds no json", "am9iLTE=", MalformedReason.INVALID_EVENT),
            ("that is not base64", "%%%", MalformedReason.BAD_BASE64),
        )
    },
    "last of two keys is wrong": (
        bare(event()).replace(b'"id": "evt-1"', b'"id": "evt-1", "id": 1'),
        MalformedReason.INVALID_EVENT,
    ),
    "subject is another job": (bare(event(subject="job-2")), MalformedReason.INVALID_EVENT),
    "message as an object": (
        bare(event(data=data(error={"code": "E", "origin": "user", "message": {}}))),
        MalformedReason.INVALID_EVENT,
    ),
    "error missing": (bare(event(data=without(data(), "error"))), MalformedReason.INVALID_EVENT),
    "error as a string": (bare(event(data=data(error="GPU_OOM"))), MalformedReason.INVALID_EVENT),
    "origin missing": (bare(event(data=data(error={"code": "E"}))), MalformedReason.INVALID_EVENT),
    "unknown origin": (
        bare(event(data=data(error={"code": "E", "origin": "nobody"}))),
        MalformedReason.INVALID_EVENT,
    ),
    "code missing": (bare(event(data=data(error={"origin": "user"}))), MalformedReason.INVALID_EVENT),
    "result produced as a string": (
        bare(_kind("timeout", result_produced="no")),
        MalformedReason.INVALID_EVENT,
    ),
    "result produced as a number": (bare(_kind("timeout", result_produced=0)), MalformedReason.INVALID_EVENT),
    "result produced null": (bare(_kind("timeout", result_produced=None)), MalformedReason.INVALID_EVENT),
    "stage missing": (bare(_kind("safety-rejection", category="gore")), MalformedReason.INVALID_EVENT),
    "unknown stage": (
        bare(_kind("safety-rejection", category="gore", stage="later")),
        MalformedReason.INVALID_EVENT,
    ),
    "category missing": (
        bare(_kind("safety-rejection", stage="before_generation")),
        MalformedReason.INVALID_EVENT,
    ),
    "category empty": (
        bare(_kind("safety-rejection", category="", stage="before_generation")),
        MalformedReason.INVALID_EVENT,
    ),
    **{
        f"{name} missing": (bare(without(event(), name)), MalformedReason.INVALID_EVENT)
        for name in ("specversion", "id", "source", "type", "time", "subject")
    },
    **{
        f"id {name}": (bare(event(id=value)), MalformedReason.INVALID_EVENT)
        for name, value in {
            "empty": "",
            "too long": "x" * 129,
            "as a number": 1,
            "null": None,
            "with NUL": "evt-\x00",
            "with an escape": "\x1b[2J",
            "with a right-to-left override": "evt-\u202e1",
            **{f"that ends with {name}": f"evt-1{space}" for name, space in WHITE_SPACE.items()},
            **{f"that begins with {name}": f"{space}evt-1" for name, space in WHITE_SPACE.items()},
        }.items()
    },
    **{
        f"source {name}": (bare(event(source=value)), MalformedReason.INVALID_EVENT)
        for name, value in {
            "empty": "",
            "too long": "x" * 129,
            "with NUL": "\x00",
            "with a space at its end": "x ",
        }.items()
    },
    **{
        f"job id {name}": (bare(event(subject=value, data=data(job_id=value))), MalformedReason.INVALID_EVENT)
        for name, value in {
            "empty": "",
            "too long": "x" * 129,
            "as a number": 7,
            "with NUL": "j\x00",
            "with a space at its end": "job-1 ",
        }.items()
    },
    "job id missing": (bare(event(data=without(data(), "job_id"))), MalformedReason.INVALID_EVENT),
    **{
        f"account id {name}": (bare(event(data=data(account_id=value))), MalformedReason.INVALID_EVENT)
        for name, value in {
            "empty": "",
            "too long": "x" * 129,
            "as a number": 7,
            "with NUL": "a\x00",
            "with a space at its end": "acct-1 ",
        }.items()
    },
    **{
        f"time {name}": (bare(event(time=value)), MalformedReason.INVALID_EVENT)
        for name, value in {
            "naive": "2026-11-02T10:11:12",
            "as a unix number": 1_793_614_272,
            "as a unix number in a string": "1793614272",
            "null": None,
            "of kombu's own kind": {"__type__": "datetime", "__value__": "2026-11-02T10:11:12+00:00"},
            "a date": "2026-11-02",
            "without seconds": "2026-11-02T10:11Z",
            "with a space": "2026-11-02 10:11:12Z",
            "with an offset without colon": "2026-11-02T10:11:12+0100",
            "with an offset of a day": "2026-11-02T10:11:12+24:00",
            "with a trailing line feed": "2026-11-02T10:11:12Z\n",
            "in other digits": "\u0662\u0660\u0662\u0666-11-02T10:11:12Z",
            "at 24:00": "2026-11-02T24:00:00Z",
            "in a leap second": "2016-12-31T23:59:60Z",
            "on 30 February": "2026-02-30T10:11:12Z",
            "in year 0": "0000-01-01T00:00:00Z",
            "before year 1 in UTC": "0001-01-01T00:00:00+00:01",
            "after year 9999 in UTC": "9999-12-31T23:59:59-00:01",
        }.items()
    },
}

# Wrong only on the wire.
_ENVELOPES: dict[str, tuple[bytes, MalformedReason]] = {
    "too large, bare": (_PADDED, MalformedReason.TOO_LARGE),
    "too large by its envelope only": (
        envelope(event(padding="x" * (MESSAGE_BYTES_MAX * 4 // 5))),
        MalformedReason.TOO_LARGE,
    ),
    "too large and not json": (b"\x00" * (MESSAGE_BYTES_MAX + 1), MalformedReason.TOO_LARGE),
    "envelope cut off": (envelope(event())[:-10], MalformedReason.BAD_JSON),
    "envelope not utf-8": (
        envelope(event(), headers={"h": "?"}).replace(b"?", NOT_UTF_8),
        MalformedReason.BAD_ENCODING,
    ),
    "body not base64": (envelope(event(), body="%%%"), MalformedReason.BAD_BASE64),
    "body with bad padding": (envelope(event(), body="e30"), MalformedReason.BAD_BASE64),
    "body with line feeds": (
        envelope(event(), body=base64.encodebytes(bare(event())).decode()),
        MalformedReason.BAD_BASE64,
    ),
    "body not ascii": (envelope(event(), body="\u00e9e30="), MalformedReason.BAD_BASE64),
    "body as plain json": (envelope(event(), body=json.dumps(event())), MalformedReason.BAD_BASE64),
    "body as an object": (envelope(event(), body=event()), MalformedReason.BAD_ENVELOPE),
    "properties as an array": (envelope(event(), properties=[]), MalformedReason.BAD_ENVELOPE),
    "headers as a string": (envelope(event(), headers="none"), MalformedReason.BAD_ENVELOPE),
    "body encoding missing": (envelope(event(), properties={}), MalformedReason.BAD_ENVELOPE),
    "body encoding other": (
        envelope(event(), properties={"body_encoding": "utf-8"}),
        MalformedReason.BAD_ENVELOPE,
    ),
    **{
        f"content type {name}": (envelope(event(), content_type=value), MalformedReason.WRONG_CONTENT_TYPE)
        for name, value in {
            "pickle": "application/x-python-serialize",
            "text": "text/plain",
            "yaml": "application/x-yaml",
            "of kombu's bytes": "application/data",
            "with another charset": "application/json; charset=latin-1",
            "null": None,
            "as a number": 1,
        }.items()
    },
    **{
        f"content encoding {name}": (envelope(event(), content_encoding=value), MalformedReason.BAD_ENCODING)
        for name, value in {"gzip": "gzip", "latin-1": "iso-8859-1", "null": None}.items()
    },
    **{
        f"compressed by {name}": (
            envelope(compress(bare(event())), headers={"compression": kind}),
            MalformedReason.COMPRESSED,
        )
        for name, kind, compress in (
            ("zlib", "application/x-gzip", zlib.compress),
            ("bz2", "application/x-bz2", bz2.compress),
        )
    },
    "a celery task": (celery_task(), MalformedReason.INVALID_EVENT),
    "a pickled celery task": (
        envelope(b"\x80\x04N.", headers={"task": "t"}, content_type="application/x-python-serialize"),
        MalformedReason.WRONG_CONTENT_TYPE,
    ),
    **{
        f"binary mode of {name}": (binary_mode(prefix), MalformedReason.INVALID_EVENT)
        for name, prefix in {"http": "ce-", "kafka": "ce_", "amqp": "cloudEvents:", "amqp 2": "cloudEvents_"}.items()
    },
    "binary mode with other data": (
        envelope(b"<x/>", headers={"ce-id": "evt-1", "ce-source": "s"}, content_type="application/xml"),
        MalformedReason.INVALID_EVENT,
    ),
    "envelope in an envelope": (envelope(envelope(event())), MalformedReason.INVALID_EVENT),
    "envelope with a specversion": (envelope(event(), specversion="1.0"), MalformedReason.INVALID_EVENT),
    "envelope without a content type": (
        bare(without(json.loads(envelope(event())), "content-type")),
        MalformedReason.INVALID_EVENT,
    ),
}

MALFORMED: dict[str, tuple[bytes, MalformedReason]] = {
    **{f"{name}, bare": case for name, case in _CONTENTS.items()},
    **{f"{name}, kombu": (envelope(content), reason) for name, (content, reason) in _CONTENTS.items()},
    **_ENVELOPES,
}
