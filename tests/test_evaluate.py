"`ebt evaluate` as a user meets it: exit codes, JSON, figures one a line, refusals."

import json
import re
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


def save(path, kind="ebt", cache=None, **changes):
    "A checkpoint of a small untrained model, as training saves it."
    config = build_config(
        "text/quickstart",
        {
            "model.kind": kind,
            "model.layers": 1,
            "model.width": 16,
            "model.heads": 2,
            "data.context": 24,
            "data.batch_size": 4,
            "data.cache_dir": str(cache),
            "trainer.threads": 1,
        },
    )
    module, tokenizer = build_module(config), load_tokenizer(config.data.tokenizer)
    module.tokenizer = dict(name=tokenizer.name, fingerprint=tokenizer.fingerprint)
    checkpoint = dict(state_dict=module.state_dict())
    module.on_save_checkpoint(checkpoint)
    torch.save(checkpoint | changes, path)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    "A folder with a checkpoint of each kind, one of another tokenizer, and question files."
    folder = tmp_path_factory.mktemp("home")
    for kind in ("ebt", "transformer"):
        save(folder / f"{kind}.ckpt", kind, folder / "cache")
    save(
        folder / "other_tokenizer.ckpt", cache=folder / "cache", tokenizer=dict(name="austen_2k", fingerprint="0" * 64)
    )
    save(folder / "image.ckpt", cache=folder / "cache", config={"model": {"kind": "dit", "patch": 16}})

    def lines(name, rows):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    lines(
        "questions.jsonl",
        [dict(question=f"{n} + 1?", answer=str(n + 1), choices=[str(n), str(n + 1)]) for n in range(9)],
    )
    lines("open.jsonl", [dict(question=f"{n} + 1?", answer="") for n in range(3)])
    lines("plain.jsonl", [dict(question=f"{n} + 1?", answer=str(n + 1)) for n in range(9)])
    lines("long.jsonl", [dict(question="Why?", answer="because " * 40)])
    (folder / "novel.txt").write_text("It was a truth universally acknowledged. " * 400)
    return folder


@pytest.fixture
def ebt(home, forker):
    "Runs a command to its end: exit code, output, errors."
    return lambda *words: forker.run(*words, cwd=home)


