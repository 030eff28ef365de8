"Clearing away beside a real Slurm: what waits in its queue, for the first time or again, is left alone; what has left it is not."

import json
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "slurm"))
from cluster import Cluster, missing  # noqa: E402

from ebt_nb.config.config import build_config  # noqa: E402
from ebt_nb.runs.folders import Run, find_runs, read_status  # noqa: E402

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))
EBT = Path(sys.executable).with_name("ebt")
RUN = """#!/usr/bin/env bash
#SBATCH --output={folder}/log-%j.txt
{python} - <<'HERE'
import time
from ebt_nb.config.config import build_config
from ebt_nb.runs.folders import Run
Run.create(build_config("text/quickstart", {{"run.runs_dir": "{folder}/runs", "run.name": "victim"}}))
time.sleep(600)
HERE
"""


def test_the_queue_is_asked(tmp_path):
    with Cluster(tmp_path / "slurm") as cluster:

        def clean():
            done = subprocess.run(
                [EBT, "runs", "clean", "--what", "all", "--hours", "0", "--runs-dir", tmp_path / "runs", "--json"],
                env=cluster.environment,
                capture_output=True,
                text=True,
            )
            assert done.returncode == 0, done.stderr
            return {Path(one["path"]).parent.name: one["rule"] for one in json.loads(done.stdout)}

        (tmp_path / "job.sh").write_text(RUN.format(folder=tmp_path, python=sys.executable))
        working = cluster.call("sbatch", "--parsable", "--requeue", tmp_path / "job.sh").strip()
        cluster.until(lambda: len(find_runs(tmp_path / "runs")) == 1, "the job does not begin", 60)
        [run] = find_runs(tmp_path / "runs")
        assert read_status(run.dir)["job"].split(".")[0] == working and clean() == {}
        held = cluster.call("sbatch", "--parsable", "--hold", tmp_path / "job.sh").strip()
        waiting = Run.create(
            build_config("text/quickstart", {"run.runs_dir": str(tmp_path / "runs"), "run.name": "waiting"})
        )
        waiting.set_status("interrupted", job=f"{held}.0")  # as a job that is to be started again
        assert clean() == {}
        cluster.call("scontrol", "requeuehold", working)  # killed, and waits to be started again
        cluster.until(lambda: cluster.jobs(working)[0]["JobState"] == "PENDING", "the job is not queued again", 60)
        assert run.status == "running" and clean() == {}
        cluster.call("scancel", working, held)
        cluster.until(lambda: not cluster.call("squeue", "--noheader").strip(), "the jobs do not leave the queue", 60)
        assert clean() == {"victim": "empty", "waiting": "empty"}
