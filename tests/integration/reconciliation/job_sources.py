"""Jobs as a product has them, what a source must say of each, and an endpoint that says what it is told."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

from pydantic import SecretStr

from kino_refunds.errors import ForeignAnswer, SourceBroken
from kino_refunds.events.schema import ErrorOrigin, SafetyStage
from kino_refunds.reconciliation.sources import Answer, JobState
from kino_refunds.settings import Settings

UNKNOWN, COMPLETED, FAILED = Answer(JobState.UNKNOWN), Answer(JobState.COMPLETED), Answer(JobState.FAILED)
ENDED_AT = datetime(2026, 11, 1, 12, 30, 15, 123456, tzinfo=UTC)
JOBS: list[dict[str, Any]] = [
    {"job_id": "completed", "state": "completed"},
    {"job_id": "completed at", "state": "completed", "finished_at": "2026-11-01T12:30:15.123456Z"},
    {"job_id": "failed", "state": "failed"},
    {"job_id": "failed by the user", "state": "failed", "origin": "user"},
    {"job_id": "failed at", "state": "failed", "finished_at": "2026-11-01T05:30:15.123456-07:00"},
    {"job_id": "timed out", "state": "timed_out"},
    {"job_id": "timed out with a result", "state": "timed_out", "result_produced": True},
    {"job_id": "timed out without", "state": "timed_out", "result_produced": False},
    {"job_id": "rejected", "state": "rejected"},
    {"job_id": "rejected late", "state": "rejected", "stage": "after_generation"},
    {"job_id": "running", "state": "running"},
    {"job_id": "named unknown", "state": "unknown"},
    {"job_id": "it's 100% :odd", "state": "completed"},
    {"job_id": "twenty characters it", "state": "completed"},
    {"job_id": "l" * 128, "state": "completed"},
    {"job_id": "Case", "state": "completed"},
]
KNOWN = {
    "completed": COMPLETED,
    "completed at": Answer(JobState.COMPLETED, finished_at=ENDED_AT),
    "failed": FAILED,
    "failed by the user": Answer(JobState.FAILED, origin=ErrorOrigin.USER),
    "failed at": Answer(JobState.FAILED, finished_at=ENDED_AT),
    "timed out": Answer(JobState.TIMED_OUT),
    "timed out with a result": Answer(JobState.TIMED_OUT, result_produced=True),
    "timed out without": Answer(JobState.TIMED_OUT, result_produced=False),
    "rejected": Answer(JobState.REJECTED, stage=SafetyStage.DURING_GENERATION),
    "rejected late": Answer(JobState.REJECTED, stage=SafetyStage.AFTER_GENERATION),
    "running": Answer(JobState.RUNNING),
    "named unknown": UNKNOWN,
    "it's 100% :odd": COMPLETED,
    "twenty characters it": COMPLETED,
    "l" * 128: COMPLETED,
    "Case": COMPLETED,
}
COLUMNS = "job_id, state, origin, stage, result_produced, finished_at"
QUERY = f"SELECT {COLUMNS} FROM public.job WHERE job_id = ANY(CAST(:job_ids AS text[]))"


BROKEN, FOREIGN = SourceBroken, ForeignAnswer


Reply = Callable[[BaseHTTPRequestHandler, dict[str, Any]], None]


def send(handler: BaseHTTPRequestHandler, body: bytes, status: int = 200, **headers: str) -> None:
    handler.send_response(status)
    for name, value in {"Content-Length": str(len(body)), "Connection": "close", **headers}.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    handler.wfile.write(body)


def honest(handler: BaseHTTPRequestHandler, asked: dict[str, Any]) -> None:
    known = {each["job_id"]: each for each in JOBS}
    jobs = [known.get(job_id, {"job_id": job_id, "state": "unknown"}) for job_id in asked["job_ids"]]
    nulls = dict.fromkeys(("origin", "stage", "result_produced", "finished_at"))
    answer = {"jobs": [nulls | {"more": {"is": "ignored"}} | job for job in jobs], "took_ms": 3}
    send(handler, json.dumps(answer).encode())


class Endpoint:
    """A real HTTP server whose reply the test chooses; remembers what it was asked."""

    def __init__(self) -> None:
        self.reply: Reply = honest
        self.requests: list[tuple[str, str | None, dict[str, Any]]] = []
        self.ended = threading.Event()
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                endpoint.requests.append((self.path, self.headers["Authorization"], asked))
                try:
                    endpoint.reply(self, asked)
                except OSError:
                    self.close_connection = True  # the client hung up

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/jobs"

    @contextmanager
    def serving(self) -> Iterator[Self]:
        thread = threading.Thread(target=self.server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield self
        finally:
            self.ended.set()
            self.server.shutdown()
            thread.join()
            self.server.server_close()


def body(content: bytes, status: int = 200, **headers: str) -> Reply:
    return lambda handler, _: send(handler, content, status, **headers)


def rows(*rows: dict[str, Any]) -> Reply:
    return body(json.dumps({"jobs": rows}).encode())


def settings(**chosen: Any) -> Settings:
    secret = {"job_source_url", "job_source_token", "job_source_finished_url"}
    values: dict[str, Any] = {name: SecretStr(value) if name in secret else value for name, value in chosen.items()}
    return Settings.model_construct(None, **values)
