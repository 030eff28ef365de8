#!/usr/bin/env bash
# A trained language model on benchmarks: losses, exact match, F1, choices, and every generated answer in a file.
# Sets up .venv first, so it works in a fresh checkout.
# The first argument is a checkpoint; `-p data.source=NAME` picks one benchmark (all of the list below without it, one after
# the other); all other arguments are passed on to `ebt evaluate`. As an array, a task for each benchmark:
#   bash job_scripts/nlp/inference/benchmarks.sh text/ebt_s1:best -p data.source=gsm8k --limit 100
#   .venv/bin/ebt submit job_scripts/nlp/inference/ebt_benchmarks.sh --cluster reference_a100 --array data.source=lambada,gsm8k,squad_v2 -- text/ebt_s1:best
# Results go to ./benchmarks/CHECKPOINT/NAME.json (figures) and NAME.jsonl (answers); `--overwrite` replaces those of an earlier call.
set -euo pipefail
script=${EBT_SCRIPT:-${BASH_SOURCE[0]}}
if [ "${script##*/}" = slurm_script ]; then export EBT_JOB_ID=$SLURM_JOB_ID; script=$(scontrol show job "$SLURM_JOB_ID" | sed -n "s/^ *Command=//p"); fi    # sbatch runs a copy of this file in another folder
here=$(cd -P "$(dirname "${script%%.sh *}")/../../.." && pwd)
benchmarks=(lambada gsm8k squad_v2 bigbench_dyck bigbench_math_qa bigbench_matrixshapes bigbench_arithmetic bigbench_repeat_copy_logic bigbench_penguins arc_easy_letters arc_challenge_letters planbench)

if [ $# -eq 0 ] || [ "${1#-}" != "$1" ]; then echo "benchmarks: the first argument is a checkpoint, such as text/ebt_s1:best" >&2; exit 2; fi
checkpoint=$1; shift
words=()
chosen=()
while [ $# -gt 0 ]; do
    if [ "$1" = -p ] && [ $# -gt 1 ] && [ "$2" != "${2#data.source=}" ]; then chosen+=("${2#data.source=}"); shift 2; else words+=("$1"); shift; fi
done
if [ ${#chosen[@]} -eq 0 ]; then chosen=("${benchmarks[@]}"); fi
bash "$here/job_scripts/setup.sh"

name=${checkpoint%.ckpt}
folder=benchmarks/$(printf %s "${name#/}" | tr ":/ " "___")
mkdir -p "$folder"
failed=()
for benchmark in "${chosen[@]}"; do
    case $benchmark in gsm8k|arc_*) split=test ;; *) split=validation ;; esac
    echo "== $benchmark ($split)"
    file=$folder/$benchmark
    if "$here/.venv/bin/ebt" evaluate "$checkpoint" --data "$benchmark" --kind questions --split "$split" --results "$file.jsonl" --json ${words[@]+"${words[@]}"} > "$file.part"; then
        mv "$file.part" "$file.json"
        echo "$file.json"
    else
        rm -f "$file.part"
        failed+=("$benchmark")
    fi
done
if [ ${#failed[@]} -gt 0 ]; then echo "benchmarks: not measured: ${failed[*]} (the messages are above)" >&2; exit 1; fi
