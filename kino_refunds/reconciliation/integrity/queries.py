"""The queries: read from the files beside this one, each with the promise that it guards and what to do (README.md)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


class KeyScope(StrEnum):
    """What a query looks at one by one, by key. The words are stored in the subjects of breaks, so none changes."""

    CHARGE = "charge"
    JOB = "job"
    LOT = "lot"
    ACCOUNT = "account"
    LEDGER = "ledger"
    """Single rows anywhere, by a name in words: there is no key to look for them by, so every run asks for all."""


KEY_TYPES: Mapping[KeyScope, str] = {
    KeyScope.CHARGE: "bigint",
    KeyScope.JOB: "text",
    KeyScope.LOT: "bigint",
    KeyScope.ACCOUNT: "text",
}
"""The type of a key in Postgres, for each scope whose queries take keys."""


@dataclass(frozen=True, slots=True)
class Query:
    """One query: returns a row (key, charge_id, account_id, credits, sentence) for each impossible thing.

    `name` is the kind of the breaks that it finds. `cannot_be` says what it finds and `advice` what to do about it.
    `only_in_full`: another query finds the same row by row, so that an incremental run leaves this one out.
    `of_a_sample`: what it reads for a key does not follow what is new, so that an incremental run asks of some keys.
    """

    name: str
    promise: str
    scope: KeyScope
    topic: str
    cannot_be: str
    advice: str
    only_in_full: bool
    of_a_sample: bool
    text: str

    @property
    def of_everything(self) -> str:
        """The statement that looks at everything."""
        return _OF_LOTS.sub("true", _KEYS.sub("true", self.text))

    @property
    def of_keys(self) -> str:
        """The statement that looks at the keys in the parameter `:keys`, an array.

        A text of its own and not `:keys IS NULL OR ...`: for that a plan that is kept would read every row.
        """
        if self.scope is KeyScope.LEDGER:
            return self.of_everything
        wanted = f"CAST(:keys AS {KEY_TYPES[self.scope]}[])"
        return _OF_LOTS.sub(
            rf"\1 IN ({_ACCOUNTS.format(wanted=wanted)})", _KEYS.sub(rf"\1 = ANY ({wanted})", self.text)
        )


# A transfer is reached by account or charge, not by lot: an index more would cost every charge and every settlement.
_ACCOUNTS = "SELECT own.account_id FROM kino.credit_lot own WHERE own.lot_id = ANY ({wanted})"
_KEYS = re.compile(r"\bkeys\(([\w.]+)\)")
_OF_LOTS = re.compile(r"\bof_lots\(([\w.]+)\)")
_FIELD = re.compile(r"-- ([a-z ]+): (.*(?:\n--   .*)*)")


@cache
def all_queries() -> Sequence[Query]:
    """Return every query, in the order of the files."""
    folder = resources.files("kino_refunds.reconciliation.integrity")
    return tuple(
        query for scope in KeyScope for query in _parse(scope, (folder / f"{scope}.sql").read_text(encoding="utf-8"))
    )


def _parse(scope: KeyScope, text: str) -> list[Query]:
    _, *sections = re.split(r"^(?=-- name: )", text, flags=re.MULTILINE)
    return [_query(scope, section) for section in sections]


def _query(scope: KeyScope, section: str) -> Query:
    start = re.search(r"^(?!--)", section, re.MULTILINE)
    assert start is not None, "a query follows its header"
    header = {field[1]: re.sub(r"\n--   ", " ", field[2]) for field in _FIELD.finditer(section[: start.start()])}
    # The heading of the next group of queries stands after this query.
    text = re.sub(r"^--(?! ).*|^-- (?=[a-z ,]+$).*\Z", "", section[start.start() :].strip(), flags=re.MULTILINE)
    return Query(
        name=header["name"],
        promise=header["promise"],
        scope=scope,
        topic=header["topic"],
        cannot_be=header["cannot be"],
        advice=header["then"],
        only_in_full=header.get("runs") == "in full",
        of_a_sample=header.get("runs") == "of a sample",
        text=text.strip(),
    )


@dataclass(frozen=True, slots=True)
class Entry:
    """What the documentation says of one query."""

    name: str
    promise: str
    cannot_be: str
    advice: str


def describe() -> list[Entry]:
    """Return what each query finds and what to do about it, by promise and name: the runbook is made from this."""
    entries = [Entry(query.name, query.promise, query.cannot_be, query.advice) for query in all_queries()]
    return sorted(entries, key=lambda entry: (int(entry.promise[1:]), entry.name))
