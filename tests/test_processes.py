"""Two processes train as one with twice the batch.

They serve the same batches, draw the same random numbers, and reach the same metrics; and they stop together.
"""

import pytest
import torch

from ebt_nb.config.overrides import build_config
from ebt_nb.runs.addresses import find_runs
from ebt_nb.training.checkpoints import read_checkpoint
from ebt_nb.training.fit import fit

FIT_WITH_INTERRUPT = """
import os, signal, sys
import lightning.pytorch as pl
from ebt_nb.config.overrides import load_config
from ebt_nb.training.callbacks import CALLBACKS
from ebt_nb.training.fit import fit

class InterruptRankZero(pl.Callback):
    def on_before_optimizer_step(self, trainer, *arguments):
        if trainer.global_step == 6 and trainer.global_rank == 0:
            os.kill(os.getpid(), signal.SIGINT)

CALLBACKS["interrupt"] = lambda config: InterruptRankZero()
fit(load_config(sys.argv[1]), progress="plain")
"""


def small_config(folder, processes, **changes):
    "A small run on so many processes, with 8 sequences in a batch of all of them."
    return build_config(
        "text/quickstart",
        {
            "model.layers": 2,
            "model.width": 32,
            "model.heads": 2,
            "data.context": 16,
            "data.batch_size": 8 // processes,
            "run.runs_dir": str(folder / "runs"),
            "thinking.noise": 0.5,
            "thinking.random_step_size": 2.0,
            "thinking.visits_max": 2,
            "trainer.devices": processes,
            "trainer.accelerator": "cpu",
            "trainer.threads": 1,
            "trainer.accumulate_grad_batches": 2,
            "trainer.max_steps": 10,
            "trainer.val_every": 4,
            "trainer.val_batches": 3,
            "trainer.log_every": 2,
            "trainer.checkpoint_every": 5,
            "optim.warmup_steps": 4,
        }
        | changes,
    )


def test_two_processes_are_one(tmp_path, forker):
    one_process = fit(small_config(tmp_path, 1), progress="none")
    config_file = tmp_path / "two.yaml"
    config_file.write_text(small_config(tmp_path, 2, **{"trainer.callbacks": ["interrupt"]}).to_yaml())
    ended = forker.run_ranks(config_file, setup=FIT_WITH_INTERRUPT, function="run_script")
    run, *others = [found for found in find_runs(tmp_path / "runs") if found.dir != one_process.dir]
    assert run.status == "interrupted" and not others, ended
    checkpoint = read_checkpoint(run.checkpoint())
    # Both ranks stopped after the update in which one of them was interrupted.
    assert (checkpoint["global_step"], checkpoint["micro_steps"]) == (7, 14)
    log = (run.dir / "console.log").read_text()
    assert "4 sequences x 16 tokens x 2 accumulated x 2 processes = 16 sequences" in log
    fit(small_config(tmp_path, 1), run, resume=True, progress="none")  # one process resumes
    for resumed, expected in zip(run.metrics, one_process.metrics, strict=True):
        assert resumed.keys() == expected.keys()
        for name in resumed.keys() - {"tokens_per_second"}:
            assert resumed[name] == pytest.approx(expected[name], rel=1e-4), name
    resumed, expected = (read_checkpoint(found.checkpoint())["state_dict"] for found in (run, one_process))
    for a, b in zip(resumed.values(), expected.values()):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_a_divided_model_is_one(tmp_path, forker):
    """Two processes that divide an energy model resume what one began, and one goes on.

    Losses, gradient norms and weights are those of one process: through the second order of the training step, and for
    alpha and the learned noise, which are not divided.
    """
    changes = {
        "model.layers": 1,
        "optim.schedule_steps": 6,
        "thinking.learn_noise": True,
        "trainer.log_clipped_share": True,
    }
    changes |= {"trainer.log_every": 1, "trainer.gradient_clip_norm": 0.5}
    expected = fit(small_config(tmp_path, 1, **changes, **{"trainer.max_steps": 6}), progress="none")
    run = fit(small_config(tmp_path, 1, **changes, **{"trainer.max_steps": 2}), progress="none")
    divided = ["trainer.devices=2", "data.batch_size=4", "trainer.strategy=fsdp", "trainer.max_steps=4"]
    words = ["train", "--resume", run.dir, "--as-rank", *(word for setting in divided for word in ("-p", setting))]
    for code, _out, err in forker.run_ranks(*words):
        assert code == 0, err
    assert read_checkpoint(run.checkpoint())["global_step"] == 4
    fit(small_config(tmp_path, 1, **changes, **{"trainer.max_steps": 6}), run, resume=True, progress="none")
    rows, expected_rows = ([row for row in one.metrics if "train/loss" in row] for one in (run, expected))
    for row, expected_row in zip(rows, expected_rows, strict=True):
        for name in row.keys() - {"tokens_per_second"}:
            assert row[name] == pytest.approx(expected_row[name], rel=1e-4), (row["step"], name)
    checkpoint, expected_checkpoint = (read_checkpoint(one.checkpoint()) for one in (run, expected))
    assert checkpoint["state_dict"].keys() == expected_checkpoint["state_dict"].keys()
    for name, weights in checkpoint["state_dict"].items():
        torch.testing.assert_close(weights, expected_checkpoint["state_dict"][name], rtol=1e-3, atol=1e-4)
    states = [each["optimizer_states"][0] for each in (checkpoint, expected_checkpoint)]
    assert states[0]["param_groups"] == states[1]["param_groups"]
    for number, values in states[0]["state"].items():
        torch.testing.assert_close(values, states[1]["state"][number], rtol=1e-2, atol=1e-5)
