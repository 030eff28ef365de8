"""Pictures where a notebook cannot go: several processes at once, Lightning's own checkpoints, several ranks, every form of a source, and bad input of every kind."""

import errno
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image

from ebt_nb.config.config import ConfigError, build_config
from ebt_nb.data import images
from ebt_nb.data.image_loaders import ImageData, keep_latents, latents_folder
from ebt_nb.data.images import find_images, normalised, opened, pixels_of, prepare_images, read_info, square
from ebt_nb.data.text import ASSETS, DataError
from ebt_nb.jobs.notebook_jobs import run_notebook
from together import Recorder, check_killed_one_is_replaced, shown_to

EMOJI = np.load(ASSETS / "images/emoji32.npz")["images"]


def configured(tmp_path, **data):
    "A tiny run on emoji, or on another source, whose cache lies in tmp_path/cache."
    settings = {
        "data.cache_dir": str(tmp_path / "cache"),
        "data.source": "emoji",
        "data.channels": 3,
        "data.image_size": 8,
        "data.batch_size": 4,
        "model.patch": 2,
        "trainer.max_steps": 9,
        "data.validation_fraction": 0.1,
    }
    return build_config(
        "image/quickstart",
        settings | {(key.replace("__", ".") if "__" in key else f"data.{key}"): value for key, value in data.items()},
    )


def opened_data(config, **place):
    data = ImageData(config, **place)
    data.setup()
    return data


def file_of(array, kind="PNG"):
    "The bytes of a picture file."
    saved = io.BytesIO()
    Image.fromarray(array).save(saved, kind)
    return saved.getvalue()


def write_folder(folder, numbers=range(0, 1200, 30), classes=("one", "two")):
    "A folder of emoji by class."
    for place, number in enumerate(numbers):
        path = folder / classes[place % len(classes)] / f"{number:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(file_of(EMOJI[number]))
    return str(folder)


def write_parquet(path, numbers=range(0, 1200, 30), **columns):
    "A parquet file of emoji as `datasets` writes them."
    cells = [{"bytes": file_of(EMOJI[number]), "path": f"{number:04d}.png"} for number in numbers]
    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict({"image": cells, **columns}).cast_column("image", datasets.Image()).to_parquet(path)
    return str(path)


def left_behind(tmp_path):
    "What a cache holds besides empty lock files."
    return (
        [p.name for p in (tmp_path / "cache").rglob("*") if p.suffix != ".lock"]
        if (tmp_path / "cache").exists()
        else []
    )


def shown(data, split):
    "The pixels of a split, in an order that does not depend on that of the source."
    found = data.rows(split)[np.arange(len(data.splits[split]))]["image"]
    return sorted(pixels_of(image).numpy().tobytes() for image in found)


# ---- what comes with the package


def test_embedded_pictures_are_those_the_readme_describes():
    said = dict(
        re.findall(r"^\| `(images/[^`]+)` .*`([0-9a-f]{64})` \|$", (ASSETS / "README.md").read_text(), re.MULTILINE)
    )
    assert said == {
        f"images/{p.name}": hashlib.sha256(p.read_bytes()).hexdigest() for p in (ASSETS / "images").iterdir()
    }
    for words in ("CC-BY 4.0", "jdecked/twemoji contributors", "changed: composited on white"):
        assert words in (ASSETS / "README.md").read_text()
    for words in ("Zalando", "Cal Henderson"):
        assert words in (ASSETS / "LICENSES/MIT.txt").read_text()


