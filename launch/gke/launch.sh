#!/usr/bin/env bash
# Fills in a manifest of this folder and gives it to the cluster that kubectl points at.
#
#   launch/gke/launch.sh tpu|gpu [--dry-run] -- ARGUMENTS of python -m jaxllm.main
#
# --dry-run prints the manifest and asks no cluster. The cluster must have the JobSet controller.
set -euo pipefail

FOLDER=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

# What the environment sets; docs/launch_gke.md explains each.
JOB_NAME=${JOB_NAME:-}                # of the JobSet; required
IMAGE=${IMAGE:-}                      # built from launch/Dockerfile; required
VOLUME_CLAIM=${VOLUME_CLAIM:-}        # of a volume that all pods may write, seen as /runs; required
HOSTS=${HOSTS:-}                      # machines (tpu: of a slice); required
SLICES=${SLICES:-1}                   # tpu: slices that train together
TPU_ACCELERATOR=${TPU_ACCELERATOR:-}  # tpu: such as tpu-v6e-slice; required
TPU_TOPOLOGY=${TPU_TOPOLOGY:-}        # tpu: chips of a slice, such as 4x4; required
TPU_CHIPS=${TPU_CHIPS:-4}             # tpu: chips of a machine
GPU_ACCELERATOR=${GPU_ACCELERATOR:-}  # gpu: such as nvidia-h100-80gb; required
GPUS=${GPUS:-8}                       # gpu: GPUs of a machine
SPOT=${SPOT:-0}                       # 1: on Spot nodes; 0: on others
MAX_RESTARTS=${MAX_RESTARTS:-10}      # of the whole JobSet, in all
GRACE_PERIOD=${GRACE_PERIOD:-120}     # seconds to save in, from SIGTERM to SIGKILL
KUBECTL_OPTIONS=${KUBECTL_OPTIONS:-}  # such as --namespace=...; separated by spaces

wrong() {
    echo "launch.sh: $*" >&2
    exit 2
}

usage() { sed -n '2,/^[^#]/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; }

kind=${1:-}
case $kind in
'' | -h | --help) usage && exit ;;
tpu | gpu) shift ;;
*) wrong "'$kind' is neither tpu nor gpu" ;;
esac
dry_run=
if [[ ${1:-} == --dry-run ]]; then dry_run=1 && shift; fi
[[ ${1:-} == -- ]] || wrong "what is meant for jaxllm.main stands after --, as in: tpu -- --config=..."
shift
(($#)) || wrong "nothing stands after --; as in: $kind -- --config=... --workdir=/runs/..."

# quoted TEXT: a JSON string, which is a YAML string too.
quoted() {
    local text=$1
    [[ $text != *[[:cntrl:]]* ]] || wrong "an argument has a control character in it: '$text'"
    text=${text//\\/\\\\}
    text=${text//\"/\\\"}
    # Kubernetes would put a variable in for $(NAME).
    text=${text//\$(/\$\$(}
    printf '"%s"' "$text"
}

ARGUMENTS=
for argument; do ARGUMENTS+="${ARGUMENTS:+, }$(quoted "$argument")"; done
[[ $SPOT == [01] ]] || wrong "SPOT must be 0 or 1, not '$SPOT'"
# shellcheck disable=SC2034  # read by name below
SPOT_NODES=$( ((SPOT)) && echo Exists || echo DoesNotExist)
# shellcheck disable=SC2034  # read by name below
ARGUMENTS="[$ARGUMENTS]"

# check NAME: the value of a variable that the manifest asks for.
check() {
    local name=$1 value=${!1} form=
    [[ $value ]] || wrong "set $name in the environment (docs/launch_gke.md)"
    case $name in
    HOSTS | SLICES | TPU_CHIPS | GPUS | GRACE_PERIOD) form='[1-9][0-9]{0,4}' ;;
    MAX_RESTARTS) form='[0-9]{1,5}' ;;
    # The names of pods, which are longer, have 63 characters at most.
    JOB_NAME) form='[a-z]([-a-z0-9]{0,38}[a-z0-9])?' ;;
    IMAGE) form='[A-Za-z0-9._/:@-]+' ;;
    TPU_TOPOLOGY) form='[0-9]+x[0-9]+(x[0-9]+)?' ;;
    VOLUME_CLAIM | TPU_ACCELERATOR | GPU_ACCELERATOR) form='[a-z0-9]([a-z0-9.-]*[a-z0-9])?' ;;
    esac
    [[ -z $form || $value =~ ^($form)$ ]] || wrong "$name='$value' does not look like one"
}

template=$(cat "$FOLDER/$kind.yaml")
manifest=
while [[ $template =~ \$\{([A-Z_]+)\} ]]; do
    name=${BASH_REMATCH[1]}
    check "$name"
    manifest+=${template%%"\${$name}"*}${!name}
    template=${template#*"\${$name}"}
done
manifest+=$template

if [[ $dry_run ]]; then
    echo "$manifest"
    exit
fi
read -r -a options <<<"$KUBECTL_OPTIONS"
kubectl create ${options[@]+"${options[@]}"} --filename=- <<<"$manifest"
