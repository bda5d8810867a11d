-- Beyond kino_refunds/db/roles.sql, which comes first: who else may come in, and how long a migration may make
-- the others wait. Idempotent; run by a superuser in the database that holds schema `kino`. Passwords are not
-- here: postgres-init.sh sets them.
DO $$
BEGIN
    -- By default every role of the server may connect to every database and make temporary tables in it. Whoever
    -- else works in this database must be let in by name: GRANT CONNECT ON DATABASE … TO ….
    EXECUTE format('REVOKE CONNECT, TEMPORARY ON DATABASE %I FROM PUBLIC', current_database());
    -- The default since Postgres 15; a database that is older than that may still have it otherwise.
    REVOKE CREATE ON SCHEMA public FROM PUBLIC;
    -- A migration that waits for a table lock holds up every settlement behind it. It gives up instead, having
    -- changed nothing, and is run again.
    ALTER ROLE kino_owner SET lock_timeout = '10s';
    -- A worker limits its own sessions (KINO_*_TIMEOUT_MS); these hold for whoever uses its password otherwise.
    ALTER ROLE kino_worker SET idle_in_transaction_session_timeout = '1min';
    ALTER ROLE kino_worker SET statement_timeout = '5min';
    -- A commit that was answered must be on disk (promises P1 to P3).
    ALTER ROLE kino_worker SET synchronous_commit = 'on';
    ALTER ROLE kino_product SET synchronous_commit = 'on';
END
$$;
