-- What a caller sends, read and checked: one function for each kind of value. Whatever is refused is named by its place
-- in the array, as the caller's own language would write it: items[2].credits.
--
-- Nobody may EXECUTE these. They run inside the ledger's functions, whose search_path they share.

CREATE OR REPLACE FUNCTION kino.require_items(p_items jsonb, p_required text[], p_optional text[]) RETURNS void
LANGUAGE plpgsql IMMUTABLE AS $$
#variable_conflict error
DECLARE
    v_most CONSTANT integer := 1000;
    v_place bigint;
    v_item jsonb;
BEGIN
    IF p_items IS NULL OR jsonb_typeof(p_items) <> 'array' THEN
        RAISE EXCEPTION 'items must be a JSON array of objects' USING ERRCODE = 'KR006';
    END IF;
    IF jsonb_array_length(p_items) > v_most THEN
        RAISE EXCEPTION 'items[%] is one too many: a call takes % items at most', v_most, v_most
            USING ERRCODE = 'KR006';
    END IF;
    SELECT i.ordinality - 1, i.value INTO v_place, v_item
    FROM jsonb_array_elements(p_items) WITH ORDINALITY AS i
    WHERE CASE WHEN jsonb_typeof(i.value) <> 'object' THEN true
               ELSE NOT i.value ?& p_required OR i.value - (p_required || p_optional) <> '{}' END
    ORDER BY i.ordinality LIMIT 1;
    IF NOT FOUND THEN
        RETURN;
    END IF;
    IF jsonb_typeof(v_item) <> 'object' THEN
        RAISE EXCEPTION 'items[%] must be an object', v_place USING ERRCODE = 'KR006';
    ELSIF NOT v_item ?& p_required THEN
        RAISE EXCEPTION 'items[%] lacks %', v_place,
            (SELECT string_agg(k, ', ') FROM unnest(p_required) AS k WHERE NOT v_item ? k) USING ERRCODE = 'KR006';
    END IF;
    RAISE EXCEPTION 'items[%] has keys that nobody reads: %', v_place,
        (SELECT string_agg(CASE WHEN kino.has_unprintable(k) THEN '(not printable)' ELSE left(k, 40) END, ', ')
         FROM (SELECT k FROM jsonb_object_keys(v_item - (p_required || p_optional)) AS k LIMIT 5) AS shown)
        USING ERRCODE = 'KR006';
END
$$;

-- Ids as everywhere in this system: 1 to 128 printable characters, no white space at either end. `order-1 ` beside
-- `order-1` would credit one purchase twice.
CREATE OR REPLACE FUNCTION kino.is_id(p_text text) RETURNS boolean
LANGUAGE plpgsql IMMUTABLE AS $$
BEGIN
    IF length(p_text) > 128 THEN
        RETURN false;
    END IF;
    -- Nearly every id is ASCII; the long expression is for the others.
    RETURN p_text COLLATE "C" ~ '^[!-~]([ -~]*[!-~])?$'
        OR (p_text COLLATE "C" ~ '^[^ ](.*[^ ])?$' AND NOT kino.has_unprintable(p_text));
END
$$;

-- One field of an item, or the error that names it.

CREATE OR REPLACE FUNCTION kino.read_id(p_place bigint, p_name text, p_value jsonb) RETURNS text
LANGUAGE plpgsql IMMUTABLE AS $$
DECLARE
    v_text text := p_value #>> '{}';
BEGIN
    IF jsonb_typeof(p_value) = 'string' AND kino.is_id(v_text) THEN
        RETURN v_text;
    END IF;
    RAISE EXCEPTION 'items[%].% must be 1 to 128 printable characters, without white space at either end',
        p_place, p_name USING ERRCODE = 'KR006';
END
$$;

-- Up to 2^53 - 1: exact in every JSON reader, and a thousand such lots still add up within a bigint.
CREATE OR REPLACE FUNCTION kino.read_credits(p_place bigint, p_name text, p_value jsonb, p_least bigint) RETURNS bigint
LANGUAGE plpgsql IMMUTABLE AS $$
DECLARE
    v_text text := p_value #>> '{}';
