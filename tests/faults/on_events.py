"""Faults of the events themselves, and of whoever is asked where they did not come."""

from __future__ import annotations

import socket
import threading
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from kino_refunds.events.schema import ErrorOrigin, SafetyStage
from kino_refunds.intake.gate import pause_intake, resume_intake
from kino_refunds.reconciliation.adapters import source_of
from kino_refunds.reconciliation.sources import Answer, JobState
from tests.faults.harness import scenario
from tests.faults.workload import CAPTURED, FAILED, KINDS, TIMED_OUT, Message
from tests.faults.world import World, require
from tests.malformed import MALFORMED, envelope
from tests.pipeline import Says

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

ANSWERS = {
    "completed": Answer(JobState.COMPLETED),
    "failed": Answer(JobState.FAILED, origin=ErrorOrigin.PLATFORM),
    "failed user": Answer(JobState.FAILED, origin=ErrorOrigin.USER),
    "timeout": Answer(JobState.TIMED_OUT),
    "rejected before": Answer(JobState.REJECTED, stage=SafetyStage.BEFORE_GENERATION),
}
UNKNOWN = Answer(JobState.UNKNOWN)
RUNNING = Answer(JobState.RUNNING)


class Truth(Says):
    """A job source that knows how each job of a workload ended."""

    def __init__(self, world: World) -> None:
        kinds = {m.job_id: m.event_id.removeprefix(f"{m.job_id}-") for m in world.workload.messages}
        super().__init__(lambda job_id: ANSWERS[kinds[job_id].replace("-", " ")])


# --- the events -----------------------------------------------------------------------------------------------


@scenario("duplicates", quick=True)
def everything_ten_times(world: World) -> None:
    """Every event comes ten times, in any order and both wire forms; each job is settled once (P2)."""
    messages = world.workload.some(30)
    world.open(messages)
    copies = messages * 10
    world.chance.shuffle(copies)
    world.publish(copies)
    world.faults["duplicates"] += len(copies) - len(messages)
    world.drain(world.intake(intake_batch=50))


@scenario("contradictions", quick=True)
def several_ends_of_one_job(world: World) -> None:
    """A job that failed, timed out and was rejected is refunded once; one that completed too is a break (P3)."""
    work, messages = world.workload, []
    for kind, ending in (("failed", FAILED), ("timeout", TIMED_OUT)):
        job = work.job(ending)
        messages += [work.event(job, each, at_s=index) for index, each in enumerate((kind, "rejected before"))]
        # Pushed last, but said to have happened after.
        messages.append(work.event(job, "completed", at_s=5))
        work.breaks.add(("completed_after_refund", job.job_id))
    world.open(messages)
    world.publish(messages)
    world.faults["contradictions"] += 4
    world.drain(world.intake())


@scenario("storm")
def storm(world: World) -> None:
    """Two thousand events at once, each three times, at two workers: every job is settled once (P1, P2)."""
    messages = world.workload.some(2_000)
    world.open(messages)
    copies = messages * 3
    world.chance.shuffle(copies)
    world.faults["duplicates"] += len(copies) - len(messages)
    world.start_worker()
    world.start_worker()
    world.publish(copies)
    world.settle_down()


@scenario("event before its charge", quick=True)
def events_before_their_charge(world: World) -> None:
    """Events that overtake their charges wait in Postgres, and settle once the charge is there (P6)."""
    messages = world.workload.some(20)
    world.publish([*messages, *messages[:5]])
    world.faults["event before its charge"] += len(messages)
    intake = world.intake()
    world.consume(intake)
    require(world.sql("SELECT count(*) FROM kino.pending_event")[0][0] == len(messages), "all of them wait")
    world.open(messages)
    world.drain(intake)