def test_a_wheel_carries_the_pictures(root, tmp_path):
    for name in (
        "settings.ini",
        "setup.py",
        "MANIFEST.in",
        "README.md",
        "LICENSE",
        "ebt_nb",
        "nbs/experiments",
        "job_scripts",
    ):
        if (root / name).is_dir():
            shutil.copytree(root / name, tmp_path / "copy" / name, ignore=shutil.ignore_patterns("__pycache__", "runs"))
        else:
            (tmp_path / "copy").mkdir(exist_ok=True)
            shutil.copy(root / name, tmp_path / "copy")
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            ".",
            "--no-deps",
            "--no-build-isolation",
            "--no-index",
            "--quiet",
            "-w",
            str(tmp_path),
        ],
        cwd=tmp_path / "copy",
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    [wheel] = tmp_path.glob("*.whl")
    assert {
        "ebt_nb/assets/images/emoji32.npz",
        "ebt_nb/assets/images/emoji32.jsonl",
        "ebt_nb/assets/images/fashion_mnist.npz",
    } <= set(zipfile.ZipFile(wheel).namelist())


@pytest.mark.parametrize(
    "source, channels, size",
    [("emoji", 3, 32), ("emoji", 1, 8), ("fashion_mnist", 1, 28), ("fashion_mnist", 3, 32), ("fashion_mnist", 1, 64)],
)
def test_embedded_sets_at_other_sizes(tmp_path, source, channels, size):
    data = opened_data(configured(tmp_path, source=source, channels=channels, image_size=size))
    batch = next(iter(data.val_dataloader()))
    assert (
        batch["image"].shape == (4, channels, size, size)
        and batch["image"].abs().max() <= 1
        and batch["label"].min() >= 0
    )
    assert torch.equal(normalised(pixels_of(batch["image"])), batch["image"])
    assert min(len(rows) for rows in data.splits.values()) > 100 and len(data.classes) == (
        7 if source == "emoji" else 10
    )


# ---- several processes


def opened_in(folder):
    return opened_data(configured(folder))


def test_one_prepares_others_wait_and_a_killed_one_is_replaced(tmp_path):
    check_killed_one_is_replaced("ebt_nb.data.images:build_images", opened_in, tmp_path, "ebt_nb.data.image_loaders")


def test_encoding_that_is_interrupted_leaves_nothing(tmp_path):
    config = configured(
        tmp_path, task="generate", encoder__images="small_vae", encoder__latent_channels=3, encoder__latent_factor=2
    )
    calls = []

    def squares(pictures):
        calls.append(len(pictures))
        if len(calls) == 5:
            raise KeyboardInterrupt
        return torch.nn.functional.avg_pool2d(pictures, 2)

    with pytest.raises(KeyboardInterrupt):
        keep_latents(config, squares, None)
    assert not latents_folder(config).exists() and not list((tmp_path / "cache").glob(".*.partial"))
    with pytest.raises(DataError, match="ebt encode"):
        opened_data(config)
    keep_latents(config, squares, None)
    batch = next(iter(opened_data(config).train_dataloader()))
    assert batch["image"].shape == (4, 3, 4, 4) and sum(calls[5:]) == 1360


# ---- resuming under Lightning


class Pictures(Recorder):
    def note(self, batch):
        return batch["index"].tolist(), hashlib.sha256(batch["image"].numpy().tobytes()).hexdigest()

    def value(self, batch):
        return batch["image"]


def fitted(*args, **options):
    return shown_to(Pictures(), *args, **options)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_training_sees_the_remaining_pictures_mirrored_as_before(tmp_path, workers):
    config = configured(tmp_path, source=write_folder(tmp_path / "pets"), flip=True, workers=workers)
    straight = fitted(ImageData(config), tmp_path, 20)
    assert (
        len(opened_data(config).splits["train"]) == 32 and len({picture for _, picture in straight}) == 20
    )  # more than two rounds
    assert fitted(ImageData(config), tmp_path / "again", 20, tmp_path / "checkpoints" / "step=12.ckpt") == straight[12:]
    other = configured(tmp_path, source=write_folder(tmp_path / "pets"), flip=True, image_size=16)
    with pytest.raises(DataError, match="other data"):
        fitted(ImageData(other), tmp_path / "third", 20, tmp_path / "checkpoints" / "step=12.ckpt")


