#!/usr/bin/env bash
# From a fresh checkout to a trained model and its report.
# Sets up .venv, then trains a small energy model and its baseline on the embedded novels.
# All arguments are passed on to `ebt run`, such as:
#   bash job_scripts/quickstart.sh -p trainer.max_steps=100 --runs-dir /tmp/runs
set -euo pipefail
script=${EBT_SCRIPT:-${BASH_SOURCE[0]}}
if [ "${script##*/}" = slurm_script ]; then export EBT_JOB_ID=$SLURM_JOB_ID; script=$(scontrol show job "$SLURM_JOB_ID" | sed -n "s/^ *Command=//p"); fi    # sbatch runs a copy of this file in another folder
here=$(cd -P "$(dirname "${script%%.sh *}")/.." && pwd)
bash "$here/job_scripts/setup.sh"
exec "$here/.venv/bin/ebt" run pretrain --preset text/quickstart "$@"
