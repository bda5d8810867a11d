"""Settings: all are read from the environment (`KINO_*`), each with the reason for its default."""

from __future__ import annotations

import difflib
import os
from datetime import timedelta
from functools import cached_property
from importlib.metadata import version
from typing import Annotated, Literal

import psycopg
import sqlalchemy as sa
from pydantic import Field, SecretStr, ValidationError, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from kino_refunds.db.engine import SessionLimits, driver_url
from kino_refunds.errors import BadSettings
from kino_refunds.events.queue_names import CLAIM_LIMIT_MAX, QUEUE_KEYS
from kino_refunds.events.redis_url import EXAMPLE, read_url

PREFIX = "KINO_"
DATABASE_URL, PRODUCT_DATABASE_URL = f"{PREFIX}DATABASE_URL", f"{PREFIX}PRODUCT_DATABASE_URL"
ONCALL_DATABASE_URL = f"{PREFIX}ONCALL_DATABASE_URL"
NOT_OURS = frozenset({"KINO_TRACE"})
"""Names that the tests and the Makefile use."""

LOT_GRACE_DAYS = f"{PREFIX}LOT_GRACE_DAYS"
GONE = {LOT_GRACE_DAYS: "it is a row of the ledger now: `kino-refunds migrate --lot-grace-days N` writes it"}
"""Names of former settings, each with where its value is now."""

DAY_S = 86_400
"""The maximum of most times: a longer one was meant in another unit."""
ALIVE_MARGIN_S = 5.0
"""Seconds beyond the sum of the session's limits: for a slow round trip to Redis."""


