"""Question sets where a notebook cannot go.

Served in a process that starts from nothing, resumed by Lightning, read from the hub's cache, and bad input of every
kind with nothing left behind.
"""

import gzip
import json
import os
import re
import shutil
import subprocess
import sys
import types

import datasets
import numpy as np
import pytest
import torch
from test_data import fit_rows, list_cache, open_data, text_config

from ebt_nb.config.data import IGNORE_INDEX, QuestionDataConfig
from ebt_nb.config.errors import WorkbenchError
from ebt_nb.config.overrides import build_config
from ebt_nb.data.file_content import BENCHMARK_CANARY
from ebt_nb.data.question_sets import QUESTION_SETS, load_questions
from ebt_nb.data.question_tables import HUB_SETS
from ebt_nb.data.sources import ASSETS, DataError
from ebt_nb.data.text_loaders import TextDataModule
from ebt_nb.data.tokenizers import load_tokenizer
from ebt_nb.jobs.notebook_jobs import prepare_unless_embedded
from ebt_nb.training.fit import fit

SUMS = [{"question": f"{a} + {b}", "answer": str(a + b)} for a in range(20) for b in range(5)]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def question_config(tmp_path, source, **data):
    "A tiny run on a question set; `data` changes keys of the data section."
    return text_config(tmp_path, kind="questions", source=source, **data)


def own_config(tmp_path, rows=SUMS, **data):
    "A tiny run on questions in a file."
    return question_config(tmp_path, write_jsonl(tmp_path / "own.jsonl", rows), **data)


def decode_targets(data, split):
    "The texts that are targets, row by row."
    return [data.tokenizer.decode(row[row != IGNORE_INDEX]) for row in np.array(data.splits[split]["targets"])]


# ---- served

PRINT_BATCHES = """
import json, sys
from ebt_nb.config.overrides import load_config
from ebt_nb.data.text_loaders import TextDataModule

for path in sys.argv[1:]:
    data = TextDataModule(load_config(path))
    data.prepare_data()
    data.setup("fit")
    batches = []
    for _, batch in zip(range(6), data.train_dataloader()):
        batches.append([batch[name].tolist() for name in ("index", "inputs", "targets")])
    print(json.dumps([batches, data.characters_per_token, data.folder.name]))
"""


def print_batches(configs, folder, run_script):
    "Return what another process prints of the batches of each configuration."
    paths = [folder / f"{config.data.source}.yaml" for config in configs]
    for config, path in zip(configs, paths):
        path.write_text(config.to_yaml())
    code, out, errors = run_script(PRINT_BATCHES, *map(str, paths))
    assert code == 0, errors[-2000:]
    return [json.loads(line) for line in out.splitlines()]


