-- What cannot be of one charge: its lines, its transfers, how it ended, and what says that it is open.
-- How to read a query: README.md, beside this file.

-- charges and their lines

-- name: charge_differs_from_lines
-- promise: P4
-- topic: charges
-- cannot be: A charge took another number of credits than its lines say.
-- then: Compare the charge's hold transfers with its lines. The product's own record says what the job cost.
WITH line AS (
    SELECT l.charge_id, sum(l.credits) AS credits FROM kino.charge_line l WHERE keys(l.charge_id) GROUP BY l.charge_id
), charge AS (
    SELECT * FROM kino.charge c WHERE keys(c.charge_id)
)
SELECT charge_id AS key, charge_id, c.account_id, abs(coalesce(c.credits, 0) - coalesce(l.credits, 0)) AS credits,
       'charge ' || charge_id || ' took ' || coalesce(c.credits::text, 'no row') || ' credits, its lines say '
       || coalesce(l.credits, 0) AS sentence
FROM charge c FULL JOIN line l USING (charge_id)
WHERE c.credits IS DISTINCT FROM coalesce(l.credits, 0)

-- name: charge_lines_misnumbered
-- promise: P4
-- topic: charges
-- cannot be: A charge's lines are not numbered from 1 on, or two of them name one lot.
-- then: A line was added or lost. Compare the charge's hold transfers with its lines.
SELECT l.charge_id AS key, l.charge_id, NULL AS account_id, sum(l.credits) AS credits,
       'the lines of charge ' || l.charge_id || ' are not numbered 1 to ' || count(*) || ', a lot each' AS sentence
FROM kino.charge_line l WHERE keys(l.charge_id)
GROUP BY l.charge_id
HAVING min(l.seq) <> 1 OR max(l.seq) <> count(*) OR count(DISTINCT l.lot_id) <> count(*)

-- name: charge_took_from_a_strangers_lot
-- promise: P4
-- topic: charges
-- cannot be: A charge took credits from a lot of another account, or from a lot that does not exist.
-- then: Find out which customer paid. Settling refuses such a charge (KR010), so its job stays open until it is mended.
SELECT l.charge_id AS key, l.charge_id, c.account_id, l.credits,
       'charge ' || l.charge_id || ' took from lot ' || l.lot_id || ', which is not its account''s' AS sentence
FROM kino.charge_line l
JOIN kino.charge c ON c.charge_id = l.charge_id
LEFT JOIN kino.credit_lot o ON o.lot_id = l.lot_id
WHERE keys(l.charge_id) AND o.account_id IS DISTINCT FROM c.account_id

-- name: charge_without_account
-- promise: P4
-- topic: charges
-- cannot be: A charge is of an account that does not exist.
-- then: Find out whose job it is; the account's row was deleted, or the charge's account was changed.
SELECT c.charge_id AS key, c.charge_id, c.account_id, c.credits,
       'charge ' || c.charge_id || ' is of account ' || c.account_id || ', which does not exist' AS sentence
FROM kino.charge c
WHERE keys(c.charge_id) AND NOT EXISTS (SELECT FROM kino.account a WHERE a.account_id = c.account_id)

-- how charges ended

-- name: charge_lacks_transfer
-- promise: P1
-- topic: charges
-- cannot be: A charge lacks a transfer that its lines and its end ask for.
-- then: Credits did not move as the settlement says. Look at `why JOB`; nothing repairs this by itself.
WITH due AS (
    SELECT l.charge_id, l.lot_id, l.credits, 'hold' AS kind FROM kino.charge_line l WHERE keys(l.charge_id)
    UNION ALL
    SELECT l.charge_id, l.lot_id, l.credits, CASE s.kind WHEN 'captured' THEN 'capture' ELSE 'refund' END
    FROM kino.charge_line l JOIN kino.settlement s ON s.charge_id = l.charge_id WHERE keys(l.charge_id)
    UNION ALL
    SELECT l.charge_id, l.lot_id, l.credits, 'reversal'
    FROM kino.charge_line l JOIN kino.correction k ON k.charge_id = l.charge_id WHERE keys(l.charge_id)
)
SELECT d.charge_id AS key, d.charge_id, NULL AS account_id, d.credits,
       'charge ' || d.charge_id || ' lacks a ' || d.kind || ' of ' || d.credits || ' credits of lot ' || d.lot_id
       AS sentence
