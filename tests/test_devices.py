"""Everything that computes runs on a GPU that is not there (`fake_device`), which refuses operands of two devices.

Results must be those of the CPU up to rounding: named random numbers do not depend on the device.
"""

import json
from copy import deepcopy

import pytest
import torch
from fake_device import CPU, DeviceMixError, fake_gpu
from torch import Tensor
from torch.testing import assert_close

from ebt_nb.analysis.image_figures import draw_image_figures
from ebt_nb.analysis.probe import run_probe
from ebt_nb.analysis.text_figures import draw_text_figures
from ebt_nb.cli.main import main
from ebt_nb.config.errors import ConfigError
from ebt_nb.config.kinds import RunConfig
from ebt_nb.config.overrides import build_config, override_config
from ebt_nb.data.tokenizers import load_tokenizer
from ebt_nb.inference.bench import compare_generation
from ebt_nb.inference.descent_metrics import measure_descent
from ebt_nb.inference.draw import draw_images
from ebt_nb.inference.encode import encode_dataset
from ebt_nb.inference.evaluate import evaluate
from ebt_nb.inference.generate import TextGenerator
from ebt_nb.inference.loading import load_for_inference
from ebt_nb.inference.restore import evaluate_images
from ebt_nb.training.base import TrainingModule
from ebt_nb.training.build import build_module, get_model_kind
from ebt_nb.training.fit import fit
from ebt_nb.training.overfit import overfit
from ebt_nb.training.trainer import use_threads

SIZE = {"model.layers": 1, "model.width": 16, "model.heads": 2, "trainer.threads": 1}
TRAINER = {
    "trainer.max_steps": 2,
    "trainer.val_every": 1,
    "trainer.val_batches": 1,
    "trainer.checkpoint_every": 1,
    "trainer.log_every": 1,
    "optim.warmup_steps": 1,
}
HIDDEN_START = {"thinking.rule": "embedding", "thinking.start": "hidden", "objective.start_weight": 0.5}
TEXT = {
    "probabilities": {},
    "logits": {"thinking.rule": "logits", "thinking.noise": 0.1, "thinking.clamp": 1.0},
    "raw": {"thinking.rule": "raw", "thinking.detach": False, "objective.loss_prediction": 0.1},
    "embedding": HIDDEN_START,
    "adaln": {"model.conditioning": "adaln", "thinking.random_step_size": 2.0},
    "curvature": {"thinking.detach": True, "thinking.curvature": 1.0},
    "contrastive": {"objective.contrastive": 0.1},
    "transformer": {"model.kind": "transformer"},
}
IMAGES = {
    "denoise": {},
    "random level": {"diffusion.random_level": True},
    "generate": {"data.task": "generate"},
    "dit": {"model.kind": "dit"},
    "dit-generate": {"model.kind": "dit", "data.task": "generate"},
}
VIDEO = {
    "frame": {
        "thinking.rule": "frame",
        "thinking.start": "newest",
        "objective.start_weight": 0,
        "model.energy": "linear",
    },
    "embedding": {},
    "transformer": {"model.kind": "video_transformer"},
}


@pytest.fixture(autouse=True)
def one_thread():
    "More threads only wait for each other: models are tiny."
    with use_threads(1):
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "A folder that all tests share."
    return tmp_path_factory.mktemp("devices")


def text_config(folder, **changes) -> RunConfig:
    data = {"data.context": 8, "data.batch_size": 3, "run.runs_dir": str(folder / "runs")}
    return build_config("text/quickstart_s1", SIZE | TRAINER | data | changes)


def image_config(folder, **changes) -> RunConfig:
    data = {"data.source": "emoji", "data.channels": 3, "data.image_size": 12, "data.batch_size": 4, "model.patch": 4}
    places = {"data.cache_dir": str(folder / "cache"), "run.runs_dir": str(folder / "runs")}
    preset, diffusion = "image/quickstart", {"diffusion.steps": 50}
    if changes.get("data.task") == "generate":
        preset, diffusion = "image/t2i_ebt_s1", {"encoder.images": "none", "encoder.captions": "none"}
    return build_config(preset, SIZE | TRAINER | data | places | diffusion | changes)


