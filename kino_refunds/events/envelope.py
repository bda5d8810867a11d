"""Parse the bytes on a queue: return an event, or raise the one error that makes the bytes a dead letter.

Two wire forms are first class: the bare CloudEvent, and kombu's envelope around it (base64 body). This rule decides
which it is: **an envelope is a JSON object with `body`, `properties` and `content-type` and without `specversion`**.
All else is read as a bare event, whatever fields it has. One envelope is opened, never a second one inside it.

In either form one message may hold several events: see `split`. `parse` reads one event.

What JSON leaves open is decided here, in the same way for both forms. If a key is given twice the last value counts, as
in nearly every parser. NaN and Infinity are accepted in a field that is ignored anyway. Lone surrogates, a byte order
mark, integers of more than 4,300 digits and nesting beyond the parser's limit (about 200) are refused.
"""

import base64
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from hashlib import sha256
from typing import Any, Final

from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails, from_json

from kino_refunds.errors import MalformedMessage
from kino_refunds.events.schema import ID_LENGTH_MAX, QUEUES, Event, stored_ids

# An event has about 400 bytes. The cap bounds the memory of a claim, and Postgres stores such a letter easily.
MESSAGE_BYTES_MAX: Final = 256 * 1024
# Events in one message. A larger array comes from another program, or is a mistake: a person looks at it.
ELEMENTS_MAX: Final = 100

_SHOWN_LENGTH_MAX: Final = 64  # characters of a wrong value: enough to recognise it, too few to leak a payload
_SHOWN_ERRORS_MAX: Final = 3
# Jobs that one dead letter names. A letter that names more is marked as one that may hold others.
_NAMED_MAX: Final = 1_000
_DEPTH_MAX: Final = 4  # levels of JSON inside JSON


class MalformedReason(StrEnum):
    """Why a message cannot be understood. The words are stored with dead letters, so a word here never changes."""

    TOO_LARGE = "too_large"  # more than 256 KiB on the wire
    BAD_ENCODING = "bad_encoding"  # not UTF-8, or an envelope that declares another encoding
    BAD_JSON = "bad_json"
    BAD_ENVELOPE = "bad_envelope"  # kombu's fields, with types that kombu never writes
    WRONG_CONTENT_TYPE = "wrong_content_type"
    COMPRESSED = "compressed"  # never inflated: a small message may become a huge one
    BAD_BASE64 = "bad_base64"
    UNKNOWN_VERSION = "unknown_version"  # a specversion other than 1.0
    UNKNOWN_TYPE = "unknown_type"
    INVALID_EVENT = "invalid_event"  # a field is missing or has a wrong value


_EVENT: Final[TypeAdapter[Event]] = TypeAdapter(Event)
_CONTENT_TYPES: Final = frozenset(
    {"application/json", "application/cloudevents+json", "application/cloudevents-batch+json"}
)
# kombu writes `binary` if a publisher gives it bytes. The word says nothing about them, so they are read as UTF-8.
_ENCODINGS: Final = frozenset({"utf-8", "utf8", "binary"})
_BYTE_ORDER_MARK: Final = b"\xef\xbb\xbf"
_KOMBU_BEGINS: Final = b'{"body":'
_KOMBU_BODY: Final = re.compile(rb'\{"body":\s*"((?:[A-Za-z0-9+/]{4})+)')
_DELIVERY_TAG: Final = re.compile(rb'"delivery_tag"\s*:\s*"(?:[^"\\]|\\.)*"')
# The headers of an event in binary mode, as the bindings for HTTP, Kafka and AMQP write them.
_BINARY_MODE: Final = re.compile(r"(?:ce[-_]|cloudevents[:_])([a-z0-9]+)", re.IGNORECASE)
_JOB_NAMES: Final = ("job_id", "subject")


@dataclass(frozen=True, slots=True)
class Element:
    """One event of a message that holds several: its index, and its content as a bare message."""

    index: int
    content: bytes


@dataclass(frozen=True, slots=True)
class Description:
    """What can be read from a message that is not an event: its ids, and whether it may hold other jobs' ends.

    `may_hold_others`: the message may hold the end of a job that is not named here. That is so if it could not be read
    completely, or names no job, more than one job, or a job by a value that is not an id.
    """

    source: str | None
    event_id: str | None
    job_id: str | None
    other_job_ids: tuple[str, ...]
    may_hold_others: bool


