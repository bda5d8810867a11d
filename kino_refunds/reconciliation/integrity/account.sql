-- What cannot be of one account: its books, and the history of its status.
--
-- That the books of an account sum to zero is not asked: each transfer names both books and one account, so it is true
-- of any rows. What can be wrong is that a book is not what lots and charges say.

-- name: book_is_negative
-- promise: P5
-- topic: books
-- runs: in full
-- cannot be: A book other than issued stands below zero.
-- then: More credits left a book than came into it. Compare the account's statement with a backup.
SELECT b.account_id AS key, NULL::bigint AS charge_id, b.account_id, abs(b.credits) AS credits,
       'book ' || b.book || ' of account ' || b.account_id || ' is ' || b.credits AS sentence
FROM (SELECT t.account_id, e.book, sum(e.credits) AS credits
      FROM kino.transfer t CROSS JOIN LATERAL (VALUES (t.to_book, t.credits), (t.from_book, -t.credits))
           AS e (book, credits)
      WHERE keys(t.account_id) GROUP BY t.account_id, e.book) AS b
WHERE b.book <> 'issued' AND b.credits < 0

-- name: wallet_differs_from_lots
-- promise: P5
-- topic: books
-- runs: in full
-- cannot be: An account's book wallet is not what its lots hold.
-- then: The balance that the customer sees is not what transfers say. The lots' own break says which lot.
WITH book AS (
    SELECT t.account_id, sum(CASE WHEN t.to_book = 'wallet' THEN t.credits ELSE -t.credits END) AS credits
    FROM kino.transfer t WHERE keys(t.account_id) AND 'wallet' IN (t.to_book, t.from_book) GROUP BY t.account_id
), lot AS (
    SELECT l.account_id, sum(l.remaining) AS credits FROM kino.credit_lot l WHERE keys(l.account_id)
    GROUP BY l.account_id
)
SELECT account_id AS key, NULL::bigint AS charge_id, account_id,
       abs(coalesce(b.credits, 0) - coalesce(l.credits, 0)) AS credits,
       'account ' || account_id || ': book wallet is ' || coalesce(b.credits, 0)
       || ', its lots hold ' || coalesce(l.credits, 0) AS sentence
FROM book b FULL JOIN lot l USING (account_id)
WHERE coalesce(b.credits, 0) <> coalesce(l.credits, 0)

-- name: held_differs_from_open_charges
-- promise: P5
-- topic: books
-- runs: in full
-- cannot be: An account's book held is not what its open charges took.
-- then: Credits are held for no job, or a job holds none. The charge's own break says which job.
WITH book AS (
    SELECT t.account_id, sum(CASE WHEN t.to_book = 'held' THEN t.credits ELSE -t.credits END) AS credits
    FROM kino.transfer t WHERE keys(t.account_id) AND 'held' IN (t.to_book, t.from_book) GROUP BY t.account_id
), charge AS (
    SELECT c.account_id, sum(c.credits) AS credits FROM kino.charge c
    WHERE keys(c.account_id) AND NOT EXISTS (SELECT FROM kino.settlement s WHERE s.charge_id = c.charge_id)
    GROUP BY c.account_id
)
SELECT account_id AS key, NULL::bigint AS charge_id, account_id,
       abs(coalesce(b.credits, 0) - coalesce(c.credits, 0)) AS credits,
       'account ' || account_id || ': book held is ' || coalesce(b.credits, 0)
       || ', its open charges took ' || coalesce(c.credits, 0) AS sentence
FROM book b FULL JOIN charge c USING (account_id)
WHERE coalesce(b.credits, 0) <> coalesce(c.credits, 0)

-- name: consumed_differs_from_captures
-- promise: P5
-- topic: books
-- runs: in full
-- cannot be: An account's book consumed is not what its captured charges took.
-- then: Usage that the customer sees is wrong. The charge's own break says which job.
WITH book AS (
    SELECT t.account_id, sum(CASE WHEN t.to_book = 'consumed' THEN t.credits ELSE -t.credits END) AS credits
    FROM kino.transfer t WHERE keys(t.account_id) AND 'consumed' IN (t.to_book, t.from_book) GROUP BY t.account_id
), charge AS (
    SELECT c.account_id, sum(c.credits) AS credits FROM kino.charge c
    JOIN kino.settlement s ON s.charge_id = c.charge_id AND s.kind = 'captured'
    WHERE keys(c.account_id) AND NOT EXISTS (SELECT FROM kino.correction k WHERE k.charge_id = c.charge_id)
    GROUP BY c.account_id
)
SELECT account_id AS key, NULL::bigint AS charge_id, account_id,
       abs(coalesce(b.credits, 0) - coalesce(c.credits, 0)) AS credits,
       'account ' || account_id || ': book consumed is ' || coalesce(b.credits, 0)
       || ', its captured charges took ' || coalesce(c.credits, 0) AS sentence
