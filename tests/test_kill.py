"""Jobs that are killed at any moment, warned by a scheduler, started twice at the same moment, or fail.

All jobs are real processes. Most are forked from one that has imported everything, because an import takes longer than
the training here; some are the installed command itself.
"""

import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from forked import Forker
from test_resume import assert_identical, final_state

from ebt_nb.cli.main import main
from ebt_nb.config.kinds import RunConfig
from ebt_nb.config.overrides import build_config
from ebt_nb.runs.addresses import find_runs
from ebt_nb.runs.folders import Run
from ebt_nb.runs.status import read_status
from ebt_nb.training.checkpoints import read_checkpoint

EBT = Path(sys.executable).with_name("ebt")
EVERY, STEPS = 3, 48  # updates between two checkpoints, and in a run
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


# A job pauses where a file in its run folder says so, as long as the file exists. So it is still training when this
# test acts, however busy the machine is.
PAUSES = """
import io, time
from pathlib import Path
import torch
from ebt_nb.runs.metrics import MetricsFile

append, save = MetricsFile.append, torch.save

def wait_at(path, step):
    try:
        while step >= int(path.read_text()):
            time.sleep(0.01)
    except FileNotFoundError:
        pass

def append_and_wait(self, row):
    append(self, row)
    wait_at(self.path.with_name("pause_after_row"), row["step"])

def save_and_wait_half_way(checkpoint, file):
    content = io.BytesIO()
    save(checkpoint, content)
    content = content.getvalue()
    file.write(content[: len(content) // 2])
    file.flush()
    wait_at(Path(file.name).parents[1] / "pause_while_saving", checkpoint["global_step"])
    file.write(content[len(content) // 2 :])

MetricsFile.append, torch.save = append_and_wait, save_and_wait_half_way
"""


class Jobs:
    "Starts `ebt` commands, each in a session of its own, and waits for them; their output is in files of one folder."

    def __init__(self, folder: Path, forker: Forker):
        self.folder, self.forker = folder, forker

    def start(self, *words, log: str = "log", setup: str = "") -> int:
        pid = self.forker.start(*words, cwd=self.folder, out=self.folder / log, setup=setup)
        while os.getpgid(pid) != pid:
            time.sleep(0.001)
        return pid

    def wait(self, pid: int) -> int:
        return self.forker.wait(pid)

    def run(self, *words, log: str = "log") -> int:
        return self.wait(self.start(*words, log=log))

    def output(self, log: str = "log") -> str:
        path = self.folder / log
        return path.read_text() if path.exists() else ""


@pytest.fixture(scope="module")
def jobs(tmp_path_factory, forker):
    return Jobs(tmp_path_factory.mktemp("jobs"), forker)


def tiny_config(folder: Path, **changes) -> RunConfig:
    "Every kind of randomness, a replay buffer that makes checkpoints large, and a checkpoint after every third update."
    return build_config(
        "text/quickstart_s1",
        {
            "model.layers": 1,
            "model.width": 32,
            "model.heads": 2,
            "data.context": 16,
            "data.batch_size": 2,
            "run.runs_dir": str(folder / "runs"),
            "thinking.noise": 0.5,
            "thinking.random_step_size": 2.0,
            "thinking.visits_max": 2,
            "thinking.detach": False,
            "thinking.truncate": True,
            "objective.steps": "last",
            "thinking.replay": 64,
            "trainer.max_steps": STEPS,
            "trainer.val_every": 10,
            "trainer.val_batches": 1,
            "trainer.log_every": 1,
            "trainer.checkpoint_every": EVERY,
            "trainer.threads": 1,
            "optim.warmup_steps": 4,
        }
        | changes,
    )


@pytest.fixture(scope="module")
def uninterrupted(jobs):
    "A run that was not stopped."
    config = tiny_config(jobs.folder, **{"run.name": "uninterrupted"})
    (jobs.folder / "uninterrupted.yaml").write_text(config.to_yaml())
    assert jobs.run("train", jobs.folder / "uninterrupted.yaml") == 0, jobs.output()
    [run] = find_runs(jobs.folder / "runs" / "uninterrupted")
    return run


def last_row(run: Run) -> int:
    "The step of the last row of metrics."
    return max((row["step"] for row in run.metrics), default=0)


def last_checkpoint(run: Run) -> int:
    "The step of the last checkpoint."
    if not (run.dir / "checkpoints" / "last.ckpt").exists():
        return 0
    return read_checkpoint(run.checkpoint())["global_step"]


def start_steps(run: Run) -> list[str]:
    "The step at which each job started that has logged it; '' for the first."
    log = run.dir / "console.log"
    return re.findall(r"(?:resumed at step (\d+)|new run)\n", log.read_text()) if log.exists() else []


