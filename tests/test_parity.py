"""Numbers of the published EBT code, reproduced: energies, moved candidates, losses and gradients, one test a case.

    pytest tests/test_parity.py [--parity-dir DIR] [--parity-dtype float64|float32]

DIR holds a manifest.json and, in the same folder, the safetensors files that it names. A tensor passes if the largest
difference is at most the case's `rtol_of_max` times the fixture's largest entry. Cases of a modality that is not built
yet are skipped by name.
"""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from ebt_nb.compute.rng import RandomKeys
from ebt_nb.config.data import IGNORE_INDEX
from ebt_nb.config.thinking import ImageObjectiveConfig, ObjectiveConfig, ThinkingConfig, TokenThinkingConfig
from ebt_nb.models.diffusion import GaussianDiffusion
from ebt_nb.models.dit import DiT
from ebt_nb.models.energy import EnergyTransformer
from ebt_nb.models.frame_models import FrameEnergyTransformer, FrameTransformer
from ebt_nb.models.image_energy import BidirectionalEBT
from ebt_nb.models.transformer import CausalTransformer, Transformer
from ebt_nb.thinking.descent import Descent
from ebt_nb.thinking.spaces import ContinuousSpace, ImageSpace, TokenSpace
from ebt_nb.training.images import restoration_objective
from ebt_nb.training.objectives import energy_objective, feed_forward_objective, regression_objective
from ebt_nb.training.optim import learning_rate

NORM_FLOOR = 1e-7  # gradients that are zero but for round-off


def pytest_generate_tests(metafunc):
    folder = Path(metafunc.config.getoption("--parity-dir"))
    cases = json.loads((folder / "manifest.json").read_text())["cases"]
    metafunc.parametrize("case", cases, ids=[case["name"] for case in cases])


def test_case(case, request):
    check = {
        "text_ebt": check_energy_model,
        "text_baseline": check_baseline,
        "video_ebt": check_video_energy_model,
        "video_baseline": check_video_baseline,
        "lr_schedule": check_learning_rates,
        "image_ebt": check_image_energy_model,
        "dit": check_dit,
        "diffusion_schedule": check_diffusion_schedule,
    }.get(case["config"]["kind"])
    if check is None:
        pytest.skip(f"{case['name']}: no model of kind {case['config']['kind']} yet")
    if check in (check_image_energy_model, check_dit, check_diffusion_schedule):
        pytest.importorskip("diffusers")
    table = case["config"]["kind"] == "lr_schedule"  # float64 as recorded: no model computes it
    dtype = torch.float64 if table else getattr(torch, request.config.getoption("--parity-dtype"))
    file = load_file(Path(request.config.getoption("--parity-dir")) / case["file"])
    check(case, {name: t.to(dtype) if t.is_floating_point() else t for name, t in file.items()})


def compare(case, name, ours, fixture):
    "Assert that a tensor agrees with the fixture within the case's tolerance."
    if case["tensors"].get(name, {}).get("ill_conditioned"):
        return
    assert ours.shape == fixture.shape, f"{name}: shape {tuple(ours.shape)}, expected {tuple(fixture.shape)}"
    error, scale = (ours.detach() - fixture).abs().max().item(), fixture.abs().max().item()
    assert error <= case["rtol_of_max"] * scale, (
        f"{name}: off by {error:.3g}, {error / max(scale, 1e-300) / case['rtol_of_max']:.2f} times the tolerance"
    )


def check_gradients(case, file, gradients):
    "Compare gradients with those in the file, and the norms of all others with the recorded norms."
    for name in (n for n in file if n.startswith("grad/")):
        compare(case, name, gradients[name.removeprefix("grad/")], file[name])
    for name, norm in case["grad_l2_norms"].items():
        if name.endswith("attn.k.bias"):  # a softmax does not see it: what is recorded is round-off
            assert gradients[name].norm() < 1e-5 * case["grad_l2_norms"][name.replace(".k.", ".q.")], name
            continue
        assert abs(gradients[name].norm().item() - norm) <= case["rtol_of_max"] * norm + NORM_FLOOR, (
            f"gradient norm of {name}: {gradients[name].norm().item()}, expected {norm}"
        )


