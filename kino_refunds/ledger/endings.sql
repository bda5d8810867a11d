-- How charges end: captured credits are consumed, refunded and reversed ones go back where they came from.

-- Where each line of these charges goes back to, as it is now (design, section 4, "Refund and the lot's fate"):
--
--   back     into its lot; into a frozen one as well, where it stays frozen
--   void     into its lot, which is voided: back, and out again under the cause that voided it
--   onward   the lot has expired or soon will: into a successor that lives until o_until
--   expire   the same, but the lot is a successor, and its line of successors has had its time: back, and expired there
--
-- Precedence: voided, frozen, expired. p_reversal: a captured charge is corrected, which is no new spending.
-- Whoever settles has locked the lots; whoever only plans has not.
CREATE OR REPLACE FUNCTION kino.refund_lines(p_charge_ids bigint[], p_reversal boolean DEFAULT false)
RETURNS TABLE (o_place bigint, o_charge_id bigint, o_seq smallint, o_account_id text, o_lot_id bigint, o_lot_account_id text,
               o_credits bigint, o_fate text, o_until timestamptz)
LANGUAGE sql STABLE AS $$
    WITH setting AS MATERIALIZED (
        SELECT kino.clock() AS now, kino.lot_grace() AS grace
    )
    SELECT wanted.place, c.charge_id, line.seq, c.account_id, line.lot_id, l.account_id, line.credits,
           CASE WHEN l.state = 'voided' THEN 'void'
                WHEN l.state = 'frozen' THEN 'back'
                WHEN l.state = 'active' AND (
                         l.expires_at IS NULL OR l.expires_at > s.now
                         AND (l.expires_at > s.now + s.grace
                              -- One lot more a refund would make a line of successors without end.
                              OR l.successor_of IS NOT NULL AND l.expires_at > s.now + interval '24 hours'))
                THEN 'back'
                WHEN l.successor_of IS NULL OR p_reversal OR c.opened_at < last.at THEN 'onward'
                -- Charged after the line's time was up: the credits live as long as their lot does, and no longer.
                WHEN l.state = 'active' AND l.expires_at > s.now THEN 'back'
                ELSE 'expire' END,
           CASE WHEN l.successor_of IS NULL THEN s.now + s.grace
                ELSE greatest(least(s.now + s.grace, last.at), s.now + interval '24 hours') END
    FROM unnest(p_charge_ids) WITH ORDINALITY AS wanted (charge_id, place)
    CROSS JOIN setting s
    CROSS JOIN LATERAL (SELECT * FROM kino.charge own WHERE own.charge_id = wanted.charge_id LIMIT 1) AS c
    CROSS JOIN LATERAL (SELECT * FROM kino.charge_line own WHERE own.charge_id = c.charge_id ORDER BY own.seq) AS line
    LEFT JOIN LATERAL (SELECT * FROM kino.credit_lot own WHERE own.lot_id = line.lot_id LIMIT 1) AS l ON true
    -- A successor that an older build made beside this one has no root; then its own expiry stands for it.
    CROSS JOIN LATERAL (SELECT coalesce(l.root_expires_at, l.expires_at) + interval '30 days' AS at) AS last
    ORDER BY wanted.place, line.seq
$$;

-- Say what becomes of the lines of these charges if they were refunded now, or reversed where they are captured: a row a
-- line, by `refund_lines`. Changes nothing and locks nothing, so what is done later may be another.
--
-- items: {charge_id}. Errors: KR006 bad input.
CREATE OR REPLACE FUNCTION kino.planned_lines(p_items jsonb)
RETURNS TABLE (o_charge_id bigint, o_seq smallint, o_lot_id bigint, o_lot_state text, o_credits bigint, o_fate text,
               o_until timestamptz)
LANGUAGE plpgsql STABLE SECURITY DEFINER
SET search_path = pg_catalog, pg_temp SET DateStyle = 'ISO, MDY' SET TimeZone = 'UTC'
SET standard_conforming_strings = on SET jit = off
SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off
SET plan_cache_mode = force_generic_plan
AS $$
#variable_conflict error
DECLARE
    v_charges bigint[];
    v_captured bigint[];
