"""Network, schedules, samplers and export beside the diffusers library, where it is installed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from experiments.nn.diffusion import GaussianDiffusion, Schedule, Variance
from experiments.nn.samplers import sample, visits
from experiments.nn.unet import UNet

diffusers = pytest.importorskip("diffusers")

pytestmark = pytest.mark.slow
F64 = torch.float64
# google/ddpm-cifar10-32, the paper's network
CIFAR10: dict[str, Any] = {
    "sample_size": 32,
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": (128, 256, 256, 256),
    "layers_per_block": 2,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "act_fn": "silu",
    "attention_head_dim": None,
    "center_input_sample": False,
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-6,
    "norm_num_groups": 32,
    "time_embedding_type": "positional",
    "dropout": 0.0,
}
SMALL: dict[str, Any] = {
    **CIFAR10,
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "norm_num_groups": 8,
}


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def theirs(config: dict[str, Any]) -> Any:
    """A `UNet2DModel` with its own random weights, none of them zero."""
    return diffusers.UNet2DModel(**config).eval()


def ours(seed: int = 0) -> UNet:
    """A small network whose every weight has been drawn."""
    network = UNet(1, 32, (1, 2), 1, (4,), 8, dropout=0.0).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            fan = parameter[0].numel() if parameter.ndim > 1 else 4
            parameter.normal_(std=fan**-0.5)
    return network


# the network


def test_the_papers_network_is_theirs() -> None:
    """35,746,307 parameters, the same names and shapes, and their output from their weights."""
    reference = theirs(CIFAR10)
    network = UNet.from_diffusers(reference.state_dict(), reference.config).eval()
    assert sum(parameter.numel() for parameter in network.parameters()) == 35_746_307
    x, t = torch.randn(2, 3, 32, 32), torch.tensor([7, 901])
    with torch.no_grad():
        wanted = reference(x, t).sample
        assert float(wanted.std()) > 0.1
        assert torch.allclose(network(x, t), wanted, atol=1e-5)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"norm_num_groups": 32},
        {"sample_size": [8, 16]},
        {"in_channels": 3, "out_channels": 3, "layers_per_block": 2},
        {
            "block_out_channels": (32, 32, 64),
            "down_block_types": ("AttnDownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "UpBlock2D", "AttnUpBlock2D"),
        },
        {
            "block_out_channels": (64,),
            "down_block_types": ("DownBlock2D",),
            "up_block_types": ("UpBlock2D",),
        },
    ],
    ids=str,
)
def test_their_weights_in_our_network_and_ours_in_theirs(change: dict[str, Any]) -> None:
    config = {**SMALL, **change}
    reference = theirs(config)
    network = UNet.from_diffusers(reference.state_dict(), reference.config).eval()
    state, our_config = network.to_diffusers()
    back = diffusers.UNet2DModel.from_config(our_config).eval()
    back.load_state_dict(state)
    x, t = torch.randn(3, config["in_channels"], 8, 16), torch.tensor([0, 500, 999])
    with torch.no_grad():
        wanted = reference(x, t).sample
        assert torch.allclose(network(x, t), wanted, atol=1e-5)
        assert torch.allclose(back(x, t).sample, wanted, atol=1e-6)
    config["sample_size"] = 8  # the height
    assert {name: back.config[name] for name in config} == {
        name: list(value) if isinstance(value, tuple) else value for name, value in config.items()
    }


def test_gradients_are_theirs() -> None:
    reference = theirs(SMALL).double()
    network = UNet.from_diffusers(reference.state_dict(), reference.config).double()
    x, t = torch.randn(2, 1, 8, 8, dtype=F64), torch.tensor([40, 700])
    network.eval()(x, t).square().sum().backward()
    reference(x, t).sample.square().sum().backward()
    wanted = dict(reference.named_parameters())
    for name, parameter in network.named_parameters():
        assert torch.allclose(parameter.grad, wanted[name].grad, rtol=1e-4, atol=1e-4), name


# schedules and steps


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize(("schedule", "timesteps"), [("linear", 1000), ("linear", 250), ("cosine", 1000)])
def test_forward_and_ancestral_steps_are_theirs(
    schedule: Schedule, timesteps: int, variance: Variance
) -> None:
    """`DDPMScheduler` of our config: noising, and all steps back with the same noise."""
    diffusion = GaussianDiffusion(timesteps, schedule, variance)
    scheduler = diffusers.DDPMScheduler.from_config(diffusion.to_diffusers())
    assert torch.allclose(scheduler.betas.double(), diffusion.betas, rtol=1e-5)
    x_0, noise = torch.rand(3, 1, 4, 4) * 2 - 1, torch.randn(3, 1, 4, 4)
    t = torch.tensor([0, timesteps // 2, timesteps - 1])
    noised = diffusion.q_sample(x_0, t, noise)
    assert torch.allclose(scheduler.add_noise(x_0, noise, t), noised, atol=1e-4)

    def model(x: Tensor, t: Tensor) -> Tensor:
        return torch.tanh(x + t.view(-1, 1, 1, 1) / 700) * 0.9

    generator = torch.Generator().manual_seed(3)
    x = noise
    for step in scheduler.timesteps:
        x = scheduler.step(model(x, step[None]), step, x, generator=generator).prev_sample
    again = torch.Generator().manual_seed(3)
    found = sample(diffusion, model, noise, draw=lambda step: torch.randn(noise.shape, generator=again))
    assert torch.allclose(found, x, atol=2e-3)  # theirs are float32 tables


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_ancestral_steps_on_some_indices_are_theirs(variance: Variance) -> None:
    diffusion = GaussianDiffusion(variance=variance)
    scheduler = diffusers.DDPMScheduler.from_config(diffusion.to_diffusers())
    scheduler.set_timesteps(50)
    assert scheduler.timesteps.tolist() == visits(diffusion, 50, "uniform")
    x = noise = torch.randn(2, 1, 4, 4)
    generator, again = torch.Generator().manual_seed(3), torch.Generator().manual_seed(3)
    for step in scheduler.timesteps:
        x = scheduler.step(torch.sin(x), step, x, generator=generator).prev_sample
    found = sample(
        diffusion,
        lambda x, t: torch.sin(x),
        noise,
        50,
        draw=lambda step: torch.randn(noise.shape, generator=again),
    )
    assert torch.allclose(found, x, atol=1e-4)


@pytest.mark.parametrize(("eta", "clip"), [(0.0, False), (0.7, False), (0.0, True), (0.7, True)])
def test_ddim_is_theirs(eta: float, clip: bool) -> None:
    """`DDIMScheduler`; where x̂_0 is clipped, with its noise taken from the clipped one as ours is."""
    diffusion = GaussianDiffusion()
    scheduler = diffusers.DDIMScheduler(beta_schedule="linear", clip_sample=clip)
    scheduler.set_timesteps(20)
    assert scheduler.timesteps.tolist() == visits(diffusion, 20, "uniform")
    x = noise = torch.randn(2, 1, 4, 4)
    generator, again = torch.Generator().manual_seed(3), torch.Generator().manual_seed(3)
    for step in scheduler.timesteps:
        eps = torch.sin(x)
        x = scheduler.step(
            eps, step, x, eta=eta, use_clipped_model_output=clip, generator=generator
        ).prev_sample
    found = sample(
        diffusion,
        lambda x, t: torch.sin(x),
        noise,
        20,
        "ddim",
        lambda step: torch.randn(noise.shape, generator=again),
        eta=eta,
        spacing="uniform",
        clip=clip,
    )
    assert torch.allclose(found, x, rtol=1e-3, atol=1e-3 * float(x.abs().max()))


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # theirs
@pytest.mark.parametrize("steps", [1, 2, 10, 25])
def test_the_multistep_solver_is_theirs(steps: int) -> None:
    """`DPMSolverMultistepScheduler`, second order, at the same indices."""
    diffusion = GaussianDiffusion()
    times = visits(diffusion, steps, "logsnr")
    scheduler = diffusers.DPMSolverMultistepScheduler(solver_order=2, algorithm_type="dpmsolver++")
    scheduler.set_timesteps(timesteps=times)
    x = noise = torch.randn(2, 1, 4, 4)
    for step in scheduler.timesteps:
        x = scheduler.step(0.3 * torch.sin(x), step, x).prev_sample
    found = sample(diffusion, lambda x, t: 0.3 * torch.sin(x), noise, steps, "dpm++", clip=False)
    assert torch.allclose(found, x, rtol=1e-3, atol=1e-4 * float(x.abs().max()))


# the whole pipeline, from a folder


def export(network: UNet, diffusion: GaussianDiffusion, folder: Path) -> None:
    """What `DDPMPipeline.from_pretrained` opens."""
    state, config = network.to_diffusers()
    index = {
        "_class_name": "DDPMPipeline",
        "scheduler": ["diffusers", "DDPMScheduler"],
        "unet": ["diffusers", "UNet2DModel"],
    }
    (folder / "unet").mkdir()
    (folder / "scheduler").mkdir()
    (folder / "model_index.json").write_text(json.dumps(index))
    (folder / "unet" / "config.json").write_text(json.dumps(config))
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(diffusion.to_diffusers()))
    torch.save(state, folder / "unet" / "diffusion_pytorch_model.bin")


def test_a_pipeline_draws_the_same_images(tmp_path: Path) -> None:
    """Given the same noise, first x_T and then one z a step."""
    network, diffusion = ours(), GaussianDiffusion(60)
    export(network, diffusion, tmp_path)
    pipeline = diffusers.DDPMPipeline.from_pretrained(tmp_path, use_safetensors=False)
    pipeline.set_progress_bar_config(disable=True)
    wanted = pipeline(
        batch_size=3,
        generator=torch.Generator().manual_seed(5),
        num_inference_steps=60,
        output_type="np",
    ).images  # (3, 8, 8, 1), in [0, 1]
    again = torch.Generator().manual_seed(5)

    def draw(step: int) -> Tensor:
        return torch.randn(3, 1, 8, 8, generator=again)

    found = sample(diffusion, network, draw(-1), draw=draw)
    images = (found / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
    assert float(images.std()) > 0.1
    assert torch.allclose(images, torch.from_numpy(wanted), atol=1e-3)


def test_a_folder_of_theirs_is_read(tmp_path: Path) -> None:
    """Saved by diffusers, its config.json and weights are enough."""
    reference = theirs(SMALL)
    reference.save_pretrained(tmp_path, safe_serialization=False)
    config = json.loads((tmp_path / "config.json").read_text())
    state = torch.load(tmp_path / "diffusion_pytorch_model.bin", weights_only=True)
    network = UNet.from_diffusers(state, config).eval()
    x, t = torch.randn(1, 1, 8, 8), torch.tensor([12])
    with torch.no_grad():
        assert torch.allclose(network(x, t), reference(x, t).sample, atol=1e-5)


def test_their_defaults_are_refused_by_name() -> None:
    """With no arguments `UNet2DModel` is another network: several heads, cosines first, padding all round."""
    reference = diffusers.UNet2DModel(
        block_out_channels=(32, 64), down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2
    )
    with pytest.raises(ValueError, match="config: attention_head_dim must be None, as in DDPM, not 8"):
        UNet.from_diffusers(reference.state_dict(), reference.config)
