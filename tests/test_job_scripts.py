"The job scripts, run with plain bash on a small model: they pass their arguments on, and leave a run."

import os
import re
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from ebt_nb.cli.commands import parse_arguments
from ebt_nb.cli.main import main
from ebt_nb.config.overrides import build_config
from ebt_nb.data.question_sets import QUESTION_SETS
from ebt_nb.inference.loading import override_inference_config
from ebt_nb.runs.addresses import find_runs
from ebt_nb.runs.folders import Run
from ebt_nb.training.checkpoints import read_checkpoint

SMALL = {
    "model.layers": 1,
    "model.width": 32,
    "model.heads": 2,
    "data.source": "austen",
    "data.streaming": False,
    "data.tokenizer": "austen_2k",
    "data.context": 16,
    "data.batch_size": 4,
    "data.effective_batch": 8,
    "data.max_documents": 1,
    "trainer.max_steps": 1,
    "trainer.val_batches": 1,
    "trainer.threads": 1,
    "trainer.accelerator": "cpu",
    "tracking.wandb": "off",
}


@pytest.fixture
def checkout(root, tmp_path):
    "The job scripts with a stand-in of `ebt`, which prints its words in a line and refuses to measure gsm8k."
    shutil.copytree(root / "job_scripts", tmp_path / "job_scripts")
    (tmp_path / "job_scripts/setup.sh").write_text("")
    stand_in = tmp_path / ".venv/bin/ebt"
    stand_in.parent.mkdir(parents=True)
    stand_in.write_text('#!/bin/bash\nprintf "%s|" "$@"\necho\n[[ " $* " != *" gsm8k "* ]]\n')
    stand_in.chmod(0o755)

    def call(script, *words, **variables):
        return subprocess.run(
            ["bash", tmp_path / f"job_scripts/{script}.sh", *map(str, words)],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env=os.environ | variables,
        )

    return call


@pytest.fixture
def run_script(checkout, tmp_path, monkeypatch, capsys):
    "A function that runs a script, and in this process the commands of `ebt` that it calls; it returns their output."
    monkeypatch.chdir(tmp_path)

    def run(script, *words):
        called = checkout(script, *words)
        assert called.returncode == 0, called.stderr
        for command in called.stdout.splitlines():
            code = main(command.split("|")[:-1])
            assert code == 0, capsys.readouterr().err
        return capsys.readouterr().out

    return run


def arguments(folder: Path, settings: dict) -> list[str]:
    "Settings as arguments, with runs and caches below `folder`."
    settings = settings | {"run.runs_dir": folder / "runs", "data.cache_dir": folder / "cache"}
    return [word for key, value in settings.items() for word in ("-p", f"{key}={value}")]


def check_run(folder: Path, preset: str) -> Run:
    "Check that there is one run of a preset, trained for one update, and return it."
    [run] = find_runs(folder / "runs")
    assert run.status == "done" and run.name == preset and run.metrics[-1]["step"] == 1
    return run


@pytest.mark.parametrize(
    "script, preset, extra",
    [
        ("ebt_s1", "text/ebt_s1", {}),
        ("ebt_s2", "text/ebt_s2", {"thinking.replay": 4}),
        ("baseline_transformer", "text/transformer", {}),
    ],
)
def test_pretraining(script, preset, extra, run_script, tmp_path):
    printed = run_script(f"nlp/pretrain/{script}", *arguments(tmp_path, SMALL | extra))
    check_run(tmp_path, preset)
    assert "x 2 accumulated x 1 processes = 8 sequences" in printed


@pytest.mark.parametrize(
    "script, preset, processes, batch",
    [
        ("ebt", "text/ebt", 1, "x 2 accumulated x 1 processes = 8 sequences"),
        ("ebt_s1_mn", "text/ebt_s1", 2, "x 1 accumulated x 2 processes = 8 sequences"),
    ],
)
def test_pretraining_in_this_checkout(script, preset, processes, batch, root, tmp_path):
    "With its setup.sh and the installed command."
    if Path(sys.prefix) != root / ".venv" or not (root / ".venv/.set-up").is_file():
        pytest.skip("these tests do not run in the .venv that setup.sh made")
    done = subprocess.run(
        ["bash", root / f"job_scripts/nlp/pretrain/{script}.sh", *arguments(tmp_path, SMALL)],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "MASTER": "localhost:0", "GPUS": str(processes)},
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    check_run(tmp_path, preset)
    assert batch in done.stdout