def map_parameters(model, read):
    "Return `read(parameter)` for every parameter, by the fixtures' names and in their layout (fused matrices split)."
    if isinstance(model, BidirectionalEBT | DiT):
        return map_image_parameters(model, read)
    found = map_ends(model, read) | {"final_norm": read(model.final_norm.gain)}
    for i, block in enumerate(model.blocks):
        q, k, v = read(block.attention.qkv.weight).chunk(3)
        w1, w3 = read(block.ffn.gate_up.weight).chunk(2)
        named = {
            "attn.wq": q,
            "attn.wk": k,
            "attn.wv": v,
            "attn.wo": read(block.attention.out.weight),
            "ffn.w1": w1,
            "ffn.w3": w3,
            "ffn.w2": read(block.ffn.down.weight),
            "norm_attn": read(block.attention_norm.gain),
            "norm_ffn": read(block.ffn_norm.gain),
        }
        if block.adaptive is not None:
            named |= {"adaln.weight": read(block.adaptive.weight), "adaln.bias": read(block.adaptive.bias)}
        found |= {f"blocks.{i}.{name}": tensor for name, tensor in named.items()}
    if isinstance(model, CausalTransformer):
        return found | {"output_head": read(model.output_head.weight)}
    found["energy_head"] = read(model.energy_head.weight)
    if model.candidate_embedding is not model.embedding:
        found["vocab_to_embed"] = read(model.candidate_table).T
    if model.step_embedding is not None:
        found["time_embed"] = read(model.step_embedding.weight)
    if model.final_adaptive is not None:
        found |= {
            "final_adaln.weight": read(model.final_adaptive.weight),
            "final_adaln.bias": read(model.final_adaptive.bias),
        }
    return found


def map_ends(model, read):
    "Return what embeds observations and, of the baseline of video, what turns its output into frames."
    if isinstance(model.embedding, torch.nn.Embedding):
        return {"tok_embed": read(model.embedding.weight)}
    if isinstance(model.embedding, torch.nn.Identity):
        return {}
    found = {"down_proj.weight": read(model.embedding.weight), "down_proj.bias": read(model.embedding.bias)}
    if isinstance(model, FrameTransformer):
        found |= {"up_proj.weight": read(model.up_weight), "up_proj.bias": read(model.up_bias)}
    return found


def map_image_parameters(model, read):
    "Do what `map_parameters` does, for an image model."
    embedding, both = model.patch_embedding, ("weight", "bias")
    found = {
        "patch_embed.weight": read(embedding.weight).unflatten(
            1, (embedding.channels, embedding.patch_size, embedding.patch_size)
        ),
        "patch_embed.bias": read(embedding.bias),
    }

    def named(name, layer):
        return {f"{name}.{kind}": read(getattr(layer, kind)) for kind in both}

    for i, block in enumerate(model.blocks):
        found |= {
            f"blocks.{i}.attn.{part}.{kind}": tensor
            for kind in both
            for part, tensor in zip("qkv", read(getattr(block.qkv, kind)).chunk(3))
        }
        for name, layer in (
            ("attn.out", block.out),
            ("mlp.fc1", block.up),
            ("mlp.fc2", block.down),
            ("adaln", block.adaptive),
        ):
            found |= named(f"blocks.{i}.{name}", layer)
    found |= named("final_adaln", model.final_adaptive)
    if isinstance(model, BidirectionalEBT):
        return found | {"condition": read(model.condition), "energy_head": read(model.energy_head.weight)}
    return (
        found
        | named("time_mlp.fc1", model.time_mlp[0])
        | named("time_mlp.fc2", model.time_mlp[2])
        | named("out_proj", model.output_head)
    )


@torch.no_grad()
def load_weights(model, file):
    "Copy the fixture's weights into the model; the names of both must be the same."
    model.to(next(t.dtype for name, t in file.items() if name.startswith("weights/")))
    parameters = map_parameters(model, lambda parameter: parameter.data)
    weights = {
        name.removeprefix("weights/"): t
        for name, t in file.items()
        if name.startswith("weights/") and name not in ("weights/alpha", "weights/pos_embed")
    }
    assert parameters.keys() == weights.keys(), f"names differ: {parameters.keys() ^ weights.keys()}"
    for name, parameter in parameters.items():
        parameter.copy_(weights[name])


