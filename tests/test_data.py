"""Text data where a notebook cannot go.

Several processes at once, a killed preparation, Lightning's own checkpoints, several ranks, and bad input of every
kind.
"""

import errno
import gzip
import json
import shutil

import datasets
import numpy as np
import pytest
import torch
from data_checks import BatchRecorder, check_killed_preparation_is_replaced, fit_and_record

from ebt_nb.config.overrides import build_config
from ebt_nb.data import documents, packing
from ebt_nb.data.rows import open_streams
from ebt_nb.data.sources import ASSETS, DataError
from ebt_nb.data.text_loaders import BatchStream, TextDataModule
from ebt_nb.data.tokenizers import load_tokenizer

NOVEL = gzip.decompress((ASSETS / "text/austen/northanger_abbey.txt.gz").read_bytes()).decode()
DOCUMENTS = [paragraph for paragraph in NOVEL[:60_000].split("\n\n") if paragraph.strip()]


def text_config(tmp_path, **data):
    "A tiny run whose cache lies in tmp_path/cache; `data` changes keys of the data section."
    settings = {
        "data.cache_dir": str(tmp_path / "cache"),
        "data.context": 16,
        "data.batch_size": 4,
        "trainer.max_steps": 9,
        "trainer.val_batches": 2,
        "data.validation_fraction": 0.1,
    }
    return build_config("text/quickstart", settings | {f"data.{key}": value for key, value in data.items()})


def open_data(config):
    data = TextDataModule(config)
    data.setup()
    return data


def token_rows(data, split):
    return np.array(data.splits[split]["tokens"])


def list_cache(tmp_path):
    "What a cache holds besides empty lock files."
    return [path.name for path in (tmp_path / "cache").rglob("*") if path.suffix != ".lock"]