BEGIN
    PERFORM kino.require_items(p_items, '{charge_id}', '{}');
    SELECT array_agg(kino.read_credits(i.ordinality - 1, 'charge_id', i.value -> 'charge_id', 1) ORDER BY i.ordinality)
    INTO v_charges FROM jsonb_array_elements(p_items) WITH ORDINALITY AS i;
    v_captured := ARRAY(SELECT s.charge_id FROM kino.settlement s
                        WHERE s.charge_id = ANY (v_charges) AND s.kind = 'captured');
    RETURN QUERY
    SELECT r.o_charge_id, r.o_seq, r.o_lot_id, l.state, r.o_credits, r.o_fate, r.o_until
    FROM (SELECT * FROM kino.refund_lines(ARRAY(SELECT c FROM unnest(v_charges) AS c WHERE c <> ALL (v_captured)))
          UNION ALL
          SELECT * FROM kino.refund_lines(v_captured, true)) AS r
    LEFT JOIN LATERAL (SELECT * FROM kino.credit_lot own WHERE own.lot_id = r.o_lot_id LIMIT 1) AS l ON true
    ORDER BY r.o_charge_id, r.o_seq;
END
$$;

-- A charge as an error names it: on-call knows jobs and not numbers.
CREATE OR REPLACE FUNCTION kino.named(p_charge_id bigint) RETURNS text LANGUAGE sql STABLE AS $$
    SELECT p_charge_id || coalesce((SELECT ' of job ' || quote_literal(c.job_id) FROM kino.charge c
                                    WHERE c.charge_id = p_charge_id), '')
$$;

-- Give back what these charges took, in their order; their settlements or corrections are written. p_kind says which
-- transfer it is. Lots and amounts come from the charges' lines (P4), never from a caller.
CREATE OR REPLACE FUNCTION kino.give_back(p_kind text, p_charge_ids bigint[], p_reasons text[], p_actors text[],
                                          p_event_ats timestamptz[]) RETURNS void
LANGUAGE plpgsql AS $$
#variable_conflict error
DECLARE
    v_places bigint[];
    v_accounts text[];
    v_lots bigint[];
    v_credits bigint[];
    v_fates text[];
    v_untils timestamptz[];
    v_successors bigint[];
    v_bad bigint;
