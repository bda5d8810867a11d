-- What a dispute, a payout or a request does to a purchase's lots. Each has a cause: a lot is frozen while a hold on it
-- is open, and voided while a void of it is; what one cause took comes back when that cause ends, and nothing else.
--
-- Nobody may EXECUTE these: the functions of requests and disputes call them. Errors: KR006 bad input.

-- Lock every lot of a purchase, expired ones and successors too, in the order of the ids; until nothing new turns up:
-- (1) a refund holds lot A and inserts its successor B, (2) we read A only, and wait for its lock, (3) the refund
-- commits, (4) we get A, and now B is there. A refund that comes later waits for our A and then sees its new state.
CREATE OR REPLACE FUNCTION kino.lock_purchase(p_order_id text, p_cause_kind text, p_cause_id text, p_actor text)
RETURNS bigint[]
LANGUAGE plpgsql AS $$
#variable_conflict error
DECLARE
    v_lots bigint[];
    v_before integer := -1;
BEGIN
    PERFORM kino.require_id('order_id', p_order_id), kino.require_id('cause_id', p_cause_id),
            kino.read_text(0, 'actor', to_jsonb(p_actor));
    IF p_cause_kind IS NULL OR p_cause_kind <> ALL ('{dispute,payout,request}') THEN
        RAISE EXCEPTION 'cause_kind must be one of dispute, payout, request' USING ERRCODE = 'KR006';
    END IF;
    LOOP
        SELECT coalesce(array_agg(held.lot_id), '{}') INTO v_lots FROM (
            SELECT l.lot_id FROM kino.credit_lot l WHERE l.purchase_id = p_order_id
            ORDER BY l.lot_id FOR NO KEY UPDATE
        ) AS held;
        EXIT WHEN cardinality(v_lots) = v_before;
        v_before := cardinality(v_lots);
    END LOOP;
    RETURN v_lots;
END
$$;

-- Give locked lots the state that their causes leave them: voided, else frozen, else as at the end of a hold. Then a lot
-- expires no earlier than it would have, than the lot grace from now, and than the time that was left when it was first
-- taken; one that had expired before that and holds nothing has expired again.
CREATE OR REPLACE FUNCTION kino.place_lots(p_lot_ids bigint[]) RETURNS void
LANGUAGE plpgsql AS $$
#variable_conflict error
DECLARE
    v_now timestamptz := kino.clock();
BEGIN
    UPDATE kino.credit_lot l
    SET state = placed.state,
        expires_at = CASE WHEN placed.state = 'active' AND l.state <> 'active' AND l.expires_at IS NOT NULL
                          THEN least(greatest(l.expires_at, v_now + kino.lot_grace(),
                                              v_now + (l.expires_at - coalesce(placed.taken_at, l.expires_at))),
                                     '9999-12-31 23:59:59.999999+00')
                          ELSE l.expires_at END
    FROM (
        SELECT own.lot_id, taken.changed_at AS taken_at,
               CASE WHEN EXISTS (SELECT FROM kino.lot_void v WHERE v.lot_id = own.lot_id AND v.until IS NULL)
                    THEN 'voided'
                    WHEN EXISTS (SELECT FROM kino.lot_hold h WHERE h.lot_id = own.lot_id AND h.until IS NULL)
                    THEN 'frozen'
                    WHEN own.state IN ('active', 'expired') THEN own.state
                    WHEN taken.from_state = 'expired' AND own.remaining = 0 THEN 'expired'
                    ELSE 'active' END AS state
        FROM kino.credit_lot own
        LEFT JOIN LATERAL (SELECT c.from_state, c.changed_at FROM kino.lot_change c
                           WHERE c.lot_id = own.lot_id AND c.from_state IN ('active', 'expired')
                             AND c.to_state IN ('frozen', 'voided')
                           ORDER BY c.change_id DESC LIMIT 1) AS taken ON true
        WHERE own.lot_id = ANY (p_lot_ids)
    ) AS placed
    WHERE l.lot_id = placed.lot_id AND l.state <> placed.state;
END
$$;

-- Freeze every lot of a purchase for a cause; returns the lots that are frozen now and were not. A frozen lot keeps its
-- credits and nobody can draw them; refunds go back into it.
CREATE OR REPLACE FUNCTION kino.hold_purchase(p_order_id text, p_cause_kind text, p_cause_id text, p_actor text)
RETURNS bigint[]
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp SET DateStyle = 'ISO, MDY' SET TimeZone = 'UTC'
SET standard_conforming_strings = on SET jit = off
AS $$
#variable_conflict error
DECLARE
    v_lots bigint[] := kino.lock_purchase(p_order_id, p_cause_kind, p_cause_id, p_actor);
    v_free bigint[];
BEGIN
    -- First what is due: the end of the hold would bring credits back that had expired and that nobody had swept yet.
    PERFORM kino.expire_due(v_lots);
    v_free := ARRAY(SELECT l.lot_id FROM kino.credit_lot l
                    WHERE l.lot_id = ANY (v_lots) AND l.state IN ('active', 'expired') ORDER BY l.lot_id);
    INSERT INTO kino.lot_hold (lot_id, cause_kind, cause_id, actor)
    SELECT lot, p_cause_kind, p_cause_id, p_actor FROM unnest(v_lots) AS lot
    ON CONFLICT (lot_id, cause_kind, cause_id) WHERE until IS NULL DO NOTHING;
    PERFORM kino.place_lots(v_lots);
    RETURN v_free;
END
$$;

