-- What cannot be of one lot: what is left in it, where it came from, what was done to it, and its history.
--
-- Transfers are reached by account or charge. Those of four kinds are reached by lot too (the index transfer_of_lot),
-- which costs no charge and no settlement; so the queries below name these kinds wherever they can.

-- name: lot_differs_from_transfers
-- promise: P4
-- topic: lots
-- runs: of a sample
-- cannot be: What is left in a lot is not what its transfers say.
-- then: The customer can spend too much or too little. Transfers are the facts: compare them with a backup.
WITH moved AS (
    SELECT e.lot_id, sum(e.credits) AS credits
    FROM kino.transfer t
    CROSS JOIN LATERAL (VALUES (t.to_book, coalesce(t.to_lot_id, t.lot_id), t.credits),
                               (t.from_book, t.lot_id, -t.credits)) AS e (book, lot_id, credits)
    WHERE of_lots(t.account_id) AND e.book = 'wallet' AND keys(e.lot_id)
    GROUP BY e.lot_id
), lot AS (
    SELECT * FROM kino.credit_lot l WHERE keys(l.lot_id)
)
SELECT lot_id AS key, NULL::bigint AS charge_id, l.account_id,
       abs(coalesce(l.remaining, 0) - coalesce(m.credits, 0)) AS credits,
       'lot ' || lot_id || ' has ' || coalesce(l.remaining::text, 'no row') || ' remaining, its transfers say '
       || coalesce(m.credits, 0) AS sentence
FROM lot l FULL JOIN moved m USING (lot_id)
WHERE l.remaining IS DISTINCT FROM coalesce(m.credits, 0)

-- name: lot_was_overdrawn
-- promise: P4
-- topic: lots
-- runs: in full
-- cannot be: Along its transfers a lot stood below zero.
-- then: A charge drew credits that were not there. Look at the lot's transfers in their order.
SELECT w.lot_id AS key, NULL::bigint AS charge_id, min(w.account_id) AS account_id, -min(w.stood) AS credits,
       'lot ' || w.lot_id || ' stood at ' || min(w.stood) || ' credits along its transfers' AS sentence
FROM (SELECT e.lot_id, t.account_id, sum(e.credits) OVER (PARTITION BY e.lot_id ORDER BY t.transfer_id) AS stood
      FROM kino.transfer t
      CROSS JOIN LATERAL (VALUES (t.to_book, coalesce(t.to_lot_id, t.lot_id), t.credits),
                                 (t.from_book, t.lot_id, -t.credits)) AS e (book, lot_id, credits)
      WHERE of_lots(t.account_id) AND e.book = 'wallet' AND keys(e.lot_id)) AS w
GROUP BY w.lot_id HAVING min(w.stood) < 0

-- name: lot_differs_from_its_grant
-- promise: P4
-- topic: lots
-- cannot be: A lot was granted another number of credits, or another class, than its one grant transfer says.
-- then: The product's own record says what was granted. A lot that became purchased can be paid out: hold it.
WITH granted AS (
    SELECT t.lot_id, sum(t.credits) AS credits, min(t.reason) AS first_reason, max(t.reason) AS last_reason,
           count(*) FILTER (WHERE t.reason IS NULL) AS unnamed
    FROM kino.transfer t WHERE t.kind = 'grant' AND keys(t.lot_id) GROUP BY t.lot_id
)
SELECT l.lot_id AS key, NULL::bigint AS charge_id, l.account_id, l.granted AS credits,
       'lot ' || l.lot_id || ' was granted ' || l.granted || ' as ' || l.class || ', its grant transfers say '
       || coalesce(g.credits, 0) || coalesce(' as ' || g.first_reason, '') AS sentence
FROM kino.credit_lot l LEFT JOIN granted g ON g.lot_id = l.lot_id
WHERE keys(l.lot_id)
  AND (coalesce(g.credits, 0) <> CASE WHEN l.successor_of IS NULL THEN l.granted ELSE 0 END
       OR g.first_reason <> l.class OR g.last_reason <> l.class OR g.unnamed > 0)

