"""How kombu and Celery connect: as `redis_client` does, so that they follow the primary too.

A module of its own: kombu takes a while to load, and a command that talks to Redis does not need it.
"""

from __future__ import annotations

from typing import Any, Final
from urllib.parse import quote

import kombu
from kombu.transport import redis as kombu_redis

from kino_refunds.events.connection import (
    CONNECT_TIMEOUT_S,
    HEALTH_CHECK_EVERY_S,
    PrimaryConnection,
    PrimaryPool,
    PrimaryTlsConnection,
)
from kino_refunds.events.redis_url import read_url

# kombu does not repeat commands, and its BRPOP may take 1 s of this.
KOMBU_ANSWER_TIMEOUT_S: Final = 10.0


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


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else quote(host)


class _Channel(kombu_redis.Channel):  # type: ignore[misc]  # kombu has no types
    connection_class = PrimaryConnection
    connection_class_ssl = PrimaryTlsConnection
    from_transport_options = (*kombu_redis.Channel.from_transport_options, "protocol")
    protocol: int | None = None
    keyprefix_fanout: str

    def _connparams(self, asynchronous: bool = False) -> dict[str, Any]:  # noqa: FBT002 - kombu's signature
        return {**super()._connparams(asynchronous=asynchronous), "protocol": self.protocol}

    def _get_pool(self, asynchronous: bool = False) -> PrimaryPool:  # noqa: FBT002 - kombu's signature
        parameters = self._connparams(asynchronous=asynchronous)
        self.keyprefix_fanout = self.keyprefix_fanout.format(db=parameters["db"])
        return PrimaryPool(**parameters)


class Transport(kombu_redis.Transport):  # type: ignore[misc]  # kombu has no types
    """kombu's Redis transport, with connections that follow the primary."""

    Channel = _Channel


# What Celery shows in its log as the broker's scheme.
_TRANSPORT: Final = "kino-redis"
kombu.transport.TRANSPORT_ALIASES[_TRANSPORT] = f"{Transport.__module__}:{Transport.__qualname__}"