@scenario("event before its charge")
def beat_brings_everything_home(world: World) -> None:
    """With the real beat: early events find their charges, and jobs without an event are refunded as overdue (P9)."""
    settings = {
        "KINO_JOB_SOURCE": "none",
        "KINO_OVERDUE_EVERY_S": "1",
        "KINO_OVERDUE_GRACE_S": "0",
        "KINO_RETRY_EVERY_S": "1",
    }
    world.start_worker(**settings)
    world.start_beat(**settings)
    messages = world.workload.some(60)
    world.publish(messages)
    world.faults["event before its charge"] += len(messages)
    world.until(lambda: world.sql("SELECT count(*) FROM kino.pending_event")[0][0] == len(messages), "all of them wait")
    unheard = [world.workload.job(TIMED_OUT, overdue_s=60) for _ in range(10)]
    world.open(messages, unheard)
    world.settle_down()
    world.until(lambda: world.settled() == len(messages) + len(unheard), "refunds of jobs without an event")


@scenario("bad input", quick=True)
def everything_malformed(world: World) -> None:
    """Whatever cannot be understood is kept whole, on whichever queue it came, and no neighbour waits (P7, P8)."""
    work = world.workload
    messages = work.some(20)
    queues = sorted({message.queue for message in messages})
    raws = dict.fromkeys(raw for raw, _ in MALFORMED.values())
    noise = [work.add(Message(raw, queues[index % len(queues)], "", "", "", "dead")) for index, raw in enumerate(raws)]
    mixed = [*messages, *noise]
    world.chance.shuffle(mixed)
    world.open(messages)
    world.publish(mixed)
    world.faults["bad input"] += len(noise)
    world.drain(world.intake())


@scenario("several events in a message", quick=True)
def arrays_of_events(world: World) -> None:
    """Arrays of events, with copies and rubbish among them: each element is decided by itself, or kept (P2, P7, P8)."""
    work = world.workload
    messages = [work.event(work.job(KINDS[kind].ending), kind, wire="bare") for kind in [*KINDS] * 6]
    world.open(messages)
    bodies = [message.raw for message in messages]
    for start in range(0, len(bodies), 10):
        part = bodies[start : start + 10]
        array = b"[" + b",".join([*part, part[0], b'{"specversion":"1.0"}']) + b"]"
        raw = array if start % 20 else envelope(array)
        work.add(Message(raw, messages[start].queue, "", "", "", "dead"))
        world.redis.lpush(messages[start].queue, raw)
        work.published.update([raw, *part])
    world.faults["arrays"] += len(bodies) // 10
    world.drain(world.intake(intake_batch=7))


@scenario("several events in a message", quick=True)
def completions_that_nobody_can_read(world: World) -> None:
    """Completions that we hold in a message that cannot be read protect every job in it until they are settled (P9)."""
    work = world.workload
    messages = [work.event(work.job(CAPTURED, overdue_s=60), "completed", wire="bare") for _ in range(6)]
    world.open(messages)
    for start, glue in ((0, b"\n"), (2, b" "), (4, b"} {")):
        held = glue.join(message.raw for message in messages[start : start + 2])
        work.add(Message(held, messages[0].queue, "", "", "", "dead"))
        world.redis.lpush(messages[0].queue, held)
        work.published.add(held)
    world.faults["unreadable completions"] += 3
    intake = world.intake()
    world.consume(intake)
    # Known to a source, as far as the guard is asked: then nothing but the jobs' names protects them.
    for source, later_s in ((None, 1), (Says(lambda _: UNKNOWN), 2)):
        swept = world.sweep_overdue(source, later_s=later_s)
        require(sum(swept.withheld.values()) == len(messages), "every job of the messages is protected")
    require(world.settled() == 0, "no completed job is refunded")
    world.publish(messages)
    world.drain(intake)


# --- jobs without an event ------------------------------------------------------------------------------------


