"""Redis URLs: one reader for redis-py, kombu and Celery, which takes an option for all three or for none."""

from __future__ import annotations

import inspect
from typing import Any

import kombu
import pytest
import redis
from kombu.transport import redis as kombu_redis

from kino_refunds.errors import BadSettings
from kino_refunds.events.broker import celery_settings, kombu_connection
from kino_refunds.events.connection import redis_client
from kino_refunds.events.redis_url import RedisUrl, read_url

URL = "redis://user:p%40ss@redis.example:6380/3"
TLS_URL = "rediss://user:p%40ss@redis.example:6380/3"

PLAIN_OPTIONS: dict[str, tuple[str, Any]] = {
    "client_name": ("intake", "intake"),
    "protocol": ("2", 2),
    "socket_timeout": ("2.5", 2.5),
    "socket_connect_timeout": ("1", 1.0),
    "socket_keepalive": ("no", False),
    "health_check_interval": ("7", 7),
}
TLS_OPTIONS: dict[str, tuple[str, Any]] = {
    "ssl_ca_certs": ("/etc/ca.pem", "/etc/ca.pem"),
    "ssl_ca_path": ("/etc/ca", "/etc/ca"),
    "ssl_certfile": ("/etc/me.pem", "/etc/me.pem"),
    "ssl_check_hostname": ("false", False),
    "ssl_cert_reqs": ("CERT_OPTIONAL", "optional"),
    "ssl_min_version": ("772", 772),
    "ssl_ciphers": ("ECDHE", "ECDHE"),
}


def refusal(url: str) -> str:
    with pytest.raises(BadSettings) as refused:
        read_url(url)
    text = str(refused.value)
    assert text.startswith("KINO_REDIS_URL ")
    assert text.endswith("; for example redis://HOST:6379/0")
    assert "\n" not in text
    return text


def of_redis_py(url: str) -> dict[str, Any]:
    """What redis-py would connect with."""
    with redis_client(url) as client:
        pool = client.connection_pool
        return {**pool.connection_kwargs, "tls": issubclass(pool.connection_class, redis.SSLConnection)}


def of_kombu(connection: kombu.Connection) -> dict[str, Any]:
    """What kombu's channels would connect with; a channel itself connects as it is made."""
    channel = object.__new__(connection.get_transport_cls().Channel)
    channel.connection = type("Transport", (), {"client": connection, "default_port": 6379})
    for name, value in connection.transport_options.items():
        assert name in channel.from_transport_options
        setattr(channel, name, value)
    parameters = channel._connparams()
    return {**parameters, "tls": issubclass(parameters["connection_class"], redis.SSLConnection)}


def of_celery(url: str) -> dict[str, Any]:
    """What Celery's connections would connect with: its app hands these settings to kombu like this."""
    conf = celery_settings(url)
    return of_kombu(
        kombu.Connection(
            conf["broker_url"],
            conf["broker_user"],
            conf["broker_password"],
            transport=conf["broker_transport"],
            ssl=conf["broker_use_ssl"],
            transport_options=conf["broker_transport_options"],
        )
    )


def test_the_parts_of_a_url_are_read() -> None:
    """Where, as whom and into which database; percent signs are decoded once."""
    assert read_url(URL) == RedisUrl("redis.example", 6380, 3, "user", "p@ss", None, {})
    assert read_url("redis://") == RedisUrl("localhost", 6379, 0, None, None, None, {})
    assert read_url("rediss://[::1]/?db=4&username=u&password=%2525") == RedisUrl("::1", 6379, 4, "u", "%25", {}, {})