FROM (SELECT * FROM due
      EXCEPT ALL
      SELECT t.charge_id, t.lot_id, t.credits, t.kind FROM kino.transfer t
      WHERE keys(t.charge_id) AND t.kind IN ('hold', 'capture', 'refund', 'reversal')) AS d

-- name: charge_has_uncalled_for_transfer
-- promise: P1
-- topic: charges
-- cannot be: A charge has a transfer that its lines and its end do not ask for.
-- then: Credits moved without a reason, perhaps twice. Look at `why JOB`; nothing repairs this by itself.
WITH due AS (
    SELECT l.charge_id, l.lot_id, l.credits, 'hold' AS kind FROM kino.charge_line l WHERE keys(l.charge_id)
    UNION ALL
    SELECT l.charge_id, l.lot_id, l.credits, CASE s.kind WHEN 'captured' THEN 'capture' ELSE 'refund' END
    FROM kino.charge_line l JOIN kino.settlement s ON s.charge_id = l.charge_id WHERE keys(l.charge_id)
    UNION ALL
    SELECT l.charge_id, l.lot_id, l.credits, 'reversal'
    FROM kino.charge_line l JOIN kino.correction k ON k.charge_id = l.charge_id WHERE keys(l.charge_id)
)
SELECT coalesce(d.charge_id, 0) AS key, d.charge_id, NULL AS account_id, d.credits,
       'charge ' || coalesce(d.charge_id::text, '?') || ' has an uncalled-for ' || d.kind || ' of ' || d.credits
       || ' credits of lot ' || d.lot_id AS sentence
FROM (SELECT t.charge_id, t.lot_id, t.credits, t.kind FROM kino.transfer t
      WHERE keys(t.charge_id) AND t.kind IN ('hold', 'capture', 'refund', 'reversal')
      EXCEPT ALL
      SELECT * FROM due) AS d

-- name: settlement_without_charge
-- promise: P1
-- topic: charges
-- cannot be: A settlement is of a charge that does not exist.
-- then: The charge's row was deleted, or the settlement names another one. Restore it from a backup.
SELECT s.charge_id AS key, s.charge_id, NULL AS account_id, 0 AS credits,
       'settlement of charge ' || s.charge_id || ', which does not exist' AS sentence
FROM kino.settlement s
WHERE keys(s.charge_id) AND NOT EXISTS (SELECT FROM kino.charge c WHERE c.charge_id = s.charge_id)

-- name: correction_without_capture
-- promise: P1
-- topic: charges
-- cannot be: A correction is of a charge that is not captured.
-- then: The customer may have been refunded twice. Look at `why JOB`.
SELECT k.charge_id AS key, k.charge_id, NULL AS account_id, 0 AS credits,
       'correction of charge ' || k.charge_id || ', which is not captured' AS sentence
FROM kino.correction k
WHERE keys(k.charge_id)
  AND NOT EXISTS (SELECT FROM kino.settlement s WHERE s.charge_id = k.charge_id AND s.kind = 'captured')

-- name: charge_returned_too_much
-- promise: P4
-- topic: charges
-- cannot be: A charge got back more credits of a lot than it took from that lot.
-- then: The customer has credits that were never paid. Find the second refund or reversal by `why JOB`.
SELECT r.charge_id AS key, r.charge_id, NULL AS account_id, r.got - r.took AS credits,
       'charge ' || r.charge_id || ' got back ' || r.got || ' credits of lot ' || r.lot_id || ' and took ' || r.took
       AS sentence
