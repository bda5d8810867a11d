"""Policy documents: one TOML file for each version, validated when it is loaded, chosen by the time of the event."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING

from pydantic import AwareDatetime, BaseModel, ConfigDict, ValidationError

from kino_refunds.errors import InvalidPolicy
from kino_refunds.events.schema import ErrorOrigin, SafetyStage

if TYPE_CHECKING:
    from collections.abc import Iterable
    from datetime import datetime


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Automatic(_Section):
    """Clause 2: the endings that are refunded automatically."""

    failure_origins: frozenset[ErrorOrigin]
    timeout_with_result: bool
    safety_stages: frozenset[SafetyStage]


class Exclusions(_Section):
    """Clause 6: the accounts that are never refunded."""

    terminated_for_violation: bool


class PolicyDocument(_Section):
    """One published version of the refund policy: its name, its start, and its figures and choices."""

    version: str
    effective_at: AwareDatetime
    automatic: Automatic
    exclusions: Exclusions


@dataclass(frozen=True, slots=True)
class Policy:
    """Every published version, oldest first."""

    versions: tuple[PolicyDocument, ...]

    def at(self, instant: datetime) -> PolicyDocument:
        """Return the version in force at `instant`; before the first version, the first (design, section 5)."""
        chosen = self.versions[0]
        for version in self.versions[1:]:
            if version.effective_at <= instant:
                chosen = version
        return chosen


def clamped(event_at: datetime, *, opened_at: datetime, now: datetime) -> datetime:
    """Return the instant whose policy and account status apply to an event: its own time, within [opened_at, now].

    So the clock of a publisher cannot choose a policy from before the customer paid, or from the future.
    """
    return max(opened_at, min(event_at, now))


def parse_policy(text: str, *, name: str) -> PolicyDocument:
    """Return the document in `text`; raises InvalidPolicy, which names the file and every wrong field."""
    try:
        return PolicyDocument.model_validate(tomllib.loads(text))
    except tomllib.TOMLDecodeError as error:
        message = f"policy {name}: not TOML: {error}"
        raise InvalidPolicy(message) from error
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        message = f"policy {name}: {wrong}"
        raise InvalidPolicy(message) from error


def make_policy(documents: Iterable[PolicyDocument]) -> Policy:
    """Return the versions in the order of their start; raises InvalidPolicy if two have one name or one start."""
    versions = tuple(sorted(documents, key=lambda document: document.effective_at))
    for field in ("version", "effective_at"):
        values = [getattr(document, field) for document in versions]
        if len(set(values)) < len(values):
            message = f"two policy documents have the same {field}"
            raise InvalidPolicy(message)
    if not versions:
        message = "there is no policy document"
        raise InvalidPolicy(message)
    return Policy(versions)


@cache
def published_policy() -> Policy:
    """Return the policy that this build ships, from kino_refunds/policy/versions/*.toml; raises InvalidPolicy."""
    folder = files("kino_refunds.policy") / "versions"
    return make_policy(
        parse_policy(path.read_text(encoding="utf-8"), name=path.name)
        for path in folder.iterdir()
        if path.name.endswith(".toml")
    )