def installed(home, *words):
    "The same with the installed command, which takes its time."
    done = subprocess.run(
        [EBT, *map(str, words)], cwd=home, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120
    )
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def figures(home, monkeypatch, capsys):
    "What `ebt evaluate ... --json` prints."
    monkeypatch.chdir(home)

    def call(*words):
        assert main(["evaluate", *map(str, words), "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    return call


def test_questions_from_a_terminal(home):
    code, out, err = installed(
        home,
        "evaluate",
        "ebt.ckpt",
        "--data",
        "questions.jsonl",
        "--task",
        "questions",
        "--split",
        "all",
        "-p",
        "thinking.samples=2",
        "-p",
        "thinking.infer_steps=3",
        "--json",
    )
    found = json.loads(out)
    assert (code, err) == (0, "") and (found["rows"], found["split"], found["model"]) == (9, "all", "ebt")
    assert (
        found["thinking"]["samples"] == 2
        and len(found["step_losses"]) == len(found["energies_before"]) == len(found["energies_after"]) == 3
        and found["moves"] == 3
        and found["distance"] > 0
    )
    assert (
        set(found["choice_accuracy"]) == {"likelihood", "likelihood_per_token", "energy", "chance"}
        and found["choice_accuracy"]["chance"] == 0.5
        and 0 <= found["exact_match"] <= 1
    )


def test_both_kinds_of_model_have_the_same_figures_but_for_energies(figures):
    found = {
        kind: figures(f"{kind}.ckpt", "--data", "austen", "--split", "test", "--limit", 5)
        for kind in ("ebt", "transformer")
    }
    assert set(found["ebt"]) - set(found["transformer"]) == {
        "thinking",
        "energies_before",
        "energies_after",
        "relative_energy",
        "moves",
    } and set(found["transformer"]) < set(found["ebt"])
    assert [f["rows"] for f in found.values()] == [5, 5] and found["ebt"]["tokens"] == found["transformer"]["tokens"]
    again = figures("ebt.ckpt", "--data", "austen", "--split", "test", "--limit", 5)
    assert {k: v for k, v in again.items() if k != "seconds"} == {
        k: v for k, v in found["ebt"].items() if k != "seconds"
    }


def test_what_does_not_apply_has_no_row(ebt):
    found = json.loads(
        ebt(
            "evaluate",
            "ebt.ckpt",
            "--data",
            "plain.jsonl",
            "--task",
            "questions",
            "--split",
            "all",
            "--limit",
            4,
            "--json",
        )[1]
    )
    assert (
        found["rows"] == 4
        and "choice_accuracy" not in found
        and "plan_works" not in found
        and "distance" not in found
        and "token_f1" in found
    )
    found = json.loads(
        ebt(
            "evaluate",
            "transformer.ckpt",
            "--data",
            "questions.jsonl",
            "--task",
            "questions",
            "--split",
            "all",
            "--json",
        )[1]
    )
    assert set(found["choice_accuracy"]) == {"likelihood", "likelihood_per_token", "chance"}


def test_own_text(figures):
    found = figures("transformer.ckpt", "--data", "novel.txt")
    assert (
        found["data"] == "novel.txt"
        and found["split"] == "validation"
        and found["bits_per_character"] > 0
        and "exact_match" not in found
    )


def test_every_checkpoint_of_a_run_in_one_table(home, forker, tmp_path):
    "The experiment `evaluate`, given RUN:all beside a single file: a row for each, and a curve over updates."
    run = Run.create(build_config("text/quickstart", {"run.runs_dir": str(tmp_path / "runs")}))
    for step in (2, 4):
        save(run.dir / f"checkpoints/step={step:06d}.ckpt", cache=home / "cache", global_step=step)
    code, out, err = forker.run(
        "run",
        "evaluate",
        "-p",
        f"checkpoints={{grown: {run.dir}:all, baseline: {home}/transformer.ckpt}}",
        "-p",
        f"data={{austen: 4, {home}/novel.txt: 4}}",
        "--runs-dir",
        tmp_path / "done",
        cwd=tmp_path,
    )
    assert code == 0, err
    [folder] = (tmp_path / "done/evaluate").iterdir()
    names = [("grown at 2", 2), ("grown at 4", 4), ("baseline", None)]
    assert [(found["name"], found["step"]) for found in json.loads((folder / "results.json").read_text())] == [
        name for name in names for _ in range(2)
    ]
    assert [row.split(" | ")[1] for row in (folder / "summary.txt").read_text().splitlines()[2:5]] == [
        name for name, _ in names
    ]
    assert (
        "lowest at the last checkpoint" in (folder / "report.ipynb").read_text()
        and (folder / "report.html").read_text().count("<img") == 3
    )


def test_plain_lines(ebt):
    code, out, err = ebt("evaluate", "transformer.ckpt", "--data", "austen", "--limit", 2)
    assert code == 0 and re.search(r"^perplexity: [\d.e+]+$", out, re.M) and "rows: 2\n" in out


@pytest.mark.parametrize(
    "words, message",
    [
        (["nothing", "--data", "austen"], "nothing: no such run"),
        (["other_tokenizer.ckpt", "--data", "austen"], ".*trained with tokenizer 'austen_2k' .*not with"),
        (["image.ckpt", "--data", "austen"], ".*image.ckpt: its configuration is not valid here"),
        (["ebt.ckpt", "--data", "missing.jsonl"], ".*missing.jsonl: .*no such file"),
        (
            ["ebt.ckpt", "--data", "austen", "--split", "dev"],
            "split: 'austen' has no split 'dev'; it has train, validation, test",
        ),
        (["ebt.ckpt", "--data", "dyck", "--split", "train"], "split: 'dyck' has no split 'train'; it has validation"),
        (["ebt.ckpt", "--data", "open.jsonl", "--task", "questions", "--split", "all"], ".*none of its 3 questions"),
        (
            ["ebt.ckpt", "--data", "long.jsonl", "--task", "questions", "--split", "all"],
            ".*longer than the model's context of 24 tokens",
        ),
        (["ebt.ckpt", "--data", "novel.txt", "--task", "questions"], ".*plain text"),
        (["ebt.ckpt", "--data", "austen", "-p", "thinking.steps=3"], "thinking.steps: is fixed by training"),
        (["ebt.ckpt", "--data", "austen", "-p", "thinking.infer_steps=0"], "thinking.infer_steps: .*got 0"),
    ],
)
def test_wrong_input(home, monkeypatch, capsys, words, message):
    monkeypatch.chdir(home)
    code = main(["evaluate", *words])
    said = capsys.readouterr()
    assert (
        code == 2
        and said.out == ""
        and re.match(f"ebt: {message}", said.err.rpartition("ebt: ")[1] + said.err.rpartition("ebt: ")[2])
    ), said.err


def test_a_limit_below_one_is_refused(ebt):
    for limit in ("0", "-1", "many"):
        code, out, err = ebt("evaluate", "ebt.ckpt", "--data", "austen", "--limit", limit)
        assert (code, out) == (2, "") and "--limit" in err


def test_tasks_of_the_evaluation_harness(home, tmp_path):
    "Three local task files, one of each kind of request, through the real library."
    pytest.importorskip("lm_eval", reason="the extra lm-eval is not installed")
    (tmp_path / "rows.jsonl").write_text(
        "".join(
            json.dumps(dict(question=f"{n} + 1?", choices=[str(n), str(n + 1)], gold=1, answer=str(n + 1))) + "\n"
            for n in range(6)
        )
    )
    for task, prompt, lines in [
        (
            "chosen",
            "Question: {{question}}",
            "output_type: multiple_choice\ndoc_to_choice: choices\ndoc_to_target: gold\nmetric_list: [{metric: acc}, {metric: acc_norm}]",
        ),
        (
            "read",
            "",
            "output_type: loglikelihood_rolling\ndoc_to_target: question\nmetric_list: [{metric: bits_per_byte}]",
        ),
        (
            "said",
            "Question: {{question}}",
            "output_type: generate_until\ndoc_to_target: answer\ngeneration_kwargs: {until: ['.'], max_gen_toks: 4}\nmetric_list: [{metric: exact_match}]",
        ),
    ]:
        (tmp_path / f"{task}.yaml").write_text(
            f"task: ebt_{task}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path}/rows.jsonl}}}}\ntest_split: test\ndoc_to_text: '{prompt}'\n{lines}\n"
        )
    done = subprocess.run(
        [sys.executable, "-c", HARNESS, home / "ebt.ckpt", tmp_path],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert (
        0 <= found["ebt_chosen"]["acc,none"] <= 1
        and 5 < found["ebt_read"]["bits_per_byte,none"] < 20
        and 0 <= found["ebt_said"]["exact_match,none"] <= 1
    )


HARNESS = """
import json, sys
import lm_eval
from lm_eval.tasks import TaskManager
from ebt_nb.inference.evaluate import register_harness
checkpoint, folder = sys.argv[1:]
register_harness()
found = lm_eval.simple_evaluate(model="ebt", model_args=f"checkpoint={checkpoint},thinking.infer_steps=3", tasks=["ebt_chosen", "ebt_read", "ebt_said"], bootstrap_iters=0,
                                task_manager=TaskManager(include_path=folder, include_defaults=False))
print(json.dumps(found["results"]))
"""
