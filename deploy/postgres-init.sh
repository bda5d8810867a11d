#!/bin/sh
# Make the roles and give them their passwords; run by the Postgres image when its data folder is new, or by
# hand, as often as you like, with PGHOST, PGUSER and so on set. A role without a password in the environment
# keeps the one it has.
set -eu
database="${POSTGRES_DB:-kino}"
user="${POSTGRES_USER:-postgres}"
sql="${ROLES_SQL_FOLDER:-/kino-sql}"

psql() { command psql --no-psqlrc --quiet --set ON_ERROR_STOP=1 --username "$user" --dbname "$database" "$@"; }

psql --file "$sql/roles.sql"
psql --file "$sql/postgres-roles.sql"
for role in owner worker product oncall read; do
  name="$(printf '%s' "$role" | tr '[:lower:]' '[:upper:]')"
  eval "password=\${POSTGRES_${name}_PASSWORD:-}"
  if [ -n "$password" ]; then
    # By the environment: on a command line everybody on this machine could read it.
    ROLE_PASSWORD="$password" psql <<SQL
\\getenv password ROLE_PASSWORD
ALTER ROLE kino_$role PASSWORD :'password';
SQL
  else
    echo "POSTGRES_${name}_PASSWORD is not set: kino_$role keeps what it has" >&2
  fi
done
