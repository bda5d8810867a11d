"""The job source that is an endpoint, against a real one, honest and lying."""

from __future__ import annotations

from http.server import BaseHTTPRequestHandler
from typing import Any

import httpx
import pytest

from kino_refunds.errors import KinoError, SourceBroken, SourceTimeout, SourceUnavailable, SourceUnreachable
from kino_refunds.reconciliation.contract import JobSourceContract
from kino_refunds.reconciliation.http_source import ANSWER_BYTES_MAX, HttpSource
from kino_refunds.reconciliation.rows import read_answers
from kino_refunds.reconciliation.sources import Answer, JobSource
from tests.integration.reconciliation.job_sources import (
    BROKEN,
    FAILED,
    FOREIGN,
    KNOWN,
    UNKNOWN,
    Endpoint,
    Reply,
    body,
    honest,
    rows,
    send,
)
from tests.malformed import TEN_KB


class TestHttpSource(JobSourceContract):
    """The HTTP adapter keeps the contract that the sweep relies on."""

    @pytest.fixture
    def source(self, http_source: HttpSource) -> JobSource:
        return http_source

    @pytest.fixture
    def known(self) -> dict[str, Answer]:
        return KNOWN


def cut_off(handler: BaseHTTPRequestHandler, _: dict[str, Any]) -> None:
    send(handler, b'{"jobs": []', Content_Length="1000")


