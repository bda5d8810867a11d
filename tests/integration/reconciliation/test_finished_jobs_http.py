"""The list of finished jobs by HTTP: pages, cursors, and endpoints that lie or hang."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler
from typing import Any

import pytest

from kino_refunds.errors import SourceBroken, SourceTimeout, SourceUnavailable, SourceUnreachable
from kino_refunds.reconciliation.http_source import HttpFinishedSource
from tests.integration.reconciliation.finished_jobs import (
    EVERYTHING,
    LISTED,
    SINCE,
    TICK,
    UNTIL,
    WINDOW,
    ended,
    paged,
    read,
    row_of,
)
from tests.integration.reconciliation.job_sources import Endpoint, Reply, body

A_ROW = row_of(ended("a", at=SINCE + TICK))


def page(*rows: Any, **more: Any) -> Reply:
    return body(json.dumps({"jobs": rows, **more}).encode())


HTTP_LIES: dict[str, tuple[Reply, type[Exception]]] = {
    "an error": (body(b'{"jobs": []}', 500), SourceUnavailable),
    "not found": (body(b"", 404), SourceUnreachable),
    "a redirect": (body(b"", 307, Location="/elsewhere"), SourceUnreachable),
    "nothing": (body(b""), SourceBroken),
    "no json": (body(b"<html>"), SourceBroken),
    "an array": (body(b"[]"), SourceBroken),
    "no jobs": (body(b"{}"), SourceBroken),
    "jobs of words": (page("a"), SourceBroken),
    "a cursor of another kind": (page(A_ROW, next=7), SourceBroken),
    "an empty cursor": (page(A_ROW, next=""), SourceBroken),
    "a huge cursor": (page(A_ROW, next="x" * 10_001), SourceBroken),
    "the same page for ever": (page(A_ROW, next="more"), SourceBroken),
    "empty pages for ever": (
        lambda handler, asked: page(next=f"{int(asked['cursor'] or 0) + 1}")(handler, asked),
        SourceBroken,
    ),
    "a promise of another kind": (page(complete_through=1793534400), SourceBroken),
    "a promise without an offset": (page(complete_through="2026-11-01T12:00:00"), SourceBroken),
    "a running job": (page(A_ROW | {"state": "running"}), SourceBroken),
    "no time": (page(A_ROW | {"finished_at": None}), SourceBroken),
    "a time without an offset": (page(A_ROW | {"finished_at": "2026-11-01T12:00:00"}), SourceBroken),
    "credits of another kind": (page(A_ROW | {"credits": "7"}), SourceBroken),
    "half a credit": (page(A_ROW | {"credits": 7.5}), SourceBroken),
    "an account of another kind": (page(A_ROW | {"account_id": 7}), SourceBroken),
    "an id of another kind": (page(A_ROW | {"job_id": 7}), SourceBroken),
    "no id": (page({"state": "completed", "finished_at": "2026-11-01T12:00:00Z"}), SourceBroken),
    "out of order": (page(A_ROW | {"job_id": "b"}, A_ROW), SourceBroken),
    "a row twice": (page(A_ROW, A_ROW), SourceBroken),
    "another window": (page(A_ROW | {"finished_at": UNTIL.isoformat()}), SourceBroken),
}


@pytest.mark.parametrize(("lie", "error"), HTTP_LIES.values(), ids=HTTP_LIES)
def test_what_is_no_page_is_an_error(
    endpoint: Endpoint, http_list: HttpFinishedSource, lie: Reply, error: type[Exception]
) -> None:
    """Anything but pages of finished jobs that end is no list, and the next list is read."""
    endpoint.reply = lie

    assert read(http_list) is error
    endpoint.reply = paged(EVERYTHING)
    assert read(http_list) == LISTED


def test_an_endpoint_that_hangs_is_no_list(endpoint: Endpoint, http_list: HttpFinishedSource) -> None:
    """An endpoint that accepts the question and says nothing has listed nothing."""

    def hang(_: BaseHTTPRequestHandler, __: dict[str, Any]) -> None:
        endpoint.ended.wait(30)

    endpoint.reply = hang

    assert read(http_list) is SourceTimeout


def test_pages_are_asked_for_with_window_and_cursor(endpoint: Endpoint, http_list: HttpFinishedSource) -> None:
    """The window is in UTC to the microsecond, and the cursor is the endpoint's own."""
    endpoint.reply = paged(EVERYTHING, each=4, promise="2026-11-01T13:30:00+01:00")

    listed, promise = list(http_list.finished(*WINDOW)), http_list.complete_through()

    window = {"since": "2026-11-01T12:00:00.000000Z", "until": "2026-11-01T13:00:00.000000Z"}
    epoch = dict.fromkeys(("since", "until"), "1970-01-01T00:00:00.000000Z")
    assert (listed, promise) == (LISTED, datetime(2026, 11, 1, 12, 30, tzinfo=UTC))
    assert [(path, asked) for path, _, asked in endpoint.requests] == [
        ("/jobs/finished", {**window, "cursor": None}),
        ("/jobs/finished", {**window, "cursor": "4"}),
        ("/jobs/finished", {**epoch, "cursor": None}),
    ]


def test_a_list_for_an_empty_window_breaks_the_promise(endpoint: Endpoint, http_list: HttpFinishedSource) -> None:
    """An endpoint that ignores the window is found by the first question."""
    endpoint.reply = page(A_ROW, complete_through="2026-11-01T12:00:00Z")

    with pytest.raises(SourceBroken, match="empty window"):
        http_list.complete_through()
