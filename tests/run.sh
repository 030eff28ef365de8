#!/usr/bin/env bash
# Everything a change must pass: sets up .venv, checks style (ruff), runs the notebooks (nbdev_test; those that run as
# jobs are run by pytest) and every test (pytest), first those that notebooks and package agree.
# The last line counts them all: `N passed, N failed`.
set -uo pipefail
cd -P "$(dirname "${BASH_SOURCE[0]}")/.."
exec </dev/null
unset PYTHONDONTWRITEBYTECODE    # else every process compiles what it imports, which takes longer than most tests
export OMP_WAIT_POLICY=passive    # as in `ebt`: a thread that waits leaves its core to the other test process
bash job_scripts/setup.sh || exit 1

work=$(mktemp -d)
trap 'kill $(jobs -p) 2>/dev/null; rm -rf "$work"' EXIT
python=.venv/bin/python
passed=0 failed=0

# Counts the tests of a junit file; one failure if pytest did not get as far as writing it.
count_tests() {
    local counts
    counts=$("$python" - "$1" <<'COUNT'
import sys, xml.etree.ElementTree as tree
suite = tree.parse(sys.argv[1]).getroot().find("testsuite")
tests, failures, errors, skipped = (int(suite.get(name)) for name in ("tests", "failures", "errors", "skipped"))
print(tests - failures - errors - skipped, failures + errors)
COUNT
    ) || counts="0 1"
    passed=$((passed + ${counts% *})) failed=$((failed + ${counts#* }))
}

# Notebooks are run beside all else: many tests wait for processes that they started, which leaves a core free. Two at a
# time, because the notebooks would end long after the tests otherwise.
OMP_NUM_THREADS=1 "$python" tests/run_notebooks.py --n_workers 2 --timing >"$work/notebooks.log" 2>&1 &
running_notebooks=$!

echo "== style"
if .venv/bin/ruff check --quiet . && .venv/bin/ruff format --check --quiet .; then
    passed=$((passed + 1))
else
    failed=$((failed + 1))
fi

echo "== tests"
"$python" -m pytest -q -rs tests -n 2 --dist loadscope --no-loadscope-reorder --durations 25 \
    --junitxml "$work/tests.xml"
count_tests "$work/tests.xml"

echo "== notebooks"
wait "$running_notebooks"
status=$?
cat "$work/notebooks.log"
# Notebooks that nbdev_test really runs: not those whose front matter says skip_exec.
notebooks=$("$python" - <<'RUN'
from fastcore.basics import str2bool
from nbdev.doclinks import nbglob
from nbdev.frontmatter import FrontmatterProc
from nbdev.process import NBProcessor
front_matters = [NBProcessor(path, procs=FrontmatterProc, process=True).nb.frontmatter_ for path in nbglob()]
print(sum(not str2bool(front_matter.get("skip_exec", False)) for front_matter in front_matters))
RUN
) || notebooks=1    # one cannot be read; nbdev_test has failed on it as well
bad=$(sed -n '/^nbdev Tests Failed On The Following Notebooks/,$p' "$work/notebooks.log" |
    grep -c '^[[:space:]].*\.ipynb$')
if [ "$status" -ne 0 ] && [ "$bad" -eq 0 ]; then bad=1; fi
passed=$((passed + notebooks - bad)) failed=$((failed + bad))

echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ]
