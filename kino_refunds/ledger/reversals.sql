-- Refund captured charges later, because a capture was wrong: a correction, once a charge (P1). The charge stays
-- captured; its credits go back by the refund's lot rules.
--
-- items: {charge_id, reason, clause, policy_version, reference, actor}; one row back an item, in their order. Idempotent:
-- the same reference again changes nothing. Errors: KR002 corrected with other terms, KR011 ChargeNotCaptured,
-- KR010 the ledger's own rows disagree, KR006 bad input, KR007 busy.
CREATE OR REPLACE FUNCTION kino.reverse_charges(p_items jsonb)
RETURNS TABLE (o_charge_id bigint, o_credits bigint, o_corrected_at timestamptz)
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp SET DateStyle = 'ISO, MDY' SET TimeZone = 'UTC'
SET standard_conforming_strings = on SET jit = off
SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off
SET plan_cache_mode = force_generic_plan
AS $$
#variable_conflict error
DECLARE
    v_items bigint[];
    v_twice bigint;
    v_new bigint[];
    v_bad record;
    v_constraint text;
BEGIN
    PERFORM kino.require_items(p_items, '{charge_id,reason,clause,policy_version,reference,actor}', '{}');
    WITH item AS MATERIALIZED (
        SELECT p.place,
               kino.read_credits(p.place, 'charge_id', p.item -> 'charge_id', 1) AS charge_id,
               kino.read_word(p.place, 'reason', p.item -> 'reason',
                              '{generation_failure,timeout,content_policy_rejection}') AS reason,
               kino.read_word(p.place, 'clause', p.item -> 'clause',
                   CASE p.item ->> 'reason' WHEN 'generation_failure' THEN '{2.failure}'::text[]
                        WHEN 'timeout' THEN '{2.timeout}' ELSE '{2.safety}' END) AS clause,
               kino.read_text(p.place, 'policy_version', p.item -> 'policy_version') AS policy_version,
               kino.read_id(p.place, 'reference', p.item -> 'reference') AS reference,
               kino.read_text(p.place, 'actor', p.item -> 'actor') AS actor
        FROM (SELECT i.ordinality - 1 AS place, i.value AS item
              FROM jsonb_array_elements(p_items) WITH ORDINALITY AS i) AS p
    ), corrected AS (
        INSERT INTO kino.correction (charge_id, reason, clause, policy_version, actor, reference)
        SELECT charge_id, reason, clause, policy_version, actor, reference FROM item ORDER BY charge_id
        ON CONFLICT (charge_id) DO NOTHING
        RETURNING charge_id
    )
    SELECT array_agg(charge_id ORDER BY place),
           (SELECT i.charge_id FROM item i GROUP BY i.charge_id HAVING count(*) > 1 ORDER BY 1 LIMIT 1),
           (SELECT array_agg(corrected.charge_id ORDER BY corrected.charge_id) FROM corrected)
    INTO v_items, v_twice, v_new FROM item;
    IF v_twice IS NOT NULL THEN
        RAISE EXCEPTION 'charge % is reversed twice here', v_twice USING ERRCODE = 'KR006';
    END IF;
    SELECT k.charge_id, c.job_id, k.reference INTO v_bad
    FROM jsonb_array_elements(p_items) WITH ORDINALITY AS i
    JOIN kino.correction k ON k.charge_id = (i.value ->> 'charge_id')::bigint
    LEFT JOIN kino.charge c ON c.charge_id = k.charge_id
    WHERE (k.reference, k.reason, k.clause) <> (i.value ->> 'reference', i.value ->> 'reason', i.value ->> 'clause')
    ORDER BY i.ordinality LIMIT 1;
    IF FOUND THEN
        RAISE EXCEPTION 'charge % of job % was corrected before, with another reason, clause or reference: look at %',
            v_bad.charge_id, quote_literal(v_bad.job_id), quote_literal(v_bad.reference) USING ERRCODE = 'KR002';
    END IF;
    SELECT n.charge_id, CASE WHEN c.charge_id IS NULL THEN 'does not exist'
                             ELSE 'of job ' || quote_literal(c.job_id) || ' is not captured but '
                                  || coalesce(s.kind, 'open') END AS what INTO v_bad
    FROM unnest(v_new) AS n (charge_id)
    LEFT JOIN kino.charge c ON c.charge_id = n.charge_id
    LEFT JOIN kino.settlement s ON s.charge_id = n.charge_id
    WHERE s.kind IS DISTINCT FROM 'captured' ORDER BY n.charge_id LIMIT 1;
    IF FOUND THEN
        RAISE EXCEPTION 'charge % %', v_bad.charge_id, v_bad.what USING ERRCODE = 'KR011';
    END IF;
    IF v_new IS NOT NULL THEN
        PERFORM kino.give_back('reversal', array_agg(k.charge_id ORDER BY k.charge_id),
                               array_agg(k.reason ORDER BY k.charge_id), array_agg(k.actor ORDER BY k.charge_id),
                               array_agg(s.event_time ORDER BY k.charge_id))
        FROM unnest(v_new) AS c (charge_id)
        JOIN kino.correction k ON k.charge_id = c.charge_id
        JOIN kino.settlement s ON s.charge_id = c.charge_id;
    END IF;
    RETURN QUERY
    SELECT c.charge_id, c.credits, k.corrected_at
    FROM unnest(v_items) WITH ORDINALITY AS i (charge_id, place)
    JOIN kino.charge c ON c.charge_id = i.charge_id
    JOIN kino.correction k ON k.charge_id = c.charge_id
    ORDER BY i.place;
EXCEPTION
    WHEN lock_not_available THEN
        RAISE EXCEPTION 'busy: another session holds a lot of this charge, or corrects it; try again'
            USING ERRCODE = 'KR007';
    WHEN integrity_constraint_violation THEN
        GET STACKED DIAGNOSTICS v_constraint = CONSTRAINT_NAME;
        PERFORM kino.refuse_constraint(v_constraint);
END
$$;
