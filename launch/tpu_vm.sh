#!/usr/bin/env bash
# A Cloud TPU of one host or many: made, installed, run on, watched and deleted, through gcloud.
#
#   launch/tpu_vm.sh COMMAND [--dry-run] [-- ARGUMENTS of python -m jaxllm.main]
#
#   create    make the TPU now
#   queue     ask for it, or for several slices of it, to be made when there is room
#   install   copy the last commit of this checkout to every worker, and install it there
#   run       run the command on every worker, and again when it ends with 75; comes back at once
#   logs      follow the output of one worker
#   stop      have the run save and end
#   status    the state of the TPU, and of the run on every worker
#   delete    delete the TPU, and its place in the queue
#
# --dry-run prints the command lines of gcloud and runs none of them.
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

# What the environment sets; docs/launch_tpu_vm.md explains each.
TPU_NAME=${TPU_NAME:-}                     # of the TPU; required
TPU_ZONE=${TPU_ZONE:-}                     # such as us-east5-b; required
TPU_TYPE=${TPU_TYPE:-}                     # accelerator type, such as v6e-16; to make one
TPU_VERSION=${TPU_VERSION:-}               # software on it, such as v2-alpha-tpuv6e; to make one
TPU_PROJECT=${TPU_PROJECT:-}               # default: gcloud's own setting
TPU_SPOT=${TPU_SPOT:-0}                    # 1: cheaper, and taken away at any time
TPU_SLICES=${TPU_SLICES:-1}                # equal slices that train together; more than 1: queue
TPU_VALID_UNTIL=${TPU_VALID_UNTIL:-}       # how long to stay in the queue, such as 6h
TPU_CREATE_OPTIONS=${TPU_CREATE_OPTIONS:-} # more options to make one, separated by spaces
TPU_SSH_OPTIONS=${TPU_SSH_OPTIONS:-}       # more options of ssh and scp, separated by spaces
TPU_FOLDER=${TPU_FOLDER:-jaxllm}           # of the installation, in the home of every worker
TPU_PYTHON=${TPU_PYTHON:-3.12}             # version of Python to install there
TPU_RESTARTS=${TPU_RESTARTS:-10}           # at most so many in a row without a new checkpoint
TPU_WORKER=${TPU_WORKER:-0}                # whose output is followed

say() { echo "tpu_vm.sh: $*" >&2; }

wrong() {
    say "$*"
    exit 2
}

