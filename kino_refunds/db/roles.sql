-- The roles, idempotent; run by a superuser in the database that will hold schema `kino`, once and before an upgrade
-- that needs another one. They are created without a password: give each one yours (ALTER ROLE … PASSWORD …) or a
-- pg_hba rule. What each may touch is granted by `kino-refunds migrate`; who may *be* what is decided here.
DO $$
DECLARE
    role_name text;
BEGIN
    FOREACH role_name IN ARRAY ARRAY['kino_owner', 'kino_worker', 'kino_product', 'kino_oncall', 'kino_read'] LOOP
        IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = role_name) THEN
            EXECUTE format('CREATE ROLE %I LOGIN NOSUPERUSER NOCREATEDB NOCREATEROLE', role_name);
        END IF;
    END LOOP;
    EXECUTE format('GRANT CONNECT, CREATE ON DATABASE %I TO kino_owner', current_database());
    EXECUTE format('GRANT CONNECT ON DATABASE %I TO kino_worker, kino_product, kino_oncall, kino_read',
                   current_database());

    -- The ledger's functions run as this role, which may write its tables and owns none. Nobody connects as it. The
    -- owner is a member, so that migrations can replace the functions; nobody else may be.
    IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = 'kino_ledger') THEN
        CREATE ROLE kino_ledger NOLOGIN NOSUPERUSER NOCREATEDB NOCREATEROLE;
    END IF;
    IF NOT pg_has_role('kino_owner', 'kino_ledger', 'MEMBER') THEN
        GRANT kino_ledger TO kino_owner;
    END IF;

    -- A product transaction that was forgotten holds its account's lots and the horizon: no refund settles there,
    -- and statements, relay and proofs stand still. Before Postgres 17 nothing limits a whole transaction, only each
    -- part of it.
    ALTER ROLE kino_product SET statement_timeout = '5min';
    ALTER ROLE kino_product SET idle_in_transaction_session_timeout = '5min';
    IF current_setting('server_version_num')::int >= 170000 THEN
        ALTER ROLE kino_product SET transaction_timeout = '30min';
    END IF;
    -- A forgotten reporting session must not hold back the horizon that statements and the relay read below; nor one
    -- of a person who looks after the system at night.
    ALTER ROLE kino_read SET idle_in_transaction_session_timeout = '5min';
    ALTER ROLE kino_read SET statement_timeout = '5min';
    ALTER ROLE kino_oncall SET idle_in_transaction_session_timeout = '5min';
    ALTER ROLE kino_oncall SET statement_timeout = '5min';
END
$$;