def huge(handler: BaseHTTPRequestHandler, _asked: dict[str, Any]) -> None:
    handler.send_response(200)
    handler.end_headers()
    for _ in range(ANSWER_BYTES_MAX // 2**16 + 2):
        handler.wfile.write(b" " * 2**16)


A_ROW: dict[str, Any] = {"job_id": "a", "state": "completed"}
NO_ANSWER, NOWHERE = SourceUnavailable, SourceUnreachable
LIES: dict[str, tuple[Reply, type[Exception]]] = {
    "an error": (body(b'{"jobs": []}', 500), NO_ANSWER),
    "another good status": (body(b'{"jobs": [{"job_id": "a", "state": "completed"}]}', 203), NO_ANSWER),
    "no content": (body(b"", 204), NO_ANSWER),
    "not found": (body(b"not here", 404), NOWHERE),
    "a wrong token": (body(b"who are you?", 401), NOWHERE),
    "a redirect": (body(b"", 307, Location="/elsewhere"), NOWHERE),
    "a redirect to nowhere": (body(b"", 302), NOWHERE),
    "nothing": (body(b""), BROKEN),
    "no json": (body(b"<html>a login page</html>"), BROKEN),
    "no utf-8": (body(b'{"jobs": [{"job_id": "\xff", "state": "completed"}]}'), BROKEN),
    "json cut off": (cut_off, NO_ANSWER),
    "an array": (body(b"[]"), BROKEN),
    "null": (body(b"null"), BROKEN),
    "no jobs": (body(b"{}"), BROKEN),
    "jobs of another kind": (body(b'{"jobs": {"a": "completed"}}'), BROKEN),
    "a job of another kind": (body(b'{"jobs": ["a"]}'), BROKEN),
    "deep": (body(b'{"jobs": ' + b"[" * 100_000), BROKEN),
    "huge": (huge, NO_ANSWER),
    "a lying encoding": (body(b"not gzip", Content_Encoding="gzip"), NO_ANSWER),
    "an unknown word": (rows(A_ROW | {"state": "gone fishing"}), BROKEN),
    "a state of another kind": (rows(A_ROW | {"state": ["completed"]}), BROKEN),
    "an unknown origin": (rows(A_ROW | {"state": "failed", "origin": "the intern"}), BROKEN),
    "no state": (rows({"job_id": "a"}), BROKEN),
    "null as state": (rows(A_ROW | {"state": None}), BROKEN),
    "a result of another kind": (rows(A_ROW | {"state": "timed_out", "result_produced": "false"}), BROKEN),
    "a result that is a number": (rows(A_ROW | {"state": "timed_out", "result_produced": 0}), BROKEN),
    "a time without offset": (rows(A_ROW | {"finished_at": "2026-11-01T12:00:00"}), BROKEN),
    "a time that is a number": (rows(A_ROW | {"finished_at": 1793534400}), BROKEN),
    "no such day": (rows(A_ROW | {"finished_at": "2026-02-30T12:00:00Z"}), BROKEN),
    "an endless time": (rows(A_ROW | {"finished_at": float("inf")}), BROKEN),
    "NaN as time": (rows(A_ROW | {"finished_at": float("nan")}), BROKEN),
    "two answers": (rows(A_ROW, A_ROW | {"state": "failed"}), BROKEN),
    "two times": (rows(A_ROW, A_ROW | {"finished_at": "2026-11-01T12:00:00Z"}), BROKEN),
    "no id": (rows({"state": "completed"}), FOREIGN),
    "null as id": (rows(A_ROW | {"job_id": None}), FOREIGN),
    "NaN as id": (rows(A_ROW | {"job_id": float("nan")}), FOREIGN),
    "an id of another kind": (rows(A_ROW | {"job_id": 1}), FOREIGN),
    "an id that cannot be a key": (rows(A_ROW | {"job_id": ["a"]}), FOREIGN),
    "a padded id": (rows(A_ROW | {"job_id": "a  "}), FOREIGN),
    "a folded id": (rows(A_ROW | {"job_id": "A"}), FOREIGN),
    "another's row beside ours": (rows(A_ROW, A_ROW | {"job_id": "c"}), FOREIGN),
    "another's unreadable row": (rows(A_ROW, {"job_id": "c"}), FOREIGN),
}


@pytest.mark.parametrize(("lie", "error"), LIES.values(), ids=LIES)
def test_what_is_not_an_answer_is_an_error(
    endpoint: Endpoint, http_source: HttpSource, lie: Reply, error: type[Exception]
) -> None:
    """Anything but a readable 200 for the jobs that were asked settles nothing, and the next ask is answered."""
    endpoint.reply = lie

    with pytest.raises(KinoError) as caught:
        http_source.ask(["a", "b"])

    assert type(caught.value) is error
    endpoint.reply = honest
    assert http_source.ask(["failed"]) == {"failed": FAILED}


def test_a_redirect_is_not_followed(endpoint: Endpoint, http_source: HttpSource) -> None:
    """The token goes to the configured place and to no other."""
    endpoint.reply = body(b"", 307, Location="/elsewhere")

    with pytest.raises(SourceUnavailable, match="status 307"):
        http_source.ask(["a"])

    assert [path for path, _, _ in endpoint.requests] == ["/jobs"]


def test_a_job_that_is_missing_was_not_answered(endpoint: Endpoint, http_source: HttpSource) -> None:
    """Silence about a job is not `unknown`."""
    endpoint.reply = rows({"job_id": "a", "state": "failed"})

    assert http_source.ask(["a", "b"]) == {"a": FAILED}


def test_an_endpoint_that_hangs_is_no_answer(endpoint: Endpoint, http_source: HttpSource) -> None:
    """Who accepts the question and says nothing has not answered."""

    def hang(_: BaseHTTPRequestHandler, __: dict[str, Any]) -> None:
        endpoint.ended.wait(30)

    endpoint.reply = hang

    with pytest.raises(SourceTimeout, match="did not answer in time"):
        http_source.ask(["a"])


def test_an_endpoint_that_drips_is_no_answer(endpoint: Endpoint, http_source: HttpSource) -> None:
    """The time-out is for the answer, not for each byte of it: a drip must not hold up the sweep for hours."""

    def drip(handler: BaseHTTPRequestHandler, _: dict[str, Any]) -> None:
        answer = b'{"jobs": [{"job_id": "a", "state": "failed"}]}'
        handler.send_response(200)
        handler.end_headers()
        for start in range(0, len(answer), 4):
            handler.wfile.write(answer[start : start + 4])
            endpoint.ended.wait(0.1)

    endpoint.reply = drip

    with pytest.raises(SourceTimeout):
        http_source.ask(["a"])


def test_nobody_there_is_no_answer() -> None:
    """A closed port is an error like any other."""
    with httpx.Client(timeout=0.5, trust_env=False) as client, pytest.raises(SourceUnreachable, match="refused"):
        HttpSource(client, "http://127.0.0.1:9/jobs").ask(["a"])


def test_ids_travel_as_they_are(endpoint: Endpoint, http_source: HttpSource) -> None:
    """NUL, escapes and 10 kB are only text in a JSON body."""
    odd = ["a\x00b", "\x1b[31m", TEN_KB, '"}]}', "\U0001f3ac"]

    answers = http_source.ask(odd)

    assert answers == dict.fromkeys(odd, UNKNOWN)
    assert endpoint.requests == [("/jobs", None, {"job_ids": odd})]


def test_what_is_said_of_an_error_is_short() -> None:
    """An error names the field and not the answer's content: that may be anything, and is logged."""
    with pytest.raises(SourceBroken) as caught:
        read_answers([{"job_id": "a", "state": "\x1b[31m" + TEN_KB}], ["a"])

    assert len(str(caught.value)) < 300
    assert str(caught.value).isprintable()
