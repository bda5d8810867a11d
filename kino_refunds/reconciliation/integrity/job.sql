-- What cannot be of the events of one job: what the inbox says of them, and what became of the job's charge.

-- name: event_settled_nothing
-- promise: P2
-- topic: inbox
-- cannot be: The inbox says that an event settled its job's charge, and another event, or none, did.
-- then: A duplicate of this event is told the wrong outcome. Look at `why JOB` for what settled the charge.
SELECT i.job_id AS key, c.charge_id, c.account_id, coalesce(c.credits, 0) AS credits,
       'job ' || i.job_id || ': event ' || i.event_id || ' of ' || i.source || ' was told ' || i.outcome
       || ', and another event, or none, settled its charge' AS sentence
FROM kino.inbox_event i
LEFT JOIN kino.charge c ON c.job_id = i.job_id
LEFT JOIN kino.settlement s ON s.charge_id = c.charge_id
WHERE keys(i.job_id)
  AND i.outcome IN ('captured', 'captured_not_covered', 'captured_terminated', 'refunded')
  AND (i.source, i.event_id) IS DISTINCT FROM (s.event_source, s.event_id)

-- name: event_outcome_cannot_be
-- promise: P2
-- topic: inbox
-- cannot be: The inbox says of an event that its charge was captured or refunded before, and the charge was not.
-- then: A duplicate of this event is told the wrong outcome. Look at `why JOB` for how the charge ended.
SELECT i.job_id AS key, c.charge_id, c.account_id, coalesce(c.credits, 0) AS credits,
       'job ' || i.job_id || ': event ' || i.event_id || ' of ' || i.source || ' was told ' || i.outcome
       || ', the charge is ' || CASE WHEN c.charge_id IS NULL THEN 'not there' ELSE coalesce(s.kind, 'open') END
       AS sentence
FROM kino.inbox_event i
LEFT JOIN kino.charge c ON c.job_id = i.job_id
LEFT JOIN kino.settlement s ON s.charge_id = c.charge_id
LEFT JOIN kino.correction k ON k.charge_id = c.charge_id
WHERE keys(i.job_id)
  AND i.outcome NOT IN ('captured', 'captured_not_covered', 'captured_terminated', 'refunded')
  AND NOT CASE WHEN i.outcome IN ('already_captured', 'failed_after_capture')
               THEN s.kind IS NOT DISTINCT FROM 'captured'
               WHEN i.outcome IN ('already_refunded', 'completed_after_refund')
               THEN s.kind IS NOT DISTINCT FROM 'refunded' OR k.charge_id IS NOT NULL
               ELSE false END

-- name: contradiction_without_break
-- promise: P3
-- topic: inbox
-- cannot be: An event contradicted how its charge was settled, and there is no break that says so.
-- then: Look at `why JOB` and decide what the customer is owed: nobody was told of this contradiction.
SELECT i.job_id AS key, c.charge_id, c.account_id, coalesce(c.credits, 0) AS credits,
       'job ' || i.job_id || ': event ' || i.event_id || ' of ' || i.source || ' was told ' || i.outcome
       || ', and no break says so' AS sentence
FROM kino.inbox_event i LEFT JOIN kino.charge c ON c.job_id = i.job_id
WHERE keys(i.job_id)
  AND i.outcome IN ('completed_after_refund', 'failed_after_capture')
  AND NOT EXISTS (SELECT FROM kino.break b WHERE b.job_id = i.job_id AND b.kind = i.outcome)

-- name: break_without_event
-- promise: P3
-- topic: inbox
-- cannot be: A break says that an event contradicted how its job's charge was settled, and the inbox has no such event.
-- then: The break names the event. Look whether inbox rows were deleted, and since when.
SELECT b.job_id AS key, b.charge_id, NULL AS account_id, b.credits,
       'job ' || b.job_id || ': break ' || b.break_id || ' says ' || b.kind || ', and no event in the inbox was told so'
       AS sentence
FROM kino.break b
WHERE keys(b.job_id) AND b.kind IN ('completed_after_refund', 'failed_after_capture')
  AND NOT EXISTS (SELECT FROM kino.inbox_event i WHERE i.job_id = b.job_id AND i.outcome = b.kind)

-- name: event_received_in_the_future
-- promise: P2
-- topic: times
-- cannot be: The inbox has received an event in the future.
-- then: A date was changed, or the clock has been set back by more than 5 minutes (`doctor` compares the clocks).
SELECT i.job_id AS key, NULL::bigint AS charge_id, NULL AS account_id, 0 AS credits,
       'job ' || i.job_id || ': event ' || i.event_id || ' of ' || i.source || ' was received at ' || i.received_at
       || ', which has not come' AS sentence
FROM kino.inbox_event i
WHERE keys(i.job_id) AND i.received_at > (SELECT kino.clock()) + interval '5 minutes'
