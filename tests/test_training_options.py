"""What may be switched on while training: it says more about a run, and changes none of its numbers."""

import re

import pytest

from ebt_nb.config.errors import ConfigError
from ebt_nb.config.overrides import build_config
from ebt_nb.runs.folders import checkpoint_step
from ebt_nb.training.fit import fit


def small_config(folder, preset="text/quickstart", **changes):
    "Return a configuration of six updates of a tiny model, with keys changed."
    small = {
        "model.layers": 1,
        "model.width": 16,
        "model.heads": 2,
        "data.batch_size": 2,
        "run.runs_dir": str(folder / "runs"),
        "trainer.max_steps": 6,
        "trainer.val_every": 2,
        "trainer.val_batches": 2,
        "trainer.log_every": 1,
        "trainer.threads": 1,
        "trainer.accelerator": "cpu",
        "optim.warmup_steps": 2,
    }
    if preset.startswith("image/"):
        small |= {"data.image_size": 8, "data.max_documents": 50}
    elif preset.startswith("video/"):
        small |= {"data.image_size": 8, "data.context": 4, "data.decode": "on_the_fly", "data.max_documents": 50}
    else:
        small |= {"data.context": 8, "data.tokenizer": "austen_2k", "model.vocab_size": 2048}
    return build_config(preset, small | changes)


OBSERVERS = {
    "tracking.samples_every": 3,
    "tracking.tensorboard": True,
    "trainer.profiler": "pytorch",
    "trainer.sanity_val_batches": 1,
    "trainer.log_memory": True,
    "trainer.log_clipped_share": True,
    "trainer.deterministic": True,
    "trainer.detect_anomaly": True,
}


@pytest.mark.parametrize("preset", ["text/quickstart", "image/quickstart"])
def test_observing_a_run_changes_none_of_its_numbers(tmp_path, preset):
    plain, observed = (fit(small_config(tmp_path, preset, **keys), progress="none") for keys in ({}, OBSERVERS))
    extra = {"memory_gib", "train/clipped_share"}
    for before, after in zip(plain.metrics, observed.metrics, strict=True):
        same = {name for name in before if not name.endswith("_per_second")}
        assert {name: before[name] for name in same} == {name: after[name] for name in same}
        assert after.keys() - before.keys() == (extra if "train/loss" in after else set())
    assert 0 < observed.metrics[0]["memory_gib"] < 100 and 0 <= observed.metrics[0]["train/clipped_share"] <= 1
    suffix = "txt" if preset.startswith("text/") else "png"
    assert sorted(path.name for path in (observed.dir / "samples").iterdir()) == [
        f"step=000003.{suffix}",
        f"step=000006.{suffix}",
    ]
    assert len(list((observed.dir / "profile").iterdir())) == 3
    log = (observed.dir / "console.log").read_text()
    assert "validation was tried" in log and f"profile: {observed.dir}/profile; " in log
    assert sorted({path.name for path in observed.dir.iterdir()} - {path.name for path in plain.dir.iterdir()}) == [
        "profile",
        "samples",
        "tensorboard",
    ]
    assert "parameters: " in (plain.dir / "model.txt").read_text()


def test_best_checkpoints_by_another_metric_and_early_stopping(tmp_path):
    "PSNR in its wrong direction: the first validations stay the best, and training stops when patience ends."
    keys = {
        "trainer.monitor": "val/psnr",
        "trainer.monitor_mode": "min",
        "trainer.keep_best": 2,
        "trainer.callbacks": ["early_stopping"],
        "trainer.patience": 2,
        "trainer.max_steps": 20,
        "optim.peak_lr": 1e-2,
    }
    run = fit(small_config(tmp_path, "image/quickstart", **keys), progress="none")
    values = {row["step"]: row["val/psnr"] for row in run.metrics if "val/psnr" in row}
    assert list(values.values()) == sorted(values.values()) and list(values) == [2, 4, 6] and run.status == "done"
    assert "stopped early: val/psnr was not better than" in (run.dir / "console.log").read_text()
    assert run.best_steps == [2, 4] and checkpoint_step(run.checkpoint("best")) == 2
    assert checkpoint_step(run.checkpoint("step=4")) == 4
    assert {path.stem for path in (run.dir / "checkpoints").iterdir()} == {"best", "last", "step=000002", "step=000004"}


