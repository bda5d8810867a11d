-- Give credits: one lot a grant. Idempotent on the reference; the account is made by its first grant.
--
-- items: {reference, account_id, credits, class, expires_at?, priority?, purchase_id?, actor?}; one row back an item,
-- in their order: the lot as it stands now. Errors: KR001 GrantConflict, KR006 bad input, KR007 busy.
CREATE OR REPLACE FUNCTION kino.grant_lots(p_items jsonb)
RETURNS TABLE (o_lot_id bigint, o_reference text, o_account_id text, o_class text, o_granted bigint,
               o_remaining bigint, o_priority integer, o_expires_at timestamptz, o_purchase_id text, o_state text)
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp SET DateStyle = 'ISO, MDY' SET TimeZone = 'UTC'
SET standard_conforming_strings = on SET jit = off
SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off
SET plan_cache_mode = force_generic_plan
SET lock_timeout = '2s'
AS $$
#variable_conflict error
DECLARE
    v_item record;
    v_places text[];      -- the references in the order of the items
    v_references text[];  -- from here on one place a reference, sorted by it
    v_accounts text[];
    v_credits bigint[];
    v_classes text[];
    v_expiries timestamptz[];
    v_priorities integer[];
    v_purchases text[];
    v_actors text[];
    v_conflict text;
    v_new text[];
    v_constraint text;
