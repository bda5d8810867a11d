#!/bin/sh
# Print the ACL file that Redis reads: users.acl with digests of the passwords in the environment.
#
#   REDIS_PUBLISHER_PASSWORD=… REDIS_WORKER_PASSWORD=… REDIS_PRODUCT_PASSWORD=… REDIS_READONLY_PASSWORD=…
#   REDIS_SCALER_PASSWORD=… REDIS_ADMIN_PASSWORD=… ./render-acl.sh > /etc/redis/users.acl
#
# A user whose password is not set cannot log in: it is switched off, and the rest works.
set -eu
umask 077
template="$(dirname "$0")/users.acl"

# Comments go, and an indented line belongs to the one before.
lines="$(awk '/^#/ || /^$/ { next } /^ / { sub(/^ +/, " "); line = line $0; next }
              { if (line) print line; line = $0 } END { print line }' "$template")"

for user in publisher worker product readonly scaler admin; do
  name="$(printf '%s' "$user" | tr '[:lower:]' '[:upper:]')"
  eval "password=\${REDIS_${name}_PASSWORD:-}"
  if [ -n "$password" ]; then
    digest="$(printf '%s' "$password" | sha256sum | cut -d ' ' -f 1)"
    lines="$(printf '%s\n' "$lines" | sed "s/#@${name}@/#${digest}/")"
  else
    lines="$(printf '%s\n' "$lines" | sed "s/ on #@${name}@/ off/")"
    echo "REDIS_${name}_PASSWORD is not set: user $user is off" >&2
  fi
done
printf '%s\n' "$lines"
