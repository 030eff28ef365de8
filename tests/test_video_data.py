"Frames on disk, with the commands that write and read them: killed in the middle, encoded, trained on."

import json
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from ebt_nb.config.overrides import build_config
from ebt_nb.data.pixels import pixels_to_float
from ebt_nb.data.registry import build_data_module
from ebt_nb.inference.encode import encode_dataset
from ebt_nb.models.image_encoders import load_image_encoder
from ebt_nb.runs.addresses import find_runs
from ebt_nb.training.checkpoints import read_checkpoint
from ebt_nb.training.fit import fit

NO_EXTRA = "the extra images is not installed"

# Few clips in small parts. The names of clips that are read are appended to a file; where a file says so, the process
# kills itself when it begins a part.
WATCHED = """
import os, signal
from pathlib import Path
from ebt_nb.data import frame_cache, moving_images

frame_cache.CLIPS_PER_PART, moving_images.NUM_HELD_OUT_CLIPS = 4, 4
read_clip, write_part = frame_cache.read_clip, frame_cache.FrameWriter.write_part

def read_and_log(clip, config):
    with open("read.txt", "a") as log:
        log.write(f"{clip.name}\\n")
    return read_clip(clip, config)

def write_or_die(self, name, *arguments):
    if Path("die_at").exists() and Path("die_at").read_text() == name:
        os.kill(os.getpid(), signal.SIGKILL)
    return write_part(self, name, *arguments)

frame_cache.read_clip, frame_cache.FrameWriter.write_part = read_and_log, write_or_die
"""


def encode_words(**settings):
    "The words that encode small frames of video."
    settings = {
        "data.cache_dir": "cache",
        "data.image_size": 8,
        "encoder.images": "small_vae",
        "trainer.accelerator": "cpu",
        "trainer.threads": 1,
    } | {key.replace("__", "."): value for key, value in settings.items()}
    words = ["--preset", "video/quickstart", "--defaults", "none"]
    return words + [word for key, value in settings.items() for word in ("-p", f"{key}={value}")]


def test_a_killed_encoding_goes_on_with_the_finished_parts(tmp_path, forker):
    words = ["encode", *encode_words(data__max_documents=10)]
    (tmp_path / "die_at").write_text("train-00002")
    code, _out, _err = forker.run(*words, cwd=tmp_path, setup=WATCHED)
    read = (tmp_path / "read.txt").read_text().splitlines()
    assert code == -signal.SIGKILL and [name.split()[1] for name in read] == [str(number) for number in range(8)]
    (tmp_path / "die_at").unlink()
    (tmp_path / "read.txt").unlink()
    code, out, err = forker.run(*words, cwd=tmp_path, setup=WATCHED)
    read = (tmp_path / "read.txt").read_text().splitlines()
    assert code == 0 and "26 clips, latents of 4 x 2 x 2" in err, err
    assert [name.split()[:2] for name in read[:2]] == [["train", "8"], ["train", "9"]] and len(read) == 2 + 4 * 4
    assert sum(file.suffix != ".lock" for file in (tmp_path / "cache").iterdir()) == 1
    code, again, err = forker.run(*words, cwd=tmp_path, setup=WATCHED)
    assert code == 0 and again == out and "encoded before" in err
    assert len((tmp_path / "read.txt").read_text().splitlines()) == len(read)


def test_checkpoints_name_the_encoder_of_frames(tmp_path, forker):
    settings = encode_words(data__source="big_buck_bunny", data__context=3, data__flip=True, data__batch_size=2)
    small = dict(model__layers=1, model__width=16, model__heads=2, trainer__max_steps=2, trainer__val_batches=1)
    for key, value in (small | dict(run__runs_dir="runs")).items():
        settings += ["-p", f"{key.replace('__', '.')}={value}"]
    code, _out, err = forker.run("train", *settings, cwd=tmp_path)
    assert code == 2 and "frames by 'small_vae' (encoder.images) are not encoded yet" in err and "`ebt encode`" in err
    assert not (tmp_path / "runs").exists()
    code, out, err = forker.run("encode", *settings, cwd=tmp_path)
    assert code == 0 and (tmp_path / out.strip() / "info.json").is_file(), err
    code, _out, err = forker.run("train", *settings, cwd=tmp_path)
    assert code == 0, err
    [run] = find_runs(Path(tmp_path, "runs"))
    assert read_checkpoint(run.checkpoint("last"))["encoders"]["images"]["name"] == "small_vae"


