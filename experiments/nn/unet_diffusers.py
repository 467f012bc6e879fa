"""Weights and configs of diffusers' `UNet2DModel`, as `UNet` reads and writes them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

# what is the same in all networks of this kind, as diffusers' config says it
FIXED: dict[str, Any] = {
    "act_fn": "silu",
    "add_attention": True,
    "attention_head_dim": None,  # one head
    "center_input_sample": False,
    "downsample_padding": 0,  # zeros on the right and below alone
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-6,
    "time_embedding_type": "positional",
}


def current_name(name: str) -> str:
    """Return a parameter's name as diffusers has it today: its attention had other ones."""
    for old, new in (("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0")):
        name = re.sub(rf"(attentions\.\d+)\.{old}\.", rf"\1.{new}.", name)
    return name


def check_config(config: Mapping[str, Any]) -> None:
    """Refuse settings of diffusers that change what a network says without a trace in its shapes."""
    for name, value in FIXED.items():
        if config.get(name, value) != value:
            raise ValueError(f"config: {name} must be {value}, as in DDPM, got {config[name]}")


def layout(weights: Mapping[str, Tensor], image_size: int) -> dict[str, Any]:
    """Read the arguments of `UNet` off weights with diffusers' names."""
    # levels, and residual blocks of each
    matches = [re.fullmatch(r"down_blocks\.(\d+)\.resnets\.(\d+)\.conv1\.weight", name) for name in weights]
    blocks = [(int(match[1]), int(match[2])) for match in matches if match]
    levels = 1 + max((level for level, _ in blocks), default=-1)
    firsts = [f"down_blocks.{level}.resnets.0.conv1.weight" for level in range(max(levels, 1))]
    for name in ("conv_in.weight", *firsts):
        if name not in weights:
            raise ValueError(f"state_dict must be that of a UNet2DModel: it has no {name}")

    # channels, in multiples of the first level's
    base, in_channels = weights["conv_in.weight"].shape[:2]
    channels = [len(weights[name]) for name in firsts]
    if channels[0] != base or any(channel % base for channel in channels):
        raise ValueError(f"state_dict: channels must be {base} and multiples of it, got {channels}")

    attends = [f"down_blocks.{level}.attentions.0.to_q.weight" in weights for level in range(levels)]
    return {
        "in_channels": in_channels,
        "base_channels": base,
        "channel_mult": [channel // base for channel in channels],
        "num_res_blocks": 1 + max(block for _, block in blocks),
        "attention_resolutions": [image_size >> level for level in range(levels) if attends[level]],
    }


def check_weights(ours: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
    """Raise for the first weight that this network lacks, or has in another shape."""
    for name in sorted(ours.keys() | weights.keys()):
        expected, given = (tuple(w[name].shape) if name in w else "absent" for w in (ours, weights))
        if expected != given:
            raise ValueError(f"state_dict: {name} must be {expected}, got {given}")