def parse(raw: bytes) -> Event:
    """Return the event in a message of either form; raises MalformedMessage, and no other error, whatever the bytes."""
    if len(raw) > MESSAGE_BYTES_MAX:
        raise MalformedMessage(
            MalformedReason.TOO_LARGE, f"{len(raw):,} bytes are more than the {MESSAGE_BYTES_MAX:,} allowed"
        )
    if not raw.startswith(_KOMBU_BEGINS):  # a guess that can cost only time: the rule below decides
        try:
            return _EVENT.validate_json(raw)
        except ValidationError:
            pass
    document = _load(raw)
    if not _is_envelope(document):
        return _read(raw)
    try:
        return _read(_open(document))
    except MalformedMessage as error:
        malformed = _foreign(document, error)
    raise malformed


def parse_stored(raw: bytes) -> Event:
    """Return an event that we stored, with its ids by the rule for stored ids; never used for a message on a queue."""
    with stored_ids():
        return parse(raw)


def split(raw: bytes) -> list[Element] | None:
    """Return the events of a message that holds several; None if it holds one event, or cannot be read.

    Several events are a JSON array of 1 to 100 objects, of which at least one says that it is a CloudEvent
    (`specversion`). An object in it that does not is one bad event, and blocks none of the others. Any other array,
    such as the body of a Celery task, is one message that cannot be understood.
    """
    if len(raw) > MESSAGE_BYTES_MAX:
        return None
    try:
        document = _load(raw)
        if _is_envelope(document):
            document = _load(_open(document))
    except MalformedMessage:
        return None
    if not _is_batch(document):
        return None
    return [Element(index, json.dumps(element).encode()) for index, element in enumerate(document)]


def contents(raw: bytes) -> list[bytes]:
    """Return each event of a message as a bare message, also the events that cannot be read."""
    elements = split(raw)
    return [raw] if elements is None else [element.content for element in elements]


def message_key(raw: bytes, index: int | None = None) -> bytes:
    """Return the digest of a message, or of its element at `index`: the same message sent again has the same key.

    The delivery tag is left out, because kombu writes a new one each time. Everything else counts: two tasks of Celery
    can have the same body, and of two messages with one key only one would be kept.
    """
    digest = sha256(_DELIVERY_TAG.sub(b"", raw))
    if index is not None:
        digest.update(f"\0{index}".encode())
    return digest.digest()


def opened(raw: bytes) -> bytes | None:
    """Return the body of kombu's envelope, decoded as far as possible; None if the message is no such envelope."""
    document = _load_or_none(raw)
    try:
        return base64.b64decode(document["body"]) if _is_envelope(document) else None
    except (TypeError, ValueError):
        return None


def describe(raw: bytes) -> Description:
    """Return what a message that cannot be understood seems to be about, for people and for the overdue sweep.

    A best effort: a message that does not load as JSON is searched as text, JSON inside strings is read as well, and
    only the first 256 KiB are read. A job that is named here is not refunded as timed out while its letter is open.
    """
    content, headers = _in_utf_8(raw[:MESSAGE_BYTES_MAX]), dict[str, Any]()
    document = _load_or_none(content)
    if _is_envelope(document):
        headers = _binary_mode(document)
        content = opened(raw) or b""
        document = _load_or_none(content)
    elif cut_off := _KOMBU_BODY.match(content) if document is None else None:
        content = base64.b64decode(cut_off[1])
    if isinstance(document, list):
        jobs, _ = _jobs([*_values(document, _JOB_NAMES), *_named_within(document)])
        return Description(None, None, None, jobs, may_hold_others=True)
    if not isinstance(document, dict):
        text, within = content.decode("utf-8", "replace"), list(_named_within(document))
        found = [*_search(text, "job_id"), headers.get("subject"), *_search(text, "subject")]
        source, event_id = ([headers.get(name), *_search(text, name)] for name in ("source", "id"))
        readable = False
    else:
        (data, readable), within = _data(document), list(_named_within(document))
        first = data.get("job_id") if isinstance(data, dict) else None
        found = [first, headers.get("subject"), document.get("subject"), *_values([document, data], _JOB_NAMES)]
        source, event_id = ([headers.get(name), document.get(name)] for name in ("source", "id"))
    # A message that names a job only inside a string is no event of a known kind: it may hold any job's end.
    readable = readable and any(value is not None for value in found)
    jobs, sure = _jobs([*found, *within])
    return Description(
        _first_id(source),
        _first_id(event_id),
        jobs[0] if jobs else None,
        jobs[1:],
        may_hold_others=not (readable and sure and len(jobs) == 1),
    )


