"""`launch`: ranks that are started, told what they say, stopped, gone on with, and not left behind. Real processes: torchrun, gloo, papermill."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
import torch

from ebt_nb.config.config import RunConfig, build_config
from ebt_nb.runs.folders import Run, find_runs, may_be_at_work, read_status
from ebt_nb.training.fit import fit
from ebt_nb.training.base import read_checkpoint

EBT = Path(sys.executable).with_name("ebt")
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")} | {
    "OMP_NUM_THREADS": "1"
}


def tiny(folder: Path, processes: int = 2, **changes) -> RunConfig:
    "Together 4 sequences a batch, whatever the number of processes."
    return build_config(
        "text/quickstart",
        {
            "model.layers": 1,
            "model.width": 32,
            "model.heads": 2,
            "data.context": 16,
            "data.batch_size": 4 // processes,
            "data.max_documents": 200,
            "data.cache_dir": str(folder / "cache"),
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


def until(happens, what: str, seconds: float = 90.0):
    begun = time.monotonic()
    while not (found := happens()):
        assert time.monotonic() - begun < seconds, f"in {seconds} s: no {what}"
        time.sleep(0.01)
    return found


def logged(run: Run) -> int:
    return max((row["step"] for row in run.metrics), default=0)


def ranks(run: Run) -> list[int]:
    "Processes that train this run, but for what started them."
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_text().split("\0")
        except OSError:
            continue
        if "--as-rank" in words and str(run.dir) in words and not any("torch.distributed" in word for word in words):
            found.append(int(path.parent.name))
    return found


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="looks for processes in /proc")
def test_ranks_stop_go_on_and_do_not_outlive_their_starter(tmp_path):
    """`ebt train` with two devices: stopped by SIGUSR1, started again and killed, started again on one device for the rest.

    The figures are those of one process from beginning to end."""
    run = Run.create(tiny(tmp_path))

    def start(*words):
        return subprocess.Popen(
            [EBT, "train", "--resume", run.dir, *words],
            env=ENVIRONMENT,
            start_new_session=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    job = start()
    until(lambda: logged(run) >= 8, "step 8")
    assert len(ranks(run)) == 2
    job.send_signal(signal.SIGUSR1)
    said = job.communicate(timeout=120)[0]
    assert (
        job.returncode == 130
        and f"{run.dir}: interrupted; resume with `ebt train --resume {run.dir}`" in said
        and "2 sequences x 16 tokens x 1 accumulated x 2 processes = 4 sequences, 64 tokens" in said
    )
    first = read_checkpoint(run.checkpoint())["global_step"]
    assert run.status == "interrupted" and first == logged(run) >= 8 and ranks(run) == []

    job = start()
    until(lambda: logged(run) >= first + 10, "ten steps more")
    os.killpg(job.pid, signal.SIGKILL)  # reaches neither torchrun nor the ranks, which have sessions of their own
    job.communicate(timeout=120)
    until(lambda: not ranks(run), "end of the ranks")
    second = read_checkpoint(run.checkpoint())["global_step"]
    assert run.status == "interrupted" and second == logged(run) > first

    alone = fit(tiny(tmp_path, 1, **{"trainer.max_steps": second + 5}), progress="none")
    fit(tiny(tmp_path, 1, **{"trainer.max_steps": second + 5}), run, resume=True, progress="none")
    rows = [[row for row in found.metrics if "train/loss" in row and row["step"] <= second] for found in (run, alone)]
    assert [row["step"] for row in rows[0]] == list(range(1, second + 1))
    for ours, theirs in zip(*rows, strict=True):
        assert ours["train/loss"] == pytest.approx(theirs["train/loss"], rel=1e-3)


def test_a_rank_that_fails_ends_all_of_them(tmp_path):
    (tmp_path / "config.yaml").write_text(
        tiny(tmp_path, **{"thinking.step_size": 1e39, "model.init": "reference"}).to_yaml()
    )
    done = subprocess.run(
        [EBT, "train", tmp_path / "config.yaml"], env=ENVIRONMENT, capture_output=True, text=True, timeout=120
    )
    [run] = find_runs(tmp_path / "runs")
    assert done.returncode == 1 and re.match(
        rf"ebt: {run.dir}: failed \(DivergenceError.*\); .* `ebt train --resume {run.dir}`\n$", done.stderr
    ), done.stderr
    assert run.status == "failed" and "energy is not finite" in (run.dir / "process.log").read_text()


CELLS = [
    'preset = "text/quickstart"\noverrides = {}\nrun_dir = "."\nnames = ["first"]',
    "from pathlib import Path\nfrom ebt_nb.config.config import build_config\nfrom ebt_nb.jobs.launch import launch\nfrom ebt_nb.jobs.parallel import run_in",
    "runs = [launch(one, run_in(Path(run_dir) / name, one), resume=True, progress='plain') for name in names for one in [build_config(preset, {**overrides, 'run.seed': len(name)})]]",
    "n = Path('summary.txt').write_text(' '.join(run.status for run in runs))",
]


@pytest.mark.parametrize(
    "number, processes, names", [(signal.SIGUSR1, 2, ["first"]), (signal.SIGKILL, 1, ["first", "second"])]
)
def test_an_experiment_goes_on_in_its_folder(tmp_path, number, processes, names):
    "A notebook that trains a model or two, stopped in the first: run again in its folder, told nothing else, it ends as if nothing had happened."
    parameters, *cells = map(nbformat.v4.new_code_cell, CELLS)
    parameters.metadata.tags = ["parameters"]
    nbformat.write(
        nbformat.v4.new_notebook(
            cells=[parameters, *cells],
            metadata=dict(kernelspec=dict(name="python3", display_name="python3", language="python")),
        ),
        tmp_path / "pair.ipynb",
    )
    config = tiny(tmp_path, processes).model_dump(mode="json")
    settings = [
        f"{section}.{key}={value}"
        for section in ("data", "trainer")
        for key, value in config[section].items()
        if value != build_config("text/quickstart", {}).model_dump(mode="json")[section][key]
    ]
    words = [
        word
        for setting in [
            *settings,
            "model.layers=1",
            "model.width=16",
            "model.heads=2",
            "trainer.max_steps=40",
            f"names={names}",
        ]
        for word in ("-p", setting)
    ]
    job = subprocess.Popen(
        [EBT, "run", tmp_path / "pair.ipynb", *words, "--runs-dir", tmp_path / "runs"],
        env=ENVIRONMENT,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    [folder] = until(lambda: [path.parent.parent for path in (tmp_path / "runs").rglob("first/status.json")], "run")
    first = Run.open(folder / "first")
    until(lambda: logged(first) >= 8, "step 8")
    os.killpg(job.pid, number)
    said = job.communicate(timeout=120)[0]
    if number == signal.SIGUSR1:
        assert (
            job.returncode == 130
            and f"ebt: pair: interrupted; go on with `ebt run {tmp_path}/pair.ipynb --folder {folder}`" in said
            and read_status(folder)["status"] == first.status == "interrupted"
        )
    until(lambda: not may_be_at_work(read_status(first.dir)), "end of the training")
    stopped = read_checkpoint(first.checkpoint())["global_step"]
    done = subprocess.run(
        [EBT, "run", tmp_path / "pair.ipynb", "--folder", folder],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert (
        (folder / "summary.txt").read_text() == " ".join("done" for _ in names)
        and read_status(folder)["status"] == "done"
        and (folder / "report-1.ipynb").exists()
    )
    assert f"resumed at step {stopped}" in done.stdout and [
        row["step"] for row in first.metrics if "train/loss" in row
    ] == list(range(1, 41))
    assert len(list((tmp_path / "runs").rglob("config.yaml"))) == len(names)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="FSDP needs a GPU")
@pytest.mark.parametrize("devices", sorted({1, min(2, torch.cuda.device_count())}))
def test_fsdp_trains_as_one_device_does(tmp_path, devices):
    "Weights, gradients and optimiser state shared out over GPUs: the same figures, and a checkpoint that goes on."
    changes = {"trainer.accelerator": "gpu", "trainer.max_steps": 12, "trainer.compile": False, "trainer.val_every": 6}
    (tmp_path / "config.yaml").write_text(tiny(tmp_path, devices, **changes, **{"trainer.strategy": "fsdp"}).to_yaml())
    subprocess.run(
        [EBT, "train", tmp_path / "config.yaml", "-p", "trainer.max_steps=12"], env=ENVIRONMENT, check=True, timeout=300
    )
    [run] = find_runs(tmp_path / "runs")
    alone = fit(tiny(tmp_path, 1, **changes), progress="none")
    for ours, theirs in zip(run.metrics, alone.metrics, strict=True):
        for name in ours.keys() - {"tokens_per_second"}:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3), name
    subprocess.run(
        [EBT, "train", "--resume", run.dir, "-p", "trainer.max_steps=14"], env=ENVIRONMENT, check=True, timeout=300
    )
    assert read_checkpoint(run.checkpoint())["global_step"] == 14