BEGIN
    PERFORM kino.require_items(p_items, '{reference,account_id,credits,class}',
                               '{expires_at,priority,purchase_id,actor}');
    WITH item AS MATERIALIZED (
        SELECT p.place,
               kino.read_id(p.place, 'reference', p.item -> 'reference') COLLATE "C" AS reference,
               kino.read_id(p.place, 'account_id', p.item -> 'account_id') AS account_id,
               kino.read_credits(p.place, 'credits', p.item -> 'credits', 1) AS credits,
               kino.read_word(p.place, 'class', p.item -> 'class',
                              '{promotional,courtesy,subscription,purchased,lifetime}') AS class,
               CASE WHEN coalesce(p.item -> 'expires_at', 'null') <> 'null'
                    THEN kino.read_instant(p.place, 'expires_at', p.item -> 'expires_at') END AS expires_at,
               CASE WHEN p.item ? 'priority'
                    THEN kino.read_priority(p.place, 'priority', p.item -> 'priority') ELSE 100 END AS priority,
               CASE WHEN coalesce(p.item -> 'purchase_id', 'null') <> 'null'
                    THEN kino.read_id(p.place, 'purchase_id', p.item -> 'purchase_id') END AS purchase_id,
               CASE WHEN p.item ? 'actor' THEN kino.read_text(p.place, 'actor', p.item -> 'actor') ELSE 'grant' END
                   AS actor
        FROM (SELECT i.ordinality - 1 AS place, i.value AS item
              FROM jsonb_array_elements(p_items) WITH ORDINALITY AS i) AS p
    ), copy AS (
        SELECT item.*, row_number() OVER same AS nth,
               (account_id, credits, class, expires_at, priority, purchase_id)
                   IS DISTINCT FROM first_value((account_id, credits, class, expires_at, priority, purchase_id)) OVER same
                   AS differs
        FROM item WINDOW same AS (PARTITION BY reference ORDER BY place)
    )
    SELECT array_agg(reference ORDER BY place),
           (array_agg(reference ORDER BY place) FILTER (WHERE differs))[1],
           array_agg(reference ORDER BY reference) FILTER (WHERE nth = 1),
           array_agg(account_id ORDER BY reference) FILTER (WHERE nth = 1),
           array_agg(credits ORDER BY reference) FILTER (WHERE nth = 1),
           array_agg(class ORDER BY reference) FILTER (WHERE nth = 1),
           array_agg(expires_at ORDER BY reference) FILTER (WHERE nth = 1),
           array_agg(priority ORDER BY reference) FILTER (WHERE nth = 1),
           array_agg(purchase_id ORDER BY reference) FILTER (WHERE nth = 1),
           array_agg(actor ORDER BY reference) FILTER (WHERE nth = 1)
    INTO v_places, v_conflict, v_references, v_accounts, v_credits, v_classes, v_expiries, v_priorities, v_purchases,
         v_actors
    FROM copy;
    IF v_conflict IS NOT NULL THEN
        RAISE EXCEPTION 'grant % is given twice here, on different terms', quote_literal(v_conflict)
            USING ERRCODE = 'KR001';
    END IF;
    SELECT r INTO v_conflict FROM unnest(v_references) AS r WHERE starts_with(r, 'successor:') LIMIT 1;
    IF FOUND THEN
        RAISE EXCEPTION 'items[%].reference: what starts with successor: belongs to the ledger',
            array_position(v_places, v_conflict) - 1 USING ERRCODE = 'KR006';
    END IF;

    INSERT INTO kino.account (account_id)
    SELECT DISTINCT a COLLATE "C" FROM unnest(v_accounts) AS a ORDER BY 1
    ON CONFLICT (account_id) DO NOTHING;
    WITH given AS (
        INSERT INTO kino.credit_lot (reference, account_id, class, granted, remaining, priority, expires_at, purchase_id)
        SELECT g.reference, g.account_id, g.class, g.credits, g.credits, g.priority, g.expires_at, g.purchase_id
        FROM unnest(v_references, v_accounts, v_classes, v_credits, v_priorities, v_expiries, v_purchases)
             AS g (reference, account_id, class, credits, priority, expires_at, purchase_id)
        ON CONFLICT (reference) DO NOTHING
        RETURNING reference
    )
    SELECT array_agg(given.reference) INTO v_new FROM given;

    -- What was given before must have been given on these terms; the expiry is compared as it was granted.
    SELECT l.reference AS reference,
           concat_ws('; ',
               CASE WHEN l.account_id <> g.account_id THEN format('account_id %s, not %s', l.account_id, g.account_id) END,
               CASE WHEN l.granted <> g.credits THEN format('credits %s, not %s', l.granted, g.credits) END,
               CASE WHEN l.class <> g.class THEN format('class %s, not %s', l.class, g.class) END,
               CASE WHEN f.expires_at IS DISTINCT FROM g.expires_at
                    THEN format('expires_at %s, not %s', coalesce(f.expires_at::text, 'never'),
                                coalesce(g.expires_at::text, 'never')) END,
               CASE WHEN l.priority <> g.priority THEN format('priority %s, not %s', l.priority, g.priority) END,
               CASE WHEN l.purchase_id IS DISTINCT FROM g.purchase_id
                    THEN format('purchase_id %s, not %s', coalesce(l.purchase_id, 'none'),
                                coalesce(g.purchase_id, 'none')) END) AS other
    INTO v_item
    FROM unnest(v_references, v_accounts, v_classes, v_credits, v_priorities, v_expiries, v_purchases)
         AS g (reference, account_id, class, credits, priority, expires_at, purchase_id)
    JOIN kino.credit_lot l ON l.reference = g.reference
    CROSS JOIN LATERAL (SELECT CASE WHEN EXISTS (SELECT FROM kino.lot_change c WHERE c.lot_id = l.lot_id)
                                    THEN (SELECT c.from_expires_at FROM kino.lot_change c WHERE c.lot_id = l.lot_id
                                          ORDER BY c.change_id LIMIT 1)
                                    ELSE l.expires_at END AS expires_at) AS f
    WHERE cardinality(coalesce(v_new, '{}')) < cardinality(v_references)
      AND (l.account_id, l.granted, l.class, f.expires_at, l.priority, l.purchase_id)
          IS DISTINCT FROM (g.account_id, g.credits, g.class, g.expires_at, g.priority, g.purchase_id)
    LIMIT 1;
    IF FOUND THEN
        RAISE EXCEPTION 'grant % was given on other terms: %', quote_literal(v_item.reference), v_item.other
            USING ERRCODE = 'KR001';
    END IF;

    INSERT INTO kino.transfer (kind, from_book, to_book, account_id, lot_id, credits, reason, actor)
    SELECT 'grant', 'issued', 'wallet', l.account_id, l.lot_id, l.granted, l.class, g.actor
    FROM unnest(v_references, v_actors) AS g (reference, actor)
    JOIN kino.credit_lot l ON l.reference = g.reference
    WHERE cardinality(v_new) = cardinality(v_references) OR g.reference = ANY (v_new)
    ORDER BY l.lot_id;

    RETURN QUERY
    SELECT l.lot_id, l.reference, l.account_id, l.class, l.granted, l.remaining, l.priority, l.expires_at,
           l.purchase_id, l.state
    FROM unnest(v_places) WITH ORDINALITY AS p (reference, place)
    JOIN kino.credit_lot l ON l.reference = p.reference
    ORDER BY p.place;
EXCEPTION
    WHEN lock_not_available THEN
        RAISE EXCEPTION 'busy: another session holds what this grant needs; try again' USING ERRCODE = 'KR007';
    WHEN integrity_constraint_violation THEN
        GET STACKED DIAGNOSTICS v_constraint = CONSTRAINT_NAME;
        PERFORM kino.refuse_constraint(v_constraint);
END
$$;

CREATE OR REPLACE FUNCTION kino.read_priority(p_place bigint, p_name text, p_value jsonb) RETURNS integer
LANGUAGE plpgsql IMMUTABLE AS $$
DECLARE
    v_text text := p_value #>> '{}';
BEGIN
    IF jsonb_typeof(p_value) = 'number' AND v_text ~ '^-?[0-9]{1,10}$'
       AND v_text::bigint BETWEEN -2147483648 AND 2147483647 THEN
        RETURN v_text;
    END IF;
    RAISE EXCEPTION 'items[%].% must be a whole number from -2147483648 to 2147483647', p_place, p_name
        USING ERRCODE = 'KR006';
END
$$;