@pytest.mark.parametrize(
    "preset, keys, parts",
    [
        ("text/quickstart", {"trainer.monitor": "val/psnr"}, ["'val/psnr' is not measured", "val/perplexity"]),
        ("image/quickstart", {"trainer.monitor": "val/pnsr"}, ["did you mean 'val/psnr'", "val/loss_step_1"]),
        ("text/quickstart", {"objective.soft_targets": 0.1, "objective.label_smoothing": 0.2}, ["not above it"]),
        ("text/quickstart", {"thinking.learn_noise": True}, ["thinking.learn_noise", "set thinking.noise"]),
        ("text/quickstart", {"data.prefetch": 4}, ["data.prefetch", "data.workers"]),
    ],
)
def test_an_option_without_effect_is_refused(tmp_path, preset, keys, parts):
    with pytest.raises(ConfigError) as error:
        fit(small_config(tmp_path, preset, **keys), progress="none")
    assert all(part in str(error.value) for part in parts), error.value
    assert not (tmp_path / "runs").exists()


def test_learned_noise_and_soft_targets(tmp_path):
    "The noise stays as it is until warm-up is over, and is a metric; resuming continues with it."
    keys = {"thinking.noise": 0.3, "thinking.learn_noise": True, "objective.soft_targets": 0.2}
    run = fit(small_config(tmp_path, "text/quickstart_s1", **keys), progress="none")
    noise = [row["train/noise"] for row in run.metrics if "train/noise" in row]
    assert len(noise) == 6 and len(set(noise[:3])) == 1 and len(set(noise[2:])) == 4  # moved by updates 3, 4, 5
    longer = small_config(tmp_path, "text/quickstart_s1", **keys, **{"trainer.max_steps": 8})
    again = fit(longer, run, resume=True, progress="none")
    resumed = [row["train/noise"] for row in again.metrics if "train/noise" in row]
    assert resumed[:6] == noise and len(resumed) == 8 and resumed[6] != noise[5]


def test_fast_dev_run_leaves_nothing(tmp_path, forker):
    (tmp_path / "run.yaml").write_text(small_config(tmp_path, **{"trainer.max_steps": 5000}).to_yaml())
    code, out, err = forker.run("train", "run.yaml", "--fast-dev-run", cwd=tmp_path)
    assert code == 0 and "step 1/1" in out and out.endswith("; nothing was kept\n"), (out, err)
    assert not (tmp_path / "runs").exists()
    code, _, err = forker.run("train", "--resume", "some/run", "--fast-dev-run", cwd=tmp_path)
    assert code == 2 and "--fast-dev-run: keeps nothing" in err


def test_overfitting_clips_is_measured_against_a_copied_frame(tmp_path, forker):
    config = small_config(tmp_path, "video/quickstart", **{"model.width": 64, "optim.peak_lr": 5e-3})
    (tmp_path / "run.yaml").write_text(config.to_yaml())
    code, out, err = forker.run("overfit", "run.yaml", "--updates", 300, "--interval", 100, cwd=tmp_path)
    assert code == 0 and "update  100  loss" in out and "memorised: loss 0.0" in out, (out, err)
    code, out, err = forker.run("overfit", "run.yaml", "--updates", 2, cwd=tmp_path)
    target, chance = map(float, re.search(r"the target is (\S+); the loss at chance is (\S+)\.", err).groups())
    assert code == 1 and "experiments/inspect_video" in err and abs(5 * target / chance - 1) < 0.01, err
