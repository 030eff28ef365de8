"`ebt generate` and `ebt bench` as a user meets them: exit codes, JSON, text that streams to a pipe, job scripts."

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ebt_nb.cli.main import main
from ebt_nb.config.config import build_config
from ebt_nb.data.text import load_tokenizer
from ebt_nb.runs.folders import Run
from ebt_nb.training.build import build_module

EBT = Path(sys.executable).with_name("ebt")
ROOT = Path(__file__).parent.parent


def save(path, kind="ebt", **changes):
    "A checkpoint of a small untrained model, as training saves it."
    config = build_config(
        "text/quickstart",
        {
            "model.kind": kind,
            "model.layers": 1,
            "model.width": 16,
            "model.heads": 2,
            "data.context": 24,
            "trainer.threads": 1,
        },
    )
    module, tokenizer = build_module(config), load_tokenizer(config.data.tokenizer)
    module.tokenizer = dict(name=tokenizer.name, fingerprint=tokenizer.fingerprint)
    checkpoint = dict(state_dict=module.state_dict())
    module.on_save_checkpoint(checkpoint)
    torch.save(checkpoint | changes, path)
    return config


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    "A folder with a run of each kind below runs/, named like the main job's, and a few files that are no checkpoints of language models."
    folder = tmp_path_factory.mktemp("home")
    for kind, name in [("ebt", "ebt"), ("transformer", "transformer")]:
        config = save(folder / "checkpoint", kind)
        run = Run.create(
            config.model_copy(
                update=dict(run=config.run.model_copy(update=dict(name=f"trial/{name}", runs_dir=folder / "runs")))
            )
        )
        shutil.move(folder / "checkpoint", run.dir / "checkpoints/best.ckpt")
    save(folder / "image.ckpt", config={"model": {"kind": "dit", "patch": 16}})
    save(folder / "other_tokenizer.ckpt", tokenizer=dict(name="austen_2k", fingerprint="0" * 64))
    (folder / "note.ckpt").write_text("no checkpoint")
    return folder


@pytest.fixture
def ebt(home, forker):
    "Runs a command to its end: exit code, output, errors."
    return lambda *words: forker.run(*words, cwd=home)


def test_json_says_all_there_is_to_know(ebt):
    code, out, err = ebt(
        "generate",
        "ebt:best",
        "--prompt",
        "It was",
        "--prompt",
        "She had",
        "--tokens",
        30,
        "-p",
        "thinking.samples=2",
        "-p",
        "thinking.infer_steps=3",
        "--json",
    )
    first, second = json.loads(out)
    assert (
        (code, err) == (0, "")
        and (first["prompt"], second["prompt"]) == ("It was", "She had")
        and first["finish"] == "length"
    )
    for answer in (first, second):
        assert (
            [len(answer[name]) for name in ("tokens", "log_probabilities", "energies", "steps")] == [30] * 4
            and answer["mean_steps"] == 3
            and max(answer["log_probabilities"]) < 0
        )
    alone = json.loads(
        ebt(
            "generate",
            "ebt:best",
            "--prompt",
            "She had",
            "--tokens",
            30,
            "-p",
            "thinking.samples=2",
            "-p",
            "thinking.infer_steps=3",
            "--json",
        )[1]
    )
    assert alone["tokens"] == second["tokens"] and alone["text"] == second["text"]


def test_the_baseline_has_no_energies(ebt):
    code, out, err = ebt(
        "generate",
        "transformer:best",
        "--prompt",
        "It was",
        "--tokens",
        3,
        "--temperature",
        "0",
        "-p",
        "inference.echo=true",
        "--json",
    )
    answer = json.loads(out)
    assert code == 0 and "energies" not in answer and "steps" not in answer and answer["text"].startswith("It was")


