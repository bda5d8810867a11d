-- The integrity of the ledger, in one statement and one snapshot: everything in it that cannot be, and which
-- promise it breaks. No row means that all is well. Any role that may read the ledger can ask; it reads every
-- charge, so on a large ledger ask a replica. It shares nothing with the code that writes.
WITH
-- Every transfer as its two halves: what a book got, and what another gave.
entry AS (
    SELECT transfer_id, kind, account_id, charge_id, to_book AS book, coalesce(to_lot_id, lot_id) AS lot_id, credits
    FROM kino.transfer
    UNION ALL
    SELECT transfer_id, kind, account_id, charge_id, from_book, lot_id, -credits FROM kino.transfer
),
book AS (
    SELECT account_id, book, sum(credits) AS credits FROM entry GROUP BY account_id, book
),
-- What the transfers of a charge must be, line by line, from its lines and how it ended.
due AS (
    SELECT charge_id, lot_id, credits, 'hold' AS kind FROM kino.charge_line
    UNION ALL
    SELECT l.charge_id, l.lot_id, l.credits, CASE s.kind WHEN 'captured' THEN 'capture' ELSE 'refund' END
    FROM kino.charge_line l JOIN kino.settlement s ON s.charge_id = l.charge_id
    UNION ALL
    SELECT l.charge_id, l.lot_id, l.credits, 'reversal'
    FROM kino.charge_line l JOIN kino.correction k ON k.charge_id = l.charge_id
),
posted AS (
    SELECT charge_id, lot_id, credits, kind FROM kino.transfer
    WHERE kind IN ('hold', 'capture', 'refund', 'reversal')
)
SELECT promise, violation FROM (
    -- books
    (
        SELECT 'P5', 'the books of account ' || account_id || ' sum to ' || sum(credits)
        FROM book GROUP BY account_id HAVING sum(credits) <> 0
    )
    UNION ALL
    (
        SELECT 'P5', 'book ' || book || ' of account ' || account_id || ' is ' || credits
        FROM book WHERE book <> 'issued' AND credits < 0
    )
    UNION ALL
    (
        SELECT 'P5', 'account ' || account_id || ': book wallet is ' || coalesce(b.credits, 0)
               || ', its lots hold ' || coalesce(l.credits, 0)
        FROM (SELECT account_id, credits FROM book WHERE book = 'wallet') b
        FULL JOIN (SELECT account_id, sum(remaining) AS credits FROM kino.credit_lot GROUP BY account_id) l
             USING (account_id)
        WHERE coalesce(b.credits, 0) <> coalesce(l.credits, 0)
    )
    UNION ALL
    (
        SELECT 'P5', 'account ' || account_id || ': book held is ' || coalesce(b.credits, 0)
               || ', its open charges took ' || coalesce(c.credits, 0)
        FROM (SELECT account_id, credits FROM book WHERE book = 'held') b
        FULL JOIN (SELECT account_id, sum(credits) AS credits FROM kino.charge c
                   WHERE NOT EXISTS (SELECT FROM kino.settlement s WHERE s.charge_id = c.charge_id)
                   GROUP BY account_id) c USING (account_id)
        WHERE coalesce(b.credits, 0) <> coalesce(c.credits, 0)
    )
    UNION ALL
    (
        SELECT 'P5', 'account ' || account_id || ': book consumed is ' || coalesce(b.credits, 0)
               || ', its captured charges took ' || coalesce(c.credits, 0)
        FROM (SELECT account_id, credits FROM book WHERE book = 'consumed') b
        FULL JOIN (SELECT c.account_id, sum(c.credits) AS credits FROM kino.charge c
                   JOIN kino.settlement s ON s.charge_id = c.charge_id AND s.kind = 'captured'
                   WHERE NOT EXISTS (SELECT FROM kino.correction k WHERE k.charge_id = c.charge_id)
                   GROUP BY c.account_id) c USING (account_id)
        WHERE coalesce(b.credits, 0) <> coalesce(c.credits, 0)
    )
    -- lots
    UNION ALL
    (
        SELECT 'P4', 'lot ' || lot_id || ' has ' || coalesce(l.remaining::text, 'no row') || ' remaining, its transfers say '
               || coalesce(e.credits, 0)
        FROM kino.credit_lot l
        FULL JOIN (SELECT lot_id, sum(credits) AS credits FROM entry WHERE book = 'wallet' GROUP BY lot_id) e
             USING (lot_id)
        WHERE l.remaining IS DISTINCT FROM coalesce(e.credits, 0)
    )
    UNION ALL
    (
        SELECT 'P4', 'lot ' || lot_id || ' stood at ' || min(stood) || ' credits along its transfers'
        FROM (SELECT lot_id, sum(credits) OVER (PARTITION BY lot_id ORDER BY transfer_id) AS stood
              FROM entry WHERE book = 'wallet') w
        GROUP BY lot_id HAVING min(stood) < 0
    )
    UNION ALL
    (
        SELECT 'P4', 'lot ' || l.lot_id || ' was granted ' || l.granted || ', its grant transfers say '
               || coalesce(t.credits, 0)
        FROM kino.credit_lot l
        LEFT JOIN (SELECT lot_id, sum(credits) AS credits FROM kino.transfer WHERE kind = 'grant' GROUP BY lot_id) t
             USING (lot_id)
        WHERE coalesce(t.credits, 0) <> CASE WHEN l.successor_of IS NULL THEN l.granted ELSE 0 END
    )
    UNION ALL
    (
        SELECT 'P4', 'successor ' || l.lot_id || ' was granted ' || l.granted || ', what was returned into it is '
               || coalesce(t.credits, 0)
        FROM kino.credit_lot l
        LEFT JOIN (SELECT to_lot_id, sum(credits) AS credits FROM kino.transfer GROUP BY to_lot_id) t
             ON t.to_lot_id = l.lot_id
        WHERE l.successor_of IS NOT NULL AND coalesce(t.credits, 0) <> l.granted
    )
    UNION ALL
    (
        SELECT 'P4', 'successor ' || s.lot_id || ' is not like lot ' || s.successor_of || ' that it succeeds'
        FROM kino.credit_lot s LEFT JOIN kino.credit_lot l ON l.lot_id = s.successor_of
        WHERE s.successor_of IS NOT NULL
          AND (s.account_id, s.class, s.priority, s.purchase_id)
              IS DISTINCT FROM (l.account_id, l.class, l.priority, l.purchase_id)
    )
    UNION ALL
    (
        SELECT 'P4', 'lot ' || lot_id || ' is ' || state || ' and still has ' || remaining || ' credits'
        FROM kino.credit_lot WHERE state IN ('expired', 'voided') AND remaining <> 0
    )
    UNION ALL
    (
        SELECT 'P4', 'lot ' || lot_id || ' is of account ' || account_id || ', which does not exist'
        FROM kino.credit_lot l WHERE NOT EXISTS (SELECT FROM kino.account a WHERE a.account_id = l.account_id)
    )
    -- what causes have done to lots, and their history
    UNION ALL
    (
        SELECT 'P4', 'lot ' || lot_id || ' is ' || state || ', its causes say ' || due
        FROM (SELECT l.lot_id, l.state,
                     CASE WHEN EXISTS (SELECT FROM kino.lot_void v WHERE v.lot_id = l.lot_id AND v.until IS NULL)
                          THEN 'voided'
                          WHEN EXISTS (SELECT FROM kino.lot_hold h WHERE h.lot_id = l.lot_id AND h.until IS NULL)
                          THEN 'frozen'
                          ELSE 'neither frozen nor voided' END AS due
              FROM kino.credit_lot l) c
        WHERE CASE due WHEN 'neither frozen nor voided' THEN state IN ('frozen', 'voided') ELSE state <> due END
    )
    UNION ALL
    (
        SELECT 'P4', 'lot ' || t.lot_id || ' was voided for ' || t.cause_kind || ' ' || t.cause_id || ' by '
               || t.voided || ' credits, of which ' || t.unvoided || ' came back'
               || CASE WHEN open THEN '' ELSE ', and that has ended' END
        FROM (SELECT lot_id, cause_kind, cause_id,
                     coalesce(sum(credits) FILTER (WHERE kind = 'void'), 0) AS voided,
                     coalesce(sum(credits) FILTER (WHERE kind = 'unvoid'), 0) AS unvoided,
                     EXISTS (SELECT FROM kino.lot_void v WHERE v.lot_id = x.lot_id AND v.cause_kind = x.cause_kind
                             AND v.cause_id = x.cause_id AND v.until IS NULL) AS open
              FROM kino.transfer x WHERE kind IN ('void', 'unvoid') AND cause_kind IS NOT NULL
              GROUP BY lot_id, cause_kind, cause_id) t
        WHERE unvoided > voided OR NOT open AND unvoided <> voided
    )
    UNION ALL
    (
        SELECT 'P4', 'a change of lot ' || lot_id || ' begins at ' || coalesce(from_state || ' ' || from_expires_at, from_state)
               || ', the one before it ended at ' || coalesce(before_state || ' ' || before_expires_at, before_state)
        FROM (SELECT lot_id, change_id, from_state, from_expires_at,
                     lag(to_state) OVER along AS before_state, lag(to_expires_at) OVER along AS before_expires_at
              FROM kino.lot_change WINDOW along AS (PARTITION BY lot_id ORDER BY change_id)) c
        WHERE before_state IS NOT NULL
          AND (from_state, from_expires_at) IS DISTINCT FROM (before_state, before_expires_at)
    )
    UNION ALL
    (
        SELECT 'P4', 'lot ' || l.lot_id || ' is ' || l.state || ', its last change made it ' || c.to_state
        FROM kino.credit_lot l
        JOIN (SELECT DISTINCT ON (lot_id) lot_id, to_state, to_expires_at FROM kino.lot_change
              ORDER BY lot_id, change_id DESC) c USING (lot_id)
        WHERE (l.state, l.expires_at) IS DISTINCT FROM (c.to_state, c.to_expires_at)
    )
    UNION ALL
    (
        SELECT 'P4', 'successor ' || s.lot_id || ' has another root than lot ' || l.lot_id || ', a successor that it succeeds'
        FROM kino.credit_lot s JOIN kino.credit_lot l ON l.lot_id = s.successor_of
        WHERE l.successor_of IS NOT NULL AND s.root_expires_at IS DISTINCT FROM l.root_expires_at
          AND l.root_expires_at IS NOT NULL
    )
    -- charges and their lines
    UNION ALL
    (
        SELECT 'P4', 'charge ' || charge_id || ' took ' || coalesce(c.credits::text, 'no row') || ' credits, its lines say '
               || coalesce(l.credits, 0)
        FROM kino.charge c
        FULL JOIN (SELECT charge_id, sum(credits) AS credits FROM kino.charge_line GROUP BY charge_id) l
             USING (charge_id)
        WHERE c.credits IS DISTINCT FROM coalesce(l.credits, 0)
    )
    UNION ALL
    (
        SELECT 'P4', 'the lines of charge ' || charge_id || ' are not numbered 1 to ' || count(*) || ', a lot each'
        FROM kino.charge_line GROUP BY charge_id
        HAVING min(seq) <> 1 OR max(seq) <> count(*) OR count(DISTINCT lot_id) <> count(*)
    )
    UNION ALL
    (
        SELECT 'P4', 'charge ' || l.charge_id || ' took from lot ' || l.lot_id || ', which is not its account''s'
        FROM kino.charge_line l
        JOIN kino.charge c USING (charge_id)
        LEFT JOIN kino.credit_lot o ON o.lot_id = l.lot_id
        WHERE o.account_id IS DISTINCT FROM c.account_id
    )
    -- how charges ended
    UNION ALL
    (
        SELECT 'P1', 'charge ' || charge_id || ' lacks a ' || kind || ' of ' || credits || ' credits of lot ' || lot_id
        FROM (SELECT * FROM due EXCEPT ALL SELECT * FROM posted) d
    )
    UNION ALL
    (
        SELECT 'P1', 'charge ' || coalesce(charge_id::text, '?') || ' has an uncalled-for ' || kind || ' of ' || credits
               || ' credits of lot ' || lot_id
        FROM (SELECT * FROM posted EXCEPT ALL SELECT * FROM due) d
    )
    UNION ALL
    (
        SELECT 'P1', 'settlement of charge ' || charge_id || ', which does not exist'
        FROM kino.settlement s WHERE NOT EXISTS (SELECT FROM kino.charge c WHERE c.charge_id = s.charge_id)
    )
    UNION ALL
    (
        SELECT 'P1', 'correction of charge ' || charge_id || ', which is not captured'
        FROM kino.correction k
        WHERE NOT EXISTS (SELECT FROM kino.settlement s WHERE s.charge_id = k.charge_id AND s.kind = 'captured')
    )
    UNION ALL
    (
        SELECT 'P1', 'charge ' || charge_id || ' got back ' || got || ' credits of lot ' || lot_id || ' and took ' || took
        FROM (SELECT charge_id, lot_id,
                     coalesce(sum(credits) FILTER (WHERE kind IN ('refund', 'reversal')), 0) AS got,
                     coalesce(sum(credits) FILTER (WHERE kind = 'hold'), 0) AS took
              FROM kino.transfer WHERE charge_id IS NOT NULL GROUP BY charge_id, lot_id) r
        WHERE got > took
    )
    UNION ALL
    (
        SELECT 'P1', 'charge ' || charge_id || ' voided or expired ' || gone || ' credits of lot ' || lot_id
               || ' and got back ' || got
        FROM (SELECT charge_id, lot_id,
                     coalesce(sum(credits) FILTER (WHERE kind IN ('void', 'expire')), 0) AS gone,
                     coalesce(sum(credits) FILTER (WHERE kind IN ('refund', 'reversal') AND to_lot_id IS NULL), 0) AS got
              FROM kino.transfer WHERE charge_id IS NOT NULL GROUP BY charge_id, lot_id) v
        WHERE gone NOT IN (0, got)
    )
    -- what is open
    UNION ALL
    (
        SELECT 'P9', 'charge ' || charge_id || ' is open, and nothing looks for its end: it has no row in open_charge'
        FROM kino.charge c
        WHERE NOT EXISTS (SELECT FROM kino.settlement s WHERE s.charge_id = c.charge_id)
          AND NOT EXISTS (SELECT FROM kino.open_charge o WHERE o.charge_id = c.charge_id)
    )
    UNION ALL
    (
        SELECT 'P9', 'charge ' || charge_id || ' has a row in open_charge and ' || CASE WHEN c.charge_id IS NULL
               THEN 'does not exist' ELSE 'is settled' END
        FROM kino.open_charge o LEFT JOIN kino.charge c USING (charge_id)
        WHERE c.charge_id IS NULL OR EXISTS (SELECT FROM kino.settlement s WHERE s.charge_id = o.charge_id)
    )
    UNION ALL
    (
        SELECT 'P9', 'charge ' || charge_id || ' and its row in open_charge differ'
        FROM kino.open_charge o JOIN kino.charge c USING (charge_id)
        WHERE (o.account_id, o.deadline_at, o.credits) IS DISTINCT FROM (c.account_id, c.deadline_at, c.credits)
    )
    -- transfers
    UNION ALL
    (
        SELECT 'P4', 'transfer ' || transfer_id || ' (' || kind || ') names a charge where none belongs, or lacks its own'
        FROM kino.transfer
        WHERE kind IN ('hold', 'capture', 'refund', 'reversal') AND charge_id IS NULL
           OR kind IN ('grant', 'unvoid') AND charge_id IS NOT NULL
    )
    UNION ALL
    (
        SELECT 'P4', 'transfer ' || t.transfer_id || ' moves credits of lot ' || t.lot_id || ' into lot ' || t.to_lot_id
               || ', which is not its successor'
        FROM kino.transfer t LEFT JOIN kino.credit_lot s ON s.lot_id = t.to_lot_id
        WHERE t.to_lot_id IS NOT NULL
          AND (t.kind NOT IN ('refund', 'reversal') OR s.successor_of IS DISTINCT FROM t.lot_id)
    )
    UNION ALL
    (
        SELECT 'P4', 'transfer ' || t.transfer_id || ' is of account ' || t.account_id || ', its lot or charge of another'
        FROM kino.transfer t
        LEFT JOIN kino.credit_lot l ON l.lot_id = t.lot_id
        LEFT JOIN kino.charge c ON c.charge_id = t.charge_id
        WHERE l.account_id IS DISTINCT FROM t.account_id
           OR t.charge_id IS NOT NULL AND c.account_id IS DISTINCT FROM t.account_id
    )
) AS found (promise, violation)
ORDER BY promise, violation
