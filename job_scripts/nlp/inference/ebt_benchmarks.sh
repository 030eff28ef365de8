#!/usr/bin/env bash
# Benchmarks for a trained energy-based transformer, thinking as published: two steps in each landscape, Langevin noise of standard deviation 1, greedy answers.
# Sets up .venv first, so it works in a fresh checkout.
# The first argument is a checkpoint (default: ebt:best, the best of the only run of that name below ./runs); all others are passed on to
# `benchmarks.sh`, where the benchmarks are listed and -p data.source=NAME picks one, such as:
#   .venv/bin/ebt submit job_scripts/nlp/inference/ebt_benchmarks.sh --cluster reference_a100 --array data.source=lambada,gsm8k,squad_v2 -- text/ebt_s1:best
set -euo pipefail
script=${EBT_SCRIPT:-${BASH_SOURCE[0]}}
if [ "${script##*/}" = slurm_script ]; then export EBT_JOB_ID=$SLURM_JOB_ID; script=$(scontrol show job "$SLURM_JOB_ID" | sed -n "s/^ *Command=//p"); fi    # sbatch runs a copy of this file in another folder
here=$(cd -P "$(dirname "${script%%.sh *}")/../../.." && pwd)
checkpoint=ebt:best
if [ $# -gt 0 ] && [ "${1#-}" = "$1" ]; then checkpoint=$1; shift; fi
export EBT_SCRIPT=$here/job_scripts/nlp/inference/benchmarks.sh
exec bash "$EBT_SCRIPT" "$checkpoint" -p inference.steps_per_landscape=2 -p inference.noise=1 "$@"