FROM (SELECT t.charge_id, t.lot_id,
             coalesce(sum(t.credits) FILTER (WHERE t.kind IN ('refund', 'reversal')), 0) AS got,
             coalesce(sum(t.credits) FILTER (WHERE t.kind = 'hold'), 0) AS took
      FROM kino.transfer t WHERE t.charge_id IS NOT NULL AND keys(t.charge_id) GROUP BY t.charge_id, t.lot_id) AS r
WHERE r.got > r.took

-- name: charge_lapsed_too_much
-- promise: P4
-- topic: charges
-- cannot be: What a charge's refund voided or expired at once is not what it returned to that lot.
-- then: Credits left the wallet without a reason, or stayed without one. Compare the charge's transfers with `why JOB`.
SELECT v.charge_id AS key, v.charge_id, NULL AS account_id, abs(v.gone - v.got) AS credits,
       'charge ' || v.charge_id || ' voided or expired ' || v.gone || ' credits of lot ' || v.lot_id
       || ' and got back ' || v.got AS sentence
FROM (SELECT t.charge_id, t.lot_id,
             coalesce(sum(t.credits) FILTER (WHERE t.kind IN ('void', 'expire')), 0) AS gone,
             coalesce(sum(t.credits) FILTER (WHERE t.kind IN ('refund', 'reversal') AND t.to_lot_id IS NULL), 0) AS got
      FROM kino.transfer t WHERE t.charge_id IS NOT NULL AND keys(t.charge_id) GROUP BY t.charge_id, t.lot_id) AS v
WHERE v.gone NOT IN (0, v.got)

-- name: charge_transfer_of_another_account
-- promise: P4
-- topic: charges
-- cannot be: A charge's transfer is of another account than its charge or its lot.
-- then: Credits stand in the books of the wrong customer. Find both customers before anything is moved.
SELECT t.charge_id AS key, t.charge_id, t.account_id, t.credits,
       'transfer ' || t.transfer_id || ' is of account ' || t.account_id || ', its lot or charge of another' AS sentence
FROM kino.transfer t
LEFT JOIN kino.credit_lot l ON l.lot_id = t.lot_id
LEFT JOIN kino.charge c ON c.charge_id = t.charge_id
WHERE t.charge_id IS NOT NULL AND keys(t.charge_id)
  AND (l.account_id IS DISTINCT FROM t.account_id OR c.account_id IS DISTINCT FROM t.account_id)

-- name: refund_into_a_strange_lot
-- promise: P4
-- topic: charges
-- cannot be: A transfer moves credits from a lot into one that is not its successor.
-- then: The customer's credits may have the wrong class or expiry. Compare both lots.
SELECT t.charge_id AS key, t.charge_id, t.account_id, t.credits,
       'transfer ' || t.transfer_id || ' moves credits of lot ' || t.lot_id || ' into lot ' || t.to_lot_id
       || ', which is not its successor' AS sentence
FROM kino.transfer t LEFT JOIN kino.credit_lot s ON s.lot_id = t.to_lot_id
WHERE t.to_lot_id IS NOT NULL AND t.charge_id IS NOT NULL AND keys(t.charge_id)
  AND (t.kind NOT IN ('refund', 'reversal') OR s.successor_of IS DISTINCT FROM t.lot_id)

-- what is open

-- name: open_charge_without_row
-- promise: P9
-- topic: charges
-- cannot be: A charge is not settled and has no row in open_charge.
-- then: No sweep looks for its end: the job must be settled by an event (`publish`), or its row be put back.
SELECT c.charge_id AS key, c.charge_id, c.account_id, c.credits,
       'charge ' || c.charge_id || ' is open, and nothing looks for its end: it has no row in open_charge' AS sentence
FROM kino.charge c
WHERE keys(c.charge_id)
  AND NOT EXISTS (SELECT FROM kino.settlement s WHERE s.charge_id = c.charge_id)
  AND NOT EXISTS (SELECT FROM kino.open_charge o WHERE o.charge_id = c.charge_id)

