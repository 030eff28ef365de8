#!/usr/bin/env bash
# The feed-forward baseline (Transformer++), trained as in the preset text/transformer. Sets up .venv first, from a fresh checkout too.
# Whatever is given is handed on to `ebt train`, such as: bash job_scripts/nlp/pretrain/baseline_transformer.sh -p model.size=xs -p trainer.max_steps=100000
set -euo pipefail
here=$(cd -P "$(dirname "${BASH_SOURCE[0]}")/../../.." && pwd)
bash "$here/job_scripts/setup.sh"
exec "$here/.venv/bin/ebt" train --preset text/transformer "$@"
