"""The only reader of Redis URLs. It loads no Redis library, so that settings load fast."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import partial
from types import MappingProxyType
from typing import Any, Final
from urllib.parse import parse_qsl, unquote, urlsplit

from kino_refunds.errors import BadSettings

# With more than this, a worker could wait for a dead connection for longer than its alive TTL.
TIMEOUT_MIN_S, TIMEOUT_MAX_S = 0.1, 30.0
EXAMPLE: Final = "redis://HOST:6379/0"


@dataclass(frozen=True, slots=True)
class RedisUrl:
    """The parts of a Redis URL: address, user and options; the same for redis-py, kombu and Celery."""

    host: str
    port: int
    db: int
    username: str | None
    password: str | None = field(repr=False)
    tls: Mapping[str, Any] | None = field(repr=False)
    """redis-py's `ssl_*` arguments; None for a plain connection."""
    options: Mapping[str, Any]
    """The options that the URL sets (`socket_timeout`, `client_name` and others), by redis-py's names."""


def read_url(url: str, *, name: str = "KINO_REDIS_URL") -> RedisUrl:
    """Return the parts of a Redis URL; raises BadSettings, which names the setting and each wrong option, but no value.

    No value, and nothing that may be a part of a password, is in the text of an error.
    """
    _refuse_other_schemes(url.partition("://")[0].lower(), name)
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
        given = parse_qsl(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query))
    except ValueError:
        raise _unreadable(name) from None
    # The rest of a password that has a raw `/`, `?` or `#` in it.
    if "@" in parts.path + parts.query or parts.fragment or port == 0:
        raise _unreadable(name)
    options = _options(given, name, tls=parts.scheme == "rediss")
    path = unquote(parts.path).removeprefix("/")
    try:
        db = _OPTIONS["db"](path or "0")
    except ValueError as error:
        raise _refused(name, f"has a path that is not a database number: it {error}") from None
    given_twice = [
        option
        for option, elsewhere in (("db", path), ("username", parts.username), ("password", parts.password))
        if elsewhere and option in options
    ]
    if given_twice:
        raise _refused(name, f"gives its {' and '.join(given_twice)} twice: leave the option out")
    return RedisUrl(
        host=unquote(host) if host else "localhost",
        port=port or 6379,
        db=options.pop("db", db),
        username=options.pop("username", unquote(parts.username or "") or None),
        password=options.pop("password", unquote(parts.password or "") or None),
        tls=MappingProxyType(_starting_with("ssl_", options)) if parts.scheme == "rediss" else None,
        options=MappingProxyType({key: value for key, value in options.items() if not key.startswith("ssl_")}),
    )


def _refuse_other_schemes(scheme: str, name: str) -> None:
    if scheme in {"redis", "rediss"}:
        return
    if "sentinel" in scheme:
        raise _refused(name, "is a Sentinel URL, which is not supported yet: give one address that follows the primary")
    if "cluster" in scheme:
        raise _refused(name, "is a Redis Cluster URL: the scripts span keys, so use one primary with replicas")
    if scheme in {"valkey", "valkeys"}:
        raise _refused(name, f"begins with {scheme}://: write {scheme.replace('valkey', 'redis')}://")
    if scheme in {"unix", "redis+socket", "redis+unix", "socket"}:
        raise _refused(name, "is a Unix socket; connect by redis:// or rediss://")
    raise _unreadable(name)


def _unreadable(name: str) -> BadSettings:
    return _refused(name, "cannot be read: look at its options, and write special characters of a password as %XX")


def _refused(name: str, why: str) -> BadSettings:
    return BadSettings(f"{name} {why}; for example {EXAMPLE}")


def _whole(text: str, low: int, high: int) -> int:
    if not re.fullmatch("[0-9]{1,10}", text) or not low <= int(text) <= high:
        raise ValueError(f"must be a whole number from {low} to {high}")
    return int(text)


