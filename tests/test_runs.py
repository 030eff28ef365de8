"Run folders without permission, in races, and killed while they are written."

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from ebt_nb.config.overrides import build_config
from ebt_nb.jobs.cleanup import find_leftovers, remove_leftover
from ebt_nb.runs.addresses import find_run, find_runs
from ebt_nb.runs.files import RunError
from ebt_nb.runs.folders import Run
from ebt_nb.runs.metrics import MetricsFile, read_metrics
from ebt_nb.runs.status import may_be_running, read_status


def quickstart_config(runs_dir, **changes):
    return build_config("text/quickstart", {"run.runs_dir": str(runs_dir)} | changes)


@pytest.fixture
def read_only_folder():
    "A folder that may be read but not written; permissions hold within the test, also for the superuser."
    folder = Path(tempfile.mkdtemp())
    (folder / "closed").mkdir(mode=0)
    folder.chmod(0o555)
    if os.geteuid() == 0:
        os.seteuid(65534)
    yield folder
    os.seteuid(os.getuid())
    folder.chmod(0o755)
    shutil.rmtree(folder)


@pytest.mark.parametrize("subfolder", ["runs", "a/b/runs", "closed/runs"])
def test_a_folder_without_permission_is_refused(read_only_folder, subfolder):
    with pytest.raises(RunError, match=r"Permission denied.*--runs-dir or run.runs_dir"):
        Run.create(quickstart_config(read_only_folder / subfolder))
    assert os.listdir(read_only_folder) == ["closed"]


def test_the_status_of_a_run_that_became_read_only_stays(tmp_path, monkeypatch):
    run = Run.create(quickstart_config(tmp_path))

    def deny(*paths):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("os.replace", deny)
    with pytest.raises(RunError, match=r"status.json: cannot be written"):
        run.set_status("done")
    assert run.status == "running"
    assert sorted(path.name for path in run.dir.iterdir()) == ["checkpoints", "config.yaml", "figures", "status.json"]


CREATE_RUNS = """
import sys
from ebt_nb.config.overrides import build_config
from ebt_nb.runs.folders import Run
config = build_config("text/quickstart", {"run.runs_dir": sys.argv[1]})
for i in range(20): print(Run.create(config).dir)
"""
CREATE_FAILED_RUNS_AND_DIE = """
import os, signal
for i in range(5): Run.create(config).set_status("failed")
os.kill(os.getpid(), signal.SIGKILL)
"""


def start_script(script, *arguments):
    "Start a Python script; its output can be read."
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_jobs_started_at_the_same_moment_never_share_a_folder(tmp_path):
    jobs = [start_script(CREATE_RUNS, tmp_path) for _ in range(4)]
    folders = [line for job in jobs for line in job.communicate()[0].split()]
    assert all(job.returncode == 0 for job in jobs)
    assert len(folders) == len(set(folders)) == 80
    assert {str(run.dir) for run in find_runs(tmp_path)} == set(folders)
    assert not list(tmp_path.rglob("*.tmp~"))


WRITE_FOREVER = """
import sys
from ebt_nb.runs.folders import Run
from ebt_nb.runs.metrics import MetricsFile
run = Run.open(sys.argv[1])
metrics = MetricsFile(run.dir / "metrics.csv")
for step in range(1, 10**9):
    metrics.append({"step": step, f"metric_{step // 50}": 1 / step})
    run.set_status("running", step=step)
    if step == 100: print("writing", flush=True)
"""


def test_a_kill_while_writing_leaves_complete_files(tmp_path):
    run = Run.create(quickstart_config(tmp_path))
    job = start_script(WRITE_FOREVER, run.dir)
    assert job.stdout.readline() == "writing\n"
    time.sleep(0.05)
    job.send_signal(signal.SIGKILL)
    job.communicate()
    rows = read_metrics(run.dir / "metrics.csv")
    assert len(rows) >= 100
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    assert all(row[f"metric_{row['step'] // 50}"] == 1 / row["step"] for row in rows)
    assert read_status(run.dir)["step"] in (len(rows), len(rows) - 1)
    metrics = MetricsFile(run.dir / "metrics.csv")
    metrics.drop_rows_after(80)
    metrics.append({"step": 81, "metric_1": 1 / 81})
    assert read_metrics(run.dir / "metrics.csv") == rows[:81]


def test_a_run_that_cannot_be_read_is_named(tmp_path):
    run = Run.create(quickstart_config(tmp_path))
    (run.dir / "status.json").write_text("{")
    with pytest.raises(RunError, match=f"{run.dir}/status.json: not the status of a run"):
        find_runs(tmp_path)
    (run.dir / "status.json").unlink()
    assert find_runs(tmp_path) == []
    with pytest.raises(RunError, match="none yet"):
        find_run("text/quickstart", tmp_path)


def test_leftovers_are_removed_while_runs_are_created(tmp_path):
    "Two processes create runs and mark some as failed, while failed runs are listed and removed again and again."

    def remove_failed_runs():
        return sum(remove_leftover(one, tmp_path) for one in find_leftovers(tmp_path, ["failed"], hours=0))

    jobs = [start_script(CREATE_RUNS + CREATE_FAILED_RUNS_AND_DIE, tmp_path) for _ in range(2)]
    num_removed = 0
    while any(job.poll() is None for job in jobs):
        num_removed += remove_failed_runs()
    for job in jobs:
        job.communicate()
    num_removed += remove_failed_runs()
    remaining = find_runs(tmp_path)
    assert num_removed == 10 and len(remaining) == 40
    assert {run.status for run in remaining} == {"running"}  # their processes were killed, and could not write it
    reasons = {one.reason for one in find_leftovers(tmp_path, ["empty"], hours=0)}
    assert reasons == {"ended without a metric or a checkpoint"}
    assert not list(tmp_path.rglob("*.tmp~"))


def test_a_killed_run_is_distinguished_from_a_running_one(tmp_path):
    run = Run.create(quickstart_config(tmp_path))
    assert read_status(run.dir)["process"]["pid"] == os.getpid()
    assert may_be_running(read_status(run.dir))
    job = start_script(WRITE_FOREVER, run.dir)
    assert job.stdout.readline() == "writing\n"
    assert read_status(run.dir)["process"]["pid"] == job.pid
    assert may_be_running(read_status(run.dir))
    job.send_signal(signal.SIGKILL)
    job.communicate()
    assert run.status == "running" and not may_be_running(read_status(run.dir))
