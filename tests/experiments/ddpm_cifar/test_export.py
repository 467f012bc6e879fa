"""diffusers opens what is exported and makes the same images."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from experiments.ddpm_cifar.export import export_diffusers
from experiments.nn import samplers
from experiments.nn.diffusion import GaussianDiffusion
from experiments.nn.unet import UNet
from runner.errors import UserError
from tests.experiments.conftest import IMAGE_SIZE, T
from tests.experiments.ddpm_cifar.conftest import built


@pytest.mark.slow
def test_diffusers_opens_the_export_and_makes_the_same_images(root: Path, tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    network = built(root, noisy=True)[0].network.eval()
    export_diffusers(tmp_path / "diffusers", network, GaussianDiffusion(T))
    pipeline = diffusers.DDPMPipeline.from_pretrained(str(tmp_path / "diffusers"))
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(2, torch.Generator().manual_seed(5), num_inference_steps=T, output_type="np").images

    stream = torch.Generator().manual_seed(5)
    noise = [torch.randn(2, 3, IMAGE_SIZE, IMAGE_SIZE, generator=stream) for _ in range(T)]
    ours = samplers.sample(GaussianDiffusion(T), network, noise[0], draw=lambda step: noise[step + 1])
    ours = ((ours + 1) / 2).clamp(0, 1).permute(0, 2, 3, 1)
    np.testing.assert_allclose(ours.numpy(), theirs, atol=1e-4)


def test_the_exported_weights_are_the_networks(root: Path, tmp_path: Path) -> None:
    peer = pytest.importorskip("safetensors.torch")
    network = built(root, noisy=True, channels_last=True)[0].network
    export_diffusers(tmp_path / "diffusers", network, GaussianDiffusion(T))
    weights = peer.load_file(tmp_path / "diffusers" / "unet" / "diffusion_pytorch_model.safetensors")
    torch.testing.assert_close(weights, dict(network.state_dict()), rtol=0, atol=0)


def test_without_safetensors_the_error_is_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="pip install safetensors"):
        export_diffusers(tmp_path / "diffusers", UNet.__new__(UNet), GaussianDiffusion(T))
    assert list(tmp_path.iterdir()) == []
