"""Jobs on a real Slurm of two nodes, started on this machine.

Arrays, chains, several nodes, failures and cancelling, as a user meets them.

A job spends most of its time waiting: in a queue, for its imports, for its turn. So the scenarios of all tests are
started together, each in a thread with a folder of its own, and each test then waits for its scenario. Four scenarios
start `ebt` as users do (a cancelled job, a warned one, two nodes, the scripts of `job_scripts`); in the others forked
processes do its work (`Forker.write_program`).
"""

import json
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat
import pytest
import torch
import yaml

sys.path.insert(0, str(Path(__file__).parent / "slurm"))
from cluster import LONG, Cluster, missing_requirement
from forked import Forker
from test_job_scripts import SMALL
from test_processes import small_config as two_process_config

from ebt_nb.cli.main import main
from ebt_nb.config.overrides import override_config
from ebt_nb.jobs.sbatch_options import SHORT_OPTIONS
from ebt_nb.runs.addresses import find_runs
from ebt_nb.runs.folders import Run
from ebt_nb.runs.status import read_status
from ebt_nb.training.checkpoints import read_checkpoint
from ebt_nb.training.fit import fit

pytestmark = pytest.mark.skipif(missing_requirement() is not None, reason=str(missing_requirement()))
EBT, ROOT = Path(sys.executable).with_name("ebt"), Path(__file__).parents[1]
PARAMETERS = 'preset = "text/quickstart"\noverrides = {}\nrun_dir = "."\ngreeting = "hello"\ntimes = 2'
FIT_CELL = """
from pathlib import Path
from ebt_nb.config.overrides import build_config
from ebt_nb.runs.folders import Run
from ebt_nb.training.fit import fit
config = build_config(preset, overrides)
run = fit(config, Run.create(config, dir=Path(run_dir) / "ebt"), progress="none")
"""