def run_with_fixed_hashes(script, *arguments):
    "Run Python code in a process whose hashes are not those of this one."
    environment = os.environ | {"PYTHONHASHSEED": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", script, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    return done.returncode, done.stdout, done.stderr


def test_the_same_batches_in_every_process(tmp_path, forker):
    "Nothing in a prompt, its split or its row depends on the process (hash seeds, order of sets)."
    sources = ("dyck_generated", "blocksworld", "arithmetic")
    printed = []
    for number, run_script in enumerate((forker.run_script, run_with_fixed_hashes)):
        settings = dict(max_documents=300, context=320, cache_dir=str(tmp_path / str(number)))
        configs = [question_config(tmp_path, source, **settings) for source in sources]
        printed.append(print_batches(configs, tmp_path, run_script))
    assert printed[0] == printed[1] and len(printed[0]) == 3
    tokenizer = load_tokenizer("austen_2k")
    for config, (batches, _, _) in zip(configs, printed[0]):
        questions = load_questions(config.data.source, "train", config.data)
        for row in (row for batch in batches for row in zip(*batch)):
            number, inputs, targets = row
            answer = tokenizer.decode([token for token in targets if token != IGNORE_INDEX])
            assert tokenizer.decode(inputs).startswith(questions[number].prompt.rstrip())
            assert answer == f" {questions[number].answer}<|endoftext|>"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_training_sees_the_remaining_questions(tmp_path, workers):
    config = own_config(tmp_path, context=32, workers=workers)
    checkpoint = tmp_path / "checkpoints" / "step=4.ckpt"
    expected = fit_rows(TextDataModule(config), tmp_path, 9)
    assert fit_rows(TextDataModule(config), tmp_path / "again", 9, checkpoint) == expected[4:]
    longer = own_config(tmp_path, SUMS * 2, context=32, workers=workers)
    with pytest.raises(DataError, match="other data"):  # a position in other questions would mean nothing
        fit_rows(TextDataModule(longer), tmp_path / "third", 9, checkpoint)


@pytest.mark.filterwarnings("ignore")
def test_a_model_trains_on_answers_alone(tmp_path):
    settings = {
        "data.kind": "questions",
        "data.source": "dyck_generated",
        "data.max_documents": 200,
        "data.context": 80,
        "data.batch_size": 4,
        "data.cache_dir": str(tmp_path / "cache"),
        "run.runs_dir": str(tmp_path / "runs"),
        "model.kind": "transformer",
        "model.layers": 1,
        "model.width": 16,
        "model.heads": 2,
        "trainer.max_steps": 30,
        "trainer.val_every": 30,
        "trainer.checkpoint_every": 30,
        "trainer.val_batches": 5,
        "optim.peak_lr": 2e-2,
        "optim.warmup_steps": 5,
    }
    run = fit(build_config("text/quickstart", settings), progress="none")
    losses = [row["val/loss"] for row in run.metrics if row.get("val/loss") is not None]
    assert losses[-1] < 2.5 < np.log(2048), losses  # among 2,048 tokens it has found the few that answers are made of


def test_text_is_scored_everywhere(tmp_path):
    batch = next(iter(open_data(text_config(tmp_path)).train_dataloader()))
    assert torch.equal(batch["inputs"][:, 1:], batch["targets"][:, :-1])


# ---- forms of files


def test_every_file_format_gives_the_same_rows(tmp_path):
    datasets.Dataset.from_list(SUMS).to_parquet(tmp_path / "table.parquet")
    (tmp_path / "list.json").write_text(json.dumps(SUMS))
    (tmp_path / "lines.jsonl.gz").write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in SUMS).encode()))
    found = [
        open_data(question_config(tmp_path, str(tmp_path / name), context=32))
        for name in ("table.parquet", "list.json", "lines.jsonl.gz")
    ]
    for split in ("train", "validation"):
        parquet, json_list, json_lines = (decode_targets(data, split) for data in found)
        assert parquet == json_list == json_lines
    assert len(found[0].splits["validation"]) == 10 and len({data.folder for data in found}) == 3


def test_numbers_choices_and_gaps(tmp_path, capfd):
    rows = [
        {"question": "1 + 1", "answer": 2, "choices": [2, 3], "task": "sum"},
        {"question": "Why?", "answer": "So.", "choices": None, "task": None},
        {"question": "How?", "answer": None, "choices": None, "task": None},
    ]
    path = write_jsonl(tmp_path / "gaps.jsonl", rows)
    found = load_questions(path, "all", question_config(tmp_path, path).data)
    assert [(q.prompt, q.answer, q.choices, q.task) for q in found] == [
        ("Question: 1 + 1\nAnswer:", "2", ["2", "3"], "sum"),
        ("Question: Why?\nAnswer:", "So.", [], ""),
    ]
    assert "(all): 1 of 3 questions lack question or answer" in capfd.readouterr().err


def test_copies_of_a_question_stay_on_one_side(tmp_path):
    data = open_data(own_config(tmp_path, SUMS * 3, context=32))
    train, validation = (np.array(data.splits[split]["tokens"]).tolist() for split in ("train", "validation"))
    assert not set(map(tuple, train)) & set(map(tuple, validation))
    assert (len(train), len(validation)) == (270, 30)


def test_truncated_prompts_are_counted_and_reported(tmp_path, capfd):
    rows = [*SUMS[:-1], {"question": "once upon a time " * 40 + "1 + 1", "answer": "2 " * 5}]
    data = open_data(own_config(tmp_path, rows, context=24))
    assert "1 of" in capfd.readouterr().err
    counts = json.loads((data.folder / "info.json").read_text())["splits"]
    assert sum(part["truncated_prompts"] for part in counts.values()) == 1
    texts = []
    for rows_of_split in data.splits.values():
        for row in rows_of_split["tokens"]:
            texts.append(data.tokenizer.decode([token for token in row if token != IGNORE_INDEX]))
    truncated = [text for text in texts if text.endswith("1 + 1\nAnswer: 2 2 2 2 2<|endoftext|>")]
    assert sum("Question" not in text for text in truncated) == 1


