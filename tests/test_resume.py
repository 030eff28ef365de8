"""A run that was stopped, however, and resumed ends with the same bits as one that was not: weights, optimiser, place in the data, figures."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch

from ebt_nb.config.config import RunConfig, build_config, load_config
from ebt_nb.runs.preemption import Interrupted
from ebt_nb.runs.folders import Run, read_status
from ebt_nb.training.callbacks import CALLBACKS
from ebt_nb.training.fit import fit
from ebt_nb.training.base import read_checkpoint

RECIPES = {
    "system 1": {},
    "all randomness, accumulated": {
        "thinking.noise": 0.5,
        "thinking.random_step_size": 2.0,
        "thinking.visits_max": 3,
        "thinking.detach": False,
        "thinking.truncate": True,
        "objective.steps": "last",
        "thinking.replay": 12,
        "trainer.accumulate": 2,
        "optim.name": "stable_adamw",
    },
    "baseline, streamed": {"model.kind": "transformer", "data.streaming": True, "optim.name": "lars"},
    "pictures": {
        "preset": "image/quickstart",
        "data.image_size": 8,
        "data.flip": True,
        "diffusion.random_level": True,
        "thinking.noise": 0.1,
        "thinking.random_step_size": 2.0,
        "thinking.visits_max": 3,
        "thinking.detach": False,
        "objective.steps": "last",
        "thinking.replay": 12,
    },
    "diffusion": {"preset": "image/quickstart", "model.kind": "dit", "data.image_size": 8},
}


def tiny(folder: Path, preset: str = "text/quickstart", **changes) -> RunConfig:
    return build_config(
        preset,
        {
            "model.layers": 2,
            "model.width": 32,
            "model.heads": 2,
            "data.context": 16,
            "data.batch_size": 4,
            "data.max_documents": 200,
            "data.cache_dir": str(folder / "cache"),
            "run.runs_dir": str(folder / "runs"),
            "trainer.max_steps": 14,
            "trainer.val_every": 4,
            "trainer.val_batches": 2,
            "trainer.log_every": 2,
            "trainer.checkpoint_every": 5,
            "trainer.threads": 1,
            "optim.warmup_steps": 4,
        }
        | changes,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("resume")


@pytest.fixture(scope="module")
def straight(folder):
    "Runs that nobody stopped, by recipe; each is trained once."
    made = {}

    def run(recipe):
        if recipe not in made:
            made[recipe] = fit(tiny(folder, **RECIPES[recipe]), progress="none")
        return made[recipe]

    return run


def final(run: Run) -> dict:
    "Everything that must be equal: from the last checkpoint, and all figures but the speed."
    checkpoint = read_checkpoint(run.checkpoint())
    figures = [{k: v for k, v in row.items() if not k.endswith("_per_second")} for row in run.metrics]
    loader = checkpoint["loops"]["fit_loop"]["state_dict"]["combined_loader"]
    return {
        k: checkpoint[k]
        for k in (
            "state_dict",
            "optimizer_states",
            "lr_schedulers",
            "micro_steps",
            "global_step",
            "callbacks",
            "replay",
        )
        if k in checkpoint
    } | dict(figures=figures, loader=loader)


def assert_same(a, b, where="") -> None:
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), f"{where}: differs by {(a - b).abs().max()}"
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, pair in enumerate(zip(a, b)):
            assert_same(*pair, f"{where}/{i}")
    else:
        assert a == b, f"{where}: {a} and {b}"


class At(pl.Callback):
    "Does something in the middle of an update."

    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_before_optimizer_step(self, trainer, module, optimizer):
        if trainer.global_step == self.step:
            self.action()


def fails():
    raise ZeroDivisionError("a defect")


def interrupts():
    os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize(
    "recipe, step", [("system 1", 3), ("system 1", 11), *((recipe, 8) for recipe in RECIPES)]
)  # before the first checkpoint; before a validation; between checkpoints
def test_failed_and_resumed(recipe, step, folder, straight, monkeypatch):
    monkeypatch.setitem(CALLBACKS, "fails", lambda config: At(step, fails))
    run = Run.create(tiny(folder, **RECIPES[recipe]))
    with pytest.raises(ZeroDivisionError):
        fit(tiny(folder, **RECIPES[recipe], **{"trainer.callbacks": ["fails"]}), run, progress="none")
    assert (
        read_status(run.dir)["status"] == "failed"
        and "a defect" in read_status(run.dir)["error"]
        and read_status(run.dir)["step"] == step
    )
    [earlier] = run.dir.glob("config-until-step=*.yaml")  # the configuration it was made with
    fit(load_config(earlier), run, resume=True, progress="none")
    assert run.status == "done"
    assert_same(final(run), final(straight(recipe)))


@pytest.mark.parametrize("recipe", RECIPES)
def test_interrupted_twice_and_resumed(recipe, folder, straight, monkeypatch):
    run, saved = Run.create(tiny(folder, **RECIPES[recipe])), []
    for step in (2, 7):
        monkeypatch.setitem(CALLBACKS, "interrupts", lambda config: At(step, interrupts))
        with pytest.raises(Interrupted, match="resume"):
            fit(
                tiny(folder, **RECIPES[recipe], **{"trainer.callbacks": ["interrupts"]}),
                run,
                resume=bool(saved),
                progress="none",
            )
        assert run.status == "interrupted"
        saved.append(read_checkpoint(run.checkpoint())["global_step"])
    assert saved == [3, 8]  # the update it was in was finished, and saved
    fit(tiny(folder, **RECIPES[recipe]), run, resume=True, progress="none")
    assert_same(final(run), final(straight(recipe)))


SCRIPT = """
import os, signal, sys
import torch
from ebt_nb.config.config import load_config
from ebt_nb.runs.folders import Run
from ebt_nb.training.fit import fit