def _read(body: bytes) -> Event:
    """Return the event in a CloudEvent in JSON, whose data is JSON or base64; raises MalformedMessage."""
    problem: ValidationError | None = None
    try:
        return _EVENT.validate_json(body)
    except ValidationError as error:
        problem = error
    document = _load(body)
    if isinstance(document, dict) and "data_base64" in document and "data" not in document:
        document["data"] = _decoded(document.pop("data_base64"))
        try:
            return _EVENT.validate_json(json.dumps(document))
        except ValidationError as error:
            problem = error
    malformed = _explain(problem, document)
    raise malformed  # outside the except block, so that its traceback does not hold the payload


def _decoded(text: object) -> Any:
    """Return the JSON in CloudEvents' `data_base64`, which a publisher writes that treats its data as bytes."""
    if not isinstance(text, str):
        found = f"data_base64: Input should be a valid string, not {_show(text)}"
        raise MalformedMessage(MalformedReason.INVALID_EVENT, found, cause="data_base64")
    try:
        content = base64.b64decode(text, validate=True)
    except ValueError:
        content = None
    if content is None:
        found = f"data_base64 ({len(text):,} characters) is not base64"
        raise MalformedMessage(MalformedReason.BAD_BASE64, found, cause="data_base64")
    if (data := _load_or_none(content)) is None:
        found = f"data_base64 ({len(content):,} bytes) does not hold JSON"
        raise MalformedMessage(MalformedReason.INVALID_EVENT, found, cause="data_base64")
    return data


def _load(raw: bytes) -> Any:
    try:
        return from_json(raw)
    except (ValueError, RecursionError) as error:
        problem = str(error)  # jiter's text says what is wrong and where, and quotes nothing
    try:
        raw.decode()
    except UnicodeDecodeError as error:
        problem = f"not UTF-8 from byte {error.start} on"
        raise MalformedMessage(MalformedReason.BAD_ENCODING, problem) from None
    if raw.startswith(_BYTE_ORDER_MARK):
        problem = "it begins with a byte order mark, which JSON does not allow: send it without"
        raise MalformedMessage(MalformedReason.BAD_JSON, problem, cause="byte order mark")
    raise MalformedMessage(MalformedReason.BAD_JSON, problem)


def _load_or_none(raw: bytes) -> Any:
    try:
        return _load(raw)
    except MalformedMessage:
        return None


def _is_envelope(document: object) -> bool:
    return (
        isinstance(document, dict)
        and "body" in document
        and "properties" in document
        and "content-type" in document
        and "specversion" not in document
    )


def _is_batch(document: object) -> bool:
    return (
        isinstance(document, list)
        and 1 <= len(document) <= ELEMENTS_MAX
        and all(isinstance(element, dict) for element in document)
        and any("specversion" in element for element in document)
    )


def _open(envelope: dict[str, Any]) -> bytes:
    """Return the body of kombu's envelope; raises MalformedMessage for what kombu's own JSON consumers refuse."""
    body, properties, headers = envelope["body"], envelope["properties"], envelope.get("headers") or {}
    if not isinstance(body, str) or not isinstance(properties, dict) or not isinstance(headers, dict):
        raise MalformedMessage(
            MalformedReason.BAD_ENVELOPE,
            "body should be a string, properties and headers should be objects",
            cause="body, properties, headers",
        )
    if compression := headers.get("compression"):
        found = f"headers.compression is {_show(compression)}"
        raise MalformedMessage(MalformedReason.COMPRESSED, found, cause=_show(compression))
    content_type = envelope["content-type"]
    # First compared with what kombu itself writes, because the general comparison costs 0.3 us.
    if content_type != "application/json" and _plain(content_type).removesuffix(";charset=utf-8") not in _CONTENT_TYPES:
        found = f"content-type is {_show(content_type)}, not JSON"
        raise MalformedMessage(MalformedReason.WRONG_CONTENT_TYPE, found, cause=_show(content_type))
    encoding = envelope.get("content-encoding")
    if encoding != "utf-8" and _plain(encoding) not in _ENCODINGS:
        found = f"content-encoding is {_show(encoding)}, not utf-8"
        raise MalformedMessage(MalformedReason.BAD_ENCODING, found, cause=_show(encoding))
    body_encoding = properties.get("body_encoding")
    if body_encoding != "base64":
        found = f"properties.body_encoding is {_show(body_encoding)}, not base64"
        raise MalformedMessage(MalformedReason.BAD_ENVELOPE, found, cause="properties.body_encoding")
    try:
        return base64.b64decode(body, validate=True)
    except ValueError:
        problem = f"body ({len(body):,} characters) is not base64"
    raise MalformedMessage(MalformedReason.BAD_BASE64, problem, cause="body")