BEGIN
    -- Every lot in the order of the ids, and its fate only after its lock: one that was frozen, voided or swept while we
    -- waited is what it is now.
    PERFORM FROM kino.credit_lot l
    WHERE l.lot_id = ANY (ARRAY(SELECT line.lot_id FROM kino.charge_line line WHERE line.charge_id = ANY (p_charge_ids)))
    ORDER BY l.lot_id FOR NO KEY UPDATE;
    SELECT array_agg(r.o_place), array_agg(r.o_account_id), array_agg(r.o_lot_id),
           array_agg(r.o_credits), array_agg(r.o_fate), array_agg(r.o_until),
           min(r.o_charge_id) FILTER (WHERE r.o_lot_account_id IS DISTINCT FROM r.o_account_id)
    INTO v_places, v_accounts, v_lots, v_credits, v_fates, v_untils, v_bad
    FROM kino.refund_lines(p_charge_ids, p_kind = 'reversal') AS r;
    IF v_bad IS NOT NULL THEN
        RAISE EXCEPTION 'charge % names a lot that its account does not have', kino.named(v_bad)
            USING ERRCODE = 'KR010';
    END IF;

    UPDATE kino.credit_lot l SET remaining = l.remaining + back.credits
    FROM (SELECT u.lot_id, sum(u.credits)::bigint AS credits FROM unnest(v_lots, v_credits, v_fates)
              AS u (lot_id, credits, fate) WHERE u.fate = 'back' GROUP BY u.lot_id) AS back
    WHERE l.lot_id = back.lot_id;

    IF 'onward' = ANY (v_fates) THEN
        -- One successor a lot and transaction. Class, priority and purchase are copied: the credits burn and are
        -- refunded as what they were. No grant transfer: the refund's own names both lots. A charge is given back once,
        -- so a lot and a charge name one successor and no other.
        WITH onward AS (
            SELECT u.lot_id, sum(u.credits)::bigint AS credits, max(u.until) AS until, min(p_charge_ids[u.place]) AS named
            FROM unnest(v_lots, v_credits, v_fates, v_untils, v_places) AS u (lot_id, credits, fate, until, place)
            WHERE u.fate = 'onward' GROUP BY u.lot_id
        ), opened AS (
            INSERT INTO kino.credit_lot (reference, account_id, class, granted, remaining, priority, expires_at,
                                         purchase_id, successor_of, root_expires_at)
            SELECT 'successor:' || l.lot_id || ':' || onward.named, l.account_id, l.class, onward.credits, onward.credits,
                   l.priority, onward.until, l.purchase_id, l.lot_id,
                   CASE WHEN l.successor_of IS NULL THEN l.expires_at ELSE coalesce(l.root_expires_at, l.expires_at) END
            FROM onward JOIN kino.credit_lot l ON l.lot_id = onward.lot_id ORDER BY l.lot_id
            RETURNING lot_id, successor_of
        )
        SELECT array_agg(opened.lot_id ORDER BY line.nth) INTO v_successors
        FROM unnest(v_lots, v_fates) WITH ORDINALITY AS line (lot_id, fate, nth)
        LEFT JOIN opened ON opened.successor_of = line.lot_id AND line.fate = 'onward';
    END IF;

    INSERT INTO kino.transfer (kind, from_book, to_book, account_id, lot_id, to_lot_id, charge_id, credits, reason, actor,
                               event_at)
    SELECT p_kind, CASE p_kind WHEN 'refund' THEN 'held' ELSE 'consumed' END, 'wallet', u.account_id, u.lot_id,
           v_successors[u.nth], p_charge_ids[u.place], u.credits, p_reasons[u.place], p_actors[u.place],
           p_event_ats[u.place]
    FROM unnest(v_places, v_accounts, v_lots, v_credits) WITH ORDINALITY AS u (place, account_id, lot_id, credits, nth);

    IF 'void' = ANY (v_fates) OR 'expire' = ANY (v_fates) THEN
        INSERT INTO kino.transfer (kind, from_book, to_book, account_id, lot_id, charge_id, credits, reason, actor,
                                   event_at, cause_kind, cause_id)
        SELECT u.fate, 'wallet', CASE u.fate WHEN 'void' THEN 'voided' ELSE 'expired' END, u.account_id, u.lot_id,
               p_charge_ids[u.place], u.credits, CASE u.fate WHEN 'void' THEN cause.cause_kind ELSE 'expired' END,
               p_actors[u.place], p_event_ats[u.place], cause.cause_kind, cause.cause_id
        FROM unnest(v_places, v_accounts, v_lots, v_credits, v_fates) WITH ORDINALITY
             AS u (place, account_id, lot_id, credits, fate, nth)
        LEFT JOIN LATERAL (SELECT v.cause_kind, v.cause_id FROM kino.lot_void v
                           WHERE u.fate = 'void' AND v.lot_id = u.lot_id AND v.until IS NULL
                           ORDER BY v.since DESC, v.cause_kind, v.cause_id LIMIT 1) AS cause ON true
        WHERE u.fate IN ('void', 'expire') ORDER BY u.nth;
    END IF;
END
$$;