-- name: open_charge_row_without_open_charge
-- promise: P9
-- topic: charges
-- cannot be: A row in open_charge is of a charge that is settled or does not exist.
-- then: The account's held balance is too high. The row can go, by a person with the owner's rights.
SELECT o.charge_id AS key, o.charge_id, o.account_id, o.credits,
       'charge ' || o.charge_id || ' has a row in open_charge and '
       || CASE WHEN c.charge_id IS NULL THEN 'does not exist' ELSE 'is settled' END AS sentence
FROM kino.open_charge o LEFT JOIN kino.charge c ON c.charge_id = o.charge_id
WHERE keys(o.charge_id)
  AND (c.charge_id IS NULL OR EXISTS (SELECT FROM kino.settlement s WHERE s.charge_id = o.charge_id))

-- name: open_charge_row_differs
-- promise: P9
-- topic: charges
-- cannot be: A charge and its row in open_charge differ in account, credits or deadline.
-- then: The account's held balance, or when the job counts as overdue, is wrong. The charge's row is the fact.
SELECT o.charge_id AS key, o.charge_id, o.account_id, greatest(o.credits, c.credits) AS credits,
       'charge ' || o.charge_id || ' and its row in open_charge differ' AS sentence
FROM kino.open_charge o JOIN kino.charge c ON c.charge_id = o.charge_id
WHERE keys(o.charge_id)
  AND (o.account_id, o.deadline_at, o.credits) IS DISTINCT FROM (c.account_id, c.deadline_at, c.credits)

-- why charges ended

-- name: settlement_cites_wrong_clause
-- promise: P10
-- topic: charges
-- cannot be: A settlement's kind, reason and clause do not go together, as in a refund by clause 1 or 6.terminated.
-- then: Judge the job again by its event (`why JOB`). A wrong capture is mended by a correction.
SELECT s.charge_id AS key, s.charge_id, c.account_id, coalesce(c.credits, 0) AS credits,
       'charge ' || s.charge_id || ' was ' || s.kind || ' as ' || s.reason || ' by clause ' || s.clause
       || CASE WHEN s.clause = '6.terminated' AND s.account_status <> 'terminated_for_violation'
               THEN ' with an account that was ' || s.account_status ELSE '' END
       || ', which never go together' AS sentence
FROM kino.settlement s LEFT JOIN kino.charge c ON c.charge_id = s.charge_id
WHERE keys(s.charge_id) AND NOT CASE s.kind
    WHEN 'captured' THEN (s.reason, s.clause) IN (('completed', '1'), ('not_covered', '2.failure'),
        ('not_covered', '2.timeout'), ('not_covered', '2.safety'))
        OR (s.reason, s.clause) = ('not_covered', '6.terminated')
           AND coalesce(s.account_status, 'terminated_for_violation') = 'terminated_for_violation'
    ELSE (s.reason, s.clause) IN (('generation_failure', '2.failure'), ('timeout', '2.timeout'),
        ('content_policy_rejection', '2.safety')) END

-- name: correction_cites_wrong_clause
-- promise: P10
-- topic: charges
-- cannot be: A correction's reason and clause do not go together.
-- then: Find out why the capture was reversed; the correction names the ticket and the person.
SELECT k.charge_id AS key, k.charge_id, c.account_id, coalesce(c.credits, 0) AS credits,
       'the correction of charge ' || k.charge_id || ' is for ' || k.reason || ' by clause ' || k.clause
       || ', which never go together' AS sentence
FROM kino.correction k LEFT JOIN kino.charge c ON c.charge_id = k.charge_id
WHERE keys(k.charge_id)
  AND (k.reason, k.clause) NOT IN (('generation_failure', '2.failure'), ('timeout', '2.timeout'),
                                   ('content_policy_rejection', '2.safety'))