def video_config(folder, **changes) -> RunConfig:
    data = {"data.image_size": 8, "data.context": 4, "data.batch_size": 4, "data.max_documents": 20}
    places = {"data.cache_dir": str(folder / "cache"), "run.runs_dir": str(folder / "runs")}
    return build_config("video/quickstart", SIZE | TRAINER | data | places | changes)


def text_batch(config) -> dict[str, Tensor]:
    tokens = torch.arange(27).view(3, 9) % config.model.vocab_size
    return dict(inputs=tokens[:, :-1], targets=tokens[:, 1:], index=torch.arange(3))


def image_batch(config) -> dict[str, Tensor]:
    channels, side = config.image_shape
    images = torch.linspace(-1, 1, 4 * channels * side * side).view(4, channels, side, side)
    return dict(image=images, index=torch.arange(4))


def predict_frame(module: TrainingModule, batch: dict[str, Tensor]) -> list[Tensor]:
    "Return the frame that follows the last of each clip, with the clip observed in two parts."
    frames, index = (values.to(module.device) for values in batch.values())
    context = module.model.observe(frames[:, :-1], spare_capacity=1)
    module.model.extend(context, frames[:, -1])
    position = torch.tensor([frames.shape[1] - 1], device=module.device)
    return [module.predict_next(context, frames[:, -1], module.frame_rng(index, position)).frames.cpu()]


def train_briefly(module: TrainingModule, batch: dict[str, Tensor]) -> list[Tensor]:
    "Return the losses of two training steps and the metrics of a validation."
    batch, losses = module.move_batch(batch), []
    optimizer = module.configure_optimizers()["optimizer"]
    for micro_step in range(2):
        loss = module.compute_objective(batch, micro_step).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    module.eval()
    with torch.no_grad():
        metrics, count = module.validation_metrics(batch)
    summed = torch.stack([value.double() * count for value in metrics.values()])  # as at the end of a validation
    return [torch.stack([*losses, *summed]).cpu(), count.cpu()]


# ---- the fake itself


def test_operands_of_two_devices_are_refused():
    with fake_gpu() as gpu:
        a, b = torch.ones(3, device=gpu, requires_grad=True), torch.ones(3)
        assert (a.device, a.is_cuda, a.is_cpu) == (gpu, True, False) and (b.device, b.is_cuda) == (CPU, False)
        assert (a[None] * 2).sum().device == gpu and a.new_zeros(2).is_cuda and a.cpu().is_cpu and b.to(a).is_cuda
        assert_close((a * torch.tensor(2.0)).detach().cpu(), 2 * torch.ones(3))  # a scalar of the CPU may mix
        assert a.detach()[torch.tensor([0, 1])].is_cuda  # so may an index
        for mixed in [
            lambda: a + b,
            lambda: b.add_(a.detach()),
            lambda: torch.stack([a.sum(), torch.tensor(1.0)]),
            lambda: b[torch.zeros(1, dtype=torch.long, device=gpu)],
            lambda: torch.randn(3, device=gpu, generator=torch.Generator()),
            lambda: torch.autograd.grad(a.square(), a, torch.ones(3)),
            lambda: CreatesOnCPU.apply(a).sum().backward(),
        ]:
            with pytest.raises(DeviceMixError):
                mixed()
        with pytest.raises(TypeError, match="numpy"):
            a.detach().numpy()
    assert not torch.cuda.is_available() or torch.ones(1, device="cuda").is_cuda


class CreatesOnCPU(torch.autograd.Function):
    "A function whose backward pass forgets the device."

    @staticmethod
    def forward(ctx, x):
        assert x.is_cuda
        return 2 * x

    @staticmethod
    def backward(ctx, grad):
        assert grad.is_cuda
        return grad * torch.full((3,), 2.0)


# ---- training