def inputs_and_targets(case, file):
    tokens = file["in/tokens"].long()
    inputs, targets = tokens[:, :-1], tokens[:, 1:].clone()
    targets[targets == case["config"]["pad_id"]] = IGNORE_INDEX
    return inputs, targets


def text_model_arguments(config):
    return dict(vocab_size=config["vocab_size"]) | trunk_arguments(config)


def trunk_arguments(config):
    "The shape that models of text and video share."
    multiplier = config["ffn_multiplier"] or 1.0
    return dict(
        layers=config["n_layers"],
        width=config["dim"],
        heads=config["n_heads"],
        ffn_multiplier=multiplier,
        norm_eps=config["norm_eps"],
        rope_base=config["rope_base"],
    )


def thinking_arguments(config):
    "The keys of the `thinking` section that text and image models share."
    return dict(
        steps=config["n_steps"],
        step_size=config["alpha_init"],
        noise=config["langevin_dynamics_noise"],
        random_step_size=config["randomize_mcmc_step_size_scale"],
        detach=not config["no_mcmc_detach"],
        truncate=config["truncate_mcmc"],
    )


def build_descent(thinking, file):
    "A descent in training mode with the fixture's step size."
    alpha = file["weights/alpha"]
    descent = Descent(thinking).to(alpha.dtype).train()
    with torch.no_grad():
        descent.step_size.copy_(alpha)
    return descent


class FixtureRandomKeys(RandomKeys):
    "Random keys whose draws are the random numbers of a fixture."

    def __new__(cls, file, purpose=None, step=0):
        self = object.__new__(cls)
        for name, value in (("file", file), ("purpose", purpose), ("step", step)):
            object.__setattr__(self, name, value)
        return self

    def __init__(self, *args):
        pass

    def for_purpose(self, purpose, step=0):
        return FixtureRandomKeys(self.file, purpose, step)

    def normal(self, width, dtype=None, std=1.0):
        if self.purpose == "langevin":
            return self.file["in/noise"][self.step] * std
        assert self.purpose == "start", self.purpose
        return self.file["in/y0"] * std

    def uniform(self, width=1, dtype=None):
        assert self.purpose == "step size", self.purpose
        return self.file["in/step_size_uniform"]


def check_energy_model(case, file):
    config = case["config"]
    model = EnergyTransformer.for_tokens(
        **text_model_arguments(config),
        conditioning=config["conditioning"],
        landscapes=config["n_steps"],
        tied=config["vocab_to_embed_uses_prob_dist"],
    )
    load_weights(model, file)
    thinking = TokenThinkingConfig(
        **thinking_arguments(config),
        rule="probabilities" if config["normalize_initial_condition"] else "raw",
        clamp=config["clamp_futures_grad_max_change"] if config["clamp_futures_grad"] else None,
    )
    objective = ObjectiveConfig(
        steps="last" if config["truncate_mcmc"] else "mean",
        contrastive=config["contrastive_loss_coeff"] if config["contrastive_loss"] else 0,
    )
    descent = build_descent(thinking, file)
    outcome = energy_objective(
        model,
        TokenSpace(model.candidate_table, thinking.rule),
        descent,
        *inputs_and_targets(case, file),
        FixtureRandomKeys(file),
        objective,
        config["step_indices"],
        keep_candidates="all",
    )
    for k, energies in enumerate(outcome.trace.energies):
        compare(case, f"out/energy.{k}", energies, file[f"out/energy.{k}"])
    for k, candidate in enumerate(outcome.trace.candidates[1:]):
        compare(case, f"out/pred.{k}", candidate, file[f"out/pred.{k}"])
    for k, loss in enumerate(outcome.step_losses):
        compare(case, f"out/ce.{k}", loss, file[f"out/ce.{k}"])
    compare(case, "out/loss", outcome.loss, file["out/loss"])
    compare(case, "out/perplexity", outcome.step_losses[-1].exp(), file["out/perplexity"])
    if "out/contrastive_loss" in file:
        compare(case, "out/contrastive_loss", outcome.auxiliary["contrastive"], file["out/contrastive_loss"])
    outcome.loss.backward()
    check_gradients(case, file, map_parameters(model, lambda p: p.grad) | {"alpha": descent.step_size.grad})