def incomplete_checkpoints(run: Run) -> list[Path]:
    "The temporary files of checkpoints that are being written, or were when the job was killed."
    return list((run.dir / "checkpoints").glob(".*.tmp~"))


def wait_until(condition, description: str, seconds: float = 300.0):
    "Wait until a function returns something true, and return that."
    start = time.monotonic()
    while not (result := condition()):
        assert time.monotonic() - start < seconds, f"after {seconds} s: no {description}"
        time.sleep(0.0005)
    return result


def test_killed_at_ten_random_moments(jobs, uninterrupted):
    """Ten times `kill -9` of a job's whole process group, in a random update or while a checkpoint is written.

    The run ends with the same bits as an uninterrupted one. Only the updates since the last checkpoint are repeated.
    """
    rng = random.Random(33)
    targets = sorted(rng.sample(range(1, STEPS - 8), 10))
    while_saving = set(rng.sample(range(1, 10), 4))
    run = Run.create(tiny_config(jobs.folder, **{"run.name": "killed"}))
    num_incomplete = num_repeated = 0
    for number, target in enumerate(targets):
        checkpoint_before = last_checkpoint(run)
        (run.dir / "pause_after_row").write_text(str(target + 3))
        if number in while_saving:
            (run.dir / "pause_while_saving").write_text(str(target))
        installed = start_installed_command(run) if number == 0 else None
        pid = installed.pid if installed else jobs.start("train", "--resume", run.dir, setup=PAUSES)
        wait_until(lambda: len(start_steps(run)) == number + 1, f"job {number + 1}")  # noqa: B023
        wait_until(lambda: last_row(run) >= target, f"step {target}")  # noqa: B023
        if number in while_saving:
            wait_until(lambda: incomplete_checkpoints(run), "checkpoint being written")
        else:
            time.sleep(rng.uniform(0, 0.03))
        os.killpg(pid, signal.SIGKILL)
        assert (installed.wait() if installed else jobs.wait(pid)) == -signal.SIGKILL
        assert run.status == "running"
        num_incomplete += bool(incomplete_checkpoints(run))
        assert last_checkpoint(run) >= checkpoint_before
        assert last_row(run) - 1 - last_checkpoint(run) < EVERY  # a row comes before its checkpoint
        num_repeated += last_row(run) - last_checkpoint(run)
        for name in ("pause_after_row", "pause_while_saving"):
            (run.dir / name).unlink(missing_ok=True)
    last = last_checkpoint(run)
    subprocess.run([EBT, "train", "--resume", run.dir], env=ENVIRONMENT, check=True, stdout=subprocess.DEVNULL)
    assert run.status == "done" and not incomplete_checkpoints(run)
    starts = start_steps(run)
    assert len(starts) == 11 and starts[0] == "" and int(starts[-1]) == last
    assert num_repeated <= 10 * EVERY and num_incomplete >= len(while_saving)
    assert_identical(final_state(run), final_state(uninterrupted))


