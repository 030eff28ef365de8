#!/usr/bin/env bash
# The paper's System 2 energy model that generates images from captions, as in the preset image/t2i_published_ebt_s2: COCO, Stable Diffusion's VAE, CLIP.
# Sets up .venv first, so it works in a fresh checkout; encodes images and captions once; then trains.
# All arguments are passed on to `ebt encode` and `ebt train`, such as:
#   bash job_scripts/img/pretrain_t2i/published_ebt_s2.sh -p data.source=/data/coco -p encoder.images=vae:/models/sd-vae-ft-ema
set -euo pipefail
script=${EBT_SCRIPT:-${BASH_SOURCE[0]}}
if [ "${script##*/}" = slurm_script ]; then export EBT_JOB_ID=$SLURM_JOB_ID; script=$(scontrol show job "$SLURM_JOB_ID" | sed -n "s/^ *Command=//p"); fi    # sbatch runs a copy of this file in another folder
here=$(cd -P "$(dirname "${script%%.sh *}")/../../.." && pwd)
bash "$here/job_scripts/setup.sh"
"$here/.venv/bin/ebt" encode --preset image/t2i_published_ebt_s2 "$@"
exec "$here/.venv/bin/ebt" train --preset image/t2i_published_ebt_s2 "$@"