BEGIN
    IF jsonb_typeof(p_value) = 'number' AND v_text ~ '^[0-9]{1,16}$'
       AND v_text::bigint BETWEEN p_least AND 9007199254740991 THEN
        RETURN v_text;
    END IF;
    RAISE EXCEPTION 'items[%].% must be a whole number from % to 9007199254740991', p_place, p_name, p_least
        USING ERRCODE = 'KR006';
END
$$;

-- RFC 3339 with an offset. The year ends at 9998: in a zone east of UTC the end of 9999 is the year 10000, which many
-- languages cannot read. (The pipeline's instants are of the past, and one in 9999 is still read.) The day is looked at
-- here, because the cast's own error would not name the item.
CREATE OR REPLACE FUNCTION kino.read_instant(p_place bigint, p_name text, p_value jsonb,
                                             p_last_year integer DEFAULT 9998) RETURNS timestamptz
LANGUAGE plpgsql STABLE AS $$
DECLARE
    v_text text := p_value #>> '{}';
    v_at timestamptz;
BEGIN
    IF jsonb_typeof(p_value) = 'string'
       AND v_text COLLATE "C" ~ ('^[0-9]{4}-(0[1-9]|1[0-2])-(0[1-9]|[12][0-9]|3[01])[Tt ]([01][0-9]|2[0-3]):[0-5][0-9]'
                                 ':[0-5][0-9]([.][0-9]{1,9})?([Zz]|[+-](0[0-9]|1[0-5]):[0-5][0-9])$')
       AND left(v_text, 4) <> '0000'
       AND (substr(v_text, 9, 2) <= '28'
            OR substr(v_text, 9, 2)::integer <= extract(
                day FROM make_date(left(v_text, 4)::integer, substr(v_text, 6, 2)::integer, 1)
                         + interval '1 month' - interval '1 day')) THEN
        v_at := v_text;
        IF v_at >= '0001-01-01 00:00:00+00' AND extract(year FROM v_at) <= p_last_year THEN
            RETURN v_at;
        END IF;
    END IF;
    RAISE EXCEPTION 'items[%].% must be an RFC 3339 instant with an offset, from the year 1 to %', p_place, p_name,
        p_last_year USING ERRCODE = 'KR006';
END
$$;

-- What a person or a program says in its own words: a reason, a version, a name.
CREATE OR REPLACE FUNCTION kino.read_text(p_place bigint, p_name text, p_value jsonb) RETURNS text
LANGUAGE plpgsql IMMUTABLE AS $$
DECLARE
    v_text text := p_value #>> '{}';
BEGIN
    IF jsonb_typeof(p_value) = 'string' AND length(v_text) BETWEEN 1 AND 1000 AND btrim(v_text) <> ''
       AND (v_text COLLATE "C" ~ '^[ -~]*$' OR NOT kino.has_unprintable(v_text)) THEN
        RETURN v_text;
    END IF;
    RAISE EXCEPTION 'items[%].% must be 1 to 1,000 printable characters', p_place, p_name USING ERRCODE = 'KR006';
END
$$;

CREATE OR REPLACE FUNCTION kino.read_word(p_place bigint, p_name text, p_value jsonb, p_words text[]) RETURNS text
LANGUAGE plpgsql IMMUTABLE AS $$
DECLARE
    v_text text := p_value #>> '{}';
BEGIN
    IF jsonb_typeof(p_value) = 'string' AND v_text = ANY (p_words) THEN
        RETURN v_text;
    END IF;
    RAISE EXCEPTION 'items[%].% must be one of %', p_place, p_name, array_to_string(p_words, ', ')
        USING ERRCODE = 'KR006';
END
$$;

-- The same in the two functions that everything goes through, where to read an event's ten fields so would cost as much as
-- half of what is written for it. Postgres reads all items at once, as text; what is plainly right by the rules above
-- is taken from there, in a line that the planner writes into the statement, and any other value is read by them.

-- Whether in every item just this one value is a number, and all others are strings: as many as there are items. Else
-- nothing is plain: as text a number looks like a string. Strict, for a lax path looks into arrays.
CREATE OR REPLACE FUNCTION kino.has_plain_types(p_items jsonb, p_is_no_number jsonpath) RETURNS boolean
LANGUAGE sql IMMUTABLE AS $$
    SELECT NOT jsonb_path_exists(p_items, p_is_no_number)
           AND jsonb_array_length(jsonb_path_query_array(p_items, 'strict $[*].* ? (@.type() != "string")'))
               = jsonb_array_length(p_items)
$$;

CREATE OR REPLACE FUNCTION kino.take_id(p_plain boolean, p_text text, p_items jsonb, p_place bigint, p_name text)
RETURNS text
LANGUAGE sql IMMUTABLE AS $$
    SELECT CASE WHEN p_plain AND length(p_text) <= 128 AND p_text COLLATE "C" ~ '^[!-~]+$' THEN p_text
                ELSE kino.read_id(p_place, p_name, p_items -> p_place::integer -> p_name) END
$$;

CREATE OR REPLACE FUNCTION kino.take_text(p_plain boolean, p_text text, p_items jsonb, p_place bigint, p_name text)
RETURNS text
LANGUAGE sql IMMUTABLE AS $$
    SELECT CASE WHEN p_plain AND length(p_text) <= 1000 AND p_text COLLATE "C" ~ '^[!-~]+$' THEN p_text
                ELSE kino.read_text(p_place, p_name, p_items -> p_place::integer -> p_name) END
$$;

CREATE OR REPLACE FUNCTION kino.take_number(p_plain boolean, p_text text, p_items jsonb, p_place bigint, p_name text,
                                            p_least bigint) RETURNS bigint
LANGUAGE sql IMMUTABLE AS $$
    SELECT CASE WHEN p_plain AND length(p_text) < 16 AND translate(p_text, '0123456789', '') = '' AND p_text <> '0'
                THEN p_text::bigint
                ELSE kino.read_credits(p_place, p_name, p_items -> p_place::integer -> p_name, p_least) END
$$;

CREATE OR REPLACE FUNCTION kino.take_word(p_plain boolean, p_text text, p_items jsonb, p_place bigint, p_name text,
                                          p_words text[]) RETURNS text
LANGUAGE sql IMMUTABLE AS $$
    SELECT CASE WHEN p_plain AND p_text = ANY (p_words) THEN p_text
                ELSE kino.read_word(p_place, p_name, p_items -> p_place::integer -> p_name, p_words) END
$$;

-- Plain is UTC, every separator at its place and all else digits; not a day that some months have not.
CREATE OR REPLACE FUNCTION kino.take_instant(p_plain boolean, p_text text, p_items jsonb, p_place bigint, p_name text,
                                             p_last_year integer) RETURNS timestamptz
LANGUAGE sql STABLE AS $$
    SELECT CASE WHEN p_plain AND p_text LIKE '2___-__-__T__:__:__%+00:00'
                     AND translate(p_text, '0123456789', '') = CASE length(p_text) WHEN 25 THEN '--T::+:'
                                                                    WHEN 32 THEN '--T::.+:' END
                     AND substr(p_text, 20, 1) IN ('.', '+') AND substr(p_text, 6, 2) BETWEEN '01' AND '12'
                     AND substr(p_text, 9, 2) BETWEEN '01' AND '28' AND substr(p_text, 12, 2) < '24'
                     AND substr(p_text, 15, 1) < '6' AND substr(p_text, 18, 1) < '6'
                THEN p_text::timestamptz
                ELSE kino.read_instant(p_place, p_name, p_items -> p_place::integer -> p_name, p_last_year) END
$$;

-- A word of the caller's beside an item, not in it.
CREATE OR REPLACE FUNCTION kino.require_id(p_name text, p_text text) RETURNS void
LANGUAGE plpgsql IMMUTABLE AS $$
BEGIN
    IF p_text IS NULL OR NOT kino.is_id(p_text) THEN
        RAISE EXCEPTION '% must be 1 to 128 printable characters, without white space at either end', p_name
            USING ERRCODE = 'KR006';
    END IF;
END
$$;

-- A constraint says in its DETAIL whose row stands in the way; only its name is told.
CREATE OR REPLACE FUNCTION kino.refuse_constraint(p_constraint text) RETURNS void
LANGUAGE plpgsql IMMUTABLE AS $$
BEGIN
    RAISE EXCEPTION 'the ledger refuses this by its constraint %', p_constraint USING ERRCODE = 'KR008';
END
$$;
