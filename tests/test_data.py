"""Text data where a notebook cannot go: several processes at once, a killed preparation, Lightning's own checkpoints, several ranks, and bad input of every kind."""

import errno
import gzip
import json
import os
import shutil
import subprocess
import sys

import datasets
import numpy as np
import pytest
import torch

from ebt_nb.config.config import build_config
from ebt_nb.data import loaders, text
from ebt_nb.data.loaders import TextData
from ebt_nb.data.text import ASSETS, DataError, load_tokenizer
from together import Recorder, check_killed_one_is_replaced, shown_to

NOVEL = gzip.decompress((ASSETS / "text/austen/northanger_abbey.txt.gz").read_bytes()).decode()
DOCUMENTS = [paragraph for paragraph in NOVEL[:60_000].split("\n\n") if paragraph.strip()]


def configured(tmp_path, **data):
    "A tiny run whose cache lies in tmp_path/cache."
    settings = {
        "data.cache_dir": str(tmp_path / "cache"),
        "data.context": 16,
        "data.batch_size": 4,
        "trainer.max_steps": 9,
        "trainer.val_batches": 2,
        "data.validation_fraction": 0.1,
    }
    return build_config("text/quickstart", settings | {f"data.{key}": value for key, value in data.items()})


def opened(config, **place):
    data = TextData(config, **place)
    data.setup()
    return data


def rows(data, split):
    return np.array(data.splits[split]["tokens"])


def left_behind(tmp_path):
    "What a cache holds besides empty lock files."
    return (
        [p.name for p in (tmp_path / "cache").rglob("*") if p.suffix != ".lock"]
        if (tmp_path / "cache").exists()
        else []
    )


def write_jsonl(path, documents=DOCUMENTS, column="text", **more):
    path.parent.mkdir(parents=True, exist_ok=True)
    content = "".join(json.dumps({column: document} | more) + "\n" for document in documents).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return str(path)


# ---- several processes


def opened_in(folder):
    return opened(configured(folder))


def test_one_prepares_others_wait_and_a_killed_one_is_replaced(tmp_path):
    check_killed_one_is_replaced("ebt_nb.data.text:build", opened_in, tmp_path, "ebt_nb.data.loaders")
    assert (rows(opened(configured(tmp_path)), "train") >= 0).all()


# ---- resuming under Lightning


class Rows(Recorder):
    def note(self, batch):
        return batch["index"].tolist()

    def value(self, batch):
        return batch["targets"]


def fitted(*args, **options):
    return shown_to(Rows(), *args, **options)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("streaming, workers", [(False, 0), (False, 2), (True, 0), (True, 2)])
def test_a_resumed_training_sees_the_remaining_batches(tmp_path, streaming, workers):
    config = configured(tmp_path, source=write_jsonl(tmp_path / "own.jsonl"), streaming=streaming, workers=workers)
    straight = fitted(TextData(config), tmp_path, 9)
    checkpoint = tmp_path / "checkpoints" / "step=4.ckpt"
    assert len({tuple(b) for b in straight}) == 9
    state = torch.load(checkpoint, weights_only=True)["loops"]["fit_loop"]["state_dict"]["combined_loader"]
    assert (state[0]["handed_out"] == 4) if streaming else (state[0]["used"] == 4 * 4)  # used up, not fetched ahead
    assert fitted(TextData(config), tmp_path / "again", 9, checkpoint) == straight[4:]


@pytest.mark.filterwarnings("ignore")
def test_a_finished_run_can_go_on_and_accumulation_counts_batches(tmp_path):
    config = configured(tmp_path)
    config.trainer.accumulate = 2
    longer = config.model_copy(deep=True)
    longer.trainer.max_steps = 12
    straight = fitted(TextData(longer), tmp_path / "straight", 12, accumulate_grad_batches=2)
    assert len(straight) == 24
    assert (
        fitted(TextData(longer), tmp_path, 12, tmp_path / "straight/checkpoints/step=8.ckpt", accumulate_grad_batches=2)
        == straight[16:]
    )
    config.trainer.max_steps = 8
    assert fitted(TextData(config), tmp_path / "short", 8, accumulate_grad_batches=2) == straight[:16]
    assert (
        fitted(TextData(longer), tmp_path, 12, tmp_path / "short/checkpoints/step=8.ckpt", accumulate_grad_batches=2)
        == straight[16:]
    )


@pytest.mark.filterwarnings("ignore")
def test_resuming_on_other_data_is_refused(tmp_path):
    fitted(TextData(configured(tmp_path)), tmp_path, 4)
    other = TextData(configured(tmp_path, source=write_jsonl(tmp_path / "own.jsonl")))
    with pytest.raises(DataError, match="other data"):
        fitted(other, tmp_path / "again", 9, tmp_path / "checkpoints/step=4.ckpt")


