"""The examples of the pages are run, and their tables are compared with what the program does."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from redis import Redis

from kino_refunds.db.engine import create_engine
from kino_refunds.events.envelope import parse
from kino_refunds.ledger import Balance, Grant, LotClass, balance, grant_lots, open_charge
from kino_refunds.policy.automatic import coverage_of
from kino_refunds.policy.document import published_policy
from kino_refunds.settings import PREFIX, Settings
from tests.conftest import Database
from tests.documents import DEPLOYMENT, LEDGER, PUBLISHING, example, text_of
from tests.node import run_node
from tests.scenario import EVENT_AT, KINDS, make_event

ENDINGS = {
    "completed": ["completed"],
    "failed, `origin` is `platform`, `provider` or `unknown`": ["failed platform", "failed provider", "failed unknown"],
    "failed, `origin` is `user`": ["failed user"],
    "timed out": ["timeout"],
    "timed out, `result_produced` is true": ["timeout with result"],
    "was rejected, `stage` is `before_generation` or `during_generation`": ["safety before", "safety during"],
    "was rejected, `stage` is `after_generation`": ["safety after"],
}
"""How the publishing page puts each of the endings that a job can have."""


def endings_table() -> str:
    """What the policy in force makes of every ending, as the rows of that page."""
    document = published_policy().at(EVENT_AT)
    verdicts = [
        (text, coverage_of(make_event(kind), document, terminated_for_violation=False))
        for text, kinds in ENDINGS.items()
        for kind in kinds
    ]
    rows = [
        f"| {text} | {'refunded' if each.refund else 'captured'} | `{each.clause.value}` |" for text, each in verdicts
    ]
    return "\n".join(dict.fromkeys(rows))


def settings_table() -> str:
    """Every setting with its default and its reason, as the deployment page shows them."""
    rows = ["| variable | default | why |", "|---|---|---|"]
    for name, field in Settings.model_fields.items():
        default = "the installed version" if name == "build" else f"`{field.default}`"
        shown = "-" if field.default is None else default
        rows.append(f"| `{PREFIX}{name.upper()}` | {shown} | {field.description} |")
    return "\n".join(rows)


def test_publishing_example_puts_one_event_on_its_queue(redis_url: str, redis: Redis) -> None:
    """The publisher example is a whole program that publishes what it says."""
    exec(example(PUBLISHING, "publish"), {"redis_url": redis_url})  # noqa: S102 - our own page

    (raw,) = redis.lrange("generation.job-failed", 0, -1)
    assert isinstance(raw, bytes)
    assert parse(raw).job_id == "job-42"


def test_node_example_puts_one_event_on_its_queue(node_folder: Path, redis_url: str, redis: Redis) -> None:
    """The example in Node is a whole program that publishes what it says, and ends."""
    program = node_folder / "publish.mjs"
    program.write_text(example(PUBLISHING, "publish.mjs"), encoding="utf-8")

    ended = run_node(program, KINO_REDIS_URL=redis_url)

    assert (ended.returncode, ended.stderr) == (0, "")
    (raw,) = redis.lrange("generation.job-failed", 0, -1)
    assert isinstance(raw, bytes)
    assert parse(raw).job_id == "job-42"


def test_redis_cli_example_puts_one_event_on_its_queue(redis: Redis) -> None:
    """The command for redis-cli, read as a shell reads it, publishes what it says."""
    program, *words = shlex.split(example(PUBLISHING, "redis-cli"))

    redis.execute_command(*words)  # type: ignore[no-untyped-call]

    assert program == "redis-cli"
    (raw,) = redis.lrange("generation.timeout", 0, -1)
    assert isinstance(raw, bytes)
    assert parse(raw).job_id == "job-43"


def test_granting_example_grants_once(database: Database) -> None:
    """The example of a grant gives the account its credits, and run again changes nothing."""
    engine = create_engine(database.url("kino_product"))

    for _ in range(2):
        exec(example(LEDGER, "grant"), {"engine": engine})  # noqa: S102 - our own page

    with engine.connect() as connection:
        found = balance(connection, "acme")
    engine.dispose()
    assert found == Balance(available=500, held=0)


@pytest.mark.parametrize(("granted", "left"), [(10, Balance(2, 8)), (7, Balance(7, 0))])
def test_product_example_is_all_or_nothing(database: Database, granted: int, left: Balance) -> None:
    """The product's example commits its job and its charge together, or neither of them."""
    owner_engine = sa.create_engine(database.url("postgres"), poolclass=sa.NullPool)
    with owner_engine.begin() as owner:
        owner.execute(sa.text("CREATE SCHEMA app"))
        owner.execute(sa.text("CREATE TABLE app.job (job_id text PRIMARY KEY, prompt text)"))
        owner.execute(sa.text("GRANT USAGE ON SCHEMA app TO kino_product"))
        owner.execute(sa.text("GRANT INSERT, SELECT ON app.job TO kino_product"))
    engine = create_engine(database.url("kino_product"))
    with engine.begin() as connection:
        grant_lots(connection, [Grant("order-1", "acme", granted, LotClass.PURCHASED)])

    try:
        exec(example(LEDGER, "charge"), {"engine": engine, "sa": sa})  # noqa: S102 - our own page
    except Exception as error:  # noqa: BLE001 - which one is what is asserted
        raised = type(error).__name__
    else:
        raised = ""

    with engine.connect() as connection:
        jobs = connection.execute(sa.text("SELECT count(*) FROM app.job")).scalar_one()
        found = (raised, jobs, balance(connection, "acme"))
    engine.dispose()
    assert found == (("", 1, left) if granted >= 8 else ("InsufficientCredits", 0, left))


def test_reading_example_reads_what_came_of_a_job(database: Database) -> None:
    """The product's example reads balance, statement and a job's status with the rights that it has."""
    engine = create_engine(database.url("kino_product"))
    with engine.begin() as connection:
        grant_lots(connection, [Grant("order-1", "acme", 10, LotClass.PURCHASED)])
        open_charge(connection, job_id="job-42", account_id="acme", credits=8, deadline_at=EVENT_AT)
    read: dict[str, Any] = {"engine": engine, "sa": sa}

    exec(example(LEDGER, "read"), read)  # noqa: S102 - our own page

    engine.dispose()
    assert read["now"] == Balance(available=2, held=8)
    assert [(line.kind, line.credits) for line in read["lines"]] == [("grant", 10), ("hold", -8)]
    assert tuple(read["charge"]) == ("open", 8, 0, None, None)


def test_endings_table_is_what_the_policy_says() -> None:
    """The publishing page says what the policy makes of each ending."""
    assert {kind for kinds in ENDINGS.values() for kind in kinds} == set(KINDS)
    assert len(endings_table().splitlines()) == len(ENDINGS)
    assert endings_table() in text_of(PUBLISHING)


def test_settings_table_is_what_the_code_reads() -> None:
    """Every setting stands in the deployment page with its default and its reason."""
    assert settings_table() in text_of(DEPLOYMENT)
