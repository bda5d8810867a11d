"""What answers at KINO_REDIS_URL is not what it should be: one line that says so, the right exit code, no traceback."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path

import pytest
from redis import Redis

from kino_refunds.dev.embedded import LOOPBACK
from kino_refunds.events.schema import to_json
from kino_refunds.ledger import ChargeRequest, open_charges
from tests.command_line import Result, Run
from tests.scenario import NOW, Scene, make_event

IMPATIENT = "socket_timeout=0.3&socket_connect_timeout=0.3"

ANSWERS: dict[str, bytes | None] = {
    "a web server": b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n",
    "a greeting": b"220 mail.example ESMTP\r\n",
    "bytes": bytes(range(128, 256)) + b"\r\n",
    "half of an answer": b"*3\r\n$5\r\nhel",
    "an answer inside an answer": b"*3\r\nfoo\r\n",
    "a length that is none": b"$abc\r\n",
    "a huge length": b"*99999999999999999999\r\n",
    "OK to everything": b"+OK\r\n",
    "a number to everything": b":1\r\n",
    "nothing to everything": b"*0\r\n",
    "nil to everything": b"$-1\r\n",
    "no answer": b"",
    "a closed connection": None,
    "LOADING": b"-LOADING Redis is loading the dataset in memory\r\n",
    "NOAUTH": b"-NOAUTH Authentication required.\r\n",
    "DENIED": b"-DENIED Redis is running in protected mode\r\n",
    "READONLY": b"-READONLY You can't write against a read only replica.\r\n",
    "MASTERDOWN": b"-MASTERDOWN Link with MASTER is down\r\n",
    "MOVED": b"-MOVED 1 10.0.0.1:6379\r\n",
    "CLUSTERDOWN": b"-CLUSTERDOWN Hash slot not served\r\n",
    "ERR": b"-ERR unknown command\r\n",
    "max clients": b"-ERR max number of clients reached\r\n",
}


@contextmanager
def server(answer: bytes | None) -> Iterator[int]:
    """Answer the same to whatever is said on a port; None hangs up."""

    def serve(connection: socket.socket) -> None:
        with connection, suppress(OSError):
            while connection.recv(65_536) and answer is not None:
                connection.sendall(answer)

    def accept() -> None:
        with suppress(OSError):
            while True:
                threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()

    with socket.create_server((LOOPBACK, 0)) as listener:
        threading.Thread(target=accept, daemon=True).start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def overdue(scene: Scene) -> Scene:
    """A ledger with a job that is overdue, so that every command has to ask Redis."""
    scene.grant("acct-1", credits=10)
    with scene.product.begin() as connection:
        open_charges(connection, [ChargeRequest("job-1", "acct-1", 10, NOW - timedelta(hours=1))])
    return scene


def each_command(run: Run, url: str, folder: Path) -> dict[str, Result]:
    events = folder / "events"
    events.write_bytes(to_json(make_event("failed platform", "job-1")) + b"\n")
    commands = {
        "status": ("status",),
        "intake": ("intake", "status"),
        "publish": ("publish", str(events)),
        "overdue": ("overdue", "run"),
        "doctor": ("doctor", "--json"),
    }
    return {name: run(*words, KINO_REDIS_URL=url) for name, words in commands.items()}


def check(found: dict[str, Result], code: int) -> None:
    """One line on standard error, but of the doctor, whose finding it is, and of overdue, whose report it is."""
    assert {name: result.code for name, result in found.items() if name != "doctor"} == dict.fromkeys(
        ("status", "intake", "publish", "overdue"), code
    )
    for name in ("status", "intake", "publish"):
        assert found[name].err.startswith("error: ")
        assert found[name].err.count("\n") == 1
    bad = [each for each in found["doctor"].json["items"] if each["level"] in {"away", "fail"}]
    assert {each["check"] for each in bad} <= {"redis", "redis role", "settings", "workers", "overdue charges"}
    assert all("\n" not in each["found"] for each in bad)
    assert found["doctor"].code in {1, code}


@pytest.mark.usefixtures("overdue")
@pytest.mark.parametrize("answer", ANSWERS)
def test_answer_that_is_not_a_redis_is_told(run: Run, tmp_path: Path, answer: str) -> None:
    """A server of another kind, one that is not ready, and one that is broken: Redis is away, and how is said."""
    with server(ANSWERS[answer]) as port:
        found = each_command(run, f"redis://:hunter2@{LOOPBACK}:{port}/0?{IMPATIENT}", tmp_path)

    check(found, 3)
    assert "hunter2" not in "".join(result.out + result.err for result in found.values())


@pytest.mark.usefixtures("overdue")
@pytest.mark.parametrize(
    "host", ["a" * 300, "a..b", "a%00b", "no-such-host.invalid", f"{LOOPBACK}:1"], ids=lambda host: host[:9]
)
def test_host_that_leads_nowhere_is_told(run: Run, tmp_path: Path, host: str) -> None:
    """A name that no name server takes is an address where nobody is."""
    check(each_command(run, f"redis://{host}", tmp_path), 3)


@pytest.mark.usefixtures("overdue")
@pytest.mark.parametrize(
    "options",
    [
        "",
        "&ssl_ca_certs=/there/is/none.pem",
        "&ssl_ca_certs=/",
        "&ssl_certfile=/there/is/none.pem",
        "&ssl_ciphers=none",
    ],
)
def test_tls_that_cannot_be_is_told(run: Run, tmp_path: Path, redis_url: str, options: str) -> None:
    """rediss:// on a port without TLS, and files that are not there."""
    url = f"{redis_url.replace('redis://', 'rediss://')}?{IMPATIENT}{options}"

    check(each_command(run, url, tmp_path), 3)


@pytest.mark.usefixtures("overdue")
@pytest.mark.parametrize(
    ("user", "db"), [("nobody:hunter2@", "0"), ("limited:x@", "0"), ("", "99999")], ids=["password", "rights", "db"]
)
def test_what_a_real_redis_refuses_is_told(run: Run, tmp_path: Path, redis: Redis, user: str, db: str) -> None:
    """A wrong password, a user without rights and a database that there is not."""
    port = redis.connection_pool.connection_kwargs["port"]
    redis.acl_setuser("limited", enabled=True, passwords=["+x"], commands=["+ping", "+select", "+hello"])
    try:
        found = each_command(run, f"redis://{user}{LOOPBACK}:{port}/{db}", tmp_path)
    finally:
        redis.acl_deluser("limited")

    check(found, 3)