-- name: successor_differs_from_returns
-- promise: P4
-- topic: lots
-- cannot be: A successor lot was granted another number of credits than refunds returned into it.
-- then: Credits came from nowhere, or were lost on the way. Compare the refunds that name this lot.
WITH returned AS (
    SELECT t.to_lot_id AS lot_id, sum(t.credits) AS credits
    FROM kino.transfer t WHERE t.to_lot_id IS NOT NULL AND keys(t.to_lot_id)
    GROUP BY t.to_lot_id
)
SELECT l.lot_id AS key, NULL::bigint AS charge_id, l.account_id, abs(coalesce(r.credits, 0) - l.granted) AS credits,
       'successor ' || l.lot_id || ' was granted ' || l.granted || ', what was returned into it is '
       || coalesce(r.credits, 0) AS sentence
FROM kino.credit_lot l LEFT JOIN returned r ON r.lot_id = l.lot_id
WHERE keys(l.lot_id) AND l.successor_of IS NOT NULL AND coalesce(r.credits, 0) <> l.granted

-- name: successor_unlike_its_lot
-- promise: P4
-- topic: lots
-- cannot be: A successor has another account, class, priority or purchase than the lot that it succeeds.
-- then: What was returned burns, expires or is paid out as something else than it was. Compare both lots.
SELECT s.lot_id AS key, NULL::bigint AS charge_id, s.account_id, s.granted AS credits,
       'successor ' || s.lot_id || ' is not like lot ' || s.successor_of || ' that it succeeds' AS sentence
FROM kino.credit_lot s LEFT JOIN kino.credit_lot l ON l.lot_id = s.successor_of
WHERE keys(s.lot_id) AND s.successor_of IS NOT NULL
  AND (s.account_id, s.class, s.priority, s.purchase_id)
      IS DISTINCT FROM (l.account_id, l.class, l.priority, l.purchase_id)

-- name: successor_misnamed
-- promise: P4
-- topic: lots
-- cannot be: A lot's reference and whether it succeeds another lot do not go together, or a granted lot names a root.
-- then: A grant may have taken the reference that a refund needs. Find out who wrote the lot.
SELECT l.lot_id AS key, NULL::bigint AS charge_id, l.account_id, l.granted AS credits,
       'lot ' || l.lot_id || ' is named ' || l.reference || ', succeeds ' || coalesce('lot ' || l.successor_of, 'none')
       || CASE WHEN l.root_expires_at IS NULL THEN '' ELSE ' and has a root' END AS sentence
FROM kino.credit_lot l
WHERE keys(l.lot_id)
  AND (starts_with(l.reference, 'successor:') <> (l.successor_of IS NOT NULL)
       OR l.successor_of IS NOT NULL AND NOT starts_with(l.reference, 'successor:' || l.successor_of || ':')
       OR l.successor_of IS NULL AND l.root_expires_at IS NOT NULL)

-- name: successor_has_another_root
-- promise: P4
-- topic: lots
-- cannot be: A successor's root is no expiry that the lot at the beginning of its line ever had.
-- then: The line of successors ends too early or too late. Nothing has been lost until it ends.
SELECT s.lot_id AS key, NULL::bigint AS charge_id, s.account_id, s.remaining AS credits,
       'successor ' || s.lot_id || ' has another root than lot ' || l.lot_id || ' that it succeeds: '
       || coalesce(s.root_expires_at::text, 'none') AS sentence
FROM kino.credit_lot s JOIN kino.credit_lot l ON l.lot_id = s.successor_of
WHERE keys(s.lot_id)
  AND CASE WHEN l.successor_of IS NOT NULL
           THEN l.root_expires_at IS NOT NULL AND s.root_expires_at IS DISTINCT FROM l.root_expires_at
           -- A lot's hold may have moved its expiry since. One that an older build made has no root.
           ELSE s.root_expires_at IS NOT NULL AND s.root_expires_at IS DISTINCT FROM l.expires_at
                AND NOT EXISTS (SELECT FROM kino.lot_change c WHERE c.lot_id = l.lot_id
                                AND s.root_expires_at IN (c.from_expires_at, c.to_expires_at)) END

-- name: lot_not_empty
-- promise: P4
-- topic: lots
-- cannot be: An expired or voided lot still has credits.
-- then: Nobody can draw them. Find out what put them there: a refund's transfer says so.
SELECT l.lot_id AS key, NULL::bigint AS charge_id, l.account_id, l.remaining AS credits,
       'lot ' || l.lot_id || ' is ' || l.state || ' and still has ' || l.remaining || ' credits' AS sentence
