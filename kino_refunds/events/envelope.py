"""From the bytes on a queue to an event, or to the one error that makes them a dead letter.

Two forms are first class: the bare CloudEvent, and kombu's envelope around it (base64 body). The rule that
tells them apart: **an envelope is a JSON object with `body`, `properties` and `content-type` and without
`specversion`**; all else is read as a bare event, whatever fields it has. One envelope is opened, never two.

What JSON leaves open is decided here, alike for both forms: of a key given twice the last value counts, as
in nearly every parser; NaN and Infinity pass where a field is ignored anyway; lone surrogates, a byte order
mark, integers beyond 4,300 digits and nesting beyond the parser's limit (about 200) do not.
"""

import base64
import json
import re
from collections.abc import Iterable, Iterator
from enum import StrEnum
from hashlib import sha256
from typing import Any, Final, TypeAlias

from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails, from_json

from kino_refunds.errors import MalformedMessage
from kino_refunds.events.schema import ID_LENGTH_MAX, QUEUES, Event

# An event is about 400 bytes. The cap bounds a claim's memory, and Postgres stores this much without effort.
MESSAGE_BYTES_MAX: Final = 256 * 1024

_SHOWN_LENGTH_MAX: Final = 64  # of an offending value: enough to recognise it, too little to leak a payload
_SHOWN_ERRORS_MAX: Final = 3

Ids: TypeAlias = tuple[str | None, str | None, str | None]


class MalformedReason(StrEnum):
    """Why a message cannot be understood; stored with dead letters, so a name here never changes."""

    TOO_LARGE = "too_large"  # more than 256 KiB on the wire
    BAD_ENCODING = "bad_encoding"  # not UTF-8, or an envelope that declares another encoding
    BAD_JSON = "bad_json"
    BAD_ENVELOPE = "bad_envelope"  # kombu's fields, of types that kombu never writes
    WRONG_CONTENT_TYPE = "wrong_content_type"
    COMPRESSED = "compressed"  # never inflated: a small message may become a huge one
    BAD_BASE64 = "bad_base64"
    UNKNOWN_VERSION = "unknown_version"  # a specversion other than 1.0
    UNKNOWN_TYPE = "unknown_type"
    INVALID_EVENT = "invalid_event"  # a field is missing or has a value that it cannot have


_EVENT: Final[TypeAdapter[Event]] = TypeAdapter(Event)
_CONTENT_TYPES: Final = frozenset({"application/json", "application/cloudevents+json"})
_ENCODINGS: Final = frozenset({"utf-8", "utf8"})
_KOMBU_BEGINS: Final = b'{"body":'
_KOMBU_BODY: Final = re.compile(rb'\{"body":\s*"((?:[A-Za-z0-9+/]{4})+)')


def parse(raw: bytes) -> Event:
    """Read a message of either form; whatever the bytes are, MalformedMessage is the only error."""
    if len(raw) > MESSAGE_BYTES_MAX:
        raise MalformedMessage(
            MalformedReason.TOO_LARGE, f"{len(raw):,} bytes are more than the {MESSAGE_BYTES_MAX:,} allowed"
        )
    if not raw.startswith(_KOMBU_BEGINS):  # a guess that costs only time: the rule below decides
        try:
            return _EVENT.validate_json(raw)
        except ValidationError:
            pass
    document = _load(raw)
    body = _open(document) if _is_envelope(document) else raw
    try:
        return _EVENT.validate_json(body)
    except ValidationError as error:
        malformed = _explain(error, body)
    raise malformed  # outside the except: its traceback must not carry the payload along


def message_key(raw: bytes) -> bytes:
    """Digest a message so that the same content sent again has the same key.

    Kombu gives every sending a new delivery tag: the key of an envelope is that of its body, and one that
    cannot be opened is digested without what delivery adds. Any other bytes are digested as they are.
    """
    if len(raw) > MESSAGE_BYTES_MAX:
        return sha256(raw).digest()
    try:
        document = _load(raw)
    except MalformedMessage:
        return sha256(raw).digest()
    if not _is_envelope(document):
        return sha256(raw).digest()
    try:
        return sha256(_open(document)).digest()
    except MalformedMessage:
        if isinstance(properties := document["properties"], dict):
            for name in ("delivery_tag", "delivery_info"):
                properties.pop(name, None)
        return sha256(json.dumps(document, sort_keys=True).encode()).digest()


