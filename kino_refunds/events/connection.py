"""The only reader of Redis URLs, and the connections that redis-py, kombu and Celery make from them.

All three follow the primary. If the server of a connection is not a primary (any more), the connection is closed
together with the idle ones of its pool, so that the next command looks the address up again. Without this, a connection
to a primary that was demoted and runs on as a replica would answer READONLY until it is closed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import partial
from types import MappingProxyType
from typing import Any, Final
from urllib.parse import parse_qsl, quote, unquote, urlsplit

import kombu
import redis
from kombu.transport import redis as kombu_redis
from redis.backoff import ExponentialBackoff
from redis.retry import Retry

from kino_refunds.errors import BadSettings

CONNECT_TIMEOUT_S: Final = 5.0
# A claim of 1,000 messages takes Redis some 10 ms, so a silence of this length means a dead connection. A command is
# repeated once: a half-open connection costs twice this.
ANSWER_TIMEOUT_S: Final = 5.0
# kombu does not repeat commands, and its BRPOP may take 1 s of this.
KOMBU_ANSWER_TIMEOUT_S: Final = 10.0
HEALTH_CHECK_EVERY_S: Final = 25
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


def redis_client(url: str) -> redis.Redis:
    """Return a client for `url`; nothing connects before the first use. Raises BadSettings.

    The client repeats a command once if the connection breaks. This is safe, because running one of our scripts twice
    changes nothing (tokens). It keeps a batch from failing by a short interruption.
    """
    read = read_url(url)
    arguments: dict[str, Any] = {
        "socket_connect_timeout": CONNECT_TIMEOUT_S,
        "socket_timeout": ANSWER_TIMEOUT_S,
        "socket_keepalive": True,
        "health_check_interval": HEALTH_CHECK_EVERY_S,
        **read.options,
    }
    pool = _Pool(
        connection_class=_Connection if read.tls is None else _TlsConnection,
        host=read.host,
        port=read.port,
        db=read.db,
        username=read.username,
        password=read.password,
        retry=Retry(ExponentialBackoff(cap=0.5, base=0.05), retries=1),
        **arguments,
        **(read.tls or {}),
    )
    return redis.Redis.from_pool(pool)


def kombu_connection(url: str) -> kombu.Connection:
    """Return a kombu connection for `url`; nothing connects before the first use. Raises BadSettings."""
    settings = celery_settings(url)
    return kombu.Connection(
        settings["broker_url"],
        userid=settings["broker_user"],
        password=settings["broker_password"],
        transport=settings["broker_transport"],
        ssl=settings["broker_use_ssl"],
        transport_options=settings["broker_transport_options"],
    )


def celery_settings(url: str, **transport_options: Any) -> dict[str, Any]:
    """Return the `broker_*` settings with which Celery connects as `redis_client` does. Raises BadSettings.

    The broker's URL has no user, password or options: Celery logs that URL, and kombu fails with a TypeError on
    options.
    """
    read = read_url(url)
    return {
        "broker_url": f"{_TRANSPORT}://{_bracketed(read.host)}:{read.port}/{read.db}",
        "broker_user": read.username,
        "broker_password": read.password,
        "broker_transport": _TRANSPORT,
        # Without options kombu would not verify certificates. These are redis-py's names, with redis-py's defaults.
        "broker_use_ssl": False if read.tls is None else {"ssl_cert_reqs": "required", **read.tls},
        "broker_transport_options": {
            "socket_connect_timeout": CONNECT_TIMEOUT_S,
            "socket_timeout": KOMBU_ANSWER_TIMEOUT_S,
            "socket_keepalive": True,
            "health_check_interval": HEALTH_CHECK_EVERY_S,
            **read.options,
            **transport_options,
        },
    }


# What follows the primary


class NotPrimary(redis.ConnectionError):
    """The server takes no writes now: it is a replica, or is cut off from its replicas. The connection is closed."""


# READONLY: a replica. MASTERDOWN: a replica that lost its primary. NOREPLICAS: a primary that may be alone on the wrong
# side of a failover. UNBLOCKED: a BRPOP that a demotion ended. In each case the command did nothing.
_NOT_PRIMARY: Final = re.compile(r"\b(?:READONLY|MASTERDOWN|NOREPLICAS|UNBLOCKED)\b")


def _is_not_primary(error: object) -> bool:
    """Tell whether a server's error means that it is not the primary, also inside a script's or transaction's error."""
    if isinstance(error, redis.ReadOnlyError | redis.exceptions.MasterDownError):
        return True
    # redis-py removes known codes from the text; NOREPLICAS and `EXECABORT … READONLY` still contain the word.
    return isinstance(error, redis.ResponseError) and _NOT_PRIMARY.search(str(error)) is not None


