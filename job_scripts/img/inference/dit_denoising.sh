#!/usr/bin/env bash
# The diffusion baseline on noise of twice the trained level (0.2), as published: from the step of that noise, 100 steps gone over three times.
# Sets up .venv first, so it works in a fresh checkout.
# The first argument is a checkpoint (default: the best of the only run called `image/denoise_dit` below ./runs); all others are passed
# on to `ebt evaluate`, such as:
#   bash job_scripts/img/inference/dit_denoising.sh image/denoise_dit:best --limit 64 --visualize
set -euo pipefail
script=${EBT_SCRIPT:-${BASH_SOURCE[0]}}
if [ "${script##*/}" = slurm_script ]; then export EBT_JOB_ID=$SLURM_JOB_ID; script=$(scontrol show job "$SLURM_JOB_ID" | sed -n "s/^ *Command=//p"); fi    # sbatch runs a copy of this file in another folder
here=$(cd -P "$(dirname "${script%%.sh *}")/../../.." && pwd)
checkpoint=image/denoise_dit:best
if [ $# -gt 0 ] && [ "${1#-}" = "$1" ]; then checkpoint=$1; shift; fi
bash "$here/job_scripts/setup.sh"
exec "$here/.venv/bin/ebt" evaluate "$checkpoint" -p "diffusion.evaluation_levels=[0.2]" -p diffusion.sampling_start=level -p diffusion.sampling_steps=100 -p diffusion.recursion=3 "$@"
