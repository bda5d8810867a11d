"""Connections to Redis that follow the primary; `broker.py` makes kombu's and Celery's of them.

If the server of a connection is not a primary (any more), the connection is closed together with the idle ones of its
pool, so that the next command looks the address up again. Without this, a connection to a primary that was demoted and
runs on as a replica would answer READONLY until it is closed.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any, Final

import redis
from redis.backoff import ExponentialBackoff
from redis.retry import Retry

from kino_refunds.events.redis_url import read_url

CONNECT_TIMEOUT_S: Final = 5.0
# A claim of 1,000 messages takes Redis some 10 ms, so a silence of this length means a dead connection. A command is
# repeated once: a half-open connection costs twice this.
ANSWER_TIMEOUT_S: Final = 5.0
HEALTH_CHECK_EVERY_S: Final = 25


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
    pool = PrimaryPool(
        connection_class=PrimaryConnection if read.tls is None else PrimaryTlsConnection,
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


class PrimaryConnection(_FollowsPrimary, redis.Connection):
    """A plain connection."""


class PrimaryTlsConnection(_FollowsPrimary, redis.SSLConnection):
    """A connection by TLS."""


class PrimaryPool(redis.ConnectionPool):
    """Lets a connection that met a demoted server close the idle ones, because they lead to the same server."""

    def make_connection(self) -> Any:
        """Make a connection that can close this pool's idle ones."""
        connection: Any = super().make_connection()
        connection.drop_idle = partial(self.disconnect, inuse_connections=False)
        return connection