class _FollowsPrimary(redis.connection.AbstractConnection):
    """Closes a connection whose server is not the primary; redis-py then repeats the command on a new connection."""

    drop_idle: Callable[[], None] = staticmethod(lambda: None)

    def connect_check_health(self, *args: Any, **kwargs: Any) -> None:
        """Connect; whatever redis-py raises because of a host name, a file or a wrong answer becomes a RedisError."""
        try:
            super().connect_check_health(*args, **kwargs)
        except redis.TimeoutError as error:
            if isinstance(self, redis.SSLConnection):
                raise redis.TimeoutError(f"{error}: does this port speak TLS, as rediss:// says?") from error
            raise
        except (redis.RedisError, OSError):
            raise
        except Exception as error:
            self.disconnect()  # type: ignore[no-untyped-call]  # of redis-py
            raise redis.ConnectionError(f"the server at this address does not answer as Redis does: {error}") from error

    def read_response(self, *args: Any, **kwargs: Any) -> Any:
        try:
            response = super().read_response(*args, **kwargs)
        except redis.ResponseError as error:
            if not _is_not_primary(error):
                raise
            refused: object = error
        except (redis.RedisError, OSError):
            raise
        except Exception as error:
            raise redis.exceptions.InvalidResponse(f"the answer is not in the Redis protocol: {error}") from error
        else:
            # The answers of a transaction: the error of a script is one of its values.
            answers = response if isinstance(response, list) else ()
            refused = next((each for each in answers if _is_not_primary(each)), None)
            if refused is None:
                return response
        self.disconnect()  # type: ignore[no-untyped-call]  # of redis-py
        self.drop_idle()
        raise NotPrimary(f"this Redis takes no writes: it is a replica, or cut off from its replicas: {refused}")


class _Connection(_FollowsPrimary, redis.Connection):
    pass


class _TlsConnection(_FollowsPrimary, redis.SSLConnection):
    pass


class _Pool(redis.ConnectionPool):
    """Lets a connection that met a demoted server close the idle ones, because they lead to the same server."""

    def make_connection(self) -> Any:
        connection: Any = super().make_connection()
        connection.drop_idle = partial(self.disconnect, inuse_connections=False)
        return connection


class _Channel(kombu_redis.Channel):  # type: ignore[misc]  # kombu has no types
    connection_class = _Connection
    connection_class_ssl = _TlsConnection
    from_transport_options = (*kombu_redis.Channel.from_transport_options, "protocol")
    protocol: int | None = None
    keyprefix_fanout: str

    def _connparams(self, asynchronous: bool = False) -> dict[str, Any]:  # noqa: FBT002 - kombu's signature
        return {**super()._connparams(asynchronous=asynchronous), "protocol": self.protocol}

    def _get_pool(self, asynchronous: bool = False) -> _Pool:  # noqa: FBT002 - kombu's signature
        parameters = self._connparams(asynchronous=asynchronous)
        self.keyprefix_fanout = self.keyprefix_fanout.format(db=parameters["db"])
        return _Pool(**parameters)


class Transport(kombu_redis.Transport):  # type: ignore[misc]  # kombu has no types
    """kombu's Redis transport, with connections that follow the primary."""

    Channel = _Channel


# What Celery shows in its log as the broker's scheme.
_TRANSPORT: Final = "kino-redis"
kombu.transport.TRANSPORT_ALIASES[_TRANSPORT] = f"{Transport.__module__}:{Transport.__qualname__}"


# What a URL may say


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


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else quote(host)