-- Settle charges, each once (P1): captured or refunded, all items or none.
--
-- items: {charge_id, kind, reason, clause, policy_version, ending, account_status, event_source, event_id, event_time};
-- one row back an item, in their order. The lots and amounts are the charge's own. Errors: KR003 another session has
-- settled one of them, KR010 the ledger's own rows disagree, KR006 bad input.
CREATE OR REPLACE FUNCTION kino.settle_charges(p_items jsonb)
RETURNS TABLE (o_charge_id bigint, o_kind text, o_credits bigint)
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp SET DateStyle = 'ISO, MDY' SET TimeZone = 'UTC'
SET standard_conforming_strings = on SET jit = off
-- Everything is reached by its key. A plan that was made while the ledger was small would read all of it later: one
-- settlement took 18 ms so. And by its key there is one plan for any number of items: made anew for every call, plans took
-- half the time of one settlement.
SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off
SET plan_cache_mode = force_generic_plan
AS $$
#variable_conflict error
DECLARE
    v_plain boolean;
    v_charges bigint[];    -- one place a charge, sorted by it
    v_places bigint[];     -- where it stands among the items
    v_kinds text[];
    v_reasons text[];
    v_event_ats timestamptz[];
    v_accounts text[];
    v_credits bigint[];
    v_twice bigint;
    v_bad bigint;
    v_constraint text;
