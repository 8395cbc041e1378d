#!/usr/bin/env bash
# Run a real SLURM with one node on this machine, without systemd and cgroups, to try `selfcorrect
# launch --cluster slurm` without a cluster. Needs root, and Debian's slurm-wlm and munge.
#
#   scripts/dev/slurm_single_node.sh start FOLDER     writes configuration, state and logs to FOLDER
#   scripts/dev/slurm_single_node.sh stop FOLDER
#   export SLURM_CONF=FOLDER/slurm.conf           for sbatch, squeue, sinfo ... and selfcorrect launch
set -euo pipefail
what="${1:?start or stop}" folder="$(mkdir -p "${2:?a folder}" && cd "$2" && pwd)"
export SLURM_CONF="$folder/slurm.conf"

running() { [ -f "$folder/$1.pid" ] && kill -0 "$(cat "$folder/$1.pid")" 2>/dev/null; }

if [ "$what" = stop ]; then
    for daemon in slurmd slurmctld munged; do
        if running "$daemon"; then kill "$(cat "$folder/$daemon.pid")"; fi
    done
    exit 0
fi

node="$(hostname -s)"
size="$(slurmd -C | head -1 | grep -oE '(CPUs|Boards|SocketsPerBoard|CoresPerSocket|ThreadsPerCore|RealMemory)=[0-9]+' | tr '\n' ' ')"
mkdir -p "$folder/state" "$folder/spool" "$folder/munge"
# munge refuses a socket below a folder that others may write to, so it gets one of its own.
chown root:root "$folder/munge" && chmod 755 "$folder/munge"
[ -f "$folder/munge.key" ] || (umask 077 && head -c 1024 /dev/urandom >"$folder/munge.key")
cat >"$folder/slurm.conf" <<CONF
ClusterName=single
SlurmctldHost=$node
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$folder/munge/socket
CredType=cred/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerType=sched/builtin
ReturnToService=2
KillWait=10
MinJobAge=300
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.log
NodeName=$node $size State=UNKNOWN
PartitionName=main Nodes=$node Default=YES MaxTime=INFINITE State=UP
CONF
running munged || munged --force --key-file="$folder/munge.key" --socket="$folder/munge/socket" \
    --pid-file="$folder/munged.pid" --log-file="$folder/munged.log" --seed-file="$folder/munged.seed"
running slurmctld || slurmctld
running slurmd || slurmd
for _ in $(seq 60); do
    if sinfo --noheader --format=%T 2>/dev/null | grep -qE 'idle|mixed|allocated'; then
        sinfo
        exit 0
    fi
    sleep 1
done
echo "slurm_single_node.sh: no node after 60 s; see $folder/slurmctld.log and $folder/slurmd.log" >&2
exit 1
