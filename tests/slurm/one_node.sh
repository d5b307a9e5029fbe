#!/usr/bin/env bash
# A real SLURM of one node on loopback, for tests. As root, from Debian's packages, which it installs where they are missing.
#   SLURM_CONF=$(one_node.sh start FOLDER)     then srun, sbatch, scontrol work with SLURM_CONF exported
#   one_node.sh stop FOLDER
set -euo pipefail
action=$1 folder=$(readlink -m "$2") node=$(hostname -s)

install_packages() {
    command -v slurmctld >/dev/null && command -v munged >/dev/null && return
    {
        apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends slurm-wlm munge
    } >&2 || { echo "test-slurm: needs root and Debian's packages slurm-wlm and munge" >&2; exit 1; }
}

configure() {
    mkdir -p "$folder"/{state,spool,log}
    memory=$(($(awk '/MemTotal/{print $2}' /proc/meminfo) / 1024 * 8 / 10))
    cat >"$folder/slurm.conf" <<CONF
ClusterName=local
SlurmctldHost=$node(127.0.0.1)
NodeName=$node NodeAddr=127.0.0.1 CPUs=4 RealMemory=$memory State=UNKNOWN
PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE State=UP
SlurmUser=root
SlurmdUser=root
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldPort=16817
SlurmdPort=16818
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldLogFile=$folder/log/slurmctld.log
SlurmdLogFile=$folder/log/slurmd.log
AuthType=auth/munge
AuthInfo=cred_expire=5
CredType=cred/munge
MpiDefault=none
ProctrackType=proctrack/pgid
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
ReturnToService=2
JobRequeue=1
KillWait=20
CONF
}

start() {
    install_packages
    configure
    if ! munge -n 2>/dev/null | unmunge >/dev/null 2>&1; then
        install -d -o munge -g munge -m 0755 /run/munge
        su -s /bin/sh munge -c /usr/sbin/munged
    fi
    export SLURM_CONF="$folder/slurm.conf"
    slurmctld -f "$SLURM_CONF" >&2
    slurmd -f "$SLURM_CONF" >&2
    for _ in $(seq 60); do
        sinfo -h -o %T 2>/dev/null | grep -q idle && break
        sleep 0.5
    done
    sinfo -h -o %T | grep -q idle || { echo "test-slurm: the node did not come up: see $folder/log" >&2; exit 1; }
    echo "$SLURM_CONF"
}

# Each by its own id; slurmd may wait for ever for a step that is gone.
stop() {
    for name in slurmd slurmctld; do
        [ -f "$folder/$name.pid" ] || continue
        process=$(cat "$folder/$name.pid")
        kill "$process" 2>/dev/null || continue
        for _ in $(seq 20); do
            kill -0 "$process" 2>/dev/null || break
            sleep 0.5
        done
        if kill -0 "$process" 2>/dev/null; then kill -9 "$process"; fi
    done
}

case $action in
start) start ;;
stop) stop ;;
*) echo "usage: one_node.sh start|stop FOLDER" >&2 && exit 2 ;;
esac
