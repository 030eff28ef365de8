"Run folders without permission, of other programs, in races, and killed while they are written."

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import redirect_stderr, redirect_stdout, suppress
from io import StringIO
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ebt_nb.cli.main import main
from ebt_nb.config.errors import WorkbenchError
from ebt_nb.config.overrides import build_config
from ebt_nb.jobs.cleanup import find_leftovers, remove_leftover
from ebt_nb.runs.addresses import _print_once, find_checkpoint, find_runs
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


def write_foreign_runs(root):
    "Folders that look like runs, and that nothing can be read from; return the name of each and of its worst file."
    good = Run.create(quickstart_config(root), root / "good/run")
    good.set_status("failed", error="as usual")
    MetricsFile(good.dir / "metrics.csv").append({"step": 1, "val/loss": 5.0})
    status, config = (good.dir / "status.json").read_text(), (good.dir / "config.yaml").read_text()
    contents = {
        "empty": ("", config, ""),
        "truncated": (status[:40], config, ""),
        "older": (status.replace("started", "begun"), config, ""),
        "list": ("[1, 2]", "[1, 2]", ""),
        "typed": (status.replace('"failed"', "7"), config, ""),
        "measured": (status, config, "name,age\nJane,old\n"),
        "zeros": ("\0" * 100, "\0" * 100, "\0" * 100),
    }
    for name, texts in contents.items():
        folder = root / name / "run"
        folder.mkdir(parents=True)
        for file, text in zip(("status.json", "config.yaml", "metrics.csv"), texts):
            (folder / file).write_text(text)
    return {name: "metrics.csv" if name == "measured" else "status.json" for name in contents}


FOREIGN_COMMANDS = ("runs", "runs --json", "runs compare good second", "runs show good", "runs clean --hours 0")


@pytest.mark.parametrize("command", FOREIGN_COMMANDS)
def test_foreign_folders_are_named_and_stop_nothing(tmp_path, capsys, command):
    files = write_foreign_runs(tmp_path)
    shutil.copytree(tmp_path / "good", tmp_path / "second")
    _print_once.cache_clear()
    assert main([*command.split(), "--runs-dir", str(tmp_path)]) == 0
    output, errors = capsys.readouterr()
    assert "good" in output and "Traceback" not in errors
    if "show" not in command:
        assert "second" in output
    reads_metrics = command in ("runs", "runs --json", "runs clean --hours 0")
    for name, file in files.items():
        lines = [line for line in errors.splitlines() if f"/{name}/run/{file}" in line]
        assert len(lines) == (file == "status.json" or reads_metrics), (name, errors)
        assert all(line.startswith("left out: ") for line in lines)
    assert len(errors.splitlines()) == len(files) - (not reads_metrics)
    assert {path.name for path in tmp_path.iterdir()} == {"good", "second", *files}


@pytest.mark.parametrize("command", ["runs show", "resume", "runs compare", "generate"])
def test_a_foreign_folder_that_is_named_is_refused(tmp_path, capsys, command):
    files = write_foreign_runs(tmp_path)
    for name in files:
        assert main([*command.split(), str(tmp_path / name / "run"), "--runs-dir", str(tmp_path)]) == 2
        _, errors = capsys.readouterr()
        assert "Traceback" not in errors and f"/{name}/run" in errors, errors


def test_an_address_passes_over_foreign_folders(tmp_path, capsys):
    write_foreign_runs(tmp_path)
    for name in ("last", "best"):
        (tmp_path / f"good/run/checkpoints/{name}.ckpt").touch()
        assert find_checkpoint(f"good:{name}", tmp_path).name == f"{name}.ckpt"
    with pytest.raises(RunError, match="no such run"):
        find_checkpoint("empty:last", tmp_path)
    (tmp_path / "measured/run/checkpoints").mkdir()
    with pytest.raises(RunError, match=r"measured/run/metrics.csv: not the metrics of a run"):
        find_checkpoint("measured:best", tmp_path)


plain = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9) | st.sampled_from(("done", "failed"))
)
NAMES = (
    "status",
    "started",
    "process",
    "job",
    "error",
    "step",
    "host",
    "pid",
    "format",
    "model",
    "size",
    "data",
    "run",
)
trees = st.recursive(
    plain, lambda part: st.lists(part, max_size=3) | st.dictionaries(st.sampled_from(NAMES), part, max_size=5)
)
times = st.sampled_from(["2025-01-31T17:45:02+00:00", "2025-01-31"])
nearly = st.fixed_dictionaries(
    {"status": st.sampled_from(["done", "failed", "running"]), "started": times},
    optional={"process": trees, "job": trees, "error": trees, "step": trees, "parameters": trees},
)
contents = st.binary(max_size=40) | (trees | nearly).map(lambda tree: json.dumps(tree).encode())
tables = st.binary(max_size=40) | st.lists(plain, max_size=9).map(
    lambda cells: ("step,val/loss\n" + "".join(f"{cell},{cell}\n" for cell in cells)).encode("utf-8", "replace")
)


@example(status=b"", config=b'{"model": {"size": []}}', table=b"")
@given(status=contents, config=contents, table=tables)
def test_no_foreign_file_stops_a_command(tmp_path_factory, status, config, table):
    "Whatever lies in a run folder, `ebt runs`, its actions and addresses name it or describe it."
    root = tmp_path_factory.getbasetemp() / "drawn"
    shutil.rmtree(root, ignore_errors=True)
    good = Run.create(quickstart_config(root), root / "good/run")
    good.set_status("failed")
    foreign = root / "foreign/run"
    (foreign / "checkpoints").mkdir(parents=True)
    (foreign / "checkpoints/step=000001.ckpt").write_bytes(config)
    for name, content in [("status.json", status), ("config.yaml", config), ("metrics.csv", table)]:
        (foreign / name).write_bytes(content)
    for command in (*FOREIGN_COMMANDS[:2], "runs show foreign", f"runs compare good {foreign}", FOREIGN_COMMANDS[-1]):
        with redirect_stdout(StringIO()) as output, redirect_stderr(StringIO()):
            assert main([*command.split(), "--runs-dir", str(root)]) in (0, 2)
        assert "good" in output.getvalue() or "show" in command or "compare" in command
    for selector in ("last", "best", "1", "best/step"):
        with suppress(WorkbenchError):
            find_checkpoint(f"{foreign}:{selector}", root)


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
