"""A job source that needs no code of the product: an HTTP endpoint (design, section 7)."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import httpx
from pydantic import BaseModel, Field, ValidationError

from kino_refunds.errors import SourceBroken, SourceTimeout, SourceUnavailable, SourceUnreachable
from kino_refunds.events.schema import Time
from kino_refunds.reconciliation.rows import read_answers, read_finished

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from kino_refunds.reconciliation.finished import FinishedJob
    from kino_refunds.reconciliation.sources import Answer

ANSWER_BYTES_MAX = 4 * 2**20
"""A batch of answers has some 10 kB; a body that is far larger is not an answer."""
EMPTY_PAGES_MAX = 100
"""Pages without a job in a row. An endpoint that filters its pages may give some; one that gives them for ever would
hold a run for ever."""
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class HttpSource:
    """A job source that asks an endpoint: POST `{"job_ids": [...]}` gives `{"jobs": [{"job_id", "state", ...}]}`.

    If known, a job also has `origin`, `stage`, `result_produced` (true or false) and `finished_at` (RFC 3339 with
    offset). A job that the endpoint does not know must be in the answer as `unknown`: a job that is missing was not
    answered. Redirects are not followed, because the token would be sent to the other address.
    """

    def __init__(self, client: httpx.Client, url: str) -> None:
        self._client = client
        self._url = url

    def ask(self, job_ids: Sequence[str]) -> Mapping[str, Answer]:
        """Return the answers of one request, by job id.

        Raises SourceUnavailable for anything but a readable 200 (SourceUnreachable if there was no connection or no
        right to ask, SourceTimeout), ForeignAnswer and SourceBroken for rows that are not answers.
        """
        body = self._post(self._url, {"job_ids": list(job_ids)})
        try:
            rows = _Answers.model_validate_json(body).jobs
        except ValidationError as error:
            raise SourceBroken("the job source's answer is not a JSON object with `jobs`, a list of objects") from error
        return read_answers(rows, job_ids)

    def _post(self, url: str, content: Mapping[str, Any]) -> bytes:
        """Return the body of a 200; raises SourceUnavailable for anything else."""
        body = bytearray()
        read = self._client.timeout.read
        deadline = None if read is None else time.monotonic() + read
        try:
            with self._client.stream("POST", url, json=content) as response:
                if response.status_code != httpx.codes.OK:
                    # Without the right to ask, or at a wrong address, a smaller request would fail as well.
                    refused = response.is_redirect or response.status_code in {401, 403, 404, 405}
                    kind = SourceUnreachable if refused else SourceUnavailable
                    raise kind(f"the job source answered with status {response.status_code}")
                for piece in response.iter_bytes():
                    body += piece
                    if deadline is not None and time.monotonic() > deadline:
                        raise SourceTimeout("the job source did not end its answer in time")
                    if len(body) > ANSWER_BYTES_MAX:
                        raise SourceUnavailable(f"the job source's answer is over {ANSWER_BYTES_MAX:,} bytes")
        except (httpx.ConnectError, httpx.ConnectTimeout, httpx.UnsupportedProtocol) as error:
            raise SourceUnreachable(f"the job source cannot be reached: {type(error).__name__}: {error}") from error
        except httpx.TimeoutException as error:
            raise SourceTimeout(f"the job source did not answer in time: {type(error).__name__}") from error
        except httpx.HTTPError as error:
            raise SourceUnavailable(f"the job source did not answer: {type(error).__name__}") from error
        return bytes(body)


class HttpFinishedSource(HttpSource):
    """An HttpSource with a second endpoint, for the jobs that finished in a window, in pages.

    POST `{"since", "until", "cursor"}` gives `{"jobs": [...], "next": ..., "complete_through": ...}`. The first
    `cursor` is null, the following ones are the `next` of the page before; `next` null ends the list. Jobs are sorted
    by `finished_at` and then by `job_id`, over all pages. An empty window asks for `complete_through` alone.
    """

    def __init__(self, client: httpx.Client, url: str, *, finished_url: str) -> None:
        super().__init__(client, url)
        self._finished_url = finished_url

    def finished(self, since: datetime, until: datetime) -> Iterator[FinishedJob]:
        """Yield the finished jobs of the window in order, page by page.

        Raises what `ask` raises, and SourceBroken for a row that is not a finished job or for pages without an end.
        """
        cursor, empty = None, 0
        while True:
            page = self._page(since, until, cursor)
            yield from (read_finished(row) for row in page.jobs)
            empty = 0 if page.jobs else empty + 1
            if page.next is None:
                return
            if page.next == cursor:
                raise SourceBroken("the job source's `next` is the cursor that it was sent: the list has no end")
            if empty > EMPTY_PAGES_MAX:
                raise SourceBroken(f"the job source gives over {EMPTY_PAGES_MAX} pages without a job in a row")
            cursor = page.next

    def complete_through(self) -> datetime | None:
        """Return the instant through which the endpoint says that its list is complete; raises what `ask` raises."""
        page = self._page(EPOCH, EPOCH, None)
        if page.jobs:
            raise SourceBroken("the job source lists jobs for an empty window")
        return page.complete_through

    def _page(self, since: datetime, until: datetime, cursor: str | None) -> _Finished:
        window = {name: _written(value) for name, value in (("since", since), ("until", until))}
        body = self._post(self._finished_url, {**window, "cursor": cursor})
        try:
            return _Finished.model_validate_json(body)
        except ValidationError as error:
            where = str(error.errors()[0]["loc"][0]) if error.errors()[0]["loc"] else "body"
            text = f"the job source's list is not a JSON object with `jobs`, `next` and `complete_through` ({where})"
            raise SourceBroken(text) from error


class _Answers(BaseModel):
    jobs: list[dict[str, Any]]


class _Finished(BaseModel):
    jobs: list[dict[str, Any]]
    # A list of one page may leave it out. The length: it is sent back, and some endpoints put their state into it.
    next: Annotated[str, Field(min_length=1, max_length=10_000)] | None = None
    complete_through: Time | None = None


def _written(instant: datetime) -> str:
    return instant.astimezone(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