def _foreign(envelope: dict[str, Any], error: MalformedMessage) -> MalformedMessage:
    """Return the error for a message that is not an event; if its headers say what it is, the error's text says so."""
    if _binary_mode(envelope):
        return MalformedMessage(
            MalformedReason.INVALID_EVENT,
            "a CloudEvent in binary mode, whose attributes are headers of the message: publish it in structured mode",
            cause="binary mode",
        )
    headers = envelope.get("headers")
    task = headers.get("task") if isinstance(headers, dict) else None
    return _task(task, error) if isinstance(task, str) else error


def _task(name: str, error: MalformedMessage) -> MalformedMessage:
    return MalformedMessage(error.code, f"a task of Celery, {_show(name)}: {error.text}", cause=f"task {_show(name)}")


def _binary_mode(envelope: dict[str, Any]) -> dict[str, Any]:
    """Return the CloudEvents attributes in the headers, by their names; empty unless the headers are an event's."""
    headers = envelope.get("headers")
    if not isinstance(headers, dict):
        return {}
    matches = [(_BINARY_MODE.fullmatch(name), value) for name, value in headers.items()]
    found = {match[1].lower(): value for match, value in matches if match is not None}
    return found if found.keys() & {"id", "source", "type"} else {}


def _plain(value: object) -> str:
    return value.replace(" ", "").lower() if isinstance(value, str) else ""


def _explain(error: ValidationError, document: object) -> MalformedMessage:
    """Return the error that says why a document is not an event: its version first, then its type, then its fields."""
    if isinstance(document, list):
        size = f"an array of {len(document):,}"
        found = f"{size} events, where one is expected" if _is_batch(document) else f"{size}, not of CloudEvents"
        if len(document) > ELEMENTS_MAX:
            found = f"{size}, more than the {ELEMENTS_MAX} events that one message may hold"
        return MalformedMessage(MalformedReason.INVALID_EVENT, found, cause="array")
    if not isinstance(document, dict):
        found = f"an event is a JSON object, not {_show(document)}"
        return MalformedMessage(MalformedReason.INVALID_EVENT, found, cause="no object")
    version = document.get("specversion", "1.0")
    if version != "1.0":
        found = f"specversion is {_show(version)}, not '1.0'"
        return MalformedMessage(MalformedReason.UNKNOWN_VERSION, found, cause=_show(version))
    kind = document.get("type")
    if isinstance(kind, str) and kind not in QUEUES:
        return MalformedMessage(MalformedReason.UNKNOWN_TYPE, f"type is {_show(kind)}", cause=_show(kind))
    if not isinstance(kind, str):
        no_type = MalformedMessage(MalformedReason.INVALID_EVENT, "type: Field required, a string", cause="type")
        # In Celery's older protocol the name of the task is in the body.
        task = document.get("task")
        return _task(task, no_type) if isinstance(task, str) and "args" in document else no_type
    errors = error.errors()
    return MalformedMessage(MalformedReason.INVALID_EVENT, "; ".join(_sentences(errors)), cause=_cause(errors))


def _cause(errors: list[ErrorDetails]) -> str:
    """Return the paths of the wrong fields, never their values: letters are grouped by this."""
    return ", ".join(dict.fromkeys(_path(error) or error["type"] for error in errors))


def _path(error: ErrorDetails) -> str:
    return ".".join(str(part) for part in error["loc"][1:])  # without the first part, which is the type


def _sentences(errors: list[ErrorDetails]) -> Iterator[str]:
    for error in errors[:_SHOWN_ERRORS_MAX]:
        where = _path(error)
        got = "" if error["type"] in {"missing", "subject"} else f", not {_show(error['input'])}"
        yield f"{where}: {error['msg']}{got}" if where else f"{error['msg']}{got}"
    if len(errors) > _SHOWN_ERRORS_MAX:
        yield f"and {len(errors) - _SHOWN_ERRORS_MAX} more"


