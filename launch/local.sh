#!/usr/bin/env bash
# Runs `python -m jaxllm.main ARGUMENTS` on this machine, and again when it ends with 75.
#
#   launch/local.sh [-n PROCESSES] [-d DEVICES] [options] -- ARGUMENTS
#
#   -n PROCESSES       processes, which meet on the loopback address; default 1
#   -d DEVICES         simulated CPU devices of each process; default 0: the devices that there are
#   --restarts=N       at most N restarts in a row without a new checkpoint; default 10
#   --backoff=SECONDS  before the first of them; doubles, up to 300; default 5
#   --grace=SECONDS    for the others to end by themselves after one ended badly; default 90
#   --dry-run          print the commands and run nothing
#
# PYTHON names the interpreter: .venv/bin/python of the checkout if it is there, else python3.
# Ends with 0 if all processes did; with 2 if one did; with 75 if one did or was killed; else with
# the first other code. SIGTERM and Ctrl-C reach every process, which saves: 75, and no restart.
#
# Keeps to bash 3.2, which macOS has.
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
LONGEST_BACKOFF=300
FREE_PORT='import socket
with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    print(s.getsockname()[1])'

say() { echo "local.sh: $*" >&2; }

wrong() {
    say "$*"
    exit 2
}

# number FLAG VALUE LEAST: checks a value of the command line.
number() {
    if [[ ! $2 =~ ^(0|[1-9][0-9]{0,5})$ ]] || (($2 < $3)); then
        wrong "$1 takes a whole number of at least $3, not '$2'"
    fi
}

processes=1 devices=0 restarts=10 backoff=5 grace=90 dry_run=
arguments=()
while (($#)); do
    case $1 in
    -n | -d) (($# > 1)) || wrong "$1: its value is missing" ;;
    esac
    case $1 in
    -n) number -n "$2" 1 && processes=$2 && shift ;;
    -d) number -d "$2" 1 && devices=$2 && shift ;;
    --restarts=*) number --restarts "${1#*=}" 0 && restarts=${1#*=} ;;
    --backoff=*) number --backoff "${1#*=}" 0 && backoff=${1#*=} ;;
    --grace=*) number --grace "${1#*=}" 0 && grace=${1#*=} ;;
    --dry-run) dry_run=1 ;;
    -h | --help) sed -n '2,/^[^#]/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" && exit ;;
    --) shift && arguments=("$@") && break ;;
    *) wrong "'$1' is unknown here; what is meant for jaxllm.main stands after --" ;;
    esac
    shift