class Settings(BaseSettings):
    """Everything that a deployment can choose; the name of a time ends with its unit."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, frozen=True, extra="ignore", allow_inf_nan=False, env_ignore_empty=True
    )

    database_url: SecretStr | None = Field(None, description="Postgres, as `kino_worker`.")
    oncall_database_url: SecretStr | None = Field(
        None,
        description="Postgres, as a login of `kino_oncall`; for `breaks repair` by a reversal. Unset:"
        " `KINO_DATABASE_URL`.",
    )
    product_database_url: SecretStr | None = Field(
        None,
        description="Postgres, as `kino_product`; for `charges open` and `accounts grant`. Unset: `KINO_DATABASE_URL`.",
    )
    migration_database_url: SecretStr | None = Field(
        None, description="Postgres, as `kino_owner`; only `migrate` uses it."
    )
    redis_url: SecretStr | None = Field(None, description="Redis or Valkey with `noeviction` and AOF.")

    intake_batch: Annotated[int, Field(ge=1, le=CLAIM_LIMIT_MAX)] = Field(
        500, description="Events a claim takes at most: past some hundreds the throughput no longer grows."
    )
    intake_batch_bytes: Annotated[int, Field(ge=1, le=2**30)] = Field(
        8 * 2**20,
        description="Bytes a claim takes at most, so that a batch of large messages fits in memory.",
    )
    intake_poll_s: Annotated[float, Field(gt=0, le=10)] = Field(
        0.1,
        description="Pause between claims of a worker that is idle, and how old its reading of the gate may be: ten"
        " cheap looks a second, far below P9's 5 s. For a second after an event it looks every 5 ms.",
    )
    retry_every_s: Annotated[float, Field(ge=1, le=DAY_S)] = Field(
        2.0, description="Pause between retry sweeps: an event whose charge has come settles well within 5 s."
    )
    expiry_every_s: Annotated[float, Field(ge=1, le=DAY_S)] = Field(
        60.0,
        description="Pause between expiry sweeps; an expired lot is not drawn from before its sweep either.",
    )
    job_source: Literal["none", "sql", "http"] | None = Field(
        None,
        description="What knows how a job ended whose event never came: `sql`, `http`, or `none` (then it counts as"
        " timed out). No default: unset, such a job is never found.",
    )
    job_source_name: Annotated[str, Field(min_length=1, max_length=60)] = Field(
        "pipeline", description="What proofs and reports call the job source."
    )
    check_grace_s: Annotated[float, Field(ge=0, le=DAY_S)] = Field(
        300.0,
        description="What ended this long ago must be settled, and the product told of it, or a check says so: P9's 5"
        " min.",
    )
    check_every_s: Annotated[float, Field(ge=10, le=DAY_S)] = Field(
        300.0, description="Pause between runs of each check; a run compares what is new since the last one."
    )
    job_source_url: SecretStr | None = Field(
        None, description="The source's database (`sql`) or endpoint (`http`; https, except on loopback)."
    )
    job_source_query: str | None = Field(
        None,
        description="`sql`: a query with `:job_ids`, giving `job_id`, `state` and, if known, `origin`, `stage`,"
        " `result_produced`, `finished_at`.",
    )
    job_source_finished_query: str | None = Field(
        None,
        description="`sql`: a query with `:since` and `:until` that lists the jobs that finished between them, with the"
        " same columns and, if known, `account_id`, `credits`. Unset: `matching` has nothing to compare with.",
    )
    job_source_complete_query: str | None = Field(
        None,
        description="`sql`: a query that gives the instant through which that list is complete. Unset: `matching`"
        " reads a day again each time, and says what it assumes.",
    )
    job_source_finished_url: SecretStr | None = Field(
        None, description="`http`: the endpoint that lists finished jobs in pages; as the query above."
    )
    job_source_token: SecretStr | None = Field(None, description="`http`: sent as a bearer token.")
    job_source_timeout_s: Annotated[float, Field(gt=0, le=60)] = Field(
        10.0, description="A source that does not answer within this has not answered; the sweep asks again."
    )
    overdue_every_s: Annotated[float, Field(ge=1, le=DAY_S)] = Field(
        60.0, description="Pause between overdue sweeps: with three asks a presumed timeout stays within P9's 5 min."
    )
    relay_queue: str | None = Field(
        None,
        description="Where the product hears of refunds (`kino.credits-refunded`). Unset: the product is not told.",
    )
    relay_every_s: Annotated[float, Field(ge=1, le=DAY_S)] = Field(
        5.0, description="Pause between relay rounds: the balance is right at once, this is only the news of it."
    )
    overdue_grace_s: Annotated[float, Field(ge=0, le=30 * DAY_S)] = Field(
        60.0, description="A job's event may come this long after its deadline before the source is asked."
    )
    overdue_asks: Annotated[int, Field(ge=1, le=1_000)] = Field(
        3, description="The source must not know a job this many times before we presume that it timed out."
    )
    overdue_ask_window_s: Annotated[float, Field(ge=0, le=DAY_S)] = Field(
        180.0,
        description="Those asks are spread over this time, so that one bad minute of the source is not enough.",
    )
    overdue_running_max_h: Annotated[float, Field(gt=0, le=365 * 24)] = Field(
        24.0, description="A job that is still running this long after its deadline is a break."
    )
    matching_delay_min: Annotated[float, Field(ge=0, le=24 * 60)] = Field(
        15.0,
        description="`matching` leaves out this much of the present where the source does not say how far its list is"
        " complete: longer than a pipeline takes to write that a job ended.",
    )
    lock_timeout_ms: Annotated[int, Field(gt=0, le=DAY_S * 1000)] = Field(
        500,
        description="Below Postgres' `deadlock_timeout` (1 s): contention ends as `busy`, not as a deadlock.",
    )
    statement_timeout_ms: Annotated[int, Field(gt=0, le=DAY_S * 1000)] = Field(
        15_000, description="A batch takes tens of milliseconds; this bounds a sick disk."
    )
    idle_in_transaction_timeout_ms: Annotated[int, Field(gt=0, le=DAY_S * 1000)] = Field(
        5_000, description="A worker that was stopped inside a transaction loses its locks after this."
    )
    transaction_timeout_ms: Annotated[int, Field(gt=0, le=DAY_S * 1000)] = Field(
        30_000, description="The bound on a whole transaction, where the server has one (Postgres 17)."
    )
    tcp_user_timeout_ms: Annotated[int, Field(gt=0, le=DAY_S * 1000)] = Field(
        10_000, description="A connection whose packets are not answered is dead after this."
    )
    log_format: Literal["auto", "console", "json"] = Field(
        "auto", description="`auto`: for people on a terminal, JSON otherwise. `json`: also one line for each command."
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="What is worth a line.")
    build: str = Field(default_factory=lambda: version("kino-refunds"), description="Names this build in dead letters.")

    @field_validator("relay_queue")
    @classmethod
    def _queue_of_its_own(cls, value: str | None) -> str | None:
        if value in QUEUE_KEYS:
            raise ValueError("this queue is the pipeline's: every event of a refund would become a dead letter")
        return value

    @cached_property
    def session_limits(self) -> SessionLimits:
        """The limits of every Postgres session."""
        return SessionLimits(
            lock_timeout_ms=self.lock_timeout_ms,
            statement_timeout_ms=self.statement_timeout_ms,
            idle_in_transaction_timeout_ms=self.idle_in_transaction_timeout_ms,
            transaction_timeout_ms=self.transaction_timeout_ms,
            tcp_user_timeout_ms=self.tcp_user_timeout_ms,
        )

    @property
    def alive_ttl_s(self) -> float:
        """Seconds for which a silent worker counts as alive: longer than any transaction that it may have left open."""
        return self.session_limits.longest_hold_s + ALIVE_MARGIN_S

    @property
    def retry_lease(self) -> timedelta:
        """How long no other retry sweep takes the events of a sweep: as long as its worker counts as alive."""
        return timedelta(seconds=self.alive_ttl_s)

    @property
    def overdue_grace(self) -> timedelta:
        """`overdue_grace_s` as a timedelta."""
        return timedelta(seconds=self.overdue_grace_s)

    @property
    def matching_delay(self) -> timedelta:
        """`matching_delay_min` as a timedelta."""
        return timedelta(minutes=self.matching_delay_min)

    def require_database_url(self) -> str:
        """Return the worker's database URL; raises BadSettings, which says how to set it."""
        return _require_postgres(self.database_url, DATABASE_URL, "postgresql://kino_worker@HOST/DATABASE")

    def require_product_database_url(self) -> tuple[str, str]:
        """Return the database URL for the product's acts, and the name of the setting that it comes from.

        Raises BadSettings, which says how to set it.
        """
        if self.product_database_url is None:
            return self.require_database_url(), DATABASE_URL
        example = "postgresql://kino_product@HOST/DATABASE"
        return _require_postgres(self.product_database_url, PRODUCT_DATABASE_URL, example), PRODUCT_DATABASE_URL

    def require_oncall_database_url(self) -> tuple[str, str]:
        """Return the database URL for what only on-call may do, and the name of the setting that it comes from.

        Raises BadSettings, which says how to set it.
        """
        if self.oncall_database_url is None:
            return self.require_database_url(), DATABASE_URL
        example = "postgresql://kino_oncall@HOST/DATABASE"
        return _require_postgres(self.oncall_database_url, ONCALL_DATABASE_URL, example), ONCALL_DATABASE_URL

    def require_migration_database_url(self) -> str:
        """Return the owner's database URL; raises BadSettings, which says how to set it."""
        return _require_postgres(
            self.migration_database_url,
            "KINO_MIGRATION_DATABASE_URL",
            "postgresql://kino_owner@HOST/DATABASE",
        )

    def require_job_source_database_url(self) -> str:
        """Return the database URL of the job source `sql`; raises BadSettings, which says how to set it."""
        example = "postgresql://READER@HOST/DATABASE"
        if self.job_source_url is None:
            raise BadSettings(f"KINO_JOB_SOURCE=sql needs KINO_JOB_SOURCE_URL; for example {example}")
        return _require_postgres(self.job_source_url, "KINO_JOB_SOURCE_URL", example)

    def require_redis_url(self) -> str:
        """Return the Redis URL; raises BadSettings, which says how to set it, or what in it is wrong."""
        url = _require(self.redis_url, "KINO_REDIS_URL", EXAMPLE)
        read_url(url)
        return url