def write_jsonl(path, texts=DOCUMENTS, column="text", **other_columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    content = "".join(json.dumps({column: text} | other_columns) + "\n" for text in texts).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return str(path)


# ---- several processes


def open_in(folder):
    return open_data(text_config(folder))


def test_one_prepares_others_wait_and_a_killed_one_is_replaced(tmp_path):
    writer, preload = "ebt_nb.data.packing:write_text_cache", "ebt_nb.data.text_loaders"
    check_killed_preparation_is_replaced(writer, open_in, tmp_path, preload)
    assert (token_rows(open_data(text_config(tmp_path)), "train") >= 0).all()


# ---- resuming under Lightning


class RowRecorder(BatchRecorder):
    "Record the row numbers of batches."

    def describe_batch(self, batch):
        return batch["index"].tolist()

    def training_values(self, batch):
        return batch["targets"]


def fit_rows(*arguments, **options):
    return fit_and_record(RowRecorder(), *arguments, **options)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("streaming, workers", [(False, 0), (False, 2), (True, 0), (True, 2)])
def test_a_resumed_training_sees_the_remaining_batches(tmp_path, streaming, workers):
    config = text_config(tmp_path, source=write_jsonl(tmp_path / "own.jsonl"), streaming=streaming, workers=workers)
    expected = fit_rows(TextDataModule(config), tmp_path, 9)
    checkpoint = tmp_path / "checkpoints" / "step=4.ckpt"
    assert len({tuple(batch) for batch in expected}) == 9
    [state] = torch.load(checkpoint, weights_only=True)["loops"]["fit_loop"]["state_dict"]["combined_loader"]
    num_served = state["batches_served"] if streaming else state["rows_used"] / 4
    assert num_served == 4  # served, not fetched
    assert fit_rows(TextDataModule(config), tmp_path / "again", 9, checkpoint) == expected[4:]


@pytest.mark.filterwarnings("ignore")
def test_a_finished_run_can_be_resumed_and_accumulation_counts_batches(tmp_path):
    config = text_config(tmp_path)
    config.trainer.accumulate_grad_batches = 2
    longer = config.model_copy(deep=True)
    longer.trainer.max_steps = 12
    config.trainer.max_steps = 8

    def fit(config, folder, updates, checkpoint=None):
        return fit_rows(TextDataModule(config), folder, updates, checkpoint, accumulate_grad_batches=2)

    expected = fit(longer, tmp_path / "expected", 12)
    assert len(expected) == 24
    assert fit(longer, tmp_path, 12, tmp_path / "expected/checkpoints/step=8.ckpt") == expected[16:]
    assert fit(config, tmp_path / "short", 8) == expected[:16]
    assert fit(longer, tmp_path, 12, tmp_path / "short/checkpoints/step=8.ckpt") == expected[16:]


@pytest.mark.filterwarnings("ignore")
def test_resuming_on_other_data_is_refused(tmp_path):
    fit_rows(TextDataModule(text_config(tmp_path)), tmp_path, 4)
    other = TextDataModule(text_config(tmp_path, source=write_jsonl(tmp_path / "own.jsonl")))
    with pytest.raises(DataError, match="other data"):
        fit_rows(other, tmp_path / "again", 9, tmp_path / "checkpoints/step=4.ckpt")


# ---- several ranks

TRAIN_TWICE = """
import json, sys, warnings
warnings.filterwarnings("ignore")
from pathlib import Path
folder = Path(sys.argv[1])
from ebt_nb.config.overrides import load_config
from ebt_nb.data.text_loaders import TextDataModule
import data_checks, test_data

class RecordWriter(test_data.RowRecorder):
    def on_train_end(self):
        (folder / f"{self.name}-rank{self.global_rank}.json").write_text(json.dumps(self.recorded))

for name, checkpoint in [("first", None), ("resumed", folder / "first/checkpoints/step=4.ckpt")]:
    module, data = RecordWriter(), TextDataModule(load_config(folder / "config.yaml"))
    module.name = name
    data_checks.fit_and_record(module, data, folder / name, 9, checkpoint, devices=2, strategy="ddp_fork")
"""


def train_two_ranks_twice(forker, folder):
    "Return the row numbers that each of two ranks was trained on, in a run and in its resumption from step 4."
    code, _, errors = forker.run_script(TRAIN_TWICE, folder)
    assert code == 0, errors[-3000:]
    return [
        [json.loads((folder / f"{name}-rank{rank}.json").read_text()) for rank in (0, 1)]
        for name in ("first", "resumed")
    ]


@pytest.mark.parametrize("streaming", [False, True])
def test_ranks_share_batches_without_overlap_and_resume(tmp_path, streaming, forker):
    config = text_config(tmp_path, source=write_jsonl(tmp_path / "own.jsonl"), streaming=streaming)
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    first, resumed = train_two_ranks_twice(forker, tmp_path)
    numbers = [{number for batch in batches for number in batch} for batches in first]
    assert not numbers[0] & numbers[1]
    if not streaming:
        config.data.batch_size = 8
        one_rank = [sorted(batch["index"].tolist()) for _, batch in zip(range(9), open_data(config).train_dataloader())]
        assert [sorted(a + b) for a, b in zip(*first)] == one_rank
    assert resumed == [batches[4:] for batches in first]


# ---- forms of corpora


def test_every_file_format_gives_the_same_rows(tmp_path):
    texts = [NOVEL[i : i + 9000] for i in range(0, 54_000, 9000)]
    (tmp_path / "texts").mkdir()
    for i, text in enumerate(texts):
        (tmp_path / "texts" / f"{i}.txt").write_text(text)
    (tmp_path / "list.json").write_text(json.dumps([{"text": text, "id": i} for i, text in enumerate(texts)]))
    datasets.Dataset.from_dict({"text": texts}).to_parquet(tmp_path / "table.parquet")
    sources = [
        tmp_path / "texts",
        tmp_path / "texts" / "*.txt",
        tmp_path / "list.json",
        tmp_path / "table.parquet",
        write_jsonl(tmp_path / "lines.jsonl", texts),
        write_jsonl(tmp_path / "lines.jsonl.gz", texts),
    ]
    found = [open_data(text_config(tmp_path, source=str(source))) for source in sources]
    for split in ("train", "validation"):
        assert all(np.array_equal(token_rows(data, split), token_rows(found[0], split)) for data in found)
    assert len({data.folder for data in found}) == len(sources)
    assert (token_rows(found[0], "train") == found[0].tokenizer.end_of_text_id).sum() >= 5


def test_changed_content_is_prepared_again_and_max_documents_limits(tmp_path):
    path = write_jsonl(tmp_path / "own.jsonl")
    first = open_data(text_config(tmp_path, source=path))
    write_jsonl(tmp_path / "own.jsonl", DOCUMENTS[::-1])
    second = open_data(text_config(tmp_path, source=path))
    assert first.folder != second.folder
    assert not np.array_equal(token_rows(first, "train"), token_rows(second, "train"))
    few = open_data(text_config(tmp_path, source=path, max_documents=30))
    whole = np.concatenate([token_rows(few, split)[:, 1:].ravel() for split in ("train", "validation")])
    assert (whole == few.tokenizer.end_of_text_id).sum() == 30


@pytest.mark.parametrize("streaming", [False, True])
def test_redpajama_as_it_lies_on_its_server(tmp_path, monkeypatch, streaming):
    monkeypatch.setattr(documents, "REDPAJAMA_URL", str(tmp_path))
    monkeypatch.setattr(documents, "REDPAJAMA_SHARDS", 2)
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
    data = open_data(text_config(tmp_path, source="redpajama-v2", streaming=streaming))
    batch = next(iter(data.train_dataloader()))
    words = data.tokenizer.decode(batch["inputs"][0].tolist())
    assert any(part in NOVEL for part in words.split("<|endoftext|>")) and batch["inputs"].shape == (4, 16)
    assert 2.5 < data.characters_per_token["validation"] < 4


def test_a_table_with_redpajamas_columns(tmp_path):
    table = {
        "raw_content": DOCUMENTS,
        "doc_id": [str(i) for i in range(len(DOCUMENTS))],
        "meta": ["{}"] * len(DOCUMENTS),
        "quality_signals": ["{}"] * len(DOCUMENTS),
    }
    datasets.Dataset.from_dict(table).to_parquet(tmp_path / "sample.parquet")
    data = open_data(text_config(tmp_path, source=str(tmp_path / "sample.parquet"), text_column="raw_content"))
    same = open_data(text_config(tmp_path, source=write_jsonl(tmp_path / "own.jsonl")))
    assert np.array_equal(token_rows(data, "train"), token_rows(same, "train"))
    with pytest.raises(DataError, match=r"no column 'text'.*raw_content, doc_id, meta, quality_signals"):
        open_data(text_config(tmp_path, source=str(tmp_path / "sample.parquet")))


# ---- the hub


@pytest.fixture
def offline(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hf"))


@pytest.mark.parametrize("source, streaming", [("fineweb", False), ("fineweb", True), ("owner/name", False)])
def test_no_network(tmp_path, offline, source, streaming):
    with pytest.raises(DataError, match=r"cannot be reached.*data.source=austen.*HF_HOME.*data.cache_dir"):
        open_data(text_config(tmp_path, source=source, streaming=streaming))
    assert list_cache(tmp_path) == []


def write_hub_cache(folder):
    "Write what `datasets` keeps of a hub data set owner/name: two splits with columns text and n."
    files = {split: str(folder / f"{split}.parquet") for split in ("train", "validation")}
    for split, texts in [("train", DOCUMENTS[:150]), ("validation", DOCUMENTS[150:180])]:
        datasets.Dataset.from_dict({"text": texts, "n": list(range(len(texts)))}).to_parquet(files[split])
    datasets.load_dataset("parquet", data_files=files, cache_dir=str(folder / "hf"))
    made = next((folder / "hf").glob("parquet/*/*/*/dataset_info.json")).parent
    kept = folder / "hf" / "owner___name" / "default" / "0.0.0" / made.name
    shutil.copytree(made, kept)
    for path in kept.glob("parquet-*"):
        path.rename(kept / path.name.replace("parquet-", "name-"))


def test_a_hub_set_downloaded_earlier(tmp_path, offline):
    write_hub_cache(tmp_path)
    data = open_data(text_config(tmp_path, source="owner/name"))
    assert "<|endoftext|>".join(DOCUMENTS).startswith(data.tokenizer.decode(token_rows(data, "train")[:2, 1:].ravel()))
    held_out = token_rows(data, "validation")[:, 1:]
    assert (held_out == data.tokenizer.end_of_text_id).sum() == 30  # its own validation split, whole
    streamed = open_data(text_config(tmp_path, source="owner/name", streaming=True))
    assert next(iter(streamed.train_dataloader()))["inputs"].shape == (4, 16)
    with pytest.raises(DataError, match=r"data.split.*'trian'.*train, validation"):
        open_data(text_config(tmp_path, source="owner/name", split="trian"))
    with pytest.raises(DataError, match=r"no column 'texts'.*did you mean 'text'"):
        open_data(text_config(tmp_path, source="owner/name", text_column="texts"))


def test_rows_prepared_earlier_serve_without_network(tmp_path, offline, capfd):
    write_hub_cache(tmp_path)
    before = open_data(text_config(tmp_path, source="owner/name"))
    shutil.rmtree(tmp_path / "hf")
    after = open_data(text_config(tmp_path, source="owner/name"))
    assert after.folder == before.folder and "using the rows prepared earlier" in capfd.readouterr().err
    with pytest.raises(DataError, match="cannot be reached"):
        open_data(text_config(tmp_path, source="owner/name", context=32))  # that was never prepared


# ---- bad input


def write_bad_corpora(tmp_path):
    "Write corpora that cannot be used; return what the message about each must say."
    (tmp_path / "late.txt").write_bytes(NOVEL.encode()[:1_100_000] * 4 + b"\xff\xfe")
    (tmp_path / "photo.png").write_bytes(b"\x89PNG\r\n\x1a\n\0\0")
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "blank.txt").write_text(" \n\n ")
    (tmp_path / "short.txt").write_text("Too short.")
    (tmp_path / "torn.jsonl").write_text('{"text": "fine"}\n{"text": "to')
    (tmp_path / "torn.parquet").write_bytes(b"PAR1 and no more")
    (tmp_path / "torn.txt.gz").write_bytes(gzip.compress(NOVEL[:9000].encode())[:-100])
    (tmp_path / "plain.txt.gz").write_bytes(b"Not gzip at all.")
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
        "torn.jsonl": "line 2 is not JSON",
        "torn.parquet": "cannot be read as parquet",
        "torn.txt.gz": "cannot be read",
        "plain.txt.gz": "do not fill 2 rows",
        "numbers.jsonl": "holds int, not text",
        "mixed": "json and text",
        "nothing": "holds no file",
        "missing.txt": "no such file",
    }


