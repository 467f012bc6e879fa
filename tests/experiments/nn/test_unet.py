"""The U-Net by its count of parameters, its zeros at the start, a plain copy of its formulas, and what it refuses."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.nn.diffusion import GaussianDiffusion
from experiments.nn.dropout import Dropout
from experiments.nn.unet import FEW_PIXELS, SelfAttention, UNet, attend, sinusoids
from tests.experiments.nn.helpers import F64, all_near, drawn, near, randn, refused

SMALL: dict[str, Any] = {"in_channels": 1, "base_channels": 32, "channel_mult": (1, 2), "num_res_blocks": 1}
SMALL |= {"attention_resolutions": (4,), "image_size": 8}
TIMES = torch.tensor([3, 700])


def small(**more: Any) -> UNet:
    return UNet(**{**SMALL, **more})


# the paper's network


def test_with_no_arguments_it_is_the_papers_network() -> None:
    """35,746,307 parameters; attention behind every block at 16×16, in the middle, and nowhere else."""
    with torch.device("meta"):
        network = UNet()
    assert sum(parameter.numel() for parameter in network.parameters()) == 35_746_307
    attention = {name for name, module in network.named_modules() if isinstance(module, SelfAttention)}
    counts = {"down_blocks.1": 2, "up_blocks.2": 3, "mid_block": 1}
    assert attention == {f"{name}.attentions.{i}" for name, count in counts.items() for i in range(count)}
    assert {module.p for module in network.modules() if isinstance(module, Dropout)} == {0.1}
    assert {module.num_groups for module in network.modules() if isinstance(module, nn.GroupNorm)} == {32}


def test_weights_start_xavier_uniform_and_branches_at_zero() -> None:
    """Uniform up to √(6 / (fan in + fan out)), biases zero; a block or an attention starts as the identity."""
    network = small()
    for name, weight in network.named_parameters():
        weight = weight.detach()
        if name.endswith(("bias", "conv2.weight", "to_out.0.weight", "conv_out.weight")):
            assert not weight.any(), name
        elif weight.ndim > 1:
            bound = math.sqrt(6 / (weight[0, 0].numel() * sum(weight.shape[:2])))
            assert 0.9 * bound < float(weight.abs().max()) <= bound, name
            assert float(weight.std()) == pytest.approx(bound / math.sqrt(3), rel=0.1), name
    x = torch.randn(2, 64, 4, 4)
    assert torch.equal(network.down_blocks[0].resnets[0](x[:, :32], torch.randn(2, 128)), x[:, :32])
    assert torch.equal(network.mid_block.attentions[0](x), x)


def test_untrained_it_says_zero_and_its_loss_is_one() -> None:
    network, x_0, noise = small(), torch.rand(2, 1, 8, 8) * 2 - 1, torch.randn(2, 1, 8, 8)
    assert not network(x_0, TIMES).any()
    loss = GaussianDiffusion().loss_simple(network, x_0, TIMES, noise)
    near(loss, noise.square().mean((1, 2, 3)), 1e-6)


def test_groups_have_four_channels_or_more() -> None:
    groups = {128: 32, 256: 32, 64: 16, 32: 8, 48: 12, 30: 6, 4: 1}
    with torch.device("meta"):
        assert {channels: small(base_channels=channels).groups for channels in groups} == groups


def test_every_block_sees_the_time() -> None:
    """With one channel to a group none of it would be left behind the second normalisation."""
    for groups, sees in ((None, True), (32, False)):
        block, x = drawn(small(groups=groups)).down_blocks[0].resnets[0], randn(1, 32, 4, 4)
        early, late = (block(x, randn(1, 128)) for _ in range(2))
        assert torch.allclose(early, late, atol=1e-4) != sees


# its formulas once more


def test_attention_of_few_pixels_and_of_many() -> None:
    for pixels in (FEW_PIXELS, FEW_PIXELS + 1):
        q, k, v = randn(3, 1, pixels, 4)
        near(attend(q, k, v), (q @ k.mT / 2).softmax(-1) @ v, 1e-12)


def plain(network: UNet, p: dict[str, Tensor], x: Tensor, t: Tensor) -> Tensor:
    """The whole U-Net once more, from a dict of weights by torch's functions."""
    levels = range(len(network.channels))

    def of(name: str) -> tuple[Tensor, Tensor]:
        return p[f"{name}.weight"], p[f"{name}.bias"]

    def conv(name: str, h: Tensor, stride: int = 1, pad: tuple[int, ...] = (1, 1, 1, 1)) -> Tensor:
        return F.conv2d(F.pad(h, pad), *of(name), stride)

    def norm(name: str, h: Tensor) -> Tensor:
        return F.group_norm(h, network.groups, *of(name), eps=1e-6)

    def block(name: str, x: Tensor) -> Tensor:
        h = conv(f"{name}.conv1", F.silu(norm(f"{name}.norm1", x)))
        h = h + F.linear(F.silu(e), *of(f"{name}.time_emb_proj"))[:, :, None, None]
        h = conv(f"{name}.conv2", F.silu(norm(f"{name}.norm2", h)))
        short = f"{name}.conv_shortcut"
        return h + (F.conv2d(x, *of(short)) if f"{short}.weight" in p else x)

    def step(level: str, number: int, x: Tensor) -> Tensor:
        x, name = block(f"{level}.resnets.{number}", x), f"{level}.attentions.{number}"
        if f"{name}.to_q.weight" not in p:
            return x
        n = norm(f"{name}.group_norm", x).flatten(2).mT
        q, k, v = (F.linear(n, *of(f"{name}.to_{letter}")) for letter in "qkv")
        h = F.linear(F.scaled_dot_product_attention(q, k, v), *of(f"{name}.to_out.0"))
        return x + h.mT.reshape(x.shape)

    # time
    half = network.channels[0] // 2
    angles = t[:, None] * torch.tensor([10000 ** (-i / (half - 1)) for i in range(half)], dtype=F64)
    e = F.linear(torch.cat((angles.sin(), angles.cos()), 1), *of("time_embedding.linear_1"))
    e = F.linear(F.silu(e), *of("time_embedding.linear_2"))

    # down, the middle, and up
    h = conv("conv_in", x)
    skips = [h]
    for name in (f"down_blocks.{level}" for level in levels):
        for number in range(network.num_res_blocks):
            h = step(name, number, h)
            skips.append(h)
        if f"{name}.downsamplers.0.conv.weight" in p:  # a pixel sees those from its own place on
            h = conv(f"{name}.downsamplers.0.conv", h, 2, (0, 1, 0, 1))
            skips.append(h)
    h = block("mid_block.resnets.1", step("mid_block", 0, h))
    for name in (f"up_blocks.{level}" for level in levels):
        for number in range(network.num_res_blocks + 1):
            h = step(name, number, torch.cat((h, skips.pop()), 1))
        if f"{name}.upsamplers.0.conv.weight" in p:
            h = conv(f"{name}.upsamplers.0.conv", h.repeat_interleave(2, 2).repeat_interleave(2, 3))
    return conv("conv_out", F.silu(norm("conv_norm_out", h)))