def _require(value: SecretStr | None, name: str, example: str) -> str:
    if value is None or not value.get_secret_value():
        raise BadSettings(f"{name} is not set; for example {name}={example} (or run `kino-refunds dev`)")
    return value.get_secret_value()


def _require_postgres(value: SecretStr | None, name: str, example: str) -> str:
    url = _require(value, name, example)
    try:
        read = driver_url(url)
    except (sa.exc.ArgumentError, ValueError):  # the texts of these errors may quote the password
        raise BadSettings(f"{name} {_UNREADABLE}; for example {example}") from None
    if read.drivername != "postgresql+psycopg":
        raise BadSettings(f"{name} is not Postgres by psycopg but {read.drivername}; for example {example}")
    if "@" in (read.host or ""):  # the rest of a password, which an error would print as the host
        raise BadSettings(f"{name} {_UNREADABLE}; for example {example}")
    unknown = read.query.keys() - {option.keyword.decode() for option in psycopg.pq.Conninfo.get_defaults()}
    if unknown:
        raise BadSettings(f"{name} has options that Postgres does not know: {', '.join(sorted(unknown))}")
    try:
        _require_parts(read)
    except (sa.exc.ArgumentError, ValueError):
        raise BadSettings(f"{name} {_UNREADABLE}; for example {example}") from None
    return url


def _require_parts(url: sa.URL) -> None:
    """Raise ArgumentError if hosts and ports do not match, ValueError if a part contains a NUL."""
    _, parts = url.get_dialect()().create_connect_args(url)
    if any("\0" in str(part) for part in parts.values()):  # libpq would use only the text before the NUL
        raise ValueError("NUL")


_UNREADABLE = "cannot be read: look at its hosts, ports and options, and write special characters of a password as %XX"


def load_settings() -> Settings:
    """Return the settings in the environment; raises BadSettings, which names each wrong variable."""
    try:
        return Settings()
    except ValidationError as error:
        wrong = "; ".join(f"{PREFIX}{str(e['loc'][0]).upper()}: {e['msg']}" for e in error.errors())
        raise BadSettings(wrong) from error


def unknown_names() -> list[tuple[str, str]]:
    """Return the `KINO_*` variables that are not settings, each with what to do about it."""
    known = {name.upper() for name in Settings.model_fields}
    found = []
    for name in sorted(os.environ):
        rest = name.removeprefix(PREFIX)
        if rest != name and rest not in known and name not in NOT_OURS:
            # Compared without the prefix, which would make all names similar.
            nearest = difflib.get_close_matches(rest, sorted(known), n=1)
            advice = f"did you mean {PREFIX}{nearest[0]}?" if nearest else "remove it: no program reads it"
            found.append((name, GONE.get(name, advice)))
    return found


def redacted(url: str) -> str:
    """Return a URL for logs and messages: without its password, and without its options, which may hold one too."""
    return sa.make_url(url).set(query={}).render_as_string(hide_password=True)
