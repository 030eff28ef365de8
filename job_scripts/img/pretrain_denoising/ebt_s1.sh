#!/usr/bin/env bash
# The paper's System 1 energy model that takes noise from pictures, trained as in the preset image/denoise_ebt_s1. Sets up .venv first, from a fresh checkout too.
# Whatever is given is handed on to `ebt train`, such as: bash job_scripts/img/pretrain_denoising/ebt_s1.sh -p data.source=/data/pictures -p model.size=xs
set -euo pipefail
script=${EBT_SCRIPT:-${BASH_SOURCE[0]}}
if [ "${script##*/}" = slurm_script ]; then script=$(scontrol show job "$SLURM_JOB_ID" | sed -n "s/^ *Command=//p"); fi    # sbatch runs a copy, which lies elsewhere
here=$(cd -P "$(dirname "${script%%.sh *}")/../../.." && pwd)
bash "$here/job_scripts/setup.sh"
exec "$here/.venv/bin/ebt" train --preset image/denoise_ebt_s1 "$@"
