"`ebt generate` and `ebt bench` as a user runs them: exit codes, JSON, text that streams to a pipe, job scripts."

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
from ebt_nb.config.kinds import FORMAT
from ebt_nb.config.overrides import build_config
from ebt_nb.data.tokenizers import load_tokenizer
from ebt_nb.runs.folders import Run
from ebt_nb.training.build import build_module
from ebt_nb.training.trainer import describe_slow_precision

EBT = Path(sys.executable).with_name("ebt")
ROOT = Path(__file__).parent.parent


def save_checkpoint(path, kind="ebt", **changes):
    "Save a small untrained model as training saves it, with `changes` to the checkpoint; return its configuration."
    size = {"model.layers": 1, "model.width": 16, "model.heads": 2, "data.context": 24, "trainer.threads": 1}
    config = build_config("text/quickstart_s1", {"model.kind": kind} | size)
    module, tokenizer = build_module(config), load_tokenizer(config.data.tokenizer)
    module.tokenizer = dict(name=tokenizer.name, fingerprint=tokenizer.fingerprint)
    checkpoint = dict(state_dict=module.state_dict())
    module.on_save_checkpoint(checkpoint)
    torch.save(checkpoint | changes, path)
    return config


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with runs/, which has a run of each kind, named like the main job's.

    It also has a few files that are no checkpoints of language models.
    """
    folder = tmp_path_factory.mktemp("home")
    for kind in ("ebt", "transformer"):
        config = save_checkpoint(folder / "checkpoint", kind)
        named = config.run.model_copy(update=dict(name=f"trial/{kind}", runs_dir=folder / "runs"))
        run = Run.create(config.model_copy(update=dict(run=named)))
        shutil.move(folder / "checkpoint", run.dir / "checkpoints/best.ckpt")
    save_checkpoint(folder / "image.ckpt", config={"format": FORMAT, "model": {"kind": "image"}})
    save_checkpoint(folder / "other_tokenizer.ckpt", tokenizer=dict(name="austen_2k", fingerprint="0" * 64))
    (folder / "note.ckpt").write_text("no checkpoint")
    return folder


@pytest.fixture
def ebt(home, forker):
    "Run a command to its end: exit code, output, errors."
    return lambda *words: forker.run(*words, cwd=home)


def test_json_has_tokens_energies_and_steps(ebt):
    settings = ["--tokens", 30, "-p", "inference.samples=2", "-p", "inference.steps=3", "--json"]
    code, out, err = ebt("generate", "ebt:best", "--prompt", "It was", "--prompt", "She had", *settings)
    first, second = json.loads(out)
    assert code == 0 and err == "inference.steps: 3 thinking steps, and training takes at most 2; more may be worse\n"
    assert (first["prompt"], second["prompt"]) == ("It was", "She had")
    assert first["finish_reason"] == "length"
    for completion in (first, second):
        for name in ("tokens", "log_probabilities", "energies", "steps"):
            assert len(completion[name]) == 30
        assert completion["mean_steps"] == 3 and max(completion["log_probabilities"]) < 0
    alone = json.loads(ebt("generate", "ebt:best", "--prompt", "She had", *settings)[1])
    assert alone["tokens"] == second["tokens"] and alone["text"] == second["text"]


def test_the_baseline_has_no_energies(ebt):
    settings = ["--tokens", 3, "--temperature", "0", "-p", "generation.echo=true", "--json"]
    code, out, _err = ebt("generate", "transformer:best", "--prompt", "It was", *settings)
    completion = json.loads(out)
    assert code == 0 and "energies" not in completion and "steps" not in completion
    assert completion["text"].startswith("It was")


def test_text_streams_to_a_pipe(home):
    words = [EBT, "generate", "ebt:best", "--prompt", "It was", "--tokens", "100000"]
    words += ["-p", "generation.stop_at_end=false"]
    with subprocess.Popen(words, cwd=home, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert os.read(process.stdout.fileno(), 1)  # long before it is done
        assert process.poll() is None
        process.stdout.close()  # the reader has seen enough
        assert process.wait(60) == 141 and process.stderr.read() == b""


def test_speed_and_steps_are_printed_after_the_text(ebt):
    code, out, err = ebt("generate", "ebt:best", "--prompt", "It was", "--tokens", 4, "--top-k", 1)
    assert code == 0 and out.endswith("\n")
    assert re.fullmatch(r"4 tokens, [\d.]+ per second, 2.00 thinking steps per token\n", err)


@pytest.mark.parametrize("kind", ["ebt", "transformer"])
def test_plain_output_of_each_kind_of_model(ebt, kind):
    thinking = ", 2.00 thinking steps per token" * (kind == "ebt")
    code, out, err = ebt("generate", f"{kind}:best", "--prompt", "It was", "--tokens", 3)
    assert code == 0 and out.endswith("\n") and re.fullmatch(rf"3 tokens, [\d.]+ per second{thinking}\n", err), err
    code, out, err = ebt("generate", f"{kind}:best", "--prompt", "It was", "--prompt", "She had", "--tokens", 3)
    assert code == 0 and re.match(r"\[1\] It was\n[^\[]*\n\[2\] She had\n", out)
    assert re.fullmatch(rf"6 tokens, [\d.]+ per second{thinking}\n", err), err


@pytest.mark.parametrize("text", ["my #1 wish", "Answer: yes", "1984", "null", "'quoted'"])
def test_a_prompt_is_taken_as_typed(ebt, text):
    settings = ["-p", f"generation.prompt={text}", "-p", "generation.echo=yes", "--tokens", "1e0", "--json"]
    completion = json.loads(ebt("generate", "transformer:best", *settings)[1])
    assert completion["prompt"] == text and completion["text"].startswith(text) and len(completion["tokens"]) == 1


@pytest.mark.parametrize(
    "words, message",
    [
        (["nothing"], "nothing: no such run"),
        (["ebt:step=7"], "no checkpoint 'step=7'"),
        (["missing.ckpt"], "missing.ckpt: no such checkpoint file"),
        (["note.ckpt"], "note.ckpt: not a checkpoint"),
        (["image.ckpt"], "image.ckpt: its configuration is not valid here: .*kind"),
        (["other_tokenizer.ckpt"], "trained with tokenizer 'austen_2k' .*not with"),
        (["ebt:best", "--prompt", ""], "generation.prompt: is empty"),
        (["ebt:best", "--prompt", "It", "--prompt", ""], "prompt 2: is empty"),
        (
            ["ebt:best", "--prompt", "It was a truth " * 20],
            r"generation.prompt: \d+ tokens are more than the model's context of 24",
        ),
        (
            ["ebt:best", "-p", 'generation.stop=["\\n\\n", ""]'],
            "generation.stop: .*leave it out",
        ),
        (
            ["ebt:best", "-p", "generation.stop_tokens=[9999]"],
            "generation.stop_tokens: there is no token 9999; the vocabulary has 2048",
        ),
        (["ebt:best", "--tokens", "0"], "generation.max_new_tokens: .*got 0"),
        (["ebt:best", "--tokens", "many"], "generation.max_new_tokens: .*got 'many'"),
        (["ebt:best", "--top-k", "0"], "generation.top_k: .*got 0"),
        (["ebt:best", "-p", "inference.steps=0"], "inference.steps: .*got 0"),
        (["ebt:best", "-p", "inference.samples=0"], "inference.samples: .*got 0"),
        (["ebt:best", "-p", "thinking.steps=3"], "thinking.steps: is fixed by training"),
        (["ebt:best", "-p", "generation.promt=x"], "generation.promt: no such key .did you mean 'generation.prompt'"),
        (["ebt:best", "-p", "generation.prompt"], "an override has the form key=value"),
    ],
)
def test_wrong_input_is_refused(home, monkeypatch, capsys, words, message):
    monkeypatch.chdir(home)
    code = main(["generate", *words])
    captured = capsys.readouterr()
    assert code == 2 and captured.out == "" and re.match(f"ebt: .*{message}", captured.err), captured.err
    assert len(captured.err.strip().splitlines()) <= 2


BENCH_SHAPE = ["--size", "4xs", "--vocab", 128, "--context", 12, "--threads", 1]


def test_bench_generate_compares_with_and_without_cache(ebt):
    code, out, err = ebt("bench", "generate", *BENCH_SHAPE, "--batch", "1,3", "--seconds", 1, "--json")
    measured = json.loads(out)
    assert (code, err) == (0, "")
    assert [measured[name] for name in ("size", "vocab", "context", "steps")] == ["4xs", 128, 12, 2]
    for batch, result in zip((1, 3), measured["results"]):
        assert result["batch"] == batch and result["tokens"] == 11 * batch and result["same_tokens"] is True
        ratio = result["cached_tokens_per_second"] / result["uncached_tokens_per_second"]
        assert result["ratio"] == pytest.approx(ratio) and result["ratio_at_full_context"] > 0


def test_bench_train_and_memory_measure_each_precision(ebt):
    options = [*BENCH_SHAPE, "--precision", "32-true,bf16-mixed", "--json"]
    code, out, err = ebt("bench", "train", *options, "--batch", 2, "--repeats", 1)
    [trained] = json.loads(out)["results"]
    warning = "".join(f"{line}\n" for line in describe_slow_precision("bf16-mixed", "cpu", "--precision"))
    assert (code, err, trained["batch"], trained["threads"]) == (0, warning, 2, 1)
    assert set(trained["precisions"]) == {"32-true", "bf16-mixed"}
    code, out, err = ebt("bench", "memory", *options)
    results = json.loads(out)["results"]
    expected = [(b, k, p) for b in (2, 8) for k in ("ebt", "transformer") for p in ("32-true", "bf16-mixed")]
    assert code == 0 and [(r["batch"], r["kind"], r["precision"]) for r in results] == expected


@pytest.mark.parametrize(
    "words, message",
    [
        (["--batch", "0"], "at least 1"),
        (["--steps", "0"], "at least 1"),
        (["--size", "huge"], "invalid choice"),
        (["--precision", "8-bit"], "none of 32-true, bf16-mixed"),
    ],
)
def test_bench_refuses_wrong_options(ebt, words, message):
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

    assert call() == f"generate|{address}|"
    assert call("--prompt", "It was", "--json") == f"generate|{address}|--prompt|It was|--json|"
    assert call("a run:step=3", "--tokens", "5") == "generate|a run:step=3|--tokens|5|"
