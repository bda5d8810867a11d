"""`publish`: put events on their queues by hand."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from kino_refunds.cli import log
from kino_refunds.cli.options import AsJson, ByInTheLog
from kino_refunds.cli.output import print_error, print_json, say
from kino_refunds.errors import DependencyAway, MalformedMessage

ERRORS_SHOWN = 10


def publish(
    file: Annotated[
        typer.FileBinaryRead,
        typer.Argument(help="JSON lines, one CloudEvent each; - reads standard input.", metavar="FILE|-"),
    ],
    by: ByInTheLog,  # noqa: ARG001 - reading it puts it into the command's line in the log
    as_json: AsJson = False,
) -> int:
    """Publish events from a file of JSON lines.

    All lines are checked first; if one is wrong, nothing is published. Publishing the same events again is safe: each
    refunds once.

    The person and the number of events are in the log if KINO_LOG_FORMAT is json; no table has a row for them.

    Example: kino-refunds publish events.jsonl
    """
    from kino_refunds.events.publisher import EventPublisher
    from kino_refunds.settings import load_settings

    events: list[dict[str, Any]] = []
    wrong = []
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        try:
            events.append(_read(line.strip()))
        except MalformedMessage as error:
            wrong.append(f"line {number}: {error.code}: {error.text}")
    if wrong:
        for text in wrong[:ERRORS_SHOWN]:
            print_error(text)
        rest = f" (and {len(wrong) - ERRORS_SHOWN} more)" if len(wrong) > ERRORS_SHOWN else ""
        which = (
            "1 line is wrong; correct it" if len(wrong) == 1 else f"{len(wrong)} lines are wrong{rest}; correct them"
        )
        print_error(f"nothing was published: {which} and run this again")
        return 2
    try:
        with EventPublisher(load_settings().require_redis_url()) as publisher:
            count = publisher.publish_many(events)
    except DependencyAway as error:
        advice = "see `kino-refunds doctor`; some events may be published: publish all of them again"
        raise DependencyAway(f"{error}; {advice}") from error
    log.note(published=count)
    if as_json:
        print_json({"published": count})
    else:
        say(f"published {count:,} event{'' if count == 1 else 's'}")
    return 0


def _read(line: bytes) -> dict[str, Any]:
    """Check a line as a worker would, and return it whole: unknown fields and `message` travel along."""
    from kino_refunds.events.envelope import MalformedReason, parse
    from kino_refunds.events.publisher import to_wire

    parse(line)
    event: dict[str, Any] = json.loads(line)
    if "specversion" not in event:
        raise MalformedMessage(MalformedReason.BAD_ENVELOPE, "a file holds bare CloudEvents, not envelopes")
    to_wire(event)  # the envelope can make an event too large, and NaN is not JSON
    return event