def _timeout(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not TIMEOUT_MIN_S <= value <= TIMEOUT_MAX_S:
        raise ValueError(f"must be {TIMEOUT_MIN_S:g} to {TIMEOUT_MAX_S:g} seconds")
    return value


def _switch(text: str) -> bool:
    words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    if text.lower() not in words:
        raise ValueError("must be true or false")
    return words[text.lower()]


def _text(text: str) -> str:
    if not text:
        raise ValueError("has no value")
    return text


def _client_name(text: str) -> str:
    if not text or not all("!" <= c <= "~" for c in text):
        raise ValueError("must be printable ASCII without blanks")
    return text


def _one_of(choices: Mapping[str, Any], text: str) -> Any:
    if text not in choices:
        raise ValueError(f"must be {' or '.join(choices)}")
    return choices[text]


_OPTIONS: Final[Mapping[str, Callable[[str], Any]]] = {
    "db": partial(_whole, low=0, high=2**31 - 1),
    "username": _text,
    "password": _text,
    "client_name": _client_name,
    "protocol": partial(_one_of, {"2": 2, "3": 3}),
    "socket_timeout": _timeout,
    "socket_connect_timeout": _timeout,
    "socket_keepalive": _switch,
    "health_check_interval": partial(_whole, low=0, high=3600),
}
_TLS_OPTIONS: Final[Mapping[str, Callable[[str], Any]]] = {
    "ssl_ca_certs": _text,
    "ssl_ca_path": _text,
    "ssl_certfile": _text,
    "ssl_keyfile": _text,
    "ssl_password": _text,
    "ssl_check_hostname": _switch,
    "ssl_cert_reqs": partial(
        _one_of,
        {word: word for word in ("required", "optional", "none")}
        | {f"CERT_{word.upper()}": word for word in ("required", "optional", "none")},
    ),
    # As redis-py: the numbers of Python's ssl.TLSVersion.
    "ssl_min_version": partial(_one_of, {"771": 771, "772": 772}),
    "ssl_ciphers": _text,
}
_WHY_NOT: Final = (
    (r"max_connections|timeout|connection_class", "the program sets the size of its pools"),
    (r"retry.*", "the program repeats a command as often as is safe"),
    (r".*encoding.*|.*responses|parser_class|socket_read_size", "messages are read as bytes"),
    (r"(?i:.*sentinel.*)|master_name|service_name", "Sentinel is not supported yet"),
    (
        r"visibility_timeout|global_keyprefix|virtual_host|fanout_.*|queue_order_strategy",
        "set for Celery by this program",
    ),
    (r"ssl_.*ocsp.*", "OCSP is not supported"),
    (r"ssl_ca_data", "put it into a file and give ssl_ca_certs"),
)


def _options(given: Iterable[tuple[str, str]], name: str, *, tls: bool) -> dict[str, Any]:
    """Return the options of a URL; raises BadSettings, which names all that are wrong."""
    taken = {**_OPTIONS, **(_TLS_OPTIONS if tls else {})}
    read: dict[str, Any] = {}
    not_taken, wrong = [], []
    for option, text in given:
        if option in read:
            wrong.append(f"{option} is given twice")
        elif option in taken:
            try:
                read[option] = taken[option](text)
            except ValueError as error:
                wrong.append(f"{option} {error}")
        else:
            not_taken.append(_why_not(option))
    if not_taken:
        why = f"has options that are not supported, leave them out: {', '.join(not_taken)}"
        raise _refused(name, f"{why}; supported are {', '.join(taken)}")
    if "ssl_certfile" not in read and (alone := _starting_with("ssl_key", read) | _starting_with("ssl_password", read)):
        wrong.append(f"{' and '.join(alone)} without ssl_certfile")
    if wrong:
        raise _refused(name, f"has options with wrong values: {', '.join(wrong)}")
    return read


def _why_not(option: str) -> str:
    if not re.fullmatch(r"\w{1,40}", option, re.ASCII):
        return "one whose name is not a word"
    if option in _TLS_OPTIONS:
        return f"{option} (it needs rediss://)"
    why = next((why for pattern, why in _WHY_NOT if re.fullmatch(pattern, option)), None)
    if why is None and (near := get_close_matches(option, [*_OPTIONS, *_TLS_OPTIONS], n=1)):
        why = f"did you mean {near[0]}?"
    return f"{option} ({why})" if why else option


def _starting_with(prefix: str, options: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in options.items() if key.startswith(prefix)}