-- name: transfer_gives_another_reason
-- promise: P10
-- topic: charges
-- cannot be: A charge's transfer gives another reason than the settlement or correction that it belongs to.
-- then: The customer's statement and the settlement disagree. Judge the job again by its event (`why JOB`).
SELECT t.charge_id AS key, t.charge_id, t.account_id, t.credits,
       'transfer ' || t.transfer_id || ' (' || t.kind || ') gives ' || coalesce(t.reason, 'no reason')
       || ', charge ' || t.charge_id || ' asks for ' || coalesce(due.reason, 'none') AS sentence
FROM kino.transfer t
LEFT JOIN kino.settlement s ON s.charge_id = t.charge_id
LEFT JOIN kino.correction k ON k.charge_id = t.charge_id
CROSS JOIN LATERAL (SELECT CASE t.kind WHEN 'capture' THEN s.reason WHEN 'refund' THEN s.reason
                                       WHEN 'reversal' THEN k.reason WHEN 'expire' THEN 'expired' END AS reason) AS due
WHERE t.charge_id IS NOT NULL AND keys(t.charge_id)
  AND t.kind IN ('hold', 'capture', 'refund', 'reversal', 'expire')
  AND CASE t.kind WHEN 'hold' THEN true WHEN 'reversal' THEN k.charge_id IS NOT NULL
                  WHEN 'expire' THEN true ELSE s.charge_id IS NOT NULL END
  AND t.reason IS DISTINCT FROM due.reason

-- name: transfer_names_a_cause
-- promise: P4
-- topic: charges
-- cannot be: A hold, capture, refund or reversal names a cause, as only voids do.
-- then: The end of that cause may bring credits back that it never took. Find out who wrote the transfer.
SELECT t.charge_id AS key, t.charge_id, t.account_id, t.credits,
       'transfer ' || t.transfer_id || ' (' || t.kind || ') of charge ' || t.charge_id || ' names '
       || coalesce(t.cause_kind, 'no kind of cause') || ' ' || coalesce(t.cause_id, 'without an id') AS sentence
FROM kino.transfer t
WHERE t.charge_id IS NOT NULL AND keys(t.charge_id) AND t.kind IN ('hold', 'capture', 'refund', 'reversal')
  AND (t.cause_kind IS NOT NULL OR t.cause_id IS NOT NULL)

-- name: transfer_names_another_event_time
-- promise: P10
-- topic: charges
-- cannot be: A charge's transfer names another time of the event than the settlement does.
-- then: Which policy version applied depends on that time. Look for the event in the pipeline's own record.
SELECT t.charge_id AS key, t.charge_id, t.account_id, t.credits,
       'transfer ' || t.transfer_id || ' (' || t.kind || ') names an event of ' || coalesce(t.event_at::text, 'no time')
       || ', charge ' || t.charge_id || ' ended by one of ' || coalesce(s.event_time::text, 'no time') AS sentence
FROM kino.transfer t LEFT JOIN kino.settlement s ON s.charge_id = t.charge_id
WHERE t.charge_id IS NOT NULL AND keys(t.charge_id)
  AND CASE t.kind WHEN 'hold' THEN t.event_at IS NOT NULL
                  ELSE s.charge_id IS NOT NULL AND t.event_at IS DISTINCT FROM s.event_time END

-- which event ended them

-- name: settlement_without_event
-- promise: P2
-- topic: inbox
-- cannot be: A charge is settled by an event that the inbox does not have.
-- then: Sent again, that event would be taken for new. Look whether inbox rows were deleted, and since when.
SELECT s.charge_id AS key, s.charge_id, c.account_id, coalesce(c.credits, 0) AS credits,
       'charge ' || s.charge_id || ' was settled by event ' || s.event_id || ' of ' || s.event_source
       || ', which is not in the inbox' AS sentence
