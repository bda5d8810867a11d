-- Charge jobs: credits move from wallet to held (clause 1). Idempotent on the job; all items or none.
--
-- items: {job_id, account_id, credits, deadline_at, actor?}; one row back an item, in their order, with its lots in the
-- order in which they were drawn. Errors, in this precedence: KR002 ChargeConflict, KR003 ChargeAlreadySettled,
-- KR005 AccountNotActive, KR004 InsufficientCredits, KR009 TooManyLots; KR006 bad input, KR007 busy.
CREATE OR REPLACE FUNCTION kino.open_charges(p_items jsonb)
RETURNS TABLE (o_charge_id bigint, o_job_id text, o_account_id text, o_credits bigint, o_deadline_at timestamptz,
               o_opened_at timestamptz, o_lot_ids bigint[], o_lot_credits bigint[])
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp SET DateStyle = 'ISO, MDY' SET TimeZone = 'UTC'
SET standard_conforming_strings = on SET jit = off
-- Everything is reached by its key. A plan that was made while the ledger was small would read all of it later; a LIMIT
-- in a LATERAL keeps the planner from turning a join round, as it does for a table that it takes for empty.
SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off
SET plan_cache_mode = force_generic_plan
-- A product's request waits no longer for an account that somebody else has in hand.
SET lock_timeout = '2s'
AS $$
#variable_conflict error
DECLARE
    v_other record;
    v_most_lots CONSTANT integer := 32767;  -- charge_line.seq is a smallint
    v_plain boolean;
    v_jobs text[];           -- one place a job, sorted by it
    v_accounts text[];
    v_credits bigint[];
    v_deadlines timestamptz[];
    v_actors text[];
    v_places bigint[];       -- where the job stands among the items
    v_conflict bigint;
    v_charges bigint[];      -- what is new, sorted by its job
    v_opened text[];
    v_opened_ats timestamptz[];
    v_lots bigint[];         -- lots of all accounts, one account after the other, in the order in which they burn
    v_lot_accounts text[];
    v_lot_remaining bigint[];
    v_lines bigint[];        -- lines: the place of the charge, the number of the line in it, its lot, its credits
    v_line_seqs bigint[];
    v_line_lots bigint[];
    v_line_credits bigint[];
    v_short bigint;
    v_had bigint;
    v_constraint text;