@pytest.mark.parametrize(
    ("arguments", "size"),
    [
        ({"channel_mult": (1, 2, 1), "num_res_blocks": 2}, (8, 16)),
        ({"in_channels": 3, "base_channels": 8, "attention_resolutions": (8,)}, (8, 16)),
        ({"in_channels": 3, "channel_mult": (1, 2, 3), "num_res_blocks": 2}, (8, 4)),
        ({"channel_mult": (1,), "attention_resolutions": ()}, (5, 7)),
        ({"channel_mult": (1, 1), "attention_resolutions": (8, 4)}, (12, 20)),
    ],
    ids=str,
)
def test_it_is_a_plain_copy_of_its_formulas(arguments: dict[str, Any], size: tuple[int, int]) -> None:
    """And so are its gradients; images of any size that its levels can halve, dim ones too: ε in the norm shows."""
    network = drawn(small(**{"base_channels": 16, **arguments}))
    x = randn(2, network.in_channels, *size)
    for _ in range(2):
        p = {name: value.clone().requires_grad_() for name, value in network.state_dict().items()}
        found, expected = network(x, TIMES), plain(network, p, x, TIMES)
        near(found, expected, 1e-7, rtol=1e-7)
        names, parameters = zip(*network.named_parameters(), strict=True)
        gradients = torch.autograd.grad(found.square().sum(), parameters)
        all_near(
            gradients, torch.autograd.grad(expected.square().sum(), [p[name] for name in names]), 1e-5, 1e-5
        )
        for parameter in network.conv_in.parameters():
            parameter.data.mul_(1e-3)


def test_dropout_is_in_training_alone_and_behind_the_second_norm() -> None:
    network = drawn(small(dropout=0.5))
    x = randn(2, 1, 8, 8)
    assert torch.equal(network(x, TIMES), network(x, TIMES))
    network.train()
    assert not torch.equal(network(x, TIMES), network(x, TIMES))
    block, given = network.down_blocks[0].resnets[0], []
    block.conv2.register_forward_pre_hook(lambda _, inputs: given.extend(inputs))
    block(randn(2, 32, 4, 4), randn(2, 128))
    assert float((given[0] == 0).double().mean()) == pytest.approx(0.5, abs=0.1)


