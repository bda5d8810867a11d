"""The Celery app: `celery -A workers.app worker`, `celery -A workers.app beat`.

Events are not Celery tasks. Intake claims them with its own scripts (workers/intake.py) inside the worker process.
Celery carries only the sweeps. A sweep may be lost without harm, because the next one finds what it left. Every option
that affects delivery is written out, with its reason.
"""

from __future__ import annotations

import os
from typing import Any, NoReturn

from celery import Celery, bootsteps
from celery.signals import setup_logging

from kino_refunds.errors import BadSettings
from kino_refunds.events.broker import celery_settings
from kino_refunds.reconciliation.adapters import HOW_TO_CHOOSE, NONE_CHOSEN, source_of
from kino_refunds.settings import Settings, load_settings, unknown_names
from kino_refunds.telemetry.log import configure_logging, get_logger
from workers.bootstep import IntakeStep, one_line_for_bad_settings
from workers.schedule import beat_schedule

log = get_logger(__name__)

COPIED_BY_CELERY = {"BROKER_URL", "RESULT_BACKEND", "LOADER", "CONFIG_MODULE"}
"""Variables that Celery's command line copies to `CELERY_…` before it imports this module."""


def forget_celery_variables() -> list[str]:
    """Remove Celery's own variables from this process; return the names of those that were set.

    They would override the settings below: with another broker no sweep would run, with another configuration, loader
    or pool other code would run, and `CELERY_WORKER_QUEUES` is `--queues` (click reads a variable for every option).
    `--broker`, `--result-backend`, `--loader` and `--config` arrive here as variables too.
    """
    names = sorted(name for name in os.environ if name.startswith("CELERY_"))
    for name in names:
        del os.environ[name]
    return names + sorted(COPIED_BY_CELERY & os.environ.keys())


class KinoCelery(Celery):
    """Celery that is configured by this module and KINO_* variables only."""

    # Sweeps have no results, and a backend that is named here cannot be replaced from outside.
    backend_cls = "disabled"

    def config_from_cmdline(self, argv: list[str], namespace: str = "celery") -> NoReturn:
        """Raise ValueError for `-- broker.url=…`, whose text Celery shows as a usage error."""
        raise ValueError(f"this app takes no {namespace} settings on its command line ({len(argv)} given); use KINO_*")


def read_settings() -> tuple[Settings, dict[str, Any]]:
    """Return the settings, and Celery's broker settings from them; a wrong setting ends this process with one line.

    Celery would show a traceback for an error that occurs while it imports this module.
    """
    with one_line_for_bad_settings():
        settings = load_settings()
        broker = celery_settings(
            settings.require_redis_url(),
            # A prefix keeps Celery's own keys apart from the pipeline's queues.
            global_keyprefix="kino:celery:",
            # Longer than any sweep: after this time a task that was fetched and not acknowledged is delivered again.
            visibility_timeout=3600,
            # Such a task is restored at the next poll, and not after the default of about 100 s.
            unacked_restore_throttle=1,
        )
    return settings, broker


settings, broker = read_settings()
ignored_variables = forget_celery_variables()
app = KinoCelery(
    "kino-refunds",
    include=["workers.tasks"],
    loader="celery.loaders.app:AppLoader",
    # No Django fixup: it would take over if Django's settings are in the environment.
    fixups=[],
)
app.conf.update(
    # With these, Celery's own connections follow the primary and verify certificates, as ours do.
    **broker,
    # Threads: intake is a thread already, sweeps mostly wait for Postgres, and a forked pool would share sockets.
    worker_pool="threads",
    # One thread for retries, one for overdue jobs and what is quick, one for the checks, which may read for long.
    worker_concurrency=3,
    # One sweep at a time in each thread. More fetched tasks would wait inside the worker, where no command shows them.
    worker_prefetch_multiplier=1,
    # Acknowledged before it runs: a sweep that dies is replaced by the next one, and a redelivery would run it twice.
    task_acks_late=False,
    task_reject_on_worker_lost=False,
    task_ignore_result=True,
    task_store_errors_even_if_ignored=False,
    task_default_queue="sweeps",
    task_serializer="json",
    accept_content=["json"],
    broker_connection_retry_on_startup=True,
    # Without a limit, for as long as Redis is away: a person would have to start a worker that gave up.
    broker_connection_max_retries=None,
    # A full Redis, a replica or a missing ACL answers Celery with an error. It must not end the worker, because its
    # intake can still drain the queues.
    broker_channel_error_retry=True,
    # Sweeps end within the session's timeouts; then the worker may stop.
    worker_soft_shutdown_timeout=5.0,
    # No remote control: any client that can write to Redis could stop the workers.
    worker_enable_remote_control=False,
    worker_send_task_events=False,
    task_send_sent_event=False,
    worker_hijack_root_logger=False,
    timezone="UTC",
    beat_schedule=beat_schedule(settings),
)


class AloneStep(bootsteps.Step):
    """Switches off gossip, mingle, heartbeats and events between workers, however they are started.

    These features publish through Redis, and users.acl does not let a worker PUBLISH: the worker would end at its
    start.
    """

    def __init__(self, parent: Any, **options: Any) -> None:
        super().__init__(parent, **options)
        # Celery reads these when it creates the consumer, which is after every step of the worker.
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
    _log_job_source()


def _log_job_source() -> None:
    """Log at each start, as an error or a warning, what keeps lost jobs from being found; the process runs on."""
    try:
        with source_of(settings) as source:
            pass
    except BadSettings as error:
        # One line, because the error's text says what to set, and a traceback would hide it.
        log.error("overdue jobs are not asked about", error=str(error))  # noqa: TRY400
        return
    if source is None:
        log.warning("overdue jobs are not asked about", warning=NONE_CHOSEN, advice=HOW_TO_CHOOSE)
