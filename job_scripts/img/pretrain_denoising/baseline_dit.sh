#!/usr/bin/env bash
# The diffusion baseline (DiT) that removes noise from images, trained as in the preset image/denoise_dit.
# Sets up .venv first, so it works in a fresh checkout.
# All arguments are passed on to `ebt train`, such as:
#   bash job_scripts/img/pretrain_denoising/baseline_dit.sh -p data.source=/data/images -p model.size=xs
set -euo pipefail
script=${EBT_SCRIPT:-${BASH_SOURCE[0]}}
if [ "${script##*/}" = slurm_script ]; then export EBT_JOB_ID=$SLURM_JOB_ID; script=$(scontrol show job "$SLURM_JOB_ID" | sed -n "s/^ *Command=//p"); fi    # sbatch runs a copy of this file in another folder
here=$(cd -P "$(dirname "${script%%.sh *}")/../../.." && pwd)
bash "$here/job_scripts/setup.sh"
exec "$here/.venv/bin/ebt" train --preset image/denoise_dit "$@"