FROM kino.settlement s LEFT JOIN kino.charge c ON c.charge_id = s.charge_id
WHERE keys(s.charge_id)
  AND NOT EXISTS (SELECT FROM kino.inbox_event i WHERE i.source = s.event_source AND i.event_id = s.event_id)

-- name: event_contradicts_settlement
-- promise: P2
-- topic: inbox
-- cannot be: The inbox says another outcome, job or time of an event than the settlement that it led to.
-- then: A duplicate of this event is told the wrong outcome. Look at `why JOB`; the settlement moved the credits.
SELECT s.charge_id AS key, s.charge_id, c.account_id, c.credits,
       'job ' || c.job_id || ': event ' || i.event_id || ' of ' || i.source || ', for job ' || i.job_id || ' at '
       || i.event_at || ', was told ' || i.outcome || '; by it, of ' || s.event_time || ', the charge was ' || s.kind
       || ' as ' || s.reason || ' by clause ' || s.clause AS sentence
FROM kino.settlement s
JOIN kino.charge c ON c.charge_id = s.charge_id
JOIN kino.inbox_event i ON i.source = s.event_source AND i.event_id = s.event_id
WHERE keys(s.charge_id)
  AND (i.job_id <> c.job_id OR i.event_at <> s.event_time
       OR i.outcome <> CASE WHEN s.kind = 'refunded' THEN 'refunded' WHEN s.reason = 'completed' THEN 'captured'
                            WHEN s.clause = '6.terminated' THEN 'captured_terminated' ELSE 'captured_not_covered' END)

-- in which transaction

-- name: charge_written_in_other_transactions
-- promise: P5
-- topic: transactions
-- cannot be: A charge's transfers are of another transaction than the charge, settlement or correction they belong to.
-- then: Rows were written by hand, or their numbers changed: statements, relay and seals read by these numbers.
SELECT t.charge_id AS key, t.charge_id, t.account_id, t.credits,
       'transfer ' || t.transfer_id || ' (' || t.kind || ') of charge ' || t.charge_id || ' is of transaction ' || t.xid
       || ', what it belongs to of ' || due.xid AS sentence
FROM kino.transfer t
LEFT JOIN kino.charge c ON c.charge_id = t.charge_id
LEFT JOIN kino.settlement s ON s.charge_id = t.charge_id
LEFT JOIN kino.correction k ON k.charge_id = t.charge_id
CROSS JOIN LATERAL (SELECT CASE t.kind WHEN 'hold' THEN c.xid WHEN 'reversal' THEN k.xid
                                       WHEN 'capture' THEN s.xid WHEN 'refund' THEN s.xid
                                       ELSE CASE WHEN k.xid = t.xid THEN k.xid ELSE s.xid END END AS xid) AS due
WHERE t.charge_id IS NOT NULL AND keys(t.charge_id) AND t.xid <> due.xid

-- when

-- name: charge_transfer_before_its_lot
-- promise: P4
-- topic: times
-- cannot be: A charge's transfer is dated before its lot was granted.
-- then: Past balances and monthly reports are wrong around that time. Find out who changed the date.
SELECT t.charge_id AS key, t.charge_id, t.account_id, t.credits,
       'transfer ' || t.transfer_id || ' (' || t.kind || ') of lot ' || t.lot_id || ' is of ' || t.created_at
       || ', the lot was granted at ' || l.granted_at AS sentence
FROM kino.transfer t JOIN kino.credit_lot l ON l.lot_id = t.lot_id
WHERE t.charge_id IS NOT NULL AND keys(t.charge_id) AND t.created_at < l.granted_at - interval '5 minutes'

-- name: charge_transfer_dated_apart
-- promise: P5
-- topic: times
-- cannot be: A charge's transfer is dated over 5 minutes from the charge, settlement or correction it was written with.
-- then: Past balances and monthly reports are wrong between the two dates. Find out who changed one of them.
SELECT t.charge_id AS key, t.charge_id, t.account_id, t.credits,
       'transfer ' || t.transfer_id || ' (' || t.kind || ') of charge ' || t.charge_id || ' is of ' || t.created_at
       || ', what it was written with of ' || due.at AS sentence
