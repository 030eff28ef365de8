"""What happens to jobs: killed at any moment, warned by a scheduler, started twice at once, failed. Real processes throughout.

Most of them are forked from one that has imported everything (an import takes longer than the training here); some are the installed command itself."""

import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ebt_nb.cli.main import main
from ebt_nb.config.config import RunConfig, build_config
from ebt_nb.runs.folders import Run, find_runs, read_status
from ebt_nb.training.base import read_checkpoint
from forked import Forker
from test_resume import assert_same, final

EBT = Path(sys.executable).with_name("ebt")
EVERY, STEPS = 3, 48
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


class Jobs:
    "Starts `ebt` commands, each in a session of its own, and waits for them; what they print is in files of one folder."

    def __init__(self, folder: Path, forker: Forker):
        self.folder, self.forker = folder, forker

    def start(self, *words, log: str = "log") -> int:
        pid = self.forker.start(*words, cwd=self.folder, out=self.folder / log)
        while os.getpgid(pid) != pid:
            time.sleep(0.001)
        return pid

    def wait(self, pid: int) -> int:
        return self.forker.wait(pid)

    def run(self, *words, log: str = "log") -> int:
        return self.wait(self.start(*words, log=log))

    def said(self, log: str = "log") -> str:
        return (self.folder / log).read_text()


@pytest.fixture(scope="module")
def jobs(tmp_path_factory, forker):
    return Jobs(tmp_path_factory.mktemp("jobs"), forker)


