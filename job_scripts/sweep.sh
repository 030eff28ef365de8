#!/usr/bin/env bash
# One agent of a sweep. Sets up .venv first, so it works in a fresh checkout; then searches as the sweep file says.
# Any number of agents share the sweep's folder:
#   bash job_scripts/sweep.sh job_scripts/sweeps/peak_lr.yaml --agents 2
#   sbatch --array=1-8 job_scripts/sweep.sh job_scripts/sweeps/peak_lr.yaml
# All arguments are passed on to `ebt sweep`; without any, it runs the example, a search for a learning rate.
set -euo pipefail
script=${EBT_SCRIPT:-${BASH_SOURCE[0]}}
if [ "${script##*/}" = slurm_script ]; then export EBT_JOB_ID=$SLURM_JOB_ID; script=$(scontrol show job "$SLURM_JOB_ID" | sed -n "s/^ *Command=//p"); fi    # sbatch runs a copy of this file in another folder
here=$(cd -P "$(dirname "${script%%.sh *}")/.." && pwd)
bash "$here/job_scripts/setup.sh"
if [ $# -eq 0 ]; then set -- "$here/job_scripts/sweeps/peak_lr.yaml"; fi
exec "$here/.venv/bin/ebt" sweep "$@"
