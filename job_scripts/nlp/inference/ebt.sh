#!/usr/bin/env bash
# Text from a trained energy-based transformer, which continues a prompt. Sets up .venv first, so it works in a fresh checkout.
# The first argument is a checkpoint (default: the best of the only run called `ebt` below ./runs); all others are passed
# on to `ebt generate`, such as:
#   bash job_scripts/nlp/inference/ebt.sh text/ebt_s1:best --prompt "It was" --tokens 60 -p inference.steps=5 -p inference.samples=4
set -euo pipefail
script=${EBT_SCRIPT:-${BASH_SOURCE[0]}}
if [ "${script##*/}" = slurm_script ]; then export EBT_JOB_ID=$SLURM_JOB_ID; script=$(scontrol show job "$SLURM_JOB_ID" | sed -n "s/^ *Command=//p"); fi    # sbatch runs a copy of this file in another folder
here=$(cd -P "$(dirname "${script%%.sh *}")/../../.." && pwd)
checkpoint=ebt:best
if [ $# -gt 0 ] && [ "${1#-}" = "$1" ]; then checkpoint=$1; shift; fi
bash "$here/job_scripts/setup.sh"
exec "$here/.venv/bin/ebt" generate "$checkpoint" "$@"
