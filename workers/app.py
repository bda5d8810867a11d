"""The Celery app: `celery -A workers.app worker`, `celery -A workers.app beat`.

Events do not travel as Celery tasks. Intake claims them with its own scripts (workers/intake.py) inside the
worker process; Celery carries only the sweeps, each of which can be lost without harm, because the next
one finds what it left. Every option that touches delivery is written out, with its reason.
"""

from __future__ import annotations

from typing import Any

from celery import Celery, bootsteps
from celery.signals import setup_logging

from kino_refunds.log import configure_logging, get_logger
from kino_refunds.settings import load_settings, unknown_names
from workers.bootstep import IntakeStep, one_line_for_bad_settings
from workers.schedule import beat_schedule

with one_line_for_bad_settings():
    settings = load_settings()
    broker_url = settings.require_redis_url()
log = get_logger(__name__)

app = Celery("kino-refunds", broker=broker_url, include=["workers.tasks"])
app.conf.update(
    # Threads: the intake is a thread already, sweeps wait for Postgres, and a forked pool would share sockets.
    worker_pool="threads",
    worker_concurrency=2,
    # One sweep at a time in each thread; fetching more would only make them wait where nobody sees it.
    worker_prefetch_multiplier=1,
    # Acknowledged before it runs: a sweep that dies is made up by the next, one that is redelivered is a second.
    task_acks_late=False,
    task_reject_on_worker_lost=False,
    task_ignore_result=True,
    task_store_errors_even_if_ignored=False,
    task_default_queue="sweeps",
    task_serializer="json",
    accept_content=["json"],
    broker_connection_retry_on_startup=True,
    # For as long as Redis is away; a worker that gives up has to be started by a person.
    broker_connection_max_retries=None,
    # A full Redis, a replica, a missing ACL answer Celery with an error: it must not end the worker, whose
    # intake can still drain the queues.
    broker_channel_error_retry=True,
    broker_transport_options={
        # Celery's own keys keep apart from the queues of the pipeline.
        "global_keyprefix": "kino:celery:",
        # Longer than any sweep: after this, a task that was fetched and not acknowledged comes again.
        "visibility_timeout": 3600,
        # Restored at the next look and not after the default of about 100 s.
        "unacked_restore_throttle": 1,
        # A half-open connection must end; Redis answers within milliseconds.
        "socket_timeout": 10,
        "socket_connect_timeout": 5,
        "socket_keepalive": True,
        "health_check_interval": 25,
    },
    # Sweeps end within the session's time-outs; then the worker may go.
    worker_soft_shutdown_timeout=5.0,
    # Nobody steers workers through Redis: whoever can write there could stop them.
    worker_enable_remote_control=False,
    worker_send_task_events=False,
    task_send_sent_event=False,
    worker_hijack_root_logger=False,
    timezone="UTC",
    beat_schedule=beat_schedule(settings),
)


class AloneStep(bootsteps.Step):
    """Workers have nothing to say to each other, however they are started: no gossip, mingling, heartbeats or events.

    All of it would go through Redis, where users.acl does not let a worker PUBLISH: it would end at its start.
    """

    def __init__(self, parent: Any, **options: Any) -> None:
        super().__init__(parent, **options)
        # Read when the consumer is made, which is after every step of the worker.
        parent.task_events = False
        parent.options |= {"without_gossip": True, "without_mingle": True, "without_heartbeat": True}


app.steps["worker"] |= {IntakeStep, AloneStep}


@setup_logging.connect
def _configure_logging(**_: Any) -> None:
    configure_logging(settings)
    for name, nearest in unknown_names():
        log.warning("unknown setting is ignored", name=name, did_you_mean=nearest)