# `ebt` with a callback that waits before the seventh update, so that a signal always comes while training runs.
PAUSE_ONCE = """
import os
import time
from pathlib import Path

import lightning.pytorch as pl

from ebt_nb.training.callbacks import register_callback

FOLDER, TASK = Path(__file__).parent, os.environ.get("SLURM_ARRAY_TASK_ID", "")


class PauseOnce(pl.Callback):
    "Create the file `paused`, with the number of the array task, and wait for the file `continue`."

    def on_train_batch_start(self, trainer, *args):
        if trainer.global_step == 6:
            (FOLDER / f"paused{TASK}").touch()
            while not (FOLDER / "continue").exists():
                time.sleep(0.05)


register_callback("pause_once")(lambda config: PauseOnce())
if __name__ == "__main__":
    from ebt_nb.cli.main import main

    raise SystemExit(main())
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with Cluster(tmp_path_factory.mktemp("slurm")) as running:
        yield running


class Workspace:
    "What a scenario works with: the cluster, a folder, and what forks `ebt`."

    def __init__(self, cluster: Cluster, folder: Path, forker: Forker):
        self.cluster, self.folder, self.forker = cluster, folder, forker

    def write_ebt(self) -> Path:
        "Write a program that is `ebt`, forked."
        return self.forker.write_program(self.folder / "ebt")

    def run_submit(self, *words) -> subprocess.CompletedProcess:
        "Run `ebt submit` in the folder."
        return subprocess.run(
            [EBT, "submit", *map(str, words)],
            env=self.cluster.environment,
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=LONG,
        )

    def submit(self, *words) -> tuple[str, Path]:
        "Submit a job with `ebt submit`; return its number and its folder."
        done = self.run_submit(*words)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip(), self.find_folder(done.stderr)

    def submit_notebook(self, *words) -> tuple[str, Path]:
        "Submit a job of a notebook, as `submit` does; a forked `ebt` runs it."
        setup = f"import ebt_nb.jobs.job_drafts as drafts; drafts.find_ebt_command = lambda: ['{self.write_ebt()}']"
        environment = {"SLURM_CONF": str(self.cluster.configuration)}
        options = dict(cwd=self.folder, environment=environment, setup=setup)
        code, output, errors = self.forker.run("submit", *words, **options)
        assert code == 0, errors
        return output.strip(), self.find_folder(errors)

    @staticmethod
    def find_folder(messages: str) -> Path:
        "Return the folder of a job that `ebt submit` names."
        return Path(re.search(r"^(/.*)/job\.slurm", messages, re.MULTILINE)[1])

    def write_notebook(self, name: str, *cells: str) -> Path:
        "Write a job notebook with the given cells."
        contents = [nbformat.v4.new_code_cell(PARAMETERS, metadata=dict(tags=["parameters"]))]
        contents += map(nbformat.v4.new_code_cell, cells)
        kernel = dict(name="python3", display_name="python3", language="python")
        notebook = nbformat.v4.new_notebook(cells=contents, metadata=dict(kernelspec=kernel))
        nbformat.write(notebook, self.folder / name)
        return self.folder / name

    def write_script(self, name: str, *lines: str) -> Path:
        "Write a bash script of the given lines."
        (self.folder / name).write_text("\n".join(["#!/usr/bin/env bash", *lines]) + "\n")
        return self.folder / name

    def write_pause_once(self) -> Path:
        "Write the program PAUSE_ONCE."
        (self.folder / "pause_once.py").write_text(PAUSE_ONCE)
        return self.folder / "pause_once.py"

    def write_pausing_ebt(self) -> Path:
        "Write a program that is PAUSE_ONCE, forked."
        setup = f"import runpy; runpy.run_path({str(self.write_pause_once())!r})"
        return self.forker.write_program(self.folder / "pausing_ebt", setup)

    def wait_for_files(self, *names: str) -> None:
        "Wait until files exist in the folder."
        paths = [self.folder / name for name in names]
        self.cluster.wait_until(lambda: all(path.exists() for path in paths), f"{names} do not appear")

    def resume_paused(self, console_logs) -> None:
        "Let training continue, once one of the logs says that the signal has come."

        def is_signalled():
            return any(path.is_file() and "SIGUSR1: stopping" in path.read_text() for path in console_logs)

        self.cluster.wait_until(is_signalled, "the signal does not come")
        (self.folder / "continue").touch()


SCENARIOS, MAX_PARALLEL = {}, 4


def run_concurrently(scenario):
    """Make a test of a scenario, a function of the cluster and a workspace.

    It runs in a thread, together with the scenarios of all selected tests. A function that it returns is called in the
    main thread afterwards: a training run that is compared needs the machine for itself.
    """
    SCENARIOS[scenario.__name__] = scenario

    def test(scenario_futures):
        finish = scenario_futures[scenario.__name__].result()
        if finish:
            finish()

    test.__name__, test.__doc__ = scenario.__name__, scenario.__doc__
    return test


@pytest.fixture(scope="module")
def scenario_futures(cluster, tmp_path_factory, request, forker):
    "Name -> future of the scenarios of all selected tests; the longest, which stand last, are started first."
    selected = []
    for item in request.session.items:
        name = getattr(item, "originalname", "")
        if name in SCENARIOS and item.module.__name__ == __name__:
            selected.append(name)
    pool = ThreadPoolExecutor(MAX_PARALLEL)
    futures = {}
    for name in reversed(selected):
        workspace = Workspace(cluster, tmp_path_factory.mktemp(name), forker)
        futures[name] = pool.submit(SCENARIOS[name], cluster, workspace)
    yield futures
    pool.shutdown(cancel_futures=True)


def read_output(job):
    return Path(job["StdOut"]).read_text()


def as_arguments(settings):
    "Settings as arguments: -p key=value -p key=value."
    return [word for key, value in settings.items() for word in ("-p", f"{key}={value}")]


def assert_same_weights(run, other, compare):
    weights, other_weights = (read_checkpoint(each.checkpoint())["state_dict"] for each in (run, other))
    for a, b in zip(weights.values(), other_weights.values(), strict=True):
        compare(a, b)


@run_concurrently
def test_array_of_a_notebook(cluster, workspace):
    """Three tasks, each with its own values, folder and report.

    What header, configuration and command line set has reached Slurm.
    """
    notebook = workspace.write_notebook("greet.ipynb", "print(*[greeting] * times)")
    array = ["--array", "times=1,2,3", "greeting=good day"]
    options = ["-p", "run.name=greetings", "--sbatch", "time=00:05:00", "--runs-dir", workspace.folder / "runs"]
    number, folder = workspace.submit_notebook(notebook, "--cluster", "local_cpu", *array, *options)
    jobs = {job["ArrayTaskId"]: job for job in cluster.wait_for_jobs(number)}
    assert {job["JobState"] for job in jobs.values()} == {"COMPLETED"}, [read_output(job) for job in jobs.values()]
    assert jobs.keys() == {"0", "1", "2"}
    for job in jobs.values():
        assert (job["JobName"], job["TimeLimit"], job["NumNodes"]) == ("greetings-4xs", "00:05:00", "1")
    rows = [f"{index}\t{index + 1}\tgood day\n" for index in range(3)]
    assert (folder / "array.tsv").read_text() == "task\ttimes\tgreeting\n" + "".join(rows)
    assert json.loads((folder / "slurm.json").read_text())["job"] == number
    assert folder.parent == workspace.folder / "runs/greetings"
    for index in range(3):
        task = folder / f"task-{index}"
        greetings = " ".join(["good day"] * (index + 1))
        assert read_status(task)["status"] == "done"
        assert f"\n{greetings}\n" in f"\n{(task / 'console.log').read_text()}"
        assert greetings in read_output(jobs[str(index)])
        cells = nbformat.read(task / "report.ipynb", 4).cells
        assert any(greetings in str(cell.get("outputs")) for cell in cells)


@run_concurrently
def test_short_options(cluster, workspace):
    "Every short option that the installed sbatch lists is known."
    listed = dict(re.findall(r"^\s+-(\w), --([\w-]+)", cluster.run("sbatch", "--help"), re.MULTILINE))
    assert len(listed) > 20 and listed.items() <= SHORT_OPTIONS.items()


@run_concurrently
def test_chain(cluster, workspace):
    "A dependent job starts when the first has succeeded, and is cancelled when it has failed."
    on_cluster = ["--cluster", "local_cpu"]
    first_script = workspace.write_script("first.sh", "sleep 2", "echo done > first")
    first, _ = workspace.submit(first_script, *on_cluster)
    second, _ = workspace.submit(workspace.write_script("second.sh", "cp first second"), *on_cluster, "--after", first)
    failing, folder = workspace.submit(workspace.write_script("failing.sh", "sleep 1", "exit 3"), *on_cluster)
    never, _ = workspace.submit(workspace.write_script("never.sh", "touch never"), *on_cluster, "--after", folder)
    [first_job], [second_job] = cluster.wait_for_jobs(first), cluster.wait_for_jobs(second)
    assert (first_job["JobState"], second_job["JobState"]) == ("COMPLETED", "COMPLETED")
    assert second_job["StartTime"] >= first_job["EndTime"]
    assert (workspace.folder / "second").read_text() == "done\n"
    [failing_job], [never_job] = cluster.wait_for_jobs(failing), cluster.wait_for_jobs(never)
    assert (failing_job["JobState"], failing_job["ExitCode"]) == ("FAILED", "3:0")
    assert never_job["JobState"] == "CANCELLED"
    assert not (workspace.folder / "never").exists()


@run_concurrently
def test_two_nodes_train_as_one_process(cluster, workspace):
    """Trained by srun on two nodes, a rank each: the same metrics and weights as one process with the whole batch.

    So every update used the mean of the ranks' gradients.
    """
    settings = {"trainer.devices": 1, "trainer.nodes": 2}
    (workspace.folder / "both.yaml").write_text(two_process_config(workspace.folder, 2, **settings).to_yaml())
    lines = ["#SBATCH --nodes=2", "#SBATCH --ntasks-per-node=1", f'exec srun {EBT} train "$@"']
    script = workspace.write_script("train.sh", *lines)
    number, _ = workspace.submit(script, "--cluster", "local_cpu", "--", "both.yaml")
    [job] = cluster.wait_for_jobs(number)
    assert (job["JobState"], job["NodeList"], job["NumTasks"]) == ("COMPLETED", "n[1-2]", "2"), read_output(job)
    [run] = find_runs(workspace.folder / "runs")
    assert run.status == "done"
    batch = "4 sequences x 16 tokens x 2 accumulated x 2 processes = 16 sequences"
    assert batch in (run.dir / "console.log").read_text()

    def compare_with_one_process():
        alone = fit(two_process_config(workspace.folder, 1), progress="none")
        for row, expected in zip(run.metrics, alone.metrics, strict=True):
            assert row.keys() == expected.keys()
            for name in row.keys() - {"tokens_per_second"}:
                assert row[name] == pytest.approx(expected[name], rel=1e-4), name
        assert_same_weights(run, alone, lambda a, b: torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4))

    return compare_with_one_process


@run_concurrently
def test_failing_job(cluster, workspace):
    "Slurm knows that it failed, and its folder holds the report with the error."
    notebook = workspace.write_notebook("fails.ipynb", "print('so far so good')", "1 / 0")
    options = ["--sbatch", "hold", "--runs-dir", workspace.folder / "runs"]
    number, folder = workspace.submit_notebook(notebook, "--cluster", "local_cpu", *options)
    assert read_status(folder)["status"] == "queued"
    cluster.run("scontrol", "release", number)
    [job] = cluster.wait_for_jobs(number)
    assert (job["JobState"], job["ExitCode"]) == ("FAILED", "1:0")
    assert read_status(folder)["status"] == "failed"
    assert "ZeroDivisionError" in (folder / "report.ipynb").read_text()
    assert "so far so good" in (folder / "report.html").read_text()
    assert "ZeroDivisionError" in read_output(job) and f"{folder}/report.html" in read_output(job)


@run_concurrently
def test_job_that_slurm_refuses(cluster, workspace):
    "Slurm's message is shown; the script stays."
    notebook = workspace.write_notebook("greet.ipynb", "print(greeting)")
    options = ["--sbatch", "partition=moon", "--runs-dir", workspace.folder / "runs"]
    done = workspace.run_submit(notebook, "--cluster", "local_cpu", *options)
    assert done.returncode == 2
    [script] = (workspace.folder / "runs").rglob("job.slurm")
    assert f"{script}: Slurm refused it" in done.stderr and "partition" in done.stderr
    assert "--partition=moon" in script.read_text()
    assert read_status(script.parent)["status"] == "failed"


@run_concurrently
def test_cancelled_job_is_resumed(cluster, workspace):
    "scancel leaves a run with its last update saved, and a report; `ebt train --resume` continues it."
    settings = {
        **SMALL,
        "trainer.max_steps": 1_000_000,
        "trainer.log_every": 2,
        "trainer.val_every": 1_000_000,
        "data.cache_dir": workspace.folder / "cache",
    }
    notebook = workspace.write_notebook("trains.ipynb", FIT_CELL)
    options = [*as_arguments(settings), "--runs-dir", workspace.folder / "runs"]
    number, folder = workspace.submit(notebook, "--cluster", "local_cpu", *options)
    metrics = folder / "ebt/metrics.csv"

    def has_begun():
        return metrics.is_file() and len(Run.open(folder / "ebt").metrics) > 2

    cluster.wait_until(has_begun, "training does not begin")
    cluster.run("scancel", number)
    [job] = cluster.wait_for_jobs(number)
    run = Run.open(folder / "ebt")
    cluster.wait_until(lambda: read_status(folder)["status"] != "running", "the job does not end")
    assert job["JobState"] == "CANCELLED" and job["Restarts"] == "0"
    assert run.status == read_status(folder)["status"] == "interrupted"
    assert (folder / "report.html").is_file()
    step = read_checkpoint(run.checkpoint())["global_step"]
    assert step == read_status(run.dir)["step"] >= run.metrics[-1]["step"] > 2

    def resume():
        assert main(["train", "--resume", str(run.dir), "-p", f"trainer.max_steps={step + 3}"]) == 0
        assert run.status == "done" and read_checkpoint(run.checkpoint())["global_step"] == step + 3

    return resume


@run_concurrently
def test_job_scripts_with_sbatch(cluster, workspace):
    "The files that bash runs, sent with plain sbatch (on two nodes), and with `ebt submit` from another folder."
    if Path(sys.prefix) != ROOT / ".venv" or not (ROOT / ".venv/.set-up").is_file():
        pytest.skip("these tests do not run in the .venv that setup.sh made")
    folders = {"run.runs_dir": workspace.folder / "runs", "data.cache_dir": workspace.folder / "cache"}
    arguments = as_arguments(SMALL | folders)
    scripts = ROOT / "job_scripts/nlp/pretrain"
    command = ["sbatch", "--parsable", "--ntasks-per-node=1", "--gpus-per-node=0", scripts / "ebt_s1_mn.sh"]
    by_sbatch = cluster.run(*command, *arguments, cwd=workspace.folder).strip()
    options = ["--cluster", "local_cpu", "--array", "run.seed=1"]
    by_submit, folder = workspace.submit(scripts / "baseline_transformer.sh", *options, *arguments)
    jobs = cluster.wait_for_jobs(by_sbatch) + cluster.wait_for_jobs(by_submit)
    failed = [job for job in jobs if job["JobState"] != "COMPLETED"]
    assert not failed, [read_output(job) for job in failed]
    assert "x 2 processes" in read_output(jobs[0])
    assert folder.parent == workspace.folder / "runs/baseline_transformer"
    runs = find_runs(workspace.folder / "runs")
    assert sorted((run.name, run.config.run.seed, run.status) for run in runs) == [
        ("text/ebt_s1", 33, "done"),
        ("text/transformer", 1, "done"),
    ]


@run_concurrently
def test_models_of_video_train_as_an_array(cluster, workspace):
    script = workspace.write_script("clips.sh", f'exec {workspace.write_ebt()} train --preset video/quickstart "$@"')
    small = {"data.source": "moving_fashion", "data.image_size": 16, "data.context": 4, "data.max_documents": 4}
    trunk = {key: SMALL[key] for key in SMALL if key.startswith(("model.", "trainer."))}
    folders = {"run.runs_dir": workspace.folder / "runs", "data.cache_dir": workspace.folder / "cache"}
    kinds = ["video_ebt", "video_transformer"]
    options = ["--cluster", "local_cpu", "--array", f"model.kind={','.join(kinds)}"]
    number, _ = workspace.submit(script, *options, *as_arguments(trunk | small | folders))
    jobs = cluster.wait_for_jobs(number)
    assert {job["JobState"] for job in jobs} == {"COMPLETED"}, [read_output(job) for job in jobs]
    runs = find_runs(workspace.folder / "runs")
    assert sorted((run.config.model.kind, run.status) for run in runs) == [(kind, "done") for kind in kinds]


@run_concurrently
def test_warned_job_is_queued_again_and_resumes(cluster, workspace):
    """A job that is warned in time saves, has itself queued again, and resumes, bit for bit.

    The command is the same both times; the second start finds the run of its job by itself.
    """
    settings = {"trainer.max_steps": 40, "trainer.val_every": 20, "trainer.checkpoint_every": 50}
    config = two_process_config(workspace.folder, 1, **settings)
    pausing = override_config(config, {"trainer.callbacks": ["pause_once"]})
    (workspace.folder / "config.yaml").write_text(pausing.to_yaml())
    command = f"exec {sys.executable} {workspace.write_pause_once()} train config.yaml"
    script = workspace.write_script("train.sh", command)
    number, _ = workspace.submit(script, "--cluster", "local_cpu", "--sbatch", "requeue")
    workspace.wait_for_files("paused")
    [run] = find_runs(workspace.folder / "runs")
    cluster.run("scancel", "--batch", "--signal=USR1", number)
    workspace.resume_paused([run.dir / "console.log"])
    cluster.wait_until(lambda: run.status != "running", "training does not stop")
    [job] = cluster.wait_for_jobs(number)
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "1"), read_output(job)
    assert "resumed at step" in (run.dir / "console.log").read_text()
    assert run.status == "done" and len(find_runs(workspace.folder / "runs")) == 1

    def compare_with_uninterrupted_run():
        alone = fit(config, progress="none")
        for row, expected in zip(run.metrics, alone.metrics, strict=True):
            assert row | {"tokens_per_second": 0} == expected | {"tokens_per_second": 0}

        def assert_equal(a, b):
            assert torch.equal(a, b)

        assert_same_weights(run, alone, assert_equal)

    return compare_with_uninterrupted_run


@run_concurrently
def test_array_of_sweep_agents_one_is_stopped(cluster, workspace):
    "Two jobs share a sweep; one is signalled, saves its trial, is queued again, and the trial is resumed."
    pytest.importorskip("optuna")
    from ebt_nb.jobs.sweep_study import read_trials

    config = {
        **SMALL,
        "run.runs_dir": str(workspace.folder / "runs"),
        "data.cache_dir": str(workspace.folder / "cache"),
        "trainer.max_steps": 40,
        "trainer.val_every": 10,
        "trainer.log_every": 1,
        "trainer.callbacks": "[pause_once]",
    }
    settings = [f"{key}={value}" for key, value in config.items()]
    spec = {
        "program": "ebt",
        "command": ["ebt", "train", "--preset", "text/quickstart", *settings, "${args_no_hyphens}"],
        "method": "grid",
        "metric": {"name": "val/loss"},
        "parameters": {"tracking.project": {"values": ["disturbed", "alone"]}},
    }
    (workspace.folder / "sweep.yaml").write_text(yaml.safe_dump(spec))
    mark = "export EBT_JOB_ID=$SLURM_JOB_ID"  # as a script of one's own allows that its job is queued again
    agent = f"{mark}; exec {workspace.write_pausing_ebt()} sweep sweep.yaml --dir shared"
    options = ["--requeue", "--array=1-2", "--nodes=1", "--ntasks-per-node=1", f"--wrap={agent}"]
    number = cluster.run("sbatch", "--parsable", *options, cwd=workspace.folder).strip()
    workspace.wait_for_files("paused1", "paused2")
    # the task that has the number of the whole array is the one that could queue all tasks again
    signalled = next(job for job in cluster.show_jobs(number) if job["JobId"] == number)["ArrayTaskId"]
    cluster.run("scancel", "--batch", "--signal=USR1", f"{number}_{signalled}")
    workspace.resume_paused([workspace.folder / f"shared/trial-000{index}/console.log" for index in (0, 1)])
    jobs = cluster.wait_for_jobs(number)
    assert {job["JobState"] for job in jobs} == {"COMPLETED"}, [read_output(job) for job in jobs]
    restarts = {job["ArrayTaskId"]: job["Restarts"] for job in jobs}
    assert restarts == {"1": "0", "2": "0"} | {signalled: "1"}
    trials = read_trials(workspace.folder / "shared")
    first, other, again = sorted(trials, key=lambda trial: (trial.retry_of is not None, trial.state != "failed"))
    assert (first.state, other.state, again.state) == ("failed", "done", "done")
    assert "interrupted" in first.error and again.run == first.run and again.retry_of == first.number
    assert again.history == other.history and len(other.history) == 4


WAIT_FOR_SIGNAL = """
import sys, time
from pathlib import Path
from ebt_nb.runs.preemption import JobInterrupted, is_restarted_job, raise_on_stop_signals, requeue_job
if is_restarted_job(): raise SystemExit(Path("restarted").touch())
try:
    with raise_on_stop_signals():
        Path("listening").touch()
        time.sleep(3600)
