#!/usr/bin/env bash
# The paper's feed-forward baseline of video on DINOv2, one vector for a frame, as in the preset video/dinov2_transformer.
# Sets up .venv first, so it works in a fresh checkout; decodes and encodes clips once; then trains.
# All arguments are passed on to `ebt encode` and `ebt train`, such as:
#   bash job_scripts/vid/pretrain/dinov2_baseline_transformer.sh -p data.source=/data/ucf101 -p model.size=xs
set -euo pipefail
script=${EBT_SCRIPT:-${BASH_SOURCE[0]}}
if [ "${script##*/}" = slurm_script ]; then export EBT_JOB_ID=$SLURM_JOB_ID; script=$(scontrol show job "$SLURM_JOB_ID" | sed -n "s/^ *Command=//p"); fi    # sbatch runs a copy of this file in another folder
here=$(cd -P "$(dirname "${script%%.sh *}")/../../.." && pwd)
bash "$here/job_scripts/setup.sh"
"$here/.venv/bin/ebt" encode --preset video/dinov2_transformer "$@"
exec "$here/.venv/bin/ebt" train --preset video/dinov2_transformer "$@"
