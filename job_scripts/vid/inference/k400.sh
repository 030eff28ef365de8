#!/usr/bin/env bash
# Clips of Kinetics-400 continued by a model that was trained on other clips: 4 true frames, then 12.
# Sets up .venv first, so it works in a fresh checkout; encodes the clips once as the preset video/ebt_s1 does (PRESET=... for others).
# DATA names them (default: kinetics-400), by name or path.
# The first argument is a checkpoint (default: the best of the only run called `video/ebt_s1` below ./runs); all others are passed
# on to `ebt rollout`, such as:
#   DATA=/data/kinetics-400 bash job_scripts/vid/inference/k400.sh video/ebt_s1:best --limit 1000
set -euo pipefail
script=${EBT_SCRIPT:-${BASH_SOURCE[0]}}
if [ "${script##*/}" = slurm_script ]; then export EBT_JOB_ID=$SLURM_JOB_ID; script=$(scontrol show job "$SLURM_JOB_ID" | sed -n "s/^ *Command=//p"); fi    # sbatch runs a copy of this file in another folder
here=$(cd -P "$(dirname "${script%%.sh *}")/../../.." && pwd)
checkpoint=video/ebt_s1:best
if [ $# -gt 0 ] && [ "${1#-}" = "$1" ]; then checkpoint=$1; shift; fi
data=${DATA:-kinetics-400}
bash "$here/job_scripts/setup.sh"
"$here/.venv/bin/ebt" encode --preset "${PRESET:-video/ebt_s1}" -p "data.source=$data"
exec "$here/.venv/bin/ebt" rollout "$checkpoint" --data "$data" --condition 4 --frames 12 "$@"