def describe(raw: bytes) -> Ids:
    """Find (source, event id, job id) in a malformed message, for the people who must act on it.

    A best effort: what does not load as JSON is searched as text, and only the first 256 KiB are looked at.
    """
    content = raw[:MESSAGE_BYTES_MAX]
    document = _load_or_none(content)
    if _is_envelope(document):
        try:
            content = base64.b64decode(document["body"])
        except (TypeError, ValueError):
            return None, None, None
        document = _load_or_none(content)
    elif cut_off := _KOMBU_BODY.match(content) if document is None else None:
        content = base64.b64decode(cut_off[1])
    if not isinstance(document, dict):
        text = content.decode("utf-8", "replace")
        return _search(text, "source"), _search(text, "id"), _search(text, "job_id", "subject")
    data = document.get("data")
    job_ids = (data.get("job_id") if isinstance(data, dict) else None, document.get("subject"))
    return _first_id([document.get("source")]), _first_id([document.get("id")]), _first_id(job_ids)


def _load(raw: bytes) -> Any:
    try:
        return from_json(raw)
    except (ValueError, RecursionError) as error:
        problem = str(error)  # jiter says what and where, and quotes nothing
    try:
        raw.decode()
    except UnicodeDecodeError as error:
        problem = f"not UTF-8 from byte {error.start} on"
        raise MalformedMessage(MalformedReason.BAD_ENCODING, problem) from None
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


def _open(envelope: dict[str, Any]) -> bytes:
    """Take the body out of kombu's envelope, refusing what kombu's own JSON consumers would."""
    body, properties, headers = envelope["body"], envelope["properties"], envelope.get("headers") or {}
    if not isinstance(body, str) or not isinstance(properties, dict) or not isinstance(headers, dict):
        raise MalformedMessage(
            MalformedReason.BAD_ENVELOPE,
            "body should be a string, properties and headers should be objects",
        )
    if headers.get("compression"):
        raise MalformedMessage(MalformedReason.COMPRESSED, f"headers.compression is {_show(headers['compression'])}")
    content_type = envelope["content-type"]
    if _plain(content_type).removesuffix(";charset=utf-8") not in _CONTENT_TYPES:
        raise MalformedMessage(MalformedReason.WRONG_CONTENT_TYPE, f"content-type is {_show(content_type)}, not JSON")
    encoding = envelope.get("content-encoding")
    if _plain(encoding) not in _ENCODINGS:
        raise MalformedMessage(MalformedReason.BAD_ENCODING, f"content-encoding is {_show(encoding)}, not utf-8")
    body_encoding = properties.get("body_encoding")
    if body_encoding != "base64":
        raise MalformedMessage(
            MalformedReason.BAD_ENVELOPE, f"properties.body_encoding is {_show(body_encoding)}, not base64"
        )
    try:
        return base64.b64decode(body, validate=True)
    except ValueError:
        problem = f"body ({len(body):,} characters) is not base64"
    raise MalformedMessage(MalformedReason.BAD_BASE64, problem)


def _plain(value: object) -> str:
    return value.replace(" ", "").lower() if isinstance(value, str) else ""


def _explain(error: ValidationError, body: bytes) -> MalformedMessage:
    """Say why a body is no event: its JSON first, then its version, its type, and its fields."""
    try:
        document = _load(body)
    except MalformedMessage as malformed:
        return malformed
    if not isinstance(document, dict):
        return MalformedMessage(MalformedReason.INVALID_EVENT, f"an event is a JSON object, not {_show(document)}")
    version = document.get("specversion", "1.0")
    if version != "1.0":
        return MalformedMessage(MalformedReason.UNKNOWN_VERSION, f"specversion is {_show(version)}, not '1.0'")
    kind = document.get("type")
    if isinstance(kind, str) and kind not in QUEUES:
        return MalformedMessage(MalformedReason.UNKNOWN_TYPE, f"type is {_show(kind)}")
    if not isinstance(kind, str):
        return MalformedMessage(MalformedReason.INVALID_EVENT, "type: Field required, a string")
    return MalformedMessage(MalformedReason.INVALID_EVENT, "; ".join(_sentences(error.errors())))


def _sentences(errors: list[ErrorDetails]) -> Iterator[str]:
    for error in errors[:_SHOWN_ERRORS_MAX]:
        where = ".".join(str(part) for part in error["loc"][1:])  # the first part is the type
        got = "" if error["type"] in {"missing", "subject"} else f", not {_show(error['input'])}"
        yield f"{where}: {error['msg']}{got}" if where else f"{error['msg']}{got}"
    if len(errors) > _SHOWN_ERRORS_MAX:
        yield f"and {len(errors) - _SHOWN_ERRORS_MAX} more"


def _show(value: object) -> str:
    """Quote a short value with everything unprintable escaped; of a long one say only what it is."""
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


def _search(text: str, *names: str) -> str | None:
    """Find a string under one of these names in JSON that is cut off or broken, or in a Python repr."""
    return _first_id(
        found for name in names for found in re.findall(rf"""["']{name}["']\s*:\s*["']([^"'\\\ufffd]+)["']""", text)
    )


def _first_id(candidates: Iterable[object]) -> str | None:
    for value in candidates:
        if isinstance(value, str) and 0 < len(value) <= ID_LENGTH_MAX and value.isprintable():
            return value
    return None
