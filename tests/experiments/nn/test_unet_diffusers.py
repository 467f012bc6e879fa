"""Network, schedules and samplers beside the diffusers library, where it is installed."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from experiments.nn.diffusion import GaussianDiffusion, Schedule, Variance
from experiments.nn.samplers import _visits, sample
from experiments.nn.unet import UNet
from experiments.nn.unet_diffusers import FIXED
from tests.experiments.nn.diffusion_models import VARIANCES, bent
from tests.experiments.nn.helpers import near, randn

diffusers = pytest.importorskip("diffusers")

pytestmark = pytest.mark.slow


def repeated(*shape: int) -> Callable[..., Tensor]:
    """Noise from a generator that starts as theirs, `Generator().manual_seed(3)`."""
    generator = torch.Generator().manual_seed(3)
    return lambda step=0: torch.randn(shape, generator=generator)


# the network


@pytest.mark.parametrize(
    ("attention", "changes"),
    [
        ((False, True), {}),
        ((False, True), {"norm_num_groups": 32}),
        ((False, True), {"sample_size": [8, 16]}),
        ((False, True), {"in_channels": 3, "out_channels": 3, "layers_per_block": 2}),
        ((True, False, True), {"block_out_channels": [32, 32, 64]}),
        ((False,), {"block_out_channels": [64]}),
    ],
)
def test_their_weights_in_our_network_and_ours_in_theirs(
    attention: tuple[bool, ...], changes: dict[str, Any]
) -> None:
    # DDPM's network in their words, with attention at some levels
    kinds = ["Attn" if level else "" for level in attention]
    config = FIXED | {"sample_size": 8, "in_channels": 1, "out_channels": 1, "block_out_channels": [32, 64]}
    config |= {"layers_per_block": 1, "norm_num_groups": 8, "dropout": 0.0, **changes}
    config["down_block_types"] = [f"{kind}DownBlock2D" for kind in kinds]
    config["up_block_types"] = [f"{kind}UpBlock2D" for kind in reversed(kinds)]

    # there and back
    theirs = diffusers.UNet2DModel(**config).double().eval()
    network = UNet.from_diffusers(theirs.state_dict(), json.loads(theirs.to_json_string())).double().eval()
    state, our_config = network.to_diffusers()
    back = diffusers.UNet2DModel.from_config(our_config).double().eval()
    back.load_state_dict(state)
    assert (config | {"sample_size": 8}).items() <= back.config.items()  # the height

    # outputs and gradients
    x, t = randn(3, config["in_channels"], 8, 16), torch.tensor([0, 500, 999])
    expected, found = theirs(x, t).sample, network(x, t)
    near(found, expected, 1e-5)
    near(back(x, t).sample, expected, 1e-6)
    for output in (expected, found):
        output.square().sum().backward()
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    for name, parameter in network.named_parameters():
        near(parameter.grad, gradients[name], 1e-4, rtol=1e-4)


# schedules and steps


@VARIANCES
@pytest.mark.parametrize(("schedule", "timesteps"), [("linear", 1000), ("linear", 250), ("cosine", 1000)])
@pytest.mark.parametrize("steps", [None, 50])
def test_forward_and_ancestral_steps_are_theirs(
    schedule: Schedule, timesteps: int, variance: Variance, steps: int | None
) -> None:
    """`DDPMScheduler` of our config: noising, and all steps back, or some, with the same noise."""
    diffusion = GaussianDiffusion(timesteps, schedule, variance)
    scheduler = diffusers.DDPMScheduler.from_config(diffusion.to_diffusers())
    x_0, noise, t = torch.randn(3, 1, 4, 4), torch.randn(3, 1, 4, 4), torch.tensor([0, 120, timesteps - 1])
    near(scheduler.betas, diffusion.betas, 0, rtol=1e-5)
    near(scheduler.add_noise(x_0, noise, t), diffusion.q_sample(x_0, t, noise), 1e-4)
    if steps is not None:
        scheduler.set_timesteps(steps)
    assert scheduler.timesteps.tolist() == _visits(diffusion, steps, "uniform")
    x, generator = noise, torch.Generator().manual_seed(3)
    for step in scheduler.timesteps:
        x = scheduler.step(bent(x, step[None]), step, x, generator=generator).prev_sample
    near(sample(diffusion, bent, noise, steps, draw=repeated(*x.shape)), x, 2e-3)  # theirs are float32 tables


@pytest.mark.parametrize("eta", [0.0, 0.7])
@pytest.mark.parametrize("clip", [False, True])
def test_ddim_is_theirs(eta: float, clip: bool) -> None:
    """`DDIMScheduler`; where x̂_0 is clipped, with its noise taken from the clipped one as ours is."""
    x = noise = torch.randn(2, 1, 4, 4)
    scheduler = diffusers.DDIMScheduler(beta_schedule="linear", clip_sample=clip)
    scheduler.set_timesteps(20)
    ways = {"use_clipped_model_output": clip, "generator": torch.Generator().manual_seed(3)}
    for step in scheduler.timesteps:
        x = scheduler.step(torch.sin(x), step, x, eta=eta, **ways).prev_sample
    draw = repeated(*x.shape)
    found = sample(GaussianDiffusion(), lambda x, t: x.sin(), noise, 20, "ddim", draw, eta, "uniform", clip)
    near(found, x, 1e-3 * float(x.abs().max()), rtol=1e-3)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # theirs
@pytest.mark.parametrize("steps", [1, 2, 10, 25])
def test_the_multistep_solver_is_theirs(steps: int) -> None:
    """`DPMSolverMultistepScheduler`, second order, at the same indices."""
    diffusion = GaussianDiffusion()
    x = noise = torch.randn(2, 1, 4, 4)
    scheduler = diffusers.DPMSolverMultistepScheduler(solver_order=2, algorithm_type="dpmsolver++")
    scheduler.set_timesteps(timesteps=_visits(diffusion, steps, "logsnr"))
    for step in scheduler.timesteps:
        x = scheduler.step(0.3 * torch.sin(x), step, x).prev_sample
    found = sample(diffusion, lambda x, t: 0.3 * torch.sin(x), noise, steps, "dpm++", clip=False)
    near(found, x, 1e-4 * float(x.abs().max()), rtol=1e-3)
