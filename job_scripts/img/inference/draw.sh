#!/usr/bin/env bash
# Images from captions by a trained model. Sets up .venv first, so it works in a fresh checkout.
# The first argument is a checkpoint (default: the best of the only run called `image/t2i_ebt_s1` below ./runs); all others are passed
# on to `ebt draw`, such as:
#   bash job_scripts/img/inference/draw.sh image/t2i_dit:best --caption "red apple" --caption "green apple" --to apples.png
set -euo pipefail
script=${EBT_SCRIPT:-${BASH_SOURCE[0]}}
if [ "${script##*/}" = slurm_script ]; then export EBT_JOB_ID=$SLURM_JOB_ID; script=$(scontrol show job "$SLURM_JOB_ID" | sed -n "s/^ *Command=//p"); fi    # sbatch runs a copy of this file in another folder
here=$(cd -P "$(dirname "${script%%.sh *}")/../../.." && pwd)
checkpoint=image/t2i_ebt_s1:best
if [ $# -gt 0 ] && [ "${1#-}" = "$1" ]; then checkpoint=$1; shift; fi
bash "$here/job_scripts/setup.sh"
exec "$here/.venv/bin/ebt" draw "$checkpoint" "$@"