def save_vae(folder):
    "A tiny AutoencoderKL, as diffusers writes it."
    diffusers = pytest.importorskip("diffusers", reason=NO_EXTRA)
    torch.manual_seed(0)
    diffusers.AutoencoderKL(
        block_out_channels=(8, 8, 8),
        down_block_types=["DownEncoderBlock2D"] * 3,
        up_block_types=["UpDecoderBlock2D"] * 3,
        norm_num_groups=4,
        latent_channels=4,
    ).save_pretrained(folder)


def save_dinov2(folder):
    "A tiny Dinov2Model of 12 numbers a patch, as transformers writes it."
    transformers = pytest.importorskip("transformers", reason=NO_EXTRA)
    torch.manual_seed(0)
    sizes = dict(hidden_size=12, num_hidden_layers=1, num_attention_heads=2, patch_size=14, image_size=28)
    transformers.Dinov2Model(transformers.Dinov2Config(**sizes)).save_pretrained(folder)


@pytest.mark.parametrize(
    ("name", "save", "changes", "shape"),
    [
        ("vae", save_vae, {}, [4, 2, 2]),
        ("dinov2", save_dinov2, {"encoder.pooling": "none"}, [12, 2, 2]),
        ("dinov2", save_dinov2, {"encoder.pooling": "summary"}, [12, 1, 1]),
    ],
)
def test_frames_by_a_saved_encoder_are_trained_on(name, save, changes, shape, tmp_path):
    "What the libraries load from a folder encodes clips; a training reads them and names the weights."
    save(tmp_path / name)
    size = 8 if name == "vae" else 28
    settings = changes | {
        "encoder.images": f"{name}:{tmp_path / name}",
        "encoder.latent_channels": shape[0],
        "encoder.latent_factor": 4 if name == "vae" else 14,
        "data.source": "big_buck_bunny",
        "data.cache_dir": str(tmp_path / "cache"),
        "data.image_size": size,
        "data.channels": 3,
        "data.context": 3,
        "data.batch_size": 2,
        "model.layers": 1,
        "model.width": 16,
        "model.heads": 2,
        "trainer.max_steps": 2,
        "trainer.val_batches": 1,
        "trainer.accelerator": "cpu",
        "trainer.threads": 1,
        "run.runs_dir": str(tmp_path / "runs"),
    }
    config = build_config("video/quickstart", settings)
    folder = encode_dataset(config)
    info = json.loads((folder / "info.json").read_text())
    assert info["shape"] == shape and info["splits"]["train"]["frames"] == 14
    data = build_data_module(config)
    data.setup()
    [clip] = data.clips("validation")
    pixels = pixels_to_float(torch.from_numpy(clip.read_frames(config.data)[:4]))
    encoder = load_image_encoder(config.encoder)
    encode = encoder.summarize if changes.get("encoder.pooling") == "summary" else encoder.encode
    expected = encode(pixels).flatten(1)
    torch.testing.assert_close(data.rows("validation")[np.array([0])]["frames"][0], expected, atol=1e-2, rtol=5e-3)
    fit(config)
    [run] = find_runs(tmp_path / "runs")
    named = read_checkpoint(run.checkpoint("last"))["encoders"]["images"]
    assert named == dict(name=config.encoder.images, fingerprint=encoder.fingerprint)
    assert named == info["encoders"]["images"]
