"""The Celery app: `celery -A workers.app worker`, `celery -A workers.app beat`.

Events do not travel as Celery tasks. Intake claims them with its own scripts (workers/intake.py) inside the
worker process; Celery carries only the sweeps, each of which can be lost without harm, because the next
one finds what it left. Every option that touches delivery is written out, with its reason.
"""

from __future__ import annotations

import os
from typing import Any, NoReturn

from celery import Celery, bootsteps
from celery.signals import setup_logging

from kino_refunds.errors import BadSettings
from kino_refunds.events.connection import celery_settings
from kino_refunds.reconciliation.adapters import HOW_TO_CHOOSE, NONE_CHOSEN, source_of
from kino_refunds.settings import Settings, load_settings, unknown_names
from kino_refunds.telemetry.log import configure_logging, get_logger
from workers.bootstep import IntakeStep, one_line_for_bad_settings
from workers.schedule import beat_schedule

log = get_logger(__name__)

COPIED_BY_CELERY = {"BROKER_URL", "RESULT_BACKEND", "LOADER", "CONFIG_MODULE"}
"""Variables that Celery's command line copies to `CELERY_…` before it imports this module."""


def forget_celery_variables() -> list[str]:
    """Take Celery's own variables out of this process, and return the names of those that were set.

    They win over what is set here: under another broker no sweep would ever run, another configuration, loader or
    pool would run something else, and `CELERY_WORKER_QUEUES` is `--queues` (click makes a variable of every
    option). `--broker`, `--result-backend`, `--loader` and `--config` arrive here as variables too.
    """
    names = sorted(name for name in os.environ if name.startswith("CELERY_"))
    for name in names:
        del os.environ[name]
    return names + sorted(COPIED_BY_CELERY & os.environ.keys())


class KinoCelery(Celery):
    """Celery with no other configuration than what stands here and in KINO_* variables."""

    # Sweeps have no results; and a backend that is named here cannot be named elsewhere.
    backend_cls = "disabled"

    def config_from_cmdline(self, argv: list[str], namespace: str = "celery") -> NoReturn:
        """Refuse `-- broker.url=…`: Celery shows the text of a ValueError as a wrong usage."""
        raise ValueError(f"this app takes no {namespace} settings on its command line ({len(argv)} given); use KINO_*")


def read_settings() -> tuple[Settings, dict[str, Any]]:
    """Read the settings and what Celery's connections come to; one that is wrong ends this process with one line.

    Celery would show a traceback for an error while it imports this module.
    """
    with one_line_for_bad_settings():
        settings = load_settings()
        broker = celery_settings(
            settings.require_redis_url(),
            # Celery's own keys keep apart from the queues of the pipeline.
            global_keyprefix="kino:celery:",
            # Longer than any sweep: after this, a task that was fetched and not acknowledged comes again.
            visibility_timeout=3600,
            # Restored at the next look and not after the default of about 100 s.
            unacked_restore_throttle=1,
        )
    return settings, broker


settings, broker = read_settings()
ignored_variables = forget_celery_variables()
app = KinoCelery(
    "kino-refunds",
    include=["workers.tasks"],
    loader="celery.loaders.app:AppLoader",
    # Django's, which would take over where its settings are in the environment.
    fixups=[],
)
app.conf.update(
    # Celery's own connections follow the primary too, and verify certificates as ours do.
    **broker,
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
    if ignored_variables:
        log.warning("Celery's own settings are ignored; use KINO_* variables", names=ignored_variables)
    for name, advice in unknown_names():
        log.warning("unknown setting is ignored", name=name, advice=advice)
    _say_job_source()


def _say_job_source() -> None:
    """Log what keeps lost jobs from being found: an error or a warning at each start, and the process runs on."""
    try:
        with source_of(settings) as source:
            pass
    except BadSettings as error:
        # One line: it is the text that says what to set, and a traceback would bury it.
        log.error("overdue jobs are not asked about", error=str(error))  # noqa: TRY400
        return
    if source is None:
        log.warning("overdue jobs are not asked about", warning=NONE_CHOSEN, advice=HOW_TO_CHOOSE)
