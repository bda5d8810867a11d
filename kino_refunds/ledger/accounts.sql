-- Change what accounts may do, and keep the change. A refund is judged by the status at the event's time, so the history
-- is what clause 6 is read from.
--
-- items: {account_id, status, reason, actor}; one row back an item, in their order: what the account was before.
-- Errors: KR005 no such account, KR006 bad input (one account twice in a call is that too), KR007 busy.
CREATE OR REPLACE FUNCTION kino.set_account_status(p_items jsonb)
RETURNS TABLE (o_account_id text, o_status_before text)
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp SET DateStyle = 'ISO, MDY' SET TimeZone = 'UTC'
SET standard_conforming_strings = on SET jit = off
SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off
SET plan_cache_mode = force_generic_plan
AS $$
#variable_conflict error
DECLARE
    v_accounts text[];
    v_statuses text[];
    v_reasons text[];
    v_actors text[];
    v_before text[];
    v_missing text;
    v_constraint text;
BEGIN
    PERFORM kino.require_items(p_items, '{account_id,status,reason,actor}', '{}');
    SELECT array_agg(kino.read_id(p.place, 'account_id', p.item -> 'account_id') ORDER BY p.place),
           array_agg(kino.read_word(p.place, 'status', p.item -> 'status', '{active,suspended,terminated}')
                     ORDER BY p.place),
           array_agg(kino.read_text(p.place, 'reason', p.item -> 'reason') ORDER BY p.place),
           array_agg(kino.read_text(p.place, 'actor', p.item -> 'actor') ORDER BY p.place)
    INTO v_accounts, v_statuses, v_reasons, v_actors
    FROM (SELECT i.ordinality - 1 AS place, i.value AS item
          FROM jsonb_array_elements(p_items) WITH ORDINALITY AS i) AS p;
    SELECT a INTO v_missing FROM unnest(v_accounts) AS a GROUP BY a HAVING count(*) > 1 ORDER BY 1 LIMIT 1;
    IF FOUND THEN
        RAISE EXCEPTION 'account % is changed twice here', quote_literal(v_missing) USING ERRCODE = 'KR006';
    END IF;
    -- One change at a time: each begins from what the one before it left, so the history has no gap.
    PERFORM FROM kino.account a WHERE a.account_id = ANY (v_accounts) ORDER BY a.account_id COLLATE "C"
    FOR NO KEY UPDATE;
    SELECT array_agg(a.status ORDER BY w.place), min(w.account_id) FILTER (WHERE a.account_id IS NULL)
    INTO v_before, v_missing
    FROM unnest(v_accounts) WITH ORDINALITY AS w (account_id, place)
    LEFT JOIN kino.account a ON a.account_id = w.account_id;
    IF v_missing IS NOT NULL THEN
        RAISE EXCEPTION 'account % does not exist; its first grant creates it', quote_literal(v_missing)
            USING ERRCODE = 'KR005';
    END IF;
    UPDATE kino.account a SET status = w.status, status_reason = w.reason
    FROM unnest(v_accounts, v_statuses, v_reasons) AS w (account_id, status, reason)
    WHERE a.account_id = w.account_id;
    INSERT INTO kino.account_status_change (account_id, from_status, to_status, reason, actor)
    SELECT w.* FROM unnest(v_accounts, v_before, v_statuses, v_reasons, v_actors) AS w;
    RETURN QUERY
    SELECT w.account_id, w.before FROM unnest(v_accounts, v_before) WITH ORDINALITY AS w (account_id, before, place)
    ORDER BY w.place;
EXCEPTION
    WHEN lock_not_available THEN
        RAISE EXCEPTION 'busy: another session holds this account; try again' USING ERRCODE = 'KR007';
    WHEN integrity_constraint_violation THEN
        GET STACKED DIAGNOSTICS v_constraint = CONSTRAINT_NAME;
        PERFORM kino.refuse_constraint(v_constraint);
END
$$;
