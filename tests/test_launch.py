"""`launch` starts ranks, shows their output, stops and resumes them, and leaves none of them behind.

torchrun, gloo and papermill are real. A launcher or a rank is forked where it need not be the installed command.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
import torch
from forked import Forker

import ebt_nb
from ebt_nb.config.kinds import RunConfig
from ebt_nb.config.overrides import build_config
from ebt_nb.runs.addresses import find_runs
from ebt_nb.runs.folders import Run
from ebt_nb.runs.status import may_be_running, read_status
from ebt_nb.training.checkpoints import read_checkpoint
from ebt_nb.training.fit import fit

EBT = Path(sys.executable).with_name("ebt")
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")} | {
    "OMP_NUM_THREADS": "1"
}


def tiny_config(folder: Path, processes: int = 2, **changes) -> RunConfig:
    "A small run with 4 sequences in a batch of all processes together, whatever their number."
    return build_config(
        "text/quickstart_s1",
        {
            "model.layers": 1,
            "model.width": 32,
            "model.heads": 2,
            "data.context": 16,
            "data.batch_size": 4 // processes,
            "run.runs_dir": str(folder / "runs"),
            "thinking.noise": 0.5,
            "thinking.random_step_size": 2.0,
            "trainer.devices": processes,
            "trainer.accelerator": "cpu",
            "trainer.threads": 1,
            "trainer.max_steps": 400,
            "trainer.val_every": 200,
            "trainer.val_batches": 2,
            "trainer.log_every": 1,
            "trainer.checkpoint_every": 5,
            "optim.warmup_steps": 4,
            "optim.decay_divisor": 1.0,
        }
        | changes,
    )


def wait_until(condition, description: str, seconds: float = 300.0):
    "Wait until a function returns something true, and return that."
    start = time.monotonic()
    while not (result := condition()):
        assert time.monotonic() - start < seconds, f"after {seconds} s: no {description}"
        time.sleep(0.01)
    return result


def last_row(run: Run) -> int:
    "The step of the last row of metrics."
    return max((row["step"] for row in run.metrics), default=0)


def find_ranks(run: Run) -> list[int]:
    "The ids of the processes that train this run, without their launcher."
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_text().split("\0")
        except OSError:
            continue
        if "--as-rank" in words and str(run.dir) in words and not any("torch.distributed" in word for word in words):
            found.append(int(path.parent.name))
    return found


def fork_ranks(forker: Forker, folder: Path) -> str:
    "Return what a process executes so that the ranks that it starts need not import anything first."
    command = [str(forker.write_program(folder / "rank")), "train", "--as-rank"]
    return f"import ebt_nb.jobs.launch; ebt_nb.jobs.launch.RANK_COMMAND = {command}"


def make_session(folder: Path) -> dict[str, str]:
    """Return the environment of a notebook session that is a restarted Slurm job of two nodes.

    `scontrol` notes in `folder`/requests how it was called. There is no srun.
    """
    programs = folder / "programs"
    programs.mkdir()
    facts = "JobId=4711 JobState=RUNNING Requeue=1"
    (programs / "scontrol").write_text(f'#!/bin/sh\necho "$@" >> "{folder}/requests"\necho {facts}\n')
    (programs / "scontrol").chmod(0o755)
    for name in ("sh", "git"):
        if path := shutil.which(name):
            (programs / name).symlink_to(path)
    return ENVIRONMENT | {
        "PATH": str(programs),
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_RESTART_COUNT": "1",
        "EBT_JOB_ID": "4710",  # of the job from which the session was submitted
    }


def make_shadowing_folder(folder: Path) -> Path:
    "Make a working directory with packages that have the names of libraries."
    for name in ("datasets", "torch", "lightning", "tokenizers"):
        (folder / "here" / name).mkdir(parents=True)
        (folder / "here" / name / "__init__.py").write_text("raise SystemExit('a folder shadows the library')")
    return folder / "here"


def test_no_child_looks_for_modules_in_the_working_directory():
    for path in Path(ebt_nb.__file__).parent.rglob("*.py"):
        assert not re.search(r'sys\.executable,\s*"-[cm]"', path.read_text(encoding="utf-8")), path


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="looks for processes in /proc")
def test_ranks_stop_resume_and_end_with_their_launcher(tmp_path, forker):
    """`ebt train` with two devices is stopped by SIGUSR1, resumed and killed, and resumed on one device for the rest.

    The metrics are those of one process from beginning to end. All this happens in a session that is a Slurm job, which
    is not queued again, and in a folder with packages that have the names of libraries.
    """
    run = Run.create(tiny_config(tmp_path))
    session, here = make_session(tmp_path), make_shadowing_folder(tmp_path)
    job = subprocess.Popen(
        [EBT, "train", "--resume", run.dir],
        env=session,
        cwd=here,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    wait_until(lambda: last_row(run) >= 8, "step 8")
    assert len(find_ranks(run)) == 2
    job.send_signal(signal.SIGUSR1)
    output = job.communicate(timeout=300)[0]
    assert job.returncode == 130
    assert f"{run.dir}: interrupted; resume with `ebt train --resume {run.dir}`" in output
    assert "Slurm job 4711 is not queued again" in output and not (tmp_path / "requests").exists()
    assert "2 sequences x 16 tokens x 1 accumulated x 2 processes = 4 sequences, 64 tokens" in output
    first = read_checkpoint(run.checkpoint())["global_step"]
    assert run.status == "interrupted" and first == last_row(run) >= 8 and find_ranks(run) == []

    job = forker.start("train", "--resume", run.dir, cwd=here, environment=session)
    wait_until(lambda: last_row(run) >= first + 10, "ten more steps")
    os.killpg(job, signal.SIGKILL)  # reaches neither torchrun nor the ranks, which have sessions of their own
    assert forker.wait(job) == -signal.SIGKILL
    wait_until(lambda: not find_ranks(run), "end of the ranks")
    second = read_checkpoint(run.checkpoint())["global_step"]
    assert run.status == "interrupted" and second == last_row(run) > first

    single_process = tiny_config(tmp_path, 1, **{"trainer.max_steps": second + 5})
    expected = fit(single_process, progress="none")
    fit(single_process, run, resume=True, progress="none")
    rows, expected_rows = (
        [row for row in one.metrics if "train/loss" in row and row["step"] <= second] for one in (run, expected)
    )
    assert [row["step"] for row in rows] == list(range(1, second + 1))
    for row, expected_row in zip(rows, expected_rows, strict=True):
        assert row["train/loss"] == pytest.approx(expected_row["train/loss"], rel=1e-3)


def test_a_rank_that_fails_ends_all_of_them(tmp_path, forker):
    config = tiny_config(tmp_path, **{"thinking.step_size": 1e39, "model.init": "reference"})
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    setup = fork_ranks(forker, tmp_path)
    code, _out, err = forker.run("train", tmp_path / "config.yaml", setup=setup)
    [run] = find_runs(tmp_path / "runs")
    message = rf"ebt: {run.dir}: failed \(DivergenceError.*\); .* `ebt train --resume {run.dir}`\n$"
    assert code == 1 and re.match(message, err), err
    assert run.status == "failed" and "energy is not finite" in (run.dir / "process.log").read_text()


PARAMETERS_CELL = """
preset = "text/quickstart"
overrides = {}
run_dir = "."
names = ["first"]
"""
TRAINING_CELL = """
from pathlib import Path
from ebt_nb.config.overrides import build_config
from ebt_nb.jobs.launch import launch
from ebt_nb.jobs.parallel import open_or_create_run