def test_text_streams_to_a_pipe(home):
    words = [
        EBT,
        "generate",
        "ebt:best",
        "--prompt",
        "It was",
        "--tokens",
        "100000",
        "-p",
        "inference.stop_at_end=false",
    ]
    with subprocess.Popen(words, cwd=home, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert os.read(process.stdout.fileno(), 1)  # long before it is done
        assert process.poll() is None
        process.stdout.close()  # the reader has seen enough
        assert process.wait(60) == 141 and process.stderr.read() == b""


def test_speed_is_said_beside_the_text(ebt):
    code, out, err = ebt("generate", "ebt:best", "--prompt", "It was", "--tokens", 4, "--top-k", 1)
    assert (
        code == 0
        and out.endswith("\n")
        and re.fullmatch(r"4 tokens, [\d.]+ a second, 2.00 thinking steps a token\n", err)
    )


@pytest.mark.parametrize(
    "words, message",
    [
        (["nothing"], "nothing: no such run"),
        (["ebt:step=7"], "no checkpoint 'step=7'"),
        (["missing.ckpt"], "missing.ckpt: no such checkpoint file"),
        (["note.ckpt"], "note.ckpt: not a checkpoint"),
        (["image.ckpt"], "image.ckpt: its configuration is not valid here: .*kind"),
        (["other_tokenizer.ckpt"], "trained with tokenizer 'austen_2k' .*not with"),
        (["ebt:best", "--prompt", ""], "inference.prompt: is empty"),
        (["ebt:best", "--prompt", "It", "--prompt", ""], "prompt 2: is empty"),
        (
            ["ebt:best", "--prompt", "It was a truth " * 20],
            r"inference.prompt: \d+ tokens are more than the model's context of 24",
        ),
        (
            ["ebt:best", "-p", "inference.stop_tokens=[9999]"],
            "inference.stop_tokens: there is no token 9999; the vocabulary has 2048",
        ),
        (["ebt:best", "--tokens", "0"], "inference.max_new_tokens: .*got 0"),
        (["ebt:best", "--tokens", "many"], "inference.max_new_tokens: .*got 'many'"),
        (["ebt:best", "--top-k", "0"], "inference.top_k: .*got 0"),
        (["ebt:best", "-p", "thinking.infer_steps=0"], "thinking.infer_steps: .*got 0"),
        (["ebt:best", "-p", "thinking.samples=0"], "thinking.samples: .*got 0"),
        (["ebt:best", "-p", "thinking.steps=3"], "thinking.steps: is fixed by training"),
        (["ebt:best", "-p", "inference.promt=x"], "inference.promt: no such key .did you mean 'inference.prompt'"),
        (["ebt:best", "-p", "inference.prompt"], "an override reads key=value"),
    ],
)
def test_wrong_input(home, monkeypatch, capsys, words, message):
    monkeypatch.chdir(home)
    code = main(["generate", *words])
    said = capsys.readouterr()
    assert code == 2 and said.out == "" and re.match(f"ebt: .*{message}", said.err), said.err
    assert len(said.err.strip().splitlines()) <= 2


def test_bench_prints_what_was_measured(ebt):
    code, out, err = ebt(
        "bench",
        "generate",
        "--size",
        "4xs",
        "--vocab",
        128,
        "--context",
        12,
        "--batch",
        "1,3",
        "--threads",
        1,
        "--seconds",
        1,
        "--json",
    )
    measured = json.loads(out)
    assert (code, err) == (0, "") and (measured["size"], measured["vocab"], measured["context"], measured["steps"]) == (
        "4xs",
        128,
        12,
        2,
    )
    for batch, result in zip((1, 3), measured["results"]):
        assert result["batch"] == batch and result["tokens"] == 11 * batch and result["same_tokens"] is True
        assert (
            result["ratio"] == pytest.approx(result["cached_tokens_per_second"] / result["uncached_tokens_per_second"])
            and result["ratio_at_full_context"] > 0
        )
    shape = [
        "--size",
        "4xs",
        "--vocab",
        128,
        "--context",
        12,
        "--threads",
        1,
        "--precision",
        "32-true,bf16-mixed",
        "--json",
    ]
    code, out, err = ebt("bench", "train", *shape, "--batch", 2, "--repeats", 1)
    [trained] = json.loads(out)["results"]
    assert (code, err, trained["batch"], trained["threads"]) == (0, "", 2, 1) and set(trained["precisions"]) == {
        "32-true",
        "bf16-mixed",
    }
    code, out, err = ebt("bench", "memory", *shape)
    grown = json.loads(out)["results"]
    assert code == 0 and [(g["batch"], g["kind"], g["precision"]) for g in grown] == [
        (b, k, p) for b in (2, 8) for k in ("ebt", "transformer") for p in ("32-true", "bf16-mixed")
    ]
    for words, message in [
        (["--batch", "0"], "at least 1"),
        (["--steps", "0"], "at least 1"),
        (["--size", "huge"], "invalid choice"),
        (["--precision", "8-bit"], "none of 32-true, bf16-mixed"),
    ]:
        code, out, err = ebt("bench", "generate", *words)
        assert code == 2 and out == "" and message in err


@pytest.mark.parametrize("name, address", [("ebt", "ebt:best"), ("baseline_transformer", "transformer:best")])
def test_job_scripts(tmp_path, name, address):
    script = tmp_path / f"job_scripts/nlp/inference/{name}.sh"
    script.parent.mkdir(parents=True)
    shutil.copy(ROOT / script.relative_to(tmp_path), script)
    (tmp_path / "job_scripts/setup.sh").touch()
    stand_in = tmp_path / ".venv/bin/ebt"
    stand_in.parent.mkdir(parents=True)
    stand_in.write_text('#!/bin/bash\nprintf "%s|" "$@"\n')
    stand_in.chmod(0o755)

    def call(*words):
        return subprocess.run(["bash", script, *words], capture_output=True, text=True, check=True, cwd="/").stdout

    assert (
        call() == f"generate|{address}|"
        and call("--prompt", "It was", "--json") == f"generate|{address}|--prompt|It was|--json|"
    )
    assert call("a run:step=3", "--tokens", "5") == "generate|a run:step=3|--tokens|5|"
