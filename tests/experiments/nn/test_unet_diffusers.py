"""Network, schedules, samplers and export beside the diffusers library, where it is installed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from experiments.nn.diffusion import GaussianDiffusion, Schedule, Variance
from experiments.nn.samplers import _visits, sample
from experiments.nn.unet import UNet
from experiments.nn.unet_diffusers import FIXED
from tests.experiments.nn.helpers import drawn, near, randn, refused

diffusers = pytest.importorskip("diffusers")

pytestmark = pytest.mark.slow
VARIANCES = pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])


def unet_config(attention: list[bool], **changes: Any) -> dict[str, Any]:
    """A config of `UNet2DModel` that is DDPM's, with attention at these levels on the way down."""
    kinds = ["Attn" if level else "" for level in attention]
    config = {"sample_size": 8, "in_channels": 1, "out_channels": 1, "block_out_channels": (32, 64)}
    config |= {"layers_per_block": 1, "norm_num_groups": 8, "dropout": 0.0}
    config["down_block_types"] = tuple(f"{kind}DownBlock2D" for kind in kinds)
    config["up_block_types"] = tuple(f"{kind}UpBlock2D" for kind in reversed(kinds))
    return config | FIXED | changes


SMALL = unet_config([False, True])


def make(config: dict[str, Any]) -> tuple[Any, UNet]:
    """Make a `UNet2DModel` with its own random weights, none of them zero, and ours with the same."""
    theirs = diffusers.UNet2DModel(**config).eval()
    return theirs, UNet.from_diffusers(theirs.state_dict(), json.loads(theirs.to_json_string())).eval()


def repeated(shape: torch.Size) -> Callable[..., Tensor]:
    """Noise from a generator that starts as theirs, `Generator().manual_seed(3)`."""
    generator = torch.Generator().manual_seed(3)
    return lambda step=0: torch.randn(shape, generator=generator)


# the network


@torch.no_grad()
def test_the_papers_network_is_theirs() -> None:
    """google/ddpm-cifar10-32: 35,746,307 parameters, the same names and shapes, and their output."""
    sizes = {
        "sample_size": 32,
        "in_channels": 3,
        "out_channels": 3,
        "block_out_channels": (128, 256, 256, 256),
    }
    config = unet_config([False, True, False, False], layers_per_block=2, norm_num_groups=32, **sizes)
    theirs, network = make(config)
    assert sum(parameter.numel() for parameter in network.parameters()) == 35_746_307
    x, t = torch.randn(1, 3, 32, 32), torch.tensor([901])
    expected = theirs(x, t).sample
    assert float(expected.std()) > 0.1
    near(network(x, t), expected, 1e-5)


@pytest.mark.parametrize(
    "config",
    [
        SMALL,
        SMALL | {"norm_num_groups": 32},
        SMALL | {"sample_size": [8, 16]},
        SMALL | {"in_channels": 3, "out_channels": 3, "layers_per_block": 2},
        unet_config([True, False, True], block_out_channels=(32, 32, 64)),
        unet_config([False], block_out_channels=(64,)),
    ],
)
def test_their_weights_in_our_network_and_ours_in_theirs(config: dict[str, Any]) -> None:
    theirs, network = (model.double() for model in make(config))
    state, our_config = network.to_diffusers()
    back = diffusers.UNet2DModel.from_config(our_config).double().eval()
    back.load_state_dict(state)
    x, t = randn(3, config["in_channels"], 8, 16), torch.tensor([0, 500, 999])
    expected, found = theirs(x, t).sample, network(x, t)
    near(found, expected, 1e-5)
    near(back(x, t).sample, expected, 1e-6)
    for output in (expected, found):
        output.square().sum().backward()
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    for name, parameter in network.named_parameters():
        near(parameter.grad, gradients[name], 1e-4, rtol=1e-4)
    lists = {name: list(value) if isinstance(value, tuple) else value for name, value in config.items()}
    assert (lists | {"sample_size": 8}).items() <= back.config.items()  # the height


# schedules and steps


