"Run folders under permissions, races and kills."

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from ebt_nb.config.config import build_config
from ebt_nb.jobs.bookkeeping import leftovers, remove
from ebt_nb.runs.folders import (
    MetricsFile,
    Run,
    RunError,
    find_run,
    find_runs,
    may_be_at_work,
    read_metrics,
    read_status,
)


def quickstart(runs_dir, **changes):
    return build_config("text/quickstart", {"run.runs_dir": str(runs_dir)} | changes)


@pytest.fixture
def forbidden():
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


@pytest.mark.parametrize("place", ["runs", "a/b/runs", "closed/runs"])
def test_folder_without_permission(forbidden, place):
    with pytest.raises(RunError, match="Permission denied.*--runs-dir or run.runs_dir"):
        Run.create(quickstart(forbidden / place))
    assert os.listdir(forbidden) == ["closed"]


def test_status_of_a_run_that_became_read_only_stays(tmp_path, monkeypatch):
    run = Run.create(quickstart(tmp_path))
    monkeypatch.setattr("os.replace", lambda *paths: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
    with pytest.raises(RunError, match="status.json: cannot be written"):
        run.set_status("done")
    assert run.status == "running" and sorted(p.name for p in run.dir.iterdir()) == [
        "checkpoints",
        "config.yaml",
        "figures",
        "status.json",
    ]


MANY = """
import sys
from ebt_nb.config.config import build_config
from ebt_nb.runs.folders import Run
for i in range(20): print(Run.create(build_config("text/quickstart", {"run.runs_dir": sys.argv[1]})).dir)
"""


def test_jobs_started_at_once_never_share_a_folder(tmp_path):
    jobs = [
        subprocess.Popen([sys.executable, "-c", MANY, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    folders = [line for job in jobs for line in job.communicate()[0].split()]
    assert all(job.returncode == 0 for job in jobs) and len(folders) == len(set(folders)) == 80
    assert {str(run.dir) for run in find_runs(tmp_path)} == set(folders)
    assert not list(tmp_path.rglob("*.tmp~"))


WRITING = """
import sys
from ebt_nb.runs.folders import MetricsFile, Run
run = Run.open(sys.argv[1])
metrics = MetricsFile(run.dir / "metrics.csv")
for step in range(1, 10**9):
    metrics.append({"step": step, f"figure_{step // 50}": 1 / step})
    run.set_status("running", step=step)
    if step == 100: print("going", flush=True)
"""


def test_killed_while_writing_leaves_whole_files(tmp_path):
    run = Run.create(quickstart(tmp_path))
    job = subprocess.Popen([sys.executable, "-c", WRITING, str(run.dir)], stdout=subprocess.PIPE, text=True)
    assert job.stdout.readline() == "going\n"
    time.sleep(0.05)
    job.send_signal(signal.SIGKILL)
    job.communicate()
    rows = read_metrics(run.dir / "metrics.csv")
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1)) and len(rows) >= 100
    assert all(row[f"figure_{row['step'] // 50}"] == 1 / row["step"] for row in rows)
    assert read_status(run.dir)["step"] in (len(rows), len(rows) - 1)
    metrics = MetricsFile(run.dir / "metrics.csv")
    metrics.cut(80)
    metrics.append({"step": 81, "figure_1": 1 / 81})
    assert read_metrics(run.dir / "metrics.csv") == rows[:81]


def test_a_run_that_cannot_be_read_is_named(tmp_path):
    run = Run.create(quickstart(tmp_path))
    (run.dir / "status.json").write_text("{")
    with pytest.raises(RunError, match=f"{run.dir}/status.json: not the status of a run"):
        find_runs(tmp_path)
    (run.dir / "status.json").unlink()
    assert find_runs(tmp_path) == []
    with pytest.raises(RunError, match="none yet"):
        find_run("text/quickstart", tmp_path)


def test_clearing_away_while_runs_are_made_takes_none_of_them(tmp_path):
    "Four processes make runs and mark them done while leftovers are listed and removed again and again."
    jobs = [
        subprocess.Popen(
            [
                sys.executable,
                "-c",
                MANY
                + "\nimport os, signal\n[Run.create(build_config('text/quickstart', {'run.runs_dir': sys.argv[1]})).set_status('failed') for _ in range(5)]\nos.kill(os.getpid(), signal.SIGKILL)",
                str(tmp_path),
            ],
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    removed = 0
    while any(job.poll() is None for job in jobs):
        removed += sum(remove(one, tmp_path) for one in leftovers(tmp_path, ["failed"], hours=0))
    for job in jobs:
        job.communicate()
    removed += sum(remove(one, tmp_path) for one in leftovers(tmp_path, ["failed"], hours=0))
    left = find_runs(tmp_path)
    assert removed == 10 and len(left) == 40 and {run.status for run in left} == {"running"}  # killed, and said nothing
    assert {one.why for one in leftovers(tmp_path, ["empty"], hours=0)} == {
        "ended without a figure or a checkpoint"
    } and not list(tmp_path.rglob("*.tmp~"))


def test_a_killed_run_is_told_from_one_at_work(tmp_path):
    run = Run.create(quickstart(tmp_path))
    assert read_status(run.dir)["process"]["pid"] == os.getpid() and may_be_at_work(read_status(run.dir))
    job = subprocess.Popen([sys.executable, "-c", WRITING, str(run.dir)], stdout=subprocess.PIPE, text=True)
    assert job.stdout.readline() == "going\n"
    assert read_status(run.dir)["process"]["pid"] == job.pid and may_be_at_work(read_status(run.dir))
    job.send_signal(signal.SIGKILL)
    job.communicate()
    assert run.status == "running" and not may_be_at_work(read_status(run.dir))