FROM kino.credit_lot l WHERE keys(l.lot_id) AND l.state IN ('expired', 'voided') AND l.remaining <> 0

-- name: lot_without_account
-- promise: P4
-- topic: lots
-- cannot be: A lot is of an account that does not exist.
-- then: The account's row was deleted, or the lot's account was changed.
SELECT l.lot_id AS key, NULL::bigint AS charge_id, l.account_id, l.remaining AS credits,
       'lot ' || l.lot_id || ' is of account ' || l.account_id || ', which does not exist' AS sentence
FROM kino.credit_lot l
WHERE keys(l.lot_id) AND NOT EXISTS (SELECT FROM kino.account a WHERE a.account_id = l.account_id)

-- name: lot_transfer_out_of_place
-- promise: P4
-- topic: lots
-- cannot be: A lot's transfer is of another account than the lot, or has a charge, a lot or a reason out of place.
-- then: Credits stand in the wrong books, or a statement gives a wrong reason. Find out who wrote the transfer.
SELECT t.lot_id AS key, t.charge_id, t.account_id, t.credits,
       'transfer ' || t.transfer_id || ' (' || t.kind || ') of lot ' || t.lot_id || ' is of account ' || t.account_id
       || coalesce(', into lot ' || t.to_lot_id, '') || coalesce(', for ' || t.reason, '')
       || coalesce(', at ' || t.event_at, '') || ', with ' || coalesce('charge ' || t.charge_id, 'no charge')
       || '; that cannot be' AS sentence
FROM kino.transfer t LEFT JOIN kino.credit_lot l ON l.lot_id = t.lot_id
WHERE keys(t.lot_id) AND t.kind IN ('grant', 'expire', 'void', 'unvoid')
  AND (t.charge_id IS NULL AND (l.account_id IS DISTINCT FROM t.account_id
                                OR t.to_lot_id IS NOT NULL OR t.event_at IS NOT NULL
                                OR t.kind = 'expire' AND t.reason IS DISTINCT FROM 'expired')
       OR t.charge_id IS NOT NULL AND t.kind IN ('grant', 'unvoid')
       OR t.cause_kind IS NOT NULL AND t.reason IS DISTINCT FROM t.cause_kind)

-- what causes have done to lots

-- name: lot_state_without_cause
-- promise: P4
-- topic: lots
-- cannot be: A lot is frozen or voided without a cause that is open, or is not although one is.
-- then: The customer cannot spend credits that are theirs, or can spend what a dispute holds. Look at lot_hold and
--   lot_void for this lot.
SELECT c.lot_id AS key, NULL::bigint AS charge_id, c.account_id, c.remaining AS credits,
       'lot ' || c.lot_id || ' is ' || c.state || ', its causes say ' || c.due AS sentence
FROM (SELECT l.lot_id, l.account_id, l.remaining, l.state,
             CASE WHEN EXISTS (SELECT FROM kino.lot_void v WHERE v.lot_id = l.lot_id AND v.until IS NULL) THEN 'voided'
                  WHEN EXISTS (SELECT FROM kino.lot_hold h WHERE h.lot_id = l.lot_id AND h.until IS NULL) THEN 'frozen'
                  ELSE 'neither frozen nor voided' END AS due
      FROM kino.credit_lot l WHERE keys(l.lot_id)) AS c
WHERE CASE c.due WHEN 'neither frozen nor voided' THEN c.state IN ('frozen', 'voided') ELSE c.state <> c.due END

-- name: lot_void_not_undone
-- promise: P4
-- topic: lots
-- cannot be: What a cause voided did not come back when it ended, or more came back than it voided.
-- then: The customer lacks credits, or has too many. Compare the lot's void and unvoid transfers with lot_void.
SELECT t.lot_id AS key, NULL::bigint AS charge_id, t.account_id, abs(t.voided - t.unvoided) AS credits,
       'lot ' || t.lot_id || ' was voided for ' || t.cause_kind || ' ' || t.cause_id || ' by ' || t.voided
       || ' credits, of which ' || t.unvoided || ' came back'
       || CASE WHEN t.open THEN '' ELSE ', and that has ended' END AS sentence
