"""Errors around training: one clear message each, nothing written, nothing lost."""

import contextlib
import hashlib
import os
import re
import resource
import signal
import subprocess
from pathlib import Path
from unittest.mock import Mock

import lightning.pytorch as pl
import pytest
import torch

import ebt_nb
from ebt_nb.config.errors import ConfigError, WorkbenchError
from ebt_nb.config.kinds import RunConfig
from ebt_nb.config.overrides import build_config
from ebt_nb.data.sources import DataError
from ebt_nb.data.tokenizers import load_tokenizer
from ebt_nb.runs.files import RunError
from ebt_nb.runs.folders import Run
from ebt_nb.runs.status import read_status
from ebt_nb.thinking.descent import DivergenceError
from ebt_nb.training.build import load_module
from ebt_nb.training.callbacks import CALLBACKS
from ebt_nb.training.checkpoints import CheckpointError, read_checkpoint
from ebt_nb.training.fit import fit


def tiny_config(folder: Path, **changes) -> RunConfig:
    return build_config(
        "text/quickstart",
        {
            "model.layers": 2,
            "model.width": 32,
            "model.heads": 2,
            "data.context": 16,
            "data.batch_size": 4,
            "run.runs_dir": str(folder / "runs"),
            "trainer.max_steps": 8,
            "trainer.val_every": 4,
            "trainer.val_batches": 2,
            "trainer.log_every": 2,
            "trainer.checkpoint_every": 3,
            "trainer.threads": 1,
            "optim.warmup_steps": 2,
        }
        | changes,
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Run:
    return fit(tiny_config(tmp_path_factory.mktemp("trained") / "runs"), progress="none")


@pytest.fixture
def run(trained, tmp_path) -> Run:
    "A copy of a finished run, which a test may damage."
    subprocess.run(["cp", "-r", str(trained.dir), str(tmp_path / "run")], check=True)
    return Run.open(tmp_path / "run")


def file_hashes(folder: Path) -> dict[str, str]:
    "Every path below a folder, with the hash of its content."
    hashes = {}
    for path in sorted(folder.rglob("*")):
        hashes[str(path.relative_to(folder))] = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
    return hashes


@contextlib.contextmanager
def expect_refusal(kind: type, folder: Path, *parts: str):
    "The block raises one error of this kind, naming all `parts`, and changes nothing below `folder`."
    before = file_hashes(folder)
    with pytest.raises(kind) as caught:
        yield
    message = str(caught.value)
    assert all(part in message for part in parts), message
    assert isinstance(caught.value, WorkbenchError)
    assert file_hashes(folder) == before


def resume(run: Run, **changes) -> Run:
    "Resume a run, with another configuration if there are changes."
    config = tiny_config(run.dir.parent, **changes) if changes else run.config.model_copy(deep=True)
    return fit(config, run, resume=True, progress="none")


def assert_equal_weights(run: Run, other: Run) -> None:
    "The last checkpoints of two runs have the same weights, to the bit."
    weights, expected = (read_checkpoint(one.checkpoint())["state_dict"] for one in (run, other))
    assert weights.keys() == expected.keys()
    for name in weights:
        assert torch.equal(weights[name], expected[name]), name


@pytest.mark.parametrize("damage", ["truncated", "empty", "text", "one byte short"])
def test_a_damaged_checkpoint_is_refused(run, damage):
    path = run.checkpoint()
    data = path.read_bytes()
    damaged = {
        "truncated": data[: len(data) // 2],
        "empty": b"",
        "text": b"these are no weights",
        "one byte short": data[:-1],
    }
    path.write_bytes(damaged[damage])
    with expect_refusal(CheckpointError, run.dir, "last.ckpt", "not a checkpoint, or only part of one"):
        resume(run)
    with expect_refusal(CheckpointError, run.dir, "last.ckpt", "another checkpoint"):
        load_module(path)
    assert fit(run.config, run, resume="best", progress="none").status == "done"  # the remedy works


class PickledCode:
    "An object whose unpickling makes a folder."

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


def test_pickled_code_is_not_run(run):
    path, proof = run.checkpoint(), run.dir.parent / "proof"
    torch.save(read_checkpoint(path) | {"extra": PickledCode(proof)}, path)
    with expect_refusal(CheckpointError, run.dir, "last.ckpt", "pickled code", "not run"):
        resume(run)
    with expect_refusal(CheckpointError, run.dir, "last.ckpt", "pickled code"):
        load_module(path)
    assert not proof.exists()


def test_a_checkpoint_of_another_program_is_refused(run):
    torch.save({"state_dict": {}, "epoch": 3}, run.checkpoint())
    with expect_refusal(CheckpointError, run.dir, "last.ckpt", "no checkpoint of this workbench"):
        resume(run)


def test_another_tokenizer_is_refused(run, tmp_path):
    "A tokenizer with the same entries and as many ids, from a file with other bytes."
    other = tmp_path / "other.json"
    embedded = Path(ebt_nb.__file__).parent / "assets/tokenizers/austen_bpe_2k.json"
    other.write_bytes(embedded.read_bytes() + b"\n")
    config = run.config.model_copy(deep=True)
    config.data.tokenizer = str(other)
    config.data.cache_dir = tmp_path / "cache"
    with expect_refusal(CheckpointError, run.dir, "last.ckpt", "'austen_2k'", "other.json", "data.tokenizer"):
        fit(config, run, resume=True, progress="none")
    with expect_refusal(CheckpointError, run.dir, "'austen_2k'", "other.json"):
        load_module(run.checkpoint(), load_tokenizer(str(other)))
    assert load_module(run.checkpoint(), load_tokenizer("austen_2k")).micro_steps == 8


@pytest.mark.parametrize(
    "changes, kind, parts",
    [
        ({"model.width": 64}, CheckpointError, ["model.width is 64, in the checkpoint 32"]),
        (
            {"model.conditioning": "adaln", "thinking.steps": 3},
            CheckpointError,
            ["model.conditioning is adaln, in the checkpoint step_embed", "thinking.steps is 3, in the checkpoint 2"],
        ),
        ({"optim.name": "lars"}, CheckpointError, ["optim.name is lars, in the checkpoint adamw", "config.yaml"]),
        (
            {"optim.peak_lr": 0.1, "trainer.accumulate_grad_batches": 2},
            CheckpointError,
            ["optim.peak_lr is 0.1", "trainer.accumulate_grad_batches is 2, in the checkpoint 1"],
        ),
        ({"run.seed": 34}, DataError, ["seed 33", "seed 34"]),
        ({"data.context": 32}, DataError, ["other data"]),
    ],
)
def test_another_configuration_is_refused(run, changes, kind, parts):
    with expect_refusal(kind, run.dir, *parts):
        resume(run, **changes)


def test_a_trained_run_is_not_overwritten(run):
    with expect_refusal(RunError, run.dir, str(run.dir), "nothing is overwritten", "resume"):
        fit(run.config, run, progress="none")
    with expect_refusal(RunError, run.dir, "no checkpoint 'step=5'", "best, last"):
        fit(run.config, run, resume="step=5", progress="none")


@pytest.mark.parametrize(
    "changes, parts",
    [
        (
            {"trainer.callbacks": ["early_stoping"]},
            ["trainer.callbacks", "'early_stoping'", "did you mean 'early_stopping'"],
        ),
        ({"trainer.devices": 4}, ["trainer.devices", "4 processes", "torchrun"]),
        ({"trainer.accelerator": "abacus"}, ["trainer.accelerator=abacus"]),
        (
            {"trainer.accelerator": "cpu", "trainer.precision": "16-mixed"},
            ["trainer.precision: 16-mixed", "trainer.precision=32-true"],
        ),
        pytest.param(
            {"trainer.accelerator": "gpu"},
            ["trainer.accelerator=gpu"],
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU"),
        ),
    ],
)
def test_an_impossible_run_makes_no_folder(tmp_path, changes, parts):
    (tmp_path / "here").mkdir()
    with expect_refusal(ConfigError, tmp_path / "here", *parts):
        fit(tiny_config(tmp_path / "here", **changes), progress="none")


@pytest.mark.parametrize(
    "variables, parts",
    [
        ({"WANDB_PROJECT": "team/project"}, ["WANDB_PROJECT", "holds /"]),
        ({"WANDB_MODE": "sometimes"}, ["WANDB_MODE", "'sometimes'", "offline"]),
        ({"WANDB_BASE_URL": "nowhere"}, ["WANDB_BASE_URL", "valid URL"]),
    ],
)
def test_an_impossible_environment_makes_no_folder(tmp_path, monkeypatch, variables, parts):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "here").mkdir()
    with expect_refusal(WorkbenchError, tmp_path / "here", *parts):
        fit(tiny_config(tmp_path / "here", **{"tracking.wandb": "offline"}), progress="none")


def test_wandb_is_off_where_the_environment_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    run = fit(tiny_config(tmp_path, **{"tracking.wandb": "online"}), progress="none")
    assert run.status == "done" and not (run.dir / "wandb").exists()
    assert "tracking.wandb: online is off here" in (run.dir / "console.log").read_text()


def test_a_missing_corpus_makes_no_folder(tmp_path):
    (tmp_path / "here").mkdir()
    with expect_refusal(DataError, tmp_path / "here", "no_such_file.txt"):
        fit(tiny_config(tmp_path / "here", **{"data.source": "./no_such_file.txt"}), progress="none")


def test_a_runs_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "runs").write_text("a file where a folder should be")
    with expect_refusal(RunError, tmp_path / "here", "run.runs_dir"):
        fit(tiny_config(tmp_path / "here"), progress="none")