RANKS = """
import json, sys, warnings
warnings.filterwarnings("ignore")
from pathlib import Path
sys.path.insert(0, str(Path(sys.argv[1]).parent))
from ebt_nb.config.config import load_config
from ebt_nb.data.image_loaders import ImageData
import test_images
class Writer(test_images.Pictures):
    def on_train_end(self): (folder / f"{self.name}-rank{self.global_rank}.json").write_text(json.dumps(self.seen))
test_images.Pictures = Writer
folder = Path(sys.argv[2])
for Writer.name, checkpoint in [("first", None), ("resumed", folder / "first/checkpoints/step=4.ckpt")]:
    test_images.fitted(ImageData(load_config(folder / "config.yaml")), folder / Writer.name, 9, checkpoint, devices=2, strategy="ddp_fork")
"""


def test_ranks_share_batches_without_overlap_and_resume(tmp_path):
    config = configured(tmp_path, flip=True)
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    done = subprocess.run(
        [sys.executable, "-c", RANKS, __file__, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    seen, resumed = (
        [json.loads((tmp_path / f"{name}-rank{r}.json").read_text()) for r in (0, 1)] for name in ("first", "resumed")
    )
    assert resumed == [own[4:] for own in seen]
    config.data.batch_size = 8
    alone = opened_data(config).train_dataloader()
    assert [a + b for (a, _), (b, _) in zip(*seen)] == [batch["index"].tolist() for _, batch in zip(range(9), alone)]


# ---- forms of sources


def test_every_form_gives_the_same_pictures(tmp_path):
    numbers = range(0, 1200, 30)
    flat = tmp_path / "flat"
    flat.mkdir()
    for number in numbers:
        (flat / f"{number:04d}.png").write_bytes(file_of(EMOJI[number]))
    table = tmp_path / "tables"
    write_parquet(table / "part-0.parquet", numbers[:20])
    write_parquet(table / "part-1.parquet", numbers[20:])
    sources = [
        write_folder(tmp_path / "pets"),
        flat,
        write_parquet(tmp_path / "one.parquet"),
        table,
        table / "*.parquet",
    ]
    found = [opened_data(configured(tmp_path, source=str(source))) for source in sources]
    assert {split: len(rows) for split, rows in found[0].splits.items()} == {"train": 32, "validation": 4, "test": 4}
    for split in ("train", "validation", "test"):
        for data in found[1:]:
            assert shown(data, split) == shown(found[0], split), data.source.name
    assert found[0].classes == ["one", "two"] and "label" not in next(iter(found[1].train_dataloader()))


def test_splits_of_folders_and_tables(tmp_path):
    for name, numbers in [("train2017", range(0, 300, 10)), ("val", range(5, 100, 10)), ("test", range(7, 60, 10))]:
        write_folder(tmp_path / "pets" / name, numbers)
        write_parquet(
            tmp_path
            / "tables"
            / f"{name.removesuffix('2017') if name != 'val' else 'validation'}-00000-of-00001.parquet",
            numbers,
            caption=[[f"number {n}", "another"] for n in numbers],
            label=list(numbers),
        )
    folder, table = (opened_data(configured(tmp_path, source=str(tmp_path / name))) for name in ("pets", "tables"))
    for data in (folder, table):
        assert {split: len(rows) for split, rows in data.splits.items()} == {"train": 30, "validation": 10, "test": 6}
    for split in ("train", "validation", "test"):
        assert shown(folder, split) == shown(table, split)
    batch = next(iter(table.test_dataloader()))
    assert table.captions("test", batch["index"]) == [f"number {n}" for n in batch["label"].tolist()]
    first = next(iter(folder.test_dataloader()))
    assert {folder.classes[label] for label in first["label"]} <= {"one", "two"}


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv"])
def test_a_folder_with_metadata(tmp_path, name):
    folder = tmp_path / "described"
    write_folder(folder, range(20), classes=("a", "b"))
    rows = [(f"{'ab'[n % 2]}/{n:04d}.png", f"drawing {n}", n % 3) for n in range(20)]
    text = (
        "".join(json.dumps(dict(file_name=file, text=words, kind=kind)) + "\n" for file, words, kind in rows)
        if name.endswith("jsonl")
        else "file_name,text,kind\n" + "".join(f"{file},{words},{kind}\n" for file, words, kind in rows)
    )
    (folder / name).write_text(text)
    data = opened_data(configured(tmp_path, source=str(folder), label_column="kind", image_size=32))
    for split in ("train", "validation", "test"):
        for batch in data.held_out_loader(split):
            for image, label, caption in zip(batch["image"], batch["label"], data.captions(split, batch["index"])):
                number = int(caption.removeprefix("drawing "))
                assert label == number % 3 and np.array_equal(
                    pixels_of(image).numpy(), EMOJI[number].transpose(2, 0, 1)
                )


def test_changed_content_is_prepared_again_a_moved_folder_is_known_and_max_documents_limits(tmp_path):
    source = write_folder(tmp_path / "pets")
    first = opened_data(configured(tmp_path, source=source))
    shutil.copytree(source, tmp_path / "elsewhere/pets")
    assert opened_data(configured(tmp_path, source=str(tmp_path / "elsewhere/pets"))).folder == first.folder
    (tmp_path / "pets/one/0000.png").write_bytes(file_of(EMOJI[3]))
    assert opened_data(configured(tmp_path, source=source)).folder != first.folder
    few = opened_data(configured(tmp_path, source=source, max_documents=20))
    assert sum(map(len, few.splits.values())) == 20


def test_threads_change_nothing(tmp_path):
    source = write_folder(tmp_path / "pets")
    one, many = (opened_data(configured(tmp_path / str(workers), source=source, workers=workers)) for workers in (0, 3))
    for split in one.splits:
        assert (
            one.splits[split].with_format("numpy")[:]["image"].tolist()
            == many.splits[split].with_format("numpy")[:]["image"].tolist()
        )


def test_every_kind_of_file_becomes_bytes():
    rgba = np.dstack([EMOJI[4], np.full((32, 32), 255, np.uint8)])
    modes = {
        "1": "PNG",
        "L": "PNG",
        "LA": "PNG",
        "P": "GIF",
        "RGB": "JPEG",
        "RGBA": "PNG",
        "CMYK": "JPEG",
        "I;16": "PNG",
        "YCbCr": "JPEG",
    }
    for mode, kind in modes.items():
        image = (
            Image.fromarray(rgba)
            if mode == "RGBA"
            else Image.fromarray((EMOJI[4][:, :, 0].astype(np.uint16) * 257))
            if mode == "I;16"
            else Image.fromarray(EMOJI[4]).convert(mode)
        )
        saved = io.BytesIO()
        image.save(saved, kind, **({"quality": 95, "subsampling": 0} if kind == "JPEG" else {}))
        for channels in (1, 3):
            found = square(opened(saved.getvalue()), 32, channels)
            assert found.shape == (channels, 32, 32) and found.dtype == np.uint8
            expected = (
                np.asarray(Image.fromarray(EMOJI[4]).convert("L" if channels == 1 else "RGB"))
                .reshape(32, 32, channels)
                .transpose(2, 0, 1)
                .astype(int)
            )
            if mode in ("RGB", "RGBA", "CMYK", "YCbCr"):
                assert np.abs(found - expected).mean() < 8, mode
    assert square(opened(file_of(EMOJI[4][:1, :1])), 8, 3).shape == (3, 8, 8) and square(
        opened(file_of(np.tile(EMOJI[4], (1, 40, 1)))), 8, 3
    ).shape == (3, 8, 8)
    frames, saved = [Image.fromarray(EMOJI[n]) for n in (4, 5)], io.BytesIO()
    frames[0].save(saved, "GIF", save_all=True, append_images=frames[1:])
    assert (
        np.abs(square(opened(saved.getvalue()), 32, 3) - EMOJI[4].transpose(2, 0, 1).astype(int)).mean() < 8
    )  # of an animation, the first picture


# ---- the hub


@pytest.fixture
def offline(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")


def downloaded(tmp_path, **columns):
    "Put a data set owner/name into the local cache as a download would have left it."
    write_parquet(tmp_path / "there/train.parquet", range(0, 1200, 30), **columns)
    write_parquet(
        tmp_path / "there/validation.parquet",
        range(5, 100, 10),
        **{name: values[:10] for name, values in columns.items()},
    )
    datasets.load_dataset(
        "parquet",
        data_files={split: str(tmp_path / f"there/{split}.parquet") for split in ("train", "validation")},
        cache_dir=str(tmp_path / "made"),
    )
    made = next((tmp_path / "made").glob("parquet/*/*/*/dataset_info.json")).parent
    kept = tmp_path / "hf" / "owner___name" / "default" / "0.0.0" / made.name
    shutil.copytree(made, kept)
    for path in kept.glob("parquet-*"):
        path.rename(kept / path.name.replace("parquet-", "name-"))


def test_a_hub_set_downloaded_earlier_and_without_it(tmp_path, offline, capfd):
    downloaded(tmp_path, caption=[[f"number {n}"] for n in range(40)])
    data = opened_data(configured(tmp_path, source="owner/name"))
    assert {split: len(rows) for split, rows in data.splits.items()} == {
        "train": 36,
        "validation": 10,
        "test": 4,
    }  # its own validation, and a test set cut off
    assert data.captions("validation", torch.arange(3)) == ["number 0", "number 1", "number 2"]
    with pytest.raises(DataError, match="data.image_column.*'owner/name' has no column 'photo'.*it has image, caption"):
        opened_data(configured(tmp_path, source="owner/name", image_column="photo"))
    with pytest.raises(DataError, match="data.split.*'trian'.*train, validation"):
        opened_data(configured(tmp_path, source="owner/name", split="trian"))
    shutil.rmtree(tmp_path / "hf")
    after = opened_data(configured(tmp_path, source="owner/name"))
    assert after.folder == data.folder and "using the rows prepared earlier" in capfd.readouterr().err
    with pytest.raises(DataError, match="cannot be reached"):
        opened_data(configured(tmp_path, source="owner/name", image_size=16))  # that was never prepared
    for name in ("imagenet-1k", "coco-tiny", "coco-medium", "some/other"):
        with pytest.raises(DataError, match=f"'{name}' is not on this machine.*data.source=fashion_mnist or emoji"):
            opened_data(configured(tmp_path, source=name))


def test_who_looks_sees_what_is_wrong_with_a_set(tmp_path):
    "The experiment inspect_images: held-out pictures that are in training, as they are or mirrored, and files that cannot be read."
    for split, numbers in (("train", range(0, 600, 10)), ("validation", range(5, 300, 30)), ("test", [7, 17])):
        write_folder(tmp_path / "pets" / split, numbers)
    (tmp_path / "pets/validation/one/copy.png").write_bytes(file_of(EMOJI[40]))
    (tmp_path / "pets/validation/two/turned.png").write_bytes(file_of(EMOJI[50][:, ::-1].copy()))
    (tmp_path / "pets/train/one/broken.png").write_text("no picture")
    folder = run_notebook(
        "inspect_images",
        "image/quickstart",
        {
            "data.source": str(tmp_path / "pets"),
            "data.cache_dir": str(tmp_path / "cache"),
            "data.channels": 3,
            "data.image_size": 32,
            "data.batch_size": 8,
            "batches": 6,
        },
        tmp_path / "looked",
    )
    found = json.loads((folder / "facts.json").read_text())
    assert (
        found["rows"] == {"train": 60, "validation": 12, "test": 2}
        and found["unreadable"] == 1
        and found["classes"] == 2
    )
    assert (
        found["held_out_in_training"] == 2
        and found["held_out_compared"] == 12
        and found["repeated"] == 0
        and abs(found["neighbours"]) < 0.5
    )
    beaten = found["psnr_of_noisy"]
    assert beaten["level 0.05"] > beaten["level 0.1"] > beaten["level 0.2"] > 5


# ---- bad input


def bad_sources(tmp_path):
    "name -> (source, what the message must say)"
    (tmp_path / "nothing").mkdir()
    (tmp_path / "text").mkdir()
    (tmp_path / "text/a.png").write_text("no picture")
    (tmp_path / "text/b.png").write_bytes(file_of(EMOJI[0])[:200])
    (tmp_path / "torn.parquet").write_bytes(b"PAR1 and no more")
    (tmp_path / "photo.png").write_bytes(file_of(EMOJI[0]))
    datasets.Dataset.from_dict({"image": ["one", "two"], "label": [0, 1]}).to_parquet(tmp_path / "words.parquet")
    datasets.Dataset.from_dict({"image": [1.0, 2.0]}).to_parquet(tmp_path / "numbers.parquet")
    write_folder(tmp_path / "single", [3])
    write_folder(tmp_path / "transport", range(9), classes=("train", "car", "ship"))
    write_parquet(tmp_path / "unclear/train-0.parquet", [1, 2])
    write_parquet(tmp_path / "unclear/more.parquet", [3, 4])
    write_folder(tmp_path / "copies", [3] * 6, classes=tuple("abcdef"))
    write_parquet(tmp_path / "uncaptioned.parquet")
    (tmp_path / "lacking").mkdir()
    (tmp_path / "lacking/metadata.jsonl").write_text(json.dumps(dict(file_name="none.png", caption="nothing")) + "\n")
    (tmp_path / "lacking/a.png").write_bytes(file_of(EMOJI[0]))
    return {
        "nothing": "holds no pictures",
        "text": "holds no picture that can be read (train)",
        "torn.parquet": "cannot be read as parquet",
        "photo.png": "give the folder that holds them",
        "words.parquet": "holds no picture that can be read",
        "numbers.parquet": "cannot be read",
        "single": "cannot be trained on and held out",
        "copies": "1 different ones",
        "transport": "car lies beside parts named like splits (train)",
        "unclear": "more.parquet lies beside",
        "missing": "neither a set of pictures",
        "./missing": "no such file",
        "lacking": "no picture",
    }


def test_bad_sources_are_refused_by_name_and_nothing_is_written(tmp_path, monkeypatch):
    cases = bad_sources(tmp_path)
    monkeypatch.chdir(tmp_path)
    for name, reason in cases.items():
        with pytest.raises(DataError) as caught:
            opened_data(configured(tmp_path, source=name if "missing" in name else str(tmp_path / name)))
        assert name in str(caught.value) and reason in str(caught.value), (name, str(caught.value))
        assert left_behind(tmp_path) == [], name
    with pytest.raises(DataError, match="data.caption_column.*no column 'words'"):
        opened_data(configured(tmp_path, source=str(tmp_path / "uncaptioned.parquet"), caption_column="words"))


def test_unreadable_pictures_are_named_and_counted_or_refused(tmp_path, capfd):
    cells = [{"bytes": file_of(EMOJI[n]), "path": None} for n in range(30)]
    for place, cell in [
        (4, {"bytes": b"no picture", "path": None}),
        (7, {"bytes": None, "path": str(tmp_path / "gone.png")}),
        (9, None),
        (12, {"bytes": file_of(EMOJI[5])[:300], "path": "cut.png"}),
    ]:
        cells[place] = cell
    pyarrow.parquet.write_table(
        pyarrow.table({"image": pyarrow.array(cells, datasets.Image.pa_type)}), tmp_path / "some.parquet"
    )  # as other programs write it
    data = opened_data(configured(tmp_path, source=str(tmp_path / "some.parquet")))
    said = capfd.readouterr().err
    assert sum(map(len, data.splits.values())) == 26 and "4 of 30 pictures cannot be read and are left out" in said
    for words in (
        "row 4: no picture that can be recognised",
        "gone.png: No such file",
        "row 9: the row holds no picture",
    ):
        assert words in said
    assert data.info["unreadable"] == 4 and "cut.png" in data.info["named"][3]
    for size in (8, 16):  # prepared before by somebody less strict, or not yet
        with pytest.raises(DataError, match="row 4: no picture.*data.unreadable=skip"):
            opened_data(
                configured(tmp_path, source=str(tmp_path / "some.parquet"), unreadable="refuse", image_size=size)
            )


def test_a_picture_too_large_to_be_one_is_unreadable(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 32 * 32 // 2 - 1)  # Pillow refuses twice this
    source = write_folder(tmp_path / "pets")
    with pytest.raises(DataError, match="holds no picture that can be read.*exceeds limit"):
        opened_data(configured(tmp_path, source=source))


def test_shapes_that_cannot_be_are_refused_before_anything_is_read(tmp_path):
    for changes, words in [
        (dict(channels=2), "data.channels"),
        (dict(image_size=8, model__patch=16), "smaller than a patch of 16"),
        (dict(image_size=10, model__patch=4), "cannot be cut into patches of 4"),
    ]:
        with pytest.raises(ConfigError, match=words):
            configured(tmp_path, **changes)
    assert left_behind(tmp_path) == []


def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "cache").write_text("a file, not a folder")
    with pytest.raises(DataError, match="data.cache_dir"):
        opened_data(configured(tmp_path))
    (tmp_path / "cache").unlink()

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(images.ArrowWriter, "write_batch", full)
    with pytest.raises(DataError, match="No space left on device.*free space"):
        opened_data(configured(tmp_path))
    assert left_behind(tmp_path) == []


def test_damaged_prepared_data_names_the_folder(tmp_path):
    data = opened_data(configured(tmp_path))
    (data.folder / "train.arrow").write_bytes(b"damaged")
    with pytest.raises(DataError, match="delete this folder"):
        opened_data(configured(tmp_path))
    (data.folder / "info.json").write_text("{")
    with pytest.raises(DataError, match="delete this folder"):
        opened_data(configured(tmp_path))


def test_encoded_data_that_does_not_fit(tmp_path):
    def squares(pictures):
        return torch.nn.functional.avg_pool2d(pictures, 2)

    def letters(captions):
        return torch.tensor([[float(len(caption))] for caption in captions])

    settings = dict(task="generate", encoder__images="small_vae", encoder__latent_channels=3, encoder__latent_factor=2)
    keep_latents(configured(tmp_path, **settings), squares, None)
    with pytest.raises(DataError, match="makes 3 x 4 x 4 .*not 4 x 4 x 4"):
        opened_data(configured(tmp_path, **settings | dict(encoder__latent_channels=4)))
    with pytest.raises(DataError, match="captions by 'minilm'.*ebt encode"):
        opened_data(configured(tmp_path, **settings, encoder__captions="minilm"))
    config = configured(tmp_path, **settings, encoder__captions="minilm")
    folder = keep_latents(config, squares, letters)
    with pytest.raises(DataError, match="vectors of 1 numbers; set encoder.caption_width=1"):
        opened_data(config)
    config.encoder.caption_width = 1
    assert next(iter(opened_data(config).train_dataloader()))["caption"].shape == (4, 1)
    (folder / "train.arrow").unlink()
    with pytest.raises(DataError, match="delete this folder"):
        opened_data(config)
    with pytest.raises(DataError, match="has no captions"):
        keep_latents(
            configured(tmp_path, source="fashion_mnist", task="generate", encoder__captions="minilm"), None, letters
        )


def test_refusals_leave_what_was_prepared(tmp_path):
    data = configured(tmp_path, source=write_folder(tmp_path / "pets")).data
    folder = prepare_images(find_images(data), data)
    before = {p: p.read_bytes() for p in folder.iterdir()}
    (tmp_path / "pets/one/9999.png").write_text("no picture")
    data.unreadable = "refuse"
    with pytest.raises(DataError, match="9999.png"):
        prepare_images(find_images(data), data)
    assert {p: p.read_bytes() for p in folder.iterdir()} == before and read_info(folder)["unreadable"] == 0
