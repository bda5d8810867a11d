"""Clauses 1, 2 and 6 as tables, and which version of the policy an event is judged by."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from kino_refunds.errors import InvalidPolicy
from kino_refunds.events.schema import ErrorOrigin, SafetyStage
from kino_refunds.policy.automatic import Clause, Coverage, Reason, coverage_of
from kino_refunds.policy.document import Policy, PolicyDocument, clamped, make_policy, parse_policy, published_policy
from tests.scenario import KINDS, NOT_COVERED, REFUNDABLE, make_event

PUBLISHED = published_policy().versions[0]

# kind of event -> refund, reason, clause: an account in good standing.
CLAUSES = {
    "completed": (False, "completed", "1"),
    "failed platform": (True, "generation_failure", "2.failure"),
    "failed provider": (True, "generation_failure", "2.failure"),
    "failed unknown": (True, "generation_failure", "2.failure"),
    "failed user": (False, "not_covered", "2.failure"),
    "timeout": (True, "timeout", "2.timeout"),
    "timeout with result": (False, "not_covered", "2.timeout"),
    "safety before": (True, "content_policy_rejection", "2.safety"),
    "safety during": (True, "content_policy_rejection", "2.safety"),
    "safety after": (False, "not_covered", "2.safety"),
}


def verdict(refund: bool, reason: str, clause: str) -> Coverage:
    return Coverage(refund=refund, reason=Reason(reason), clause=Clause(clause))


def test_the_table_of_clauses_leaves_no_ending_out() -> None:
    """Every origin and every stage that an event can name has a row in the tables below."""
    named = {f"failed {origin.value}" for origin in ErrorOrigin}
    named |= {f"safety {stage.value.removesuffix('_generation')}" for stage in SafetyStage}

    assert set(CLAUSES) == set(KINDS) == named | {"completed", "timeout", "timeout with result"}


@pytest.mark.parametrize("kind", CLAUSES)
def test_an_ending_under_the_published_policy(kind: str) -> None:
    """Clauses 1 and 2: what is our failure comes back, what is the customer's or was delivered does not."""
    said = coverage_of(make_event(kind), PUBLISHED, terminated_for_violation=False)

    assert said == verdict(*CLAUSES[kind])


@pytest.mark.parametrize("kind", REFUNDABLE)
def test_a_termination_for_violation_forfeits_a_refund(kind: str) -> None:
    """Clause 6: an account that was terminated for violation gets nothing back, and the clause is cited."""
    said = coverage_of(make_event(kind), PUBLISHED, terminated_for_violation=True)

    assert said == verdict(False, "not_covered", "6.terminated")  # noqa: FBT003 - a row of the table


@pytest.mark.parametrize("kind", ["completed", *NOT_COVERED])
def test_what_was_not_refundable_anyway_cites_its_own_clause(kind: str) -> None:
    """Clause 6 is asked last: an ending that clause 2 does not cover is recorded under clause 2."""
    said = coverage_of(make_event(kind), PUBLISHED, terminated_for_violation=True)

    assert said == verdict(*CLAUSES[kind])


def test_the_document_decides_and_not_the_code() -> None:
    """A version that chooses otherwise in every figure gives the opposite of the published one."""
    opposite = parse_policy(
        toml(origins=["user"], timeout_with_result=True, stages=["after_generation"], terminated=False),
        name="opposite.toml",
    )

    refunded = {k for k in KINDS if coverage_of(make_event(k), opposite, terminated_for_violation=True).refund}

    assert refunded == {"failed user", "timeout", "timeout with result", "safety after"}


def test_the_published_document_says_what_the_policy_of_2025_12_14_says() -> None:
    """The figures that ship are the reading of clauses 2 and 6 that was agreed on."""
    shipped = published_policy()

    assert [document.model_dump() for document in shipped.versions] == [
        {
            "version": "2025-12-14",
            "effective_at": datetime(2025, 12, 14, tzinfo=UTC),
            "automatic": {
                "failure_origins": {ErrorOrigin.PLATFORM, ErrorOrigin.PROVIDER, ErrorOrigin.UNKNOWN},
                "timeout_with_result": False,
                "safety_stages": {SafetyStage.BEFORE_GENERATION, SafetyStage.DURING_GENERATION},
            },
            "exclusions": {"terminated_for_violation": True},
        }
    ]


FIRST_AT = datetime(2026, 1, 1, tzinfo=UTC)
SECOND_AT = datetime(2026, 6, 1, tzinfo=UTC)
INSTANT = timedelta(microseconds=1)


def document(version: str, effective_at: datetime) -> PolicyDocument:
    return PUBLISHED.model_copy(update={"version": version, "effective_at": effective_at})


TWO = make_policy([document("second", SECOND_AT), document("first", FIRST_AT)])


@pytest.mark.parametrize(
    ("instant", "version"),
    [
        (FIRST_AT - timedelta(days=400), "first"),
        (FIRST_AT - INSTANT, "first"),
        (FIRST_AT, "first"),
        (SECOND_AT - INSTANT, "first"),
        (SECOND_AT, "second"),
        (SECOND_AT + INSTANT, "second"),
        (SECOND_AT.astimezone(UTC) + timedelta(days=400), "second"),
    ],
)
def test_a_version_is_in_force_from_its_instant_on(instant: datetime, version: str) -> None:
    """A version starts at its own instant exactly, and before the first one the first one holds."""
    assert TWO.at(instant).version == version