def test_a_checkpoints_folder_that_cannot_be_written_is_refused(run, monkeypatch):
    "This is found before training, not at the first checkpoint."

    def deny(*arguments, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("ebt_nb.training.run_folder.tempfile.TemporaryFile", deny)
    with expect_refusal(RunError, run.dir, "checkpoints: cannot be written (Permission denied)", "run.runs_dir"):
        resume(run)


@pytest.mark.parametrize("error, status", [(OSError(5, "Input/output error"), "failed"), (SystemExit(), "interrupted")])
def test_an_error_before_the_first_update_ends_the_status(tmp_path, monkeypatch, error, status):
    "The folder exists by then, and must not look like a run that trains."
    monkeypatch.setattr("ebt_nb.training.fit.prepare_run_folder", Mock(side_effect=error))
    with pytest.raises(type(error)):
        fit(tiny_config(tmp_path), progress="none")
    [path] = (tmp_path / "runs").rglob("status.json")
    assert read_status(path.parent)["status"] == status and type(error).__name__ in read_status(path.parent)["error"]


class FullDisk(pl.Callback):
    "From update 6 on, no file can grow beyond a few kilobytes: metrics still fit, a checkpoint does not."

    def on_train_batch_start(self, trainer, *arguments):
        if trainer.global_step == 5:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))