usage() { sed -n '2,/^[^#]/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; }

action=${1:-}
dry_run=
case $action in
'' | -h | --help) usage && exit ;;
create | queue | install | run | logs | stop | status | delete) shift ;;
*) wrong "'$action' is unknown; it is one of create queue install run logs stop status delete" ;;
esac
if [[ ${1:-} == --dry-run ]]; then dry_run=1 && shift; fi
arguments=()
case $action:${1:-} in
run:--) shift && arguments=("$@") ;;
run:) ;;
*:?*) wrong "'$1' is unknown here; what is meant for jaxllm.main stands after run --" ;;
esac
[[ $action != run ]] || ((${#arguments[@]})) || wrong "give a command, as in: run -- --config=..."

require() {
    local name
    for name; do [[ -n ${!name} ]] || wrong "set $name in the environment (docs/launch_tpu_vm.md)"; done
}

require TPU_NAME TPU_ZONE
[[ $TPU_SLICES =~ ^[1-9][0-9]{0,3}$ ]] || wrong "TPU_SLICES must be 1 or more, not '$TPU_SLICES'"
[[ $TPU_RESTARTS =~ ^[0-9]{1,6}$ ]] || wrong "TPU_RESTARTS must be a number, not '$TPU_RESTARTS'"
[[ $TPU_WORKER =~ ^[0-9]+$ ]] || wrong "TPU_WORKER must be a number, not '$TPU_WORKER'"
[[ $TPU_SPOT == [01] ]] || wrong "TPU_SPOT must be 0 or 1, not '$TPU_SPOT'"
[[ $TPU_FOLDER =~ ^[A-Za-z0-9._-]+$ ]] || wrong "TPU_FOLDER must be a plain name, not '$TPU_FOLDER'"

where=("--zone=$TPU_ZONE")
if [[ $TPU_PROJECT ]]; then where+=("--project=$TPU_PROJECT"); fi
read -r -a create_options <<<"$TPU_CREATE_OPTIONS"
read -r -a ssh_options <<<"$TPU_SSH_OPTIONS"

# The TPUs that gcloud knows by name: one, or one for each slice.
nodes=("$TPU_NAME")
if ((TPU_SLICES > 1)); then
    nodes=()
    for ((i = 0; i < TPU_SLICES; i++)); do nodes+=("$TPU_NAME-$i"); done
fi

tpus() {
    local line=(gcloud compute tpus "$@" "${where[@]}")
    if [[ $dry_run ]]; then
        printf '%q ' "${line[@]}"
        echo
    else
        "${line[@]}"
    fi
}

# on_workers WORKERS COMMAND: runs a shell command on workers of every slice.
on_workers() {
    local node
    for node in "${nodes[@]}"; do
        tpus tpu-vm ssh "$node" "--worker=$1" ${ssh_options[@]+"${ssh_options[@]}"} "--command=$2"
    done
}

create() {
    require TPU_TYPE TPU_VERSION
    ((TPU_SLICES == 1)) || wrong "several slices can only be queued: launch/tpu_vm.sh queue"
    local options=("--accelerator-type=$TPU_TYPE" "--version=$TPU_VERSION")
    if ((TPU_SPOT)); then options+=(--spot); fi
    tpus tpu-vm create "$TPU_NAME" "${options[@]}" ${create_options[@]+"${create_options[@]}"}
}

queue() {
    require TPU_TYPE TPU_VERSION
    local options=("--accelerator-type=$TPU_TYPE" "--runtime-version=$TPU_VERSION")
    if ((TPU_SLICES > 1)); then
        options+=("--node-count=$TPU_SLICES" "--node-prefix=$TPU_NAME")
    else
        options+=("--node-id=$TPU_NAME")
    fi
    if ((TPU_SPOT)); then options+=(--spot); fi
    if [[ $TPU_VALID_UNTIL ]]; then options+=("--valid-until-duration=$TPU_VALID_UNTIL"); fi
    tpus queued-resources create "$TPU_NAME" "${options[@]}" \
        ${create_options[@]+"${create_options[@]}"}
}

install() {
    local folder archive node
    git -C "$ROOT" rev-parse --verify --quiet HEAD >/dev/null || wrong "$ROOT has no git commit"
    [[ -z $(git -C "$ROOT" status --porcelain) ]] ||
        say "what is not committed in $ROOT is not installed"
    folder=$(mktemp -d)
    # shellcheck disable=SC2064  # the folder of now
    trap "rm -rf '$folder'" EXIT
    archive=$folder/$TPU_FOLDER.tar.gz
    git -C "$ROOT" archive --format=tar.gz "--output=$archive" HEAD
    for node in "${nodes[@]}"; do
        tpus tpu-vm scp "$archive" "$node:$TPU_FOLDER.tar.gz" --worker=all \
            ${ssh_options[@]+"${ssh_options[@]}"}
    done
    # Code of an earlier installation goes; .venv and run.log stay.
    on_workers all "set -e
mkdir -p $TPU_FOLDER && cd $TPU_FOLDER
rm -rf jaxllm configs launch
tar -xzf ../$TPU_FOLDER.tar.gz
python3 -m pip install --quiet --user uv ||
    python3 -m pip install --quiet --user --break-system-packages uv
python3 -m uv venv --quiet --allow-existing --python $TPU_PYTHON .venv
python3 -m uv pip install --quiet --python .venv --constraint requirements.lock --editable '.[tpu]'"
}

run() {
    local quoted
    quoted=$(printf ' %q' "${arguments[@]}")
    on_workers all "cd $TPU_FOLDER || exit
if kill -0 \"\$(cat run.pid 2>/dev/null)\" 2>/dev/null; then
    echo 'a run goes on here already: launch/tpu_vm.sh stop' >&2
    exit 2
fi
nohup launch/local.sh --restarts=$TPU_RESTARTS -- --processes=auto$quoted >>run.log 2>&1 </dev/null &
echo \$! >run.pid"
}

case $action in
create | queue | install | run) "$action" ;;
logs)
    nodes=("${nodes[0]}")
    on_workers "$TPU_WORKER" "tail -n 100 -F $TPU_FOLDER/run.log"
    ;;
stop)
    on_workers all "kill -TERM \"\$(cat $TPU_FOLDER/run.pid)\""
    ;;
status)
    tpus queued-resources list "--filter=name~\"/$TPU_NAME\$\"" \
        "--format=value(name.basename(),state.state)"
    tpus tpu-vm list "--filter=name~\"/$TPU_NAME(-[0-9]+)?\$\"" \
        "--format=value(name.basename(),state,health,acceleratorType)"
    on_workers all "cd $TPU_FOLDER || exit
if kill -0 \"\$(cat run.pid 2>/dev/null)\" 2>/dev/null; then echo running; else echo 'not running'; fi
tail -n 1 run.log 2>/dev/null || true"
    ;;
delete)
    # What was queued is deleted with its place in the queue; without that it would be made anew.
    if [[ $dry_run ]]; then
        echo "# if the first command finds it, the second; else the third"
        tpus queued-resources describe "$TPU_NAME"
        tpus queued-resources delete "$TPU_NAME" --force --quiet
        tpus tpu-vm delete "$TPU_NAME" --quiet
    elif tpus queued-resources describe "$TPU_NAME" >/dev/null 2>&1; then
        tpus queued-resources delete "$TPU_NAME" --force --quiet
    else
        tpus tpu-vm delete "$TPU_NAME" --quiet
    fi
    ;;
esac