def tiny(folder: Path, **changes) -> RunConfig:
    "All randomness there is, a replay buffer that makes checkpoints take a while to write, and one after every third update."
    return build_config(
        "text/quickstart",
        {
            "model.layers": 1,
            "model.width": 32,
            "model.heads": 2,
            "data.context": 16,
            "data.batch_size": 2,
            "data.max_documents": 200,
            "data.cache_dir": str(folder / "cache"),
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
def straight(jobs):
    "A run that nobody stopped."
    (jobs.folder / "straight.yaml").write_text(tiny(jobs.folder, **{"run.name": "straight"}).to_yaml())
    assert jobs.run("train", jobs.folder / "straight.yaml") == 0, jobs.said()
    [run] = find_runs(jobs.folder / "runs" / "straight")
    return run


def logged(run: Run) -> int:
    "The last step with figures."
    return max((row["step"] for row in run.metrics), default=0)


def saved(run: Run) -> int:
    "The step of the last checkpoint."
    return read_checkpoint(run.checkpoint())["global_step"] if (run.dir / "checkpoints" / "last.ckpt").exists() else 0


def begun(run: Run) -> list[str]:
    "Where each job that came as far as saying so began: its step, '' for the first."
    log = run.dir / "console.log"
    return re.findall(r"(?:resumed at step (\d+)|new run)\n", log.read_text()) if log.exists() else []


def half_written(run: Run) -> list[Path]:
    return list((run.dir / "checkpoints").glob(".*.tmp~"))


def until(happens, what: str, seconds: float = 60.0):
    "Wait for something; returns what it was."
    begun = time.monotonic()
    while not (found := happens()):
        assert time.monotonic() - begun < seconds, f"in {seconds} s: no {what}"
        time.sleep(0.0005)
    return found


def test_killed_at_ten_random_moments(jobs, straight):
    "Ten times: kill -9 of the job's whole process group, in a random update or while a checkpoint is written; then the same bits as undisturbed, and only the updates since the last checkpoint made again."
    draw = random.Random(33)
    targets = sorted(draw.sample(range(1, STEPS - 8), 10))
    while_saving = set(draw.sample(range(1, 10), 4))
    run, halves, lost = Run.create(tiny(jobs.folder, **{"run.name": "killed"})), 0, 0
    for number, target in enumerate(targets):
        before = saved(run)
        real = (
            subprocess.Popen(
                [EBT, "train", "--resume", run.dir],
                env=ENVIRONMENT,
                start_new_session=True,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            if number == 0
            else None
        )
        pid = real.pid if real else jobs.start("train", "--resume", run.dir)
        until(lambda: len(begun(run)) == number + 1, f"job {number + 1}; {'' if real else jobs.said()}")
        until(lambda: logged(run) >= target, f"step {target}; {'' if real else jobs.said()}")
        if number in while_saving:
            until(lambda: half_written(run), "checkpoint being written")
        else:
            time.sleep(draw.uniform(0, 0.03))
        os.killpg(pid, signal.SIGKILL)
        assert (real.wait() if real else jobs.wait(pid)) == -signal.SIGKILL and run.status == "running"
        halves += bool(half_written(run))
        assert logged(run) - 1 - saved(run) < EVERY and saved(run) >= before  # a row is written before its checkpoint
        lost += logged(run) - saved(run)
    last = saved(run)
    subprocess.run([EBT, "train", "--resume", run.dir], env=ENVIRONMENT, check=True, stdout=subprocess.DEVNULL)
    assert run.status == "done" and not half_written(run)
    told = begun(run)
    assert len(told) == 11 and told[0] == "" and int(told[-1]) == last and lost <= 10 * EVERY
    assert halves >= 1, "no kill fell into the writing of a checkpoint; choose other moments"
    assert_same(final(run), final(straight))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_warned_and_resumed(jobs, straight, number):
    "A scheduler's warning: the update is finished and saved, nothing at all is lost."
    run = Run.create(tiny(jobs.folder, **{"run.name": f"warned-{number.name}"}))
    pid = jobs.start("train", "--resume", run.dir, log=number.name)
    until(lambda: logged(run) >= 10, "step 10")
    os.kill(pid, number)
    assert jobs.wait(pid) == 130
    status = read_status(run.dir)
    assert (status["status"], status["signal"]) == ("interrupted", number.name) and saved(run) == status[
        "step"
    ] == logged(run) >= 10
    assert f"ebt: {run.dir}: interrupted; resume with `ebt train --resume {run.dir}`\n" in jobs.said(number.name)
    assert jobs.run("train", "--resume", run.dir) == 0
    assert_same(final(run), final(straight))


def test_warned_before_it_listens(tmp_path):
    "Before training begins to listen, SIGUSR1 would kill Python without a word."
    (tmp_path / "config.yaml").write_text(tiny(tmp_path).to_yaml())
    script = "import os, signal, ebt_nb.training.fit as fit\nfrom ebt_nb.cli.main import main\nfit.data_module = lambda config: os.kill(os.getpid(), signal.SIGUSR1)\nraise SystemExit(main(['train', 'config.yaml']))"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=120, env=ENVIRONMENT
    )
    assert done.returncode == 130 and done.stderr == "ebt: stopped by SIGUSR1\n" and not (tmp_path / "runs").exists()


def test_two_jobs_at_the_same_moment(jobs, tmp_path):
    "The same command twice, nothing prepared: a folder each, the same figures, one cache, made once."
    (tmp_path / "own.txt").write_text(
        "\n\n".join(
            f"It is a truth universally acknowledged that {number} is a number, and not a bad one."
            for number in range(4000)
        )
    )
    (tmp_path / "config.yaml").write_text(
        tiny(
            tmp_path,
            **{
                "data.source": str(tmp_path / "own.txt"),
                "data.max_documents": None,
                "thinking.replay": 0,
                "trainer.max_steps": 6,
            },
        ).to_yaml()
    )
    pids = [jobs.start("train", tmp_path / "config.yaml", log=f"twin-{twin}") for twin in range(3)]
    assert [jobs.wait(pid) for pid in pids] == [0, 0, 0], [jobs.said(f"twin-{twin}") for twin in range(3)]
    first, *others = find_runs(tmp_path / "runs")
    assert len(others) == 2 and all(run.status == "done" for run in (first, *others))
    for run in others:
        assert_same(final(run), final(first))
    assert len([path for path in (tmp_path / "cache").iterdir() if path.suffix != ".lock"]) == 1


def test_one_run_is_not_trained_twice_at_once(jobs, straight):
    "Resumed twice at the same moment, one goes on and the other is refused; the figures are those of one."
    run = Run.create(tiny(jobs.folder, **{"run.name": "contested"}))
    pids = [jobs.start("train", "--resume", run.dir, log=f"contested-{number}") for number in range(2)]
    codes = [jobs.wait(pid) for pid in pids]
    assert sorted(codes) == [0, 2]
    refusal = jobs.said(f"contested-{codes.index(2)}")
    assert (
        refusal.startswith(f"ebt: {run.dir}: another process is training this run") and len(refusal.splitlines()) == 1
    )
    assert_same(final(run), final(straight))


def test_a_failed_job_says_where_and_how_to_go_on(jobs):
    (jobs.folder / "bad.yaml").write_text(
        tiny(jobs.folder, **{"run.name": "bad", "thinking.step_size": 1e39, "model.init": "reference"}).to_yaml()
    )
    assert jobs.run("train", jobs.folder / "bad.yaml", log="bad") == 1
    [run] = find_runs(jobs.folder / "runs" / "bad")
    *_, error, remedy = jobs.said("bad").splitlines()
    assert (
        error.startswith("ebt: ")
        and remedy.startswith(f"{run.dir}: failed at step")
        and f"`ebt train --resume {run.dir}`" in remedy
    )
    assert run.status == "failed" and "DivergenceError" in read_status(run.dir)["error"]


@pytest.mark.parametrize(
    "settings, message",
    [
        (
            ["trainer.keep_every=1", f"trainer.max_steps={10**12}"],
            r"run\.runs_dir: the checkpoints of this run will take [\d.]+\S* \w?B .*are free.*trainer\.keep_every",
        ),
        (
            ["model.width=65536", "model.heads=1024", "model.layers=50"],
            r"data\.batch_size: [\d,]+ parameters .* are free\. Lower data\.batch_size",
        ),
        (["trainer.strategy=fsdp"], r"trainer\.strategy: fsdp shares a model out over GPUs, and this run is on a CPU"),
        (
            ["trainer.strategy=fsdp", "trainer.devices=2"],
            r"trainer\.strategy: fsdp shares a model out over GPUs, and this run is on a CPU",
        ),
        (["trainer.nodes=2"], r"trainer\.nodes: 2 nodes are reached through Slurm"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_made(tmp_path, capsys, monkeypatch, settings, message):
    for name in list(os.environ):
        if name.startswith("SLURM_"):
            monkeypatch.delenv(name)
    (tmp_path / "config.yaml").write_text(tiny(tmp_path).to_yaml())
    assert (
        main(["train", str(tmp_path / "config.yaml"), *(word for setting in settings for word in ("-p", setting))]) == 2
    )
    said = capsys.readouterr()
    assert (
        re.match(f"ebt: {message}", said.err)
        and len(said.err.splitlines()) == 1
        and said.out == ""
        and not (tmp_path / "runs").exists()
    )
