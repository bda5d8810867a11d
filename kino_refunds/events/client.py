"""A Redis client that notices when Redis is gone."""

from __future__ import annotations

from redis import Redis
from redis.backoff import ExponentialBackoff
from redis.retry import Retry

from kino_refunds.errors import BadSettings

CONNECT_TIMEOUT_S = 5.0
# A claim of 1,000 messages holds Redis for some 10 ms; a silence of this length is a dead connection. A command is
# repeated once, so a half-open connection costs twice this.
ANSWER_TIMEOUT_S = 5.0


def redis_client(url: str) -> Redis:
    """Make a client for `url`; nothing connects before first use.

    It repeats a command once when the connection breaks. That is safe for our scripts, which are built so
    that running one twice changes nothing (tokens), and saves a batch from a passing hiccup.
    """
    try:
        return _client(url)
    except ValueError as error:
        raise BadSettings(f"KINO_REDIS_URL cannot be read: {error}") from error


def _client(url: str) -> Redis:
    return Redis.from_url(
        url,
        socket_connect_timeout=CONNECT_TIMEOUT_S,
        socket_timeout=ANSWER_TIMEOUT_S,
        socket_keepalive=True,
        health_check_interval=30,
        retry=Retry(ExponentialBackoff(cap=0.5, base=0.05), retries=1),
    )