@pytest.mark.parametrize(
    ("event_at", "opened_at", "now", "version"),
    [
        pytest.param(SECOND_AT, FIRST_AT, SECOND_AT, "second", id="event within"),
        pytest.param(SECOND_AT - INSTANT, FIRST_AT, SECOND_AT, "first", id="event just before the second"),
        pytest.param(FIRST_AT, SECOND_AT, SECOND_AT, "second", id="event before the charge"),
        pytest.param(FIRST_AT, SECOND_AT - INSTANT, SECOND_AT, "first", id="charge just before the second"),
        pytest.param(SECOND_AT, FIRST_AT, SECOND_AT - INSTANT, "first", id="event from the future"),
        pytest.param(SECOND_AT + INSTANT, FIRST_AT, SECOND_AT, "second", id="future event, second in force"),
        pytest.param(datetime.max.replace(tzinfo=UTC), FIRST_AT, FIRST_AT, "first", id="year 9999"),
        pytest.param(datetime.min.replace(tzinfo=UTC), SECOND_AT, SECOND_AT, "second", id="year 1"),
    ],
)
def test_a_publisher_s_clock_cannot_choose_the_policy(
    event_at: datetime, opened_at: datetime, now: datetime, version: str
) -> None:
    """The event's time is taken within [opened_at, now], so no clock reaches back before the customer paid."""
    chosen = TWO.at(clamped(event_at, opened_at=opened_at, now=now))

    assert chosen.version == version


def toml(
    *,
    version: str = "v",
    effective_at: str = "2026-01-01T00:00:00Z",
    origins: object = ("platform",),
    timeout_with_result: bool = False,
    stages: object = ("before_generation",),
    terminated: bool = True,
) -> str:
    def written(values: object) -> str:
        return str(list(values)) if isinstance(values, (list, tuple)) else repr(values)

    return f"""
        version = "{version}"
        effective_at = {effective_at}
        [automatic]
        failure_origins = {written(origins)}
        timeout_with_result = {str(timeout_with_result).lower()}
        safety_stages = {written(stages)}
        [exclusions]
        terminated_for_violation = {str(terminated).lower()}
    """


@pytest.mark.parametrize(
    ("text", "field"),
    [
        (toml(origins=["nobody"]), "automatic.failure_origins.0"),
        (toml(origins="platform"), "automatic.failure_origins"),
        (toml(stages=["later"]), "automatic.safety_stages.0"),
        (toml(effective_at="2026-01-01T00:00:00"), "effective_at"),
        (toml().replace("timeout_with_result = false", ""), "automatic.timeout_with_result"),
        (toml().replace("[exclusions]", "[exclusion]"), "exclusions"),
        (toml().replace("[exclusions]", "[exclusions]\nover_60_days = true"), "exclusions.over_60_days"),
        (toml().replace("version =", "name ="), "version"),
    ],
    ids=[
        "unknown origin",
        "origins as a string",
        "unknown stage",
        "naive instant",
        "figure missing",
        "section missing",
        "unknown figure",
        "version missing",
    ],
)
def test_a_document_that_is_wrong_names_file_and_field(text: str, field: str) -> None:
    """A policy with a mistake is refused with a sentence that says where the mistake is."""
    with pytest.raises(InvalidPolicy) as refused:
        parse_policy(text, name="draft.toml")

    said = str(refused.value)
    assert said.startswith("policy draft.toml: ")
    assert f"{field}: " in said


def test_a_document_with_two_mistakes_names_both() -> None:
    """Whoever mends a policy sees every mistake at once."""
    with pytest.raises(InvalidPolicy) as refused:
        parse_policy(toml(origins=["nobody"], stages=["later"]), name="draft.toml")

    said = str(refused.value)
    assert "automatic.failure_origins.0: " in said
    assert "automatic.safety_stages.0: " in said


def test_a_document_that_is_not_toml_names_its_file() -> None:
    """A file that cannot be read at all is refused by name too."""
    with pytest.raises(InvalidPolicy, match=r"^policy draft\.toml: not TOML: Invalid value"):
        parse_policy("version = ", name="draft.toml")


@pytest.mark.parametrize(
    ("documents", "field"),
    [
        ([document("v", FIRST_AT), document("v", SECOND_AT)], "version"),
        ([document("a", FIRST_AT), document("b", FIRST_AT)], "effective_at"),
    ],
)
def test_two_versions_cannot_claim_one_name_or_instant(documents: list[PolicyDocument], field: str) -> None:
    """Which version decided must be told from its name, and which is in force from the instant."""
    with pytest.raises(InvalidPolicy, match=f"the same {field}$"):
        make_policy(documents)


def test_there_is_always_a_policy() -> None:
    """Without any document nothing can be decided, so that is said at the start and not at the first event."""
    with pytest.raises(InvalidPolicy, match="there is no policy document"):
        make_policy([])


def test_versions_are_ordered_by_when_they_came_into_force() -> None:
    """The order in which files are found does not matter."""
    policy: Policy = make_policy([document("b", SECOND_AT), document("a", FIRST_AT)])

    assert [version.version for version in policy.versions] == ["a", "b"]
