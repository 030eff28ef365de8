"""A run whose training steps are compiled is the run without, up to rounding, through the whole of Lightning's loop."""

import csv

import pytest

from ebt_nb.config.config import ConfigError, RunConfig, build_config
from ebt_nb.compute.graph import missing_compiler
from ebt_nb.runs.folders import Run
from ebt_nb.training.fit import fit


def tiny(folder, **changes) -> RunConfig:
    return build_config(
        "text/quickstart",
        {
            "model.layers": 1,
            "model.width": 16,
            "model.heads": 2,
            "data.context": 8,
            "data.batch_size": 4,
            "data.max_documents": 200,
            "data.cache_dir": str(folder / "cache"),
            "run.runs_dir": str(folder / "runs"),
            "trainer.max_steps": 6,
            "trainer.accumulate": 2,
            "trainer.val_every": 3,
            "trainer.val_batches": 2,
            "trainer.log_every": 1,
            "trainer.checkpoint_every": 3,
            "optim.warmup_steps": 2,
        }
        | changes,
    )


def losses(run: Run) -> list[tuple[str, float]]:
    "Every loss the run has written, by name."
    with (run.dir / "metrics.csv").open() as file:
        return [
            (name, float(value))
            for row in csv.DictReader(file)
            for name, value in row.items()
            if "loss" in name and value
        ]


@pytest.mark.skipif(missing_compiler("cpu") is not None, reason="no C++ compiler")
@pytest.mark.parametrize("changes", [dict(), {"model.kind": "transformer"}], ids=["ebt", "transformer"])
def test_compiled_run(tmp_path, changes):
    eager, compiled = (
        losses(fit(tiny(tmp_path, **changes, **{"trainer.compile": compile}), progress="none"))
        for compile in (False, True)
    )
    assert len(eager) >= 8 and [name for name, _ in compiled] == [name for name, _ in eager]
    assert max(abs(a - b) for (_, a), (_, b) in zip(compiled, eager)) < 1e-4  # float32 rounding, six updates long


def test_compiler_missing(tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(
        ConfigError, match="trainer.compile: install a C.. compiler .'no-such-compiler'.*trainer.compile=false"
    ):
        fit(tiny(tmp_path, **{"trainer.compile": True, "trainer.accelerator": "cpu"}), progress="none")
    assert not (tmp_path / "runs").exists() or not list((tmp_path / "runs").iterdir())
    with pytest.raises(ConfigError, match="trainer.recompute"):
        tiny(tmp_path, **{"trainer.compile": True, "trainer.recompute": True})