-- End a cause's hold on a purchase; returns the lots that are frozen no longer.
CREATE OR REPLACE FUNCTION kino.release_purchase(p_order_id text, p_cause_kind text, p_cause_id text, p_actor text)
RETURNS bigint[]
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp SET DateStyle = 'ISO, MDY' SET TimeZone = 'UTC'
SET standard_conforming_strings = on SET jit = off
AS $$
#variable_conflict error
DECLARE
    v_lots bigint[] := kino.lock_purchase(p_order_id, p_cause_kind, p_cause_id, p_actor);
    v_frozen bigint[];
BEGIN
    UPDATE kino.lot_hold h SET until = kino.clock(), until_actor = p_actor
    WHERE h.lot_id = ANY (v_lots) AND h.cause_kind = p_cause_kind AND h.cause_id = p_cause_id AND h.until IS NULL;
    v_frozen := ARRAY(SELECT l.lot_id FROM kino.credit_lot l WHERE l.lot_id = ANY (v_lots) AND l.state = 'frozen');
    PERFORM kino.place_lots(v_lots);
    RETURN ARRAY(SELECT l.lot_id FROM kino.credit_lot l
                 WHERE l.lot_id = ANY (v_frozen) AND l.state <> 'frozen' ORDER BY l.lot_id);
END
$$;

-- Take back what is left in every lot of a purchase, for a cause; returns the credits taken. Credits of these lots that
-- open jobs hold follow when those jobs are refunded.
CREATE OR REPLACE FUNCTION kino.void_purchase(p_order_id text, p_cause_kind text, p_cause_id text, p_actor text)
RETURNS bigint
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp SET DateStyle = 'ISO, MDY' SET TimeZone = 'UTC'
SET standard_conforming_strings = on SET jit = off
AS $$
#variable_conflict error
DECLARE
    v_lots bigint[] := kino.lock_purchase(p_order_id, p_cause_kind, p_cause_id, p_actor);
    v_taken bigint;
BEGIN
    PERFORM kino.expire_due(v_lots);  -- or the undo would bring back what had expired
    INSERT INTO kino.lot_void (lot_id, cause_kind, cause_id, actor)
    SELECT lot, p_cause_kind, p_cause_id, p_actor FROM unnest(v_lots) AS lot
    ON CONFLICT (lot_id, cause_kind, cause_id) WHERE until IS NULL DO NOTHING;
    v_taken := kino.take_rest(v_lots, 'void', p_cause_kind, p_actor, p_cause_kind, p_cause_id);
    PERFORM kino.place_lots(v_lots);
    RETURN v_taken;
END
$$;

-- Undo all voids of a cause that are not undone yet, exactly; returns the credits that came back. Where another cause
-- keeps the lot voided, they leave it again under that one.
CREATE OR REPLACE FUNCTION kino.unvoid_purchase(p_order_id text, p_cause_kind text, p_cause_id text, p_actor text)
RETURNS bigint
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp SET DateStyle = 'ISO, MDY' SET TimeZone = 'UTC'
SET standard_conforming_strings = on SET jit = off
AS $$
#variable_conflict error
DECLARE
    v_lots bigint[] := kino.lock_purchase(p_order_id, p_cause_kind, p_cause_id, p_actor);
    v_voided bigint[];
    v_back bigint;
    v_other record;
BEGIN
    WITH ended AS (
        UPDATE kino.lot_void v SET until = kino.clock(), until_actor = p_actor
        WHERE v.lot_id = ANY (v_lots) AND v.cause_kind = p_cause_kind AND v.cause_id = p_cause_id AND v.until IS NULL
        RETURNING v.lot_id
    )
    SELECT coalesce(array_agg(ended.lot_id), '{}') INTO v_voided FROM ended;
    WITH due AS (
        SELECT t.lot_id, t.account_id, sum(CASE t.kind WHEN 'void' THEN t.credits ELSE -t.credits END)::bigint AS credits
        FROM kino.transfer t
        WHERE t.account_id IN (SELECT l.account_id FROM kino.credit_lot l WHERE l.lot_id = ANY (v_voided))
          AND t.lot_id = ANY (v_voided) AND t.kind IN ('void', 'unvoid')
          AND t.cause_kind = p_cause_kind AND t.cause_id = p_cause_id
        GROUP BY t.lot_id, t.account_id
        HAVING sum(CASE t.kind WHEN 'void' THEN t.credits ELSE -t.credits END) > 0
    ), filled AS (
        UPDATE kino.credit_lot l SET remaining = l.remaining + due.credits FROM due WHERE l.lot_id = due.lot_id
    ), posted AS (
        INSERT INTO kino.transfer (kind, from_book, to_book, account_id, lot_id, credits, reason, actor,
                                   cause_kind, cause_id)
        SELECT 'unvoid', 'voided', 'wallet', due.account_id, due.lot_id, due.credits, p_cause_kind, p_actor,
               p_cause_kind, p_cause_id
        FROM due ORDER BY due.lot_id
    )
    SELECT coalesce(sum(due.credits), 0) INTO v_back FROM due;
    PERFORM kino.place_lots(v_lots);
    FOR v_other IN
        SELECT DISTINCT ON (l.lot_id) l.lot_id, v.cause_kind, v.cause_id
        FROM kino.credit_lot l JOIN kino.lot_void v ON v.lot_id = l.lot_id AND v.until IS NULL
        WHERE l.lot_id = ANY (v_voided) AND l.remaining > 0
        ORDER BY l.lot_id, v.since DESC, v.cause_kind, v.cause_id
    LOOP
        v_back := v_back - kino.take_rest(ARRAY[v_other.lot_id], 'void', v_other.cause_kind, p_actor,
                                          v_other.cause_kind, v_other.cause_id);
    END LOOP;
    RETURN v_back;
END
$$;
