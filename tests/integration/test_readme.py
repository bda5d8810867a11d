"""What the README says is run, or compared with what it speaks of."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import sqlalchemy as sa
from redis import Redis

from kino_refunds.db.engine import create_engine
from kino_refunds.events.envelope import parse
from kino_refunds.ledger import Balance, Grant, LotClass, balance, grant_lots
from kino_refunds.settings import PREFIX, Settings
from tests.conftest import Database

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")


def example(name: str) -> str:
    """The Python block behind a marker."""
    found = re.search(rf"<!-- example: {name} -->\n```python\n(.*?)```", README, re.DOTALL)
    assert found is not None, f"the README has no example {name}"
    return found[1]


def settings_table() -> str:
    rows = ["| variable | default | why |", "|---|---|---|"]
    for name, field in Settings.model_fields.items():
        default = "the installed version" if name == "build" else f"`{field.default}`"
        shown = "-" if field.default is None else default
        rows.append(f"| `{PREFIX}{name.upper()}` | {shown} | {field.description} |")
    return "\n".join(rows)


def test_publishing_example_puts_one_event_on_its_queue(redis_url: str, redis: Redis) -> None:
    """The README's publisher example is a whole program that publishes what it says."""
    exec(example("publish"), {"redis_url": redis_url})  # noqa: S102 - our own README

    (raw,) = redis.lrange("generation.job-failed", 0, -1)
    assert isinstance(raw, bytes)
    assert parse(raw).job_id == "job-42"


@pytest.mark.parametrize(("granted", "left"), [(10, Balance(2, 8)), (7, Balance(7, 0))])
def test_product_example_is_all_or_nothing(database: Database, granted: int, left: Balance) -> None:
    """The README's product example commits its job and its charge together, or neither of them."""
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
        exec(example("charge"), {"engine": engine, "sa": sa})  # noqa: S102 - our own README
    except Exception as error:  # noqa: BLE001 - which one is what is asserted
        raised = type(error).__name__
    else:
        raised = ""

    with engine.connect() as connection:
        jobs = connection.execute(sa.text("SELECT count(*) FROM app.job")).scalar_one()
        found = (raised, jobs, balance(connection, "acme"))
    engine.dispose()
    assert found == (("", 1, left) if granted >= 8 else ("InsufficientCredits", 0, left))


def test_settings_table_is_what_the_code_reads() -> None:
    """Every setting stands in the README with its default and its reason."""
    assert settings_table() in README
