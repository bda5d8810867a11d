"""Settings: every one explained, every wrong one named, no secret shown."""

from __future__ import annotations

import os
import re
from typing import Any

import pytest

from kino_refunds.errors import BadSettings
from kino_refunds.settings import PREFIX, Settings, load_settings, redacted, unknown_names


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever runs the tests may have a ledger of theirs in the environment."""
    for name in [name for name in os.environ if name.startswith(PREFIX)]:
        monkeypatch.delenv(name)


def test_every_setting_says_what_it_is_for() -> None:
    """No setting without a sentence: the table in deploy/README.md is made of them."""
    unexplained = [name for name, field in Settings.model_fields.items() if not (field.description or "").endswith(".")]

    assert unexplained == []


def test_defaults_are_those_of_the_design() -> None:
    """Nothing but the three URLs and the job source has to be set, and the defaults are those argued for."""
    settings = load_settings().model_dump(exclude={"build"})

    assert settings == {
        "database_url": None,
        "oncall_database_url": None,
        "product_database_url": None,
        "migration_database_url": None,
        "redis_url": None,
        "intake_batch": 500,
        "intake_batch_bytes": 8 * 2**20,
        "intake_poll_s": 0.1,
        "retry_every_s": 2.0,
        "expiry_every_s": 60.0,
        "job_source": None,
        "job_source_url": None,
        "job_source_query": None,
        "job_source_finished_query": None,
        "job_source_complete_query": None,
        "job_source_finished_url": None,
        "job_source_token": None,
        "job_source_timeout_s": 10.0,
        "job_source_name": "pipeline",
        "check_grace_s": 300.0,
        "check_every_s": 300.0,
        "overdue_every_s": 60.0,
        "relay_queue": None,
        "relay_every_s": 5.0,
        "overdue_grace_s": 60.0,
        "overdue_asks": 3,
        "overdue_ask_window_s": 180.0,
        "overdue_running_max_h": 24.0,
        "matching_delay_min": 15.0,
        "lock_timeout_ms": 500,
        "statement_timeout_ms": 15_000,
        "idle_in_transaction_timeout_ms": 5_000,
        "transaction_timeout_ms": 30_000,
        "tcp_user_timeout_ms": 10_000,
        "log_format": "auto",
        "log_level": "info",
    }


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("INTAKE_BATCH", "0"),
        ("INTAKE_BATCH", "1001"),
        ("INTAKE_BATCH", "many"),
        ("INTAKE_BATCH_BYTES", "0"),
        ("INTAKE_POLL_S", "0"),
        ("INTAKE_POLL_S", "11"),
        ("RETRY_EVERY_S", "0.9"),
        ("EXPIRY_EVERY_S", "0.9"),
        ("JOB_SOURCE", "somebody"),
        ("JOB_SOURCE_TIMEOUT_S", "0"),
        ("JOB_SOURCE_TIMEOUT_S", "61"),
        ("OVERDUE_EVERY_S", "0.9"),
        ("RELAY_EVERY_S", "0.9"),
        ("RELAY_QUEUE", "generation.timeout"),
        ("OVERDUE_GRACE_S", "-1"),
        ("OVERDUE_ASKS", "0"),
        ("OVERDUE_ASK_WINDOW_S", "-1"),
        ("OVERDUE_RUNNING_MAX_H", "0"),
        ("LOCK_TIMEOUT_MS", "0"),
        ("STATEMENT_TIMEOUT_MS", "0"),
        ("IDLE_IN_TRANSACTION_TIMEOUT_MS", "0"),
        ("TRANSACTION_TIMEOUT_MS", "0"),
        ("TCP_USER_TIMEOUT_MS", "0"),
        ("LOG_FORMAT", "xml"),
        ("LOG_LEVEL", "loud"),
        *((name, value) for name in ("INTAKE_POLL_S", "OVERDUE_GRACE_S", "RETRY_EVERY_S") for value in ("nan", "inf")),
    ],
)
def test_setting_that_cannot_be_is_refused_by_its_name(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    """A value just outside of what is allowed is named with its variable; zero would switch a limit off."""
    monkeypatch.setenv(f"KINO_{name}", value)

    with pytest.raises(BadSettings, match=rf"^KINO_{name}: ") as refused:
        load_settings()

    assert "\n" not in str(refused.value)


def test_all_wrong_settings_are_named_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody has to start the program once for each mistake."""
    monkeypatch.setenv("KINO_OVERDUE_ASKS", "0")
    monkeypatch.setenv("KINO_LOG_LEVEL", "loud")

    with pytest.raises(BadSettings) as refused:
        load_settings()

    assert [part.partition(":")[0] for part in str(refused.value).split("; ")] == [
        "KINO_OVERDUE_ASKS",
        "KINO_LOG_LEVEL",
    ]


