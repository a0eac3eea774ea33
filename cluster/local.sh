#!/usr/bin/env bash
# Runs a single-machine Ray cluster with token authentication and its dashboard on loopback.
#
#   eval "$(cluster/local.sh up)"    starts it and prints `export` lines; prints the same lines if it is running
#   cluster/local.sh status          exit code 0 and the `export` lines if it is running, otherwise 3
#   cluster/local.sh down            stops only the processes that `up` started; succeeds if there are none
#
# Optional environment variables, with their defaults:
#   BATCHCLS_CLUSTER_DIR                 state folder (.cluster in the repository)
#   BATCHCLS_CLUSTER_CPUS, _GPUS         number of CPUs and GPUs (2; the GPUs that Ray detects)
#   BATCHCLS_CLUSTER_OBJECT_STORE_BYTES  shared memory for blocks in flight (1000000000)
#   BATCHCLS_CLUSTER_DASHBOARD_PORT      port of the dashboard and the job API (a free port)
set -euo pipefail
export LC_ALL=C.UTF-8

say() { echo "local.sh: $*" >&2; }
usage() { say "usage: local.sh up|down|status"; exit 2; }
[[ $# -eq 1 ]] || usage

here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd -P)
repository=$(dirname -- "$here")
state=$(realpath -m -- "${BATCHCLS_CLUSTER_DIR:-$repository/.cluster}")
umask 077 # the state folder contains a token

# --- processes of this cluster ----------------------------------------------------
# `up` sets BATCHCLS_CLUSTER_ID in the environment of all processes that it starts. Some Ray processes
# overwrite their environment with a title, but they are children of processes that do not.
cluster_pids() {
  local id marked
  id=$(cat "$state/id" 2>/dev/null) || return 0
  marked=$(grep -lzxF -- "BATCHCLS_CLUSTER_ID=$id" /proc/[0-9]*/environ 2>/dev/null | cut -d/ -f3) || true
  [[ -n $marked ]] || return 0
  # Include all descendants, but no zombies.
  ps -eo pid=,ppid=,stat= | awk -v marked="$marked" -v self="$$" '
    BEGIN { n = split(marked, pids, "\n"); for (i = 1; i <= n; i++) mine[pids[i]] = 1 }
    { parent[$1] = $2; state[$1] = $3 }
    END {
      do { grew = 0; for (p in parent) if (!(p in mine) && parent[p] in mine) { mine[p] = 1; grew = 1 } } while (grew)
      for (p in mine) if (p in state && state[p] !~ /^Z/ && p != self) print p
    }'
}

running_pids() { # prints the given PIDs that are still running
  local pid kind
  for pid in "$@"; do
    kind=$(ps -o stat= -p "$pid") && [[ $kind != Z* ]] && echo "$pid"
  done
  return 0
}

# --- HTTP requests to the dashboard, without curl and without a proxy --------------
request() { # request METHOD PATH [BODY]: prints the response; fails unless its status is 200
  local response body=${3:-}
  response=$(
    exec 2>/dev/null 3<>"/dev/tcp/127.0.0.1/$(cat "$state/dashboard_port")" || exit 1
    printf '%s\r\n' "$1 $2 HTTP/1.0" "Host: 127.0.0.1" "Authorization: Bearer $(cat "$state/token")" \
      "Content-Type: application/json" "Content-Length: ${#body}" "" >&3
    printf '%s' "$body" >&3
    timeout 20 cat <&3
  ) || return 1
  [[ ${response%%$'\r'*} == *" 200 "* ]] || return 1
  printf '%s\n' "$response"
}

running() { [[ -f $state/env && -n $(cluster_pids) ]] && request GET /api/version >/dev/null; }

# --- down -------------------------------------------------------------------------
take_down() {
  local left=() temporary i
  if [[ -f $state/id ]]; then
    # Repeat, because processes may start between listing and killing.
    for ((i = 0; i < 100; i++)); do
      mapfile -t -O "${#left[@]}" left < <(cluster_pids)
      mapfile -t left < <(running_pids "${left[@]}" | sort -un)
      [[ ${#left[@]} -gt 0 ]] || break
      kill -KILL "${left[@]}" 2>/dev/null || true
      sleep 0.1
    done
    [[ ${#left[@]} -eq 0 ]] || { say "could not stop: ${left[*]}"; return 1; }
  fi
  temporary=$(cat "$state/temporary" 2>/dev/null) || true
  [[ $temporary != */batchcls-* ]] || rm -rf -- "$temporary"
  rm -f -- "$state"/{id,temporary,token,port,dashboard_port,env,env.new,start.log}
}

# --- up ---------------------------------------------------------------------------
free_ports() { # prints five free loopback ports and the dashboard port: $1, or a free one if empty
  "$python" -c '
import socket, sys
sockets = [socket.socket() for _ in range(6)]
for one, port in zip(sockets, [0] * 5 + [int(sys.argv[1] or 0)]):
    if port:  # a given port may have old connections in TIME_WAIT
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    one.bind(("127.0.0.1", port))
print(*(one.getsockname()[1] for one in sockets))' "$1" 2>/dev/null
}

start_head() {
  local ports options
  # Ray silently uses the next port if the requested one is taken.
  read -r -a ports < <(free_ports "${BATCHCLS_CLUSTER_DASHBOARD_PORT:-}") ||
    { say "no free port${BATCHCLS_CLUSTER_DASHBOARD_PORT:+, or $BATCHCLS_CLUSTER_DASHBOARD_PORT is taken}"; return 1; }
  echo "${ports[0]}" >"$state/port"
  echo "${ports[5]}" >"$state/dashboard_port"
  options=(
    --head --disable-usage-stats --log-style record --log-color false
    --port "${ports[0]}"
    --include-dashboard true --dashboard-host 127.0.0.1 --dashboard-port "$(cat "$state/dashboard_port")"
    --dashboard-agent-listen-port "${ports[1]}" --dashboard-agent-grpc-port "${ports[2]}"
    --metrics-export-port "${ports[3]}" --ray-client-server-port "${ports[4]}"
    --num-cpus "${BATCHCLS_CLUSTER_CPUS:-2}"
    --object-store-memory "${BATCHCLS_CLUSTER_OBJECT_STORE_BYTES:-1000000000}"
    --temp-dir "$(cat "$state/temporary")"
  )
  [[ -z ${BATCHCLS_CLUSTER_GPUS:-} ]] || options+=(--num-gpus "$BATCHCLS_CLUSTER_GPUS")
  # Jobs run `python ...` with the PATH of the head. Workers inherit the MALLOC_... variables and retain freed memory
  # (docs/how-to/clusters.md). The daemons must not inherit standard output or the lock.
  env -u RAY_ADDRESS -u RAY_API_SERVER_ADDRESS -u RAY_AUTH_TOKEN PATH="$(dirname -- "$python"):$PATH" \
    BATCHCLS_CLUSTER_ID="$(cat "$state/id")" RAY_USAGE_STATS_ENABLED=0 \
    MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=1099511627776 MALLOC_ARENA_MAX=1 \
    RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$state/token" \
    timeout 120 "$ray" start "${options[@]}" </dev/null >"$state/start.log" 2>&1 9<&-
}

# The dashboard responds before it can start jobs ("No available agent"), so run a trivial job first.
wait_for_jobs() {
  local deadline=$((SECONDS + 120)) job='{"entrypoint": "true", "submission_id": "ready"}'
  until request POST /api/jobs/ "$job" >/dev/null; do
    ((SECONDS < deadline)) && [[ -n $(cluster_pids) ]] || return 1
    sleep 0.3
  done
  until request GET /api/jobs/ready | grep -q '"status": "SUCCEEDED"'; do
    ((SECONDS < deadline)) || return 1
    sleep 0.3
  done
  request DELETE /api/jobs/ready >/dev/null || true # only removes it from the list of jobs
}

write_environment() {
  local http
  http=http://127.0.0.1:$(cat "$state/dashboard_port")
  # `ray job` needs the address of the dashboard, which ray.init() rejects.
  cat >"$state/env.new" <<EOF
export RAY_API_SERVER_ADDRESS=$http
export RAY_ADDRESS=127.0.0.1:$(cat "$state/port")
export RAY_AUTH_MODE=token
export RAY_AUTH_TOKEN_PATH=$(printf %q "$state/token")
# The dashboard is at $http and requires the token in that file. To submit a job:
# jobs/submit.sh classify --config jobs/classify.toml
EOF
  mv -- "$state/env.new" "$state/env"
}

bring_up() {
  started=
  finish() {
    [[ -z $started ]] || return 0
    if [[ -s $state/start.log ]]; then
      say "failed; the last lines of the output of ray start:"
      tail -n 12 -- "$state/start.log" >&2
    fi
    take_down
  }
  trap finish EXIT
  trap 'exit 1' HUP INT TERM
  "$python" -c 'import secrets; print(secrets.token_hex(32), end="")' >"$state/token"
  "$python" -c 'import uuid; print(uuid.uuid4())' >"$state/id"
  # Not inside the state folder, because it contains Ray's sockets, whose paths are limited to 107 bytes.
  mktemp -d "/tmp/batchcls-XXXXXX" >"$state/temporary"
  start_head || { say "the cluster did not start"; exit 1; }
  wait_for_jobs || { say "the cluster does not accept jobs after 2 minutes"; exit 1; }
  write_environment
  started=yes
}

case $1 in
  up)
    python=$repository/.venv/bin/python
    [[ -x $python ]] || python=$(type -P python3) || { say "no python3 on PATH"; exit 1; }
    ray=$(dirname -- "$python")/ray
    [[ -x $ray ]] || ray=$(type -P ray) || { say "no ray on PATH: make setup, or activate its environment"; exit 1; }
    mkdir -p -- "$state"
    exec 9<"$state"
    flock -w 240 9 || { say "another process holds the lock of $state"; exit 1; }
    if ! running; then
      take_down # remove a partially started or crashed cluster
      bring_up
    fi
    cat "$state/env"
    ;;
  down)
    [[ -d $state ]] || exit 0
    exec 9<"$state"
    flock -w 240 9 || { say "another process holds the lock of $state"; exit 1; }
    take_down
    rmdir -- "$state" 2>/dev/null || true # the folder may contain other files
    ;;
  status)
    if running; then cat "$state/env"; else say "not running"; exit 3; fi
    ;;
  *) usage ;;
esac