BEGIN
    PERFORM kino.require_items(p_items, '{charge_id,kind,reason,clause,policy_version,ending,account_status,'
                                        'event_source,event_id,event_time}', '{}');
    v_plain := kino.has_plain_types(p_items, 'strict $[*].charge_id ? (@.type() != "number")');
    -- The settlements go in first, sorted, and the primary key is the promise: (1) both sessions read the charge open,
    -- (2) A inserts, (3) B's insert waits for A, (4) A commits, (5) B's insert does nothing, and B is told.
    WITH item AS MATERIALIZED (
        SELECT p.place,
               kino.take_number(v_plain, p.charge_id, p_items, p.place, 'charge_id', 1) AS charge_id,
               kino.take_word(v_plain, p.kind, p_items, p.place, 'kind', '{captured,refunded}') AS kind,
               kino.take_word(v_plain, p.reason, p_items, p.place, 'reason',
                   CASE p.kind WHEN 'captured' THEN '{completed,not_covered}'::text[]
                   ELSE '{generation_failure,timeout,content_policy_rejection}' END) AS reason,
               kino.take_word(v_plain, p.clause, p_items, p.place, 'clause',
                   CASE p.reason WHEN 'completed' THEN '{1}'::text[]
                        WHEN 'generation_failure' THEN '{2.failure}' WHEN 'timeout' THEN '{2.timeout}'
                        WHEN 'content_policy_rejection' THEN '{2.safety}'
                        ELSE '{2.failure,2.timeout,2.safety,6.terminated}' END) AS clause,
               kino.take_text(v_plain, p.policy_version, p_items, p.place, 'policy_version') AS policy_version,
               kino.take_text(v_plain, p.ending, p_items, p.place, 'ending') AS ending,
               kino.take_word(v_plain, p.account_status, p_items, p.place, 'account_status',
                   CASE p.clause WHEN '6.terminated' THEN '{terminated_for_violation}'::text[]
                        ELSE '{active,suspended,terminated,terminated_for_violation}' END) AS account_status,
               kino.take_text(v_plain, p.event_source, p_items, p.place, 'event_source') AS event_source,
               kino.take_text(v_plain, p.event_id, p_items, p.place, 'event_id') AS event_id,
               kino.take_instant(v_plain, p.event_time, p_items, p.place, 'event_time', 9999) AS event_time
        FROM (SELECT i.*, i.ordinality - 1 AS place
              FROM ROWS FROM (jsonb_to_recordset(p_items)
                              AS (charge_id text, kind text, reason text, clause text, policy_version text, ending text,
                                  account_status text, event_source text, event_id text, event_time text))
                   WITH ORDINALITY AS i) AS p
    ), settled AS (
        INSERT INTO kino.settlement (charge_id, kind, reason, clause, policy_version, ending, account_status,
                                     event_source, event_id, event_time)
        SELECT charge_id, kind, reason, clause, policy_version, ending, account_status, event_source, event_id, event_time
        FROM item ORDER BY charge_id
        ON CONFLICT (charge_id) DO NOTHING
        RETURNING charge_id
    )
    SELECT array_agg(charge_id), array_agg(place), array_agg(kind), array_agg(reason), array_agg(event_time),
           CASE WHEN count(DISTINCT charge_id) < count(*)
                THEN (SELECT i.charge_id FROM item i GROUP BY i.charge_id HAVING count(*) > 1 ORDER BY 1 LIMIT 1) END,
           CASE WHEN (SELECT count(*) FROM settled) < count(*)
                THEN (SELECT min(i.charge_id) FROM item i
                      WHERE i.charge_id NOT IN (SELECT s.charge_id FROM settled s)) END
    INTO v_charges, v_places, v_kinds, v_reasons, v_event_ats, v_twice, v_bad
    FROM (SELECT * FROM item ORDER BY item.charge_id) AS sorted;
    IF v_twice IS NOT NULL THEN
        RAISE EXCEPTION 'charge % is settled twice here', v_twice USING ERRCODE = 'KR006';
    ELSIF v_bad IS NOT NULL THEN
        RAISE EXCEPTION 'charge % is settled already', kino.named(v_bad) USING ERRCODE = 'KR003';
    ELSIF v_charges IS NULL THEN
        RETURN;
    END IF;

    -- Most of the time this table is nearly empty, and a join with it would be planned as if it always were.
    DELETE FROM kino.open_charge o WHERE o.charge_id = ANY (v_charges);
    SELECT array_agg(c.account_id), array_agg(c.credits),
           min(s.charge_id) FILTER (WHERE c.charge_id IS NULL OR c.credits <> (
               SELECT coalesce(sum(line.credits), 0) FROM kino.charge_line line WHERE line.charge_id = c.charge_id))
    INTO v_accounts, v_credits, v_bad
    FROM unnest(v_charges) AS s (charge_id)
    LEFT JOIN LATERAL (SELECT * FROM kino.charge own WHERE own.charge_id = s.charge_id LIMIT 1) AS c ON true;
    IF v_bad IS NOT NULL THEN
        RAISE EXCEPTION 'charge % does not exist, or its lines are not what it took', kino.named(v_bad)
            USING ERRCODE = 'KR010';
    END IF;

    IF 'refunded' = ANY (v_kinds) THEN
        PERFORM kino.give_back('refund', array_agg(s.charge_id), array_agg(s.reason), array_agg('settlement'::text),
                               array_agg(s.event_at))
        FROM unnest(v_charges, v_kinds, v_reasons, v_event_ats) AS s (charge_id, kind, reason, event_at)
        WHERE s.kind = 'refunded';
    END IF;
    INSERT INTO kino.transfer (kind, from_book, to_book, account_id, lot_id, charge_id, credits, reason, actor, event_at)
    SELECT 'capture', 'held', 'consumed', s.account_id, line.lot_id, s.charge_id, line.credits, s.reason, 'settlement',
           s.event_at
    FROM unnest(v_charges, v_kinds, v_reasons, v_event_ats, v_accounts) WITH ORDINALITY
         AS s (charge_id, kind, reason, event_at, account_id, nth)
    CROSS JOIN LATERAL (SELECT * FROM kino.charge_line own WHERE own.charge_id = s.charge_id ORDER BY own.seq) AS line
    WHERE s.kind = 'captured' ORDER BY s.nth, line.seq;

    RETURN QUERY
    SELECT s.charge_id, s.kind, s.credits FROM unnest(v_charges, v_kinds, v_credits, v_places)
        AS s (charge_id, kind, credits, place) ORDER BY s.place;
EXCEPTION WHEN integrity_constraint_violation THEN
    GET STACKED DIAGNOSTICS v_constraint = CONSTRAINT_NAME;
    PERFORM kino.refuse_constraint(v_constraint);
END
$$;
