#!/usr/bin/env bash
# The paper's System 1 energy model on several nodes, trained as in the preset text/ebt_s1: 2 nodes x 4 GPUs x 32 sequences
# are the 256 of an update. Other numbers of GPUs keep the 256, accumulating batches of -p data.batch_size=N sequences.
# All arguments are passed on to `ebt train`. With Slurm, with the nodes and a task for each GPU that the options below or
# on the command line request:
#   sbatch --nodes=4 job_scripts/nlp/pretrain/ebt_s1_mn.sh -p model.size=small
# Without Slurm, run this on every node, with NODES, NODE (0, 1, ...), GPUS and MASTER (host:port of node 0) set:
#   NODES=2 NODE=0 GPUS=4 MASTER=node0:29500 bash job_scripts/nlp/pretrain/ebt_s1_mn.sh -p model.size=small
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
set -euo pipefail
script=${EBT_SCRIPT:-${BASH_SOURCE[0]}}
if [ "${script##*/}" = slurm_script ]; then export EBT_JOB_ID=$SLURM_JOB_ID; script=$(scontrol show job "$SLURM_JOB_ID" | sed -n "s/^ *Command=//p"); fi    # sbatch runs a copy of this file in another folder
here=$(cd -P "$(dirname "${script%%.sh *}")/../../.." && pwd)
bash "$here/job_scripts/setup.sh"
if [ -n "${SLURM_NTASKS_PER_NODE:-}" ]; then
    exec srun --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" "$here/.venv/bin/ebt" train --preset text/ebt_s1 -p trainer.nodes="$SLURM_JOB_NUM_NODES" -p trainer.devices="$SLURM_NTASKS_PER_NODE" "$@"
fi
nodes=${NODES:-1} node=${NODE:-0} gpus=${GPUS:-1} master=${MASTER:-localhost:29500}
exec "$here/.venv/bin/torchrun" --nnodes "$nodes" --node-rank "$node" --nproc-per-node "$gpus" --rdzv-backend c10d --rdzv-id ebt_s1_mn --rdzv-endpoint "$master" \
    --no-python "$here/.venv/bin/ebt" train --preset text/ebt_s1 -p trainer.nodes="$nodes" -p trainer.devices="$gpus" "$@"
