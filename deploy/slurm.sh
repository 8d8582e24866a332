#!/bin/bash
# An audit on several nodes of a Slurm cluster:
#
#   sbatch deploy/slurm.sh audit.yaml --out /shared/runs/audit
#
# The arguments are those of `locaudit audit`. locaudit[ray] must be installed at the same place on every node, and the
# model be visible there; only the first node, where this script runs, needs the run folder. There is one worker for
# each GPU, or for each node without any. If the time limit ends the job, the same command continues the audit.
#SBATCH --job-name=locaudit
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=08:00:00
#SBATCH --signal=B:TERM@120
##SBATCH --gpus-per-node=1
set -euo pipefail

export RAY_USAGE_STATS_ENABLED=0
# Without it, others who are on these nodes could use the job's Ray.
RAY_AUTH_TOKEN=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN
n_cpus=${SLURM_CPUS_PER_TASK:-1}
n_gpus=${SLURM_GPUS_ON_NODE:-0}
per_node=$((n_gpus > 0 ? n_gpus : 1))
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
ip=$(hostname --ip-address | awk '{ print $1 }')
address=$ip:$((20000 + SLURM_JOB_ID % 20000)) # the job's own: others may run Ray on the same nodes

# Start Ray on a node, with the job's cores and GPUs there. It ends with this script.
on() {
    local node=$1
    shift
    srun --overlap --nodes=1 --ntasks=1 --nodelist="$node" ray start --block --num-cpus="$n_cpus" --num-gpus="$n_gpus" \
        --disable-usage-stats "$@" &
}

on "${nodes[0]}" --head --node-ip-address="$ip" --port="${address##*:}" --include-dashboard=false
tries=0
until ray health-check --address="$address" >/dev/null 2>&1; do
    tries=$((tries + 1))
    [ "$tries" -lt 60 ] || { echo "Ray did not start on ${nodes[0]}" >&2; exit 1; }
    sleep 2
done
for node in "${nodes[@]:1}"; do
    on "$node" --address="$address"
done

# In the background, so that the signal reaches it before the time limit: it keeps what is finished and ends its workers.
locaudit audit "$@" --executor ray --ray.address "$address" --ray.workers $((${#nodes[@]} * per_node)) \
    --ray.cpus-per-worker $((n_cpus / per_node)) &
driver=$!
trap 'kill -TERM "$driver"' TERM
code=0
wait "$driver" || code=$?
if [ "$code" -gt 128 ]; then # the signal ended this wait, not the driver
    code=0
    wait "$driver" || code=$?
fi
mapfile -t started < <(jobs -p)
kill "${started[@]}" 2>/dev/null || true
exit "$code"
