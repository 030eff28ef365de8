#!/usr/bin/env bash
# Builds the documentation site and follows every link of it; fails if one leads nowhere.
# Sets up .venv first, so it works in a fresh checkout. All arguments are passed on to `ebt docs`, such as:
#   bash job_scripts/docs.sh --output /tmp/site --serve
set -euo pipefail
script=${EBT_SCRIPT:-${BASH_SOURCE[0]}}
if [ "${script##*/}" = slurm_script ]; then export EBT_JOB_ID=$SLURM_JOB_ID; script=$(scontrol show job "$SLURM_JOB_ID" | sed -n "s/^ *Command=//p"); fi    # sbatch runs a copy of this file in another folder
here=$(cd -P "$(dirname "${script%%.sh *}")/.." && pwd)
bash "$here/job_scripts/setup.sh"
exec "$here/.venv/bin/ebt" docs --check "$@"