# ---- the hub


@pytest.fixture
def offline(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hf"))


def write_hub_cache(folder, path, subset, splits):
    "Write what `datasets` keeps of a hub data set."
    files = {split: str(folder / f"{split}.parquet") for split in splits}
    for split, rows in splits.items():
        datasets.Dataset.from_list(rows).to_parquet(files[split])
    datasets.load_dataset("parquet", data_files=files, cache_dir=str(folder / "hf"))
    made = next((folder / "hf").glob("parquet/*/*/*/dataset_info.json")).parent
    kept = folder / "hf" / path.replace("/", "___") / subset / "0.0.0" / made.name
    shutil.copytree(made, kept)
    info = json.loads((kept / "dataset_info.json").read_text())
    (kept / "dataset_info.json").write_text(json.dumps(info | {"config_name": subset}))
    for file in kept.glob("parquet-*"):
        file.rename(kept / file.name.replace("parquet-", f"{path.split('/')[1]}-"))


def test_a_hub_set_downloaded_earlier(tmp_path, offline):
    solved = [
        {"question": f"{row['question']}?", "answer": f"It is {row['answer']}\n#### {row['answer']}"} for row in SUMS
    ]
    write_hub_cache(tmp_path, "openai/gsm8k", "main", {"train": solved[:80], "test": solved[80:]})
    data = open_data(question_config(tmp_path, "gsm8k", context=48))
    assert {split: len(rows) for split, rows in data.splits.items()} == {"train": 72, "validation": 8, "test": 20}
    assert decode_targets(data, "test")[0] == f" {solved[80]['answer']}<|endoftext|>"
    shutil.rmtree(tmp_path / "hf")
    again = open_data(question_config(tmp_path, "gsm8k", context=48))
    assert again.folder == data.folder  # prepared rows serve on


def test_questions_of_an_unnamed_hub_set(tmp_path, offline):
    write_hub_cache(tmp_path, "owner/name", "default", {"train": SUMS[:60], "validation": SUMS[60:]})
    data = open_data(question_config(tmp_path, "owner/name", context=32))
    assert {split: len(rows) for split, rows in data.splits.items()} == {"train": 60, "validation": 40}
    assert len(load_questions("owner/name", "all", data.config.data)) == 60


@pytest.mark.parametrize("source", {found.source.loader: found.name for found in HUB_SETS}.values())
def test_no_network(tmp_path, offline, source):
    assert QUESTION_SETS[source] in HUB_SETS
    with pytest.raises(DataError, match=rf"'{source}' is not on this machine.*data\.source=arithmetic"):
        open_data(question_config(tmp_path, source))
    assert list_cache(tmp_path) == []


# ---- a library that may be missing


def test_reasoning_gym(tmp_path, monkeypatch):
    """Use a stand-in of the library.

    It has its interface: a factory with DATASETS and create_dataset(name, size, seed), whose items are keyed by seed
    and index.
    """

    class Products:
        def __init__(self, size, seed):
            self.seed = seed

        def __getitem__(self, i):
            return {"question": f"{self.seed % 97} * {i}", "answer": str(self.seed % 97 * i), "metadata": {}}

    def create_dataset(name, **settings):
        return factory.DATASETS[name](**settings)

    factory = types.ModuleType("reasoning_gym.factory")
    factory.DATASETS, factory.create_dataset = {"products": Products}, create_dataset
    monkeypatch.setitem(sys.modules, "reasoning_gym", types.ModuleType("reasoning_gym"))
    monkeypatch.setitem(sys.modules, "reasoning_gym.factory", factory)
    data = open_data(question_config(tmp_path, "reasoning_gym:products", max_documents=200, context=32))
    assert {split: len(rows) for split, rows in data.splits.items()} == {"train": 200, "validation": 500, "test": 500}
    with pytest.raises(DataError, match=r"no task 'product'.*did you mean 'products'"):
        TextDataModule(question_config(tmp_path, "reasoning_gym:product")).prepare_data()


def test_tasks_of_reasoning_gym(tmp_path):
    "The real library: questions are drawn once, disjoint between splits, and their answers can be checked."
    pytest.importorskip("reasoning_gym", reason="the extra reasoning is not installed")
    data = QuestionDataConfig(source="reasoning_gym:chain_sum", max_documents=50)
    train, validation = (load_questions(data.source, split, data) for split in ("train", "validation"))
    assert len(train) == 50
    assert not {question.prompt for question in train} & {question.prompt for question in validation}
    for question in train:
        assert eval(re.search(r"[-+\d ]*\d(?= =)", question.prompt)[0]) == int(question.answer), question


def test_reasoning_gym_is_an_extra(tmp_path, monkeypatch, root):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    monkeypatch.delitem(sys.modules, "reasoning_gym.factory", raising=False)
    with pytest.raises(DataError, match=r"pip install 'ebt_workbench\[reasoning\]'"):
        TextDataModule(question_config(tmp_path, "reasoning_gym:gcd")).prepare_data()
    assert "reasoning_requirements = reasoning-gym" in (root / "settings.ini").read_text()
    assert list_cache(tmp_path) == []


# ---- bad input


@pytest.mark.parametrize(
    "rows, reason",
    [
        ([{"question": "Why?"}] * 3, "has no column 'answer'"),
        ([{"question": "Why?", "answer": None}] * 3, "none of its 3 questions"),
        ([{"question": "Why?", "answer": " "}] * 3, "none of its 3 questions"),
        ([{"question": "", "answer": "So."}] * 3, "none of its 3 questions"),
        ([{"text": "It was a truth."}], "needs question, answer. Rename"),
        ([{"question": "Why?", "answer": "So.", "choices": ["a", "b"]}] * 2, "is none of its choices"),
        ([{"question": "Why?", "answer": "So."}], "cannot be both trained and validated on"),
        (
            [{"question": "Why?", "answer": "so " * 99}] * 2 + [{"question": "What?", "answer": "that " * 50}],
            r"data.context: [12] of [12] answers are longer than 16 tokens.*at least \d+",
        ),
        ([{"question": "Why?", "answer": BENCHMARK_CANARY.decode()}] * 2, "for evaluation only"),
    ],
)
def test_bad_questions_are_refused_by_name_and_nothing_is_written(tmp_path, rows, reason):
    with pytest.raises(DataError, match=reason):
        open_data(own_config(tmp_path, rows))
    assert list_cache(tmp_path) == []


@pytest.mark.parametrize(
    "content, reason", [(b"", "is empty"), (b"{torn", "line 1 is not JSON"), (b"\xff\xfe", "not UTF-8")]
)
def test_broken_files(tmp_path, content, reason):
    (tmp_path / "broken.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=rf"broken\.jsonl.*{reason}"):
        open_data(question_config(tmp_path, str(tmp_path / "broken.jsonl")))
    assert list_cache(tmp_path) == []


def test_questions_taken_for_text_are_noticed(tmp_path):
    path = write_jsonl(tmp_path / "own.jsonl", SUMS)
    with pytest.raises(DataError, match=r"no column 'text'.*data\.kind=questions"):
        open_data(text_config(tmp_path, source=path))
    with pytest.raises(WorkbenchError, match=r"data\.kind"):
        text_config(tmp_path, kind="riddles")


def test_benchmarks_are_not_trained_on(tmp_path):
    "By name, by path as questions, by path as text: refused before a run folder is made."
    path = str(tmp_path / "mine.jsonl.gz")
    shutil.copy(ASSETS / "reasoning/elementary_math_qa.jsonl.gz", path)
    for data in [
        dict(kind="questions", source="dyck"),
        dict(kind="questions", source="math_qa"),
        dict(kind="questions", source=path),
        dict(source=path, text_column="question"),
        dict(source=path, text_column="question", streaming=True),
    ]:
        config = text_config(tmp_path, context=128, **data)
        config.run.runs_dir = tmp_path / "runs"
        with pytest.raises(DataError, match=f"for evaluation only.*{BENCHMARK_CANARY.decode()}"):
            fit(config, progress="none")
        if config.data.kind == "questions":
            with pytest.raises(DataError, match="for evaluation only"):
                prepare_unless_embedded(config)
    assert not (tmp_path / "runs").exists()