def check_baseline(case, file):
    model = Transformer(**text_model_arguments(case["config"]))
    load_weights(model, file)
    inputs, targets = inputs_and_targets(case, file)
    compare(case, "out/logits", model(inputs), file["out/logits"])
    loss = feed_forward_objective(model, inputs, targets, ObjectiveConfig()).loss
    compare(case, "out/loss", loss, file["out/loss"])
    compare(case, "out/perplexity", loss.exp(), file["out/perplexity"])
    loss.backward()
    check_gradients(case, file, map_parameters(model, lambda p: p.grad))


def check_video_energy_model(case, file):
    config, frames = case["config"], file["in/latents"]
    model = FrameEnergyTransformer(
        config["latent_dim"],
        **trunk_arguments(config),
        conditioning=config["conditioning"],
        landscapes=config["n_steps"],
    )
    load_weights(model, file)
    clamp = config["clamp_futures_grad_max_change"] if config["clamp_futures_grad"] else None
    descent = build_descent(ThinkingConfig(**thinking_arguments(config), clamp=clamp), file)
    outcome = regression_objective(
        model.condition_on(model.observe(frames[:, :-1])),
        ContinuousSpace(config["latent_dim"], model.projection, keep_noise=False),
        descent,
        frames[:, 1:],
        FixtureRandomKeys(file),
        "last" if config["truncate_mcmc"] else "mean",
        config["step_indices"],
        keep_candidates="all",
    )
    for k, energies in enumerate(outcome.trace.energies):
        compare(case, f"out/energy.{k}", energies, file[f"out/energy.{k}"])
    for k, candidate in enumerate(outcome.trace.candidates[1:]):
        compare(case, f"out/pred.{k}", candidate, file[f"out/pred.{k}"])
    for k, loss in enumerate(outcome.step_losses):
        compare(case, f"out/step_loss.{k}", loss, file[f"out/step_loss.{k}"])
    compare(case, "out/loss", outcome.loss, file["out/loss"])
    outcome.loss.backward()
    check_gradients(case, file, map_parameters(model, lambda p: p.grad) | {"alpha": descent.step_size.grad})


def check_video_baseline(case, file):
    config, frames = case["config"], file["in/latents"]
    model = FrameTransformer(config["latent_dim"], **trunk_arguments(config))
    load_weights(model, file)
    prediction = model(frames[:, :-1])
    compare(case, "out/pred", prediction, file["out/pred"])
    loss = F.smooth_l1_loss(prediction, frames[:, 1:])
    compare(case, "out/loss", loss, file["out/loss"])
    loss.backward()
    check_gradients(case, file, map_parameters(model, lambda p: p.grad))


def check_learning_rates(case, file):
    """Compare the main group's rates up to its last scheduled update.

    Behind that update, and in other groups, this project corrects the published floor on purpose.
    """
    config = case["config"]
    peak = config["peaks"][0]
    for schedule in config["schedules"]:
        start = 0.0 if schedule["divider"] == -1 else peak / schedule["divider"]
        ours = torch.tensor(
            [
                learning_rate(u, schedule["warm"], schedule["total"], peak, peak / schedule["min_lr_scale"], start)
                for u in range(1, schedule["total"] + 1)
            ],
            dtype=torch.float64,
        )
        compare(
            case, f"out/lr.{schedule['tag']}", ours, file[f"out/lr.{schedule['tag']}"][: schedule["total"], 0].double()
        )


def image_model_arguments(config):
    return dict(
        image_size=config["image_size"],
        channels=config["channels"],
        patch_size=config["patch_size"],
        layers=config["n_layers"],
        width=config["dim"],
        heads=config["n_heads"],
        ffn_multiplier=config["ffn_multiplier"],
    )


