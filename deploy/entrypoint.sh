#!/bin/sh
# The first word says what this container, unit or pod is; the rest is passed on.
set -eu
case "${1:-worker}" in
  worker)
    [ $# -eq 0 ] || shift
    exec celery --quiet -A workers.app worker "$@" ;;
  beat)
    shift
    # When it last did what. Losing this file is harmless: a slot that ran is a row in Postgres.
    exec celery --quiet -A workers.app beat --schedule "${BEAT_SCHEDULE_FILE:-/tmp/beat-schedule}" "$@" ;;
  *)
    exec kino-refunds "$@" ;;
esac
