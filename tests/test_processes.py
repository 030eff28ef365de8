"""Two processes train as one with twice the batch: same batches, same random numbers, same figures; and stop together."""

import subprocess
import sys

import pytest
import torch

from ebt_nb.config.config import build_config
from ebt_nb.runs.folders import find_runs
from ebt_nb.training.fit import fit
from ebt_nb.training.base import read_checkpoint

SCRIPT = """
import os, signal, sys
import lightning.pytorch as pl
from ebt_nb.config.config import load_config
from ebt_nb.training.callbacks import CALLBACKS
from ebt_nb.training.fit import fit

class CtrlC(pl.Callback):
    def on_before_optimizer_step(self, trainer, *arguments):
        if trainer.global_step == 6 and trainer.global_rank == 0: os.kill(os.getpid(), signal.SIGINT)

CALLBACKS["ctrl_c"] = lambda config: CtrlC()
fit(load_config(sys.argv[1]), progress="plain")
"""


def config(folder, processes, **changes):
    return build_config(
        "text/quickstart",
        {
            "model.layers": 2,
            "model.width": 32,
            "model.heads": 2,
            "data.context": 16,
            "data.batch_size": 8 // processes,
            "data.max_documents": 200,
            "data.cache_dir": str(folder / "cache"),
            "run.runs_dir": str(folder / "runs"),
            "thinking.noise": 0.5,
            "thinking.random_step_size": 2.0,
            "thinking.visits_max": 2,
            "trainer.devices": processes,
            "trainer.accelerator": "cpu",
            "trainer.threads": 1,
            "trainer.accumulate": 2,
            "trainer.max_steps": 10,
            "trainer.val_every": 4,
            "trainer.val_batches": 3,
            "trainer.log_every": 2,
            "trainer.checkpoint_every": 5,
            "optim.warmup_steps": 4,
        }
        | changes,
    )


def test_two_processes_are_one(tmp_path):
    alone = fit(config(tmp_path, 1), progress="none")
    script, both = tmp_path / "script.py", tmp_path / "both.yaml"
    script.write_text(SCRIPT)
    both.write_text(config(tmp_path, 2, **{"trainer.callbacks": ["ctrl_c"]}).to_yaml())
    process = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            "2",
            str(script),
            str(both),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    run, *others = [found for found in find_runs(tmp_path / "runs") if found.dir != alone.dir]
    assert run.status == "interrupted" and not others, process.stderr
    checkpoint = read_checkpoint(run.checkpoint())
    assert (checkpoint["global_step"], checkpoint["micro_steps"]) == (
        7,
        14,
    )  # both ranks stopped after the update in which one was told to
    assert (
        "4 sequences x 16 tokens x 2 accumulated x 2 processes = 16 sequences" in (run.dir / "console.log").read_text()
    )
    fit(config(tmp_path, 1), run, resume=True, progress="none")  # and one process goes on
    for ours, theirs in zip(run.metrics, alone.metrics, strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours.keys() - {"tokens_per_second"}:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4), name
    for a, b in zip(
        read_checkpoint(run.checkpoint())["state_dict"].values(),
        read_checkpoint(alone.checkpoint())["state_dict"].values(),
    ):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