@pytest.mark.parametrize("changes", TEXT.values(), ids=TEXT)
def test_text_training(folder, changes):
    config = text_config(folder, **changes)
    module = build_module(config)
    expected = train_briefly(deepcopy(module), text_batch(config))
    with fake_gpu() as gpu:
        found = train_briefly(module.to(gpu), text_batch(config))
    assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("changes", IMAGES.values(), ids=IMAGES)
def test_image_training(folder, changes):
    config = image_config(folder, **changes)
    module = build_module(config)
    expected = train_briefly(deepcopy(module), image_batch(config))
    with fake_gpu() as gpu:
        found = train_briefly(module.to(gpu), image_batch(config))
    assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("changes", VIDEO.values(), ids=VIDEO)
def test_video_training(folder, changes):
    config = video_config(folder, **changes)
    module, batch = build_module(config), get_model_kind(config).example_batch(config, 3)
    on_cpu = deepcopy(module)
    expected = train_briefly(on_cpu, batch) + predict_frame(on_cpu, batch)
    with fake_gpu() as gpu:
        module.to(gpu)
        found = train_briefly(module, batch) + predict_frame(module, batch)
    assert_close(found, expected, rtol=1e-4, atol=1e-5)


REPLAY = {"thinking.replay": 8}
RUNS = {
    "ebt": (text_config, REPLAY | {"trainer.precision": "bf16-mixed", "trainer.matmul_precision": "high"}),
    "transformer": (text_config, {"model.kind": "transformer"}),
    "image_ebt": (image_config, REPLAY),
    "dit": (image_config, {"model.kind": "dit"}),
    "video_ebt": (video_config, {}),
}


@pytest.fixture(scope="module")
def runs(folder):
    "A run of each kind, trained on the GPU and resumed there."

    def train(kind):
        make_config, changes = RUNS[kind]
        config = make_config(folder, **changes, **{"trainer.accelerator": "gpu", "run.name": kind})
        run = fit(config, progress="none")
        return fit(override_config(config, {"trainer.max_steps": 4}), run, resume=True, progress="none")

    with fake_gpu():
        return {kind: train(kind) for kind in RUNS}


@pytest.mark.parametrize("kind", RUNS)
def test_whole_run(runs, kind):
    assert runs[kind].status == "done" and "val/loss" in runs[kind].metrics[-1]
    weights = torch.load(runs[kind].checkpoint("last"), weights_only=False)["state_dict"]
    assert all(value.is_cpu for value in weights.values())


def test_overfit(folder):
    config = text_config(folder, **{"trainer.accelerator": "gpu", "trainer.matmul_precision": "medium"})
    expected = overfit(override_config(config, {"trainer.accelerator": "cpu"}), updates=2)
    with fake_gpu():
        found = overfit(config, updates=2)
    assert_close(found.rows[-1]["loss"], expected.rows[-1]["loss"], rtol=1e-4, atol=1e-5)
    assert torch.get_float32_matmul_precision() == "highest"


# ---- predictions of text

GENERATION = {
    "cached": {},
    "best of two": {"inference.samples": 2, "generation.energies": True, "inference.noise": 0.1},
    "early stop": {"inference.early_stop": 0.0, "inference.steps": 4, "inference.accept_only_lower": True},
    "drafts": HIDDEN_START | {"generation.drafts": 4},
    "transformer": {"model.kind": "transformer"},
}


@pytest.mark.parametrize("changes", GENERATION.values(), ids=GENERATION)
def test_generation(folder, changes):
    config = text_config(folder, **changes, **{"generation.max_new_tokens": 4, "generation.top_k": 50})
    prompts = [[1, 2, 3], list(range(8))]

    def complete(module):
        generator = TextGenerator(module, None, cached=True)
        return [completion.tokens for completion in generator.complete(prompts)]

    module = build_module(config).eval()
    expected = complete(module)
    with fake_gpu() as gpu:
        module.to(gpu)
        assert complete(module) == expected
        once = config.generation.model_copy(update=dict(max_new_tokens=1))
        TextGenerator(module, None, once, cached=False, through_both=True).complete(prompts)


