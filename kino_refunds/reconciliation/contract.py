"""Contract tests for a job source: subclass, add the fixtures, and pytest runs them against your source.

class TestOurSource(JobSourceContract):
    @pytest.fixture
    def source(self): return OurSource(...)
    @pytest.fixture
    def known(self): return {"job-1": Answer(JobState.COMPLETED, finished_at=...), "job-2": Answer(JobState.RUNNING)}

Let `known` have a job of every state and detail that your source can answer, ids of every length and spelling that your
pipeline uses, and at least two jobs: each answer is compared as a whole.

A source that also lists finished jobs has a second contract:

class TestOurList(FinishedJobsContract):
    @pytest.fixture
    def source(self): return OurSource(...)
    @pytest.fixture
    def window(self): return since, until
    @pytest.fixture
    def listed(self): return [FinishedJob("job-1", Answer(JobState.COMPLETED, finished_at=...), "account-1", 8), ...]

Let `listed` be every job that finished in `window`, in order: at least three, of which two finished at one instant, and
let your source also know a job that finished just before the window, one that finished exactly at its end, and one that
still runs.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from kino_refunds.reconciliation.clocks import SKEW_MAX
from kino_refunds.reconciliation.finished import checked
from kino_refunds.reconciliation.sources import Answer, JobState, answers_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kino_refunds.reconciliation.finished import FinishedJob, FinishedSource
    from kino_refunds.reconciliation.sources import JobSource

NOBODY = "no-such-job-a41f0c"
LENGTHS = (1, 19, 20, 21, 36, 127, 128)
"""Lengths of ids that no job has: a column of a fixed length would return the others padded or cut."""


class JobSourceContract:
    """What the overdue sweep relies on; `known` maps some real job ids to what the source must say of them."""

    def test_known_jobs_are_answered_as_they_are(self, source: JobSource, known: dict[str, Answer]) -> None:
        """Each job that was asked for has its own answer, with origin, stage, result_produced and finished_at."""
        assert {job_id: source.ask(list(known))[job_id] for job_id in known} == known

    def test_each_job_is_answered_alone_as_among_others(self, source: JobSource, known: dict[str, Answer]) -> None:
        """A batch that fails is halved, so an answer must not depend on which other jobs were asked for."""
        assert {job_id: dict(source.ask([job_id])) for job_id in known} == {
            job_id: {job_id: answer} for job_id, answer in known.items()
        }

    def test_no_other_job_is_answered_for(self, source: JobSource, known: dict[str, Answer]) -> None:
        """Only the ids that were sent are returned, letter by letter: a padded or folded id is another job's."""
        for job_id in known:
            assert set(source.ask([job_id])) == {job_id}

    def test_a_like_id_is_not_the_job(self, source: JobSource, known: dict[str, Answer]) -> None:
        """An id that differs from a job's by white space or case is an unknown job."""
        likes = {like for each in known for like in (f"{each} ", f" {each}", each.upper(), each.lower(), each.title())}
        for like in sorted(likes - set(known)):
            assert dict(source.ask([like])) == {like: Answer(JobState.UNKNOWN)}

    def test_every_value_is_an_answer(self, source: JobSource, known: dict[str, Answer]) -> None:
        """The result is a mapping of text to Answer, as the sweep checks it."""
        asked = [NOBODY, *known]

        assert answers_of(source.ask(asked), asked) == {NOBODY: Answer(JobState.UNKNOWN), **known}

    def test_the_order_does_not_matter(self, source: JobSource, known: dict[str, Answer]) -> None:
        """Answers belong to ids and not to positions: asked in reverse, each job has its own answer."""
        assert dict(source.ask([*reversed(known)])) == known

    def test_a_job_asked_twice_is_answered_once(self, source: JobSource, known: dict[str, Answer]) -> None:
        """An id that is asked twice changes nothing."""
        assert dict(source.ask([*known, *known])) == known

    def test_an_unheard_of_job_is_unknown(self, source: JobSource) -> None:
        """A job that does not exist is answered `unknown`, which is not an error."""
        assert dict(source.ask([NOBODY])) == {NOBODY: Answer(JobState.UNKNOWN)}

    def test_an_unheard_of_job_is_unknown_whatever_its_length(self, source: JobSource) -> None:
        """An id of any length that an event may have is returned as it was sent, alone and among others."""
        ids = ["x" * length for length in LENGTHS]

        assert dict(source.ask(ids)) == dict.fromkeys(ids, Answer(JobState.UNKNOWN))

    def test_one_unheard_of_job_spoils_no_other_answer(self, source: JobSource, known: dict[str, Answer]) -> None:
        """An unknown job in a batch does not change the answers of the others."""
        assert dict(source.ask([NOBODY, *known])) == {NOBODY: Answer(JobState.UNKNOWN), **known}

    def test_a_whole_batch_is_answered(self, source: JobSource, known: dict[str, Answer]) -> None:
        """As many jobs as the sweep asks about at once are answered in one ask."""
        crowd = [f"{NOBODY}-{number}" for number in range(100 - len(known))]

        assert dict(source.ask([*known, *crowd])) == {**known, **dict.fromkeys(crowd, Answer(JobState.UNKNOWN))}

    def test_asking_again_gives_the_same(self, source: JobSource, known: dict[str, Answer]) -> None:
        """An ended job's answer, its time included, does not change from one ask to the next."""
        ended = {j for j, a in known.items() if a.state not in {JobState.RUNNING, JobState.UNKNOWN}}
        first, second = source.ask(list(known)), source.ask(list(known))
        assert {j: first[j] for j in ended} == {j: second[j] for j in ended}

    def test_hostile_ids_are_only_ids(self, source: JobSource) -> None:
        """Quotes, percent signs and statements in an id are looked up, not executed."""
        ids = ["' OR 1=1 --", "%s", "%", "_", "*", ":job_ids", '"; DROP TABLE job', "ünïcode 漢字"]
        assert dict(source.ask(ids)) == dict.fromkeys(ids, Answer(JobState.UNKNOWN))


