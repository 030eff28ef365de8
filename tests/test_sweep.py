"""Sweeps as they are run.

Several real agents on one journal, killed agents, the agent of Weights & Biases, and the messages of the command line.
"""

import contextlib
import itertools
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

pytest.importorskip("optuna")

from ebt_nb.cli.main import main
from ebt_nb.config.overrides import load_config
from ebt_nb.jobs.sweep import SweepAgent, run_agent, take_next_trial
from ebt_nb.jobs.sweep_file import format_settings, read_sweep
from ebt_nb.jobs.sweep_parameters import import_optuna, parse_parameter
from ebt_nb.jobs.sweep_study import lock_study, open_sweep_folder, read_trials
from ebt_nb.runs.addresses import find_runs
from ebt_nb.runs.folders import Run
from ebt_nb.runs.status import read_status
from ebt_nb.training.fit import fit

EBT = Path(sys.executable).with_name("ebt")
ENV = os.environ | {"OMP_NUM_THREADS": "1"}
LONG = 600  # seconds after which waiting is given up
TINY = {
    "model.layers": 1,
    "model.width": 16,
    "model.heads": 2,
    "data.context": 16,
    "data.batch_size": 2,
    "trainer.max_steps": 2,
    "trainer.val_every": 1,
    "trainer.val_batches": 1,
    "trainer.checkpoint_every": 5,
    "trainer.log_every": 1,
    "trainer.threads": 1,
}