IMAGES = {
    "model.layers": 1,
    "model.width": 16,
    "model.heads": 2,
    "data.source": "emoji",
    "data.image_size": 16,
    "data.batch_size": 4,
    "data.effective_batch": 4,
    "data.max_documents": 80,
    "model.patch": 4,
    "trainer.max_steps": 1,
    "trainer.val_batches": 1,
    "trainer.threads": 1,
    "trainer.accelerator": "cpu",
    "tracking.wandb": "off",
}


@pytest.mark.parametrize(
    "script, preset, extra",
    [
        ("pretrain_denoising/ebt_s2", "image/denoise_ebt_s2", {"thinking.replay": 4}),
        ("pretrain_denoising/baseline_dit", "image/denoise_dit", {"diffusion.recursion": 1}),
        ("pretrain_t2i/ebt_s1", "image/t2i_ebt_s1", {"model.patch": 1}),
    ],
)
def test_images(script, preset, extra, run_script, tmp_path):
    "One script trains a model (after encoding, if needed), and another one uses it."
    printed = run_script(f"img/{script}", *arguments(tmp_path, IMAGES | extra))
    run = check_run(tmp_path, preset)
    if preset == "image/t2i_ebt_s1":
        assert "-encoded" in printed
        words = (f"{run.dir}:last", "--caption", "red apple", "--to", "apple.png")
        assert run_script("img/inference/draw", *words).startswith("apple.png")
        assert (tmp_path / "apple.png").stat().st_size > 100
        encoder_names = {
            name: about["name"] for name, about in read_checkpoint(run.checkpoint("last"))["encoders"].items()
        }
        assert encoder_names == {"images": "small_vae", "captions": "minilm"}
        return
    settings = ["-p", "inference.steps=10"]
    if preset == "image/denoise_dit":
        settings = ["-p", "diffusion.sampling_steps=10", "-p", "diffusion.recursion=1"]
    words = (f"{run.dir}:last", "--limit", 4, "--visualize", "drawn", *settings)
    shown = run_script("img/inference/denoise", *words)
    level, drawn = run.config.diffusion.level, {path.name for path in (tmp_path / "drawn").iterdir()}
    assert f"| {level:g} | 3 | 1 |" in shown and f"| {2 * level:g} | 10 | 1 |" in shown
    assert {"restored_images.png", "quality.png"} <= drawn


def test_scripts_that_sbatch_starts_mark_their_job(root):
    "Only a marked job is queued again; a script run by hand in a session leaves the session's job unmarked."
    lines = {}
    for path in (root / "job_scripts").rglob("*.sh"):
        lines |= {line: path for line in path.read_text().splitlines() if "slurm_script" in line}
    assert lines
    for line, path in lines.items():
        assert "= slurm_script ]; then export EBT_JOB_ID=$SLURM_JOB_ID; " in line, path


def test_docs(checkout):
    done = checkout("docs", "--output", "elsewhere")
    assert (done.returncode, done.stdout) == (0, "docs|--check|--output|elsewhere|\n")


def test_benchmarks(checkout, tmp_path):
    "Each benchmark is measured on its split, and one that cannot be measured does not stop the others."
    chosen = ("lambada", "gsm8k", "arc_easy_letters")
    words = [word for name in chosen for word in ("-p", f"data.source={name}")] + ["--limit", "5"]
    done = checkout("nlp/inference/ebt_benchmarks", "text/ebt_s1:best", *words)
    assert done.returncode == 1 and "not measured: gsm8k " in done.stderr
    folder = tmp_path / "benchmarks/text_ebt_s1_best"
    assert sorted(path.name for path in folder.iterdir()) == ["arc_easy_letters.json", "lambada.json"]
    called = (folder / "arc_easy_letters.json").read_text()
    assert called == (
        "evaluate|text/ebt_s1:best|--data|arc_easy_letters|--kind|questions|--split|test|--results|"
        "benchmarks/text_ebt_s1_best/arc_easy_letters.jsonl|--json|-p|inference.steps_per_landscape=2|"
        "-p|inference.noise=1|--limit|5|\n"
    )
    assert "|--split|validation|" in (folder / "lambada.json").read_text()
    done = checkout("nlp/inference/baseline_transformer_benchmarks", "-p", "data.source=squad_v2")
    assert done.returncode == 0 and "inference." not in done.stdout, done.stderr
    assert (tmp_path / "benchmarks/transformer_best/squad_v2.json").exists()
    assert checkout("nlp/inference/benchmarks", "--limit", "5").returncode == 2


