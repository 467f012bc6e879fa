"""The network of DDPM (Ho, Jain & Abbeel 2020, appendix B): a U-Net of residual blocks, conditioned on the time.

    h ← h + conv₂(dropout(silu(norm(conv₁(silu(norm(h))) + W silu(e)))))     a residual block                (1)
    h ← h + W_o softmax(q kᵀ / √C) v,   q, k, v = W_q n, W_k n, W_v n,  n = norm(h)                          (2)
    e = W_b silu(W_a [sin(t f) ‖ cos(t f)]),   f_i = 10000^(−i / (C/2 − 1)),  i = 0 … C/2 − 1                (3)

(2) is Vaswani et al. 2017, eq. 1, with one head and every pixel a query. On the way down each level ends in a halving
of the image, on the way up in a doubling, and each block on the way up also sees what the block at its height left
on the way down.

Modules and parameters have the names of `UNet2DModel` in the diffusers library, so that weights can be exchanged.

Letters in shapes: B batch, C channels, H height, W width, E = 4 · base channels, the size of e.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from experiments.nn.checks import at_least, divisible, shaped, within
from experiments.nn.dropout import Dropout
from experiments.nn.unet_diffusers import FIXED, check_config, check_weights, current_name, layout

EPS = 1e-6  # of the group normalisation (Wu & He 2018), the authors'; torch's own default is 1e-5
FEW_PIXELS = 32 * 32  # whose scores, one for each pair of them, take no memory to speak of
Shapes = list[list[tuple[int, int]]]  # (in, out) channels of each residual block of each level


class _Common(NamedTuple):
    """What all blocks of a network have in common."""

    time_channels: int  # E
    groups: int
    dropout: float


class ResidualBlock(nn.Module):
    """Equation (1); where the channels change, h passes a 1×1 convolution before it is added."""

    def __init__(self, in_channels: int, out_channels: int, common: _Common):
        super().__init__()
        self.norm1 = nn.GroupNorm(common.groups, in_channels, EPS)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_emb_proj = nn.Linear(common.time_channels, out_channels)
        self.norm2 = nn.GroupNorm(common.groups, out_channels, EPS)
        self.dropout = Dropout(common.dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        """x (B, C, H, W) and silu(e) (B, E) → (B, C', H, W)."""
        h: Tensor = self.conv1(F.silu(self.norm1(x)))
        h = h + self.time_emb_proj(e)[:, :, None, None]
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class SelfAttention(nn.Module):
    """Equation (2)."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, channels, EPS)
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])  # a list of one, as diffusers has it

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) → the same shape."""
        pixels = self.group_norm(x).flatten(2).transpose(1, 2)  # (B, H·W, C)
        q, k, v = (project(pixels) for project in (self.to_q, self.to_k, self.to_v))  # (B, H·W, C)
        h: Tensor = self.to_out[0](attend(q, k, v))
        return x + h.mT.reshape(x.shape)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q kᵀ / √C) v of equation (2), each (B, H·W, C), by torch's fused kernel or as it is written.

    On a CPU, while there are few pixels, the kernel is the slower way, in bfloat16 by a factor of three.
    """
    _, pixels, C = q.shape
    if q.device.type == "cpu" and pixels <= FEW_PIXELS:
        return torch.softmax(q @ k.mT / math.sqrt(C), -1) @ v
    return F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]


class Downsample(nn.Module):
    """Half the height and width by a 3×3 convolution of stride 2."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) → (B, C, H/2, W/2); zeros on the right and below alone, TensorFlow's SAME."""
        output: Tensor = self.conv(F.pad(x, (0, 1, 0, 1)))
        return output


class Upsample(nn.Module):
    """Twice the height and width by repeating pixels, then a 3×3 convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) → (B, C, 2H, 2W)."""
        output: Tensor = self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return output


