"""The main job, end to end at toy size: what `job_scripts/quickstart.sh` starts after setting up."""

import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from ebt_nb.config.config import load_config
from ebt_nb.runs.folders import Run

TOY = {
    "model.width": 32,
    "model.heads": 2,
    "model.layers": 1,
    "data.context": 64,
    "data.batch_size": 8,
    "trainer.max_steps": 6,
    "trainer.val_every": 3,
    "trainer.val_batches": 8,
    "trainer.checkpoint_every": 3,
    "trainer.log_every": 1,
    "trainer.threads": 1,
    "inference.max_new_tokens": 5,
}


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    "The finished process and its experiment folder."
    folder = tmp_path_factory.mktemp("quickstart")
    options = [f"-p{key}={value}" for key, value in {**TOY, "data.cache_dir": folder / "cache"}.items()]
    done = subprocess.run(
        [
            Path(sys.executable).with_name("ebt"),
            "run",
            "pretrain",
            "--preset",
            "text/quickstart",
            "--runs-dir",
            folder / "runs",
            *options,
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done, next((folder / "runs/text/quickstart").iterdir())


def test_two_runs_that_differ_in_the_model_alone(job):
    runs = {name: Run.open(job[1] / name) for name in ("ebt", "transformer")}
    assert {run.status for run in runs.values()} == {"done"}
    trees = {name: load_config(run.dir / "config.yaml").model_dump() for name, run in runs.items()}
    assert (trees["ebt"]["model"].pop("kind"), trees["transformer"]["model"].pop("kind")) == ("ebt", "transformer")
    assert trees["ebt"] == trees["transformer"]
    for run in runs.values():
        assert [row["step"] for row in run.metrics if "val/loss" in row] == [3, 6]
        assert run.checkpoint("best").exists() and run.checkpoint("last").exists()


def test_report_shows_what_was_promised(job):
    report = nbformat.read(job[1] / "report.ipynb", 4)
    figures = sum("image/png" in output.get("data", {}) for cell in report.cells for output in cell.get("outputs", []))
    assert figures >= 7 and (job[1] / "report.html").read_text().count("<img") >= figures
    headings = [
        line
        for cell in report.cells
        if cell.cell_type == "markdown"
        for line in cell.source.splitlines()
        if line.startswith("## ")
    ]
    assert headings == [
        f"## {h}"
        for h in (
            "Training",
            "Learning curves",
            "What thinking gains",
            "One prediction, thought step by step",
            "The energy around it",
            "Energy against surprise",
            "Easy and uncertain tokens",
            "A sample",
            "In short",
        )
    ]


def test_terminal_ends_with_the_table_and_the_report(job):
    done, folder = job
    *_, table, last = done.stdout.strip().split("\n\n")
    assert last.strip() == f"report: {folder / 'report.html'}"
    summary = (folder / "summary.txt").read_text().strip()
    assert summary in done.stdout
    rows = {line.split()[0]: line.split()[1:] for line in summary.splitlines()[1:3]}
    for name, row in rows.items():
        metrics = [r for r in Run.open(folder / name).metrics if "val/loss" in r][-1]
        assert row[:2] == [f"{metrics['val/loss']:.4f}", f"{metrics['val/bits_per_character']:.4f}"]
    assert "step" in done.stdout and "tokens/s" in done.stdout  # progress while it worked
