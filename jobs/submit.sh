#!/usr/bin/env bash
# Runs a job on the Ray cluster at RAY_API_SERVER_ADDRESS, waits for it, and ends with the exit code of the job.
#
#   jobs/submit.sh JOB FLAGS...
#   jobs/submit.sh classify --config jobs/nightly.toml --limit 1000
#
# Unlike `ray job submit`, which ends with 1 for every failure, it lets cron and Kubernetes react to the exit code
# (docs/reference/exit-codes.md). 1 also means that the job was not submitted, that a node killed it, or that its state
# is unknown; 130 that it was stopped, or that this script was interrupted, which does not stop the job.
#
# Environment variables:
#   RAY_API_SERVER_ADDRESS   address of the dashboard, such as http://HEAD:8265
#   RAY_AUTH_MODE=token and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH   the token of the cluster
#   BATCHCLS_WORKING_DIR     folder that is uploaded and in which the job runs (the current folder); empty: none
#   BATCHCLS_REPORTS         folder to which the report of the job is fetched (reports); empty: none
#   BATCHCLS_SUBMISSION_ID   name of the job; a job of this name that still runs is followed instead of submitting another
set -euo pipefail
export LC_ALL=C.UTF-8

say() { echo "submit.sh: $*" >&2; }

if [[ $# -eq 0 || $1 != [a-z]* ]]; then
  say "usage: submit.sh JOB FLAGS... (classify, finetune, evaluate, compare, runs, manifest or bundle)"
  exit 2
fi
[[ -n ${RAY_API_SERVER_ADDRESS:-} ]] || { say "RAY_API_SERVER_ADDRESS is not set, such as to http://HEAD:8265"; exit 2; }
job=$1
shift
here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd -P)
python=$(dirname -- "$here")/.venv/bin/python
[[ -x $python ]] || python=$(type -P python3) || { say "no python3 on PATH"; exit 2; }
ray=$(dirname -- "$python")/ray
[[ -x $ray ]] || ray=$(type -P ray) || { say "no ray on PATH: make setup, or activate its environment"; exit 2; }
reports=${BATCHCLS_REPORTS-reports}
name=${BATCHCLS_SUBMISSION_ID:-$job-$(date -u +%Y%m%d-%H%M%S)-$(printf %04x "$RANDOM")}

environment=()
if [[ -n ${BATCHCLS_WORKING_DIR-.} ]]; then
  # In addition to .gitignore, .git and .venv, which Ray leaves out: what no job reads, and data.
  excludes='["tests", "docs", "benchmarks", "site", "reports", "demo-output", "*.parquet", "*.safetensors", "*.log"]'
  environment=(--working-dir "${BATCHCLS_WORKING_DIR-.}" --runtime-env-json "{\"excludes\": $excludes}")
fi

# Prints ABSENT, or the status of a job and the exit code of its driver (`-` if it has none).
state() { # state ID
  "$python" -c '
import sys
from ray.job_submission import JobSubmissionClient
try:
    job = JobSubmissionClient().get_job_info(sys.argv[1])
except Exception as error:
    if "status code 404" not in str(error):
        sys.exit(f"submit.sh: {error}")
    print("ABSENT -")
else:
    print(job.status.value, "-" if job.driver_exit_code is None else job.driver_exit_code)' "$1"
}

reachable() { # Ray's client would wait for minutes
  timeout 15 "$python" -c '
import socket, sys
from urllib.parse import urlsplit
url = urlsplit(sys.argv[1])
try:
    socket.create_connection((url.hostname, url.port or (443 if url.scheme == "https" else 80)), timeout=10).close()
except (OSError, TypeError, ValueError) as error:
    sys.exit(f"submit.sh: the cluster at {sys.argv[1]} is not reachable: {error}")' "$RAY_API_SERVER_ADDRESS"
}

# Follows the job until it has ended; Ray's connection to the log may break while the job continues.
follow() { # follow ID: sets `status` and `code`
  local unknown=0
  while true; do
    if read -r status code < <(state "$1"); then
      unknown=0
      case $status in
        SUCCEEDED | FAILED | STOPPED) return 0 ;;
        ABSENT) say "the cluster no longer knows the job $1"; return 1 ;;
      esac
      "$ray" job logs --follow "$1" || true
    elif ((++unknown > 20)); then
      say "the state of the job $1 is unknown"
      return 1
    fi
    sleep 3
  done
}

# The cluster reads the report, because this machine may have neither its paths nor the credentials of the store.
fetch_report() { # fetch_report FLAGS...
  local uri target=$reports/$name/report.html
  uri=$("$ray" job logs "$name" | sed -n 's/^report: //p' | tail -n 1)
  [[ -n $uri && -n $reports ]] || return 0
  [[ ! -f $uri ]] || { say "report: $uri"; return 0; }
  mkdir -p -- "$reports/$name"
  "$ray" job submit --submission-id "$name-report" "${environment[@]}" -- python -c '
import base64, importlib, sys
from batchcls.cli.app import parse
from batchcls.storage.filesystem import Storage
job, uri, *flags = sys.argv[1:]
settings = parse(job, importlib.import_module(f"batchcls.jobs.{job}").COMMANDS, flags)[1]
for line in base64.encodebytes(Storage(settings.storage_options).read_bytes(uri)).splitlines():
    print("report:" + line.decode())' "$job" "$uri" "$@" >"$target.log" 2>&1 || { tail -n 5 -- "$target.log" >&2; return 1; }
  "$ray" job logs "$name-report" | sed -n 's/^report://p' | base64 -d >"$target.part"
  [[ -s $target.part ]] || return 1
  mv -- "$target.part" "$target"
  rm -- "$target.log"
  say "report: $target"
}

reachable || exit 1
# A job of this name that has ended is not run again under the same name.
base=$name
for ((attempt = 2; ; attempt++)); do
  read -r status code < <(state "$name") || exit 1
  [[ $status == FAILED || $status == STOPPED || $status == SUCCEEDED ]] || break
  name=$base-$attempt
done

trap 'say "interrupted; the job continues: ray job logs --follow $name, ray job stop $name"; exit 130' INT TERM
if [[ $status == ABSENT ]]; then
  if ! "$ray" job submit --submission-id "$name" "${environment[@]}" -- python -m "batchcls.jobs.$job" "$@"; then
    read -r status code < <(state "$name") || status=
    [[ $status != ABSENT ]] || { say "the job was not submitted"; exit 1; }
  fi
else
  say "following the job $name, which is $status"
fi
follow "$name" || exit 1
fetch_report "$@" || say "the report could not be fetched; it is in the output folder of the job"

case $status,$code in
  SUCCEEDED,*) exit 0 ;;
  STOPPED,*) say "the job $name was stopped"; exit 130 ;;
  *,-) say "the job $name failed without an exit code: ray job status $name"; exit 1 ;;
  *,-*) exit $((128 - code)) ;; # ended by a signal
  *) exit "$code" ;;
esac
