"""Folders as they lie on real machines.

What is held out, what tools leave behind, what files are packed with, and files that are no data at all: for text,
questions and images. The last part draws corpora of any bytes and any JSON.
"""

import bz2
import gzip
import json
import lzma
import os
import re
import shutil
import tempfile
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_images import EMOJI, build_test_config, count_rows, encode_image, sorted_pixels, write_folder, write_parquet
from test_images import open_data as open_images

from ebt_nb.config.data import QuestionDataConfig, TextDataConfig
from ebt_nb.config.errors import LFS_POINTER
from ebt_nb.config.overrides import build_config
from ebt_nb.data.documents import find_text_source
from ebt_nb.data.packing import prepare_text
from ebt_nb.data.question_sets import load_questions
from ebt_nb.data.sources import ASSETS, DataError
from ebt_nb.data.text_loaders import TextDataModule, open_prepared_rows
from ebt_nb.data.tokenizers import load_tokenizer
from ebt_nb.training.checkpoints import CheckpointError, read_checkpoint

NOVEL = gzip.decompress((ASSETS / "text/austen/northanger_abbey.txt.gz").read_bytes()).decode()
TOKENIZER = load_tokenizer("austen_2k")
POINTER = LFS_POINTER + b"v1\noid sha256:" + b"0" * 64 + b"\nsize 123456\n"
PACK = {
    "gz": lambda content: gzip.compress(content[:999]) + gzip.compress(content[999:]),
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": lambda content: pyarrow.compress(content, "zstd", asbytes=True),
}


def prepare_rows(source, cache, **settings):
    "The token rows of a corpus, by split."
    data = TextDataConfig(source=str(source), tokenizer="austen_2k", context=16, cache_dir=cache, **settings)
    rows, _ = open_prepared_rows(prepare_text(find_text_source(data), TOKENIZER, data))
    return {split: np.array(table["tokens"]) for split, table in rows.items()}


def whole_text(rows, *splits):
    "The text of rows in order, for a corpus of one document."
    tokens = np.concatenate([rows[split][:, 1:].ravel() for split in splits or ("train", "validation")])
    return TOKENIZER.decode(tokens[tokens >= 0]).removesuffix("<|endoftext|>")


