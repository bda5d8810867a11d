"""`doctor`: is everything here as it must be, and what to do where it is not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

import redis
import sqlalchemy as sa
import typer

from kino_refunds.cli.options import AsJson
from kino_refunds.cli.output import console, print_json
from kino_refunds.db.engine import TRANSACTION_TIMEOUT_SINCE, create_engine
from kino_refunds.db.migrate import current_revision, head_revision
from kino_refunds.errors import KinoError, MalformedMessage
from kino_refunds.events.client import redis_client
from kino_refunds.events.envelope import parse
from kino_refunds.events.queues import QUEUE_KEYS, depths, waiting
from kino_refunds.schedule import entries, read_schedule
from kino_refunds.settings import Settings, load_settings, redacted, unknown_names
from kino_refunds.settlement.gate import read_gate

POSTGRES_MIN = 15_00_00
REDIS_MIN = (6, 2)
SKEW_MAX = timedelta(seconds=2)
"""A worker's clock decides lot grace and retry times; seconds do not matter, minutes do."""
MEMORY_SHARE_MAX = 0.8
OLDEST_MAX = timedelta(minutes=1)
"""Events are settled within seconds; one that waits for a minute means that nobody takes them."""

Level = Literal["ok", "warn", "fail", "away"]
_STYLE = {"ok": "green", "warn": "yellow", "fail": "bold red", "away": "bold red"}


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check found; `advice` says what to do next where it is not `ok`."""

    check: str
    level: Level
    found: str
    advice: str | None = None


def register(app: typer.Typer) -> None:
    """Add this room's commands."""
    app.command("doctor")(doctor)


def doctor(as_json: AsJson = False) -> int:
    """Check settings, Postgres, Redis, clocks, workers and beat.

    Exit code 0: all is well, or only warnings. 1: something must be mended. 3: a dependency is away.

    Example: kino-refunds doctor --json
    """
    findings = list(examine(load_settings()))
    if as_json:
        print_json({"items": [asdict(each) for each in findings], "next": None})
    else:
        for each in findings:
            console.print(f"[{_STYLE[each.level]}]{each.level:<5}[/]", end="")
            console.print(f"{each.check}: {each.found}", markup=False, soft_wrap=True)
            if each.advice is not None:
                console.print(f"       {each.advice}", markup=False, style="bold", soft_wrap=True)
    levels = {each.level for each in findings}
    if "away" in levels:
        return 3
    return 1 if "fail" in levels else 0


def examine(settings: Settings) -> Iterator[Finding]:
    """Run every check; one that cannot be made is a finding too."""
    yield from _settings()
    yield from _guarded("postgres", lambda: _postgres(settings))
    yield from _guarded("redis", lambda: _redis(settings))
    yield from _guarded("schedule", lambda: _schedule(settings))


def _guarded(check: str, look: Any) -> Iterator[Finding]:
    try:
        yield from look()
    except (sa.exc.SQLAlchemyError, redis.RedisError) as error:
        text = str(error).partition("\n")[0]
        yield Finding(check, "away", text, "check that it runs, its URL, and the rights of the user in it")
    except KinoError as error:
        yield Finding(check, "fail", str(error))


def _settings() -> Iterator[Finding]:
    unknown = unknown_names()
    for name, nearest in unknown:
        yield Finding("settings", "warn", f"{name} is not a setting", f"did you mean {nearest}?" if nearest else None)
    if not unknown:
        yield Finding("settings", "ok", "every KINO_* variable is known")


def _judge(check: str, good: bool, found: str, advice: str, *, level: Level = "fail") -> Finding:
    return Finding(check, "ok", found) if good else Finding(check, level, found, advice)


def _postgres(settings: Settings) -> Iterator[Finding]:
    url = settings.require_database_url()
    engine = create_engine(url, limits=settings.session_limits, application_name="kino-doctor", pooled=False)
    with engine.connect() as connection:
        row = connection.execute(_SERVER).one()
        yield _judge(
            "postgres version",
            row.version_num >= POSTGRES_MIN,
            f"{row.version} at {redacted(url)}",
            "Postgres 15 or newer is needed",
        )
        yield _judge(
            "transaction timeout",
            row.version_num >= TRANSACTION_TIMEOUT_SINCE,
            "the server bounds whole transactions" if row.version_num >= TRANSACTION_TIMEOUT_SINCE else "not before 17",
            "keep product transactions under half an hour yourselves, or upgrade",
            level="warn",
        )
        yield _judge(
            "role",
            not row.superuser and not row.owns,
            f"connected as {row.role}",
            "connect workers as kino_worker: the owner could change what must only be added to",
        )
        durable = row.fsync == "on" and row.synchronous_commit != "off" and row.full_page_writes == "on"
        yield _judge(
            "durability",
            durable,
            f"fsync {row.fsync}, synchronous_commit {row.synchronous_commit}, full_page_writes {row.full_page_writes}",
            "set fsync and full_page_writes on and synchronous_commit not off: a lost COMMIT is a lost refund",
        )
        skew = abs(row.now - datetime.now(UTC))
        yield _judge(
            "clock", skew < SKEW_MAX, f"{skew.total_seconds():.3f} s from Postgres", "set both by NTP", level="warn"
        )
        found, head = current_revision(connection), head_revision()
        yield _judge(
            "migrations",
            found == head,
            f"the schema is at {found}, this build knows {head}",
            "run `kino-refunds migrate` as kino_owner; if the schema is newer, this build is too old",
        )
        if found is None:
            return
        gate = read_gate(connection)
        yield _judge(
            "intake",
            not gate.paused,
            f"paused by {gate.actor}: {gate.reason}" if gate.paused else "open",
            "see the reason; then `kino-refunds intake resume`",
        )
        alive = connection.execute(_ALIVE).scalar_one()
        yield _judge("workers", alive > 0, f"{alive} alive", "start `celery -A workers.app worker`")


