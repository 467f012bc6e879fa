"""The U-Net by its count of parameters, its zeros at the start, a plain copy of its formulas, and what it refuses."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.nn.diffusion import GaussianDiffusion
from experiments.nn.dropout import Dropout
from experiments.nn.unet import FEW_PIXELS, SelfAttention, UNet, attend, sinusoids
from tests.experiments.nn.helpers import F64, drawn, near, randn, refused

SMALL: dict[str, Any] = {
    "in_channels": 1,
    "base_channels": 32,
    "channel_mult": (1, 2),
    "num_res_blocks": 1,
    "attention_resolutions": (4,),
    "image_size": 8,
}
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
    norms = [module for module in network.modules() if isinstance(module, nn.GroupNorm)]
    assert {(norm.num_groups, norm.eps) for norm in norms} == {(32, 1e-6)}


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
    """Its loss is 1 at first; a few steps against the gradient's signs halve it."""
    network, diffusion = small(base_channels=16, dropout=0.0), GaussianDiffusion()
    x_0, noise = torch.rand(4, 1, 8, 8) * 2 - 1, torch.randn(4, 1, 8, 8)
    t, losses = torch.tensor([100, 300, 600, 900]), []
    assert not network(x_0, t).any()
    for _ in range(10):
        loss = diffusion.loss_simple(network, x_0, t, noise).mean()
        losses.append(float(loss.detach()))
        network.zero_grad()
        loss.backward()
        for parameter in network.parameters():
            parameter.data.sub_(5e-3 * parameter.grad.sign())
    assert losses[0] == pytest.approx(float(noise.square().mean()))
    assert losses[-1] < losses[0] / 2


def test_every_weight_is_used() -> None:
    """Once the zeros have gone, a gradient reaches every entry of every parameter's tensor."""
    network = drawn(small())
    network(randn(2, 1, 8, 8), TIMES).square().sum().backward()
    unused = [name for name, w in network.named_parameters() if w.grad is None or not w.grad.any()]
    assert all(name.endswith("to_k.bias") for name in unused)  # the softmax does not see that one


def test_groups_have_four_channels_or_more() -> None:
    groups = {128: 32, 256: 32, 64: 16, 32: 8, 48: 12, 30: 6, 4: 1}
    for channels, expected in groups.items():
        with torch.device("meta"):
            network = small(base_channels=channels)
        norms = [module for module in network.modules() if isinstance(module, nn.GroupNorm)]
        assert {norm.num_groups for norm in norms} == {expected}


def test_every_block_sees_the_time() -> None:
    """With one channel to a group none of it would be left behind the second normalisation."""
    for groups, sees in ((None, True), (32, False)):
        block, x = drawn(small(groups=groups)).down_blocks[0].resnets[0], randn(1, 32, 4, 4)
        early, late = (block(x, randn(1, 128)) for _ in range(2))
        assert torch.allclose(early, late, atol=1e-4) != sees


# its formulas once more


def test_time_embedding_is_sines_beside_cosines() -> None:
    """sin(t f_i) then cos(t f_i), f_i = 10000^(−i / (C/2 − 1)); in bfloat16, which has no 999, as in float32."""
    channels, half, times = 32, 16, torch.tensor([0, 1, 999])
    angles = [[t * 10000 ** (-i / (half - 1)) for i in range(half)] for t in times.tolist()]
    expected = torch.tensor([[*map(math.sin, row), *map(math.cos, row)] for row in angles], dtype=F64)
    near(sinusoids(times, channels, F64), expected)
    for dtype in (torch.float32, torch.bfloat16):
        found = sinusoids(times, channels, dtype)
        assert found.dtype == torch.float32
        near(found, expected, 1e-4)


def test_attention_of_few_pixels_and_of_many() -> None:
    for pixels in (FEW_PIXELS, FEW_PIXELS + 1):
        q, k, v = (randn(1, pixels, 4) for _ in range(3))
        shares = (q[0] @ k[0].t() / 2).exp()
        near(attend(q, k, v)[0], shares @ v[0] / shares.sum(1, keepdim=True), 1e-12)


