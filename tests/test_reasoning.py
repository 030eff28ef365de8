"""Question sets where a notebook cannot go: served in a process that starts from nothing, resumed by Lightning, fetched from the hub's cache, and bad input of every kind with nothing left behind."""

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

from ebt_nb.config.config import IGNORE, Data, WorkbenchError, build_config
from ebt_nb.data import questions, text
from ebt_nb.data.questions import QUESTION_SETS, load_questions
from ebt_nb.data.loaders import TextData
from ebt_nb.data.text import ASSETS, CANARY, DataError
from ebt_nb.jobs.notebook_jobs import check_data
from ebt_nb.training.fit import fit
from test_data import configured, fitted, left_behind, opened

SUMS = [{"question": f"{a} + {b}", "answer": str(a + b)} for a in range(20) for b in range(5)]


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def own(tmp_path, rows=SUMS, **data):
    return configured(tmp_path, source=jsonl(tmp_path / "own.jsonl", rows), task="questions", **data)


def scored(data, split):
    "The texts that are targets, row by row."
    return [data.tokenizer.decode(row[row != IGNORE]) for row in np.array(data.splits[split]["targets"])]


# ---- served

SERVE = """
import json, sys
from ebt_nb.config.config import load_config
from ebt_nb.data.loaders import TextData
for path in sys.argv[1:]:
    data = TextData(load_config(path))
    data.prepare_data()
    data.setup("fit")
    batches = [(b["index"].tolist(), b["inputs"].tolist(), b["targets"].tolist()) for _, b in zip(range(6), data.train_dataloader())]
    print(json.dumps([batches, data.characters_per_token, data.folder.name]))
"""


def test_the_same_batches_in_every_process(tmp_path):
    "Nothing in a prompt, its split or its place depends on the process (hash seeds, order of sets)."
    said = []
    for hash_seed in ("0", "1"):
        configs = [
            configured(tmp_path, source=source, max_documents=300, context=320, cache_dir=str(tmp_path / hash_seed))
            for source in ("dyck_generated", "blocksworld", "arithmetic")
        ]
        for config in configs:
            (tmp_path / f"{config.data.source}.yaml").write_text(config.to_yaml())
        done = subprocess.run(
            [sys.executable, "-c", SERVE, *(str(tmp_path / f"{config.data.source}.yaml") for config in configs)],
            capture_output=True,
            text=True,
            timeout=120,
            env=os.environ | {"PYTHONHASHSEED": hash_seed, "OMP_NUM_THREADS": "1"},
        )
        assert done.returncode == 0, done.stderr[-2000:]
        said.append([json.loads(line) for line in done.stdout.splitlines()])
    assert said[0] == said[1] and len(said[0]) == 3
    for config, (batches, _, _) in zip(configs, said[0]):
        questions, tokenizer = (
            load_questions(config.data.source, "train", config.data),
            text.load_tokenizer("austen_2k"),
        )
        for index, inputs, targets in batches:
            for i, row, target in zip(index, inputs, targets):
                assert (
                    tokenizer.decode(row).startswith(questions[i].prompt.rstrip())
                    and tokenizer.decode([t for t in target if t != IGNORE]) == f" {questions[i].answer}<|endoftext|>"
                )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_training_sees_the_remaining_questions(tmp_path, workers):
    config = own(tmp_path, context=32, workers=workers)
    straight = fitted(TextData(config), tmp_path, 9)
    assert fitted(TextData(config), tmp_path / "again", 9, tmp_path / "checkpoints" / "step=4.ckpt") == straight[4:]
    longer = own(
        tmp_path, SUMS * 2, context=32, workers=workers
    )  # other questions: its place in them would mean nothing
    with pytest.raises(DataError, match="other data"):
        fitted(TextData(longer), tmp_path / "third", 9, tmp_path / "checkpoints" / "step=4.ckpt")


@pytest.mark.filterwarnings("ignore")
def test_a_model_trains_on_answers_alone(tmp_path):
    settings = {
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


def test_rows_of_text_are_served_as_before(tmp_path):
    batch = next(iter(opened(configured(tmp_path)).train_dataloader()))
    assert torch.equal(batch["inputs"][:, 1:], batch["targets"][:, :-1])


# ---- forms of files


def test_every_file_format_gives_the_same_rows(tmp_path):
    datasets.Dataset.from_list(SUMS).to_parquet(tmp_path / "table.parquet")
    (tmp_path / "list.json").write_text(json.dumps(SUMS))
    (tmp_path / "lines.jsonl.gz").write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in SUMS).encode()))
    found = [
        opened(configured(tmp_path, source=str(tmp_path / name), task="questions", context=32))
        for name in ("table.parquet", "list.json", "lines.jsonl.gz")
    ]
    for split in ("train", "validation"):
        assert scored(found[0], split) == scored(found[1], split) == scored(found[2], split)
    assert len(found[0].splits["validation"]) == 10 and len({data.folder for data in found}) == 3