BEGIN
    PERFORM kino.require_items(p_items, '{job_id,account_id,credits,deadline_at}', '{actor}');
    v_plain := kino.has_plain_types(p_items, 'strict $[*].credits ? (@.type() != "number")');
    -- Where one thing is sorted for several arrays it is sorted once, below them: each would else sort by itself.
    WITH item AS MATERIALIZED (
        SELECT p.place,
               kino.take_id(v_plain, p.job_id, p_items, p.place, 'job_id') COLLATE "C" AS job_id,
               kino.take_id(v_plain, p.account_id, p_items, p.place, 'account_id') AS account_id,
               kino.take_number(v_plain, p.credits, p_items, p.place, 'credits', 0) AS credits,
               kino.take_instant(v_plain, p.deadline_at, p_items, p.place, 'deadline_at', 9998) AS deadline_at,
               CASE WHEN p.actor IS NULL AND NOT p_items -> p.place::integer ? 'actor' THEN 'product'
                    ELSE kino.take_text(v_plain, p.actor, p_items, p.place, 'actor') END AS actor
        FROM (SELECT i.*, i.ordinality - 1 AS place
              FROM ROWS FROM (jsonb_to_recordset(p_items)
                              AS (job_id text, account_id text, credits text, deadline_at text, actor text))
                   WITH ORDINALITY AS i) AS p
    ), sorted AS (
        SELECT item.*, row_number() OVER same AS nth,
               account_id <> first_value(account_id) OVER same OR credits <> first_value(credits) OVER same AS differs
        FROM item WINDOW same AS (PARTITION BY job_id ORDER BY place) ORDER BY job_id, place
    )
    SELECT min(place) FILTER (WHERE differs), array_agg(job_id) FILTER (WHERE nth = 1),
           array_agg(account_id) FILTER (WHERE nth = 1), array_agg(credits) FILTER (WHERE nth = 1),
           array_agg(deadline_at) FILTER (WHERE nth = 1), array_agg(actor) FILTER (WHERE nth = 1),
           array_agg(place) FILTER (WHERE nth = 1)
    INTO v_conflict, v_jobs, v_accounts, v_credits, v_deadlines, v_actors, v_places
    FROM sorted;
    IF v_conflict IS NOT NULL THEN
        RAISE EXCEPTION 'job % is charged twice here, on different terms',
            quote_literal(p_items -> v_conflict::integer ->> 'job_id')
            USING ERRCODE = 'KR002';
    END IF;

    -- The charges go in before any lot is locked, and sorted: two sessions that open the same job meet here, where the
    -- second waits for the first's commit and then finds its charge.
    WITH opened AS (
        INSERT INTO kino.charge (job_id, account_id, credits, deadline_at)
        SELECT j.* FROM unnest(v_jobs, v_accounts, v_credits, v_deadlines) AS j
        ON CONFLICT (job_id) DO NOTHING
        RETURNING charge_id, job_id, opened_at
    )
    SELECT array_agg(charge_id), array_agg(job_id), array_agg(opened_at)
    INTO v_charges, v_opened, v_opened_ats
    FROM (SELECT * FROM opened ORDER BY opened.job_id COLLATE "C") AS sorted;

    IF cardinality(coalesce(v_charges, '{}')) < cardinality(v_jobs) THEN
        SELECT c.job_id, c.account_id, c.credits, s.kind,
               (c.account_id, c.credits) <> (j.account_id, j.credits) AS differs INTO v_other
        FROM unnest(v_jobs, v_accounts, v_credits, v_places) AS j (job_id, account_id, credits, place)
        CROSS JOIN LATERAL (SELECT * FROM kino.charge own WHERE own.job_id = j.job_id LIMIT 1) AS c
        LEFT JOIN LATERAL (SELECT * FROM kino.settlement own WHERE own.charge_id = c.charge_id LIMIT 1) AS s ON true
        WHERE (c.account_id, c.credits) <> (j.account_id, j.credits) OR s.kind IS NOT NULL
        ORDER BY (c.account_id, c.credits) = (j.account_id, j.credits), j.place LIMIT 1;
        IF FOUND AND v_other.differs THEN
            RAISE EXCEPTION 'job % is charged % credits of account % already', quote_literal(v_other.job_id),
                v_other.credits, quote_literal(v_other.account_id) USING ERRCODE = 'KR002';
        ELSIF FOUND THEN
            RAISE EXCEPTION 'the charge of job % is % already', quote_literal(v_other.job_id), v_other.kind
                USING ERRCODE = 'KR003';
        END IF;
        -- Go on with what is new; both sorted by the job, so that the places agree.
        SELECT array_agg(j.job_id), array_agg(j.account_id), array_agg(j.credits), array_agg(j.deadline_at),
               array_agg(j.actor), array_agg(j.place)
        INTO v_jobs, v_accounts, v_credits, v_deadlines, v_actors, v_places
        FROM unnest(v_jobs, v_accounts, v_credits, v_deadlines, v_actors, v_places)
             AS j (job_id, account_id, credits, deadline_at, actor, place)
        WHERE j.job_id = ANY (v_opened);
    END IF;

    IF v_charges IS NOT NULL THEN
        -- From here on by account, and in it in the order of the items.
        SELECT array_agg(charge_id), array_agg(job_id), array_agg(account_id), array_agg(credits), array_agg(deadline_at),
               array_agg(opened_at), array_agg(actor), array_agg(place)
        INTO v_charges, v_jobs, v_accounts, v_credits, v_deadlines, v_opened_ats, v_actors, v_places
        FROM (SELECT j.* FROM unnest(v_charges, v_jobs, v_accounts, v_credits, v_deadlines, v_opened_ats, v_actors, v_places)
                  AS j (charge_id, job_id, account_id, credits, deadline_at, opened_at, actor, place)
              ORDER BY j.account_id COLLATE "C", j.place) AS sorted;

        SELECT j.account_id, a.status INTO v_other
        FROM unnest(v_accounts) WITH ORDINALITY AS j (account_id, nth)
        LEFT JOIN LATERAL (SELECT * FROM kino.account own WHERE own.account_id = j.account_id LIMIT 1) AS a ON true
        WHERE a.status IS DISTINCT FROM 'active' ORDER BY j.nth LIMIT 1;
        IF FOUND AND v_other.status IS NULL THEN
            RAISE EXCEPTION 'account % does not exist; its first grant creates it', quote_literal(v_other.account_id)
                USING ERRCODE = 'KR005';
        ELSIF FOUND THEN
            RAISE EXCEPTION 'account % is %', quote_literal(v_other.account_id), v_other.status USING ERRCODE = 'KR005';
        END IF;

        -- Lock in the order of the ids, burn in the order of the design. Postgres looks at the inner condition again
        -- after a wait only if the holder changed the row; the outer one reads the clock when the lots are had, so that
        -- a lot that expired while we waited is not drawn either.
        WITH locked AS MATERIALIZED (
            SELECT l.lot_id, l.account_id, l.class, l.remaining, l.priority, l.granted_at, l.expires_at
            FROM kino.credit_lot l
            WHERE l.account_id = ANY (ARRAY(SELECT DISTINCT j.account_id
                                            FROM unnest(v_accounts, v_credits) AS j (account_id, credits)
                                            WHERE j.credits > 0))
              AND l.state = 'active' AND l.remaining > 0 AND (l.expires_at IS NULL OR l.expires_at > kino.clock())
            ORDER BY l.lot_id FOR NO KEY UPDATE
        ), burning AS (
            SELECT locked.lot_id, locked.account_id, locked.remaining,
                   row_number() OVER (
                       ORDER BY locked.account_id COLLATE "C", locked.priority, locked.expires_at NULLS LAST,
                                array_position('{promotional,courtesy,subscription,purchased,lifetime}', locked.class),
                                locked.granted_at, locked.lot_id) AS nth
            FROM locked WHERE locked.expires_at IS NULL OR locked.expires_at > kino.clock()
        )
        SELECT array_agg(lot_id), array_agg(account_id), array_agg(remaining)
        INTO v_lots, v_lot_accounts, v_lot_remaining FROM (SELECT * FROM burning ORDER BY nth) AS sorted;

        -- Without a loop: lay an account's charges end to end, and its lots end to end. Every beginning of either is an
        -- edge; between two edges one charge takes from one lot, the last of each that has begun. That is a line.
        -- Up to a bigint: 1,000 charges of the largest size are less, and lots behind that are not reached.
        WITH laid AS (
            SELECT account_id, nth AS charge, 0::bigint AS lot, (ends - credits)::bigint AS begins, ends::bigint AS ends
            FROM (SELECT account_id, nth, credits, sum(credits) OVER (PARTITION BY account_id COLLATE "C" ORDER BY nth
                                                                      ROWS UNBOUNDED PRECEDING) AS ends
                  FROM unnest(v_accounts, v_credits) WITH ORDINALITY AS c (account_id, credits, nth)
                  WHERE credits > 0) AS charges
            UNION ALL
            SELECT account_id, 0, nth, least(ends - remaining, 9223372036854775807)::bigint,
                   least(ends, 9223372036854775807)::bigint
            FROM (SELECT account_id, nth, remaining, sum(remaining) OVER (PARTITION BY account_id COLLATE "C" ORDER BY nth
                                                                          ROWS UNBOUNDED PRECEDING) AS ends
                  FROM unnest(v_lot_accounts, v_lot_remaining) WITH ORDINALITY AS l (account_id, remaining, nth)) AS lots
        ), span AS (
            SELECT laid.charge AS charge_here, laid.begins, laid.ends,
                   lead(laid.begins) OVER so_far AS next_begins,
                   max(laid.charge) OVER so_far AS charge, max(laid.lot) OVER so_far AS lot,
                   max(laid.ends) FILTER (WHERE laid.charge > 0) OVER whole AS wanted,
                   coalesce(max(laid.ends) FILTER (WHERE laid.lot > 0) OVER whole, 0) AS there
            FROM laid
            WINDOW whole AS (PARTITION BY laid.account_id COLLATE "C"),
                   so_far AS (PARTITION BY laid.account_id COLLATE "C" ORDER BY laid.begins, laid.lot
                              ROWS UNBOUNDED PRECEDING)
        ), line AS (
            SELECT span.charge, span.begins, v_lots[span.lot] AS lot_id,
                   least(span.next_begins, span.wanted, span.there) - span.begins AS credits
            FROM span WHERE least(span.next_begins, span.wanted, span.there) > span.begins
        ), numbered AS (
            SELECT line.*, row_number() OVER (PARTITION BY line.charge ORDER BY line.begins) AS seq FROM line
        )
        SELECT array_agg(charge), array_agg(seq), array_agg(lot_id), array_agg(credits),
               (SELECT span.charge_here FROM span WHERE span.charge_here > 0 AND span.ends > span.there
                ORDER BY v_places[span.charge_here] LIMIT 1)
        INTO v_lines, v_line_seqs, v_line_lots, v_line_credits, v_short
        FROM (SELECT * FROM numbered ORDER BY charge, seq) AS sorted;
        IF v_short IS NOT NULL THEN
            SELECT coalesce(sum(l.credits), 0) INTO v_had
            FROM unnest(v_lines, v_line_credits) AS l (charge, credits) WHERE l.charge = v_short;
            RAISE EXCEPTION 'job % needs % credits; account % has %', quote_literal(v_jobs[v_short]),
                v_credits[v_short], quote_literal(v_accounts[v_short]), v_had USING ERRCODE = 'KR004';
        END IF;
        SELECT l.charge INTO v_short FROM unnest(v_lines, v_line_seqs) AS l (charge, seq)
        WHERE l.seq > v_most_lots LIMIT 1;
        IF FOUND THEN
            RAISE EXCEPTION 'job % would take from more than % lots of account %', quote_literal(v_jobs[v_short]),
                v_most_lots, quote_literal(v_accounts[v_short]) USING ERRCODE = 'KR009';
        END IF;

        UPDATE kino.credit_lot l SET remaining = l.remaining - taken.credits
        FROM (SELECT u.lot_id, sum(u.credits)::bigint AS credits
              FROM unnest(v_line_lots, v_line_credits) AS u (lot_id, credits) GROUP BY u.lot_id) AS taken
        WHERE l.lot_id = taken.lot_id;
        INSERT INTO kino.charge_line (charge_id, seq, lot_id, credits)
        SELECT v_charges[l.charge], l.seq, l.lot_id, l.credits
        FROM unnest(v_lines, v_line_seqs, v_line_lots, v_line_credits) AS l (charge, seq, lot_id, credits);
        -- A statement of its own, after the lots are locked: along one lot both its clock and its number follow the
        -- order of the commits.
        INSERT INTO kino.transfer (kind, from_book, to_book, account_id, lot_id, charge_id, credits, actor)
        SELECT 'hold', 'wallet', 'held', v_accounts[l.charge], l.lot_id, v_charges[l.charge], l.credits,
               v_actors[l.charge]
        FROM unnest(v_lines, v_line_lots, v_line_credits) AS l (charge, lot_id, credits);
        INSERT INTO kino.open_charge (charge_id, account_id, deadline_at, credits)
        SELECT c.* FROM unnest(v_charges, v_accounts, v_deadlines, v_credits) AS c;
    END IF;

    IF cardinality(v_charges) = jsonb_array_length(p_items) THEN
        -- All are new: what was written is known, and need not be read back.
        RETURN QUERY
        SELECT v_charges[c.charge], v_jobs[c.charge], v_accounts[c.charge], v_credits[c.charge], v_deadlines[c.charge],
               v_opened_ats[c.charge], c.lot_ids, c.lot_credits
        FROM (SELECT l.charge, coalesce(array_agg(l.lot_id) FILTER (WHERE l.seq > 0), '{}') AS lot_ids,
                     coalesce(array_agg(l.credits) FILTER (WHERE l.seq > 0), '{}') AS lot_credits
              FROM (SELECT l.charge, l.seq, l.lot_id, l.credits
                    FROM unnest(v_lines, v_line_seqs, v_line_lots, v_line_credits) AS l (charge, seq, lot_id, credits)
                    UNION ALL
                    SELECT nth, 0, 0, 0 FROM generate_series(1, cardinality(v_charges)) AS nth
                    ORDER BY 1, 2) AS l
              GROUP BY l.charge) AS c
        ORDER BY v_places[c.charge];
        RETURN;
    END IF;
    RETURN QUERY
    SELECT c.charge_id, c.job_id, c.account_id, c.credits, c.deadline_at, c.opened_at,
           ARRAY(SELECT l.lot_id FROM kino.charge_line l WHERE l.charge_id = c.charge_id ORDER BY l.seq),
           ARRAY(SELECT l.credits FROM kino.charge_line l WHERE l.charge_id = c.charge_id ORDER BY l.seq)
    FROM jsonb_array_elements(p_items) WITH ORDINALITY AS i (item, place)
    CROSS JOIN LATERAL (SELECT * FROM kino.charge own WHERE own.job_id = i.item ->> 'job_id' LIMIT 1) AS c
    ORDER BY i.place;
EXCEPTION
    WHEN lock_not_available THEN
        RAISE EXCEPTION 'busy: another session holds what this charge needs; try again' USING ERRCODE = 'KR007';
    WHEN integrity_constraint_violation THEN
        GET STACKED DIAGNOSTICS v_constraint = CONSTRAINT_NAME;
        PERFORM kino.refuse_constraint(v_constraint);
END
$$;