def plain(p: dict[str, Tensor], x: Tensor, t: Tensor, groups: int) -> Tensor:
    """The whole U-Net once more, from a dict of weights."""
    half = p["conv_in.weight"].shape[0] // 2

    def conv(name: str, h: Tensor, stride: int = 1, pad: tuple[int, ...] = (1, 1, 1, 1)) -> Tensor:
        return F.conv2d(F.pad(h, pad), p[f"{name}.weight"], p[f"{name}.bias"], stride)

    def linear(name: str, h: Tensor) -> Tensor:
        return h @ p[f"{name}.weight"].t() + p[f"{name}.bias"]

    def norm(name: str, h: Tensor) -> Tensor:
        parts = h.reshape(len(h), groups, -1)
        parts = (parts - parts.mean(2, True)) / (parts.var(2, correction=0, keepdim=True) + 1e-6).sqrt()
        return parts.view_as(h) * p[f"{name}.weight"][:, None, None] + p[f"{name}.bias"][:, None, None]

    def swish(h: Tensor) -> Tensor:
        return h * h.sigmoid()

    def block(name: str, x: Tensor) -> Tensor:
        h = conv(f"{name}.conv1", swish(norm(f"{name}.norm1", x)))
        h = h + linear(f"{name}.time_emb_proj", swish(e))[:, :, None, None]
        h = conv(f"{name}.conv2", swish(norm(f"{name}.norm2", h)))
        short = f"{name}.conv_shortcut"
        return h + (conv(short, x, pad=(0, 0, 0, 0)) if f"{short}.weight" in p else x)

    def attention(name: str, x: Tensor) -> Tensor:
        n = norm(f"{name}.group_norm", x).flatten(2).mT
        q, k, v = (linear(f"{name}.to_{letter}", n) for letter in "qkv")
        h = linear(f"{name}.to_out.0", (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1) @ v)
        return x + h.mT.reshape(x.shape)

    def step(level: str, number: int, h: Tensor) -> Tensor:
        h = block(f"{level}.resnets.{number}", h)
        name = f"{level}.attentions.{number}"
        return attention(name, h) if f"{name}.to_q.weight" in p else h

    def blocks(level: str) -> range:
        return range(sum(f"{level}.resnets.{number}.conv1.weight" in p for number in range(9)))

    # time
    angles = t.double()[:, None] * torch.tensor([10000 ** (-i / (half - 1)) for i in range(half)], dtype=F64)
    e = linear("time_embedding.linear_1", torch.cat((angles.sin(), angles.cos()), 1))
    e = linear("time_embedding.linear_2", swish(e))

    # down, the middle, and up
    h = conv("conv_in", x)
    skips, levels = [h], sum(f"down_blocks.{level}.resnets.0.conv1.weight" in p for level in range(9))
    for name in (f"down_blocks.{level}" for level in range(levels)):
        for number in blocks(name):
            h = step(name, number, h)
            skips.append(h)
        if f"{name}.downsamplers.0.conv.weight" in p:  # a pixel sees those from its own place on
            h = conv(f"{name}.downsamplers.0.conv", h, 2, (0, 1, 0, 1))
            skips.append(h)
    h = block("mid_block.resnets.1", step("mid_block", 0, h))
    for name in (f"up_blocks.{level}" for level in range(levels)):
        for number in blocks(name):
            h = step(name, number, torch.cat((h, skips.pop()), 1))
        if f"{name}.upsamplers.0.conv.weight" in p:
            h = conv(f"{name}.upsamplers.0.conv", h.repeat_interleave(2, 2).repeat_interleave(2, 3))
    return conv("conv_out", swish(norm("conv_norm_out", h)))


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
@torch.no_grad()
def test_it_is_a_plain_copy_of_its_formulas(arguments: dict[str, Any], size: tuple[int, int]) -> None:
    """Images of any size that its levels can halve; dim ones too, so that ε in the norm shows."""
    network = drawn(small(**{"base_channels": 16, **arguments}))
    x = randn(2, network.in_channels, *size)
    for _ in range(2):
        near(network(x, TIMES), plain(network.state_dict(), x, TIMES, network.groups), 1e-7, rtol=1e-7)
        network.conv_in.weight.mul_(1e-3)
        network.conv_in.bias.mul_(1e-3)


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
    network, x = drawn(small()).float(), torch.randn(2, 1, 8, 8)
    expected = network(x, TIMES)
    last = network.to(memory_format=torch.channels_last)
    near(last(x.to(memory_format=torch.channels_last), TIMES), expected, 1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        rough = network(x, TIMES).float()
    assert float(((rough - expected).std() / expected.std()).detach()) < 0.05
    assert network.bfloat16()(x.bfloat16(), torch.tensor([999, 3])).dtype == torch.bfloat16


# what is refused


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"in_channels": 0}, "in_channels.*1.*0"),
        ({"base_channels": 33}, "base_channels.*4.*33"),
        ({"base_channels": 0}, "base_channels.*4.*0"),
        ({"groups": 12}, "groups.*32.*12"),
        ({"groups": 0}, "groups.*32.*0"),
        ({"channel_mult": ()}, r"channel_mult.*\[\]"),
        ({"channel_mult": (1, 0)}, r"channel_mult.*\[1, 0\]"),
        ({"channel_mult": (2, 2)}, r"channel_mult.*\[2, 2\]"),
        ({"num_res_blocks": 0}, "num_res_blocks.*1.*0"),
        ({"dropout": 1.0}, r"dropout.*1\.0"),
        ({"image_size": 9}, "image_size.*2.*2 levels.*9"),
        ({"image_size": 0}, "image_size.*2.*2 levels.*0"),
        ({"attention_resolutions": (4, 16)}, r"attention_resolutions.*\[8, 4\].*\[4, 16\]"),
    ],
    ids=str,
)
def test_a_network_that_cannot_be_is_refused(arguments: dict[str, Any], message: str) -> None:
    with refused(message):
        small(**arguments)


