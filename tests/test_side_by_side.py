"Several runs side by side, interrupted: all stop where they can be resumed, and the same call ends them as if nothing had been."

import os
import signal
import subprocess
import sys
import time

from ebt_nb.config.config import build_config, load_config
from ebt_nb.jobs.parallel import fit_many
from ebt_nb.runs.folders import Run, is_run
from ebt_nb.training.fit import fit

SCRIPT = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)          # where the tests are a shell's background job, it is ignored
from ebt_nb.config.config import load_config
from ebt_nb.jobs.parallel import fit_many
from pathlib import Path
fit_many({path.stem: load_config(path) for path in sorted(Path(sys.argv[1]).glob("*.yaml"))}, sys.argv[2], processes=2)
"""


def test_interrupted_runs_go_on(tmp_path):
    "Interrupted twice: the caller alone is told, as by a scheduler; then the whole group, as at a terminal."
    for seed in (1, 2, 3):
        config = build_config(
            "text/quickstart",
            {
                "model.layers": 1,
                "model.width": 16,
                "model.heads": 2,
                "data.context": 16,
                "data.batch_size": 2,
                "run.seed": seed,
                "trainer.threads": 1,
                "trainer.max_steps": 240,
                "trainer.val_every": 240,
                "trainer.val_batches": 1,
                "trainer.checkpoint_every": 50,
                "trainer.log_every": 5,
            },
        )
        (tmp_path / f"seed-{seed}.yaml").write_text(config.to_yaml())
    (tmp_path / "script.py").write_text(SCRIPT)
    folders = [tmp_path / "runs" / f"seed-{seed}" for seed in (1, 2, 3)]

    def rows(folder):
        return len(Run.open(folder).metrics) if is_run(folder) else 0

    for tell in (os.kill, os.killpg):
        before, until = [rows(folder) for folder in folders], time.monotonic() + 120
        process = subprocess.Popen(
            [sys.executable, str(tmp_path / "script.py"), str(tmp_path), str(tmp_path / "runs")],
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        while not all(rows(folder) > had + 3 for folder, had in zip(folders[:2], before)):
            assert process.poll() is None and time.monotonic() < until
            time.sleep(0.05)
        tell(process.pid, signal.SIGINT)
        assert "KeyboardInterrupt" in process.communicate(timeout=60)[1] and process.returncode
        assert [Run.open(folder).status for folder in folders] == [
            "interrupted",
            "interrupted",
            "running",
        ] and not rows(folders[2])

    said = []
    runs = fit_many(
        {folder.name: load_config(tmp_path / f"{folder.name}.yaml") for folder in folders},
        tmp_path / "runs",
        processes=2,
        say=said.append,
    )
    assert [run.status for run in runs.values()] == ["done"] * 3 and len(said) == 3, said
    alone = fit(runs["seed-1"].config, Run.create(runs["seed-1"].config, tmp_path / "alone"), progress="none")
    for ours, theirs in zip(runs["seed-1"].metrics, alone.metrics, strict=True):
        assert {key: value for key, value in ours.items() if key != "tokens_per_second"} == {
            key: value for key, value in theirs.items() if key != "tokens_per_second"
        }