@pytest.mark.parametrize("url", [URL, TLS_URL, "redis://[::1]:7000/0", "rediss://u@host"])
def test_all_three_connect_to_the_same(url: str) -> None:
    """Host, port, database, user, password and certificates are the same by redis-py, kombu and Celery."""
    same = ("host", "port", "db", "username", "password", "tls")
    by_redis_py, by_kombu, by_celery = of_redis_py(url), of_kombu(kombu_connection(url)), of_celery(url)

    assert [{name: by[name] for name in same} for by in (by_kombu, by_celery)] == [
        {name: by_redis_py[name] for name in same}
    ] * 2
    assert by_redis_py["tls"] == url.startswith("rediss")
    assert {by.get("ssl_cert_reqs", "required") for by in (by_redis_py, by_kombu, by_celery)} == {"required"}


@pytest.mark.parametrize("option", [*PLAIN_OPTIONS, *TLS_OPTIONS])
def test_option_is_taken_by_all_three(option: str) -> None:
    """An option means the same to the client of intake, to the publisher and to Celery."""
    text, value = (PLAIN_OPTIONS | TLS_OPTIONS)[option]
    url = f"{TLS_URL}?{option}={text}"

    assert [by[option] for by in (of_redis_py(url), of_kombu(kombu_connection(url)), of_celery(url))] == [value] * 3


def test_key_of_a_certificate_is_taken_with_it() -> None:
    """A client certificate has a key, and the key a password."""
    url = f"{TLS_URL}?ssl_certfile=/a&ssl_keyfile=/b&ssl_password=c"

    for by in (of_redis_py(url), of_kombu(kombu_connection(url)), of_celery(url)):
        assert (by["ssl_certfile"], by["ssl_keyfile"], by["ssl_password"]) == ("/a", "/b", "c")


TAKEN = {"db", "username", "password", "ssl_keyfile", "ssl_password", *PLAIN_OPTIONS, *TLS_OPTIONS}


def accepted_by_the_libraries() -> set[str]:
    """Every option that redis-py's and kombu's own reading of a URL would pass on."""
    takers: list[type] = [*redis.SSLConnection.__mro__, redis.Redis, redis.ConnectionPool, redis.BlockingConnectionPool]
    names = {name for taker in takers if taker is not object for name in inspect.signature(taker).parameters}
    return (names | set(kombu_redis.SentinelChannel.from_transport_options)) - {"self", "args", "kwargs"}


