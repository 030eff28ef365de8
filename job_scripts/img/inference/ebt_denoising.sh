#!/usr/bin/env bash
# An energy model on noise of twice the trained level (0.2), as published: two thinking steps.
# Sets up .venv first, so it works in a fresh checkout.
# The first argument is a checkpoint (default: the best of the only run called `image/denoise_ebt_s1` below ./runs); all others are passed
# on to `ebt evaluate`, such as:
#   bash job_scripts/img/inference/ebt_denoising.sh image/denoise_ebt_s1:best --limit 64 --visualize
set -euo pipefail
script=${EBT_SCRIPT:-${BASH_SOURCE[0]}}
if [ "${script##*/}" = slurm_script ]; then export EBT_JOB_ID=$SLURM_JOB_ID; script=$(scontrol show job "$SLURM_JOB_ID" | sed -n "s/^ *Command=//p"); fi    # sbatch runs a copy of this file in another folder
here=$(cd -P "$(dirname "${script%%.sh *}")/../../.." && pwd)
checkpoint=image/denoise_ebt_s1:best
if [ $# -gt 0 ] && [ "${1#-}" = "$1" ]; then checkpoint=$1; shift; fi
bash "$here/job_scripts/setup.sh"
exec "$here/.venv/bin/ebt" evaluate "$checkpoint" -p "diffusion.evaluation_levels=[0.2]" -p inference.steps=2 "$@"
