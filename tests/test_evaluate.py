"`ebt evaluate` as a user runs it: exit codes, JSON, metrics one per line, what is refused."

import json
import re
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import pytest
import torch

from ebt_nb.cli.main import main
from ebt_nb.config.kinds import FORMAT
from ebt_nb.config.overrides import build_config
from ebt_nb.data.tokenizers import load_tokenizer
from ebt_nb.runs.folders import Run
from ebt_nb.training.build import build_module

EBT = Path(sys.executable).with_name("ebt")


SIZE = {"model.layers": 1, "model.width": 16, "model.heads": 2, "trainer.threads": 1}


def save_checkpoint(path, kind="ebt", cache=None, **changes):
    "Save a small untrained language model as training saves it, with `changes` to the checkpoint."
    data = {"data.context": 24, "data.batch_size": 4, "data.cache_dir": str(cache)}
    config = build_config("text/quickstart_s1", {"model.kind": kind} | SIZE | data)
    module, tokenizer = build_module(config), load_tokenizer(config.data.tokenizer)
    module.tokenizer = dict(name=tokenizer.name, fingerprint=tokenizer.fingerprint)
    checkpoint = dict(state_dict=module.state_dict())
    module.on_save_checkpoint(checkpoint)
    torch.save(checkpoint | changes, path)


def save_untrained_checkpoint(path, preset, cache, **changes):
    "Save a small untrained model of images or video as training saves it."
    settings = SIZE | {"data.cache_dir": str(cache)}
    settings |= {key.replace("__", "."): value for key, value in changes.items()}
    module = build_module(build_config(preset, settings))
    checkpoint = dict(state_dict=module.state_dict())
    module.on_save_checkpoint(checkpoint)
    torch.save(checkpoint, path)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    "A folder with a checkpoint of each kind, one of another tokenizer, and question files."
    folder = tmp_path_factory.mktemp("home")
    cache = folder / "cache"
    for kind in ("ebt", "transformer"):
        save_checkpoint(folder / f"{kind}.ckpt", kind, cache)
    for kind in ("image_ebt", "dit"):
        settings = dict(model__kind=kind, diffusion__steps=100)
        save_untrained_checkpoint(folder / f"{kind}.ckpt", "image/quickstart", cache, **settings)
    clips = dict(data__image_size=8, data__context=4, data__decode="on_the_fly", data__max_documents=8)
    save_untrained_checkpoint(folder / "video_ebt.ckpt", "video/quickstart", cache, **clips)
    other_tokenizer = dict(name="austen_2k", fingerprint="0" * 64)
    save_checkpoint(folder / "other_tokenizer.ckpt", cache=cache, tokenizer=other_tokenizer)
    save_checkpoint(folder / "image.ckpt", cache=cache, config={"format": FORMAT, "model": {"kind": "image"}})

    def write_lines(name, rows):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    sums = [dict(question=f"{n} + 1?", answer=str(n + 1)) for n in range(9)]
    write_lines("questions.jsonl", [row | dict(choices=[str(n), str(n + 1)]) for n, row in enumerate(sums)])
    write_lines("open.jsonl", [dict(question=f"{n} + 1?", answer="") for n in range(3)])
    write_lines("plain.jsonl", sums)
    write_lines("long.jsonl", [dict(question="Why?", answer="because " * 40)])
    (folder / "novel.txt").write_text("It was a truth universally acknowledged. " * 400)
    return folder


@pytest.fixture
def ebt(home, forker):
    "Run a command to its end: exit code, output, errors."
    return lambda *words: forker.run(*words, cwd=home)


