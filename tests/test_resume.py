"""A run that was stopped and resumed ends with the same bits as one that was not.

Weights, optimiser, position in the data and metrics are compared, however the run was stopped.
"""

import os
import signal
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch

from ebt_nb.config.kinds import RunConfig
from ebt_nb.config.overrides import build_config, load_config
from ebt_nb.runs.folders import Run
from ebt_nb.runs.preemption import JobInterrupted
from ebt_nb.runs.status import read_status
from ebt_nb.training.callbacks import CALLBACKS
from ebt_nb.training.checkpoints import read_checkpoint
from ebt_nb.training.fit import fit

RECIPES = {
    "system 1": {},
    "all randomness, accumulated": {
        "thinking.noise": 0.5,
        "thinking.learn_noise": True,
        "thinking.random_step_size": 2.0,
        "thinking.visits_max": 3,
        "thinking.detach": False,
        "thinking.truncate": True,
        "objective.steps": "last",
        "thinking.replay": 12,
        "trainer.accumulate_grad_batches": 2,
        "optim.name": "stable_adamw",
    },
    "baseline, streamed": {
        "model.kind": "transformer",
        "data.streaming": True,
        "data.shuffle": False,
        "optim.name": "lars",
        "trainer.profiler": "simple",
    },
    "images": {
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
        "trainer.monitor": "val/psnr",
        "trainer.keep_best": 2,
        "tracking.samples_every": 4,
    },
    "diffusion": {"preset": "image/quickstart", "model.kind": "dit", "data.image_size": 8},
    "video": {
        "preset": "video/quickstart_s1",
        "data.image_size": 8,
        "data.context": 4,
        "data.max_documents": 40,
        "data.flip": True,
        "thinking.start": "newest",
        "thinking.noise": 0.1,
        "thinking.random_step_size": 2.0,
        "thinking.visits_max": 3,
        "thinking.detach": False,
        "objective.steps": "last",
        "thinking.replay": 12,
        "trainer.monitor": "val/loss_start",
        "tracking.samples_every": 4,
    },
}


