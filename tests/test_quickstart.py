"""The main job, end to end at toy size: what `job_scripts/quickstart.sh` starts after setting up."""

import pytest
from reports import check_report, count_figures

from ebt_nb.config.overrides import load_config
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
    "generation.max_new_tokens": 5,
}


@pytest.fixture(scope="module")
def job(tmp_path_factory, forker):
    "What the job printed, and its experiment folder."
    folder = tmp_path_factory.mktemp("quickstart")
    options = [f"-p{key}={value}" for key, value in {**TOY, "data.cache_dir": folder / "cache"}.items()]
    words = ["run", "pretrain", "--preset", "text/quickstart", "--runs-dir", folder / "runs", *options]
    code, out, errors = forker.run(*words)
    assert code == 0, out[-2000:] + errors[-2000:]
    return out, next((folder / "runs/text/quickstart").iterdir())


def test_two_runs_that_differ_in_the_model_alone(job):
    runs = {name: Run.open(job[1] / name) for name in ("ebt", "transformer")}
    assert {run.status for run in runs.values()} == {"done"}
    keys = {}
    for name, run in runs.items():
        sections = load_config(run.dir / "config.yaml").sections
        keys[name] = {f"{title}.{key}": value for title, section in sections.items() for key, value in section}
    assert (keys["ebt"].pop("model.kind"), keys["transformer"].pop("model.kind")) == ("ebt", "transformer")
    assert keys["transformer"].pop("model.loops") == 1 and len(keys["transformer"]) > 40
    assert {key: keys["ebt"][key] for key in keys["transformer"] if key in keys["ebt"]} == keys["transformer"]
    for run in runs.values():
        assert [row["step"] for row in run.metrics if "val/loss" in row] == [3, 6]
        assert run.checkpoint("best").exists() and run.checkpoint("last").exists()


def test_report_shows_what_was_promised(job):
    report = check_report(job[1])
    num_figures = count_figures(report)
    page = (job[1] / "report.html").read_text(encoding="utf-8")
    assert num_figures >= 7 and page.count("<img") >= num_figures
    assert page.count('class="ebt-view" data-view=') == 2  # a landscape, and a text token by token
    assert "widget-view" not in (job[1] / "report.ipynb").read_text(encoding="utf-8")
    sources = [cell.source for cell in report.cells if cell.cell_type == "markdown"]
    headings = [line for source in sources for line in source.splitlines() if line.startswith("## ")]
    assert headings == [
        f"## {heading}"
        for heading in (
            "About this notebook",
            "Training",
            "Learning curves",
            "What thinking gains",
            "One prediction, step by step",
            "The energy around it",
            "Energy and negative log-likelihood",
            "Easy and uncertain tokens",
            "A sample",
            "A text, token by token",
        )
    ]


def test_summary_speaks_of_this_run(job):
    "The losses in the first output of the report are those in the metrics of its runs."
    summary = check_report(job[1]).cells[2].outputs[0].data["text/markdown"]
    losses = {}
    for name in ("ebt", "transformer"):
        losses[name] = [row for row in Run.open(job[1] / name).metrics if "val/loss" in row][-1]["val/loss"]
        assert f"{losses[name]:.3f}" in summary and f"{losses[name]:.4f}" in summary
    assert f"{losses['ebt'] / losses['transformer']:.3f} times the baseline's" in summary


def test_terminal_ends_with_the_table_and_the_report(job):
    output, folder = job
    *_, last = output.strip().split("\n\n")
    assert last.strip() == f"report: {folder / 'report.html'}"
    summary = (folder / "summary.txt").read_text().strip()
    assert summary in output
    rows = {line.split()[0]: line.split()[1:] for line in summary.splitlines()[1:3]}
    for name, row in rows.items():
        metrics = [r for r in Run.open(folder / name).metrics if "val/loss" in r][-1]
        assert row[:2] == [f"{metrics['val/loss']:.4f}", f"{metrics['val/bits_per_character']:.4f}"]
    assert "step" in output and "tokens/s" in output  # progress during training