def half_a_checkpoint(content, file, save=torch.save):
    if content["global_step"] < 10: return save(content, file)
    file.write(b"half"); file.flush()
    os.kill(os.getpid(), signal.SIGKILL)

torch.save = half_a_checkpoint
run = Run.open(sys.argv[1])
fit(run.config, run, progress="none")
"""


def test_killed_while_saving_and_resumed(folder, straight):
    "kill -9 in the middle of writing a checkpoint: the one before is used, the half one is swept away."
    run = Run.create(tiny(folder))
    process = subprocess.run([sys.executable, "-c", SCRIPT, str(run.dir)], capture_output=True, text=True, timeout=300)
    assert process.returncode == -signal.SIGKILL, process.stderr
    assert any(name.endswith(".tmp~") for name in os.listdir(run.dir / "checkpoints")) and run.status == "running"
    before = read_checkpoint(run.checkpoint())["global_step"]
    assert 5 <= before < 10 and run.metrics[-1]["step"] > before
    fit(run.config, run, resume=True, progress="none")
    assert not any(name.endswith(".tmp~") for name in os.listdir(run.dir / "checkpoints")) and run.status == "done"
    assert_same(final(run), final(straight("system 1")))


def test_seed(folder, straight):
    "Same seed, same numbers; another seed, others."
    assert_same(final(fit(tiny(folder), progress="none")), final(straight("system 1")))
    other = fit(tiny(folder, **{"run.seed": 34}), progress="none")
    assert all(
        a["train/loss"] != b["train/loss"]
        for a, b in zip(other.metrics, straight("system 1").metrics)
        if "train/loss" in a
    )


def test_longer(folder):
    "A finished run goes on when it is given more updates; what was trained stays, figures and all."
    run = fit(
        tiny(folder, **{"optim.decay_divisor": 1.0, "optim.warmup_steps": 0, "trainer.max_steps": 8}), progress="none"
    )
    before = run.metrics
    longer = tiny(folder, **{"optim.decay_divisor": 1.0, "optim.warmup_steps": 0})
    fit(longer, run, resume=True, progress="none")
    assert run.metrics[: len(before)] == before
    assert_same(final(run)["state_dict"], final(fit(longer, progress="none"))["state_dict"])