def test_a_full_disk_while_saving(tmp_path, monkeypatch, trained):
    "The checkpoint before stays, the run is marked as failed, and can be resumed when there is space again."
    monkeypatch.setitem(CALLBACKS, "full_disk", lambda config: FullDisk())
    run = Run.create(tiny_config(tmp_path))
    try:
        with pytest.raises(CheckpointError, match=r"last.ckpt.*File too large.*intact.*resume"):
            fit(tiny_config(tmp_path, **{"trainer.callbacks": ["full_disk"]}), run, progress="none")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    status = read_status(run.dir)
    assert status["status"] == "failed" and "File too large" in status["error"] and status["step"] == 6
    assert sorted(os.listdir(run.dir / "checkpoints")) == ["best.ckpt", "last.ckpt"]
    assert read_checkpoint(run.checkpoint())["global_step"] == 4
    fit(tiny_config(tmp_path), run, resume=True, progress="none")
    assert run.status == "done"
    assert_equal_weights(run, trained)


class WriteNaN(pl.Callback):
    "Puts a NaN into the weights after an update."

    def on_train_batch_end(self, trainer, module, *arguments):
        if trainer.global_step == 5:
            with torch.no_grad():
                module.model.blocks[0].ffn.down.weight[0, 0] = torch.nan


@pytest.mark.parametrize(
    "kind, parts", [("ebt", ["thinking step 0", "thinking.step_size"]), ("transformer", ["update 6", "optim.peak_lr"])]
)
def test_divergence_keeps_the_checkpoint_before(tmp_path, monkeypatch, kind, parts):
    monkeypatch.setitem(CALLBACKS, "write_nan", lambda config: WriteNaN())
    run = Run.create(tiny_config(tmp_path, **{"model.kind": kind}))
    with pytest.raises(DivergenceError) as caught:
        fit(tiny_config(tmp_path, **{"model.kind": kind, "trainer.callbacks": ["write_nan"]}), run, progress="none")
    assert all(part in str(caught.value) for part in parts), str(caught.value)
    assert run.status == "failed" and load_module(run.checkpoint()).micro_steps == 4