def test_bad_corpora_are_refused_by_name_and_nothing_is_written(tmp_path):
    for name, reason in write_bad_corpora(tmp_path).items():
        with pytest.raises(DataError) as caught:
            open_data(text_config(tmp_path, source=str(tmp_path / name)))
        assert name in str(caught.value) and reason in str(caught.value), (name, str(caught.value))
        assert list_cache(tmp_path) == [], name


@pytest.mark.parametrize(
    "name", ["late.txt", "photo.png", "empty.jsonl", "torn.jsonl", "torn.parquet", "numbers.jsonl", "missing.txt"]
)
def test_bad_corpora_are_refused_when_streamed(tmp_path, name):
    reason = write_bad_corpora(tmp_path)[name]

    def read_stream():
        data = open_data(text_config(tmp_path, source=str(tmp_path / name), streaming=True))
        for _ in zip(range(10_000), data.train_dataloader()):
            pass

    with pytest.raises(DataError) as caught:
        read_stream()
    assert name in str(caught.value) and reason in str(caught.value), str(caught.value)


def test_more_streams_than_documents_is_an_error_not_a_hang(tmp_path):
    few = write_jsonl(tmp_path / "few.jsonl", [NOVEL[:30_000]])
    config = text_config(tmp_path, source=few, streaming=True, validation_fraction=1e-9)
    source = TextDataModule(config).source
    corpus, tokenizer = open_streams(source)[0]["train"], load_tokenizer("austen_2k")
    settings = dict(context=16, batch_size=4, seed=33, stream_index=1, num_streams=2, validation_fraction=0.0)
    stream = BatchStream(corpus, source, tokenizer, **settings)
    with pytest.raises(DataError, match=r"stream 1 of 2 found no document.*data\.workers"):
        next(stream.read_batches(None, 0))
    with pytest.raises(DataError, match=r"raise data\.validation_fraction"):
        open_data(config)


