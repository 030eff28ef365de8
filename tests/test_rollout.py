"`ebt rollout` and `ebt evaluate` of models of video, as a user runs them: files, JSON, latents, refusals."

import json
import shutil

import numpy as np
import pytest
import torch

from ebt_nb.config.overrides import build_config
from ebt_nb.data.frame_cache import prepare_frames
from ebt_nb.data.video_sources import find_clip_set
from ebt_nb.models.image_encoders import load_image_encoder
from ebt_nb.runs.folders import Run
from ebt_nb.training.build import build_module

SMALL = {
    "model.layers": 1,
    "model.width": 16,
    "model.heads": 2,
    "data.image_size": 16,
    "data.context": 6,
    "data.max_documents": 4,
    "trainer.threads": 1,
    "trainer.accelerator": "cpu",
}
COPY = "copy of the last frame"


def save_run(home, name, **changes):
    "Save a run with a small untrained model as training saves it; return its configuration."
    settings = SMALL | {"run.name": name, "run.runs_dir": home / "runs", "data.cache_dir": home / "cache"}
    config = build_config("video/quickstart", settings | {key.replace("__", "."): v for key, v in changes.items()})
    module, checkpoint = build_module(config), {}
    checkpoint["state_dict"] = module.state_dict()
    module.on_save_checkpoint(checkpoint)
    torch.save(checkpoint, home / "checkpoint")
    shutil.move(home / "checkpoint", Run.create(config).dir / "checkpoints/last.ckpt")
    return config


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    "A folder with runs/ of small models, and few clips: pixels, latents, and latents that cannot be decoded."
    folder = tmp_path_factory.mktemp("home")
    save_run(folder, "ebt", data__decode="on_the_fly")
    save_run(folder, "baseline", model__kind="video_transformer", data__decode="on_the_fly")
    save_run(folder, "larger", data__image_size=20)
    latent = save_run(folder, "latent", data__channels=3, encoder__images="small_vae")
    dino = dict(images="dinov2:nowhere", latent_channels=5, latent_factor=14)
    dino = save_run(folder, "dino", data__image_size=28, **{f"encoder__{key}": value for key, value in dino.items()})
    mixing = torch.randn(5, 1, 14, 14, generator=torch.Generator().manual_seed(0)) / 14
    encoders = [
        (latent, load_image_encoder(latent.encoder).encode),
        (dino, lambda images: torch.conv2d(images, mixing, stride=14)),
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ebt_nb.data.moving_images.NUM_HELD_OUT_CLIPS", 8)
        for config, encode in encoders:
            prepare_frames(find_clip_set(config.data), config, encode)
    return folder


@pytest.fixture
def ebt(home, forker):
    "Run a command to its end: exit code, output, errors."
    return lambda *words, **options: forker.run(*words, cwd=home, **options)


def test_clips_are_written_and_measured(ebt, home):
    av = pytest.importorskip("av")
    words = ["rollout", "ebt:last", "--beside", "baseline:last", "--condition", 3, "--frames", 8, "--limit", 6]
    code, out, err = ebt(*words, "--output", "clips", "--clips", 2, "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found["num_clips"] == 6 and list(found["scores"]) == ["ebt:last", "baseline:last", COPY]
    assert [path.split("/")[-1] for path in found["files"]] == ["clip_1.mp4", "clip_2.mp4"]
    with av.open(str(home / "clips/clip_1.mp4")) as container:
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    assert frames.shape == (11, 3 * 132, 132, 3)  # truth, model, baseline: 16 pixels enlarged 8 times, and borders
    rows = frames.astype(int).reshape(11, 3, 132, 132, 3)[:, :, 4:-4, 4:-4]
    difference = np.abs(rows[:, 0] - rows[:, 1])
    assert difference[:3].mean() < 4 and difference[3:].mean() > 10  # observed frames are the same
    for scores in found["scores"].values():
        lengths = {name: len(values) for name, values in scores["per_frame"].items()}
        assert set(lengths.values()) == {8} and {"psnr", "ssim", "perceptual", "smooth_l1"} <= set(lengths)
        for name in ("psnr", "frechet_frames", "frechet_clips"):
            assert np.isfinite(scores[name])
    assert "energy" in found["scores"]["ebt:last"] and "energy" not in found["scores"]["baseline:last"]
    assert (home / "clips/clip_2.png").stat().st_size > 100
    code, out, err = ebt(*words, "--output", "clips")
    assert (code, out) == (2, "") and "clips/clip_1.mp4 exists already" in err


def test_the_lowest_of_several_energies_is_kept(ebt):
    words = ["rollout", "ebt:last", "--condition", 3, "--frames", 2, "--limit", 4, "--json"]
    energies = []
    for select in ("lowest", "highest"):
        settings = ["inference.samples=4", "inference.noise=0.5", f"inference.select={select}"]
        code, out, err = ebt(*words, *(word for one in settings for word in ("-p", one)))
        assert code == 0, err
        energies.append(json.loads(out)["scores"]["ebt:last"]["per_frame"]["energy"][0])
    assert energies[0] < energies[1]


def test_latents_are_decoded(ebt, home):
    words = ["rollout", "latent:last", "--condition", 2, "--frames", 3, "--limit", 4]
    code, out, err = ebt(*words, "--output", "decoded", "--format", "gif", "--clips", 9)
    assert code == 0, err
    assert "| PSNR, dB |" in out and f"\n| {COPY} | " in out and "features of small_vae" in out
    assert sorted(path.name for path in (home / "decoded").glob("*.gif")) == [f"clip_{n}.gif" for n in range(1, 5)]


def test_latents_without_a_decoder_are_compared_as_they_are(ebt):
    words = ["rollout", "dino:last", "--condition", 2, "--frames", 3, "--limit", 4]
    code, out, err = ebt(*words, "--json")
    assert code == 0, err
    scores = json.loads(out)["scores"][COPY]
    assert set(scores["per_frame"]) == {"perceptual", "smooth_l1"} and np.isfinite(scores["frechet_frames"])
    for option, part in ((["--output", "none"], "cannot be decoded"), (["--features", "small_vae"], "leave it out")):
        code, out, err = ebt(*words, *option)
        assert (code, out) == (2, "") and part in err


@pytest.mark.parametrize(
    "words, part",
    [
        (["ebt:last", "--beside", "larger:last"], "larger:last: was trained on other frames (data.image_size=20)"),
        (["ebt:last", "--frames", "1000"], "have at most 24; take fewer"),
        (["ebt:last", "--split", "holdout"], "has no holdout set"),
        (["shipped:text/quickstart"], "holds a model of kind 'ebt'"),
        (["baseline:last", "-p", "inference.steps=3"], "inference.steps"),
    ],
)
def test_what_makes_no_rollout_is_refused(ebt, words, part):
    code, out, err = ebt("rollout", *words, "--limit", 4)
    assert (code, out) == (2, "") and part in err and "Traceback" not in err and err.count("\n") <= 2


def test_without_pyav_there_are_gifs(ebt, home):
    words = ["rollout", "baseline:last", "--condition", 2, "--frames", 2, "--limit", 2, "--clips", 1]
    hidden = "import sys; sys.modules['av'] = None"
    code, out, err = ebt(*words, "--output", "no_mp4", setup=hidden)
    assert (code, out) == (2, "") and "pip install 'ebt-workbench[video]'" in err and not (home / "no_mp4").exists()
    code, out, err = ebt(*words, "--output", "gifs", "--format", "gif", setup=hidden)
    assert code == 0 and (home / "gifs/clip_1.gif").exists(), err


def test_evaluate(ebt, home):
    code, out, err = ebt("evaluate", "ebt:last", "--limit", 8, "--json", "--visualize", "figures")
    assert code == 0, err
    found = json.loads(out)
    assert list(found["step_losses"]) == ["1", "2", "4", "8"] and found["loss"] == found["step_losses"]["2"]
    assert {"copy_loss", "start_loss"} <= set(found) and found["rollout"]["num_frames"] == 4
    assert found["num_clips"] == found["rollout"]["num_clips"] == 8
    names = {path.name for path in (home / "figures").iterdir()}
    assert names == {"rollout_course.png", *(f"rollout_{n}.png" for n in range(1, 5))}
    code, out, err = ebt("evaluate", "baseline:last", "--limit", 8)
    assert code == 0 and "| copy of the newest frame | " in out and "| prediction | " in out and "| PSNR, dB |" in out
    code, out, err = ebt("evaluate", "ebt:last", "--results", "answers.jsonl")
    assert (code, out) == (2, "") and "holds a model of video" in err