class NaNInValidation(pl.Callback):
    "Makes the loss of the second validation NaN, and counts what is trained."

    updates = 0

    def on_train_batch_end(self, *arguments):
        self.updates += 1

    def on_validation_start(self, trainer, module):
        if trainer.global_step == 8:
            measure = module.validation_metrics
            module.validation_metrics = lambda batch: self.spoil(*measure(batch))

    def spoil(self, metrics, count):
        return {name: loss * torch.nan for name, loss in metrics.items()}, count


def test_a_validation_that_is_not_a_number_ends_the_run(tmp_path, monkeypatch):
    "No update follows it, and neither a checkpoint nor a row of metrics is made of it."
    callback = NaNInValidation()
    monkeypatch.setitem(CALLBACKS, "nan_in_validation", lambda config: callback)
    changes = {"trainer.callbacks": ["nan_in_validation"], "trainer.max_steps": 16, "trainer.log_every": 100}
    run = Run.create(tiny_config(tmp_path, **changes))
    with pytest.raises(DivergenceError, match="update 8: the validation loss is not finite"):
        fit(run.config, run, progress="none")
    assert callback.updates == 8
    status = read_status(run.dir)
    assert status["status"] == "failed" and status["step"] == 8 and "DivergenceError: update 8" in status["error"]
    assert [row["step"] for row in run.metrics if "val/loss" in row] == [4]
    assert {read_checkpoint(path)["global_step"] for path in run.checkpoints} == {4, 6}
    assert read_checkpoint(run.checkpoint("best"))["global_step"] == 4


TRAIN_AND_PRESS_CTRL_C = """
import os, signal, sys
import lightning.pytorch as pl
from ebt_nb.runs.folders import Run
from ebt_nb.training.callbacks import CALLBACKS
from ebt_nb.training.fit import fit

class PressCtrlC(pl.Callback):
    def on_train_batch_start(self, trainer, *arguments):
        if trainer.global_step == 5:
            for _ in range(int(sys.argv[2])): os.kill(os.getpid(), signal.SIGINT)

CALLBACKS["ctrl_c"] = lambda config: PressCtrlC()
run = Run.open(sys.argv[1])
fit(run.config, run, progress="plain")
print("not stopped")
"""


@pytest.mark.parametrize("presses, saved", [(1, 6), (2, 4)])
def test_ctrl_c(tmp_path, presses, saved, trained, forker):
    "Ctrl-C once finishes the update and saves; twice stops at once. Both runs are resumed to the same end."
    run = Run.create(tiny_config(tmp_path, **{"trainer.callbacks": ["ctrl_c"]}))
    code, out, errors = forker.run_script(TRAIN_AND_PRESS_CTRL_C, run.dir, presses)
    assert code != 0 and "not stopped" not in out
    assert f"JobInterrupted: {run.dir}: interrupted; resume with" in errors
    assert run.status == "interrupted" and read_checkpoint(run.checkpoint())["global_step"] == saved
    assert re.search(r"SIGINT: stopping after this update", out)
    fit(tiny_config(tmp_path), run, resume=True, progress="none")
    assert run.status == "done"
    assert_equal_weights(run, trained)
    assert not any("lightning_logs" in str(path) for path in tmp_path.rglob("*"))
    assert "warn" not in errors.lower()


def test_fit_leaves_the_process_as_it_was(tmp_path, capfd, monkeypatch):
    "Threads, signal handlers, random state and environment are unchanged; nothing is printed or left behind."
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(1)

    def state():
        return (
            torch.get_num_threads(),
            signal.getsignal(signal.SIGINT),
            signal.getsignal(signal.SIGTERM),
            dict(os.environ),
            torch.get_rng_state().tolist(),
        )

    before = state()
    fit(tiny_config(tmp_path), progress="none")
    assert state() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["runs"]
    assert "".join(capfd.readouterr()) == ""