def test_images_and_times_that_do_not_fit_are_refused() -> None:
    for shape, times, message in (
        ((2, 3, 8, 8), 2, r"x .*1, H, W.*\(2, 3, 8, 8\)"),
        ((1, 8, 8), 1, r"x .*1, H, W.*\(1, 8, 8\)"),
        ((2, 1, 8, 7), 2, r"x .*2.*\(8, 7\)"),
        ((2, 1, 8, 8), 1, r"t .*\(2,\).*\(1,\)"),
    ):
        with refused(message):
            small()(torch.zeros(shape), torch.zeros(times, dtype=torch.int64))


# weights in diffusers' layout, without diffusers


def test_weights_go_out_and_come_back_under_their_old_names_too() -> None:
    """The arguments are read off the shapes; where attention is, off the names. Exported weights are copies."""
    network = drawn(UNet(3, 16, (1, 2, 1), 2, (8,), 16, dropout=0.2)).float()
    state, config = network.to_diffusers()
    expected = {"norm_num_groups": 4, "dropout": 0.2, "sample_size": 16, "block_out_channels": [16, 32, 16]}
    expected["down_block_types"] = ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D"]
    expected["up_block_types"] = ["UpBlock2D", "AttnUpBlock2D", "UpBlock2D"]
    assert expected.items() <= config.items()
    old = {}
    for name, value in state.items():
        for new, former in (("q", "query"), ("k", "key"), ("v", "value"), ("out.0", "proj_attn")):
            name = name.replace(f".to_{new}.", f".{former}.")
        old[name] = value
    assert any(".query." in name for name in old) and not any(".to_" in name for name in old)
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

    def without(name: str) -> dict[str, Tensor]:
        return {key: value for key, value in state.items() if key != name}

    learned_sigma = {"conv_out.weight": torch.zeros(2, 16, 3, 3), "conv_out.bias": torch.zeros(2)}
    for weights, message in (
        ({"fc.weight": torch.zeros(2, 2)}, "UNet2DModel.*conv_in.weight"),
        (without("conv_out.bias"), r"conv_out.bias.*\(1,\)"),
        ({**state, "class_embedding.weight": torch.zeros(2, 2)}, "class_embedding.weight"),
        ({**state, **learned_sigma}, r"conv_out.bias.*\(1,\).*\(2,\)"),
        (without("down_blocks.0.resnets.0.conv1.weight"), "down_blocks.0"),
    ):
        with refused(f"state_dict.*{message}"):
            UNet.from_diffusers(weights, config)
    changes = {"norm_eps": 1e-5, "freq_shift": 0, "downsample_padding": 1, "attention_head_dim": 8}
    for name, value in {**changes, "flip_sin_to_cos": True}.items():
        with refused(f"config.*{name}.*{value}"):
            UNet.from_diffusers(state, {**config, name: value})
