"""What a dead letter holds beside the job that it names, and since when a message waits in Redis.

- `dead_letter.element_index`: a message may hold several events, and a letter be one of them.
- `dead_letter.other_job_ids`, `may_hold_others`: a completion that we hold and cannot read protects its job from a
  timed-out verdict of ours, also where it is not the first that the message names, or is not named at all.
- `waiting_message`: the overdue sweep's own memory of what waited in Redis when it looked.
"""

from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

# The default of may_hold_others is the safe one, for the rows that a build of before this migration writes while both
# run: such a letter holds back verdicts for an hour, and a charge that waits an hour longer is refunded all the same.
COLUMNS = """
ALTER TABLE kino.dead_letter
    ADD COLUMN element_index integer CHECK (element_index >= 0),
    ADD COLUMN other_job_ids text[] NOT NULL DEFAULT '{}',
    ADD COLUMN may_hold_others boolean NOT NULL DEFAULT true;
COMMENT ON COLUMN kino.dead_letter.element_index IS
    'the place, from 0, of the event in a message that holds several (raw is all of it); null: the whole message';
COMMENT ON COLUMN kino.dead_letter.other_job_ids IS 'jobs that the message names beside job_id';
COMMENT ON COLUMN kino.dead_letter.may_hold_others IS
    'the message may hold the end of a job that it does not name here';
"""

# Letters of before keep the default where the message was not understood: job_id is then the first job that could be
# read from it, and others may stand behind. An event that was understood names its one job. For the customer nothing
# is lost by an hour's wait, and for us a completion that we hold is not refunded; after an hour neither changes.
OLD_LETTERS = """
UPDATE kino.dead_letter SET may_hold_others = false
WHERE job_id IS NOT NULL
  AND reason IN ('apply_error', 'account_mismatch', 'conflicting_duplicate', 'charge_not_found', 'busy');
"""

INDEXES = """
CREATE INDEX dead_letter_open_others ON kino.dead_letter USING gin (other_job_ids) WHERE status = 'open';
CREATE INDEX dead_letter_open_nameless ON kino.dead_letter (last_seen_at) WHERE status = 'open' AND may_hold_others;
"""

WAITING = """
CREATE TABLE kino.waiting_message (
    digest            bytea PRIMARY KEY,
    first_seen_at     timestamptz NOT NULL,
    job_ids           text[] NOT NULL
);
COMMENT ON TABLE kino.waiting_message IS
    'messages that the overdue sweep found waiting in Redis at its last look, and since when it finds them there';
GRANT SELECT, INSERT, DELETE ON kino.waiting_message TO kino_worker;
"""


def upgrade() -> None:
    op.execute(COLUMNS)
    op.execute(OLD_LETTERS)
    op.execute(INDEXES)
    op.execute(WAITING)


def downgrade() -> None:
    message = "a letter of one event would be replayed as the whole message that it came in; restore a backup instead"
    raise NotImplementedError(message)