_SERVER = sa.text("""
    SELECT version() AS version, CAST(current_setting('server_version_num') AS integer) AS version_num,
           current_user AS role, clock_timestamp() AS now,
           (SELECT rolsuper FROM pg_roles WHERE rolname = current_user) AS superuser,
           coalesce((SELECT nspowner = (SELECT oid FROM pg_roles WHERE rolname = current_user)
                     FROM pg_namespace WHERE nspname = 'kino'), false) AS owns,
           current_setting('fsync') AS fsync, current_setting('synchronous_commit') AS synchronous_commit,
           current_setting('full_page_writes') AS full_page_writes
""")
_ALIVE = sa.text("""
    SELECT count(*) FROM kino.intake_worker
    WHERE stopped_at IS NULL AND seen_at > clock_timestamp() - interval '30 seconds'
""")


def _redis(settings: Settings) -> Iterator[Finding]:
    url = settings.require_redis_url()
    with redis_client(url) as client:
        info: dict[str, Any] = client.info()
        version = str(info["redis_version"])
        yield _judge(
            "redis version",
            tuple(int(part) for part in version.split(".")[:2]) >= REDIS_MIN,
            f"{version} at {redacted(url)}",
            "Redis 6.2 or newer, or Valkey, is needed",
        )
        yield _judge(
            "redis cluster",
            not info.get("cluster_enabled"),
            "off" if not info.get("cluster_enabled") else "on",
            "the scripts span keys: use one primary with replicas (Sentinel or managed)",
        )
        policy = info.get("maxmemory_policy", "unknown")
        yield _judge(
            "redis eviction",
            policy == "noeviction",
            str(policy),
            "set maxmemory-policy noeviction: events are not a cache",
        )
        yield _judge(
            "redis persistence",
            bool(info.get("aof_enabled")),
            "append-only file on" if info.get("aof_enabled") else "append-only file off",
            "set appendonly yes: what Redis forgets is found only after its deadline",
        )
        limit, used = int(info.get("maxmemory", 0)), int(info.get("used_memory", 0))
        yield _judge(
            "redis memory",
            not limit or used / limit < MEMORY_SHARE_MAX,
            f"{used / 2**20:,.0f} MiB of {f'{limit / 2**20:,.0f} MiB' if limit else 'no limit'}",
            "a full Redis refuses publishers; see what waits with `kino-refunds intake status`",
            level="warn",
        )
        seconds, micros = client.time()
        skew = abs(datetime.fromtimestamp(seconds + micros / 1e6, UTC) - datetime.now(UTC))
        yield _judge(
            "redis clock", skew < SKEW_MAX, f"{skew.total_seconds():.3f} s from Redis", "set both by NTP", level="warn"
        )
        yield from _queues(client)


def _queues(client: redis.Redis) -> Iterator[Finding]:
    foreign = [key for key in QUEUE_KEYS if client.type(key) not in {b"list", b"none"}]
    yield _judge(
        "queue keys",
        not foreign,
        f"not lists: {', '.join(foreign)}" if foreign else "all lists",
        "somebody else writes under the queues' names: move that key away",
    )
    waits = sum(depths(client).values())
    times = []
    for message in waiting(client).messages:
        try:
            times.append(parse(message.raw).time)
        except MalformedMessage:
            continue  # it becomes a dead letter when it is claimed; its age is unknown
    age = datetime.now(UTC) - min(times) if times else timedelta(0)
    yield _judge(
        "queues",
        age < OLDEST_MAX,
        f"{waits:,} waiting, the oldest event {age.total_seconds():,.0f} s old",
        "events are not taken fast enough: see `kino-refunds intake status`, start more workers",
        level="warn",
    )


def _schedule(settings: Settings) -> Iterator[Finding]:
    yield _judge(
        "job source",
        settings.job_source is not None,
        settings.job_source or "not configured",
        "set KINO_JOB_SOURCE: without it a job whose event is lost stays open",
        level="warn",
    )
    engine = create_engine(settings.require_database_url(), application_name="kino-doctor", pooled=False)
    with engine.connect() as connection:
        for run in read_schedule(connection, entries(settings), now=datetime.now(UTC)):
            late = run.last is None or datetime.now(UTC) - run.last > 3 * timedelta(seconds=run.every_s)
            yield _judge(
                "beat",
                not late,
                f"{run.what}: last {f'{run.last:%Y-%m-%d %H:%M:%SZ}' if run.last else 'never'}",
                "start `celery -A workers.app beat`, one; and see that a worker runs",
                # A beat that was started just now has not had its first turn everywhere.
                level="fail" if run.last else "warn",
            )