@pytest.mark.parametrize(
    "limits",
    [
        {},
        {
            "lock_timeout_ms": 1,
            "statement_timeout_ms": 1,
            "idle_in_transaction_timeout_ms": 1,
            "transaction_timeout_ms": 1,
            "tcp_user_timeout_ms": 1,
        },
        {"lock_timeout_ms": 900_000},
        {"statement_timeout_ms": 900_000},
        {"idle_in_transaction_timeout_ms": 900_000},
        {"transaction_timeout_ms": 900_000},
        {"tcp_user_timeout_ms": 900_000},
    ],
)
def test_worker_counts_as_alive_for_longer_than_it_can_hold_a_lock(limits: dict[str, Any]) -> None:
    """The alive TTL is longer than the sum of all limits of a session, whichever of them is changed."""
    settings = Settings(**limits)

    sum_ms = (
        settings.lock_timeout_ms
        + settings.statement_timeout_ms
        + settings.idle_in_transaction_timeout_ms
        + settings.transaction_timeout_ms
        + settings.tcp_user_timeout_ms
    )
    assert settings.session_limits.model_dump() == {
        name: getattr(settings, name) for name in settings.session_limits.model_dump()
    }
    assert settings.alive_ttl_s > sum_ms / 1000


def test_urls_are_not_shown_with_their_passwords(monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings that end up in a log or a traceback say that there is a URL, not which password is in it."""
    monkeypatch.setenv("KINO_DATABASE_URL", "postgresql://kino_worker:hunter2@db/kino")
    monkeypatch.setenv("KINO_MIGRATION_DATABASE_URL", "postgresql://kino_owner:hunter2@db/kino")
    monkeypatch.setenv("KINO_REDIS_URL", "redis://:hunter2@redis:6379/0")

    settings = load_settings()

    assert "hunter2" not in f"{settings!r} {settings} {settings.model_dump_json()}"
    assert settings.require_database_url() == "postgresql://kino_worker:hunter2@db/kino"
    assert settings.require_migration_database_url() == "postgresql://kino_owner:hunter2@db/kino"
    assert settings.require_redis_url() == "redis://:hunter2@redis:6379/0"


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgresql://kino_worker:hunter2@db:5432/kino", "postgresql://kino_worker:***@db:5432/kino"),
        ("postgresql://kino_worker@db/kino", "postgresql://kino_worker@db/kino"),
        ("redis://:hunter2@redis:6379/0", "redis://:***@redis:6379/0"),
        ("redis://redis:6379/0?password=hunter2", "redis://redis:6379/0"),
        ("postgresql://kino_worker@db/kino?password=hunter2", "postgresql://kino_worker@db/kino"),
    ],
)
def test_redacted_url_lacks_the_password_only(url: str, shown: str) -> None:
    """A message may say where we connect and as whom."""
    assert redacted(url) == shown


@pytest.mark.parametrize("value", [None, ""])
@pytest.mark.parametrize("name", ["DATABASE_URL", "MIGRATION_DATABASE_URL", "REDIS_URL"])
def test_missing_url_says_how_to_set_it(monkeypatch: pytest.MonkeyPatch, name: str, value: str | None) -> None:
    """Whoever forgot a URL reads its name, an example, and how to do without."""
    if value is not None:
        monkeypatch.setenv(f"KINO_{name}", value)

    with pytest.raises(BadSettings, match=rf"^KINO_{name} is not set; for example KINO_{name}=.*kino-refunds dev"):
        getattr(load_settings(), f"require_{name.lower()}")()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("DATABASE_URL", "localhost"),
        ("DATABASE_URL", "postgresql://kino_worker:hunter2@db:port/kino"),
        ("DATABASE_URL", "mysql://kino_worker:hunter2@db/kino"),
        ("DATABASE_URL", "postgresql+asyncpg://kino_worker:hunter2@db/kino"),
        ("MIGRATION_DATABASE_URL", "sqlite:///kino.db"),
        ("REDIS_URL", "localhost:6379"),
        ("REDIS_URL", "redis://:hunter2@redis:port/0"),
        ("REDIS_URL", "redis://:hunter2@redis:99999/0"),
        ("REDIS_URL", "redis://:hun/ter2@redis:6379/0"),
        ("REDIS_URL", "redis://:hunter2@redis:6379/0?foo=1"),
        ("DATABASE_URL", "postgresql://kino_worker:p@hunter2@db/kino"),
    ],
)
def test_url_that_cannot_be_used_is_refused_by_its_name(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    """A URL of another kind is a mistake in a setting: named, with an example, and without its password."""
    monkeypatch.setenv(f"KINO_{name}", value)

    with pytest.raises(BadSettings, match=rf"^KINO_{name} .*; for example ") as refused:
        getattr(load_settings(), f"require_{name.lower()}")()

    assert "hunter2" not in str(refused.value)


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("DATABASE_URL", "postgresql://kino_worker@db/kino?foo=1", "has options that Postgres does not know: foo"),
        ("REDIS_URL", "unix:///run/redis.sock", "is a Unix socket; connect by redis:// or rediss://"),
    ],
)
def test_url_with_what_cannot_be_is_refused(monkeypatch: pytest.MonkeyPatch, name: str, value: str, says: str) -> None:
    """What would fail at the first connection is named before it."""
    monkeypatch.setenv(f"KINO_{name}", value)

    with pytest.raises(BadSettings, match=rf"^KINO_{name} {re.escape(says)}"):
        getattr(load_settings(), f"require_{name.lower()}")()


def test_url_may_name_several_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the runbook gives for a failover is taken as it is."""
    url = "postgresql://kino_worker:x@/kino?host=a:5432&host=b:5432&target_session_attrs=read-write&sslmode=require"
    monkeypatch.setenv("KINO_DATABASE_URL", url)

    assert load_settings().require_database_url() == url


DURATIONS = [name for name in Settings.model_fields if name.endswith(("_s", "_ms", "_h", "_days"))]


@pytest.mark.parametrize("name", DURATIONS)
def test_duration_that_no_clock_can_hold_is_refused(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """A number meant in another unit is named at the start, instead of failing somewhere in a sweep."""
    monkeypatch.setenv(f"{PREFIX}{name.upper()}", "99999999999")

    with pytest.raises(BadSettings, match=rf"^{PREFIX}{name.upper()}: "):
        load_settings()


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("KINO_DATABASE_ULR", "KINO_DATABASE_URL"),
        ("KINO_REDIS", "KINO_REDIS_URL"),
        ("KINO_OVERDUE_GRACE", "KINO_OVERDUE_GRACE_S"),
        ("KINO_LOGLEVEL", "KINO_LOG_LEVEL"),
    ],
)
def test_unknown_name_is_found_with_the_nearest_known(monkeypatch: pytest.MonkeyPatch, name: str, nearest: str) -> None:
    """A setting that is spelled wrong would be ignored in silence; it is found, and so is what was meant."""
    monkeypatch.setenv(name, "x")
    monkeypatch.setenv("KINO_TRACE", "trace.csv")
    monkeypatch.setenv("KINO_LOG_LEVEL", "info")

    assert unknown_names() == [(name, f"did you mean {nearest}?")]


def test_a_setting_that_is_gone_is_told_with_where_it_went(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever had chosen a lot grace must not find another one in force without a word."""
    monkeypatch.setenv("KINO_LOT_GRACE_DAYS", "14")

    [(name, advice)] = unknown_names()

    assert name == "KINO_LOT_GRACE_DAYS"
    assert "kino-refunds migrate --lot-grace-days" in advice