FROM (SELECT x.lot_id, x.cause_kind, x.cause_id, min(x.account_id) AS account_id,
             coalesce(sum(x.credits) FILTER (WHERE x.kind = 'void'), 0) AS voided,
             coalesce(sum(x.credits) FILTER (WHERE x.kind = 'unvoid'), 0) AS unvoided,
             EXISTS (SELECT FROM kino.lot_void v WHERE v.lot_id = x.lot_id AND v.cause_kind = x.cause_kind
                     AND v.cause_id = x.cause_id AND v.until IS NULL) AS open
      FROM kino.transfer x
      WHERE keys(x.lot_id) AND x.kind IN ('void', 'unvoid') AND x.cause_kind IS NOT NULL
      GROUP BY x.lot_id, x.cause_kind, x.cause_id) AS t
WHERE t.unvoided > t.voided OR NOT t.open AND t.unvoided <> t.voided

-- name: transfer_without_its_cause
-- promise: P4
-- topic: lots
-- cannot be: A transfer voids credits for a cause that never voided its lot, or another kind of transfer names one.
-- then: The end of that cause would not bring the credits back. Compare the transfer with lot_void.
SELECT t.lot_id AS key, t.charge_id, t.account_id, t.credits,
       'transfer ' || t.transfer_id || ' (' || t.kind || ') names ' || coalesce(t.cause_kind, 'no kind of cause') || ' '
       || coalesce(t.cause_id, 'without an id') || ', which lot ' || t.lot_id || ' was not voided for' AS sentence
FROM kino.transfer t
WHERE keys(t.lot_id) AND t.kind IN ('grant', 'expire', 'void', 'unvoid')
  AND CASE WHEN t.kind IN ('void', 'unvoid')
           THEN (t.cause_kind IS NULL) <> (t.cause_id IS NULL)
                -- Causes begin with 0006, as the history of lots does.
                OR t.cause_kind IS NULL AND t.xid >= (SELECT min(c.xid) FROM kino.lot_change c)
                OR t.cause_kind IS NOT NULL
                   AND NOT EXISTS (SELECT FROM kino.lot_void v WHERE v.lot_id = t.lot_id
                                   AND v.cause_kind = t.cause_kind AND v.cause_id = t.cause_id)
           ELSE t.cause_kind IS NOT NULL OR t.cause_id IS NOT NULL END

-- name: lot_cause_without_effect
-- promise: P4
-- topic: lots
-- cannot be: A cause held or voided a lot that does not exist, or that its history never shows frozen or voided.
-- then: The row names another lot or cause than it was written for. Look for a lot of the same purchase without one.
SELECT h.lot_id AS key, NULL::bigint AS charge_id, l.account_id, coalesce(l.remaining, 0) AS credits,
       h.what || ' of lot ' || h.lot_id || ' for ' || h.cause_kind || ' ' || h.cause_id || ' is of ' || h.since
       || ', the lot ' || CASE WHEN l.lot_id IS NULL THEN 'does not exist'
                               WHEN (h.until IS NULL) <> (h.until_actor IS NULL) THEN 'does not say who ended it'
                               ELSE 'was not taken then' END AS sentence
FROM (SELECT 'a hold' AS what, * FROM kino.lot_hold x WHERE keys(x.lot_id)
      UNION ALL
      SELECT 'a void', * FROM kino.lot_void x WHERE keys(x.lot_id)) AS h
LEFT JOIN kino.credit_lot l ON l.lot_id = h.lot_id AND keys(l.lot_id)
-- 0006, where these histories begin, wrote down what it found; such a lot was taken without a change.
WHERE l.lot_id IS NULL OR (h.until IS NULL) <> (h.until_actor IS NULL)
   OR NOT EXISTS (SELECT FROM kino.lot_change c WHERE c.lot_id = h.lot_id AND c.to_state IN ('frozen', 'voided'))
      AND NOT EXISTS (SELECT FROM kino.lot_hold b WHERE b.lot_id = h.lot_id AND b.cause_id = 'before 0006')
      AND NOT EXISTS (SELECT FROM kino.lot_void b WHERE b.lot_id = h.lot_id AND b.cause_id = 'before 0006')

-- its history

