"""Contract tests for a job source: subclass, give the fixtures, and pytest runs them against yours.

class TestOurSource(JobSourceContract):
    @pytest.fixture
    def source(self): return OurSource(...)
    @pytest.fixture
    def known(self): return {"job-1": Answer(JobState.COMPLETED), "job-2": Answer(JobState.RUNNING)}
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kino_refunds.reconciliation.sources import Answer, JobState

if TYPE_CHECKING:
    from kino_refunds.reconciliation.sources import JobSource

NOBODY = "no-such-job-a41f0c"


class JobSourceContract:
    """What the overdue sweep relies on; `known` maps some real job ids to what the source must say of them."""

    def test_known_jobs_are_answered_as_they_are(self, source: JobSource, known: dict[str, Answer]) -> None:
        """Each job that was asked for gets its own answer."""
        assert {job_id: source.ask(list(known))[job_id] for job_id in known} == known

    def test_an_unheard_of_job_is_unknown(self, source: JobSource) -> None:
        """A job that never was is `unknown`: said in so many words, and not an error."""
        assert dict(source.ask([NOBODY])) == {NOBODY: Answer(JobState.UNKNOWN)}

    def test_one_unheard_of_job_spoils_no_other_answer(self, source: JobSource, known: dict[str, Answer]) -> None:
        """An unknown job in a batch leaves the others' answers as they are."""
        assert dict(source.ask([NOBODY, *known])) == {NOBODY: Answer(JobState.UNKNOWN), **known}

    def test_asking_again_gives_the_same(self, source: JobSource, known: dict[str, Answer]) -> None:
        """An ended job's answer does not change from one ask to the next."""
        ended = {j for j, a in known.items() if a.state not in {JobState.RUNNING, JobState.UNKNOWN}}
        first, second = source.ask(list(known)), source.ask(list(known))
        assert {j: first[j] for j in ended} == {j: second[j] for j in ended}

    def test_hostile_ids_are_only_ids(self, source: JobSource) -> None:
        """Quotes, percent signs and statements in an id are looked up, not executed."""
        ids = ["' OR 1=1 --", "%s", ":job_ids", '"; DROP TABLE job', "ünïcode 漢字"]
        assert dict(source.ask(ids)) == dict.fromkeys(ids, Answer(JobState.UNKNOWN))
