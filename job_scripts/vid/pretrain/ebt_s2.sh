#!/usr/bin/env bash
# The paper's System 2 energy model of video: latents of Something-Something V2, as in the preset video/ebt_s2.
# Sets up .venv first, so it works in a fresh checkout; decodes and encodes clips once; then trains.
# All arguments are passed on to `ebt encode` and `ebt train`, such as:
#   bash job_scripts/vid/pretrain/ebt_s2.sh -p data.source=/data/something-something-v2 -p model.size=xs
set -euo pipefail
script=${EBT_SCRIPT:-${BASH_SOURCE[0]}}
if [ "${script##*/}" = slurm_script ]; then export EBT_JOB_ID=$SLURM_JOB_ID; script=$(scontrol show job "$SLURM_JOB_ID" | sed -n "s/^ *Command=//p"); fi    # sbatch runs a copy of this file in another folder
here=$(cd -P "$(dirname "${script%%.sh *}")/../../.." && pwd)
bash "$here/job_scripts/setup.sh"
"$here/.venv/bin/ebt" encode --preset video/ebt_s2 "$@"
exec "$here/.venv/bin/ebt" train --preset video/ebt_s2 "$@"
