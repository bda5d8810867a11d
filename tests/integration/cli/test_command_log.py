"""The log line of each command: its name, its end, who and how much, and nothing that was typed."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest
import structlog

from kino_refunds.cli.main import main
from tests.conftest import Database
from tests.scenario import Scene


def test_where_logs_are_collected_each_command_leaves_one_line(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, database: Database
) -> None:
    """The line names the command, how it ended and how long it took, and nothing that was typed behind it."""
    # The standard error of this test ends with it; loggers that were set up on it would outlive it.
    monkeypatch.setattr("structlog.configure", lambda **_: None)
    monkeypatch.setenv("KINO_LOG_FORMAT", "json")
    monkeypatch.setenv("KINO_DATABASE_URL", database.url())

    with pytest.raises(SystemExit) as ended:
        main(["retries", "show", "somebody's secret"])

    line = json.loads(capfd.readouterr().err.splitlines()[-1])
    assert (ended.value.code, line["event"], line["command"], line["exit_code"]) == (1, "command", "retries show", 1)
    assert "secret" not in json.dumps(line)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["publish", "-"], {"published": 0}),
        (["relay", "rewind", "--to", "2026-01-31T12:00:00Z", "--yes"], {"told_again": 0, "dry_run": False}),
        (["intake", "resume"], {}),
    ],
    ids=lambda each: each[0] if isinstance(each, list) else "",
)
def test_the_line_of_a_command_says_who_and_how_much(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, database: Database, scene: Scene,
    redis_url: str, arguments: list[str], told: dict[str, Any],
) -> None:  # fmt: skip
    """Also what no row can say who did it is known by its line, and the next command's line is its own."""
    scene.rows("INSERT INTO kino.relay_cursor (xid, charge_id) VALUES (kino.horizon(), 0) RETURNING 1")
    monkeypatch.setattr("structlog.configure", lambda **_: None)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO()))
    monkeypatch.setenv("KINO_LOG_FORMAT", "json")
    monkeypatch.setenv("KINO_DATABASE_URL", database.url())
    monkeypatch.setenv("KINO_REDIS_URL", redis_url)

    lines = []
    for each in ([*arguments, "--by", "bob"], ["retries", "list"]):
        with pytest.raises(SystemExit):
            main(each)
        line = json.loads(capfd.readouterr().err.splitlines()[-1])
        lines.append({name: line[name] for name in line.keys() - {"timestamp", "event", "command", "took_ms"}})
    structlog.contextvars.clear_contextvars()

    assert lines == [{"exit_code": 0, "actor": "bob"} | told, {"exit_code": 0}]