class Level(nn.Module):
    """The residual blocks of one resolution, the first `attended` of them followed by attention."""

    def __init__(self, shapes: Sequence[tuple[int, int]], common: _Common, attended: int):
        super().__init__()
        self.resnets = nn.ModuleList(ResidualBlock(i, o, common) for i, o in shapes)
        if attended:
            self.attentions = nn.ModuleList(SelfAttention(o, common.groups) for _, o in shapes[:attended])
        self.attended = attended

    def block(self, number: int, h: Tensor, e: Tensor) -> Tensor:
        """One residual block and its attention."""
        h = self.resnets[number](h, e)
        return self.attentions[number](h) if number < self.attended else h


class DownLevel(Level):
    """A level on the way down."""

    def __init__(self, shapes: Sequence[tuple[int, int]], common: _Common, attention: bool, last: bool):
        super().__init__(shapes, common, len(shapes) if attention else 0)
        self.downsamplers = None if last else nn.ModuleList([Downsample(shapes[-1][1])])

    def forward(self, h: Tensor, e: Tensor, skips: list[Tensor]) -> Tensor:
        """Return h (B, C, H, W) after the level; it appends what the way up takes to `skips`."""
        for number in range(len(self.resnets)):
            h = self.block(number, h, e)
            skips.append(h)
        if self.downsamplers is not None:
            h = self.downsamplers[0](h)
            skips.append(h)
        return h


class UpLevel(Level):
    """A level on the way up."""

    def __init__(self, shapes: Sequence[tuple[int, int]], common: _Common, attention: bool, last: bool):
        super().__init__(shapes, common, len(shapes) if attention else 0)
        self.upsamplers = None if last else nn.ModuleList([Upsample(shapes[-1][1])])

    def forward(self, h: Tensor, e: Tensor, skips: list[Tensor]) -> Tensor:
        """Return h (B, C, H, W) after the level; it takes the last entries of `skips`."""
        for number in range(len(self.resnets)):
            h = self.block(number, torch.cat((h, skips.pop()), 1), e)
        return h if self.upsamplers is None else self.upsamplers[0](h)


class Middle(Level):
    """Residual block, attention, residual block at the lowest resolution."""

    def __init__(self, channels: int, common: _Common):
        super().__init__([(channels, channels)] * 2, common, attended=1)

    def forward(self, h: Tensor, e: Tensor) -> Tensor:
        """(B, C, H, W) → the same shape."""
        return self.block(1, self.block(0, h, e), e)


class TimeEmbedding(nn.Module):
    """Equation (3)."""

    def __init__(self, channels: int):
        super().__init__()
        self.channels = channels
        self.linear_1 = nn.Linear(channels, 4 * channels)
        self.linear_2 = nn.Linear(4 * channels, 4 * channels)

    def forward(self, t: Tensor) -> Tensor:
        """t (B,) → e (B, E)."""
        dtype = self.linear_1.weight.dtype
        output: Tensor = self.linear_2(F.silu(self.linear_1(sinusoids(t, self.channels, dtype).to(dtype))))
        return output