FROM kino.transfer t
LEFT JOIN kino.charge c ON c.charge_id = t.charge_id
LEFT JOIN kino.settlement s ON s.charge_id = t.charge_id
LEFT JOIN kino.correction k ON k.charge_id = t.charge_id
CROSS JOIN LATERAL (SELECT CASE t.kind WHEN 'hold' THEN c.opened_at WHEN 'reversal' THEN k.corrected_at
                                       WHEN 'capture' THEN s.settled_at WHEN 'refund' THEN s.settled_at
                                       ELSE CASE WHEN k.xid = t.xid THEN k.corrected_at ELSE s.settled_at END
                                       END AS at) AS due
WHERE t.charge_id IS NOT NULL AND keys(t.charge_id)
  AND t.created_at NOT BETWEEN due.at - interval '5 minutes' AND due.at + interval '5 minutes'

-- name: charge_ended_before_it_began
-- promise: P10
-- topic: times
-- cannot be: A charge was settled before it was opened, or corrected before it was settled.
-- then: A date was changed, or the clock was set back by more than 5 minutes between the two.
SELECT s.charge_id AS key, s.charge_id, c.account_id, c.credits,
       'charge ' || s.charge_id || ' was opened at ' || c.opened_at || ', settled at ' || s.settled_at
       || coalesce(', corrected at ' || k.corrected_at, '') AS sentence
FROM kino.settlement s
JOIN kino.charge c ON c.charge_id = s.charge_id
LEFT JOIN kino.correction k ON k.charge_id = s.charge_id
WHERE keys(s.charge_id)
  AND (s.settled_at < c.opened_at - interval '5 minutes' OR k.corrected_at < s.settled_at - interval '5 minutes')

-- name: event_decided_at_another_time
-- promise: P2
-- topic: times
-- cannot be: The inbox has received an event over 5 minutes from the settlement that was written with it.
-- then: A date was changed. Nothing depends on it but the order in which `why JOB` tells the story.
SELECT s.charge_id AS key, s.charge_id, NULL AS account_id, 0 AS credits,
       'event ' || i.event_id || ' of ' || i.source || ' was received at ' || i.received_at || ', charge '
       || s.charge_id || ' was settled by it at ' || s.settled_at AS sentence
FROM kino.settlement s JOIN kino.inbox_event i ON i.source = s.event_source AND i.event_id = s.event_id
WHERE keys(s.charge_id)
  AND i.received_at NOT BETWEEN s.settled_at - interval '5 minutes' AND s.settled_at + interval '5 minutes'

-- name: charge_dated_in_the_future
-- promise: P10
-- topic: times
-- cannot be: A charge, its settlement, its correction or one of its transfers is dated in the future.
-- then: A date was changed, or the clock has been set back by more than 5 minutes (`doctor` compares the clocks).
SELECT d.charge_id AS key, d.charge_id, NULL AS account_id, d.credits,
       d.what || ' of charge ' || d.charge_id || ' is of ' || d.at || ', which has not come' AS sentence
FROM (SELECT c.charge_id, c.credits, 'the opening' AS what, c.opened_at AS at FROM kino.charge c
      WHERE keys(c.charge_id)
      UNION ALL
      SELECT s.charge_id, 0, 'the settlement', s.settled_at FROM kino.settlement s WHERE keys(s.charge_id)
      UNION ALL
      SELECT k.charge_id, 0, 'the correction', k.corrected_at FROM kino.correction k WHERE keys(k.charge_id)
      UNION ALL
      SELECT t.charge_id, t.credits, 'transfer ' || t.transfer_id, t.created_at FROM kino.transfer t
      WHERE t.charge_id IS NOT NULL AND keys(t.charge_id)) AS d
WHERE d.at > (SELECT kino.clock()) + interval '5 minutes'
