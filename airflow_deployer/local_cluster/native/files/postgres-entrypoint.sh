#!/bin/bash
# Initialises an empty PGDATA as the POSTGRES_* variables say, then becomes the server. Run as root it prepares the
# directory and goes on as postgres; run as another user it uses what that user may write.
set -euo pipefail

fail() {
  echo "docker-entrypoint: $*" >&2
  exit 1
}

# from_file NAME DEFAULT: NAME, or the content of the file that NAME_FILE names, or DEFAULT.
from_file() {
  local name=$1 default=${2-} file_name="$1_FILE" value
  if [[ -n ${!name-} && -n ${!file_name-} ]]; then
    fail "$name and $file_name are both set; set one"
  fi
  if [[ -n ${!file_name-} ]]; then
    value=$(<"${!file_name}")
  else
    value=${!name-$default}
  fi
  printf -v "$name" %s "$value"
  unset "$file_name"
}

initialise() {
  from_file POSTGRES_USER postgres
  from_file POSTGRES_PASSWORD
  from_file POSTGRES_DB "$POSTGRES_USER"
  from_file POSTGRES_INITDB_ARGS
  local method=${POSTGRES_HOST_AUTH_METHOD:-scram-sha-256} password
  if [[ -z $POSTGRES_PASSWORD && $method != trust ]]; then
    fail "POSTGRES_PASSWORD (or POSTGRES_PASSWORD_FILE) must be set to initialise the database"
  fi

  local arguments=(--username="$POSTGRES_USER")
  if [[ -n $POSTGRES_PASSWORD ]]; then
    # Through a pipe: neither on a command line nor in a file, and /tmp may be read-only.
    exec {password}< <(printf '%s\n' "$POSTGRES_PASSWORD")
    arguments+=(--pwfile="/dev/fd/$password")
  fi
  if [[ -n ${POSTGRES_INITDB_WALDIR-} ]]; then
    arguments+=(--waldir="$POSTGRES_INITDB_WALDIR")
  fi
  # POSTGRES_INITDB_ARGS is a list of words, as in a shell.
  eval "initdb -D \"\$PGDATA\" \"\${arguments[@]}\" $POSTGRES_INITDB_ARGS"
  if [[ -n ${password-} ]]; then
    exec {password}<&-
  fi
  printf '\nhost all all all %s\n' "$method" >>"$PGDATA/pg_hba.conf"

  # Nobody but this script may connect before the database is complete: socket only.
  pg_ctl -D "$PGDATA" -w -o "-c listen_addresses='' -p ${PGPORT:-5432}" start
  local client=(psql -v ON_ERROR_STOP=1 --no-psqlrc --no-password --username "$POSTGRES_USER")
  export PGPASSWORD=${PGPASSWORD-$POSTGRES_PASSWORD}
  if [[ $POSTGRES_DB != postgres ]]; then
    "${client[@]}" --dbname postgres -v name="$POSTGRES_DB" <<<'CREATE DATABASE :"name";'
  fi
  client+=(--dbname "$POSTGRES_DB")
  local file
  for file in /docker-entrypoint-initdb.d/*; do
    case $file in
      *.sh) if [[ -x $file ]]; then "$file"; else . "$file"; fi ;;
      *.sql) "${client[@]}" -f "$file" ;;
      *.sql.gz) gunzip -c "$file" | "${client[@]}" ;;
    esac
  done
  unset PGPASSWORD
  pg_ctl -D "$PGDATA" -m fast -w stop
}

if [[ ${1-} == -* ]]; then
  set -- postgres "$@"
fi
if [[ ${1-} == postgres && " $* " != *" --help "* && " $* " != *" --version "* && " $* " != *" -V "* ]]; then
  mkdir -p "$PGDATA"
  if [[ $(id -u) == 0 ]]; then
    find "$PGDATA" \! -user postgres -exec chown postgres {} +
    chmod 0700 "$PGDATA"
    exec setpriv --reuid=postgres --regid=postgres --init-groups "$0" "$@"
  fi
  chmod 0700 "$PGDATA" 2>/dev/null || true
  if [[ ! -s $PGDATA/PG_VERSION ]]; then
    initialise
  fi
fi
exec "$@"
