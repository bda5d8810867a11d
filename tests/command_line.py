"""A command's result, for tests that run commands in their own process; the fixtures are in conftest.py."""

from __future__ import annotations

import json
from typing import Any, NamedTuple, Protocol


class Result(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        assert self.out.count("\n") == 1, "one document on one line"
        return json.loads(self.out)


class Run(Protocol):
    def __call__(self, *arguments: str, stdin: bytes = b"", **environment: str | None) -> Result: ...