@scenario("overdue", quick=True)
def late_completion_after_an_overdue_refund(world: World) -> None:
    """A job that nobody knew of was refunded; its completion comes late: the refund stands, a person hears (P9)."""
    work = world.workload
    late = [work.event(work.job(TIMED_OUT, overdue_s=60), "completed") for _ in range(10)]
    world.open(late)
    for ask in range(1, 4):
        world.sweep_overdue(Says(lambda _: UNKNOWN), asks=3, later_s=ask)
        require(bool(world.settled()) == (ask == 3), "refunded after the third ask")
    world.publish([*late, *late])
    work.breaks.update(("completed_after_refund", message.job_id) for message in late)
    world.faults["late completion"] += len(late)
    world.drain(world.intake())


@scenario("overdue", quick=True)
def paused_past_every_deadline(world: World) -> None:
    """Intake is paused for longer than every deadline: nobody is refunded because we were behind (P9)."""
    work = world.workload
    # Said before the deadline, and said long after it: the first are older than the deadline, the others wait too.
    messages = work.some(20, overdue_s=60) + [
        work.event(work.job(CAPTURED, overdue_s=60), "completed", at_s=-30) for _ in range(10)
    ]
    world.open(messages)
    with world.engine.begin() as connection:
        pause_intake(connection, reason="maintenance", actor="somebody")
    world.faults["intake paused"] += 1
    require(
        world.sweep_overdue(None).withheld == {"intake_paused": len(messages)},
        "nothing is presumed while intake is paused, also where nothing waits",
    )
    world.publish(messages)
    intake = world.intake()
    for ask in range(1, 5):
        intake.run_once()
        world.sweep_overdue(None, later_s=ask)
        world.sweep_overdue(Says(lambda _: UNKNOWN), later_s=ask + 0.5)
    with world.engine.begin() as connection:
        resume_intake(connection, reason="done", actor="somebody")
    world.drain(intake)


@scenario("overdue", quick=True)
def backlog_past_every_deadline(world: World) -> None:
    """A backlog on the queues and a batch in flight: while older events wait, nobody is refunded as overdue (P9)."""
    messages = world.workload.some(30, overdue_s=60)
    world.open(messages)
    aged = [world.workload.event(world.workload.job(CAPTURED, overdue_s=60), "completed", at_s=-120) for _ in range(5)]
    world.open(aged)
    world.publish([*aged, *messages])
    queues = world.queues()
    queues.claim(10)
    world.faults["backlog"] += 1
    world.sweep_overdue(None)
    require(world.settled() == 0, "nobody is refunded while older events wait")
    world.drain(world.intake(queues=queues))


@scenario("job source", quick=True)
def source_that_errs(world: World) -> None:
    """A source that raises, stays silent, or speaks of other jobs has not answered: no verdict of ours (P9)."""
    work = world.workload
    messages = work.some(20, kinds=tuple(ANSWERS), overdue_s=60)
    world.open(messages)
    truth = Truth(world)
    bad = {message.job_id for message in messages[:5]}

    def refuse(job_ids: Sequence[str]) -> Mapping[str, Answer]:
        if bad & set(job_ids):
            raise OSError("the source is on fire")
        return truth.ask(job_ids)

    picky = Says(lambda _: None)
    world.sweep_overdue(picky, later_s=1)
    world.sweep_overdue(Says(lambda _: None), later_s=2)
    require(world.settled() == 0, "silence is no answer")
    picky.ask = refuse  # type: ignore[method-assign]
    for ask in range(3, 8):
        world.sweep_overdue(picky, later_s=ask)
    world.faults["source failed"] += 7
    require(world.settled() == len(messages) - len(bad), "all but the jobs that err are settled")
    world.sweep_overdue(truth, later_s=9)