-- name: lot_history_broken
-- promise: P4
-- topic: lots
-- cannot be: A change of a lot begins at another state or expiry than the change before it ended at, or the first at
--   another state than active.
-- then: A change was lost, added or edited: past balances and reports are read from here.
SELECT c.lot_id AS key, NULL::bigint AS charge_id, c.account_id, 0 AS credits,
       'a change of lot ' || c.lot_id || ' begins at '
       || coalesce(c.from_state || ' ' || c.from_expires_at, c.from_state)
       || ', the one before it ended at ' || coalesce(c.before_state || ' ' || c.before_expires_at, c.before_state)
       AS sentence
FROM (SELECT h.lot_id, h.account_id, h.from_state, h.from_expires_at,
             -- A lot begins active. One of before 0006, where the history begins, may have been anything.
             CASE WHEN row_number() OVER along > 1 THEN lag(h.to_state) OVER along
                  WHEN l.granted_at > (SELECT f.changed_at FROM kino.lot_change f WHERE f.xid IS NOT NULL
                                       ORDER BY f.change_id LIMIT 1) THEN 'active' END AS before_state,
             CASE WHEN row_number() OVER along > 1 THEN lag(h.to_expires_at) OVER along
                  ELSE h.from_expires_at END AS before_expires_at
      FROM kino.lot_change h LEFT JOIN kino.credit_lot l ON l.lot_id = h.lot_id WHERE keys(h.lot_id)
      WINDOW along AS (PARTITION BY h.lot_id ORDER BY h.change_id)) AS c
WHERE c.before_state IS NOT NULL
  AND (c.from_state, c.from_expires_at) IS DISTINCT FROM (c.before_state, c.before_expires_at)

-- name: lot_differs_from_history
-- promise: P4
-- topic: lots
-- cannot be: A lot's state or expiry is not what the last change in its history says.
-- then: The lot was changed without its history, or the history without the lot. Past balances are read from there.
SELECT l.lot_id AS key, NULL::bigint AS charge_id, l.account_id, l.remaining AS credits,
       'lot ' || l.lot_id || ' is ' || l.state || ' and expires ' || coalesce('at ' || l.expires_at, 'never')
       || CASE WHEN c.change_id IS NULL THEN ', nothing ever changed it'
               ELSE ', its last change made it ' || c.to_state || ' and let it expire '
                    || coalesce('at ' || c.to_expires_at, 'never') END AS sentence
FROM kino.credit_lot l
LEFT JOIN LATERAL (SELECT h.change_id, h.to_state, h.to_expires_at FROM kino.lot_change h
                   WHERE h.lot_id = l.lot_id ORDER BY h.change_id DESC LIMIT 1) AS c ON true
WHERE keys(l.lot_id)
  AND CASE WHEN c.change_id IS NOT NULL
           THEN (l.state, l.expires_at) IS DISTINCT FROM (c.to_state, c.to_expires_at)
           -- The history begins with 0006.
           ELSE l.state <> 'active' AND l.granted_at > (SELECT f.changed_at FROM kino.lot_change f
                                                        WHERE f.xid IS NOT NULL ORDER BY f.change_id LIMIT 1) END

-- name: lot_change_out_of_place
-- promise: P4
-- topic: lots
-- cannot be: The history has a change of a lot that does not exist or is another account's, or a change to a state or
--   expiry that no act leads to.
-- then: The change was edited or names another lot: past balances are read from here.
SELECT h.lot_id AS key, NULL::bigint AS charge_id, h.account_id, 0 AS credits,
       'change ' || h.change_id || ' of lot ' || h.lot_id || ' is of account ' || h.account_id || ' and makes it '
       || h.to_state || ' from ' || h.from_state || '; that cannot be' AS sentence
FROM kino.lot_change h LEFT JOIN kino.credit_lot l ON l.lot_id = h.lot_id
WHERE keys(h.lot_id)
  AND (l.account_id IS DISTINCT FROM h.account_id
       OR (h.from_state, h.from_expires_at) IS NOT DISTINCT FROM (h.to_state, h.to_expires_at)
       OR h.to_expires_at < h.from_expires_at OR (h.from_expires_at IS NULL) <> (h.to_expires_at IS NULL)
       OR h.from_expires_at <> h.to_expires_at AND h.to_state <> 'active'
       OR (h.from_state, h.to_state) NOT IN (
              ('active', 'active'), ('active', 'expired'), ('active', 'frozen'), ('active', 'voided'),
              ('expired', 'frozen'), ('expired', 'voided'), ('frozen', 'active'), ('frozen', 'expired'),
              ('frozen', 'voided'), ('voided', 'active'), ('voided', 'expired'), ('voided', 'frozen')))

