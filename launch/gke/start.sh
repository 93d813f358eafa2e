#!/usr/bin/env bash
# What a container of the JobSet runs: `python -m jaxllm.main ARGUMENTS`, after a wait if it is run
# again. JobSet itself restarts at once. RESTARTS is how often it has, and the same in all pods.
set -euo pipefail

BACKOFF=${BACKOFF:-5} # seconds before the first restart; doubles, up to 300
restarts=${RESTARTS:-0}
if ((restarts)); then
    delay=$((restarts < 8 ? BACKOFF << (restarts - 1) : 300))
    if ((delay > 300)); then delay=300; fi
    echo "start.sh: restart $restarts, in $delay s" >&2
    # The first process of a container ignores what it does not handle.
    trap 'exit 75' TERM INT
    sleep "$delay" &
    wait "$!"
    trap - TERM INT
fi
exec python -m jaxllm.main "$@"