def start_installed_command(run: Run) -> subprocess.Popen:
    "Start the installed `ebt train --resume RUN` in a session of its own."
    return subprocess.Popen(
        [EBT, "train", "--resume", run.dir],
        env=ENVIRONMENT,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_warned_and_resumed(jobs, uninterrupted, number):
    "After a scheduler's warning the update is finished and saved, and nothing is lost."
    run = Run.create(tiny_config(jobs.folder, **{"run.name": f"warned-{number.name}"}))
    (run.dir / "pause_after_row").write_text("20")
    pid = jobs.start("train", "--resume", run.dir, log=number.name, setup=PAUSES)
    wait_until(lambda: last_row(run) >= 10, "step 10")
    os.kill(pid, number)
    (run.dir / "pause_after_row").unlink()
    assert jobs.wait(pid) == 130
    status = read_status(run.dir)
    assert (status["status"], status["signal"]) == ("interrupted", number.name)
    assert last_checkpoint(run) == status["step"] == last_row(run) >= 10
    assert f"ebt: {run.dir}: interrupted; resume with `ebt train --resume {run.dir}`\n" in jobs.output(number.name)
    assert jobs.run("train", "--resume", run.dir) == 0
    assert_identical(final_state(run), final_state(uninterrupted))


WARN_WHILE_PREPARING = """
import os, signal
import ebt_nb.training.fit as fit
fit.build_data_module = lambda config: os.kill(os.getpid(), signal.SIGUSR1)
"""


def test_warned_before_training_begins(tmp_path, forker):
    "A SIGUSR1 while data are prepared ends the job with a message; Python alone would be killed without one."
    (tmp_path / "config.yaml").write_text(tiny_config(tmp_path).to_yaml())
    code, _, errors = forker.run("train", "config.yaml", cwd=tmp_path, setup=WARN_WHILE_PREPARING)
    assert code == 130 and errors == "ebt: stopped by SIGUSR1\n"
    assert not (tmp_path / "runs").exists()


def test_three_jobs_at_the_same_moment(jobs, tmp_path):
    "The same command three times, nothing prepared: a folder each, the same metrics, and one cache, made once."
    paragraph = "It is a truth universally acknowledged that {} is a number, and not a bad one."
    (tmp_path / "own.txt").write_text("\n\n".join(paragraph.format(number) for number in range(4000)))
    changes = {
        "data.source": str(tmp_path / "own.txt"),
        "data.cache_dir": str(tmp_path / "cache"),
        "thinking.replay": 0,
        "trainer.max_steps": 6,
    }
    (tmp_path / "config.yaml").write_text(tiny_config(tmp_path, **changes).to_yaml())
    pids = [jobs.start("train", tmp_path / "config.yaml", log=f"twin-{twin}") for twin in range(3)]
    assert [jobs.wait(pid) for pid in pids] == [0, 0, 0], [jobs.output(f"twin-{twin}") for twin in range(3)]
    first, *others = find_runs(tmp_path / "runs")
    assert len(others) == 2 and all(run.status == "done" for run in (first, *others))
    for run in others:
        assert_identical(final_state(run), final_state(first))
    assert len([path for path in (tmp_path / "cache").iterdir() if path.suffix != ".lock"]) == 1


def test_a_run_is_trained_by_one_job_at_a_time(jobs, uninterrupted):
    "Of two jobs that resume a run at the same moment one is refused; the metrics are those of the other."
    run = Run.create(tiny_config(jobs.folder, **{"run.name": "contested"}))
    (run.dir / "pause_after_row").write_text("5")
    logs = ["contested-0", "contested-1"]
    pids = [jobs.start("train", "--resume", run.dir, log=log, setup=PAUSES) for log in logs]
    refused = wait_until(lambda: [log for log in logs if "another process" in jobs.output(log)], "refusal")
    (run.dir / "pause_after_row").unlink()
    codes = dict(zip(logs, map(jobs.wait, pids)))
    assert sorted(codes.values()) == [0, 2] and codes[refused[0]] == 2
    refusal = jobs.output(refused[0])
    assert refusal.startswith(f"ebt: {run.dir}: another process is training this run")
    assert len(refusal.splitlines()) == 1
    assert_identical(final_state(run), final_state(uninterrupted))


def test_a_failed_job_says_where_and_how_to_resume(jobs):
    changes = {"run.name": "bad", "thinking.step_size": 1e39, "model.init": "reference"}
    (jobs.folder / "bad.yaml").write_text(tiny_config(jobs.folder, **changes).to_yaml())
    assert jobs.run("train", jobs.folder / "bad.yaml", log="bad") == 1
    [run] = find_runs(jobs.folder / "runs" / "bad")
    *_, error, remedy = jobs.output("bad").splitlines()
    assert error.startswith("ebt: ") and remedy.startswith(f"{run.dir}: failed at step")
    assert f"`ebt train --resume {run.dir}`" in remedy
    assert run.status == "failed" and "DivergenceError" in read_status(run.dir)["error"]


@pytest.mark.parametrize(
    "settings, message",
    [
        (
            ["trainer.keep_checkpoint_every=1", f"trainer.max_steps={10**12}"],
            r"run\.runs_dir: the checkpoints of this run will take [\d.]+\S* \w?B .*are free"
            r".*trainer\.keep_checkpoint_every",
        ),
        (
            ["model.width=65536", "model.heads=1024", "model.layers=50"],
            r"data\.batch_size: [\d,]+ parameters .* are free\. Lower data\.batch_size",
        ),
        (
            ["trainer.strategy=fsdp", "trainer.devices=2", "optim.name=muon"],
            r"trainer\.strategy: fsdp divides the state of the optimiser, and optim\.name=muon computes with whole",
        ),
        (["trainer.nodes=2"], r"trainer\.nodes: 2 nodes are reached through Slurm"),
    ],
)
def test_an_impossible_run_is_refused_before_anything_is_made(tmp_path, capsys, monkeypatch, settings, message):
    for name in list(os.environ):
        if name.startswith("SLURM_"):
            monkeypatch.delenv(name)
    (tmp_path / "config.yaml").write_text(tiny_config(tmp_path).to_yaml())
    overrides = [word for setting in settings for word in ("-p", setting)]
    assert main(["train", str(tmp_path / "config.yaml"), *overrides]) == 2
    captured = capsys.readouterr()
    assert re.match(f"ebt: {message}", captured.err) and len(captured.err.splitlines()) == 1
    assert captured.out == "" and not (tmp_path / "runs").exists()
