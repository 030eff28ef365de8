#!/usr/bin/env bash
# Held-out clips continued by a trained model, measured beside a copy of the last frame.
# Sets up .venv first, so it works in a fresh checkout.
# The first argument is a checkpoint (default: the best of the only run called `video/ebt_s1` below ./runs); all others are passed
# on to `ebt rollout`, such as:
#   bash job_scripts/vid/inference/rollout.sh video/ebt_s1:best --condition 4 --frames 12 --limit 256 --output rollouts
set -euo pipefail
script=${EBT_SCRIPT:-${BASH_SOURCE[0]}}
if [ "${script##*/}" = slurm_script ]; then export EBT_JOB_ID=$SLURM_JOB_ID; script=$(scontrol show job "$SLURM_JOB_ID" | sed -n "s/^ *Command=//p"); fi    # sbatch runs a copy of this file in another folder
here=$(cd -P "$(dirname "${script%%.sh *}")/../../.." && pwd)
checkpoint=video/ebt_s1:best
if [ $# -gt 0 ] && [ "${1#-}" = "$1" ]; then checkpoint=$1; shift; fi
bash "$here/job_scripts/setup.sh"
exec "$here/.venv/bin/ebt" rollout "$checkpoint" "$@"
