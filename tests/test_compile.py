"""A run with compiled training steps gives the losses of the run without, up to rounding, in Lightning's whole loop."""

import csv

import pytest
import torch._inductor.config

from ebt_nb.compute.graph import find_missing_compiler
from ebt_nb.config.errors import ConfigError
from ebt_nb.config.kinds import RunConfig
from ebt_nb.config.overrides import build_config
from ebt_nb.runs.folders import Run
from ebt_nb.training.fit import fit


def tiny_config(folder, preset="text/quickstart", **changes) -> RunConfig:
    shared = {
        "model.layers": 1,
        "model.width": 16,
        "model.heads": 2,
        "data.batch_size": 4,
        "run.runs_dir": str(folder / "runs"),
        "trainer.max_steps": 6,
        "trainer.accumulate_grad_batches": 2,
        "trainer.val_every": 3,
        "trainer.val_batches": 2,
        "trainer.log_every": 1,
        "trainer.checkpoint_every": 3,
        "optim.warmup_steps": 2,
    }
    if changes.get("model.kind") != "transformer":
        shared["thinking.steps"] = 1
    if preset.startswith("text/"):
        shared["data.context"] = 8
    return build_config(preset, shared | changes)


def tiny_transformer(folder, **changes) -> RunConfig:
    return tiny_config(folder, **{"model.kind": "transformer"}, **changes)


def tiny_image_config(folder, **changes) -> RunConfig:
    return tiny_config(folder, "image/quickstart", **changes)


def read_losses(run: Run) -> list[tuple[str, float]]:
    "Return the name and value of every loss in the run's metrics, in order."
    with (run.dir / "metrics.csv").open() as file:
        return [
            (name, float(value))
            for row in csv.DictReader(file)
            for name, value in row.items()
            if "loss" in name and value
        ]


@pytest.mark.skipif(find_missing_compiler("cpu") is not None, reason="no C++ compiler")
@pytest.mark.parametrize("make_config", [tiny_config, tiny_transformer, tiny_image_config])
def test_compiled_run(tmp_path, make_config):
    with torch._inductor.config.patch({"cpp.simdlen": 1}):  # without vectors, kernels are compiled in less time
        runs = [
            fit(make_config(tmp_path, **{"trainer.compile": is_compiled}), progress="none")
            for is_compiled in (False, True)
        ]
    eager, compiled = map(read_losses, runs)
    assert len(eager) >= 8 and [name for name, _ in compiled] == [name for name, _ in eager]
    assert max(abs(a - b) for (_, a), (_, b) in zip(compiled, eager)) < 1e-4  # float32 rounding over six updates


def test_compiler_missing(tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(
        ConfigError, match=r"trainer\.compile: install a C\+\+ compiler .'no-such-compiler'.*trainer.compile=false"
    ):
        fit(tiny_config(tmp_path, **{"trainer.compile": True, "trainer.accelerator": "cpu"}), progress="none")
    assert not (tmp_path / "runs").exists() or not list((tmp_path / "runs").iterdir())
    with pytest.raises(ConfigError, match=r"trainer\.activation_checkpointing"):
        tiny_config(tmp_path, **{"trainer.compile": True, "trainer.activation_checkpointing": True})