def _show(value: object) -> str:
    """Return a short value quoted, with everything unprintable escaped; for a long value only say what it is."""
    match value:
        case dict():
            return "an object"
        case list():
            return "an array"
        case str() if len(value) > _SHOWN_LENGTH_MAX:
            return f"a string of {len(value):,} characters"
        case int() if value.bit_length() > _SHOWN_LENGTH_MAX:
            return "a long number"
        case None | bool():
            return json.dumps(value)
        case _:
            return ascii(value)


def _search(text: str, name: str) -> list[str]:
    """Return the strings under this name in JSON that is cut off or broken, in JSON inside it, or in a Python repr."""
    quoted = re.compile(rf"""(["']){name}\1\s*:\s*(?:"((?:[^"\\\ufffd]|\\.)+)"|'((?:[^'\\\ufffd]|\\.)+)')""")
    found = quoted.findall(text)
    if f'\\"{name}\\"' in text:  # JSON in a string of JSON
        found += quoted.findall(text.replace('\\"', '"'))
    return [_unescaped(double or single) for _, double, single in found]


def _unescaped(text: str) -> str:
    """Return the text with its JSON escapes read; unchanged if they cannot be read."""
    try:
        return str(json.loads(f'"{text}"'))
    except ValueError:
        return text


def _in_utf_8(content: bytes) -> bytes:
    """Return text of another Unicode encoding (by its first bytes, as in `json`) in UTF-8; all else unchanged."""
    encoding = json.detect_encoding(content)
    return content if encoding == "utf-8" else content.decode(encoding, "replace").encode(errors="replace")


def _named_within(document: object, depth: int = _DEPTH_MAX) -> Iterator[object]:
    """Yield the values that name a job in JSON inside strings, plain or in base64; also in envelopes in envelopes."""
    for text in _strings(document):
        content = text.encode(errors="replace") if text.lstrip()[:1] in {"{", "[", '"'} else _base64(text)
        inner = _load_or_none(content)
        if isinstance(inner, dict | list | str):
            yield from _values(inner, _JOB_NAMES)
            if depth > 1:
                yield from _named_within(inner, depth - 1)
        elif content.lstrip()[:1] in {b"{", b"["}:
            yield from (each for name in _JOB_NAMES for each in _search(content.decode(errors="replace"), name))


def _strings(value: object) -> Iterator[str]:
    match value:
        case str():
            yield value
        case dict():
            for inner in value.values():
                yield from _strings(inner)
        case list():
            for inner in value:
                yield from _strings(inner)
        case _:
            pass


def _base64(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except ValueError:
        return b""


def _values(value: object, names: tuple[str, ...]) -> Iterator[object]:
    """Yield the values under these names, at any depth."""
    match value:
        case dict():
            for name, inner in value.items():
                if name in names:
                    yield inner
                yield from _values(inner, names)
        case list():
            for inner in value:
                yield from _values(inner, names)
        case _:
            pass


def _data(document: dict[str, Any]) -> tuple[object, bool]:
    """Return an event's data, and whether all of it can be read."""
    if "data" in document or "data_base64" not in document:
        data = document.get("data")
        return data, data is None or isinstance(data, dict)
    try:
        data = _decoded(document["data_base64"])
    except MalformedMessage:
        return None, False
    return data, isinstance(data, dict)


def _jobs(found: Iterable[object]) -> tuple[tuple[str, ...], bool]:
    """Return the ids among these, each once, and whether all of them are ids.

    White space at the ends of an id may belong to a charge from before it was refused, or be a mistake: then both ids
    are returned.
    """
    jobs, sure = dict[str, None](), True
    for value in found:
        if isinstance(value, str):
            jobs.update(dict.fromkeys(each for each in (value, value.strip()) if _is_id(each)))
            sure = sure and _is_id(value) and value == value.strip()
        else:
            sure = sure and value is None
    return tuple(jobs)[:_NAMED_MAX], sure and len(jobs) <= _NAMED_MAX


def _first_id(candidates: Iterable[object]) -> str | None:
    return next((value for value in candidates if isinstance(value, str) and _is_id(value)), None)


def _is_id(value: str) -> bool:
    return 0 < len(value) <= ID_LENGTH_MAX and value.isprintable()
