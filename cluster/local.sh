#!/usr/bin/env bash
# A Ray cluster of several nodes on this machine, to debug what will run on a real one: a head without work, nodes labelled
# tpaw-role=learner and tpaw-role=opponent (and tpaw-node=NUMBER), and token authentication.
#
#   cluster/local.sh up [OPPONENTS [LEARNERS]]    start it (2 opponent nodes and 1 learner node), print what to export
#   cluster/local.sh env                          print that again
#   cluster/local.sh node ROLE                    add a node; prints its number
#   cluster/local.sh kill NUMBER                  end a node at once, as a lost machine does
#   cluster/local.sh down                         end all of it
#
# TPAW_CLUSTER is the folder of its state (.cluster), TPAW_NODE_CPUS what each node has for Ray to set aside (2).
set -euo pipefail
cd "$(dirname "$0")/.."
STATE=${TPAW_CLUSTER:-$PWD/.cluster}
RAY=${RAY:-$(command -v ray || echo "$PWD/.venv/bin/ray")}
CPUS=${TPAW_NODE_CPUS:-2}
PORT=${TPAW_RAY_PORT:-6380}
DASHBOARD=${TPAW_DASHBOARD_PORT:-8266}
URL=http://127.0.0.1:$DASHBOARD
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$STATE/token RAY_TMPDIR=${RAY_TMPDIR:-/tmp/ray-local}
# Tasks without a GPU see what they always did; a node that is told to end does not drain first.
export RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO=0 RAY_USAGE_STATS_ENABLED=0 RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=0
export PATH="$(dirname "$RAY"):$PATH" # jobs run this environment's python
unset RAY_ADDRESS RAY_API_SERVER_ADDRESS

# A node is a session of its own: `ray start --block` and all that it starts. Ports that have fixed defaults are any that is free.
start() { # NAME ARGUMENTS…
  local name=$1
  shift
  # Nodes share the machine, but no copies of checkpoints and none of a job's folder, which each node's agent makes anew and so would
  # take away from a driver on another; and none takes a third of the memory for objects.
  TPAW_CACHE=$STATE/$name.cache setsid "$RAY" start --block --object-store-memory=268435456 --min-worker-port=0 --max-worker-port=0 \
    --dashboard-agent-listen-port=0 --temp-dir="$RAY_TMPDIR/$name" "$@" >"$STATE/$name.log" 2>&1 </dev/null &
  echo $! >"$STATE/$name.pid"
}

# Nodes come one after another: each takes the next number.
add() { # ROLE
  local number
  number=$(find "$STATE" -name '*.pid' | wc -l)
  start "$number-$1" --address="127.0.0.1:$PORT" --num-cpus="$CPUS" --labels="tpaw-role=$1,tpaw-node=$number"
  await "$number-$1"
  echo "$number"
}

await() { # NAME of a node that was started: until the head knows it to live
  local end=$((SECONDS + 90))
  until "$RAY" list nodes --address="$URL" --filter state=ALIVE --detail --format json 2>/dev/null | grep -q "\"tpaw-node\": \"${1%%-*}\""; do
    if ! alive "$1" || [ "$SECONDS" -gt "$end" ]; then
      tail -n 40 "$STATE/$1.log" >&2
      echo "node $1 did not come up; the whole log is $STATE/$1.log" >&2
      exit 1
    fi
    sleep 0.5
  done
}

alive() { # NAME
  [ -e "$STATE/$1.pid" ] && kill -0 "$(cat "$STATE/$1.pid")" 2>/dev/null
}

exports() {
  echo "export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$STATE/token RAY_API_SERVER_ADDRESS=$URL RAY_ADDRESS=127.0.0.1:$PORT"
}

case ${1:-} in
up)
  if alive 0-head; then
    echo "it is up already; cluster/local.sh down ends it" >&2
    exit 2
  fi
  mkdir -p "$STATE" "$RAY_TMPDIR"
  rm -f "$STATE"/*.pid "$STATE"/*.log
  (umask 077 && od -An -N32 -tx1 /dev/urandom | tr -d ' \n' >"$STATE/token")
  start 0-head --head --port="$PORT" --dashboard-port="$DASHBOARD" --dashboard-host=127.0.0.1 --num-cpus=0 \
    --ray-client-server-port="$((PORT + 10000))" --labels=tpaw-role=head,tpaw-node=0 --disable-usage-stats
  await 0-head
  for _ in $(seq "${3:-1}"); do add learner >/dev/null; done
  for _ in $(seq "${2:-2}"); do add opponent >/dev/null; done
  exports
  ;;
env)
  exports
  ;;
node)
  add "${2:?a role: opponent or learner}"
  ;;
kill)
  for file in "$STATE/${2:?the number of a node}"-*.pid; do
    pkill -KILL -s "$(cat "$file")"
  done
  ;;
down)
  for file in $(find "$STATE" -name '*.pid' 2>/dev/null | sort -r); do
    pkill -TERM -s "$(cat "$file")" || true
  done
  for file in $(find "$STATE" -name '*.pid' 2>/dev/null); do
    for _ in $(seq 60); do
      pgrep -s "$(cat "$file")" >/dev/null || break
      sleep 0.5
    done
    pkill -KILL -s "$(cat "$file")" || true
    rm -f "$file"
  done
  ;;
*)
  sed -n '2,13s/^# \{0,1\}//p' "$0"
  exit 2
  ;;
esac