def test_bad_tokenizers(tmp_path):
    complete = json.loads((ASSETS / "tokenizers/austen_bpe_2k.json").read_text())
    vocabulary = {token if token != "<|endoftext|>" else "<stop>": i for token, i in complete["model"]["vocab"].items()}
    without_end = complete | {"added_tokens": [], "model": complete["model"] | {"vocab": vocabulary}}
    (tmp_path / "without_end.json").write_text(json.dumps(without_end))
    with pytest.raises(DataError, match="no end-of-text token"):
        load_tokenizer(str(tmp_path / "without_end.json"))
    # Settings of a fine-tuned model's file do not cut a corpus short.
    truncation = {"direction": "Right", "max_length": 5, "strategy": "LongestFirst", "stride": 0}
    (tmp_path / "truncating.json").write_text(json.dumps(complete | {"truncation": truncation}))
    assert len(load_tokenizer(str(tmp_path / "truncating.json")).encode(DOCUMENTS[9])) > 5
    with pytest.raises(DataError, match=r"missing.json"):
        load_tokenizer(str(tmp_path / "missing.json"))


def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "cache").write_text("a file, not a folder")
    with pytest.raises(DataError, match=r"data.cache_dir"):
        open_data(text_config(tmp_path))
    (tmp_path / "cache").unlink()

    def raise_disk_full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(packing.ArrowWriter, "write_batch", raise_disk_full)
    with pytest.raises(DataError, match=r"No space left on device.*free space"):
        open_data(text_config(tmp_path))
    assert list_cache(tmp_path) == []


def test_damaged_prepared_data_names_the_folder(tmp_path):
    data = open_data(text_config(tmp_path))
    (data.folder / "train.arrow").write_bytes(b"damaged")
    with pytest.raises(DataError, match="delete this folder"):
        open_data(text_config(tmp_path))