def check_image_energy_model(case, file):
    config, images = case["config"], file["in/image"]
    model = BidirectionalEBT(**image_model_arguments(config), landscapes=config["n_steps"])
    load_weights(model, file)
    compare(case, "weights/pos_embed", model.patch_embedding.positions, file["weights/pos_embed"])
    diffusion = GaussianDiffusion(config["diffusion_steps"], config["noise_level"])
    last_step = torch.full((len(images),), config["diffusion_steps"] - 1)
    start = diffusion.add_noise(images, last_step, file["in/q_noise"])
    compare(case, "out/noised", start, file["out/noised"])
    thinking = ThinkingConfig(**thinking_arguments(config))
    descent = build_descent(thinking, file)
    space = ImageSpace(model.patch_embedding, config["channels"], config["image_size"])
    first_pixel_axis = {"in/noise": 2, "in/step_size_uniform": 1}
    random_numbers = {name: file[name].flatten(axis) for name, axis in first_pixel_axis.items() if name in file}
    objective = ImageObjectiveConfig(steps="last" if config["truncate_mcmc"] else "mean")
    outcome = restoration_objective(
        model,
        space,
        descent,
        images.flatten(1),
        start.flatten(1),
        FixtureRandomKeys(random_numbers),
        objective,
        config["step_indices"],
        keep_candidates="all",
    )
    for k, energies in enumerate(outcome.trace.energies):
        compare(case, f"out/energy.{k}", energies, file[f"out/energy.{k}"])
    for k, candidate in enumerate(outcome.trace.candidates[1:]):
        compare(case, f"out/pred.{k}", space.to_images(candidate), file[f"out/pred.{k}"])
    for k, loss in enumerate(outcome.step_losses):
        compare(case, f"out/step_loss.{k}", loss, file[f"out/step_loss.{k}"])
    compare(case, "out/loss", outcome.loss, file["out/loss"])
    if "debug/patch_energy.0" in file and not thinking.noise:
        energy = model.condition_on(model.observe(len(images)))
        patch_energies = energy.patch_energies(space.embed(space.enter(start.flatten(1))), 0)
        compare(case, "debug/patch_energy.0", patch_energies, file["debug/patch_energy.0"])
    outcome.loss.backward()
    check_gradients(case, file, map_parameters(model, lambda p: p.grad) | {"alpha": descent.step_size.grad})


def check_dit(case, file):
    config, images, t, noise = case["config"], file["in/image"], file["in/t"].long(), file["in/q_noise"]
    model = DiT(**image_model_arguments(config))
    diffusion = GaussianDiffusion(config["diffusion_steps"], config["noise_level"])
    load_weights(model, file)
    compare(case, "out/q_sample", diffusion.add_noise(images, t, noise), file["out/q_sample"])
    output = model(file["in/x_t"], t)
    compare(case, "out/model_output", output, file["out/model_output"])
    squared, bound = diffusion.mse_and_bound(output, images, file["in/x_t"], t, noise)
    compare(case, "out/mse", squared, file["out/mse"])
    compare(case, "out/vb", bound, file["out/vb"])
    loss = (squared + bound).mean()
    compare(case, "out/loss", loss, file["out/loss"])
    loss.backward()
    check_gradients(case, file, map_parameters(model, lambda p: p.grad))
    first_step = torch.zeros_like(t)
    slightly_noisy = diffusion.add_noise(images, first_step, noise)
    squared, bound = diffusion.mse_and_bound(
        model(slightly_noisy, first_step), images, slightly_noisy, first_step, noise
    )
    compare(case, "out/mse_at_t0", squared, file["out/mse_at_t0"])
    compare(case, "out/vb_at_t0", bound, file["out/vb_at_t0"])


def check_diffusion_schedule(case, file):
    for steps in case["config"]["diffusion_steps"]:
        for level in case["config"]["noise_levels"]:
            diffusion, tag = GaussianDiffusion(steps, level), f"steps{steps}.level{level}"
            compare(case, f"out/alphas_cumprod.{tag}", diffusion.alphas_cumprod, file[f"out/alphas_cumprod.{tag}"])
            if f"out/betas.{tag}" in file:
                compare(case, f"out/betas.{tag}", diffusion.betas, file[f"out/betas.{tag}"])
            compare(
                case,
                f"out/q_sample.{tag}",
                diffusion.add_noise(file["in/image"], file[f"in/t.steps{steps}"].long(), file["in/q_noise"]),
                file[f"out/q_sample.{tag}"],
            )