def write_text(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def json_lines(*texts, **columns):
    return "".join(json.dumps({"text": text} | columns) + "\n" for text in texts)


# ---- what is held out

PARTS = dict(train=NOVEL[:20_000], validation=NOVEL[20_000:24_000], test=NOVEL[24_000:28_000])


@pytest.mark.parametrize(
    "train, validation, test",
    [
        ("train.txt", "validation.txt", "test.txt"),
        ("Training.md", "dev.md", "eval.md"),
        ("corpus/train/a.txt", "corpus/val/a.txt", "corpus/test/a.txt"),
        ("train-00000-of-00001.jsonl.gz", "valid-00000-of-00001.jsonl", "test-00000-of-00001.jsonl.zst"),
        ("data/wiki_train.parquet", "data/wiki_valid.parquet", "data/wiki_test.parquet"),
        ("book.txt", "notes/validation.txt", "notes/test.txt"),
    ],
)
def test_held_out_parts_are_never_trained_on(tmp_path, capfd, train, validation, test):
    names = dict(train=train, validation=validation, test=test)
    for split, name in names.items():
        path = tmp_path / "corpus" / name
        suffix = path.suffix.lstrip(".")
        if suffix == "parquet":
            path.parent.mkdir(parents=True, exist_ok=True)
            datasets.Dataset.from_dict({"text": [PARTS[split]]}).to_parquet(path)
        else:
            content = json_lines(PARTS[split]) if "json" in name else PARTS[split]
            write_text(path, PACK.get(suffix, bytes)(content.encode()))
    rows = prepare_rows(tmp_path / "corpus", tmp_path / "cache")
    for split, text in PARTS.items():
        assert whole_text(rows, split) == text[: len(whole_text(rows, split))], split
        assert len(whole_text(rows, split)) > len(text) - 100
    said = capfd.readouterr().err
    assert all(f"{split} = {name}" in said for split, name in names.items()), said


def test_the_test_split_of_a_folder_is_measured_and_streams_leave_it_out(tmp_path):
    for split, text in PARTS.items():
        write_text(tmp_path / f"corpus/{split}.jsonl", json_lines(*(text[i : i + 2000] for i in range(0, 4000, 2000))))
    settings = {"data.source": str(tmp_path / "corpus"), "data.cache_dir": str(tmp_path / "cache")}
    settings |= {"data.context": 16, "data.batch_size": 4, "trainer.val_batches": 2}
    for streaming in (False, True):
        data = TextDataModule(build_config("text/quickstart", settings | {"data.streaming": streaming}))
        data.setup()
        [batch] = [batch for batch, _ in zip(data.test_dataloader(), range(1))]
        text = TOKENIZER.decode(batch["targets"][0].tolist())
        assert text in PARTS["test"]
        for batch, _ in zip(data.train_dataloader(), range(20)):
            for row in batch["targets"]:
                parts = TOKENIZER.decode(row.tolist()).split("<|endoftext|>")
                assert all(part in PARTS["train"] for part in parts)


def test_unclear_splits_are_refused(tmp_path):
    write_text(tmp_path / "mixed/train.txt", NOVEL[:9000])
    write_text(tmp_path / "mixed/test.txt", NOVEL[:9000])
    write_text(tmp_path / "mixed/more.txt", NOVEL[:9000])
    write_text(tmp_path / "only/test.txt", NOVEL[:9000])
    for name, part in dict(mixed="more.txt stands next to parts named like splits", only="only held-out parts").items():
        with pytest.raises(DataError, match=part):
            prepare_rows(tmp_path / name, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()
    assert whole_text(prepare_rows(tmp_path / "only/test.txt", tmp_path / "cache")).startswith(NOVEL[:8000])


def test_question_folders_have_splits_too(tmp_path):
    for number, split in enumerate(("train", "dev", "test")):
        rows = [dict(question=f"{number} {n}", answer=f"{n}") for n in range(5)]
        write_text(tmp_path / f"set/{split}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    write_text(tmp_path / "set/README.md", "Sums.")
    data = QuestionDataConfig(source=str(tmp_path / "set"), tokenizer="austen_2k", cache_dir=tmp_path / "cache")
    found = {split: load_questions(data.source, split, data) for split in ("train", "validation", "test", "all")}
    assert [len(questions) for questions in found.values()] == [5, 5, 5, 15]
    assert all(question.prompt.startswith("Question: 1 ") for question in found["validation"])


# ---- what tools leave behind


def test_leftovers_and_documentation_are_no_text(tmp_path, capfd):
    write_text(tmp_path / "book/chapter.txt", NOVEL[:9000])
    alone = prepare_rows(tmp_path / "book/chapter.txt", tmp_path / "cache")
    leftovers = [".ipynb_checkpoints/chapter-checkpoint.txt", "._chapter.txt", "__MACOSX/._chapter.txt", "chapter.txt~"]
    leftovers += [".git/description.txt", "__MACOSX/chapter.txt"]
    for name in leftovers:
        write_text(tmp_path / "book" / name, b"\0\5\26\7" if "._" in name else NOVEL[20_000:23_000])
    documentation = ["README.md", "readme.txt", "LICENSE", "LICENSE.txt"]
    for name in [*documentation, "cover.pdf", "part2.docx"]:
        write_text(tmp_path / "book" / name, "Read me.")
    for source in ("book", "book/*ter.txt"):
        rows = prepare_rows(tmp_path / source, tmp_path / "cache")
        assert all(np.array_equal(rows[split], alone[split]) for split in ("train", "validation"))
    said = capfd.readouterr().err
    assert all(name in said for name in [*documentation, ".ipynb_checkpoints", "._chapter.txt", "cover.pdf"]), said


def test_hidden_copies_of_images_are_in_no_split(tmp_path, capfd):
    folder = tmp_path / "images"
    for split, numbers in dict(train=range(0, 300, 30), validation=range(600, 900, 60)).items():
        write_folder(folder / split, numbers)
    config = build_test_config(tmp_path, source=str(folder))
    data = open_images(config)
    clean = {split: sorted_pixels(data, split) for split in data.splits}
    shutil.rmtree(tmp_path / "cache")
    for name in (
        "train/.ipynb_checkpoints/a.png",
        "validation/one/.hidden.png",
        ".trash/a.png",
        "__MACOSX/train/b.png",
    ):
        write_text(folder / name, encode_image(EMOJI[0]))
    write_text(folder / "train/one/._0000.png", b"\0\5\26\7")
    write_text(folder / "train/labels.txt", "one two")
    data = open_images(build_test_config(tmp_path, source=str(folder)))
    assert {split: sorted_pixels(data, split) for split in data.splits} == clean
    said = capfd.readouterr().err
    assert "validation = " in said and ".ipynb_checkpoints" in said and "labels.txt" in said, said


def test_images_have_the_same_split_names_as_text(tmp_path):
    write_parquet(tmp_path / "images/train-00000-of-00001.parquet", range(0, 300, 30))
    write_parquet(tmp_path / "images/dev-00000-of-00001.parquet", range(600, 900, 60))
    rows = count_rows(open_images(build_test_config(tmp_path, source=str(tmp_path / "images"))))
    assert rows["train"] + rows.get("test", 0) == 10 and rows["validation"] == 5


# ---- what files are packed with, and what is not a file of data


def test_no_part_of_a_corpus_is_left_out_and_names_do_not_matter(tmp_path):
    whole = prepare_rows(write_text(tmp_path / "whole.txt", NOVEL[:12_000]), tmp_path / "cache")
    for suffix, pack in PACK.items():
        for name in (f"{suffix}/own.txt.{suffix}", f"{suffix}-lost/own.txt", f"{suffix}-other/own.txt.gz"):
            path = write_text(tmp_path / name, pack(NOVEL[:12_000].encode()))
            rows = prepare_rows(path.parent, tmp_path / "cache")
            assert np.array_equal(rows["train"], whole["train"]), name
    rows = prepare_rows(write_text(tmp_path / "plain.txt.gz", NOVEL[:12_000]), tmp_path / "cache")
    assert np.array_equal(rows["train"], whole["train"])
    texts = [NOVEL[i : i + 3000] for i in range(0, 12_000, 3000)]
    for number, (suffix, pack) in enumerate(PACK.items()):
        write_text(tmp_path / f"parts/part{number}.jsonl.{suffix}", pack(json_lines(texts[number]).encode()))
    rows = prepare_rows(tmp_path / "parts", tmp_path / "cache")
    same = prepare_rows(write_text(tmp_path / "same.jsonl", json_lines(*texts)), tmp_path / "cache")
    assert np.array_equal(rows["train"], same["train"])


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json.gz", "a.parquet"])
@pytest.mark.parametrize("streaming", [False, True])
def test_pointers_are_named(tmp_path, name, streaming):
    write_text(tmp_path / "corpus" / name, POINTER)
    settings = {"data.source": str(tmp_path / "corpus"), "data.cache_dir": str(tmp_path / "cache")}
    config = build_config("text/quickstart", settings | {"data.streaming": streaming})
    with pytest.raises(DataError, match=rf"{re.escape(name)}: is a Git-LFS pointer, not the data; run `git lfs pull`"):
        TextDataModule(config).prepare_data()


def test_pointers_are_named_everywhere(tmp_path, capfd):
    folder = tmp_path / "images"
    write_folder(folder, range(0, 300, 30))
    write_text(folder / "one/pointer.png", POINTER)
    open_images(build_test_config(tmp_path, source=str(folder)))
    assert "pointer.png: is a Git-LFS pointer" in capfd.readouterr().err
    with pytest.raises(CheckpointError, match=r"last\.ckpt: is a Git-LFS pointer"):
        read_checkpoint(write_text(tmp_path / "last.ckpt", POINTER))
    with pytest.raises(DataError, match=r"data\.tokenizer: .*is a Git-LFS pointer"):
        load_tokenizer(str(write_text(tmp_path / "tokenizer.json", POINTER)))
    with pytest.raises(DataError, match=r"pointer\.parquet: is a Git-LFS pointer"):
        write_text(tmp_path / "table/pointer.parquet", POINTER)
        open_images(build_test_config(tmp_path, source=str(tmp_path / "table")))


def test_saved_data_sets_are_corpora(tmp_path):
    texts = [NOVEL[i : i + 3000] for i in range(0, 12_000, 3000)]
    table = datasets.Dataset.from_dict({"id": [0, 1, 2, 3], "text": texts})
    table.save_to_disk(tmp_path / "one", num_shards=2)
    same = prepare_rows(write_text(tmp_path / "same.jsonl", json_lines(*texts)), tmp_path / "cache")
    write_text(tmp_path / "one/cache-0123.arrow", b"what map() left behind")
    assert np.array_equal(prepare_rows(tmp_path / "one", tmp_path / "cache")["train"], same["train"])
    datasets.DatasetDict(train=table.select([0, 1, 2]), test=table.select([3])).save_to_disk(tmp_path / "splits")
    rows = prepare_rows(tmp_path / "splits", tmp_path / "cache")
    assert whole_text(rows, "test") == texts[3]
    cells = [{"bytes": encode_image(EMOJI[number]), "path": None} for number in range(0, 300, 30)]
    images = datasets.Dataset.from_dict({"image": cells}).cast_column("image", datasets.Image())
    images.save_to_disk(tmp_path / "images")
    assert sum(count_rows(open_images(build_test_config(tmp_path, source=str(tmp_path / "images")))).values()) == 10


def test_only_the_column_of_the_text_matters(tmp_path):
    texts = [NOVEL[i : i + 3000] for i in range(0, 12_000, 3000)]
    shards = [
        pyarrow.table({"text": pyarrow.array([], pyarrow.null()), "n": pyarrow.array([], pyarrow.int64())}),
        pyarrow.table({}),
        pyarrow.table({"text": texts[:2], "n": [1, 2]}),
        pyarrow.table({"meta": [{"x": 1}], "text": pyarrow.array(texts[2:3], pyarrow.large_string()), "n": ["three"]}),
        pyarrow.table({"text": pyarrow.array(texts[3:]).dictionary_encode()}),
    ]
    for number, shard in enumerate(shards):
        (tmp_path / "parquet").mkdir(exist_ok=True)
        pyarrow.parquet.write_table(shard, tmp_path / f"parquet/part-{number}.parquet")
    lines = json_lines(texts[0], n=1) + json_lines(texts[1], n="two", tags=[]) + json_lines(*texts[2:], n={"x": [None]})
    write_text(tmp_path / "lines.jsonl", lines)
    same = prepare_rows(write_text(tmp_path / "same.jsonl", json_lines(*texts)), tmp_path / "cache")
    for source in ("parquet", "lines.jsonl"):
        assert np.array_equal(prepare_rows(tmp_path / source, tmp_path / "cache")["train"], same["train"])
    pyarrow.parquet.write_table(pyarrow.table({"body": ["no text"]}), tmp_path / "parquet/part-9.parquet")
    with pytest.raises(DataError, match=r"part-9\.parquet' has no column 'text'; it has body"):
        prepare_rows(tmp_path / "parquet", tmp_path / "cache")


def test_only_the_columns_of_images_matter(tmp_path):
    write_parquet(tmp_path / "table/part-0.parquet", [], n=[])
    write_parquet(tmp_path / "table/part-1.parquet", range(0, 300, 30), n=list(range(10)), label=[0] * 10)
    write_parquet(tmp_path / "table/part-2.parquet", range(300, 600, 30), n=["x"] * 10, label=[1] * 10, more=[1.0] * 10)
    data = open_images(build_test_config(tmp_path, source=str(tmp_path / "table")))
    assert sum(count_rows(data).values()) == 20


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_folders_that_cannot_be_read_are_named(tmp_path):
    write_text(tmp_path / "corpus/a.txt", NOVEL[:9000])
    (tmp_path / "corpus/locked").mkdir(mode=0)
    with pytest.raises(DataError, match="locked: cannot be read"):
        prepare_rows(tmp_path / "corpus", tmp_path / "cache")


# ---- corpora of any bytes and any JSON

JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=30),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=8,
)
TEXTS = st.text(st.characters(exclude_categories=("Cs",)), max_size=200)
OTHER_COLUMNS = st.dictionaries(st.text(max_size=6), JSON_VALUES, max_size=2)
JSON_ROWS = st.lists(
    st.builds(lambda text, other: other | {"text": text}, TEXTS | st.none(), OTHER_COLUMNS), max_size=4
)
FILE_NAMES = st.sampled_from(["a.txt", "b.jsonl", "c.json", "d.parquet", "e.arrow", "f.txt.gz", "train.txt", "g"])


def prepare_or_refuse(files):
    "Prepare a folder of files; return the rows, or the message. Anything left behind is a failure."
    with tempfile.TemporaryDirectory() as folder:
        for name, content in files.items():
            write_text(Path(folder, "corpus", name), content)
        try:
            return prepare_rows(Path(folder, "corpus"), Path(folder, "cache"), validation_fraction=0.1)
        except DataError as error:
            left = [path.name for path in Path(folder).glob("cache/**/*") if path.suffix != ".lock"]
            assert not left and folder in str(error), (left, str(error))
            return str(error)


@given(st.dictionaries(FILE_NAMES, st.binary(max_size=300), min_size=1, max_size=3))
def test_any_bytes_are_read_or_refused_by_name(files):
    prepare_or_refuse(files)


@given(TEXTS, st.sampled_from(["\n", "\r\n", "\r"]), st.sampled_from([*PACK, "txt"]))
def test_any_text_arrives_whole(text, line_end, suffix):
    text = f"{text}\n{NOVEL[:300]}"
    content = text.replace("\r", "").replace("\n", line_end).encode()
    found = prepare_or_refuse({f"a.txt.{suffix}" if suffix in PACK else "a.txt": PACK.get(suffix, bytes)(content)})
    if "\0" in text:
        assert "a binary file" in found
    else:
        expected = text.replace("\r", "").removeprefix("\ufeff")
        assert whole_text(found) == TOKENIZER.decode(TOKENIZER.encode(expected))


@given(JSON_ROWS, st.sampled_from(["lines", "array", "indented"]), st.booleans(), st.sampled_from(["\n", "\r\n"]))
def test_any_rows_of_json_arrive_whole(rows, layout, is_ascii, line_end):
    rows = [{"text": NOVEL[:300]}, *rows]
    texts = [row["text"] for row in rows if (row["text"] or "").strip()]
    try:
        if layout == "lines":
            lines = [json.dumps(row, ensure_ascii=is_ascii) for row in rows]
            content = (line_end.join(lines) + line_end).encode()
        else:
            content = json.dumps(rows, indent=1 if layout == "indented" else None, ensure_ascii=is_ascii).encode()
    except UnicodeEncodeError:  # half a surrogate pair cannot be written as UTF-8 at all
        return
    found = prepare_or_refuse({"a.json": content})
    if isinstance(found, str):
        assert "half a surrogate pair" in found or "a binary file" in found, found
    else:
        expected = [TOKENIZER.decode(TOKENIZER.encode(text)) for text in texts]
        assert whole_text(found) == "<|endoftext|>".join(expected)


@given(st.lists(JSON_VALUES, min_size=1, max_size=3))
def test_any_json_is_read_or_refused_by_name(values):
    for content in (json.dumps(values), "\n".join(json.dumps(value) for value in values)):
        prepare_or_refuse({"a.json": content})