-- name: lot_change_without_cause
-- promise: P4
-- topic: lots
-- cannot be: The history says that a lot was frozen or voided when no cause did so.
-- then: The change or the cause was edited or deleted. Look at lot_hold and lot_void for this lot.
SELECT h.lot_id AS key, NULL::bigint AS charge_id, h.account_id, 0 AS credits,
       'lot ' || h.lot_id || ' was ' || h.to_state || ' at ' || h.changed_at || ', and no cause did so then' AS sentence
FROM kino.lot_change h
WHERE keys(h.lot_id)
  AND (h.to_state = 'frozen' AND NOT EXISTS (SELECT FROM kino.lot_hold x WHERE x.lot_id = h.lot_id)
       OR h.to_state = 'voided' AND NOT EXISTS (SELECT FROM kino.lot_void x WHERE x.lot_id = h.lot_id))

-- name: lot_expired_without_history
-- promise: P4
-- topic: transactions
-- cannot be: Credits expired out of a lot in a transaction in which the lot did not become expired.
-- then: The transfer was written by hand, or a row of the history was edited or deleted.
SELECT t.lot_id AS key, NULL::bigint AS charge_id, t.account_id, t.credits,
       'transfer ' || t.transfer_id || ' expired ' || t.credits || ' credits of lot ' || t.lot_id || ' in transaction '
       || t.xid || ', in which its history does not say so' AS sentence
FROM kino.transfer t
WHERE keys(t.lot_id) AND t.kind = 'expire' AND t.charge_id IS NULL
  -- The history begins with 0006.
  AND t.xid >= (SELECT min(c.xid) FROM kino.lot_change c)
  AND NOT EXISTS (SELECT FROM kino.lot_change c WHERE c.lot_id = t.lot_id AND c.to_state = 'expired' AND c.xid = t.xid)

-- when

-- name: lot_expired_too_early
-- promise: P4
-- topic: times
-- cannot be: Credits expired out of a lot, or the lot became expired, before the expiry that it had then.
-- then: The customer lost credits that could be spent. Give them again by a grant, and find out what took them.
SELECT e.lot_id AS key, e.charge_id, e.account_id, e.credits,
       e.what || ' of lot ' || e.lot_id || ' at ' || e.at || ', it expires ' || coalesce('at ' || e.expires_at, 'never')
       AS sentence
FROM (SELECT t.lot_id, t.charge_id, t.account_id, t.credits, t.created_at AS at,
             'transfer ' || t.transfer_id || ' expired ' || t.credits || ' credits' AS what,
             CASE WHEN next.change_id IS NULL THEN l.expires_at ELSE next.from_expires_at END AS expires_at
      FROM kino.transfer t
      JOIN kino.credit_lot l ON l.lot_id = t.lot_id
      LEFT JOIN LATERAL (SELECT c.change_id, c.from_expires_at FROM kino.lot_change c
                         WHERE c.lot_id = t.lot_id AND c.changed_at > t.created_at
                         ORDER BY c.change_id LIMIT 1) AS next ON true
      WHERE keys(t.lot_id) AND t.kind = 'expire'
      UNION ALL
      SELECT h.lot_id, NULL, h.account_id, 0, h.changed_at, 'the end', h.from_expires_at
      FROM kino.lot_change h WHERE keys(h.lot_id) AND h.to_state = 'expired'
      UNION ALL
      SELECT l.lot_id, NULL, l.account_id, 0, kino.clock(), 'the end', l.expires_at
      FROM kino.credit_lot l WHERE keys(l.lot_id) AND l.state = 'expired') AS e
WHERE coalesce(e.expires_at, 'infinity') > e.at + interval '5 minutes'

-- name: lot_transfer_dated_apart
-- promise: P4
-- topic: times
-- cannot be: A lot's grant is dated over 5 minutes from the lot, or another transfer before the lot was granted.
-- then: Past balances and monthly reports are wrong around that time. Find out who changed the date.
SELECT t.lot_id AS key, NULL::bigint AS charge_id, t.account_id, t.credits,
       'transfer ' || t.transfer_id || ' (' || t.kind || ') of lot ' || t.lot_id || ' is of ' || t.created_at
       || ', the lot was granted at ' || l.granted_at AS sentence
