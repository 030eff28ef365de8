"""Images where a notebook cannot test them.

Several processes, Lightning's own checkpoints, several ranks, every form of a source, and bad input of every kind.
"""

import errno
import hashlib
import io
import json
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
from data_checks import BatchRecorder, check_killed_preparation_is_replaced, fit_and_record
from PIL import Image

from ebt_nb.config.errors import ConfigError
from ebt_nb.config.overrides import build_config
from ebt_nb.data import image_cache
from ebt_nb.data.image_cache import prepare_images, read_prepared_info
from ebt_nb.data.image_loaders import ImageDataModule
from ebt_nb.data.image_sources import find_image_set
from ebt_nb.data.latents import latent_cache_folder, prepare_latents
from ebt_nb.data.pixels import crop_to_square, decode_image, float_to_pixels, pixels_to_float
from ebt_nb.data.sources import ASSETS, DataError
from ebt_nb.jobs.notebook_jobs import run_notebook

EMOJI = np.load(ASSETS / "images/emoji32.npz")["images"]
EVERY_30TH = range(0, 1200, 30)


def build_test_config(tmp_path, preset="image/quickstart", **changes):
    "A tiny run on emoji, or on another source, whose cache is tmp_path/cache; keys without a section are of data."
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
    for key, value in changes.items():
        settings[key.replace("__", ".") if "__" in key else f"data.{key}"] = value
    return build_config(preset, settings)


def build_latent_config(tmp_path, **changes):
    "A tiny run on latents of emoji; captions are not encoded."
    settings = dict(
        encoder__images="small_vae", encoder__latent_channels=3, encoder__latent_factor=2, encoder__captions="none"
    )
    return build_test_config(tmp_path, "image/t2i_ebt_s1", **settings | changes)


def open_data(config, **ranks):
    "A data module that is ready to serve."
    data = ImageDataModule(config, **ranks)
    data.setup()
    return data


def encode_image(array, file_format="PNG"):
    "The bytes of an image file."
    content = io.BytesIO()
    Image.fromarray(array).save(content, file_format)
    return content.getvalue()


def write_folder(folder, numbers=EVERY_30TH, classes=("one", "two")):
    "A folder of emoji by class."
    for i, number in enumerate(numbers):
        path = folder / classes[i % len(classes)] / f"{number:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode_image(EMOJI[number]))
    return str(folder)


def write_parquet(path, numbers=EVERY_30TH, **columns):
    "A parquet file of emoji as `datasets` writes them."
    cells = [{"bytes": encode_image(EMOJI[number]), "path": f"{number:04d}.png"} for number in numbers]
    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict({"image": cells, **columns}).cast_column("image", datasets.Image()).to_parquet(path)
    return str(path)


def list_cache(tmp_path):
    "Names of what a cache holds besides empty lock files."
    return [path.name for path in (tmp_path / "cache").rglob("*") if path.suffix != ".lock"]


def count_rows(data):
    return {split: len(rows) for split, rows in data.splits.items()}


def sorted_pixels(data, split):
    "The pixels of a split, in an order that does not depend on that of the source."
    images = data.rows(split)[np.arange(len(data.splits[split]))]["image"]
    return sorted(float_to_pixels(image).numpy().tobytes() for image in images)


# ---- what comes with the package


def test_embedded_images_are_those_the_readme_describes():
    readme = (ASSETS / "README.md").read_text()
    listed = dict(re.findall(r"^\| `(images/[^`]+)` .*`([0-9a-f]{64})` \|$", readme, re.MULTILINE))
    found = {}
    for path in (ASSETS / "images").iterdir():
        found[f"images/{path.name}"] = hashlib.sha256(path.read_bytes()).hexdigest()
    assert listed == found
    for words in ("CC-BY 4.0", "jdecked/twemoji contributors", "changed: composited on white"):
        assert words in readme
    for words in ("Zalando", "Cal Henderson"):
        assert words in (ASSETS / "LICENSES/MIT.txt").read_text()