@pytest.mark.parametrize("source", ["austen", "arithmetic"])
@pytest.mark.parametrize("kind", ["ebt", "transformer"])
def test_evaluation_and_figures(folder, source, kind):
    config = text_config(folder, **{"model.kind": kind, "data.context": 40})
    tokenizer = load_tokenizer(config.data.tokenizer)
    module = build_module(config).eval()
    expected = evaluate(module, tokenizer, source, limit=3).to_json()
    with fake_gpu() as gpu:
        found = evaluate(module.to(gpu), tokenizer, source, limit=3).to_json()
        draw_text_figures(module, tokenizer, source, rows=3)
    assert_close(found["step_losses"], expected["step_losses"], rtol=1e-4, atol=1e-5)


def test_measurements(folder):
    config = text_config(folder)
    module = build_module(config).eval()
    with fake_gpu() as gpu:
        assert measure_descent(module.to(gpu), [text_batch(config)], 3, 2).nll.is_cpu
        assert compare_generation(module, 2, seconds=0, repeats=1).summary()["same_tokens"]


# ---- images

DIFFUSION_DRAWING = {"diffusion.sampling_steps": 4, "data.task": "generate", "model.kind": "dit"}
DRAWING = {
    "image_ebt": {"data.task": "generate", "inference.samples": 2},
    "ddim": DIFFUSION_DRAWING,
    "ddpm": DIFFUSION_DRAWING | {"diffusion.sampler": "ddpm", "diffusion.recursion": 2},
}


@pytest.mark.parametrize("changes", DRAWING.values(), ids=DRAWING)
def test_drawing(folder, changes):
    config = image_config(folder, **changes)
    module = build_module(config).eval()
    expected = draw_images(module, 3).images
    with fake_gpu() as gpu:
        found = draw_images(module.to(gpu), 3).images
    assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["image_ebt", "dit"])
def test_restoration_and_figures(folder, kind):
    config = image_config(folder, **{"model.kind": kind})
    options = dict(limit=6, passes=[1, 2], show_progress=False)
    module = build_module(config).eval()
    expected = evaluate_images(module, **options)
    with fake_gpu() as gpu:
        found = evaluate_images(module.to(gpu), **options)
        draw_image_figures(module, found, rows=6)
        run_probe(module, train=40, test=20)
    assert_close([row.psnr for row in found.rows], [row.psnr for row in expected.rows], rtol=1e-4, atol=1e-4)


def test_latents(folder):
    changes = {"encoder.images": "small_vae"}
    settings = {"trainer.accelerator": "gpu", "data.max_documents": 40, "data.image_size": 16, "model.patch": 4}
    config = image_config(folder, **changes, **settings, **{"data.task": "generate"})
    with fake_gpu() as gpu:
        assert encode_dataset(config, 16).is_dir()
        assert draw_images(build_module(config).eval().to(gpu), 2).images.is_cpu


# ---- the command line


def test_commands_take_the_device(folder, runs, capsys, monkeypatch):
    monkeypatch.chdir(folder)

    def ebt(*words):
        code, output = main([*map(str, words)]), capsys.readouterr().out
        assert not code
        return output

    checkpoints = {kind: run.checkpoint("last") for kind, run in runs.items()}
    words = ["generate", checkpoints["ebt"], "--prompt", "It", "--tokens", 4, "--json"]
    expected = json.loads(ebt(*words))["tokens"]
    with pytest.raises(ConfigError, match="no GPU"):
        load_for_inference(checkpoints["ebt"], ["trainer.accelerator=gpu"])
    with fake_gpu() as gpu:
        assert load_for_inference(checkpoints["ebt"]).device == gpu
        assert load_for_inference(checkpoints["ebt"], ["trainer.accelerator=cpu"]).device == CPU
        assert json.loads(ebt(*words, "-p", "trainer.accelerator=gpu"))["tokens"] == expected
        ebt("evaluate", checkpoints["transformer"], "--limit", 2, "--json", "-p", "trainer.accelerator=auto")
        ebt("evaluate", checkpoints["image_ebt"], "--limit", 4, "--json")