# ---- several ranks

RANKS = """
import json, sys, warnings
warnings.filterwarnings("ignore")
from pathlib import Path
sys.path.insert(0, str(Path(sys.argv[1]).parent))
from ebt_nb.config.config import load_config
from ebt_nb.data.loaders import TextData
import test_data
class Writer(test_data.Rows):
    def on_train_end(self): (folder / f"{self.name}-rank{self.global_rank}.json").write_text(json.dumps(self.seen))
test_data.Rows = Writer
folder = Path(sys.argv[2])
for Writer.name, checkpoint in [("first", None), ("resumed", folder / "first/checkpoints/step=4.ckpt")]:
    test_data.fitted(TextData(load_config(folder / "config.yaml")), folder / Writer.name, 9, checkpoint, devices=2, strategy="ddp_fork")
"""


def ranks(folder):
    "The rows that each of two ranks saw, in a run and in its resumption from step 4."
    done = subprocess.run(
        [sys.executable, "-c", RANKS, __file__, str(folder)],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [
        [json.loads((folder / f"{name}-rank{r}.json").read_text()) for r in (0, 1)] for name in ("first", "resumed")
    ]


@pytest.mark.parametrize("streaming", [False, True])
def test_ranks_share_batches_without_overlap_and_resume(tmp_path, streaming):
    config = configured(tmp_path, source=write_jsonl(tmp_path / "own.jsonl"), streaming=streaming)
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    seen, resumed = ranks(tmp_path)
    assert not {i for batch in seen[0] for i in batch} & {i for batch in seen[1] for i in batch}
    if not streaming:
        config.data.batch_size = 8
        alone = opened(config).train_dataloader()
        assert [sorted(a + b) for a, b in zip(*seen)] == [
            sorted(batch["index"].tolist()) for _, batch in zip(range(9), alone)
        ]
    assert resumed == [own[4:] for own in seen]


# ---- forms of corpora


def test_every_file_format_gives_the_same_rows(tmp_path):
    documents = [NOVEL[i : i + 9000] for i in range(0, 54_000, 9000)]
    (tmp_path / "texts").mkdir()
    for i, document in enumerate(documents):
        (tmp_path / "texts" / f"{i}.txt").write_text(document)
    (tmp_path / "list.json").write_text(
        json.dumps([{"text": document, "id": i} for i, document in enumerate(documents)])
    )
    datasets.Dataset.from_dict({"text": documents}).to_parquet(tmp_path / "table.parquet")
    sources = [
        tmp_path / "texts",
        tmp_path / "texts" / "*.txt",
        tmp_path / "list.json",
        tmp_path / "table.parquet",
        write_jsonl(tmp_path / "lines.jsonl", documents),
        write_jsonl(tmp_path / "lines.jsonl.gz", documents),
    ]
    found = [opened(configured(tmp_path, source=str(source))) for source in sources]
    for split in ("train", "validation"):
        assert all(np.array_equal(rows(data, split), rows(found[0], split)) for data in found)
    assert (
        len({data.folder for data in found}) == len(sources)
        and (rows(found[0], "train") == found[0].tokenizer.end_of_text).sum() >= 5
    )


def test_changed_content_is_prepared_again_and_max_documents_limits(tmp_path):
    path = write_jsonl(tmp_path / "own.jsonl")
    first = opened(configured(tmp_path, source=path))
    write_jsonl(tmp_path / "own.jsonl", DOCUMENTS[::-1])
    second = opened(configured(tmp_path, source=path))
    assert first.folder != second.folder and not np.array_equal(rows(first, "train"), rows(second, "train"))
    few = opened(configured(tmp_path, source=path, max_documents=30))
    whole = np.concatenate([rows(few, split)[:, 1:].ravel() for split in ("train", "validation")])
    assert (whole == few.tokenizer.end_of_text).sum() == 30


@pytest.mark.parametrize("streaming", [False, True])
def test_redpajama_as_it_lies_on_its_server(tmp_path, monkeypatch, streaming):
    monkeypatch.setattr(text, "REDPAJAMA", str(tmp_path))
    monkeypatch.setattr(text, "REDPAJAMA_SHARDS", 2)
    for shard in range(2):
        for i, part in enumerate(("head", "middle")):
            write_jsonl(
                tmp_path / f"2023-06/{shard:04d}/en_{part}.json.gz",
                DOCUMENTS[shard * 2 + i :: 4],
                "raw_content",
                url="example.org",
                nlines=1,
                language="en",
            )
    data = opened(configured(tmp_path, source="redpajama-v2", streaming=streaming))
    batch = next(iter(data.train_dataloader()))
    words = data.tokenizer.decode(batch["inputs"][0].tolist())
    assert any(w in NOVEL for w in words.split("<|endoftext|>")) and batch["inputs"].shape == (4, 16)
    assert 2.5 < data.characters_per_token["validation"] < 4


def test_a_table_with_redpajamas_columns(tmp_path):
    table = {
        "raw_content": DOCUMENTS,
        "doc_id": [str(i) for i in range(len(DOCUMENTS))],
        "meta": ["{}"] * len(DOCUMENTS),
        "quality_signals": ["{}"] * len(DOCUMENTS),
    }
    datasets.Dataset.from_dict(table).to_parquet(tmp_path / "sample.parquet")
    data = opened(configured(tmp_path, source=str(tmp_path / "sample.parquet"), text_column="raw_content"))
    same = opened(configured(tmp_path, source=write_jsonl(tmp_path / "own.jsonl")))
    assert np.array_equal(rows(data, "train"), rows(same, "train"))
    with pytest.raises(DataError, match="no column 'text'.*raw_content, doc_id, meta, quality_signals"):
        opened(configured(tmp_path, source=str(tmp_path / "sample.parquet")))


# ---- the hub


@pytest.fixture
def offline(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hf"))


@pytest.mark.parametrize("source, streaming", [("fineweb", False), ("fineweb", True), ("owner/name", False)])
def test_no_network(tmp_path, offline, source, streaming):
    with pytest.raises(DataError, match="cannot be reached.*data.source=austen.*HF_HOME.*data.cache_dir"):
        opened(configured(tmp_path, source=source, streaming=streaming))
    assert left_behind(tmp_path) == []


def downloaded(folder):
    "What `datasets` keeps of a hub data set owner/name: 2 splits with columns text and n."
    for split, part in [("train", DOCUMENTS[:150]), ("validation", DOCUMENTS[150:180])]:
        datasets.Dataset.from_dict({"text": part, "n": list(range(len(part)))}).to_parquet(folder / f"{split}.parquet")
    datasets.load_dataset(
        "parquet",
        data_files={s: str(folder / f"{s}.parquet") for s in ("train", "validation")},
        cache_dir=str(folder / "hf"),
    )
    made = next((folder / "hf").glob("parquet/*/*/*/dataset_info.json")).parent
    kept = folder / "hf" / "owner___name" / "default" / "0.0.0" / made.name
    shutil.copytree(made, kept)
    for path in kept.glob("parquet-*"):
        path.rename(kept / path.name.replace("parquet-", "name-"))


def test_a_hub_set_downloaded_earlier(tmp_path, offline):
    downloaded(tmp_path)
    data = opened(configured(tmp_path, source="owner/name"))
    assert "<|endoftext|>".join(DOCUMENTS).startswith(data.tokenizer.decode(rows(data, "train")[:2, 1:].ravel()))
    held_out = rows(data, "validation")[:, 1:]
    assert (held_out == data.tokenizer.end_of_text).sum() == 30  # its own validation split, whole
    streamed = opened(configured(tmp_path, source="owner/name", streaming=True))
    assert next(iter(streamed.train_dataloader()))["inputs"].shape == (4, 16)
    with pytest.raises(DataError, match="data.split.*'trian'.*train, validation"):
        opened(configured(tmp_path, source="owner/name", split="trian"))
    with pytest.raises(DataError, match="no column 'texts'.*did you mean 'text'"):
        opened(configured(tmp_path, source="owner/name", text_column="texts"))


def test_rows_prepared_earlier_serve_without_network(tmp_path, offline, capfd):
    downloaded(tmp_path)
    before = opened(configured(tmp_path, source="owner/name"))
    shutil.rmtree(tmp_path / "hf")
    after = opened(configured(tmp_path, source="owner/name"))
    assert after.folder == before.folder and "using the rows prepared earlier" in capfd.readouterr().err
    with pytest.raises(DataError, match="cannot be reached"):
        opened(configured(tmp_path, source="owner/name", context=32))  # that was never prepared


# ---- bad input


def bad_corpora(tmp_path):
    "name -> (source, what the message must say)"
    (tmp_path / "late.txt").write_bytes(NOVEL.encode()[:1_100_000] * 4 + b"\xff\xfe")
    (tmp_path / "photo.png").write_bytes(b"\x89PNG\r\n\x1a\n\0\0")
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "blank.txt").write_text(" \n\n ")
    (tmp_path / "short.txt").write_text("Too short.")
    (tmp_path / "torn.jsonl").write_text('{"text": "fine"}\n{"text": "to')
    (tmp_path / "torn.parquet").write_bytes(b"PAR1 and no more")
    (tmp_path / "torn.txt.gz").write_bytes(gzip.compress(NOVEL[:9000].encode())[:-100])
    (tmp_path / "plain.txt.gz").write_bytes(b"not gzip at all")
    (tmp_path / "numbers.jsonl").write_text('{"text": 1}\n{"text": 2}\n')
    (tmp_path / "mixed").mkdir()
    (tmp_path / "mixed/a.txt").write_text("a")
    (tmp_path / "mixed/b.json").write_text("{}")
    (tmp_path / "nothing").mkdir()
    return {
        "late.txt": "not UTF-8",
        "photo.png": "not UTF-8",
        "empty.jsonl": "is empty",
        "blank.txt": "holds no text",
        "short.txt": "do not fill 2 rows of data.context=16",
        "torn.jsonl": "cannot be read as json",
        "torn.parquet": "cannot be read as parquet",
        "torn.txt.gz": "cannot be read",
        "plain.txt.gz": "cannot be read",
        "numbers.jsonl": "holds int, not text",
        "mixed": "json and text",
        "nothing": "holds no file",
        "missing.txt": "no such file",
    }


def test_bad_corpora_are_refused_by_name_and_nothing_is_written(tmp_path):
    for name, reason in bad_corpora(tmp_path).items():
        with pytest.raises(DataError) as caught:
            opened(configured(tmp_path, source=str(tmp_path / name)))
        assert name in str(caught.value) and reason in str(caught.value), (name, str(caught.value))
        assert left_behind(tmp_path) == [], name


@pytest.mark.parametrize(
    "name", ["late.txt", "photo.png", "empty.jsonl", "torn.jsonl", "torn.parquet", "numbers.jsonl", "missing.txt"]
)
def test_bad_corpora_are_refused_when_streamed(tmp_path, name):
    reason = bad_corpora(tmp_path)[name]

    def stream():
        data = opened(configured(tmp_path, source=str(tmp_path / name), streaming=True))
        for _ in zip(range(10_000), data.train_dataloader()):
            pass

    with pytest.raises(DataError) as caught:
        stream()
    assert name in str(caught.value) and reason in str(caught.value), str(caught.value)


def test_more_streams_than_documents_is_an_error_not_a_hang(tmp_path):
    config = configured(
        tmp_path, source=write_jsonl(tmp_path / "few.jsonl", [NOVEL[:30_000]]), streaming=True, validation_fraction=1e-9
    )
    source = TextData(config).source
    stream = loaders.Stream(
        text.open_source(source)[0]["train"],
        source,
        load_tokenizer("austen_2k"),
        16,
        4,
        33,
        number=1,
        of=2,
        held_out=0.0,
    )
    with pytest.raises(DataError, match="stream 1 of 2 found no document.*data.workers"):
        next(stream.batches(None, 0))
    with pytest.raises(DataError, match="raise data.validation_fraction"):
        opened(config)


def test_bad_tokenizers(tmp_path):
    whole = json.loads((ASSETS / "tokenizers/austen_bpe_2k.json").read_text())
    endless = whole | {"added_tokens": []}
    endless["model"] = whole["model"] | {
        "vocab": {k if k != "<|endoftext|>" else "<stop>": v for k, v in whole["model"]["vocab"].items()}
    }
    (tmp_path / "endless.json").write_text(json.dumps(endless))
    with pytest.raises(DataError, match="no end-of-text token"):
        load_tokenizer(str(tmp_path / "endless.json"))
    truncating = whole | {
        "truncation": {"direction": "Right", "max_length": 5, "strategy": "LongestFirst", "stride": 0}
    }
    (tmp_path / "truncating.json").write_text(json.dumps(truncating))
    assert (
        len(load_tokenizer(str(tmp_path / "truncating.json")).encode(DOCUMENTS[9])) > 5
    )  # settings of a fine-tuned model's file do not cut a corpus short
    with pytest.raises(DataError, match="missing.json"):
        load_tokenizer(str(tmp_path / "missing.json"))


def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "cache").write_text("a file, not a folder")
    with pytest.raises(DataError, match="data.cache_dir"):
        opened(configured(tmp_path))
    (tmp_path / "cache").unlink()

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(text.ArrowWriter, "write_batch", full)
    with pytest.raises(DataError, match="No space left on device.*free space"):
        opened(configured(tmp_path))
    assert left_behind(tmp_path) == []


def test_damaged_prepared_data_names_the_folder(tmp_path):
    data = opened(configured(tmp_path))
    (data.folder / "train.arrow").write_bytes(b"damaged")
    with pytest.raises(DataError, match="delete this folder"):
        opened(configured(tmp_path))
