"""Export to the diffusers library: a folder that `DDPMPipeline.from_pretrained` opens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from experiments.ddpm_cifar.mosaics import atomic_output
from experiments.nn.diffusion import GaussianDiffusion
from experiments.nn.unet import UNet
from runner.errors import UserError

_INDEX = {
    "_class_name": "DDPMPipeline",
    "_diffusers_version": "0.30.0",
    "unet": ["diffusers", "UNet2DModel"],
    "scheduler": ["diffusers", "DDPMScheduler"],
}


def export_diffusers(folder: Path, network: UNet, diffusion: GaussianDiffusion) -> None:
    """Write a network and its process as a diffusers pipeline.

    Raises:
        UserError: safetensors is not installed, or the folder cannot be written.
    """
    try:
        from safetensors.torch import save
    except ImportError:
        raise UserError("mode=export needs a package: pip install safetensors") from None

    # what diffusers reads, by path
    weights, config = network.to_diffusers()
    files = {
        "model_index.json": _json(_INDEX),
        "unet/config.json": _json(config),
        "unet/diffusion_pytorch_model.safetensors": save(weights, {"format": "pt"}),
        "scheduler/scheduler_config.json": _json(diffusion.to_diffusers()),
    }
    with atomic_output(folder) as temporary:
        for name, content in files.items():
            path = temporary / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)


def _json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()