FROM kino.transfer t JOIN kino.credit_lot l ON l.lot_id = t.lot_id
WHERE keys(t.lot_id) AND t.kind IN ('grant', 'expire', 'void', 'unvoid') AND t.charge_id IS NULL
  AND (t.created_at < l.granted_at - interval '5 minutes'
       OR t.kind = 'grant' AND t.created_at > l.granted_at + interval '5 minutes')

-- name: successor_dated_apart
-- promise: P4
-- topic: times
-- cannot be: A successor lot is dated over 5 minutes from the refund that made it, or before its lot.
-- then: Past balances and monthly reports are wrong around that time. Find out who changed the date.
SELECT l.lot_id AS key, t.charge_id, l.account_id, l.granted AS credits,
       'successor ' || l.lot_id || ' is of ' || l.granted_at || ', transfer ' || t.transfer_id || ' that made it of '
       || t.created_at AS sentence
FROM kino.transfer t JOIN kino.credit_lot l ON l.lot_id = t.to_lot_id
WHERE t.to_lot_id IS NOT NULL AND keys(t.to_lot_id)
  AND l.granted_at NOT BETWEEN t.created_at - interval '5 minutes' AND t.created_at + interval '5 minutes'

-- name: lot_history_out_of_order
-- promise: P4
-- topic: times
-- cannot be: A change of a lot is dated before the lot or the change before it, or over 5 minutes from its transfer.
-- then: Past balances and reports are read by these dates. Find out who changed one of them.
SELECT c.lot_id AS key, NULL::bigint AS charge_id, c.account_id, 0 AS credits,
       'change ' || c.change_id || ' of lot ' || c.lot_id || ' is of ' || c.changed_at || ', what came before it of '
       || c.after || coalesce(', what was written with it of ' || t.created_at, '') AS sentence
FROM (SELECT h.change_id, h.lot_id, h.account_id, h.changed_at, h.to_state, h.xid,
             coalesce(lag(h.changed_at) OVER (PARTITION BY h.lot_id ORDER BY h.change_id), l.granted_at) AS after
      FROM kino.lot_change h JOIN kino.credit_lot l ON l.lot_id = h.lot_id WHERE keys(h.lot_id)) AS c
LEFT JOIN LATERAL (SELECT x.created_at FROM kino.transfer x
                   WHERE x.account_id = c.account_id AND x.xid = c.xid AND x.lot_id = c.lot_id AND x.charge_id IS NULL
                   ORDER BY x.transfer_id LIMIT 1) AS t ON true
WHERE c.changed_at < c.after - interval '5 minutes'
   OR c.changed_at NOT BETWEEN t.created_at - interval '5 minutes' AND t.created_at + interval '5 minutes'

-- name: lot_cause_out_of_order
-- promise: P4
-- topic: times
-- cannot be: A cause's hold or void is dated before its lot or in the future, ended before it began, or does not
--   cover the time at which the lot's history says that the lot was taken.
-- then: A date was changed. Look at lot_hold, lot_void and lot_change for this lot.
SELECT h.lot_id AS key, NULL::bigint AS charge_id, l.account_id, 0 AS credits,
       h.what || ' of lot ' || h.lot_id || ' for ' || h.cause_kind || ' ' || h.cause_id || ' is from ' || h.since
       || ' to ' || coalesce(h.until::text, 'now') || '; that cannot be' AS sentence
FROM (SELECT 'a hold' AS what, 'frozen' AS state, * FROM kino.lot_hold x WHERE keys(x.lot_id)
      UNION ALL
      SELECT 'a void', 'voided', * FROM kino.lot_void x WHERE keys(x.lot_id)) AS h