@pytest.fixture
def sweep_file(tmp_path):
    "A function that writes the file of a sweep of tiny models with these parameters."

    def write(parameters, settings=None, preset="text/quickstart", **changes):
        fixed = TINY | {"run.runs_dir": str(tmp_path / "runs")} | (settings or {})
        command = [
            "${env}",
            "${program}",
            "train",
            "--preset",
            preset,
            *(f"{key}={value}" for key, value in fixed.items()),
            "${args_no_hyphens}",
        ]
        tree = {
            "program": "ebt",
            "command": command,
            "method": "grid",
            "metric": {"name": "val/loss"},
            "parameters": parameters,
        } | changes
        (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
        return tmp_path / "sweep.yaml"

    return write


@pytest.fixture
def ebt(capsys):
    "A function that runs a command in this process: exit code, output, errors."

    def run(*words):
        code = main([*map(str, words)])
        return code, *capsys.readouterr()

    return run


class Agent:
    "`ebt sweep WORDS` in a process group of its own; `setup` is Python code that it executes before."

    def __init__(self, forker, log, *words, setup=""):
        self.log, self.forker = log, forker
        self.pid = forker.start("sweep", *words, out=log, setup=setup)

    @property
    def output(self):
        return self.log.read_text() if self.log.exists() else ""

    def is_running(self):
        return self.forker.is_running(self.pid)

    def wait(self):
        return self.forker.wait(self.pid)


def wait_for(condition, *agents):
    "Wait until a condition holds, and check that the agents are still running."
    deadline = time.monotonic() + LONG
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        for agent in agents:
            assert agent.is_running(), agent.output
        time.sleep(0.05)


def validation_losses(run):
    return [row["val/loss"] for row in run.metrics if "val/loss" in row]


# Several agents


def test_two_agents_share_a_grid_and_no_point_is_run_twice(sweep_file, tmp_path, ebt, forker):
    kinds, seeds, betas = ["ebt", "transformer"], [1, 2, 3], [[0.9, 0.95], [0.9, 0.999]]
    file = sweep_file(
        {
            "model.kind": {"values": kinds},
            "run.seed": {"min": 1, "max": 3},
            "optim": {"parameters": {"betas": {"values": betas}}},
        }
    )
    folder = tmp_path / "shared"
    logs = [tmp_path / f"agent{number}.log" for number in range(2)]
    agents = [Agent(forker, log, file, "--dir", folder) for log in logs]  # neither finds a folder
    wait_for(folder.exists, *agents)
    with lock_study(folder):  # no trial is given out until both agents ask for one
        wait_for(lambda: all("\n" in agent.output for agent in agents), *agents)
    codes, outputs = [agent.wait() for agent in agents], [agent.output for agent in agents]
    assert codes == [0, 0], outputs
    trials = read_trials(folder)
    assert [tuple(trial.values.values()) for trial in trials] == list(itertools.product(kinds, seeds, betas))
    assert {trial.state for trial in trials} == {"done"}
    trained = [[int(number) for number in re.findall(r"^trial (\d+): val/loss", text, re.M)] for text in outputs]
    assert sorted(trained[0] + trained[1]) == list(range(12))  # each by one agent
    assert all(trained), trained  # both took part
    for trial in trials:
        run = Run.open(folder / trial.run)
        assert run.status == "done" and validation_losses(run) == list(trial.history.values())
        assert trial.value == min(validation_losses(run))
    assert len(find_runs(folder)) == 12

    best = min(trials, key=lambda trial: trial.value)  # the best configuration can be trained again
    best_file = folder / "best.yaml"
    assert load_config(best_file) == Run.open(folder / best.run).config
    assert f"# {best.run}: val/loss" in best_file.read_text()
    assert f"ebt train {best_file}" in outputs[0] + outputs[1]
    again = fit(load_config(best_file), progress="none")
    assert validation_losses(again) == list(best.history.values())
    code, out, _ = ebt("sweep", folder, "--list")
    assert code == 0 and len(out.splitlines()) == 13 and format_settings(best.values) in out


def test_models_of_video_are_trials_like_others(sweep_file, tmp_path, ebt):
    small = {"data.image_size": 16, "data.context": 4, "data.max_documents": 4, "data.cache_dir": tmp_path / "cache"}
    kinds = ["video_ebt", "video_transformer"]
    file = sweep_file({"model.kind": {"values": kinds}}, small, preset="video/quickstart")
    code, out, err = ebt("sweep", file, "--dir", tmp_path / "clips")
    assert code == 0, out + err
    trials = read_trials(tmp_path / "clips")
    runs = [Run.open(tmp_path / "clips" / trial.run) for trial in trials]
    assert {trial.state for trial in trials} == {"done"} and [run.config.model.kind for run in runs] == kinds
    assert [trial.value for trial in trials] == [min(validation_losses(run)) for run in runs]


# an agent that trains until the third validation of its first trial, and then waits
HANGING = """
import time
from ebt_nb.jobs.sweep import TrialReporter

report_validation = TrialReporter.on_validation_end

def hang_after_third_validation(self, trainer, module):
    report_validation(self, trainer, module)
    if len(self.history) == 3:
        time.sleep(3600)

TrialReporter.on_validation_end = hang_after_third_validation
"""


def test_trial_of_a_killed_agent_is_noticed_and_resumed(sweep_file, tmp_path, ebt, forker):
    "Two trials that differ in nothing that matters: the agent of one is killed, the other is not disturbed."
    file = sweep_file(
        {"tracking.project": {"values": ["disturbed", "alone"]}},
        {"trainer.max_steps": 80, "trainer.val_every": 10, "trainer.checkpoint_every": 7},
    )
    sweep, folder = read_sweep(file), tmp_path / "shared"
    trial_folder = folder / "trial-0000"
    agent = Agent(forker, tmp_path / "killed.log", file, "--dir", folder, setup=HANGING)

    def has_validated_twice():
        return (trial_folder / "metrics.csv").exists() and len(validation_losses(Run.open(trial_folder))) >= 2

    wait_for(has_validated_twice, agent)
    os.killpg(agent.pid, signal.SIGKILL)
    agent.wait()
    [trial] = read_trials(folder)
    assert trial.state == "running" and read_status(trial_folder)["status"] == "running"  # not noticed yet

    assert run_agent(sweep, folder, trials=0, log_line=[].append) == 0  # the next agent notices, and does not retry
    [killed] = read_trials(folder)
    assert killed.state == "failed" and "was killed" in killed.error
    assert 2 <= len(killed.history) < 8 and read_status(trial_folder)["status"] == "interrupted"
    assert "was killed" in ebt("sweep", folder, "--list")[1]

    agent = Agent(forker, tmp_path / "next.log", folder, "--retry")
    assert agent.wait() == 0 and "1 failed trials are tried again" in agent.output
    _, again, alone = read_trials(folder)
    assert (again.state, alone.state) == ("done", "done")
    assert (again.values, again.run, again.retry_of) == (killed.values, "trial-0000", 0)
    assert "resumed at step" in (trial_folder / "console.log").read_text()
    # as if it had not been killed
    assert again.history == alone.history == dict(enumerate(validation_losses(Run.open(trial_folder)), 1))
    assert len(again.history) == 8


def test_interrupted_agents_record_their_trials(sweep_file, tmp_path, forker):
    endless = {"trainer.max_steps": 1_000_000, "trainer.val_every": 1_000_000}
    file = sweep_file({"run.seed": {"values": [1, 2, 3]}}, endless)
    parent = Agent(forker, tmp_path / "parent.log", file, "--agents", 2)
    folder = tmp_path / "runs/sweeps/sweep"
    wait_for(lambda: all((folder / f"trial-000{n}/metrics.csv").exists() for n in (0, 1)), parent)
    os.kill(parent.pid, signal.SIGTERM)  # to the parent alone, as a scheduler may
    assert parent.wait() == 130, parent.output
    trials = read_trials(folder)
    assert len(trials) == 2, trials
    for trial in trials:
        assert trial.state == "failed" and "interrupted" in trial.error, trial
        assert Run.open(folder / trial.run).status == "interrupted"
    assert not (folder / "best.yaml").exists()


# Search


def distance_from_best(values):
    "Distance of a learning rate from the best one, 0.001, in decades."
    return abs(math.log10(values["optim.peak_lr"] / 1e-3))


def run_search(sweep, folder, num_agents):
    "Let agents in turn take and end all trials; `distance_from_best` stands in for training."
    Run.create(sweep.base_config, folder / "any")
    with contextlib.ExitStack() as stack:
        agents = [stack.enter_context(SweepAgent(sweep, folder)) for _ in range(num_agents)]
        while True:
            taken = [(agent, take_next_trial(agent)) for agent in agents]  # all are running at the same time
            taken = [(agent, *next_trial) for agent, next_trial in taken if next_trial is not None]
            if not taken:
                return
            for agent, trial, values in taken:
                trial.set_user_attr("run", "any")
                with lock_study(folder):
                    complete = import_optuna().trial.TrialState.COMPLETE
                    agent.record_outcome(trial, complete, distance_from_best(values))


def test_bayes_learns_from_trials_and_random_does_not(sweep_file, tmp_path):
    """Rates over six decades, of which one is best.

    The search comes near it more and more often, with one agent and with three at a time.
    """
    parameters = {
        "optim.peak_lr": {"distribution": "log_uniform_values", "min": 1e-7, "max": 1e-1},
        "optim.weight_decay": {"distribution": "q_normal", "mu": 3, "sigma": 1, "q": 1},
    }
    mean_distance = {}
    for method, num_agents in [("random", 1), ("bayes", 1), ("bayes", 3)]:
        sweep = read_sweep(sweep_file(parameters, method=method, run_cap=60))
        folder = open_sweep_folder(sweep, tmp_path / f"{method}{num_agents}")
        run_search(sweep, folder, num_agents)
        values = [trial.values for trial in read_trials(folder)]
        assert len(values) == 60
        assert all(trial["optim.weight_decay"] == int(trial["optim.weight_decay"]) for trial in values)
        mean_distance[method, num_agents] = sum(map(distance_from_best, values[30:])) / 30
    assert mean_distance["bayes", 1] < mean_distance["random", 1] / 2, mean_distance
    assert mean_distance["bayes", 3] < mean_distance["random", 1] / 2, mean_distance


# Weights & Biases

AGENT = """
import os, sys, yaml
from wandb.wandb_agent import Agent

tree = yaml.safe_load(open(sys.argv[1]))
os.environ["WANDB_SWEEP_ID"] = "abcd1234"
agent = Agent(None, None, sweep_id="abcd1234")
agent._sweep_command = tree["command"]           # what it reads from the server's copy of the file
agent._command_run({"type": "run", "run_id": "efgh5678", "program": tree["program"], "args": {
    "optim.peak_lr": {"value": 0.00123},
    "thinking.clamp": {"value": None},
    "optim": {"value": {"betas": [0.9, 0.95], "weight_decay": 0.5}},
}})
raise SystemExit(agent._run_processes["efgh5678"].wait())
"""


def test_the_agent_of_weights_and_biases_runs_the_file_as_it_is(sweep_file, tmp_path):
    file = sweep_file(
        {
            "optim.peak_lr": {"min": 0.001, "max": 0.1},
            "thinking.clamp": {"values": [None, 1.0]},
            "optim": {"parameters": {"betas": {"value": [0.9, 0.95]}, "weight_decay": {"min": 0.0, "max": 1.0}}},
        },
        {"tracking.wandb": "offline"},
        method="random",
        run_cap=3,
    )
    read_sweep(file)
    (tmp_path / "agent.py").write_text(AGENT)
    done = subprocess.run(
        [sys.executable, str(tmp_path / "agent.py"), str(file)],
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=LONG,
        env=ENV
        | {"PATH": f"{EBT.parent}{os.pathsep}{os.environ['PATH']}", "WANDB_MODE": "offline", "WANDB_SILENT": "true"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    [run] = find_runs(tmp_path / "runs")
    optim = run.config.optim
    assert (optim.peak_lr, optim.betas, optim.weight_decay) == (0.00123, (0.9, 0.95), 0.5)
    assert run.config.thinking.clamp is None
    [logged] = run.dir.glob("wandb/offline-run-*-efgh5678/*.wandb")  # under the id that the server gave
    assert b"val/loss" in logged.read_bytes()


def test_ranges_are_those_of_weights_and_biases():
    "Its own bridge to Optuna, where it has one, makes the same distributions from the same specifications."
    wandb_distribution = pytest.importorskip("wandb.sdk.sweeps.scheduler.optuna").sweep_parameter_to_distribution
    ranges = [
        dict(min=1, max=9),
        dict(min=1, max=9.5),
        dict(min=0.25, max=1.0),
        dict(distribution="uniform", min=1, max=9),
        dict(distribution="int_uniform", min=-3, max=9),
        dict(distribution="log_uniform_values", min=1e-5, max=1e-1),
    ]
    for spec in ranges:
        assert parse_parameter("a", spec).to_optuna() == wandb_distribution(spec), spec
    for spec in (
        dict(values=[1, 2.5, "three", None, True]),
        dict(value=4),
        dict(distribution="categorical", values=["a", "b"]),
    ):
        ours = parse_parameter("a", spec)
        assert [ours.decode(choice) for choice in ours.to_optuna().choices] == list(wandb_distribution(spec).choices)


def test_examples_can_be_run(root):
    files = sorted((root / "job_scripts/sweeps").glob("*.yaml"))
    sweeps = [read_sweep(file) for file in files]
    assert {"grid", "bayes"} <= {sweep.method for sweep in sweeps} and all(sweep.max_trials for sweep in sweeps)


def test_job_script_passes_its_arguments_on(root, tmp_path):
    "In a checkout whose set-up and command only print their arguments, called from another folder."
    (tmp_path / "checkout/.venv/bin").mkdir(parents=True)
    shutil.copytree(root / "job_scripts", tmp_path / "checkout/job_scripts")
    (tmp_path / "checkout/job_scripts/setup.sh").write_text("echo set up\n")
    command = tmp_path / "checkout/.venv/bin/ebt"
    command.write_text("#!/bin/sh\nprintf '<%s>' \"$@\"\n")
    command.chmod(0o755)
    for arguments, expected in [
        (["my file.yaml", "--agents", "2"], "<sweep><my file.yaml><--agents><2>"),
        ([], f"<sweep><{tmp_path}/checkout/job_scripts/sweeps/peak_lr.yaml>"),
    ]:
        done = subprocess.run(
            ["bash", tmp_path / "checkout/job_scripts/sweep.sh", *arguments],
            cwd=tmp_path,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout == f"set up\n{expected}"


# Messages


def test_wrong_files_are_refused_with_nothing_made(sweep_file, tmp_path, ebt):
    good = {"optim.peak_lr": {"values": [1e-3]}}
    for parameters, changes, part in [
        (good, dict(method="gird"), "grid, random, bayes"),
        ({"optim.peak_rl": {"values": [1]}}, {}, "did you mean 'optim.peak_lr'"),
        (good, dict(controller={"type": "local"}), "controller: not supported"),
        (good, dict(metric=None), "metric: missing"),
    ]:
        file = sweep_file(parameters, **changes)
        code, out, err = ebt("sweep", file)
        assert code == 2 and part in err and err.startswith(f"ebt: {file}: ") and out == ""
    assert ebt("sweep", sweep_file(good), "--list")[0] == 2 and not (tmp_path / "runs").exists()


def test_a_grid_is_listed_as_words_for_train(sweep_file, tmp_path, ebt):
    file = sweep_file({"run.seed": {"values": [1, 2]}, "data.subset": {"values": ["a b", None]}})
    code, out, _ = ebt("sweep", file, "--enumerate")
    assert code == 0 and out.splitlines() == [
        "run.seed=1 'data.subset=a b'",
        "run.seed=1 data.subset=null",
        "run.seed=2 'data.subset=a b'",
        "run.seed=2 data.subset=null",
    ]
    assert (
        ebt(
            "train",
            "--preset",
            "text/quickstart",
            *(f"{key}={value}" for key, value in TINY.items()),
            f"run.runs_dir={tmp_path}/array",
            *shlex.split(out.splitlines()[1]),
        )[0]
        == 0
    )
    [run] = find_runs(tmp_path / "array")
    assert run.config.run.seed == 1 and run.config.data.subset is None