def test_numbers_choices_and_gaps(tmp_path, capfd):
    rows = [
        {"question": "1 + 1", "answer": 2, "choices": [2, 3], "task": "sum"},
        {"question": "Why?", "answer": "So.", "choices": None, "task": None},
        {"question": "How?", "answer": None, "choices": None, "task": None},
    ]
    found = load_questions(jsonl(tmp_path / "gaps.jsonl", rows), "all", configured(tmp_path).data)
    assert [(q.prompt, q.answer, q.choices, q.task) for q in found] == [
        ("Question: 1 + 1\nAnswer:", "2", ["2", "3"], "sum"),
        ("Question: Why?\nAnswer:", "So.", [], ""),
    ]
    assert "(all): 1 of 3 questions lack question or answer" in capfd.readouterr().err


def test_copies_of_a_question_stay_on_one_side(tmp_path):
    data = opened(own(tmp_path, SUMS * 3, context=32))
    sides = [
        {tuple(row) for row in np.array(data.splits[split]["tokens"]).tolist()} for split in ("train", "validation")
    ]
    assert not sides[0] & sides[1] and [len(data.splits[split]) for split in ("train", "validation")] == [270, 30]


def test_what_is_cut_and_said(tmp_path, capfd):
    rows = SUMS[:-1] + [{"question": "once upon a time " * 40 + "1 + 1", "answer": "2 " * 5}]
    data = opened(own(tmp_path, rows, context=24))
    assert (
        "1 of" in capfd.readouterr().err
        and sum(part["cut"] for part in json.loads((data.folder / "info.json").read_text())["splits"].values()) == 1
    )
    texts = [
        data.tokenizer.decode([t for t in row if t != IGNORE])
        for split in data.splits
        for row in data.splits[split]["tokens"]
    ]
    assert sum(t.endswith("1 + 1\nAnswer: 2 2 2 2 2<|endoftext|>") and "Question" not in t for t in texts) == 1


# ---- the hub


