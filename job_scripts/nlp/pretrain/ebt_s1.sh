#!/usr/bin/env bash
# The paper's System 1 energy model, trained as in the preset text/ebt_s1.
# Sets up .venv first, so it works in a fresh checkout.
# All arguments are passed on to `ebt train`, such as:
#   bash job_scripts/nlp/pretrain/ebt_s1.sh -p model.size=xs -p trainer.max_steps=100000
set -euo pipefail
script=${EBT_SCRIPT:-${BASH_SOURCE[0]}}
if [ "${script##*/}" = slurm_script ]; then export EBT_JOB_ID=$SLURM_JOB_ID; script=$(scontrol show job "$SLURM_JOB_ID" | sed -n "s/^ *Command=//p"); fi    # sbatch runs a copy of this file in another folder
here=$(cd -P "$(dirname "${script%%.sh *}")/../../.." && pwd)
bash "$here/job_scripts/setup.sh"
exec "$here/.venv/bin/ebt" train --preset text/ebt_s1 "$@"