@scenario("job source", quick=True)
def source_that_lies_and_changes_its_mind(world: World) -> None:
    """The first answer that ends a job stands; what contradicts it later, event or answer, is a break (P1, P3)."""
    work = world.workload
    lied = [work.event(work.job(CAPTURED, overdue_s=60), "failed") for _ in range(5)]
    wavering = [work.job(FAILED, overdue_s=60) for _ in range(5)]
    world.open(lied, wavering)
    waver = {job.job_id: iter((UNKNOWN, RUNNING, UNKNOWN, UNKNOWN, ANSWERS["failed"])) for job in wavering}

    def say(job_id: str) -> Answer:
        return next(waver[job_id], ANSWERS["completed"]) if job_id in waver else ANSWERS["completed"]

    for ask in range(1, 7):
        world.sweep_overdue(Says(say), asks=3, later_s=ask)
    world.faults["source lied"] += len(lied)
    world.publish(lied)
    work.breaks.update(("failed_after_capture", message.job_id) for message in lied)
    world.drain(world.intake())


@scenario("job source", quick=True)
def two_sweeps_with_two_answers(world: World) -> None:
    """Two sweeps at once, told different things: each job is settled once, by one of them (P1)."""
    work = world.workload
    jobs = [work.job(CAPTURED, FAILED, overdue_s=60) for _ in range(20)]
    world.open(jobs=jobs)
    both = threading.Barrier(2)

    def sweep(answer: Answer) -> None:
        def say(_: str) -> Answer:
            with suppress(threading.BrokenBarrierError):
                both.wait(2)
            return answer

        world.sweep_overdue(Says(say))

    threads = [threading.Thread(target=sweep, args=(ANSWERS[kind],)) for kind in ("completed", "failed")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    world.faults["two sweeps"] += 1
    world.settle_down()
    for kind, job_id in world.sql("SELECT kind, job_id FROM kino.break"):
        work.breaks.add((kind, job_id))


@contextmanager
def _endpoint(pieces: Sequence[bytes], pause_s: float) -> Iterator[tuple[int, threading.Event]]:
    """Serve HTTP badly: each connection gets these pieces, one after each pause, and then nothing.

    The event is set once somebody got them all.
    """
    served, closing = threading.Event(), threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            with suppress(OSError):
                while not closing.is_set():
                    client, _ = listener.accept()
                    threading.Thread(target=drip, args=(client,), daemon=True).start()

        def drip(client: socket.socket) -> None:
            with suppress(OSError), client:
                client.recv(65_536)
                for piece in pieces:
                    client.sendall(piece)
                    closing.wait(pause_s)
                if pieces:
                    served.set()
                closing.wait(30)

        threading.Thread(target=serve, daemon=True).start()
        try:
            yield listener.getsockname()[1], served
        finally:
            closing.set()


HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 4000\r\n\r\n"


def _ask_endpoint(world: World, pieces: Sequence[bytes]) -> None:
    messages = world.workload.some(3, kinds=("completed", "failed", "timeout"), overdue_s=60)
    world.open(messages)
    with _endpoint(pieces, 0.1) as (port, served):
        settings = world.settings(
            job_source="http",
            job_source_url=_Secret(f"http://127.0.0.1:{port}/jobs"),
            job_source_timeout_s=0.3,
        )
        with source_of(settings) as source:
            for ask in range(1, 4):
                world.sweep_overdue(source, later_s=ask)
        require(not served.is_set(), "the sweep gave up before the source had said all")
    world.faults["source hung"] += 1
    require(world.settled() == 0, "a source that hangs has not answered")
    world.sweep_overdue(Truth(world), later_s=9)


class _Secret:
    """A setting's value that is not logged."""

    def __init__(self, value: str) -> None:
        self._value = value

    def get_secret_value(self) -> str:
        return self._value


@scenario("job source", quick=True)
def source_that_hangs(world: World) -> None:
    """A source that takes the question and says nothing is given up; its jobs stay open until it answers (P9)."""
    _ask_endpoint(world, [])


@scenario("job source")
def source_that_drips(world: World) -> None:
    """A source that answers a byte at a time, for ever, is given up after its time-out too (P9)."""
    _ask_endpoint(world, [HEAD, *(b" " for _ in range(30))])
