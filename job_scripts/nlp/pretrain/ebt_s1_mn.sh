#!/usr/bin/env bash
# The paper's System 1 energy model on several nodes, as in the preset text/ebt_s1: run this on every node, with NODES, NODE (0, 1, ...), GPUS and MASTER (host:port of node 0) set.
# Whatever is given is handed on to `ebt train`, such as: NODES=2 NODE=0 GPUS=8 MASTER=node0:29500 bash job_scripts/nlp/pretrain/ebt_s1_mn.sh -p model.size=small
set -euo pipefail
here=$(cd -P "$(dirname "${BASH_SOURCE[0]}")/../../.." && pwd)
nodes=${NODES:-1} node=${NODE:-0} gpus=${GPUS:-1} master=${MASTER:-localhost:29500}
bash "$here/job_scripts/setup.sh"
exec "$here/.venv/bin/torchrun" --nnodes "$nodes" --node-rank "$node" --nproc-per-node "$gpus" --rdzv-backend c10d --rdzv-id ebt_s1_mn --rdzv-endpoint "$master" \
    --no-python "$here/.venv/bin/ebt" train --preset text/ebt_s1 -p trainer.nodes="$nodes" -p trainer.devices="$gpus" "$@"