def sinusoids(t: Tensor, channels: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """[sin(t f) ‖ cos(t f)] (B, C) of equation (3), in float32 or wider: t f has no room in half precision."""
    half, dtype = channels // 2, torch.promote_types(dtype, torch.float32)
    i = torch.arange(half, dtype=dtype, device=t.device)
    angles = t.to(dtype)[:, None] * torch.exp(i * (-math.log(10000) / (half - 1)))  # (B, C/2)
    return torch.cat((angles.sin(), angles.cos()), 1)


class UNet(nn.Module):
    """ε_θ(x, t). With no arguments the paper's network for CIFAR-10: 35,746,307 parameters.

    Weights start Xavier uniform and biases zero; the last convolution, and the last layer of each block's branch,
    start at zero, so that the untrained network predicts ε = 0 and its loss (eq. 14 of the paper) is 1.

    Args:
        in_channels: of the image, and of ε
        base_channels: C of the first level; the time is embedded in as many sines and cosines
        channel_mult: each level's channels, in multiples of the first's: 1, …
        num_res_blocks: a level's residual blocks on the way down; on the way up there is one more
        attention_resolutions: the heights at which blocks are followed by attention; the middle always has it
        image_size: the height of the images meant, which says where those resolutions are; others can be put in
        dropout: in the residual blocks
        groups: of the normalisation; by default 32, or fewer so that each has four channels. In a group of one
            channel the normalisation takes away what W e has added, and the block is blind to the time

    Raises:
        ValueError: an argument outside its range, groups that do not divide the channels, an `image_size` that the
            levels cannot halve, a resolution that no level has.
    """

    def __init__(
        self,
        in_channels: int = 3,
        base_channels: int = 128,
        channel_mult: Sequence[int] = (1, 2, 2, 2),
        num_res_blocks: int = 2,
        attention_resolutions: Sequence[int] = (16,),
        image_size: int = 32,
        dropout: float = 0.1,
        groups: int | None = None,
    ):
        super().__init__()
        at_least(1, in_channels=in_channels, num_res_blocks=num_res_blocks)
        within(0, 1, dropout=dropout)
        _check_channels(base_channels, channel_mult, groups)
        heights = _check_heights(image_size, len(channel_mult), attention_resolutions)

        # settings
        self.in_channels, self.image_size, self.num_res_blocks = in_channels, image_size, num_res_blocks
        self.channels = [base_channels * mult for mult in channel_mult]
        fours = range(min(32, base_channels // 4), 0, -1)  # groups of four channels or more
        usual = next(number for number in fours if base_channels % number == 0)
        self.dropout, self.groups = dropout, usual if groups is None else groups
        self.attention = [height in attention_resolutions for height in heights]
        common = _Common(4 * base_channels, self.groups, dropout)

        # input and time
        self.conv_in = nn.Conv2d(in_channels, base_channels, 3, padding=1)
        self.time_embedding = TimeEmbedding(base_channels)

        # down, middle, up
        down, up = _block_shapes(self.channels, num_res_blocks)
        bottom = len(down) - 1
        self.down_blocks = nn.ModuleList(
            DownLevel(down[i], common, self.attention[i], i == bottom) for i in range(bottom + 1)
        )
        self.mid_block = Middle(self.channels[-1], common)
        self.up_blocks = nn.ModuleList(
            UpLevel(up[bottom - i], common, self.attention[i], i == 0) for i in reversed(range(bottom + 1))
        )

        # output
        self.conv_norm_out = nn.GroupNorm(self.groups, base_channels, EPS)
        self.conv_out = nn.Conv2d(base_channels, in_channels, 3, padding=1)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise the weights."""
        # Xavier uniform everywhere, biases zero
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                assert module.bias is not None
                nn.init.zeros_(module.bias)

        # the last layer of each branch, and of the network, zero
        for module in self.modules():
            if isinstance(module, ResidualBlock):
                nn.init.zeros_(module.conv2.weight)
            elif isinstance(module, SelfAttention):
                for last in module.to_out.parameters():
                    nn.init.zeros_(last)
        nn.init.zeros_(self.conv_out.weight)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """x (B, C, H, W), t (B,) → ε (B, C, H, W)."""
        shaped("x", x, "B", self.in_channels, "H", "W")
        shaped("t", t, len(x))
        divisible(1 << (len(self.channels) - 1), height=x.shape[2], width=x.shape[3])

        e = F.silu(self.time_embedding(t))  # every block asks for it so
        h = self.conv_in(x)
        skips = [h]
        for level in self.down_blocks:
            h = level(h, e, skips)
        h = self.mid_block(h, e)
        for level in self.up_blocks:
            h = level(h, e, skips)
        output: Tensor = self.conv_out(F.silu(self.conv_norm_out(h)))
        return output

    @classmethod
    def from_diffusers(
        cls, state_dict: Mapping[str, Tensor], config: Mapping[str, Any] | None = None, image_size: int = 32
    ) -> UNet:
        """Build the network that a `UNet2DModel` of diffusers is, from its weights.

        Args:
            state_dict: its weights; the names of old checkpoints (query, key, value, proj_attn) are understood
            config: its config.json, if there is one: what ours has not is then refused, and it says what the
                shapes do not show. Where it is silent, or there is none: 32 groups, as in DDPM and by diffusers'
                default; dropout 0, diffusers' default and not DDPM's 0.1, because it acts in training alone
                ({"dropout": 0.1} asks for it); one head and ε = 1e-6, as in DDPM, ours alone
            image_size: the height of the images meant, where no config has a sample_size

        Raises:
            ValueError: a setting or a layer that this network has not.
        """
        weights = {current_name(name): value for name, value in state_dict.items()}
        config = config or {}
        check_config(config)
        size = config.get("sample_size") or image_size
        size = size if isinstance(size, int) else size[0]  # diffusers also takes (height, width)
        groups, dropout = config.get("norm_num_groups", 32), config.get("dropout", 0.0)
        unet = cls(**layout(weights, size), image_size=size, dropout=dropout, groups=groups)
        check_weights(unet.state_dict(), weights)
        unet.load_state_dict(weights)
        return unet

    def to_diffusers(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the weights and the config of the `UNet2DModel` in diffusers that this network is."""
        # config
        kinds = ["Attn" if attention else "" for attention in self.attention]
        config = {
            "_class_name": "UNet2DModel",
            "sample_size": self.image_size,
            "in_channels": self.in_channels,
            "out_channels": self.in_channels,
            "block_out_channels": self.channels,
            "layers_per_block": self.num_res_blocks,
            "down_block_types": [f"{kind}DownBlock2D" for kind in kinds],
            "up_block_types": [f"{kind}UpBlock2D" for kind in reversed(kinds)],
            "dropout": self.dropout,
            "norm_num_groups": self.groups,
            **FIXED,
        }

        # weights
        plain = {"copy": True, "memory_format": torch.contiguous_format}
        return {name: value.to("cpu", **plain) for name, value in self.state_dict().items()}, config


def _block_shapes(channels: list[int], num_res_blocks: int) -> tuple[Shapes, Shapes]:
    """Return the shapes on the way down and on the way up."""
    above, below = [channels[0], *channels[:-1]], [*channels[1:], channels[-1]]
    levels = list(zip(above, channels, below, strict=True))
    same = num_res_blocks - 1
    down = [[(a, own)] + [(own, own)] * same for a, own, _ in levels]
    up = [
        [(b + own, own)] + [(2 * own, own)] * same + [(own + a, own)]  # with the skip connections
        for a, own, b in reversed(levels)
    ]
    return down, up


def _check_channels(base_channels: int, channel_mult: Sequence[int], groups: int | None) -> None:
    """Refuse channels that no level can have, and groups that are not all of one size."""
    at_least(4, base_channels=base_channels)
    divisible(2, base_channels=base_channels)
    if not channel_mult or channel_mult[0] != 1 or min(channel_mult) < 1:
        raise ValueError(f"channel_mult must be 1, then at least 1 per level, got {list(channel_mult)}")
    if groups is not None:
        at_least(1, groups=groups)
        divisible(groups, "groups", base_channels=base_channels)


def _check_heights(image_size: int, levels: int, attention_resolutions: Sequence[int]) -> list[int]:
    """Return the levels' heights; refuse an image that cannot be halved so often, and resolutions of no level."""
    factor = 1 << (levels - 1)
    divisible(factor, f"2**({levels} levels - 1)", image_size=image_size)
    at_least(factor, image_size=image_size)
    heights = [image_size >> level for level in range(levels)]
    if not set(attention_resolutions) <= set(heights):
        given = list(attention_resolutions)
        raise ValueError(f"attention_resolutions must be among the levels' heights {heights}, got {given}")
    return heights


def training_flops(network: UNet, shape: tuple[int, int, int]) -> float:
    """Operations of a training image (C, H, W), counted without data: a backward pass takes twice the forward's."""
    shell = copy.deepcopy(network).to("meta")
    x, t = torch.zeros(1, *shape, device="meta"), torch.zeros(1, dtype=torch.int64, device="meta")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        shell(x, t)
    return 3.0 * float(counter.get_total_flops())