except JobInterrupted as error: print(error.signal, requeue_job(), flush=True)
"""


@run_concurrently
def test_job_near_its_time_limit_is_queued_again(cluster, workspace):
    """Neither header nor script asks for a warning; `ebt submit` adds it.

    The end of the job is moved forward, so that the test does not have to wait for it.
    """
    (workspace.folder / "bare.slurm").write_text("#!/usr/bin/env bash\n#SBATCH --nodes=1\n#SBATCH --time=01:00:00\n")
    (workspace.folder / "wait.py").write_text(WAIT_FOR_SIGNAL)
    script = workspace.write_script("job.sh", f"exec {sys.executable} wait.py")
    number, folder = workspace.submit(script, "--cluster", "bare.slurm")
    text = (folder / "job.slurm").read_text()
    assert "#SBATCH --signal=B:USR1@120\n" in text and "#SBATCH --requeue\n" in text
    workspace.wait_for_files("listening")
    cluster.run("scontrol", "update", f"JobId={number}", "EndTime=now+115")
    [job] = cluster.wait_for_jobs(number)
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "1"), read_output(job)
    assert (workspace.folder / "restarted").exists()
    assert "SIGUSR1" in read_output(job) and "queued again" in read_output(job)


# trains by ranks that run the program PAUSE_ONCE instead of `ebt`
LAUNCH_CELL = """
import sys
from pathlib import Path
sys.path.insert(0, "{folder}")
import pause_once                                            # registers the callback in this process as well
from ebt_nb.config.overrides import build_config
from ebt_nb.jobs.launch import RANK_COMMAND, launch
from ebt_nb.jobs.parallel import open_or_create_run
RANK_COMMAND[: RANK_COMMAND.index("train")] = ["{program}"]
config = build_config(preset, overrides)
run = launch(config, open_or_create_run(Path(run_dir) / "ebt", config), resume=True, progress="plain")
"""


@run_concurrently
def test_notebook_on_two_nodes_is_queued_again(cluster, workspace):
    """A notebook whose `launch` starts ranks by srun on the nodes of its job.

    Slurm's warning reaches only the ranks, the notebook's report is saved, and the second start resumes in the same
    folder.
    """
    keys = {
        "model": ("layers", "width", "heads"),
        "data": ("context", "batch_size"),
        "trainer": ("nodes", "accelerator", "threads", "max_steps", "val_every", "val_batches", "log_every"),
    }
    settings = {"trainer.devices": 1, "trainer.nodes": 2, "trainer.max_steps": 60, "trainer.val_every": 30}
    config = two_process_config(workspace.folder, 2, **settings).model_dump(mode="json")
    settings = {f"{section}.{key}": config[section][key] for section in keys for key in keys[section]}
    cell = LAUNCH_CELL.format(folder=workspace.folder, program=workspace.write_pausing_ebt())
    notebook = workspace.write_notebook("launches.ipynb", cell)
    options = as_arguments(settings | {"trainer.checkpoint_every": 50, "trainer.callbacks": "[pause_once]"})
    for option in ("requeue", "nodes=2", "ntasks-per-node=1"):
        options += ["--sbatch", option]
    number, folder = workspace.submit_notebook(
        notebook, "--cluster", "local_cpu", *options, "--runs-dir", workspace.folder / "runs"
    )
    workspace.wait_for_files("paused")
    cluster.run("scancel", "--signal=USR1", number)
    workspace.resume_paused([folder / "ebt/console.log"])
    [job] = cluster.wait_for_jobs(number)
    run = Run.open(folder / "ebt")
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "1"), read_output(job)
    assert run.status == read_status(folder)["status"] == "done"
    assert (folder / "report-1.ipynb").is_file()
    assert "x 2 processes" in (folder / "console.log").read_text()
    assert re.search(r"resumed at step \d+", (run.dir / "console.log").read_text())
    steps = [row["step"] for row in run.metrics if "train/loss" in row]
    assert steps == list(range(2, 61, 2))