def test_a_wheel_carries_the_images(root, tmp_path):
    names = ("settings.ini", "setup.py", "MANIFEST.in", "README.md", "LICENSE")
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in names:
        shutil.copy(root / name, copy)
    for name in ("ebt_nb", "nbs/experiments", "job_scripts"):
        shutil.copytree(root / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "runs"))
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet", "-w", str(tmp_path)]
    command = [sys.executable, "-m", "pip", "wheel", ".", *options]
    result = subprocess.run(command, cwd=copy, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    [wheel] = tmp_path.glob("*.whl")
    carried = set(zipfile.ZipFile(wheel).namelist())
    for name in ("emoji32.npz", "emoji32.jsonl", "fashion_mnist.npz"):
        assert f"ebt_nb/assets/images/{name}" in carried


@pytest.mark.parametrize(
    "source, channels, size",
    [("emoji", 3, 32), ("emoji", 1, 8), ("fashion_mnist", 1, 28), ("fashion_mnist", 3, 32), ("fashion_mnist", 1, 64)],
)
def test_embedded_sets_at_other_sizes(tmp_path, source, channels, size):
    data = open_data(build_test_config(tmp_path, source=source, channels=channels, image_size=size))
    batch = next(iter(data.val_dataloader()))
    assert batch["image"].shape == (4, channels, size, size)
    assert batch["image"].abs().max() <= 1 and batch["label"].min() >= 0
    assert torch.equal(pixels_to_float(float_to_pixels(batch["image"])), batch["image"])
    assert min(len(rows) for rows in data.splits.values()) > 100
    assert len(data.classes) == (7 if source == "emoji" else 10)


# ---- several processes


def open_in_folder(folder):
    return open_data(build_test_config(folder))


def test_one_prepares_others_wait_and_a_killed_one_is_replaced(tmp_path):
    builder, module = "ebt_nb.data.image_cache:write_image_cache", "ebt_nb.data.image_loaders"
    check_killed_preparation_is_replaced(builder, open_in_folder, tmp_path, module)


def test_interrupted_encoding_leaves_nothing(tmp_path):
    config = build_latent_config(tmp_path)
    batch_sizes = []

    def encode_squares(images):
        batch_sizes.append(len(images))
        if len(batch_sizes) == 5:
            raise KeyboardInterrupt
        return torch.nn.functional.avg_pool2d(images, 2)

    with pytest.raises(KeyboardInterrupt):
        prepare_latents(config, encode_squares, None)
    assert not latent_cache_folder(config).exists() and not list((tmp_path / "cache").glob(".*.partial"))
    with pytest.raises(DataError, match="ebt encode"):
        open_data(config)
    prepare_latents(config, encode_squares, None)
    batch = next(iter(open_data(config).train_dataloader()))
    assert batch["image"].shape == (4, 3, 4, 4) and sum(batch_sizes[5:]) == 1360


# ---- resuming under Lightning


class ImageRecorder(BatchRecorder):
    "Records row numbers and a hash of the images of every batch."

    def describe_batch(self, batch):
        return batch["index"].tolist(), hashlib.sha256(batch["image"].numpy().tobytes()).hexdigest()

    def training_values(self, batch):
        return batch["image"]


def record_batches(*args, **options):
    return fit_and_record(ImageRecorder(), *args, **options)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_training_sees_the_remaining_images_mirrored_as_before(tmp_path, workers):
    settings = dict(source=write_folder(tmp_path / "pets"), flip=True)
    config = build_test_config(tmp_path, workers=workers, **settings)
    uninterrupted = record_batches(ImageDataModule(config), tmp_path, 20)
    assert len(open_data(config).splits["train"]) == 32  # more than two epochs
    assert len({images for _, images in uninterrupted}) == 20
    checkpoint = tmp_path / "checkpoints" / "step=12.ckpt"
    assert record_batches(ImageDataModule(config), tmp_path / "again", 20, checkpoint) == uninterrupted[12:]
    other = build_test_config(tmp_path, image_size=16, **settings)
    with pytest.raises(DataError, match="other data"):
        record_batches(ImageDataModule(other), tmp_path / "third", 20, checkpoint)


RANKS = """
import json, sys, warnings
warnings.filterwarnings("ignore")
from pathlib import Path
from ebt_nb.config.overrides import load_config
from ebt_nb.data.image_loaders import ImageDataModule
import test_images

folder = Path(sys.argv[1])


class Writer(test_images.ImageRecorder):
    def on_train_end(self):
        (folder / f"{self.name}-rank{self.global_rank}.json").write_text(json.dumps(self.recorded))


test_images.ImageRecorder = Writer
for Writer.name, checkpoint in [("first", None), ("resumed", folder / "first/checkpoints/step=4.ckpt")]:
    data = ImageDataModule(load_config(folder / "config.yaml"))
    test_images.record_batches(data, folder / Writer.name, 9, checkpoint, devices=2, strategy="ddp_fork")
"""


def test_ranks_share_batches_without_overlap_and_resume(tmp_path, forker):
    config = build_test_config(tmp_path, flip=True)
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    code, _, errors = forker.run_script(RANKS, tmp_path)
    assert code == 0, errors[-3000:]
    first, resumed = (
        [json.loads((tmp_path / f"{name}-rank{rank}.json").read_text()) for rank in (0, 1)]
        for name in ("first", "resumed")
    )
    assert resumed == [batches[4:] for batches in first]
    config.data.batch_size = 8
    loader = open_data(config).train_dataloader()
    expected = [batch["index"].tolist() for _, batch in zip(range(9), loader)]
    assert [a + b for (a, _), (b, _) in zip(*first)] == expected


# ---- forms of sources


def test_every_form_gives_the_same_images(tmp_path):
    flat = tmp_path / "flat"
    flat.mkdir()
    for number in EVERY_30TH:
        (flat / f"{number:04d}.png").write_bytes(encode_image(EMOJI[number]))
    tables = tmp_path / "tables"
    write_parquet(tables / "part-0.parquet", EVERY_30TH[:20])
    write_parquet(tables / "part-1.parquet", EVERY_30TH[20:])
    one_file = write_parquet(tmp_path / "one.parquet")
    sources = [write_folder(tmp_path / "pets"), flat, one_file, tables, tables / "*.parquet"]
    opened = [open_data(build_test_config(tmp_path, source=str(source))) for source in sources]
    assert count_rows(opened[0]) == {"train": 32, "validation": 4, "test": 4}
    for split in ("train", "validation", "test"):
        for data in opened[1:]:
            assert sorted_pixels(data, split) == sorted_pixels(opened[0], split), data.source.name
    assert opened[0].classes == ["one", "two"] and "label" not in next(iter(opened[1].train_dataloader()))


def test_splits_of_folders_and_tables(tmp_path):
    splits = [
        ("train2017", "train", range(0, 300, 10)),
        ("val", "validation", range(5, 100, 10)),
        ("test", "test", range(7, 60, 10)),
    ]
    for folder_name, table_name, numbers in splits:
        write_folder(tmp_path / "pets" / folder_name, numbers)
        captions = [[f"number {number}", "another"] for number in numbers]
        path = tmp_path / "tables" / f"{table_name}-00000-of-00001.parquet"
        write_parquet(path, numbers, caption=captions, label=list(numbers))
    folder, table = (open_data(build_test_config(tmp_path, source=str(tmp_path / name))) for name in ("pets", "tables"))
    for data in (folder, table):
        assert count_rows(data) == {"train": 30, "validation": 10, "test": 6}
    for split in ("train", "validation", "test"):
        assert sorted_pixels(folder, split) == sorted_pixels(table, split)
    batch = next(iter(table.test_dataloader()))
    assert table.captions("test", batch["index"]) == [f"number {label}" for label in batch["label"].tolist()]
    batch = next(iter(folder.test_dataloader()))
    assert {folder.classes[label] for label in batch["label"]} <= {"one", "two"}


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv"])
def test_a_folder_with_metadata(tmp_path, name):
    folder = tmp_path / "described"
    write_folder(folder, range(20), classes=("a", "b"))
    rows = [dict(file_name=f"{'ab'[n % 2]}/{n:04d}.png", text=f"drawing {n}", kind=n % 3) for n in range(20)]
    if name == "metadata.jsonl":
        lines = [json.dumps(row) for row in rows]
    else:
        lines = ["file_name,text,kind"] + [",".join(map(str, row.values())) for row in rows]
    (folder / name).write_text("\n".join(lines) + "\n")
    data = open_data(build_test_config(tmp_path, source=str(folder), label_column="kind", image_size=32))
    for split in ("train", "validation", "test"):
        for batch in data.held_out_dataloader(split):
            for image, label, caption in zip(batch["image"], batch["label"], data.captions(split, batch["index"])):
                number = int(caption.removeprefix("drawing "))
                assert label == number % 3
                assert np.array_equal(float_to_pixels(image).numpy(), EMOJI[number].transpose(2, 0, 1))


def test_changed_content_is_prepared_again_a_moved_folder_is_found_and_max_documents_limits(tmp_path):
    source = write_folder(tmp_path / "pets")
    first = open_data(build_test_config(tmp_path, source=source))
    moved = tmp_path / "elsewhere/pets"
    shutil.copytree(source, moved)
    assert open_data(build_test_config(tmp_path, source=str(moved))).folder == first.folder
    (tmp_path / "pets/one/0000.png").write_bytes(encode_image(EMOJI[3]))
    assert open_data(build_test_config(tmp_path, source=source)).folder != first.folder
    limited = open_data(build_test_config(tmp_path, source=source, max_documents=20))
    assert sum(map(len, limited.splits.values())) == 20


def test_threads_change_nothing(tmp_path):
    source = write_folder(tmp_path / "pets")
    without_threads, with_threads = (
        open_data(build_test_config(tmp_path / str(workers), source=source, workers=workers)) for workers in (0, 3)
    )
    for split in without_threads.splits:
        images, same_images = (
            data.splits[split].with_format("numpy")[:]["image"].tolist() for data in (without_threads, with_threads)
        )
        assert images == same_images


def image_in_mode(mode):
    "An emoji as a Pillow image of a mode."
    if mode == "RGBA":
        return Image.fromarray(np.dstack([EMOJI[4], np.full((32, 32), 255, np.uint8)]))
    if mode == "I;16":
        return Image.fromarray(EMOJI[4][:, :, 0].astype(np.uint16) * 257)
    return Image.fromarray(EMOJI[4]).convert(mode)


FORMAT_BY_MODE = {
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


def test_every_kind_of_file_becomes_bytes():
    for mode, file_format in FORMAT_BY_MODE.items():
        content = io.BytesIO()
        options = {"quality": 95, "subsampling": 0} if file_format == "JPEG" else {}
        image_in_mode(mode).save(content, file_format, **options)
        for channels in (1, 3):
            pixels = crop_to_square(decode_image(content.getvalue()), 32, channels)
            assert pixels.shape == (channels, 32, 32) and pixels.dtype == np.uint8
            plain = np.asarray(Image.fromarray(EMOJI[4]).convert("L" if channels == 1 else "RGB"))
            expected = plain.reshape(32, 32, channels).transpose(2, 0, 1).astype(int)
            if mode in ("RGB", "RGBA", "CMYK", "YCbCr"):
                assert np.abs(pixels - expected).mean() < 8, mode
    one_pixel, very_wide = EMOJI[4][:1, :1], np.tile(EMOJI[4], (1, 40, 1))
    for array in (one_pixel, very_wide):
        assert crop_to_square(decode_image(encode_image(array)), 8, 3).shape == (3, 8, 8)
    frames, content = [Image.fromarray(EMOJI[n]) for n in (4, 5)], io.BytesIO()
    frames[0].save(content, "GIF", save_all=True, append_images=frames[1:])
    pixels = crop_to_square(decode_image(content.getvalue()), 32, 3)
    assert np.abs(pixels - EMOJI[4].transpose(2, 0, 1).astype(int)).mean() < 8  # the first image of an animation


# ---- the hub


@pytest.fixture
def offline(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")


def imitate_download(tmp_path, captions):
    "Put a data set owner/name into the local cache as a download would have left it."
    folder = tmp_path / "there"
    write_parquet(folder / "train.parquet", EVERY_30TH, caption=captions)
    write_parquet(folder / "validation.parquet", range(5, 100, 10), caption=captions[:10])
    files = {split: str(folder / f"{split}.parquet") for split in ("train", "validation")}
    datasets.load_dataset("parquet", data_files=files, cache_dir=str(tmp_path / "made"))
    made = next((tmp_path / "made").glob("parquet/*/*/*/dataset_info.json")).parent
    cache = tmp_path / "hf" / "owner___name" / "default" / "0.0.0" / made.name
    shutil.copytree(made, cache)
    for path in cache.glob("parquet-*"):
        path.rename(cache / path.name.replace("parquet-", "name-"))


def test_a_hub_set_downloaded_earlier_and_without_it(tmp_path, offline, capfd):
    imitate_download(tmp_path, captions=[[f"number {n}"] for n in range(40)])
    data = open_data(build_test_config(tmp_path, source="owner/name"))
    assert count_rows(data) == {"train": 36, "validation": 10, "test": 4}  # its own validation; test is held out
    assert data.captions("validation", torch.arange(3)) == ["number 0", "number 1", "number 2"]
    with pytest.raises(
        DataError, match=r"data.image_column.*'owner/name' has no column 'photo'.*it has image, caption"
    ):
        open_data(build_test_config(tmp_path, source="owner/name", image_column="photo"))
    with pytest.raises(DataError, match=r"data.split.*'trian'.*train, validation"):
        open_data(build_test_config(tmp_path, source="owner/name", split="trian"))
    shutil.rmtree(tmp_path / "hf")
    after = open_data(build_test_config(tmp_path, source="owner/name"))
    assert after.folder == data.folder and "using the rows prepared earlier" in capfd.readouterr().err
    with pytest.raises(DataError, match="cannot be reached"):
        open_data(build_test_config(tmp_path, source="owner/name", image_size=16))  # never prepared
    for name in ("imagenet-1k", "coco-tiny", "coco-medium", "some/other"):
        with pytest.raises(DataError, match=f"'{name}' is not on this machine.*data.source=fashion_mnist or emoji"):
            open_data(build_test_config(tmp_path, source=name))


def test_inspect_images_shows_what_is_wrong_with_a_set(tmp_path, forked_kernels):
    "Held-out images that are in training, as they are or mirrored, and files that cannot be read."
    pets = tmp_path / "pets"
    for split, numbers in (("train", range(0, 600, 10)), ("validation", range(5, 300, 30)), ("test", [7, 17])):
        write_folder(pets / split, numbers)
    (pets / "validation/one/copy.png").write_bytes(encode_image(EMOJI[40]))
    (pets / "validation/two/mirrored.png").write_bytes(encode_image(EMOJI[50][:, ::-1].copy()))
    (pets / "train/one/broken.png").write_text("not an image")
    settings = {
        "data.source": str(pets),
        "data.cache_dir": str(tmp_path / "cache"),
        "data.channels": 3,
        "data.image_size": 32,
        "data.batch_size": 8,
        "batches": 6,
    }
    folder = run_notebook("inspect_images", "image/quickstart", settings, tmp_path / "report")
    facts = json.loads((folder / "facts.json").read_text())
    assert facts["rows"] == {"train": 60, "validation": 12, "test": 2}
    assert facts["unreadable"] == 1 and facts["classes"] == 2
    assert facts["held_out_in_training"] == 2 and facts["held_out_compared"] == 12
    assert facts["repeated"] == 0 and abs(facts["neighbours"]) < 0.5
    psnr = facts["psnr_of_noisy"]
    assert psnr["level 0.05"] > psnr["level 0.1"] > psnr["level 0.2"] > 5


# ---- bad input


def write_bad_sources(tmp_path):
    "Return what the message must say, by the name of a source."
    (tmp_path / "nothing").mkdir()
    (tmp_path / "text").mkdir()
    (tmp_path / "text/a.png").write_text("not an image")
    (tmp_path / "text/b.png").write_bytes(encode_image(EMOJI[0])[:200])
    (tmp_path / "torn.parquet").write_bytes(b"PAR1 and no more")
    (tmp_path / "photo.png").write_bytes(encode_image(EMOJI[0]))
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
    (tmp_path / "lacking/a.png").write_bytes(encode_image(EMOJI[0]))
    return {
        "nothing": "holds no images",
        "text": "holds no image that can be read (train)",
        "torn.parquet": "cannot be read as parquet",
        "photo.png": "give the folder that holds them",
        "words.parquet": "holds no image that can be read",
        "numbers.parquet": "cannot be read",
        "single": "too few to train on and to hold out",
        "copies": "1 different ones",
        "transport": "car stands next to parts named like splits (train)",
        "unclear": "more.parquet stands next to",
        "missing": "neither a set of images",
        "./missing": "no such file",
        "lacking": "no image",
    }


def test_bad_sources_are_refused_by_name_and_nothing_is_written(tmp_path, monkeypatch):
    reasons = write_bad_sources(tmp_path)
    monkeypatch.chdir(tmp_path)
    for name, reason in reasons.items():
        source = name if "missing" in name else str(tmp_path / name)
        with pytest.raises(DataError) as caught:
            open_data(build_test_config(tmp_path, source=source))
        assert name in str(caught.value) and reason in str(caught.value), (name, str(caught.value))
        assert list_cache(tmp_path) == [], name
    source = str(tmp_path / "uncaptioned.parquet")
    with pytest.raises(DataError, match=r"data.caption_column.*no column 'words'"):
        open_data(build_test_config(tmp_path, source=source, caption_column="words"))


def test_unreadable_images_are_named_and_counted_or_refused(tmp_path, capfd):
    cells = [{"bytes": encode_image(EMOJI[n]), "path": None} for n in range(30)]
    cells[4] = {"bytes": b"not an image", "path": None}
    cells[7] = {"bytes": None, "path": str(tmp_path / "gone.png")}
    cells[9] = None
    cells[12] = {"bytes": encode_image(EMOJI[5])[:300], "path": "cut.png"}
    source = str(tmp_path / "some.parquet")
    table = pyarrow.table({"image": pyarrow.array(cells, datasets.Image.pa_type)})
    pyarrow.parquet.write_table(table, source)  # as other programs write it
    data = open_data(build_test_config(tmp_path, source=source))
    messages = capfd.readouterr().err
    assert sum(map(len, data.splits.values())) == 26 and "4 of 30 images cannot be read and are left out" in messages
    for words in (
        "row 4: not an image that can be recognised",
        "gone.png: No such file",
        "row 9: the row holds no image",
    ):
        assert words in messages
    assert data.info["unreadable"] == 4 and "cut.png" in data.info["unreadable_files"][3]
    for size in (8, 16):  # prepared before with another setting, or not yet
        with pytest.raises(DataError, match=r"row 4: not an image.*data.unreadable=skip"):
            open_data(build_test_config(tmp_path, source=source, unreadable="refuse", image_size=size))


def test_an_image_of_too_many_pixels_is_unreadable(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 32 * 32 // 2 - 1)  # Pillow refuses twice this
    source = write_folder(tmp_path / "pets")
    with pytest.raises(DataError, match=r"holds no image that can be read.*exceeds limit"):
        open_data(build_test_config(tmp_path, source=source))


def test_impossible_shapes_are_refused_before_anything_is_read(tmp_path):
    for changes, words in [
        (dict(channels=2), "data.channels"),
        (dict(image_size=8, model__patch=16), "smaller than a patch of 16"),
        (dict(image_size=10, model__patch=4), "cannot be divided into patches of 4"),
    ]:
        with pytest.raises(ConfigError, match=words):
            build_test_config(tmp_path, **changes)
    assert list_cache(tmp_path) == []


def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "cache").write_text("a file, not a folder")
    with pytest.raises(DataError, match=r"data.cache_dir"):
        open_data(build_test_config(tmp_path))
    (tmp_path / "cache").unlink()

    def fill_disk(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(image_cache.ArrowWriter, "write_batch", fill_disk)
    with pytest.raises(DataError, match=r"No space left on device.*free space"):
        open_data(build_test_config(tmp_path))
    assert list_cache(tmp_path) == []


def test_damaged_prepared_data_names_the_folder(tmp_path):
    data = open_data(build_test_config(tmp_path))
    (data.folder / "train.arrow").write_bytes(b"damaged")
    with pytest.raises(DataError, match="delete this folder"):
        open_data(build_test_config(tmp_path))
    (data.folder / "info.json").write_text("{")
    with pytest.raises(DataError, match="delete this folder"):
        open_data(build_test_config(tmp_path))


def test_encoded_data_that_does_not_fit(tmp_path):
    def encode_squares(images):
        return torch.nn.functional.avg_pool2d(images, 2)

    def count_characters(captions):
        return torch.tensor([[float(len(caption))] for caption in captions])

    prepare_latents(build_latent_config(tmp_path), encode_squares, None)
    with pytest.raises(DataError, match=r"makes 3 x 4 x 4 .*not 4 x 4 x 4"):
        open_data(build_latent_config(tmp_path, encoder__latent_channels=4))
    captioned = build_latent_config(tmp_path, encoder__captions="minilm")
    with pytest.raises(DataError, match=r"captions by 'minilm'.*ebt encode"):
        open_data(captioned)
    folder = prepare_latents(captioned, encode_squares, count_characters)
    with pytest.raises(DataError, match=r"vectors of 1 numbers; set encoder.caption_width=1"):
        open_data(captioned)
    captioned.encoder.caption_width = 1
    assert next(iter(open_data(captioned).train_dataloader()))["caption"].shape == (4, 1)
    (folder / "train.arrow").unlink()
    with pytest.raises(DataError, match="delete this folder"):
        open_data(captioned)
    without_captions = build_latent_config(
        tmp_path, source="fashion_mnist", encoder__images="none", encoder__captions="minilm"
    )
    with pytest.raises(DataError, match="has no captions"):
        prepare_latents(without_captions, None, count_characters)


def test_a_refusal_leaves_what_was_prepared(tmp_path):
    data = build_test_config(tmp_path, source=write_folder(tmp_path / "pets")).data
    folder = prepare_images(find_image_set(data), data)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    (tmp_path / "pets/one/9999.png").write_text("not an image")
    data.unreadable = "refuse"
    with pytest.raises(DataError, match=r"9999.png"):
        prepare_images(find_image_set(data), data)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    assert read_prepared_info(folder)["unreadable"] == 0