done
((${#arguments[@]})) || wrong "nothing stands after --; as in: launch/local.sh -n 2 -- --config=..."

python=${PYTHON:-}
if [[ -z $python ]]; then
    python=python3
    if [[ -x $ROOT/.venv/bin/python ]]; then python=$ROOT/.venv/bin/python; fi
fi

# The run directory, which tells whether a life got any further.
workdir=
for ((i = 0; i < ${#arguments[@]}; i++)); do
    case ${arguments[i]} in
    --workdir=* | -workdir=*) workdir=${arguments[i]#*=} ;;
    --workdir | -workdir) workdir=${arguments[i + 1]:-} ;;
    esac
done

# The step of the newest checkpoint, or 0.
newest_checkpoint() {
    local path step newest=0
    for path in "$workdir"/checkpoints/*; do
        step=${path##*/}
        if [[ $step =~ ^[0-9]{1,15}$ ]] && ((10#$step > newest)); then newest=$((10#$step)); fi
    done
    echo "$newest"
}

# Several processes share the machine's GPUs in equal parts.
gpus=()
if ((processes > 1 && !devices)) && [[ ${JAX_PLATFORMS:-} != cpu ]] && type nvidia-smi &>/dev/null
then
    if [[ -n ${CUDA_VISIBLE_DEVICES:-} ]]; then
        IFS=, read -r -a gpus <<<"$CUDA_VISIBLE_DEVICES"
    else
        found=$(nvidia-smi --list-gpus | grep -c '^GPU' || true)
        for ((i = 0; i < found; i++)); do gpus+=("$i"); done
    fi
    ((${#gpus[@]} % processes == 0)) ||
        wrong "${#gpus[@]} GPUs cannot be shared equally by -n $processes processes"
fi

# command_of PROCESS COORDINATOR: sets `line` to the command line of a process.
command_of() {
    local each=$((${#gpus[@]} / processes)) own
    line=(env "PYTHONPATH=$ROOT${PYTHONPATH:+:$PYTHONPATH}")
    if ((devices)); then
        # On few cores, simulated devices time out waiting for one another without NPROC.
        line+=("NPROC=${NPROC:-16}" JAX_PLATFORMS=cpu
            "XLA_FLAGS=${XLA_FLAGS:+$XLA_FLAGS }--xla_force_host_platform_device_count=$devices")
    elif ((each)); then
        own=$(IFS=, && echo "${gpus[*]:$1 * each:each}")
        line+=("CUDA_VISIBLE_DEVICES=$own")
    fi
    line+=("$python" -m jaxllm.main "${arguments[@]}")
    if ((processes > 1)); then
        line+=("--coordinator=$2" "--processes=$processes" "--process=$1")
    fi
}

if [[ $dry_run ]]; then
    for ((i = 0; i < processes; i++)); do
        command_of "$i" 127.0.0.1:PORT
        printf '%q ' "${line[@]}"
        echo
    done
    exit
fi

pids=()    # of the processes that run
code=0     # what the processes of this life ended with, together
pending=   # a signal that came and has not been passed on
stopped=   # whether any came

trap 'pending=TERM stopped=1' TERM HUP
trap 'pending=INT stopped=1' INT
trap 'send KILL' EXIT

send() {
    local pid
    for pid in ${pids[@]+"${pids[@]}"}; do kill -s "$1" "$pid" 2>/dev/null || true; done
}

# judge STATUS: what a process ended with becomes a part of `code`.
judge() {
    local status=$1
    # Killed by a signal; but 141 is jaxllm's own, for output that nobody reads.
    if ((status > 128 && status != 141)); then status=75; fi
    case $status in
    0) ;;
    2) code=2 ;;
    75) if ((code != 2)); then code=75; fi ;;
    *) if ((!code)); then code=$status; fi ;;
    esac
}

# Starts all processes and waits until all have ended; sets `code`.
life() {
    local address='' i pid status running alive deadline=0 ended=
    code=0
    if ((processes > 1)); then address=127.0.0.1:$("$python" -c "$FREE_PORT"); fi
    # In process groups of their own, so that Ctrl-C reaches them once, from here: a second signal
    # would end them without saving.
    set -m
    for ((i = 0; i < processes; i++)); do
        command_of "$i" "$address"
        "${line[@]}" </dev/null &
        pids+=("$!")
    done
    set +m
    while ((${#pids[@]})); do
        if [[ $pending ]]; then
            send "$pending"
            pending=
        fi
        running=$'\n'$(jobs -pr)$'\n'
        alive=()
        for pid in "${pids[@]}"; do
            if [[ $running == *$'\n'"$pid"$'\n'* ]]; then
                alive+=("$pid")
                continue
            fi
            status=0
            wait "$pid" 2>/dev/null || status=$?
            if [[ ! $ended ]]; then judge "$status"; fi
        done
        pids=(${alive[@]+"${alive[@]}"})
        if ((code && !deadline)); then deadline=$((SECONDS + grace)); fi
        if ((${#pids[@]} && deadline && SECONDS >= deadline)); then
            if [[ ! $ended ]]; then
                ended=TERM deadline=$((SECONDS + grace / 3))
            else
                ended=KILL deadline=$((SECONDS + grace))
            fi
            say "${#pids[@]} of $processes processes go on after one ended with $code: SIG$ended"
            send "$ended"
        fi
        if ((${#pids[@]})); then sleep 0.2 || true; fi # Ctrl-C ends it
    done
}

best=$(newest_checkpoint)
in_a_row=0
while :; do
    life
    if ((code)); then say "ended with $code"; fi
    if ((code != 75)) || [[ $stopped ]]; then exit "$code"; fi
    newest=$(newest_checkpoint)
    if ((newest > best)); then best=$newest in_a_row=0; fi
    if ((in_a_row >= restarts)); then
        if ((restarts)); then say "given up: $restarts restarts without a new checkpoint"; fi
        exit 75
    fi
    delay=$((in_a_row < 16 ? backoff << in_a_row : LONGEST_BACKOFF))
    if ((delay > LONGEST_BACKOFF)); then delay=$LONGEST_BACKOFF; fi
    in_a_row=$((in_a_row + 1))
    say "again in $delay s (restart $in_a_row of $restarts without a new checkpoint)"
    sleep "$delay" &
    pids=("$!")
    wait "$!" || true
    if [[ $stopped ]]; then exit 75; fi
    pids=()
done