def test_all_benchmarks_are_named_sets(root):
    [line] = re.findall(r"^benchmarks=\((.*)\)$", (root / "job_scripts/nlp/inference/benchmarks.sh").read_text(), re.M)
    for name in line.split():
        assert ("test" if name.startswith(("gsm8k", "arc")) else "validation") in QUESTION_SETS[name].splits


@pytest.mark.parametrize("script, preset", [("ebt_denoising", "image_ebt"), ("dit_denoising", "dit")])
def test_published_settings_of_images_are_accepted(checkout, script, preset):
    "The settings in the script fit a model of the kind that it evaluates."
    printed = checkout(f"img/inference/{script}", "a run:best", "--limit", "3").stdout.split("|")
    assert printed[:2] == ["evaluate", "a run:best"] and printed[-3:] == ["--limit", "3", "\n"]
    config = build_config("image/quickstart", {"model.kind": preset, "diffusion.steps": 100})
    settings = [word for flag, word in pairwise(printed) if flag == "-p"]
    changed = override_inference_config(config, settings)
    assert changed.diffusion.evaluation_levels == [0.2]
    assert preset == "image_ebt" or (changed.diffusion.first_step(0.2), changed.diffusion.recursion) == (199, 3)


VIDEO_PRETRAINING = {
    "ebt_s1": "video/ebt_s1",
    "ebt_s2": "video/ebt_s2",
    "baseline_transformer": "video/transformer",
    "dinov2_ebt_s1": "video/dinov2_ebt_s1",
    "dinov2_baseline_transformer": "video/dinov2_transformer",
}


@pytest.mark.parametrize("script, preset", VIDEO_PRETRAINING.items())
def test_video_is_encoded_and_trained_with_the_same_settings(checkout, script, preset):
    words = ["-p", "data.source=/some clips", "-p", "model.size=xs"]
    done = checkout(f"vid/pretrain/{script}", *words)
    passed_on = "|".join(["--preset", preset, *words])
    assert done.returncode == 0 and done.stdout == f"encode|{passed_on}|\ntrain|{passed_on}|\n", done.stderr
    config = build_config(preset, words[1::2])
    assert config.run.name == preset and config.data.kind == "video" and config.encoder.images != "none"


@pytest.mark.parametrize(
    "script, preset, data",
    [
        ("rollout", "video/ebt_s1", None),
        ("ssv2", "video/ebt_s1", "something-something-v2"),
        ("k400", "video/ebt_s1", "kinetics-400"),
        ("ssv2_best_of_4", "video/ebt_s2", "something-something-v2"),
    ],
)
def test_rollouts_are_of_encoded_clips(checkout, script, preset, data):
    "Clips of another source are encoded as the model's; words and settings are those that `ebt rollout` takes."
    done = checkout(f"vid/inference/{script}", "--limit", "3")
    *encoded, rolled_out = done.stdout.splitlines()
    words = rolled_out.removeprefix("rollout|").rstrip("|").split("|")
    assert done.returncode == 0 and words[0] == f"{preset}:best" and words[-2:] == ["--limit", "3"], done.stderr
    expected = "" if data is None else f"encode|--preset|{preset}|-p|data.source={data}|"
    assert "".join(encoded) == expected
    args = parse_arguments(["rollout", *words])
    assert (args.data, args.condition, args.frames, args.limit) == (data, 4, 12, 3)
    changed = override_inference_config(build_config(preset), args.settings)
    assert changed.inference.samples == (4 if script == "ssv2_best_of_4" else 1)
    named = checkout(f"vid/inference/{script}", "a run:best", DATA="/clips", PRESET="video/transformer").stdout
    assert "rollout|a run:best|" in named and (data is None or "|--data|/clips|" in named)
    assert data is None or named.startswith("encode|--preset|video/transformer|-p|data.source=/clips|")
