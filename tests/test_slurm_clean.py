"""`ebt runs clean` with a real Slurm.

What waits in its queue, for the first time or again, is left alone; what has left the queue is not.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "slurm"))
from cluster import Cluster, missing_requirement

from ebt_nb.config.overrides import build_config
from ebt_nb.runs.addresses import find_runs
from ebt_nb.runs.folders import Run
from ebt_nb.runs.status import read_status

pytestmark = pytest.mark.skipif(missing_requirement() is not None, reason=str(missing_requirement()))
EBT = Path(sys.executable).with_name("ebt")
JOB_SCRIPT = """#!/usr/bin/env bash
#SBATCH --output={folder}/log-%j.txt
{python} - <<'HERE'
import time
from ebt_nb.config.overrides import build_config
from ebt_nb.runs.folders import Run
Run.create(build_config("text/quickstart", {{"run.runs_dir": "{folder}/runs", "run.name": "victim"}}))
time.sleep(3600)
HERE
"""


def find_leftovers(folder, environment):
    "Name of the run -> rule, of what `ebt runs clean` lists below a folder."
    command = [EBT, "runs", "clean", "--what", "all", "--hours", "0", "--runs-dir", folder, "--json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return {Path(leftover["path"]).parent.name: leftover["rule"] for leftover in json.loads(done.stdout)}


def test_jobs_in_the_queue_are_left_alone(tmp_path):
    runs_dir = tmp_path / "runs"
    (tmp_path / "job.sh").write_text(JOB_SCRIPT.format(folder=tmp_path, python=sys.executable))
    with Cluster(tmp_path / "slurm") as cluster:

        def leftovers():
            return find_leftovers(runs_dir, cluster.environment)

        running = cluster.run("sbatch", "--parsable", "--requeue", tmp_path / "job.sh").strip()
        cluster.wait_until(lambda: len(find_runs(runs_dir)) == 1, "the job does not begin")
        [run] = find_runs(runs_dir)
        assert read_status(run.dir)["job"].split(".")[0] == running
        assert leftovers() == {}
        held = cluster.run("sbatch", "--parsable", "--hold", tmp_path / "job.sh").strip()
        waiting = Run.create(build_config("text/quickstart", {"run.runs_dir": str(runs_dir), "run.name": "waiting"}))
        waiting.set_status("interrupted", job=f"{held}.0")  # as a job that is to be started again
        assert leftovers() == {}
        cluster.run("scontrol", "requeuehold", running)  # killed, and waits to be started again
        cluster.wait_until(lambda: cluster.show_jobs(running)[0]["JobState"] == "PENDING", "the job is not requeued")
        assert run.status == "running"
        assert leftovers() == {}
        cluster.run("scancel", running, held)
        cluster.wait_until(lambda: not cluster.run("squeue", "--noheader").strip(), "the jobs do not leave the queue")
        assert leftovers() == {"victim": "empty", "waiting": "empty"}