TICK = timedelta(microseconds=1)
Interval = tuple[datetime, datetime]


class FinishedJobsContract:
    """What matching relies on; `listed` is every job that finished from `window[0]` to before `window[1]`, in order."""

    def test_every_job_is_listed_as_it_ended(
        self, source: FinishedSource, window: Interval, listed: Sequence[FinishedJob]
    ) -> None:
        """The list has each finished job with its ending, time, account and credits, and no other job."""
        assert {job.job_id: job for job in source.finished(*window)} == {job.job_id: job for job in listed}

    def test_the_list_is_in_order(
        self, source: FinishedSource, window: Interval, listed: Sequence[FinishedJob]
    ) -> None:
        """Jobs come by finished_at, and those of one instant by the characters of their ids: a reader goes on there."""
        places = [job.place for job in source.finished(*window)]

        assert places == sorted(places)
        assert len({place[0] for place in places}) < len(listed), "let two jobs finish at one instant"

    def test_no_job_is_listed_twice(self, source: FinishedSource, window: Interval) -> None:
        """A join that doubles rows would be counted twice."""
        places = [job.place for job in source.finished(*window)]

        assert len(set(places)) == len(places)

    def test_a_window_begins_at_since_and_ends_before_until(
        self, source: FinishedSource, listed: Sequence[FinishedJob]
    ) -> None:
        """A job that finished exactly at `since` is listed, one that finished exactly at `until` is not."""
        first, last = listed[0].finished_at, listed[-1].finished_at

        assert list(source.finished(first, last)) == [job for job in listed if job.finished_at < last]
        assert list(source.finished(last, last + TICK)) == [job for job in listed if job.finished_at == last]

    def test_two_windows_are_as_one(
        self, source: FinishedSource, window: Interval, listed: Sequence[FinishedJob]
    ) -> None:
        """Cut at the instant of any job, the two parts hold each job once."""
        since, until = window
        for cut in {job.finished_at for job in listed}:
            assert [*source.finished(since, cut), *source.finished(cut, until)] == list(listed)

    def test_an_empty_window_is_empty(self, source: FinishedSource, window: Interval) -> None:
        """Nothing finishes in no time."""
        assert list(source.finished(window[0], window[0])) == []

    def test_every_value_is_a_finished_job(self, source: FinishedSource, window: Interval) -> None:
        """The list passes the checks that matching makes of each job."""
        assert list(checked(source.finished(*window), since=window[0], until=window[1]))

    def test_ask_says_the_same(self, source: FinishedSource, listed: Sequence[FinishedJob]) -> None:
        """A job that is listed is answered with the same ending when it is asked about: a repair goes by that."""
        assert dict(source.ask([job.job_id for job in listed])) == {job.job_id: job.answer for job in listed}

    def test_listing_again_gives_the_same(
        self, source: FinishedSource, window: Interval, listed: Sequence[FinishedJob]
    ) -> None:
        """A job's ending and its time do not change from one list to the next."""
        assert list(source.finished(*window)) == list(source.finished(*window)) == list(listed)

    def test_the_promise_is_not_in_the_future(self, source: FinishedSource) -> None:
        """A source cannot know of jobs that have not finished yet."""
        promised = source.complete_through()

        assert promised is None or promised <= datetime.now(UTC) + SKEW_MAX