def small_config(folder: Path, preset: str = "text/quickstart_s1", **changes) -> RunConfig:
    "Return a configuration of a few updates of a small model, with keys changed."
    small = {
        "model.layers": 2,
        "model.width": 32,
        "model.heads": 2,
        "data.batch_size": 4,
        "run.runs_dir": str(folder / "runs"),
        "trainer.max_steps": 14,
        "trainer.val_every": 4,
        "trainer.val_batches": 2,
        "trainer.log_every": 2,
        "trainer.checkpoint_every": 5,
        "trainer.threads": 1,
        "optim.warmup_steps": 4,
    }
    if preset.startswith("text/"):
        small["data.context"] = 16
    return build_config(preset, small | changes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("resume")


@pytest.fixture(scope="module")
def uninterrupted_run(folder):
    "A function that returns the uninterrupted run of a recipe; each is trained once."
    runs = {}

    def get_run(recipe):
        if recipe not in runs:
            runs[recipe] = fit(small_config(folder, **RECIPES[recipe]), progress="none")
        return runs[recipe]

    return get_run


def final_state(run: Run) -> dict:
    "Return everything that must be equal: from the last checkpoint, and all metrics but the speed."
    checkpoint = read_checkpoint(run.checkpoint())
    names = ("state_dict", "optimizer_states", "lr_schedulers", "micro_steps", "global_step", "callbacks", "replay")
    state = {name: checkpoint[name] for name in names if name in checkpoint}
    state["loader"] = checkpoint["loops"]["fit_loop"]["state_dict"]["combined_loader"]
    state["metrics"] = []
    for row in run.metrics:
        state["metrics"].append({name: value for name, value in row.items() if not name.endswith("_per_second")})
    return state


def assert_identical(a, b, where="") -> None:
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), f"{where}: differs by {(a - b).abs().max()}"
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_identical(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, pair in enumerate(zip(a, b)):
            assert_identical(*pair, f"{where}/{i}")
    else:
        assert a == b, f"{where}: {a} and {b}"


class CallAtUpdate(pl.Callback):
    "Calls a function in the middle of an update."

    def __init__(self, update, action):
        self.update, self.action = update, action

    def on_before_optimizer_step(self, trainer, module, optimizer):
        if trainer.global_step == self.update:
            self.action()


def fail():
    raise ZeroDivisionError("a defect")


def interrupt():
    os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize(
    "recipe, update", [("system 1", 3), ("system 1", 11), *((recipe, 8) for recipe in RECIPES)]
)  # before the first checkpoint; before a validation; between checkpoints
def test_failed_and_resumed(recipe, update, folder, uninterrupted_run, monkeypatch):
    monkeypatch.setitem(CALLBACKS, "fails", lambda config: CallAtUpdate(update, fail))
    run = Run.create(small_config(folder, **RECIPES[recipe]))
    with pytest.raises(ZeroDivisionError):
        fit(small_config(folder, **RECIPES[recipe], **{"trainer.callbacks": ["fails"]}), run, progress="none")
    status = read_status(run.dir)
    assert status["status"] == "failed" and "a defect" in status["error"] and status["step"] == update
    [earlier] = run.dir.glob("config-until-step=*.yaml")  # the configuration until the failure
    fit(load_config(earlier), run, resume=True, progress="none")
    assert run.status == "done"
    assert_identical(final_state(run), final_state(uninterrupted_run(recipe)))


@pytest.mark.parametrize("recipe", RECIPES)
def test_interrupted_twice_and_resumed(recipe, folder, uninterrupted_run, monkeypatch):
    run, saved = Run.create(small_config(folder, **RECIPES[recipe])), []
    for update in (2, 7):
        monkeypatch.setitem(CALLBACKS, "interrupts", lambda config, update=update: CallAtUpdate(update, interrupt))
        with pytest.raises(JobInterrupted, match="resume"):
            fit(
                small_config(folder, **RECIPES[recipe], **{"trainer.callbacks": ["interrupts"]}),
                run,
                resume=bool(saved),
                progress="none",
            )
        assert run.status == "interrupted"
        saved.append(read_checkpoint(run.checkpoint())["global_step"])
    assert saved == [3, 8]  # the interrupted update was finished and saved
    fit(small_config(folder, **RECIPES[recipe]), run, resume=True, progress="none")
    assert_identical(final_state(run), final_state(uninterrupted_run(recipe)))


SCRIPT = """
import os, signal, sys
import torch
from ebt_nb.config.overrides import load_config
from ebt_nb.runs.folders import Run
from ebt_nb.training.fit import fit

def write_half_a_checkpoint(content, file, save=torch.save):
    if content["global_step"] < 10: return save(content, file)
    file.write(b"half"); file.flush()
    os.kill(os.getpid(), signal.SIGKILL)

torch.save = write_half_a_checkpoint
run = Run.open(sys.argv[1])
fit(run.config, run, progress="none")
"""


def test_killed_while_saving_and_resumed(folder, uninterrupted_run, forker):
    "After kill -9 in the middle of writing a checkpoint the one before is used, and the half one is deleted."
    run = Run.create(small_config(folder))
    code, _, errors = forker.run_script(SCRIPT, run.dir)
    assert code == -signal.SIGKILL, errors
    assert any(name.endswith(".tmp~") for name in os.listdir(run.dir / "checkpoints")) and run.status == "running"
    before = read_checkpoint(run.checkpoint())["global_step"]
    assert 5 <= before < 10 and run.metrics[-1]["step"] > before
    fit(run.config, run, resume=True, progress="none")
    assert not any(name.endswith(".tmp~") for name in os.listdir(run.dir / "checkpoints")) and run.status == "done"
    assert_identical(final_state(run), final_state(uninterrupted_run("system 1")))


def test_seed(folder, uninterrupted_run):
    "The same seed gives the same numbers, another seed gives others."
    assert_identical(
        final_state(fit(small_config(folder), progress="none")), final_state(uninterrupted_run("system 1"))
    )
    other = fit(small_config(folder, **{"run.seed": 34}), progress="none")
    assert all(
        a["train/loss"] != b["train/loss"]
        for a, b in zip(other.metrics, uninterrupted_run("system 1").metrics)
        if "train/loss" in a
    )


def test_longer(folder):
    "A finished run continues when it is given more updates; its earlier metrics stay."
    run = fit(
        small_config(folder, **{"optim.decay_divisor": 1.0, "optim.warmup_steps": 0, "trainer.max_steps": 8}),
        progress="none",
    )
    before = run.metrics
    longer = small_config(folder, **{"optim.decay_divisor": 1.0, "optim.warmup_steps": 0})
    fit(longer, run, resume=True, progress="none")
    assert run.metrics[: len(before)] == before
    assert_identical(final_state(run)["state_dict"], final_state(fit(longer, progress="none"))["state_dict"])


def test_an_update_keeps_its_size_when_batches_change(folder):
    "With data.effective_batch, fewer rows at a time (as on fewer devices) are more batches of the same update."
    settings = {"model.kind": "transformer", "data.effective_batch": 8, "optim.schedule_steps": 14}
    whole = fit(small_config(folder, **settings), progress="none")
    run = fit(small_config(folder, **settings, **{"trainer.max_steps": 6}), progress="none")
    for batch_size, max_steps in [(2, 11), (8, 14)]:  # 4 batches of 2 rows, then one of 8
        changed = small_config(folder, **settings, **{"data.batch_size": batch_size, "trainer.max_steps": max_steps})
        fit(changed, run, resume=True, progress="none")
    assert (
        "2 sequences x 16 tokens x 4 accumulated x 1 processes = 8 sequences" in (run.dir / "console.log").read_text()
    )
    rows, expected = ([row for row in one.metrics if "train/loss" in row] for one in (run, whole))
    steps = [row["step"] for row in expected]
    kept = {row["step"]: row for row in rows if row["step"] in steps}  # the last update of a run is always logged
    assert list(kept) == steps and len(steps) == 7
    for row in expected:
        for name in ("train/loss", "lr"):
            assert kept[row["step"]][name] == pytest.approx(row[name], rel=1e-4), (row["step"], name)