@VARIANCES
@pytest.mark.parametrize(("schedule", "timesteps"), [("linear", 1000), ("linear", 250), ("cosine", 1000)])
def test_forward_and_ancestral_steps_are_theirs(
    schedule: Schedule, timesteps: int, variance: Variance
) -> None:
    """`DDPMScheduler` of our config: noising, and all steps back, or some, with the same noise."""
    diffusion = GaussianDiffusion(timesteps, schedule, variance)
    x_0, noise = torch.rand(3, 1, 4, 4) * 2 - 1, torch.randn(3, 1, 4, 4)
    t = torch.tensor([0, timesteps // 2, timesteps - 1])

    def model(x: Tensor, t: Tensor) -> Tensor:
        return torch.tanh(x + t.view(-1, 1, 1, 1) / 700) * 0.9

    for steps in (None, 50):
        scheduler = diffusers.DDPMScheduler.from_config(diffusion.to_diffusers())
        near(scheduler.betas, diffusion.betas, 0, rtol=1e-5)
        near(scheduler.add_noise(x_0, noise, t), diffusion.q_sample(x_0, t, noise), 1e-4)
        if steps is not None:
            scheduler.set_timesteps(steps)
        assert scheduler.timesteps.tolist() == _visits(diffusion, steps, "uniform")
        x, generator = noise, torch.Generator().manual_seed(3)
        for step in scheduler.timesteps:
            x = scheduler.step(model(x, step[None]), step, x, generator=generator).prev_sample
        found = sample(diffusion, model, noise, steps, draw=repeated(noise.shape))
        near(found, x, 2e-3)  # theirs are float32 tables


@pytest.mark.parametrize(("eta", "clip"), [(0.0, False), (0.7, False), (0.0, True), (0.7, True)])
def test_ddim_is_theirs(eta: float, clip: bool) -> None:
    """`DDIMScheduler`; where x̂_0 is clipped, with its noise taken from the clipped one as ours is."""
    diffusion, noise = GaussianDiffusion(), torch.randn(2, 1, 4, 4)
    scheduler = diffusers.DDIMScheduler(beta_schedule="linear", clip_sample=clip)
    scheduler.set_timesteps(20)
    x, ways = noise, {"use_clipped_model_output": clip, "generator": torch.Generator().manual_seed(3)}
    for step in scheduler.timesteps:
        x = scheduler.step(torch.sin(x), step, x, eta=eta, **ways).prev_sample
    draw = repeated(noise.shape)
    found = sample(diffusion, lambda x, t: torch.sin(x), noise, 20, "ddim", draw, eta, "uniform", clip)
    near(found, x, 1e-3 * float(x.abs().max()), rtol=1e-3)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # theirs
@pytest.mark.parametrize("steps", [1, 2, 10, 25])
def test_the_multistep_solver_is_theirs(steps: int) -> None:
    """`DPMSolverMultistepScheduler`, second order, at the same indices."""
    diffusion, noise = GaussianDiffusion(), torch.randn(2, 1, 4, 4)
    scheduler = diffusers.DPMSolverMultistepScheduler(solver_order=2, algorithm_type="dpmsolver++")
    scheduler.set_timesteps(timesteps=_visits(diffusion, steps, "logsnr"))
    x = noise
    for step in scheduler.timesteps:
        x = scheduler.step(0.3 * torch.sin(x), step, x).prev_sample
    found = sample(diffusion, lambda x, t: 0.3 * torch.sin(x), noise, steps, "dpm++", clip=False)
    near(found, x, 1e-4 * float(x.abs().max()), rtol=1e-3)


# from a folder


def test_a_pipeline_draws_the_same_images(tmp_path: Path) -> None:
    """What `DDPMPipeline.from_pretrained` opens; given the same noise, first x_T and then one z a step."""
    network, diffusion = drawn(UNet(1, 32, (1, 2), 1, (4,), 8)).float(), GaussianDiffusion(60)
    state, config = network.to_diffusers()
    parts = {"scheduler": ["diffusers", "DDPMScheduler"], "unet": ["diffusers", "UNet2DModel"]}
    for name, content in (
        ("model_index.json", {"_class_name": "DDPMPipeline", **parts}),
        ("unet/config.json", config),
        ("scheduler/scheduler_config.json", diffusion.to_diffusers()),
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps(content))
    torch.save(state, tmp_path / "unet" / "diffusion_pytorch_model.bin")
    pipeline = diffusers.DDPMPipeline.from_pretrained(tmp_path, use_safetensors=False)
    pipeline.set_progress_bar_config(disable=True)
    ways = {"batch_size": 3, "num_inference_steps": 60, "output_type": "np"}
    expected = pipeline(generator=torch.Generator().manual_seed(3), **ways).images  # (3, 8, 8, 1), in [0, 1]
    draw = repeated(torch.Size((3, 1, 8, 8)))
    images = (sample(diffusion, network, draw(), draw=draw) / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
    assert float(images.std()) > 0.1
    near(images, torch.from_numpy(expected), 1e-3)


def test_their_defaults_are_refused_by_name() -> None:
    """With no arguments `UNet2DModel` is another network: several heads, cosines first, padding all round."""
    names = {name: SMALL[name] for name in ("block_out_channels", "down_block_types", "up_block_types")}
    with refused("config.*attention_head_dim.*None.*8"):
        make(names)
