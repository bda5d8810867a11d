"""Valkey with the configuration and the users of deploy/, and what it refused to whom."""

from __future__ import annotations

import os
import socket
import subprocess
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from redis import Redis

from kino_refunds.dev.embedded import LOOPBACK, EmbeddedValkey
from kino_refunds.dev.supervisor import Orders
from kino_refunds.events.envelope import parse
from kino_refunds.events.schema import Queue
from tests.integration.deploy.files import DEPLOY, USERS, password


class DeployedValkey(EmbeddedValkey):
    """Valkey as deploy/ would have it: its configuration, and its users with passwords of the test."""

    def url_of(self, user: str) -> str:
        return f"redis://{user}:{password(user)}@{LOOPBACK}:{self.port}/0"

    def client(self, user: str) -> Redis:
        return Redis.from_url(self.url_of(user))

    def _orders(self, port: int) -> Orders:
        acl = self.folder / "users.acl"
        acl.write_text(
            subprocess.run(
                [DEPLOY / "render-acl.sh"],
                env={"PATH": os.defpath, **{f"REDIS_{user.upper()}_PASSWORD": password(user) for user in USERS}},
                capture_output=True,
                text=True,
                check=True,
            ).stdout,
            encoding="utf-8",
        )
        orders = super()._orders(port)
        own = {"bind": LOOPBACK, "port": port, "dir": self.folder, "aclfile": acl}
        options = [part for name, value in own.items() for part in (f"--{name}", str(value))]
        return replace(orders, command=[orders.command[0], str(DEPLOY / "redis.conf"), *options])

    def _answers(self, port: int) -> bool:
        greeting = f"AUTH readonly {password('readonly')}\r\nINFO server\r\nEXISTS kino:workers\r\n"
        said = b""
        try:
            with socket.create_connection((LOOPBACK, port), timeout=2) as connection:
                connection.sendall(greeting.encode())
                while not said.endswith((b"\r\n:0\r\n", b"\r\n:1\r\n")) and (piece := connection.recv(65_536)):
                    said += piece
        except OSError:
            return False
        return f"process_id:{self._pid}\r\n".encode() in said


def event(number: int = 1, queue: Queue = Queue.JOB_FAILED) -> dict[str, Any]:
    data: dict[Queue, dict[str, Any]] = {
        Queue.JOB_FAILED: {"error": {"code": "gpu_lost", "origin": "platform"}},
        Queue.SAFETY_REJECTION: {"stage": "before_generation", "category": "violence"},
    }
    kind = queue.value.replace("generation.", "kino.generation.")
    return {
        "specversion": "1.0",
        "id": f"event-{number}",
        "source": "pipeline",
        "type": f"{kind}.v1",
        "time": datetime.now(UTC).isoformat(),
        "subject": f"job-{number}",
        "data": {"job_id": f"job-{number}", **data.get(queue, {})},
    }


def ask(client: Redis, command: str, *words: str) -> Any:
    """Send a command and give what the server says; its name in one piece, which redis-py then leaves unread."""
    execute: Any = client.execute_command
    return execute(command, *words)


def refused_for(admin: Redis, user: str) -> list[str]:
    """What the server has refused this user, as `ACL LOG` names it."""
    entries = [
        entry if isinstance(entry, dict) else dict(zip(entry[::2], entry[1::2], strict=True))
        for entry in ask(admin, "ACL LOG")
    ]
    plain = [{text_of(name): text_of(value) for name, value in entry.items()} for entry in entries]
    return [f"{entry['reason']} {entry['object']}" for entry in plain if entry["username"] == user]


def text_of(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def read(raw: bytes | str) -> str:
    """The job that a message on a queue speaks of."""
    assert isinstance(raw, bytes)
    return parse(raw).job_id


Q = Queue.JOB_FAILED.value
