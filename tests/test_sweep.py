"Sweeps as they are run: several real agents on one journal, killed ones, the agent of Weights & Biases, and what the command line says."

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
from ebt_nb.config.config import load_config
from ebt_nb.jobs.sweep import (
    Agent,
    locked,
    needed_optuna,
    next_trial,
    open_sweep,
    read_parameter,
    read_sweep,
    results,
    said,
    work,
)
from ebt_nb.runs.folders import Run, find_runs, read_status
from ebt_nb.training.fit import fit

EBT = Path(sys.executable).with_name("ebt")
ENV = os.environ | {"OMP_NUM_THREADS": "1"}
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
    "A function that writes a sweep of tiny models with these parameters."

    def write(parameters, settings=None, **changes):
        fixed = TINY | {"run.runs_dir": str(tmp_path / "runs")} | (settings or {})
        command = [
            "${env}",
            "${program}",
            "train",
            "--preset",
            "text/quickstart",
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


def begin(*words):
    return subprocess.Popen(
        [EBT, *map(str, words)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=ENV,
        start_new_session=True,
    )


def wait_for(condition, *processes, seconds=90):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "waited too long"
        for process in processes:
            assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)


def losses(run):
    return [row["val/loss"] for row in run.metrics if "val/loss" in row]


# Several agents


def test_two_agents_share_a_grid_and_no_point_is_run_twice(sweep_file, tmp_path, ebt):
    kinds, seeds, betas = ["ebt", "transformer"], [1, 2, 3], [[0.9, 0.95], [0.9, 0.999]]
    file = sweep_file(
        {
            "model.kind": {"values": kinds},
            "run.seed": {"min": 1, "max": 3},
            "optim": {"parameters": {"betas": {"values": betas}}},
        }
    )
    agents = [begin("sweep", file, "--dir", tmp_path / "shared") for _ in range(2)]  # both find no folder
    said_by = [agent.communicate(timeout=120)[0] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], said_by
    trials = results(tmp_path / "shared")
    assert [tuple(trial.values.values()) for trial in trials] == list(itertools.product(kinds, seeds, betas)) and {
        trial.state for trial in trials
    } == {"done"}
    ran = [[int(number) for number in re.findall(r"^trial (\d+): val/loss", text, re.M)] for text in said_by]
    assert sorted(sum(ran, [])) == list(range(12)) and all(ran), ran  # each by one agent, and both took part
    for trial in trials:
        run = Run.open(tmp_path / "shared" / trial.run)
        assert run.status == "done" and losses(run) == list(trial.history.values()) and trial.value == min(losses(run))
    assert len(find_runs(tmp_path / "shared")) == 12

    best = min(trials, key=lambda trial: trial.value)  # what was found can be trained again
    assert load_config(tmp_path / "shared/best.yaml") == Run.open(tmp_path / "shared" / best.run).config
    assert (
        f"# {best.run}: val/loss" in (tmp_path / "shared/best.yaml").read_text()
        and f"ebt train {tmp_path}/shared/best.yaml" in said_by[0] + said_by[1]
    )
    again = fit(load_config(tmp_path / "shared/best.yaml"), progress="none")
    assert losses(again) == list(best.history.values())
    code, out, _ = ebt("sweep", tmp_path / "shared", "--list")
    assert len(out.splitlines()) == 13 and said(best.values) in out


def test_a_killed_agent_is_noticed_and_its_trial_goes_on(sweep_file, tmp_path, ebt):
    "Two trials that differ in nothing that matters: one whose agent is killed, one that nobody disturbs."
    file = sweep_file(
        {"tracking.project": {"values": ["disturbed", "alone"]}},
        {"trainer.max_steps": 80, "trainer.val_every": 10, "trainer.checkpoint_every": 7},
    )
    sweep, folder = read_sweep(file), tmp_path / "shared"
    doomed = begin("sweep", file, "--dir", folder)
    wait_for(
        lambda: (folder / "trial-0000/metrics.csv").exists() and len(losses(Run.open(folder / "trial-0000"))) >= 2,
        doomed,
    )
    os.killpg(doomed.pid, signal.SIGKILL)
    doomed.wait()
    [left] = results(folder)
    assert (
        left.state == "running" and read_status(folder / "trial-0000")["status"] == "running"
    )  # nobody has noticed yet

    assert work(sweep, folder, trials=0, say=[].append) == 0  # the next agent does, and tries it again only when asked
    [killed] = results(folder)
    assert (
        killed.state == "failed"
        and "was killed" in killed.error
        and 2 <= len(killed.history) < 8
        and read_status(folder / "trial-0000")["status"] == "interrupted"
    )
    assert "was killed" in ebt("sweep", folder, "--list")[1]
    agent = begin("sweep", folder, "--retry")
    assert "1 failed trials are tried again" in agent.communicate(timeout=120)[0] and agent.returncode == 0
    _, again, alone = results(folder)
    assert (again.state, again.values, again.run, again.retry_of, alone.state) == (
        "done",
        killed.values,
        "trial-0000",
        0,
        "done",
    )
    assert "resumed at step" in (folder / "trial-0000/console.log").read_text()
    assert (
        again.history == alone.history == dict(enumerate(losses(Run.open(folder / "trial-0000")), 1))
        and len(again.history) == 8
    )  # as if it had never been killed


def test_interrupted_agents_record_their_trials(sweep_file, tmp_path):
    file = sweep_file({"run.seed": {"values": [1, 2, 3]}}, {"trainer.max_steps": 2000, "trainer.val_every": 1000})
    process = begin("sweep", file, "--agents", 2)
    folder = tmp_path / "runs/sweeps/sweep"
    wait_for(lambda: all((folder / f"trial-000{n}/metrics.csv").exists() for n in (0, 1)), process)
    process.send_signal(signal.SIGTERM)  # to the parent alone, as a scheduler may
    out = process.communicate(timeout=60)[0]
    assert process.returncode == 130, out
    trials = results(folder)
    assert len(trials) == 2 and all(trial.state == "failed" and "interrupted" in trial.error for trial in trials), (
        trials
    )
    assert [Run.open(folder / trial.run).status for trial in trials] == ["interrupted"] * 2 and not (
        folder / "best.yaml"
    ).exists()


# Search


def test_bayes_learns_from_trials_and_random_does_not(sweep_file, tmp_path):
    "Rates over six decades, of which one is best: the search comes near it more and more often, by itself and with three agents at a time."
    rates = {
        "optim.peak_lr": {"distribution": "log_uniform_values", "min": 1e-7, "max": 1e-1},
        "optim.weight_decay": {"distribution": "q_normal", "mu": 3, "sigma": 1, "q": 1},
    }
    far, states = {}, needed_optuna().trial.TrialState
    for method, agents in [("random", 1), ("bayes", 1), ("bayes", 3)]:
        sweep = read_sweep(sweep_file(rates, method=method, run_cap=60))
        folder = open_sweep(sweep, tmp_path / f"{method}{agents}")
        Run.create(sweep.base, folder / "any")
        with contextlib.ExitStack() as stack:
            agents_here = [stack.enter_context(Agent(sweep, folder)) for _ in range(agents)]
            while going := [(agent, *got) for agent in agents_here if (got := next_trial(agent)) is not None]:
                for agent, trial, values in going:
                    trial.set_user_attr("run", "any")
                    with locked(folder):
                        agent.end(trial, states.COMPLETE, abs(math.log10(values["optim.peak_lr"] / 1e-3)))
        values = [trial.values for trial in results(folder)]
        assert len(values) == 60 and all(
            value["optim.weight_decay"] == int(value["optim.weight_decay"]) for value in values
        )
        far[method, agents] = sum(abs(math.log10(value["optim.peak_lr"] / 1e-3)) for value in values[30:]) / 30
    assert far["bayes", 1] < far["random", 1] / 2 and far["bayes", 3] < far["random", 1] / 2, far


# Weights & Biases

AGENT = """
import os, sys, yaml
from wandb.wandb_agent import Agent

tree = yaml.safe_load(open(sys.argv[1]))
os.environ["WANDB_SWEEP_ID"] = "abcd1234"
agent = Agent(None, None, sweep_id="abcd1234")
agent._sweep_command = tree["command"]           # what it reads from the server's copy of the file
agent._command_run({"type": "run", "run_id": "efgh5678", "program": tree["program"], "args": {
    "optim.peak_lr": {"value": 0.00123}, "thinking.clamp": {"value": None}, "optim": {"value": {"betas": [0.9, 0.95], "weight_decay": 0.5}}}})
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
        timeout=120,
        env=ENV
        | {"PATH": f"{EBT.parent}{os.pathsep}{os.environ['PATH']}", "WANDB_MODE": "offline", "WANDB_SILENT": "true"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    [run] = find_runs(tmp_path / "runs")
    assert (
        run.config.optim.peak_lr,
        run.config.optim.betas,
        run.config.optim.weight_decay,
        run.config.thinking.clamp,
    ) == (0.00123, (0.9, 0.95), 0.5, None)
    [logged] = run.dir.glob("wandb/offline-run-*-efgh5678/*.wandb")  # under the id that the server gave
    assert b"val/loss" in logged.read_bytes()


def test_ranges_are_those_of_weights_and_biases():
    "Its own bridge to Optuna, where it has one, makes the same distributions of the same specifications, written out or inferred."
    theirs = pytest.importorskip("wandb.sdk.sweeps.scheduler.optuna").sweep_parameter_to_distribution
    ranges = [
        dict(min=1, max=9),
        dict(min=1, max=9.5),
        dict(min=0.25, max=1.0),
        dict(distribution="uniform", min=1, max=9),
        dict(distribution="int_uniform", min=-3, max=9),
        dict(distribution="log_uniform_values", min=1e-5, max=1e-1),
    ]
    for spec in ranges:
        assert read_parameter("a", spec).distribution() == theirs(spec), spec
    for spec in (
        dict(values=[1, 2.5, "three", None, True]),
        dict(value=4),
        dict(distribution="categorical", values=["a", "b"]),
    ):
        ours = read_parameter("a", spec)
        assert [ours.value(choice) for choice in ours.distribution().choices] == list(theirs(spec).choices)


def test_examples_can_be_run(root):
    files = sorted((root / "job_scripts/sweeps").glob("*.yaml"))
    sweeps = [read_sweep(file) for file in files]
    assert {"grid", "bayes"} <= {sweep.method for sweep in sweeps} and all(sweep.size for sweep in sweeps)


def test_the_job_script_hands_on_what_it_is_given(root, tmp_path):
    "In a checkout whose set-up and command only say what they were called with, from another folder."
    (tmp_path / "checkout/.venv/bin").mkdir(parents=True)
    shutil.copytree(root / "job_scripts", tmp_path / "checkout/job_scripts")
    (tmp_path / "checkout/job_scripts/setup.sh").write_text("echo set up\n")
    command = tmp_path / "checkout/.venv/bin/ebt"
    command.write_text("#!/bin/sh\nprintf '<%s>' \"$@\"\n")
    command.chmod(0o755)
    for words, given in [
        (["my file.yaml", "--agents", "2"], "<sweep><my file.yaml><--agents><2>"),
        ([], f"<sweep><{tmp_path}/checkout/job_scripts/sweeps/peak_lr.yaml>"),
    ]:
        done = subprocess.run(
            ["bash", tmp_path / "checkout/job_scripts/sweep.sh", *words],
            cwd=tmp_path,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout == f"set up\n{given}"


# What users are told


def test_wrong_files_are_refused_with_nothing_made(sweep_file, tmp_path, ebt):
    good = {"optim.peak_lr": {"values": [1e-3]}}
    for parameters, changes, part in [
        (good, dict(method="gird"), "grid, random, bayes"),
        ({"optim.peak_rl": {"values": [1]}}, {}, "did you mean 'optim.peak_lr'"),
        (good, dict(controller={"type": "local"}), "controller: not supported"),
        (good, dict(metric=None), "metric: say which figure"),
    ]:
        file = sweep_file(parameters, **changes)
        code, out, err = ebt("sweep", file)
        assert code == 2 and part in err and err.startswith(f"ebt: {file}: ") and out == ""
    assert ebt("sweep", sweep_file(good), "--list")[0] == 2 and not (tmp_path / "runs").exists()


def test_a_grid_is_listed_as_words_for_train(sweep_file, tmp_path, ebt):
    file = sweep_file({"run.seed": {"values": [1, 2]}, "data.subset": {"values": ["a b", None]}})
    code, out, _ = ebt("sweep", file, "--enumerate")
    assert out.splitlines() == [
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