@pytest.fixture
def offline(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hf"))


def downloaded(folder, path, subset, splits):
    "What `datasets` keeps of a hub data set."
    for split, rows in splits.items():
        datasets.Dataset.from_list(rows).to_parquet(folder / f"{split}.parquet")
    datasets.load_dataset(
        "parquet", data_files={s: str(folder / f"{s}.parquet") for s in splits}, cache_dir=str(folder / "hf")
    )
    made = next((folder / "hf").glob("parquet/*/*/*/dataset_info.json")).parent
    kept = folder / "hf" / path.replace("/", "___") / subset / "0.0.0" / made.name
    shutil.copytree(made, kept)
    info = json.loads((kept / "dataset_info.json").read_text())
    (kept / "dataset_info.json").write_text(json.dumps(info | {"config_name": subset}))
    for file in kept.glob("parquet-*"):
        file.rename(kept / file.name.replace("parquet-", f"{path.split('/')[1]}-"))


def test_a_hub_set_downloaded_earlier(tmp_path, offline):
    solved = [{"question": f"{r['question']}?", "answer": f"It is {r['answer']}\n#### {r['answer']}"} for r in SUMS]
    downloaded(tmp_path, "openai/gsm8k", "main", {"train": solved[:80], "test": solved[80:]})
    data = opened(configured(tmp_path, source="gsm8k", context=48))
    assert {split: len(rows) for split, rows in data.splits.items()} == {"train": 72, "validation": 8, "test": 20}
    assert scored(data, "test")[0] == f" {solved[80]['answer']}<|endoftext|>"
    shutil.rmtree(tmp_path / "hf")
    assert opened(configured(tmp_path, source="gsm8k", context=48)).folder == data.folder  # prepared rows serve on


def test_questions_of_an_unnamed_hub_set(tmp_path, offline):
    downloaded(tmp_path, "owner/name", "default", {"train": SUMS[:60], "validation": SUMS[60:]})
    data = opened(configured(tmp_path, source="owner/name", task="questions", context=32))
    assert {split: len(rows) for split, rows in data.splits.items()} == {"train": 60, "validation": 40}
    assert len(load_questions("owner/name", "all", data.config.data)) == 60


@pytest.mark.parametrize("source", [name for name, found in QUESTION_SETS.items() if found in questions.HUB_SETS])
def test_no_network(tmp_path, offline, source):
    with pytest.raises(DataError, match=f"'{source}' is not on this machine.*data.source=arithmetic"):
        opened(configured(tmp_path, source=source))
    assert left_behind(tmp_path) == []


# ---- a library that may be missing


def test_reasoning_gym(tmp_path, monkeypatch):
    "Against a stand-in of the library's interface: a factory with DATASETS and create_dataset(name, size, seed), whose items are keyed by seed and index."

    class Items:
        def __init__(self, size, seed):
            self.seed = seed

        def __getitem__(self, i):
            return {"question": f"{self.seed % 97} * {i}", "answer": str(self.seed % 97 * i), "metadata": {}}

    factory = types.ModuleType("reasoning_gym.factory")
    factory.DATASETS, factory.create_dataset = (
        {"products": Items},
        lambda name, **given: factory.DATASETS[name](**given),
    )
    monkeypatch.setitem(sys.modules, "reasoning_gym", types.ModuleType("reasoning_gym"))
    monkeypatch.setitem(sys.modules, "reasoning_gym.factory", factory)
    data = opened(configured(tmp_path, source="reasoning_gym:products", max_documents=200, context=32))
    assert {split: len(rows) for split, rows in data.splits.items()} == {"train": 200, "validation": 500, "test": 500}
    with pytest.raises(DataError, match="no task 'product'.*did you mean 'products'"):
        TextData(configured(tmp_path, source="reasoning_gym:product")).prepare_data()


def test_tasks_of_reasoning_gym(tmp_path):
    "The real library: questions are drawn once, disjoint between splits, and their answers can be checked."
    pytest.importorskip("reasoning_gym", reason="the extra reasoning is not installed")
    found = {
        split: load_questions(
            "reasoning_gym:chain_sum", split, Data(source="reasoning_gym:chain_sum", max_documents=50)
        )
        for split in ("train", "validation")
    }
    assert len(found["train"]) == 50 and not {q.prompt for q in found["train"]} & {
        q.prompt for q in found["validation"]
    }
    for q in found["train"]:
        assert eval(re.search(r"[-+\d ]*\d(?= =)", q.prompt)[0]) == int(q.answer), q


def test_reasoning_gym_is_an_extra(tmp_path, monkeypatch, root):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    monkeypatch.delitem(sys.modules, "reasoning_gym.factory", raising=False)
    with pytest.raises(DataError, match=r"pip install 'ebt_workbench\[reasoning\]'"):
        TextData(configured(tmp_path, source="reasoning_gym:gcd")).prepare_data()
    assert (
        "reasoning_requirements = reasoning-gym" in (root / "settings.ini").read_text() and left_behind(tmp_path) == []
    )


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
        ([{"question": "Why?", "answer": CANARY.decode()}] * 2, "for evaluation only"),
    ],
)
def test_bad_questions_are_refused_by_name_and_nothing_is_written(tmp_path, rows, reason):
    with pytest.raises(DataError, match=reason):
        opened(own(tmp_path, rows))
    assert left_behind(tmp_path) == []


@pytest.mark.parametrize(
    "content, reason", [(b"", "is empty"), (b"{torn", "cannot be read as json"), (b"\xff\xfe", "not UTF-8")]
)
def test_broken_files(tmp_path, content, reason):
    (tmp_path / "broken.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=f"broken.jsonl.*{reason}"):
        opened(configured(tmp_path, source=str(tmp_path / "broken.jsonl"), task="questions"))
    assert left_behind(tmp_path) == []


def test_questions_taken_for_text_are_noticed(tmp_path):
    config = own(tmp_path)
    config.data.task = "text"
    with pytest.raises(DataError, match="no column 'text'.*data.task=questions"):
        opened(config)
    with pytest.raises(WorkbenchError, match="data.task"):
        configured(tmp_path, task="riddles")


def test_benchmarks_are_not_trained_on(tmp_path):
    "By name, by path as questions, by path as text: refused before a run folder is made."
    shutil.copy(ASSETS / "reasoning/elementary_math_qa.jsonl.gz", tmp_path / "mine.jsonl.gz")
    for data in [
        dict(source="dyck"),
        dict(source="math_qa"),
        dict(source=str(tmp_path / "mine.jsonl.gz"), task="questions"),
        dict(source=str(tmp_path / "mine.jsonl.gz"), text_column="question"),
        dict(source=str(tmp_path / "mine.jsonl.gz"), text_column="question", streaming=True),
    ]:
        config = configured(tmp_path, context=128, **data)
        config.run.runs_dir = tmp_path / "runs"
        with pytest.raises(DataError, match=f"for evaluation only.*{CANARY.decode()}"):
            fit(config, progress="none")
        if config.data.task == "questions" or config.data.source in QUESTION_SETS:
            with pytest.raises(DataError, match="for evaluation only"):
                check_data(config)
    assert not (tmp_path / "runs").exists()