def test_memory_format_and_precision_change_nothing_but_rounding() -> None:
    """The time's sines are float32 in bfloat16 too, which has no 999."""
    network, x, times = drawn(small()).float(), torch.randn(2, 1, 8, 8), torch.tensor([999, 3])
    expected = network(x, times)
    last = network.to(memory_format=torch.channels_last)
    near(last(x.to(memory_format=torch.channels_last), times), expected, 1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        rough = network(x, times).float()
    assert float(((rough - expected).std() / expected.std()).detach()) < 0.05
    assert network.bfloat16()(x.bfloat16(), times).dtype == torch.bfloat16
    for dtype in (torch.float32, torch.bfloat16):
        found = sinusoids(times, 32, dtype)
        assert found.dtype == torch.float32
        near(found, sinusoids(times, 32, F64), 1e-4)


# what is refused


def given(*shape: int, times: int = 2) -> Callable[[], Tensor]:
    return lambda: small()(torch.zeros(shape), torch.zeros(times, dtype=torch.int64))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (partial(small, in_channels=0), "in_channels.*1.*0"),
        (partial(small, base_channels=33), "base_channels.*2.*33"),
        (partial(small, base_channels=0), "base_channels.*4.*0"),
        (partial(small, groups=12), "base_channels.*groups.*12.*32"),
        (partial(small, groups=0), "groups.*1.*0"),
        (partial(small, channel_mult=()), r"channel_mult.*\[\]"),
        (partial(small, channel_mult=(1, 0)), r"channel_mult.*\[1, 0\]"),
        (partial(small, channel_mult=(2, 2)), r"channel_mult.*\[2, 2\]"),
        (partial(small, num_res_blocks=0), "num_res_blocks.*1.*0"),
        (partial(small, dropout=1.0), r"dropout.*1\.0"),
        (partial(small, image_size=9), "image_size.*2 levels.*2.*9"),
        (partial(small, image_size=0), "image_size.*2.*0"),
        (partial(small, attention_resolutions=(4, 16)), r"attention_resolutions.*\[8, 4\].*\[4, 16\]"),
        (given(2, 3, 8, 8), r"x .*1, H, W.*\(2, 3, 8, 8\)"),
        (given(1, 8, 8, times=1), r"x .*1, H, W.*\(1, 8, 8\)"),
        (given(2, 1, 8, 7), "width.*2.*7"),
        (given(2, 1, 8, 8, times=1), r"t .*\(2,\).*\(1,\)"),
    ],
)
def test_networks_images_and_times_that_cannot_be_are_refused(call: Callable[[], Any], message: str) -> None:
    with refused(message):
        call()


# weights in diffusers' layout, without diffusers


def test_weights_go_out_and_come_back_under_their_old_names_too() -> None:
    """The arguments are read off the shapes; where attention is, off the names. Exported weights are copies."""
    network = drawn(UNet(3, 16, (1, 2, 1), 2, (8,), 16, dropout=0.2)).float()
    state, config = network.to_diffusers()
    expected = {"norm_num_groups": 4, "dropout": 0.2, "sample_size": 16, "block_out_channels": [16, 32, 16]}
    expected["down_block_types"] = ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D"]
    expected["up_block_types"] = ["UpBlock2D", "AttnUpBlock2D", "UpBlock2D"]
    assert expected.items() <= config.items()
    former = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    old = {re.sub(r"to_(\w|out\.0)\b", lambda m: former[m[0]], name): value for name, value in state.items()}
    assert sum(".query." in name for name in old) == 12 and not any(".to_" in name for name in old)
    x, t = torch.randn(1, 3, 16, 16), torch.tensor([40])
    for given in ((state, config), (old, config), (state, {**config, "sample_size": None}, 16)):
        other = UNet.from_diffusers(*given)
        assert other.to_diffusers()[1] == config
        assert torch.equal(other.eval()(x, t), network(x, t))
    network.conv_in.weight.data.zero_()
    assert bool(state["conv_in.weight"].any())


def test_without_a_config_all_is_as_in_ddpm() -> None:
    """32 groups, as its networks and diffusers' default have; no dropout; attention where its weights are."""
    network = UNet(3, 32, (1, 1, 1), 1, (16, 4), 16, dropout=0.0, groups=32)
    state, config = network.to_diffusers()
    assert UNet.from_diffusers(state, image_size=16).to_diffusers()[1] == config


def test_foreign_weights_and_settings_are_refused_by_name() -> None:
    state, config = small(base_channels=16).to_diffusers()
    no_bias, no_block = dict(state), dict(state)
    del no_bias["conv_out.bias"], no_block["down_blocks.0.resnets.0.conv1.weight"]
    learned_sigma = {"conv_out.weight": torch.zeros(2, 16, 3, 3), "conv_out.bias": torch.zeros(2)}
    for weights, message in (
        ({"fc.weight": torch.zeros(2, 2)}, "UNet2DModel.*conv_in.weight"),
        (no_bias, r"conv_out.bias.*\(1,\)"),
        ({**state, "class_embedding.weight": torch.zeros(2, 2)}, "class_embedding.weight"),
        ({**state, **learned_sigma}, r"conv_out.bias.*\(1,\).*\(2,\)"),
        (no_block, "down_blocks.0"),
    ):
        with refused(f"state_dict.*{message}"):
            UNet.from_diffusers(weights, config)
    changes = {"norm_eps": 1e-5, "freq_shift": 0, "downsample_padding": 1, "attention_head_dim": 8}
    for name, value in changes.items():
        with refused(f"config.*{name}.*{value}"):
            UNet.from_diffusers(state, {**config, name: value})
