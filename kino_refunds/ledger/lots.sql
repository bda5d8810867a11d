-- Lots: their history, how they expire, and which of them another session holds.

-- A lot's expiry and state as they were: a past balance is read from here and so never changes. A trigger, because no
-- function of today or tomorrow, and no hand, may forget it.
CREATE OR REPLACE FUNCTION kino.keep_lot_change() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    INSERT INTO kino.lot_change (lot_id, account_id, from_state, to_state, from_expires_at, to_expires_at)
    VALUES (new.lot_id, new.account_id, old.state, new.state, old.expires_at, new.expires_at);
    RETURN NULL;
END
$$;

CREATE OR REPLACE TRIGGER lot_change AFTER UPDATE OF state, expires_at ON kino.credit_lot
    FOR EACH ROW WHEN (old.state IS DISTINCT FROM new.state OR old.expires_at IS DISTINCT FROM new.expires_at)
    EXECUTE FUNCTION kino.keep_lot_change();

-- How long credits that a refund returns can be spent for at least.
CREATE OR REPLACE FUNCTION kino.lot_grace() RETURNS interval LANGUAGE sql STABLE AS
    'SELECT make_interval(days => s.lot_grace_days) FROM kino.ledger_setting s';

-- Take what is left in locked lots out of the wallet, for good: to expired or to voided. Returns the credits taken.
CREATE OR REPLACE FUNCTION kino.take_rest(p_lot_ids bigint[], p_kind text, p_reason text, p_actor text,
                                          p_cause_kind text, p_cause_id text) RETURNS bigint
LANGUAGE plpgsql AS $$
#variable_conflict error
DECLARE
    v_taken bigint;
BEGIN
    WITH rest AS (
        SELECT l.lot_id, l.account_id, l.remaining FROM kino.credit_lot l
        WHERE l.lot_id = ANY (p_lot_ids) AND l.remaining > 0
    ), emptied AS (
        UPDATE kino.credit_lot l SET remaining = 0 FROM rest WHERE l.lot_id = rest.lot_id
    ), posted AS (
        INSERT INTO kino.transfer (kind, from_book, to_book, account_id, lot_id, credits, reason, actor,
                                   cause_kind, cause_id)
        SELECT p_kind, 'wallet', CASE p_kind WHEN 'expire' THEN 'expired' ELSE 'voided' END,
               rest.account_id, rest.lot_id, rest.remaining, p_reason, p_actor, p_cause_kind, p_cause_id
        FROM rest ORDER BY rest.lot_id
    )
    SELECT coalesce(sum(rest.remaining), 0) INTO v_taken FROM rest;
    RETURN v_taken;
END
$$;

-- Expire those of these locked lots whose time has come and that nobody has swept yet.
CREATE OR REPLACE FUNCTION kino.expire_due(p_lot_ids bigint[]) RETURNS integer
LANGUAGE plpgsql AS $$
#variable_conflict error
DECLARE
    v_due bigint[];
BEGIN
    SELECT array_agg(l.lot_id) INTO v_due FROM kino.credit_lot l
    WHERE l.lot_id = ANY (p_lot_ids) AND l.state = 'active' AND l.expires_at <= kino.clock();
    IF v_due IS NULL THEN
        RETURN 0;
    END IF;
    PERFORM kino.take_rest(v_due, 'expire', 'expired', 'expiry', NULL, NULL);
    UPDATE kino.credit_lot l SET state = 'expired' WHERE l.lot_id = ANY (v_due);
    RETURN cardinality(v_due);
END
$$;

CREATE OR REPLACE FUNCTION kino.expire_lots(p_limit integer DEFAULT 1000) RETURNS integer
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp SET DateStyle = 'ISO, MDY' SET TimeZone = 'UTC'
SET standard_conforming_strings = on SET jit = off
AS $$
#variable_conflict error
DECLARE
    v_lots bigint[];
BEGIN
    IF p_limit IS NULL OR p_limit NOT BETWEEN 1 AND 10000 THEN
        RAISE EXCEPTION 'limit must be a whole number from 1 to 10000' USING ERRCODE = 'KR006';
    END IF;
    -- A lot that somebody holds is passed over: the next run finds it, and until then nobody draws from it.
    SELECT array_agg(due.lot_id) INTO v_lots FROM (
        SELECT l.lot_id FROM kino.credit_lot l
        -- As a sub-select the clock is read once, and the index on expires_at can be used.
        WHERE l.state = 'active' AND l.expires_at <= (SELECT kino.clock())
        ORDER BY l.lot_id LIMIT p_limit FOR NO KEY UPDATE SKIP LOCKED
    ) AS due;
    RETURN kino.expire_due(v_lots);
END
$$;

-- Ask which lots of these charges another session holds at this instant: one row back an item, in their order. It waits
-- for none. Those that are free stay locked until the caller's transaction ends.
CREATE OR REPLACE FUNCTION kino.held_lots(p_items jsonb)
RETURNS TABLE (o_charge_id bigint, o_lot_ids bigint[])
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp SET DateStyle = 'ISO, MDY' SET TimeZone = 'UTC'
SET standard_conforming_strings = on SET jit = off
SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off
SET plan_cache_mode = force_generic_plan
AS $$
#variable_conflict error
DECLARE
    v_charges bigint[];
    v_free bigint[];
BEGIN
    PERFORM kino.require_items(p_items, '{charge_id}', '{}');
    SELECT array_agg(kino.read_credits(i.ordinality - 1, 'charge_id', i.value -> 'charge_id', 1) ORDER BY i.ordinality)
    INTO v_charges FROM jsonb_array_elements(p_items) WITH ORDINALITY AS i;
    SELECT array_agg(free.lot_id) INTO v_free FROM (
        SELECT l.lot_id FROM kino.credit_lot l
        WHERE l.lot_id IN (SELECT line.lot_id FROM kino.charge_line line WHERE line.charge_id = ANY (v_charges))
        ORDER BY l.lot_id FOR NO KEY UPDATE SKIP LOCKED
    ) AS free;
    RETURN QUERY
    SELECT c.charge_id, ARRAY(SELECT line.lot_id FROM kino.charge_line line
                              WHERE line.charge_id = c.charge_id AND line.lot_id <> ALL (coalesce(v_free, '{}'))
                              ORDER BY line.lot_id)
    FROM unnest(v_charges) WITH ORDINALITY AS c (charge_id, place) ORDER BY c.place;
END
$$;
