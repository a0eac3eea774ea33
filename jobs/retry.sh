#!/bin/sh
# Runs a command, and repeats it only if it may succeed without any change: after an unexpected error (exit code 1), or
# if it was interrupted or killed (above 128). The last exit code is returned.
#
#   jobs/retry.sh python -m batchcls.jobs.classify --config jobs/nightly.toml
#
# The environment may set RETRIES (2) and RETRY_SECONDS (300), the pause before each.
retries=${RETRIES:-2}
pause=${RETRY_SECONDS:-300}
while :; do
  "$@"
  code=$?
  if [ "$code" -ne 1 ] && [ "$code" -le 128 ]; then
    exit "$code"
  fi
  if [ "$retries" -le 0 ]; then
    exit "$code"
  fi
  retries=$((retries - 1))
  echo "exit code $code: the command is repeated in $pause s" >&2
  sleep "$pause"
done
