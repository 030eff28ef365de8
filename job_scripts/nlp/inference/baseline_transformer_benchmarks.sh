#!/usr/bin/env bash
# Benchmarks for a trained baseline (Transformer++), greedy answers.
# Sets up .venv first, so it works in a fresh checkout.
# The first argument is a checkpoint (default: transformer:best, the best of the only run of that name below ./runs); all others are passed on to
# `benchmarks.sh`, where the benchmarks are listed and -p data.source=NAME picks one, such as:
#   .venv/bin/ebt submit job_scripts/nlp/inference/baseline_transformer_benchmarks.sh --cluster reference_a100 --array data.source=lambada,gsm8k,squad_v2 -- text/transformer:best
set -euo pipefail
script=${EBT_SCRIPT:-${BASH_SOURCE[0]}}
if [ "${script##*/}" = slurm_script ]; then export EBT_JOB_ID=$SLURM_JOB_ID; script=$(scontrol show job "$SLURM_JOB_ID" | sed -n "s/^ *Command=//p"); fi    # sbatch runs a copy of this file in another folder
here=$(cd -P "$(dirname "${script%%.sh *}")/../../.." && pwd)
checkpoint=transformer:best
if [ $# -gt 0 ] && [ "${1#-}" = "$1" ]; then checkpoint=$1; shift; fi
export EBT_SCRIPT=$here/job_scripts/nlp/inference/benchmarks.sh
exec bash "$EBT_SCRIPT" "$checkpoint" "$@"