runs = []
for name in names:
    config = build_config(preset, {**overrides, "run.seed": len(name)})
    run = open_or_create_run(Path(run_dir) / name, config)
    runs.append(launch(config, run, resume=True, progress="plain"))
"""
REPORT_CELL = "n = Path('summary.txt').write_text(' '.join(run.status for run in runs))"
STEPS = 120  # so many that the run cannot end before the signal arrives


def write_experiment(path: Path) -> None:
    "Write a notebook that trains a model for each name."
    parameters, *cells = map(nbformat.v4.new_code_cell, (PARAMETERS_CELL, TRAINING_CELL, REPORT_CELL))
    parameters.metadata.tags = ["parameters"]
    kernel = dict(name="python3", display_name="python3", language="python")
    nbformat.write(nbformat.v4.new_notebook(cells=[parameters, *cells], metadata=dict(kernelspec=kernel)), path)


def experiment_arguments(config: RunConfig, names: list[str]) -> list[str]:
    "Arguments of `ebt run` that set the sections `data` and `trainer`, a small model, and the names."
    preset = build_config("text/quickstart", {}).model_dump(mode="json")
    settings = [
        f"{section}.{key}={value}"
        for section in ("data", "trainer")
        for key, value in config.model_dump(mode="json")[section].items()
        if value != preset[section][key]
    ]
    settings += ["model.layers=1", "model.width=16", "model.heads=2", f"trainer.max_steps={STEPS}", f"names={names}"]
    return [word for setting in settings for word in ("-p", setting)]


@pytest.mark.parametrize(
    "number, processes, names", [(signal.SIGUSR1, 2, ["first"]), (signal.SIGKILL, 1, ["first", "second"])]
)
def test_an_experiment_is_resumed_in_its_folder(tmp_path, forker, number, processes, names):
    "A notebook that trains one or two models is stopped in the first. Run again, it ends as if uninterrupted."
    notebook = tmp_path / "pair.ipynb"
    write_experiment(notebook)
    arguments = experiment_arguments(tiny_config(tmp_path, processes), names)
    log = tmp_path / "log"
    setup = fork_ranks(forker, tmp_path)
    job = forker.start("run", notebook, *arguments, "--runs-dir", tmp_path / "runs", out=log, setup=setup)
    # not rglob, which fails where a folder that it is about to read is renamed
    [status] = wait_until(lambda: list((tmp_path / "runs").glob("*/*/*/first/status.json")), "run")
    folder = status.parents[1]
    first = Run.open(folder / "first")
    wait_until(lambda: last_row(first) >= 8, "step 8")
    os.killpg(job, number)
    code = forker.wait(job)
    if number == signal.SIGUSR1:
        assert code == 130
        assert f"ebt: pair: interrupted; resume with `ebt run {notebook} --folder {folder}`" in log.read_text()
        assert read_status(folder)["status"] == first.status == "interrupted"
    wait_until(lambda: not may_be_running(read_status(first.dir)), "end of the training")
    stopped_at = read_checkpoint(first.checkpoint())["global_step"]
    code, out, err = forker.run("run", notebook, "--folder", folder, setup=setup)
    assert code == 0, err
    assert (folder / "summary.txt").read_text() == " ".join("done" for _ in names)
    assert read_status(folder)["status"] == "done" and (folder / "report-1.ipynb").exists()
    assert f"resumed at step {stopped_at}" in out
    assert [row["step"] for row in first.metrics if "train/loss" in row] == list(range(1, STEPS + 1))
    assert len(list((tmp_path / "runs").rglob("config.yaml"))) == len(names)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs; test_processes does this on a CPU")
def test_fsdp_trains_as_one_device_does(tmp_path):
    "Weights, gradients and optimiser state divided among GPUs: the same metrics, and a checkpoint that can be resumed."
    changes = {"trainer.accelerator": "gpu", "trainer.max_steps": 12, "trainer.compile": False, "trainer.val_every": 6}
    fsdp = tiny_config(tmp_path, 2, **changes, **{"trainer.strategy": "fsdp"})
    (tmp_path / "config.yaml").write_text(fsdp.to_yaml())
    command = [EBT, "train", tmp_path / "config.yaml", "-p", "trainer.max_steps=12"]
    subprocess.run(command, env=ENVIRONMENT, check=True, timeout=600)
    [run] = find_runs(tmp_path / "runs")
    expected = fit(tiny_config(tmp_path, 1, **changes), progress="none")
    for row, expected_row in zip(run.metrics, expected.metrics, strict=True):
        for name in row.keys() - {"tokens_per_second"}:
            assert row[name] == pytest.approx(expected_row[name], rel=1e-3), name
    command = [EBT, "train", "--resume", run.dir, "-p", "trainer.max_steps=14"]
    subprocess.run(command, env=ENVIRONMENT, check=True, timeout=600)
    assert read_checkpoint(run.checkpoint())["global_step"] == 14