JOIN kino.credit_lot l ON l.lot_id = h.lot_id AND keys(l.lot_id)
WHERE h.since < l.granted_at - interval '5 minutes' OR h.until < h.since - interval '5 minutes'
   OR greatest(h.since, h.until) > (SELECT kino.clock()) + interval '5 minutes'
   -- When it began the lot was taken by it, or was already; when it ended the lot was freed, or stayed taken. A lot
   -- that was taken before 0006, where these histories begin, has no change that says so.
   OR NOT EXISTS (SELECT FROM kino.lot_hold b WHERE b.lot_id = h.lot_id AND b.cause_id = 'before 0006')
      AND NOT EXISTS (SELECT FROM kino.lot_void b WHERE b.lot_id = h.lot_id AND b.cause_id = 'before 0006')
      AND (NOT EXISTS (SELECT FROM kino.lot_change c WHERE c.lot_id = h.lot_id AND c.to_state IN ('frozen', 'voided')
                       AND c.changed_at <= h.since + interval '5 minutes')
           OR h.until IS NOT NULL
              AND NOT EXISTS (SELECT FROM kino.lot_change c WHERE c.lot_id = h.lot_id AND c.changed_at
                              BETWEEN h.until - interval '5 minutes' AND h.until + interval '5 minutes')
              AND NOT coalesce((SELECT c.to_state IN ('frozen', 'voided') FROM kino.lot_change c
                                WHERE c.lot_id = h.lot_id AND c.changed_at <= h.until
                                ORDER BY c.change_id DESC LIMIT 1), false))

-- name: lot_change_apart_from_its_cause
-- promise: P4
-- topic: times
-- cannot be: The history says that a lot was taken or freed at a time at which no cause began or ended.
-- then: A date was changed, or a cause edited or deleted. Look at lot_hold, lot_void and lot_change for this lot.
SELECT h.lot_id AS key, NULL::bigint AS charge_id, h.account_id, 0 AS credits,
       'change ' || h.change_id || ' of lot ' || h.lot_id || ' makes it ' || h.to_state || ' from ' || h.from_state
       || ' at ' || h.changed_at || ', when no cause began or ended' AS sentence
FROM kino.lot_change h
-- What freed it is looked for first: an end of a void may leave a lot frozen by a hold of before.
WHERE keys(h.lot_id) AND h.xid IS NOT NULL
  AND CASE WHEN h.from_state = 'voided'
           THEN NOT EXISTS (SELECT FROM kino.lot_void x WHERE x.lot_id = h.lot_id AND x.until
                            BETWEEN h.changed_at - interval '5 minutes' AND h.changed_at + interval '5 minutes')
           WHEN h.to_state = 'voided'
           THEN NOT EXISTS (SELECT FROM kino.lot_void x WHERE x.lot_id = h.lot_id AND x.since
                            BETWEEN h.changed_at - interval '5 minutes' AND h.changed_at + interval '5 minutes')
           WHEN h.from_state = 'frozen'
           THEN NOT EXISTS (SELECT FROM kino.lot_hold x WHERE x.lot_id = h.lot_id AND x.until
                            BETWEEN h.changed_at - interval '5 minutes' AND h.changed_at + interval '5 minutes')
           WHEN h.to_state = 'frozen'
           THEN NOT EXISTS (SELECT FROM kino.lot_hold x WHERE x.lot_id = h.lot_id AND x.since
                            BETWEEN h.changed_at - interval '5 minutes' AND h.changed_at + interval '5 minutes')
           ELSE false END

-- name: lot_dated_in_the_future
-- promise: P4
-- topic: times
-- cannot be: A lot, a change of it or a transfer without a charge is dated in the future.
-- then: A date was changed, or the clock has been set back by more than 5 minutes (`doctor` compares the clocks).
SELECT d.lot_id AS key, NULL::bigint AS charge_id, d.account_id, d.credits,
       d.what || ' of lot ' || d.lot_id || ' is of ' || d.at || ', which has not come' AS sentence
FROM (SELECT l.lot_id, l.account_id, l.granted AS credits, 'the grant' AS what, l.granted_at AS at
      FROM kino.credit_lot l WHERE keys(l.lot_id)
      UNION ALL
      SELECT h.lot_id, h.account_id, 0, 'change ' || h.change_id, h.changed_at FROM kino.lot_change h
      WHERE keys(h.lot_id)
      UNION ALL
      SELECT t.lot_id, t.account_id, t.credits, 'transfer ' || t.transfer_id, t.created_at FROM kino.transfer t
      WHERE keys(t.lot_id) AND t.kind IN ('grant', 'expire', 'void', 'unvoid') AND t.charge_id IS NULL) AS d
WHERE d.at > (SELECT kino.clock()) + interval '5 minutes'