@pytest.mark.parametrize("option", sorted(accepted_by_the_libraries() - TAKEN))
def test_every_other_option_is_refused_by_name(option: str) -> None:
    """Whatever redis-py or kombu would take, now or in a later version, is decided here: refused until it is taken."""
    assert f"leave them out: {option}" in refusal(f"{TLS_URL}?{option}=1")


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ("max_connections=1", "max_connections (the program sets the size of its pools)"),
        ("retry_on_timeout=1", "retry_on_timeout (the program repeats a command as often as is safe)"),
        ("decode_responses=1", "decode_responses (messages are read as bytes)"),
        ("master_name=m", "master_name (Sentinel is not supported yet)"),
        ("socket_timout=1", "socket_timout (did you mean socket_timeout?)"),
        ("ssl_ca_certs=/a", "ssl_ca_certs (it needs rediss://)"),
        ("foo=1&bar=2", "foo, bar; supported are db, username, password, client_name, protocol,"),
    ],
)
def test_refused_option_says_what_to_do(option: str, says: str) -> None:
    """All are named at once, each with its reason where there is one."""
    assert f"has options that are not supported, leave them out: {says}" in refusal(f"{URL}?{option}")


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ("protocol=4", "protocol must be 2 or 3"),
        ("socket_timeout=0", "socket_timeout must be 0.1 to 30 seconds"),
        ("socket_timeout=nan", "socket_timeout must be 0.1 to 30 seconds"),
        ("socket_connect_timeout=99", "socket_connect_timeout must be 0.1 to 30 seconds"),
        ("socket_keepalive=maybe", "socket_keepalive must be true or false"),
        ("health_check_interval=-1", "health_check_interval must be a whole number from 0 to 3600"),
        ("client_name=a%20b", "client_name must be printable ASCII without blanks"),
        ("client_name=", "client_name must be printable ASCII without blanks"),
        ("ssl_cert_reqs=never", "ssl_cert_reqs must be required or optional or none"),
        ("ssl_min_version=1", "ssl_min_version must be 771 or 772"),
        ("ssl_ca_certs=", "ssl_ca_certs has no value"),
        ("ssl_keyfile=/a", "ssl_keyfile without ssl_certfile"),
        ("protocol=2&protocol=3", "protocol is given twice"),
        ("protocol=4&client_name=", "protocol must be 2 or 3, client_name must be printable"),
    ],
)
def test_value_that_cannot_be_is_refused_by_its_option(option: str, says: str) -> None:
    """What would end a worker, or be ignored, is named before anything connects."""
    assert f"has options with wrong values: {says}" in refusal(f"rediss://host?{option}")


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("sentinel://a:26379;sentinel://b:26379/0", "is a Sentinel URL, which is not supported yet: give one address"),
        ("redis+sentinel://:hunter2@a,b/mymaster", "is a Sentinel URL, which is not supported yet"),
        ("redis-sentinel://a", "is a Sentinel URL, which is not supported yet"),
        ("redis+cluster://a", "is a Redis Cluster URL: the scripts span keys"),
        ("valkey://:hunter2@a", "begins with valkey://: write redis://"),
        ("valkeys://a", "begins with valkeys://: write rediss://"),
        ("unix:///run/redis.sock", "is a Unix socket; connect by redis:// or rediss://"),
        ("redis+socket:///run/redis.sock", "is a Unix socket; connect by redis:// or rediss://"),
        ("redis://a/mydb", "has a path that is not a database number: it must be a whole number"),
        ("redis://a/-1", "has a path that is not a database number"),
        ("redis://a/1?db=2", "gives its db twice: leave the option out"),
        ("redis://u:hunter2@a?username=v&password=hunter2", "gives its username and password twice"),
    ],
)
def test_url_of_another_kind_says_what_it_is(url: str, says: str) -> None:
    """A URL of Sentinel, of a cluster, of a socket is told as that, and not as unreadable."""
    assert refusal(url).startswith(f"KINO_REDIS_URL {says}")


@pytest.mark.parametrize(
    "url",
    [
        "",
        "localhost:6379",
        "amqp://localhost",
        "http://redis",
        "redis:/a",
        "redis://:hun/ter2@redis:6379/0",
        "redis://:1?hunter2@redis:6379/0",
        "redis://:1?hunter2=@redis:6379/0",
        "redis://:1#hunter2@redis:6379/0",
        "redis://:1/hunter2@redis:6379/0",
        "redis://:hunter2@redis:port/0",
        "redis://:hunter2@redis:99999/0",
        "redis://:hunter2@redis:0/0",
        "redis://:hunter2@[::1/0",
        "redis://a:6379,b:6379/0",
        "redis://redis/0?db",
        "redis://redis/0?&",
    ],
)
def test_url_that_cannot_be_read_says_so_and_no_more(url: str) -> None:
    """A raw special character cuts a password in two: no part of it is shown, not as an option's name either."""
    text = refusal(url)

    assert text.startswith("KINO_REDIS_URL cannot be read: look at its options, and write special characters")
    assert "hun" not in text
    assert "ter2" not in text


def test_no_secret_is_shown() -> None:
    """A password is in no error, no representation, and not in the URL that Celery logs."""
    url = "rediss://user:hunter2@a/0?ssl_certfile=/a&ssl_password=hunter2&protocol=3"

    assert "hunter2" not in repr(read_url(url))
    assert "hunter2" not in celery_settings(url)["broker_url"]
    assert "hunter2" not in refusal(f"{url}&db=hunter2&foo=hunter2")
    assert "hunter2" not in refusal("redis://u:hunter2@a?protocol=hunter2")
    assert "hunter2" not in kombu_connection(url).as_uri()