def run_installed_command(home, *words):
    "Do the same with the installed command, which takes longer."
    done = subprocess.run(
        [EBT, *map(str, words)], cwd=home, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120
    )
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def evaluate(home, monkeypatch, capsys):
    "Return what `ebt evaluate ... --json` prints."
    monkeypatch.chdir(home)

    def call(*words):
        assert main(["evaluate", *map(str, words), "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    return call


ALL_QUESTIONS = ["--kind", "questions", "--split", "all"]


def test_questions_from_a_terminal(ebt):
    settings = ["-p", "inference.samples=2", "-p", "inference.steps=3", "--json"]
    code, out, err = ebt("evaluate", "ebt.ckpt", "--data", "questions.jsonl", *ALL_QUESTIONS, *settings)
    found = json.loads(out)
    assert code == 0 and err.startswith("inference.steps: 3 thinking steps, and training takes at most 2")
    assert (found["rows"], found["split"], found["model"]) == (9, "all", "ebt")
    assert found["thinking"]["samples"] == 2 and found["mean_moves"] == 3 and found["sample_distance"] > 0
    for name in ("step_losses", "energies_before", "energies_after"):
        assert len(found[name]) == 3
    assert set(found["choice_accuracy"]) == {"likelihood", "likelihood_per_token", "energy", "chance"}
    assert found["choice_accuracy"]["chance"] == 0.5 and 0 <= found["exact_match"] <= 1


def test_both_kinds_of_model_have_the_same_metrics_but_for_energies(evaluate):
    words = ["--data", "austen", "--split", "test", "--limit", 5]
    ebt, transformer = (evaluate(f"{kind}.ckpt", *words) for kind in ("ebt", "transformer"))
    only_ebt = {"thinking", "energies_before", "energies_after", "relative_energy", "mean_moves"}
    assert set(ebt) - set(transformer) == only_ebt and set(transformer) < set(ebt)
    assert ebt["rows"] == transformer["rows"] == 5 and ebt["tokens"] == transformer["tokens"]
    again = evaluate("ebt.ckpt", *words)
    assert again | dict(seconds=0) == ebt | dict(seconds=0)


def test_metrics_that_do_not_apply_are_left_out(ebt):
    words = ["evaluate", "ebt.ckpt", "--data", "plain.jsonl", *ALL_QUESTIONS, "--limit", 4, "--json"]
    found = json.loads(ebt(*words)[1])
    assert found["rows"] == 4 and "token_f1" in found
    assert not {"choice_accuracy", "plan_success", "sample_distance"} & set(found)
    words = ["evaluate", "transformer.ckpt", "--data", "questions.jsonl", *ALL_QUESTIONS, "--json"]
    found = json.loads(ebt(*words)[1])
    assert set(found["choice_accuracy"]) == {"likelihood", "likelihood_per_token", "chance"}


def test_every_generated_answer_is_kept(evaluate, ebt, home):
    "One line for each question and checkpoint; an existing file is kept unless told otherwise."
    words = ["--data", "plain.jsonl", *ALL_QUESTIONS, "--limit", 6, "--results", "answers.jsonl"]
    found = evaluate("ebt.ckpt", *words)
    written = (home / "answers.jsonl").read_text()
    lines = [json.loads(line) for line in written.splitlines()]
    assert len({line["index"] for line in lines}) == 6 and all(line["question"].endswith("Answer:") for line in lines)
    assert all({"generation", "truth", "energy", "log_probability"} <= set(line) for line in lines)
    for name in ("exact_match", "exact_match_strict", "token_f1"):
        assert found[name] == pytest.approx(sum(line[name] for line in lines) / 6)
    assert main(["evaluate", "ebt.ckpt", *map(str, words)]) == 2
    assert (home / "answers.jsonl").read_text() == written
    assert ebt("evaluate", "transformer.ckpt", *words, "--overwrite")[0] == 0
    assert "energy" not in (home / "answers.jsonl").read_text()


def test_own_text(evaluate):
    found = evaluate("transformer.ckpt", "--data", "novel.txt")
    assert found["data"] == "novel.txt" and found["split"] == "validation"
    assert found["bits_per_character"] > 0 and "exact_match" not in found


def test_every_checkpoint_of_a_run_in_one_table(home, forker, tmp_path):
    "The experiment `evaluate` with RUN:all and a single file: a row for each checkpoint, and a curve over updates."
    run = Run.create(build_config("text/quickstart_s1", {"run.runs_dir": str(tmp_path / "runs")}))
    for step in (2, 4):
        save_checkpoint(run.dir / f"checkpoints/step={step:06d}.ckpt", cache=home / "cache", global_step=step)
    code, _out, err = forker.run(
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
    results = json.loads((folder / "results.json").read_text())
    assert [(found["name"], found["step"]) for found in results] == [name for name in names for _ in range(2)]
    table = (folder / "summary.txt").read_text().splitlines()
    assert [row.split(" | ")[1] for row in table[2:5]] == [name for name, _ in names]
    assert "lowest at the last checkpoint" in (folder / "report.ipynb").read_text()
    assert (folder / "report.html").read_text().count("<img") == 4  # three figures, and the main one in the summary


SHARED = ["-p", "trainer.devices=2"]


@pytest.fixture
def evaluate_on_ranks(forker, home):
    "Run `ebt evaluate` as two ranks: exit code, output and errors of each."
    return lambda *words: forker.run_ranks("evaluate", *words, *SHARED, cwd=home)


@pytest.mark.parametrize(
    "words",
    [
        ["ebt.ckpt", "--data", "austen", "--limit", "7"],
        ["image_ebt.ckpt", "--limit", "5"],
        ["dit.ckpt", "--limit", "5", "-p", "diffusion.sampling_steps=4"],
        ["video_ebt.ckpt", "--limit", "18"],
    ],
    ids=["text", "images", "diffusion", "video"],
)
def test_ranks_share_what_one_process_evaluates(evaluate, evaluate_on_ranks, words):
    "Rank 0 prints the figures of one process, to rounding; the other prints nothing."
    (code, out, err), (other_code, *other_output) = evaluate_on_ranks(*words, "--json")
    assert (code, other_code, other_output) == (0, 0, ["", ""]), err
    found, expected = json.loads(out), evaluate(*words)
    assert found.keys() == expected.keys()
    assert_same_figures(found, expected)


def assert_same_figures(found, expected):
    "Two evaluations agree: counts and texts exactly, other numbers to rounding, apart from the time they took."
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for name in expected.keys() - {"seconds"}:
            assert_same_figures(found[name], expected[name])
    elif isinstance(expected, list):
        for one, other in zip(found, expected, strict=True):
            assert_same_figures(one, other)
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-5, nan_ok=True)
    else:
        assert found == expected


def test_two_devices_answer_questions_as_one(evaluate, home):
    "`ebt evaluate -p trainer.devices=2` starts the ranks, prints once and writes one results file."
    words = ["ebt.ckpt", "--data", "questions.jsonl", *ALL_QUESTIONS, "--limit", 7, "--json", "--results"]
    code, out, err = run_installed_command(home, "evaluate", *words, "by_two.jsonl", *SHARED)
    assert (code, err) == (0, ""), err
    assert_same_figures(json.loads(out), evaluate(*words[:-2], "--results", "by_one.jsonl"))
    by_two, by_one = (
        [json.loads(line) for line in (home / name).read_text().splitlines()]
        for name in ("by_two.jsonl", "by_one.jsonl")
    )
    assert len(by_two) == 7
    assert_same_figures(by_two, by_one)


def test_an_error_of_a_rank_is_sent_once(evaluate_on_ranks, home):
    "Ranks that fail send the error to the process that started them, and end with its exit code."
    words = ["ebt.ckpt", "--data", "austen", "--split", "dev", "--as-rank"]
    message = "split: 'austen' has no split 'dev'; it has train, validation, test"
    for code, out, _err in evaluate_on_ranks(*words):
        assert code == 2 and json.loads(out) == {"error": [message, 2]}


def test_plain_lines(ebt):
    code, out, _err = ebt("evaluate", "transformer.ckpt", "--data", "austen", "--limit", 2)
    assert code == 0 and re.search(r"^perplexity: [\d.e+]+$", out, re.M) and "rows: 2\n" in out


def restored_rows(found):
    "The rows of the trained noise level, without that of the noisy images."
    level = found["rows"][0]["level"]
    return [row for row in found["rows"] if row["level"] == level and row["passes"]]


def test_images_are_restored_with_the_configured_number_of_steps(evaluate):
    found = evaluate("image_ebt.ckpt", "--limit", 3, "-p", "inference.steps=4")
    assert found["num_images"] == 3 and [row["passes"] for row in restored_rows(found)] == [1, 2, 3, 4]


def test_images_that_stopped_early_keep_their_last_prediction(evaluate):
    "All candidates stop after the first move, because no move lowers an energy by that much."
    words = ["image_ebt.ckpt", "--limit", 3, "-p", "inference.steps=5"]
    stopped = restored_rows(evaluate(*words, "-p", "inference.early_stop=1e9"))
    assert [row["passes"] for row in stopped] == [1, 2, 3, 5]
    assert stopped[0] == restored_rows(evaluate(*words))[0]
    assert stopped == [stopped[0] | dict(passes=row["passes"]) for row in stopped]


def test_images_are_restored_with_the_configured_recursion(evaluate):
    settings = ["-p", "diffusion.sampling_steps=4", "-p", "diffusion.recursion=2"]
    rows = restored_rows(evaluate("dit.ckpt", "--limit", 3, *settings))
    assert [(row["passes"], row["recursion"]) for row in rows] == [(2, 2), (4, 2), (6, 2), (8, 2)]
    once = restored_rows(evaluate("dit.ckpt", "--limit", 3, "-p", "diffusion.sampling_steps=8"))
    assert rows[-1]["psnr"] != once[-1]["psnr"] and once[-1]["passes"] == 8


def test_images_are_measured_at_chosen_levels_from_the_step_of_their_noise(evaluate):
    settings = ["-p", "diffusion.sampling_steps=3", "-p", "diffusion.evaluation_levels=[0.3, 0.1]"]
    trained = evaluate("dit.ckpt", "--limit", 2, *settings)["rows"]
    noisier = evaluate("dit.ckpt", "--limit", 2, *settings, "-p", "diffusion.sampling_start=level")["rows"]
    settings = [(row["level"], row["passes"]) for row in trained]
    assert settings == [(level, passes) for level in (0.3, 0.1) for passes in (0, 1, 2, 3)]
    is_same = [a == b for a, b in zip(trained, noisier)]
    assert is_same == [True, False, False, False, True, True, True, True]  # at the trained level the step is the same


@pytest.mark.parametrize(
    "words, message",
    [
        (["nothing", "--data", "austen"], "nothing: no such run"),
        (["other_tokenizer.ckpt", "--data", "austen"], ".*trained with tokenizer 'austen_2k' .*not with"),
        (["image.ckpt", "--data", "austen"], ".*image.ckpt: its configuration is not valid here"),
        (["ebt.ckpt", "--data", "missing.jsonl"], ".*missing.jsonl: .*no such file"),
        (["ebt.ckpt", "--data", "arithmatic"], "data.source: 'arithmatic' is no named set .did you mean 'arithmetic'"),
        (
            ["ebt.ckpt", "--data", "arithmatic", "--kind", "questions"],
            "data.source: 'arithmatic' is no question set .did you mean 'arithmetic'",
        ),
        (
            ["dit.ckpt", "--data", "fashion_mnst"],
            "data.source: 'fashion_mnst' is neither .* .did you mean 'fashion_mnist'",
        ),
        (
            ["ebt.ckpt", "--data", "austen", "--split", "dev"],
            "split: 'austen' has no split 'dev'; it has train, validation, test",
        ),
        (["ebt.ckpt", "--data", "dyck", "--split", "train"], "split: 'dyck' has no split 'train'; it has validation"),
        (["ebt.ckpt", "--data", "open.jsonl", "--kind", "questions", "--split", "all"], ".*none of its 3 questions"),
        (
            ["ebt.ckpt", "--data", "long.jsonl", "--kind", "questions", "--split", "all"],
            ".*longer than the model's context of 24 tokens",
        ),
        (["ebt.ckpt", "--data", "novel.txt", "--kind", "questions"], ".*plain text"),
        (["ebt.ckpt", "--data", "austen", "-p", "thinking.steps=3"], "thinking.steps: is fixed by training"),
        (["ebt.ckpt", "--data", "austen", "-p", "inference.steps=0"], "inference.steps: .*got 0"),
        (["ebt.ckpt", "--data", "austen", "--results", "no/a.jsonl"], "--results no/a.jsonl: there is no folder no"),
        (["ebt.ckpt", "--data", "austen", "--results", "new.jsonl"], "--results: 'austen' is read as text"),
        (["ebt.ckpt", "--data", "austen", "--overwrite"], "--overwrite: replaces the file of --results"),
        (["dit.ckpt", "--results", "new.jsonl"], "--results: .*dit.ckpt holds a model of images"),
        (["ebt.ckpt", "-p", "trainer.devices=[0, 1]"], "trainer.devices: .0, 1. names GPUs, and this run is on a CPU"),
        (["dit.ckpt", "-p", "diffusion.sampling_start=1000"], "diffusion.sampling_start: 1000 is no step"),
        (["dit.ckpt", "-p", "diffusion.evaluation_levels=[2]"], "diffusion.evaluation_levels.*: .* 2 is not"),
    ],
)
def test_wrong_input_is_refused(home, monkeypatch, capsys, words, message):
    monkeypatch.chdir(home)
    code = main(["evaluate", *words])
    captured = capsys.readouterr()
    error = captured.err[max(0, captured.err.rfind("ebt: ")) :]
    assert code == 2 and captured.out == "" and re.match(f"ebt: {message}", error), captured.err


def test_a_limit_below_one_is_refused(ebt):
    for limit in ("0", "-1", "many"):
        code, out, err = ebt("evaluate", "ebt.ckpt", "--data", "austen", "--limit", limit)
        assert (code, out) == (2, "") and "--limit" in err


HARNESS_TASKS = {
    "chosen": """
        doc_to_text: 'Question: {{question}}'
        output_type: multiple_choice
        doc_to_choice: choices
        doc_to_target: gold
        metric_list: [{metric: acc}, {metric: acc_norm}]
    """,
    "read": """
        doc_to_text: ''
        output_type: loglikelihood_rolling
        doc_to_target: question
        metric_list: [{metric: bits_per_byte}]
    """,
    "generated": """
        doc_to_text: 'Question: {{question}}'
        output_type: generate_until
        doc_to_target: answer
        generation_kwargs: {until: ['.'], max_gen_toks: 4}
        metric_list: [{metric: exact_match}]
    """,
}

HARNESS_SCRIPT = """
import json, sys
import lm_eval
from lm_eval.tasks import TaskManager
from ebt_nb.inference.lm_harness import register_with_lm_eval

checkpoint, folder = sys.argv[1:]
register_with_lm_eval()
found = lm_eval.simple_evaluate(
    model="ebt",
    model_args=f"checkpoint={checkpoint},inference.steps=3",
    tasks=["ebt_chosen", "ebt_read", "ebt_generated"],
    bootstrap_iters=0,
    task_manager=TaskManager(include_path=folder, include_defaults=False),
)
print(json.dumps(found["results"]))
"""


def test_tasks_of_the_evaluation_harness(home, tmp_path, forker):
    "Three local task files, one for each kind of request, through the real library."
    pytest.importorskip("lm_eval", reason="the extra lm-eval is not installed")
    rows = [dict(question=f"{n} + 1?", choices=[str(n), str(n + 1)], gold=1, answer=str(n + 1)) for n in range(6)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for task, lines in HARNESS_TASKS.items():
        header = f"""
            task: ebt_{task}
            dataset_path: json
            dataset_kwargs: {{data_files: {{test: {tmp_path}/rows.jsonl}}}}
            test_split: test
        """
        (tmp_path / f"{task}.yaml").write_text(dedent(header) + dedent(lines))
    code, out, errors = forker.run_script(HARNESS_SCRIPT, home / "ebt.ckpt", tmp_path, cwd=tmp_path)
    assert code == 0, errors
    found = json.loads(out.splitlines()[-1])
    assert 0 <= found["ebt_chosen"]["acc,none"] <= 1 and 5 < found["ebt_read"]["bits_per_byte,none"] < 20
    assert 0 <= found["ebt_generated"]["exact_match,none"] <= 1
