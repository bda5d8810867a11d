"""Two real Valkeys behind one address, for failovers in which the old primary lives on and connections stay open."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from redis import Redis

from kino_refunds.dev.embedded import LOOPBACK, EmbeddedValkey
from tests.faults.proxy import Proxy
from tests.scenario import until

NOWHERE = 1
"""Nobody listens on tcpmux: a replica of this port stays as it is."""


@dataclass
class Pair:
    """A primary, its replica, and the address that leads to the primary."""

    primary: EmbeddedValkey
    replica: EmbeddedValkey
    proxy: Proxy

    def url(self, db: int = 0) -> str:
        """Return the URL that clients are given."""
        return f"redis://{LOOPBACK}:{self.proxy.port}/{db}"

    def client(self) -> Redis:
        """Return a client of the present primary that does not go through the address."""
        return Redis.from_url(self.primary.url())

    def fail_over(self, *, cut_off: bool = False) -> None:
        """Let the replica become the primary, the old one its replica, and the address lead to the new one.

        Open connections stay with the old primary. `cut_off`: it never hears from the new one, so that it
        answers what it held at the switch.
        """
        with self.client() as old, Redis.from_url(self.replica.url()) as new:
            until(lambda: _in_step(old, new))
            new.replicaof("NO", "ONE")
            self.proxy.lead_to(self.replica.port)
            old.replicaof(LOOPBACK, NOWHERE if cut_off else self.replica.port)
            self.primary, self.replica = self.replica, self.primary
            if not cut_off:
                until(lambda: _in_step(new, old))

    def mend(self) -> None:
        """Empty both, let the replica follow again, and end all connections through the address."""
        self.proxy.cut()
        with self.client() as primary, Redis.from_url(self.replica.url()) as replica:
            for server in (primary, replica):
                server.config_set("replica-serve-stale-data", "yes")
                server.config_set("min-replicas-to-write", 0)
            primary.flushall()
            replica.replicaof(LOOPBACK, self.primary.port)
            until(lambda: _in_step(primary, replica))


def _in_step(primary: Redis, replica: Redis) -> bool:
    found = replica.info("replication")
    return found["role"] == "slave" and (found["master_link_status"], found["slave_repl_offset"]) == (
        "up",
        primary.info("replication")["master_repl_offset"],
    )


@contextmanager
def pair(folder: Path) -> Iterator[Pair]:
    """Run two Valkeys, the second a replica of the first, behind one address."""
    first, second = (EmbeddedValkey(folder / name, scratch=True) for name in ("first", "second"))
    try:
        first.start()
        second.start()
        with Proxy(first.port) as proxy:
            both = Pair(first, second, proxy)
            both.mend()
            yield both
    finally:
        first.stop()
        second.stop()
