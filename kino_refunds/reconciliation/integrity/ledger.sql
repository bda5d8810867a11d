-- What cannot be of the numbers of transactions, by which everything is read in order. Every run asks these.
--
-- Numbers are compared as the indexes of large tables hold them. The next number is asked for in each place: so the
-- planner knows how few rows are above it; from a sub-select it would not.

-- name: transaction_has_not_been
-- promise: P5
-- topic: transactions
-- cannot be: A row names a transaction that has not been.
-- then: Statements, relay and seals would pass this row over. Where the database was restored from a dump, its
--   transactions began anew: nothing may run until the server's counter is above every number in the ledger.
SELECT n.what AS key, n.charge_id, n.account_id, 0 AS credits,
       n.what || ' names transaction ' || n.xid || ', which has not been' AS sentence
FROM (SELECT 'transfer ' || t.transfer_id AS what, t.charge_id, t.account_id, t.xid FROM kino.transfer t
      WHERE CAST(CAST(t.xid AS text) AS bigint) >= CAST(CAST(pg_snapshot_xmax(pg_current_snapshot()) AS text) AS bigint)
      UNION ALL
      SELECT 'the settlement of charge ' || s.charge_id, s.charge_id, NULL, s.xid FROM kino.settlement s
      WHERE CAST(CAST(s.xid AS text) AS bigint) >= CAST(CAST(pg_snapshot_xmax(pg_current_snapshot()) AS text) AS bigint)
      UNION ALL
      SELECT 'charge ' || c.charge_id, c.charge_id, c.account_id, c.xid FROM kino.charge c
      WHERE CAST(CAST(c.xid AS text) AS bigint) >= CAST(CAST(pg_snapshot_xmax(pg_current_snapshot()) AS text) AS bigint)
      UNION ALL
      SELECT 'the correction of charge ' || k.charge_id, k.charge_id, NULL, k.xid FROM kino.correction k
      WHERE k.xid >= pg_snapshot_xmax(pg_current_snapshot())
      UNION ALL
      SELECT 'change ' || h.change_id || ' of account ' || h.account_id, NULL, h.account_id, h.xid
      FROM kino.account_status_change h WHERE h.xid >= pg_snapshot_xmax(pg_current_snapshot())
      UNION ALL
      SELECT 'change ' || h.change_id || ' of lot ' || h.lot_id, NULL, h.account_id, h.xid
      FROM kino.lot_change h WHERE h.xid >= pg_snapshot_xmax(pg_current_snapshot())
      UNION ALL
      SELECT 'the sample of ' || x.sampled_at, NULL, NULL, x.xid FROM kino.xid_clock x
      WHERE x.xid >= pg_snapshot_xmax(pg_current_snapshot())) AS n

-- name: relay_cursor_ahead
-- promise: P9
-- topic: transactions
-- cannot be: The relay's cursor is ahead of every transaction that has ended.
-- then: The product is told of no refund until the numbers come to it. Set it back: `relay rewind --to TIME`.
SELECT 'relay_cursor' AS key, NULL::bigint AS charge_id, NULL AS account_id, 0 AS credits,
       'the relay''s cursor is at transaction ' || r.xid || ', every transaction has ended only below '
       || kino.horizon() AS sentence
FROM kino.relay_cursor r WHERE r.xid > kino.horizon()
