#!/usr/bin/env bash
# Runs a command beside a SLURM cluster of one node on the loopback address, and ends the cluster.
#
#   tests/launch/with_slurm.sh FOLDER COMMAND [ARGUMENTS]
#
# FOLDER is new, and keeps the logs. The command finds the cluster by SLURM_CONF. Needs root and
# Debian's slurm-wlm and munge; uses no service and no file of the system's own SLURM. Ends with
# what the command ended with, or 3 if the cluster does not start.
set -euo pipefail

CPUS=8 # more than there may be: tasks share them

folder=$(mkdir -p "$1" && cd "$1" && pwd)
shift

pids=() # the command, slurmd, slurmctld, munged: each needs those after it to end
started=
end() {
    local pid i
    if [[ $started ]]; then
        # What watches over a job's processes is nobody's child: let it end by itself.
        squeue --noheader --format=%A | xargs --no-run-if-empty scancel || true
        for ((i = 0; i < 200; i++)); do
            [[ $(sinfo --noheader --format=%T) != idle ]] || break
            sleep 0.2
        done
    fi
    for pid in ${pids[@]+"${pids[@]}"}; do
        kill "$pid" 2>/dev/null || true
        for ((i = 0; i < 50; i++)); do
            kill -0 "$pid" 2>/dev/null || continue 2
            sleep 0.1
        done
        kill -KILL "$pid" 2>/dev/null || true
    done
}
trap end EXIT
trap 'exit 143' TERM
trap 'exit 130' INT

read -r controller_port node_port < <(python3 -c '
import socket
sockets = [socket.socket() for _ in range(2)]
for s in sockets:
    s.bind(("127.0.0.1", 0))
print(*(s.getsockname()[1] for s in sockets))')

# munged, which vouches for who calls whom, wants its places closed to others.
chmod 755 "$folder"
mkdir -m 700 "$folder/munge"
mkdir "$folder/state" "$folder/spool"
(umask 077 && head -c 1024 /dev/urandom >"$folder/munge/key")
socket=$(mktemp -u /tmp/munge.XXXXXX) # a socket's path must be short
munged --foreground --force --socket="$socket" --key-file="$folder/munge/key" \
    --log-file="$folder/munge/log" --pid-file="$folder/munge/pid" --seed-file="$folder/munge/seed" \
    &>"$folder/munge/output" &
pids+=("$!")

cat >"$folder/slurm.conf" <<END
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort=$controller_port
SlurmdPort=$node_port
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# How long after its end a requeued job waits, too.
AuthInfo=socket=$socket,cred_expire=5
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=1,sched_min_interval=0
ReturnToService=2
KillWait=30
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.log
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmdParameters=config_overrides
NodeName=localhost NodeAddr=127.0.0.1 CPUs=$CPUS State=UNKNOWN
PartitionName=all Nodes=localhost Default=YES MaxTime=INFINITE State=UP
END
export SLURM_CONF=$folder/slurm.conf

for ((i = 0; i < 50; i++)); do
    [[ ! -S $socket ]] || break
    sleep 0.1
done
slurmctld -D -c &>"$folder/slurmctld.output" &
controller=$!
slurmd -D -N localhost &>"$folder/slurmd.output" &
pids=("$!" "$controller" "${pids[@]}")

for ((i = 0; ; i++)); do
    state=$(sinfo --noheader --format=%T 2>/dev/null || true)
    [[ $state != idle ]] || break
    if ((i == 150)); then
        echo "with_slurm.sh: the cluster does not start; its logs are in $folder" >&2
        exit 3
    fi
    sleep 0.2
done
started=1

# Beside this shell, which a signal then ends at once.
"$@" &
pids=("$!" "${pids[@]}")
wait "$!"
