"""Runs in parallel, interrupted: all stop where they can be resumed.

The same call then finishes them as if they had not been interrupted.
"""

import os
import signal
import sys
import time

from ebt_nb.config.overrides import build_config, load_config
from ebt_nb.jobs.parallel import fit_many
from ebt_nb.runs.folders import Run, is_run_folder
from ebt_nb.training.fit import fit

# training waits for a signal before every twentieth update, so that no run ends before it is interrupted
PAUSING = """
import time
from ebt_nb.training.checkpoint_saving import CheckpointSaver

def wait_for_signal(self, trainer, *args):
    while trainer.global_step and trainer.global_step % 20 == 0 and self.stop.received is None:
        time.sleep(0.02)

assert "on_train_batch_start" not in vars(CheckpointSaver)
CheckpointSaver.on_train_batch_start = wait_for_signal
"""
SCRIPT = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)          # it is ignored in a background job of a shell
from ebt_nb.config.overrides import load_config
from ebt_nb.jobs.parallel import ForkServer, fit_many
from ebt_nb.runs.fork_server import PRELOADED
from pathlib import Path
configs = {path.stem: load_config(path) for path in sorted(Path.cwd().glob("*.yaml"))}
ForkServer.__init__.__defaults__ = ((*PRELOADED, "pausing"), None)
fit_many(configs, "runs", processes=2)
"""
TINY = {
    "model.layers": 1,
    "model.width": 16,
    "model.heads": 2,
    "data.context": 16,
    "data.batch_size": 2,
    "trainer.threads": 1,
    "trainer.max_steps": 80,
    "trainer.val_every": 80,
    "trainer.val_batches": 1,
    "trainer.checkpoint_every": 50,
    "trainer.log_every": 5,
}
LONG = 600  # seconds after which waiting is given up


def count_rows(folder):
    return len(Run.open(folder).metrics) if is_run_folder(folder) else 0


def test_interrupted_runs_are_resumed(tmp_path, forker):
    """Interrupted twice: first the caller alone gets the signal, as from a scheduler; then the whole process group.

    A terminal sends Ctrl-C to the group.
    """
    for seed in (1, 2, 3):
        config = build_config("text/quickstart", TINY | {"run.seed": seed})
        (tmp_path / f"seed-{seed}.yaml").write_text(config.to_yaml())
    (tmp_path / "pausing.py").write_text(PAUSING)
    folders = [tmp_path / "runs" / f"seed-{seed}" for seed in (1, 2, 3)]

    for send_signal in (os.kill, os.killpg):
        rows_before = [count_rows(folder) for folder in folders]
        errors = tmp_path / f"{send_signal.__name__}.log"
        path = {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
        process = forker.start(setup=SCRIPT, cwd=tmp_path, err=errors, environment=path)
        deadline = time.monotonic() + LONG
        while not all(count_rows(folder) > rows + 3 for folder, rows in zip(folders[:2], rows_before)):
            assert forker.is_running(process) and time.monotonic() < deadline
            time.sleep(0.05)
        send_signal(process, signal.SIGINT)
        assert forker.wait(process) and "KeyboardInterrupt" in errors.read_text()
        assert [Run.open(folder).status for folder in folders] == ["interrupted", "interrupted", "running"]
        assert not count_rows(folders[2])

    lines = []
    configs = {folder.name: load_config(tmp_path / f"{folder.name}.yaml") for folder in folders}
    runs = fit_many(configs, tmp_path / "runs", processes=2, log_line=lines.append)
    assert [run.status for run in runs.values()] == ["done"] * 3 and len(lines) == 3, lines
    config = runs["seed-1"].config
    alone = fit(config, Run.create(config, tmp_path / "alone"), progress="none")
    for row, expected in zip(runs["seed-1"].metrics, alone.metrics, strict=True):
        assert row | {"tokens_per_second": 0} == expected | {"tokens_per_second": 0}
