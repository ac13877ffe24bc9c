#!/usr/bin/env bash
# A Slurm of one node on this machine, to try the sweep launcher on. Not for real work.
#
#   apt-get install slurm-wlm munge            as root, on Debian or Ubuntu
#   scripts/one_node_slurm.sh start DIR        munged, slurmctld and slurmd with their files in DIR; no systemd
#   export SLURM_CONF=DIR/slurm.conf           then sbatch, squeue and train.py use it
#   scripts/one_node_slurm.sh stop DIR
#
# CPUS=4 GPUS=2 in front of it change what the node claims to have. GPUs are made up: jobs get numbers in
# CUDA_VISIBLE_DEVICES and no hardware.
set -euo pipefail

[ $# -eq 2 ] && [[ "$1" == start || "$1" == stop ]] || { sed -n '2,10s/^# \{0,1\}//p' "$0" >&2; exit 2; }
what=$1
mkdir -p "$2"
dir=$(cd "$2" && pwd)

stop() {
    for name in slurmd slurmctld munged; do
        if [ -s "$dir/$name.pid" ]; then kill "$(cat "$dir/$name.pid")" 2>/dev/null || true; rm -f "$dir/$name.pid"; fi
    done
}

if [ "$what" = stop ]; then stop; exit 0; fi

[ "$(id -u)" = 0 ] || { echo "slurmd starts jobs for users, so it has to be started by root." >&2; exit 2; }
for program in munged slurmctld slurmd; do
    command -v "$program" >/dev/null || { echo "$program is missing: apt-get install slurm-wlm munge" >&2; exit 2; }
done
stop
gpus=${GPUS:-2}
free_port() { python3 -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])'; }
mkdir -p "$dir/state" "$dir/spool"
chmod 755 "$dir"
[ -s "$dir/munge.key" ] || { (umask 077; head -c 128 /dev/urandom > "$dir/munge.key"); }
cat > "$dir/slurm.conf" <<CONF
ClusterName=one
SlurmctldHost=$(hostname -s)(127.0.0.1)
SlurmctldPort=$(free_port)
SlurmdPort=$(free_port)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$dir/munge.socket,cred_expire=5
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd.pid
SlurmctldLogFile=$dir/slurmctld.log
SlurmdLogFile=$dir/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=5
SlurmdParameters=config_overrides
ReturnToService=2
MpiDefault=none
GresTypes=gpu
NodeName=$(hostname -s) NodeAddr=127.0.0.1 CPUs=${CPUS:-4} Gres=gpu:$gpus State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
CONF
: > "$dir/gres.conf"
for ((i = 0; i < gpus; i++)); do
    ln -sf /dev/null "$dir/gpu$i" # a made-up device
    echo "Name=gpu File=$dir/gpu$i" >> "$dir/gres.conf"
done
munged --force --socket="$dir/munge.socket" --key-file="$dir/munge.key" --pid-file="$dir/munged.pid" \
    --log-file="$dir/munged.log" --seed-file="$dir/munged.seed"
export SLURM_CONF="$dir/slurm.conf"
slurmctld -f "$SLURM_CONF"
slurmd -f "$SLURM_CONF" -N "$(hostname -s)"
for _ in $(seq 60); do
    if sinfo -h -o %T 2>/dev/null | grep -qx idle; then
        echo "export SLURM_CONF=$SLURM_CONF"
        exit 0
    fi
    sleep 0.5
done
echo "The node did not come up; see $dir/slurmctld.log and $dir/slurmd.log" >&2
exit 1
