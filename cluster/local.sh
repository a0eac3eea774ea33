#!/usr/bin/env bash
# A Ray cluster of one machine behind a token of its own, with its dashboard on loopback.
#
#   eval "$(cluster/local.sh up)"    starts it and prints `export` lines; again: same cluster, same lines
#   cluster/local.sh status          says whether it runs; exit code 0 if so, 3 if not
#   cluster/local.sh down            ends what `up` started and nothing else; nothing there: nothing to do
#
# Optional, in the environment:
#   BATCHCLS_CLUSTER_DIR                 where its state is kept (.cluster in the repository)
#   BATCHCLS_CLUSTER_CPUS, _GPUS         cores and GPUs it offers (2; as many GPUs as Ray finds)
#   BATCHCLS_CLUSTER_OBJECT_STORE_BYTES  shared memory for blocks in flight (1000000000)
#   BATCHCLS_CLUSTER_DASHBOARD_PORT      a fixed port for the dashboard and jobs (a free one)
set -euo pipefail
export LC_ALL=C.UTF-8

say() { echo "local.sh: $*" >&2; }
usage() { say "usage: local.sh up|down|status"; exit 2; }
[[ $# -eq 1 ]] || usage

here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd -P)
repository=$(dirname -- "$here")
state=$(realpath -m -- "${BATCHCLS_CLUSTER_DIR:-$repository/.cluster}")
umask 077 # the state folder holds a token

# --- which processes are ours ---------------------------------------------------
# `up` puts a word of its own into the environment of all it starts. Some of Ray's processes
# overwrite theirs with a title, but those are children of others that do not.
ours() {
  local id marked
  id=$(cat "$state/id" 2>/dev/null) || return 0
  marked=$(grep -lzxF -- "BATCHCLS_CLUSTER_ID=$id" /proc/[0-9]*/environ 2>/dev/null | cut -d/ -f3) || true
  [[ -n $marked ]] || return 0
  # Children follow from parents; processes that have ended and wait for their parent count no more.
  ps -eo pid=,ppid=,stat= | awk -v marked="$marked" -v self="$$" '
    BEGIN { n = split(marked, pids, "\n"); for (i = 1; i <= n; i++) mine[pids[i]] = 1 }
    { parent[$1] = $2; state[$1] = $3 }
    END {
      do { grew = 0; for (p in parent) if (!(p in mine) && parent[p] in mine) { mine[p] = 1; grew = 1 } } while (grew)
      for (p in mine) if (p in state && state[p] !~ /^Z/ && p != self) print p
    }'
}

still_there() { # those of the given pids that have not ended
  local pid kind
  for pid in "$@"; do
    kind=$(ps -o stat= -p "$pid") && [[ $kind != Z* ]] && echo "$pid"
  done
  return 0
}

# --- the dashboard's HTTP, asked without curl or a proxy --------------------------
ask() { # ask METHOD PATH [BODY]: prints the answer; fails unless its status is 200
  local answer body=${3:-}
  answer=$(
    exec 2>/dev/null 3<>"/dev/tcp/127.0.0.1/$(cat "$state/dashboard_port")" || exit 1
    printf '%s\r\n' "$1 $2 HTTP/1.0" "Host: 127.0.0.1" "Authorization: Bearer $(cat "$state/token")" \
      "Content-Type: application/json" "Content-Length: ${#body}" "" >&3
    printf '%s' "$body" >&3
    timeout 20 cat <&3
  ) || return 1
  [[ ${answer%%$'\r'*} == *" 200 "* ]] || return 1
  printf '%s\n' "$answer"
}

running() { [[ -f $state/env && -n $(ours) ]] && ask GET /api/version >/dev/null; }

# --- down -------------------------------------------------------------------------
take_down() {
  local pids left=() temporary i
  if [[ -f $state/id ]]; then
    # A second look finds what was started between the first look and the kill.
    for ((i = 0; i < 100; i++)); do
      mapfile -t -O "${#left[@]}" left < <(ours)
      mapfile -t left < <(still_there "${left[@]}" | sort -un)
      [[ ${#left[@]} -gt 0 ]] || break
      kill -KILL "${left[@]}" 2>/dev/null || true
      sleep 0.1
    done
    [[ ${#left[@]} -eq 0 ]] || { say "did not end: ${left[*]}"; return 1; }
  fi
  temporary=$(cat "$state/temporary" 2>/dev/null) || true
  [[ $temporary != */batchcls-* ]] || rm -rf -- "$temporary"
  rm -f -- "$state"/{id,temporary,token,port,dashboard_port,env,env.new,start.log}
}

# --- up ---------------------------------------------------------------------------
take_ports() { # prints five free ports of loopback and one for the dashboard: $1, or a free one if empty
  "$python" -c '
import socket, sys
held = [socket.socket() for _ in range(6)]
for one, port in zip(held, [0] * 5 + [int(sys.argv[1] or 0)]):
    if port:  # a given port may have old connections in TIME_WAIT
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    one.bind(("127.0.0.1", port))
print(*(one.getsockname()[1] for one in held))' "$1" 2>/dev/null
}

start_head() {
  local ports options
  # Ray would quietly take the next port where the wanted one is taken.
  read -r -a ports < <(take_ports "${BATCHCLS_CLUSTER_DASHBOARD_PORT:-}") ||
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
  # Jobs start as `python ...` with the head's PATH. Workers inherit MALLOC_..., with which they keep memory that they
  # free (README.md). The daemons must hold neither our output nor the lock.
  env -u RAY_ADDRESS -u RAY_API_SERVER_ADDRESS -u RAY_AUTH_TOKEN PATH="$(dirname -- "$python"):$PATH" \
    BATCHCLS_CLUSTER_ID="$(cat "$state/id")" RAY_USAGE_STATS_ENABLED=0 \
    MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=1099511627776 MALLOC_ARENA_MAX=1 \
    RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$state/token" \
    timeout 120 "$ray" start "${options[@]}" </dev/null >"$state/start.log" 2>&1 9<&-
}

# The dashboard answers before it can start jobs ("No available agent"), so let it run one.
wait_for_jobs() {
  local deadline=$((SECONDS + 120)) job='{"entrypoint": "true", "submission_id": "ready"}'
  until ask POST /api/jobs/ "$job" >/dev/null; do
    ((SECONDS < deadline)) && [[ -n $(ours) ]] || return 1
    sleep 0.3
  done
  until ask GET /api/jobs/ready | grep -q '"status": "SUCCEEDED"'; do
    ((SECONDS < deadline)) || return 1
    sleep 0.3
  done
  ask DELETE /api/jobs/ready >/dev/null || true # it is only in the list of jobs
}

write_environment() {
  local http
  http=http://127.0.0.1:$(cat "$state/dashboard_port")
  # Two addresses: `ray job` wants the dashboard's, and ray.init() refuses that one.
  cat >"$state/env.new" <<EOF
export RAY_API_SERVER_ADDRESS=$http
export RAY_ADDRESS=127.0.0.1:$(cat "$state/port")
export RAY_AUTH_MODE=token
export RAY_AUTH_TOKEN_PATH=$(printf %q "$state/token")
# The dashboard is at $http and asks for the token in that file. To submit a job:
# ray job submit --working-dir . -- python -m batchcls.jobs.classify --config jobs/classify.toml
EOF
  mv -- "$state/env.new" "$state/env"
}

bring_up() {
  started=
  finish() {
    [[ -z $started ]] || return 0
    if [[ -s $state/start.log ]]; then
      say "failed; the last lines of Ray's start:"
      tail -n 12 -- "$state/start.log" >&2
    fi
    take_down
  }
  trap finish EXIT
  trap 'exit 1' HUP INT TERM
  "$python" -c 'import secrets; print(secrets.token_hex(32), end="")' >"$state/token"
  "$python" -c 'import uuid; print(uuid.uuid4())' >"$state/id"
  # Not inside the state folder: Ray's sockets live in there, and a socket's path has at most 107 bytes.
  mktemp -d "/tmp/batchcls-XXXXXX" >"$state/temporary"
  start_head || { say "the cluster does not start"; exit 1; }
  wait_for_jobs || { say "the cluster takes no jobs after 2 minutes"; exit 1; }
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
    flock -w 240 9 || { say "another start in $state does not end"; exit 1; }
    if ! running; then
      take_down # half-started or dead: clear it
      bring_up
    fi
    cat "$state/env"
    ;;
  down)
    [[ -d $state ]] || exit 0
    exec 9<"$state"
    flock -w 240 9 || { say "another start in $state does not end"; exit 1; }
    take_down
    rmdir -- "$state" 2>/dev/null || true # it may be a folder that holds other things
    ;;
  status)
    if running; then cat "$state/env"; else say "not running"; exit 3; fi
    ;;
  *) usage ;;
esac