FROM book b FULL JOIN charge c USING (account_id)
WHERE coalesce(b.credits, 0) <> coalesce(c.credits, 0)

-- the history of its status

-- name: account_status_differs_from_history
-- promise: P10
-- topic: accounts
-- cannot be: An account's status or its reason is not what the last change in its history says.
-- then: Refunds are judged by the history, charges by the status. Set the status by `accounts`, with its reason.
SELECT a.account_id AS key, NULL::bigint AS charge_id, a.account_id, 0 AS credits,
       'account ' || a.account_id || ' is ' || a.status || coalesce(' (' || a.status_reason || ')', '')
       || ', its history says ' || coalesce(h.to_status || ' (' || h.reason || ')', 'active') AS sentence
FROM kino.account a
LEFT JOIN LATERAL (SELECT c.to_status, c.reason FROM kino.account_status_change c
                   WHERE c.account_id = a.account_id ORDER BY c.change_id DESC LIMIT 1) AS h ON true
WHERE keys(a.account_id) AND (a.status, a.status_reason) IS DISTINCT FROM (coalesce(h.to_status, 'active'), h.reason)

-- name: account_history_broken
-- promise: P10
-- topic: accounts
-- cannot be: A change of an account's status begins at another status than the change before it ended at.
-- then: A change was lost, added or edited. Whether a refund was forfeited is read from here: look at this account's
--   settlements of that time.
SELECT c.account_id AS key, NULL::bigint AS charge_id, c.account_id, 0 AS credits,
       'account ' || c.account_id || ' was made ' || c.to_status || ' from ' || c.from_status
       || ', the change before it had made it ' || c.before AS sentence
FROM (SELECT h.account_id, h.from_status, h.to_status,
             coalesce(lag(h.to_status) OVER (PARTITION BY h.account_id ORDER BY h.change_id), 'active') AS before
      FROM kino.account_status_change h WHERE keys(h.account_id)) AS c
WHERE c.from_status <> c.before

-- name: account_history_without_account
-- promise: P10
-- topic: accounts
-- cannot be: The history has a change of an account that does not exist.
-- then: The account's row was deleted, or the change names another one.
SELECT h.account_id AS key, NULL::bigint AS charge_id, h.account_id, 0 AS credits,
       'change ' || h.change_id || ' is of account ' || h.account_id || ', which does not exist' AS sentence
FROM kino.account_status_change h
WHERE keys(h.account_id) AND NOT EXISTS (SELECT FROM kino.account a WHERE a.account_id = h.account_id)

-- name: account_history_out_of_order
-- promise: P10
-- topic: times
-- cannot be: A change of an account's status is dated before the account or the change before it, or in the future.
-- then: Whether a refund was forfeited is read by these dates: look at this account's settlements between the two.
SELECT c.account_id AS key, NULL::bigint AS charge_id, c.account_id, 0 AS credits,
       'change ' || c.change_id || ' of account ' || c.account_id || ' is of ' || c.changed_at
       || ', what came before it of ' || c.after AS sentence
FROM (SELECT h.change_id, h.account_id, h.changed_at,
             coalesce(lag(h.changed_at) OVER (PARTITION BY h.account_id ORDER BY h.change_id), a.created_at) AS after
      FROM kino.account_status_change h JOIN kino.account a ON a.account_id = h.account_id
      WHERE keys(h.account_id)) AS c
WHERE c.changed_at < c.after - interval '5 minutes' OR c.changed_at > (SELECT kino.clock()) + interval '5 minutes'

-- name: account_without_lot
-- promise: P10
-- topic: accounts
-- cannot be: An account has no lot: its first grant makes it.
-- then: The account's lots were deleted or given to another account, or the account was written by hand.
SELECT a.account_id AS key, NULL::bigint AS charge_id, a.account_id, 0 AS credits,
       'account ' || a.account_id || ' has no lot' AS sentence
FROM kino.account a
WHERE keys(a.account_id) AND NOT EXISTS (SELECT FROM kino.credit_lot l WHERE l.account_id = a.account_id)

-- name: account_dated_apart_from_its_first_lot
-- promise: P10
-- topic: times
-- cannot be: An account is dated over 5 minutes from its first lot, with which it was written.
-- then: A date was changed. No credits depend on the account's; a lot's decides what burns first.
SELECT a.account_id AS key, NULL::bigint AS charge_id, a.account_id, 0 AS credits,
       'account ' || a.account_id || ' was made at ' || a.created_at || ', its first lot was granted at '
       || l.granted_at AS sentence
FROM kino.account a
JOIN LATERAL (SELECT own.granted_at FROM kino.credit_lot own WHERE own.account_id = a.account_id
              ORDER BY own.lot_id LIMIT 1) AS l ON true
WHERE keys(a.account_id)
  AND a.created_at NOT BETWEEN l.granted_at - interval '5 minutes' AND l.granted_at + interval '5 minutes'
