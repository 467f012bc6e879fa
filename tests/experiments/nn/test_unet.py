"""The U-Net by its count of parameters, its zeros at the start, a plain copy of its formulas, and what it refuses."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.nn.diffusion import GaussianDiffusion
from experiments.nn.dropout import Dropout
from experiments.nn.unet import (
    FEW_PIXELS,
    Common,
    Downsample,
    ResidualBlock,
    SelfAttention,
    UNet,
    Upsample,
    attend,
    sinusoids,
)

F64 = torch.float64
SMALL: dict[str, Any] = {
    "in_channels": 1,
    "base_channels": 32,
    "channel_mult": (1, 2),
    "num_res_blocks": 1,
    "attention_resolutions": (4,),
    "image_size": 8,
}


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def small(**more: Any) -> UNet:
    return UNet(**{**SMALL, **more})


def drawn(module: nn.Module) -> nn.Module:
    """Every weight anew, so that nothing is zero or one; in eval mode and float64."""
    module.double().eval()
    with torch.no_grad():
        for parameter in module.parameters():
            fan = parameter[0].numel() if parameter.ndim > 1 else 4
            parameter.normal_(std=fan**-0.5)
    return module


# the paper's network


def test_with_no_arguments_it_is_the_papers_network() -> None:
    """35,746,307 parameters; attention behind every block at 16×16, in the middle, and nowhere else."""
    with torch.device("meta"):
        network = UNet()
    assert sum(parameter.numel() for parameter in network.parameters()) == 35_746_307
    attention = {name for name, module in network.named_modules() if isinstance(module, SelfAttention)}
    assert attention == {
        *(f"down_blocks.1.attentions.{number}" for number in range(2)),
        *(f"up_blocks.2.attentions.{number}" for number in range(3)),
        "mid_block.attentions.0",
    }
    assert {module.p for module in network.modules() if isinstance(module, Dropout)} == {0.1}
    norms = [module for module in network.modules() if isinstance(module, nn.GroupNorm)]
    assert {(norm.num_groups, norm.eps) for norm in norms} == {(32, 1e-6)}


def test_untrained_it_says_zero_and_its_loss_is_one() -> None:
    network, diffusion = small(), GaussianDiffusion()
    x_0, noise = torch.rand(8, 1, 8, 8) * 2 - 1, torch.randn(8, 1, 8, 8)
    t = torch.randint(0, 1000, (8,))
    assert not network(x_0, t).any()
    loss = diffusion.loss_simple(network, x_0, t, noise)
    assert torch.allclose(loss, noise.square().mean((1, 2, 3)))
    assert float(loss.mean().detach()) == pytest.approx(1, abs=0.2)


def test_weights_start_xavier_uniform_and_branches_at_zero() -> None:
    """Uniform up to √(6 / (fan in + fan out)), biases zero; a block or an attention starts as the identity."""
    network = small()
    zero = {"conv_out.weight"}
    for name, module in network.named_modules():
        if isinstance(module, ResidualBlock):
            zero.add(f"{name}.conv2.weight")
        elif isinstance(module, SelfAttention):
            zero.add(f"{name}.to_out.0.weight")
    for name, weight in network.named_parameters():
        weight = weight.detach()
        if name in zero or name.endswith("bias"):
            assert not weight.any(), name
        elif weight.ndim > 1:
            area = weight[0, 0].numel()
            bound = math.sqrt(6 / (area * (weight.shape[0] + weight.shape[1])))
            assert float(weight.abs().max()) <= bound and float(weight.abs().max()) > 0.9 * bound, name
            assert float(weight.std()) == pytest.approx(bound / math.sqrt(3), rel=0.1), name
    x = torch.randn(2, 32, 4, 4)
    block = network.down_blocks[0].resnets[0]
    assert torch.equal(block(x, torch.randn(2, 128)), x)
    assert torch.equal(network.mid_block.attentions[0](x.repeat(1, 2, 1, 1)), x.repeat(1, 2, 1, 1))


def test_every_weight_is_used() -> None:
    """Once the zeros have gone, a gradient reaches every entry of every parameter's tensor."""
    network = drawn(small())
    network(torch.randn(2, 1, 8, 8, dtype=F64), torch.tensor([3, 700])).square().sum().backward()
    unused = [
        name for name, weight in network.named_parameters() if weight.grad is None or not weight.grad.any()
    ]
    assert all(name.endswith("to_k.bias") for name in unused)  # the softmax does not see that one


@pytest.mark.parametrize(
    ("channels", "groups"), [(128, 32), (256, 32), (64, 16), (32, 8), (48, 12), (30, 6), (4, 1)]
)
def test_groups_have_four_channels_or_more(channels: int, groups: int) -> None:
    with torch.device("meta"):
        network = small(base_channels=channels)
    assert {norm.num_groups for norm in network.modules() if isinstance(norm, nn.GroupNorm)} == {groups}


def test_every_block_sees_the_time() -> None:
    """With one channel to a group none of it would be left behind the second normalisation."""
    network, blind = drawn(small()), drawn(small(groups=32))
    for one, sees in ((network, True), (blind, False)):
        block, x = one.down_blocks[0].resnets[0], torch.randn(1, 32, 4, 4, dtype=F64)
        early, late = (block(x, torch.randn(1, 128, dtype=F64)) for _ in range(2))
        assert torch.allclose(early, late, atol=1e-4) != sees


# each formula once more, by itself


@pytest.mark.parametrize("channels", [32, 128])
def test_time_embedding_is_sines_beside_cosines(channels: int) -> None:
    """sin(t f_i) then cos(t f_i), f_i = 10000^(−i / (C/2 − 1)): the last frequency is 1/10000."""
    half = channels // 2
    found = sinusoids(torch.tensor([0, 1, 999]), channels, F64)
    for row, t in enumerate((0, 1, 999)):
        angles = [t * 10000 ** (-i / (half - 1)) for i in range(half)]
        wanted = [math.sin(angle) for angle in angles] + [math.cos(angle) for angle in angles]
        assert found[row].tolist() == pytest.approx(wanted, abs=1e-10)
    assert torch.allclose(sinusoids(torch.tensor([0, 1, 999]), channels).double(), found, atol=1e-4)


def test_time_survives_half_precision() -> None:
    """In bfloat16 there is no 999: it would be 1000, and angles would be off by more than a turn."""
    found = sinusoids(torch.tensor([999]), 128, torch.bfloat16)
    assert found.dtype == torch.float32
    assert torch.allclose(found, sinusoids(torch.tensor([999]), 128))
    network = small().bfloat16()
    assert network(torch.zeros(1, 1, 8, 8, dtype=torch.bfloat16), torch.tensor([999])).dtype == torch.bfloat16


@pytest.mark.parametrize("out_channels", [32, 64])
def test_residual_block(out_channels: int) -> None:
    """norm, swish, convolution, the time's share, norm, swish, convolution; and what came in is added."""
    block = ResidualBlock(32, out_channels, Common(16, 8, dropout=0.5))
    drawn(block)
    x, e = torch.randn(2, 32, 5, 6, dtype=F64), torch.randn(2, 16, dtype=F64)

    def norm(h: Tensor, layer: nn.GroupNorm) -> Tensor:
        groups = h.reshape(2, 8, -1)
        centred = groups - groups.mean(-1, keepdim=True)
        scaled = centred / (groups.var(-1, correction=0, keepdim=True) + 1e-6).sqrt()
        return scaled.view_as(h) * layer.weight[:, None, None] + layer.bias[:, None, None]

    def swish(h: Tensor) -> Tensor:
        return h / (1 + (-h).exp())

    h = F.conv2d(F.pad(swish(norm(x, block.norm1)), (1, 1, 1, 1)), block.conv1.weight, block.conv1.bias)
    h = h + (e @ block.time_emb_proj.weight.t() + block.time_emb_proj.bias)[:, :, None, None]
    h = F.conv2d(F.pad(swish(norm(h, block.norm2)), (1, 1, 1, 1)), block.conv2.weight, block.conv2.bias)
    assert (block.conv_shortcut is None) == (out_channels == 32)
    shortcut = x
    if block.conv_shortcut is not None:
        shortcut = torch.einsum("oc,bchw->bohw", block.conv_shortcut.weight[:, :, 0, 0], x)
        shortcut = shortcut + block.conv_shortcut.bias[:, None, None]
    assert torch.allclose(block(x, e), h + shortcut, atol=1e-10)


def test_dropout_is_in_training_alone() -> None:
    block = ResidualBlock(32, 32, Common(16, 8, dropout=0.5))
    drawn(block)
    x, e = torch.randn(2, 32, 4, 4, dtype=F64), torch.randn(2, 16, dtype=F64)
    assert torch.equal(block(x, e), block(x, e))
    block.train()
    assert not torch.equal(block(x, e), block(x, e))


def test_attention_pixel_by_pixel() -> None:
    """softmax(q·k / √C) with one head over all pixels, and what came in is added."""
    attention = SelfAttention(64, groups=16)
    drawn(attention)
    x = torch.randn(2, 64, 3, 5, dtype=F64)
    n = F.group_norm(x, 16, attention.group_norm.weight, attention.group_norm.bias, 1e-6)
    q, k, v = (
        torch.einsum("oc,bchw->bohw", layer.weight, n) + layer.bias[:, None, None]
        for layer in (attention.to_q, attention.to_k, attention.to_v)
    )
    weights = torch.einsum("bcij,bchw->bijhw", q, k).div(8).flatten(3).softmax(3).view(2, 3, 5, 3, 5)
    mixed = torch.einsum("bijhw,bchw->bcij", weights, v)
    out = attention.to_out[0]
    wanted = x + torch.einsum("oc,bchw->bohw", out.weight, mixed) + out.bias[:, None, None]
    assert torch.allclose(attention(x), wanted, atol=1e-10)


@pytest.mark.parametrize("pixels", [FEW_PIXELS, FEW_PIXELS + 1])
def test_attention_of_few_pixels_and_of_many(pixels: int) -> None:
    q, k, v = (torch.randn(1, pixels, 4, dtype=F64) for _ in range(3))
    shares = torch.einsum("qc,kc->qk", q[0], k[0]).div(2).exp()
    wanted = torch.einsum("qk,kc->qc", shares, v[0]) / shares.sum(1)[:, None]
    assert torch.allclose(attend(q, k, v)[0], wanted, atol=1e-12)


def test_downsample_pads_on_the_right_and_below_alone() -> None:
    """A pixel of the output sees the 3×3 pixels from its own place on (TensorFlow's SAME)."""
    layer = Downsample(1).double()
    with torch.no_grad():
        layer.conv.weight.copy_(torch.arange(1.0, 10).view(1, 1, 3, 3))
        layer.conv.bias.zero_()
    x = torch.randn(1, 1, 4, 6, dtype=F64)
    wanted = torch.zeros(2, 3, dtype=F64)
    for i in range(2):
        for j in range(3):
            for a in range(3):
                for b in range(3):
                    if 2 * i + a < 4 and 2 * j + b < 6:
                        wanted[i, j] += (3 * a + b + 1) * x[0, 0, 2 * i + a, 2 * j + b]
    assert torch.allclose(layer(x)[0, 0], wanted)


def test_upsample_repeats_pixels() -> None:
    layer = Upsample(1)
    with torch.no_grad():
        layer.conv.weight.zero_()[0, 0, 1, 1] = 1  # the identity
        layer.conv.bias.zero_()
    x = torch.randn(1, 1, 3, 4)
    assert torch.equal(layer(x), x.repeat_interleave(2, 2).repeat_interleave(2, 3))


# the whole


@pytest.mark.parametrize(
    ("arguments", "size"),
    [
        ({}, (8, 8)),
        ({}, (12, 20)),
        ({"in_channels": 3, "channel_mult": (1, 2, 3), "num_res_blocks": 2}, (8, 4)),
        ({"channel_mult": (1,), "attention_resolutions": ()}, (5, 7)),
        ({"channel_mult": (1, 1), "attention_resolutions": (8, 4)}, (8, 8)),
    ],
    ids=str,
)
def test_it_gives_noise_like_the_image(arguments: dict[str, Any], size: tuple[int, int]) -> None:
    """Of any size that its levels can halve, with any number of channels."""
    network = drawn(small(**arguments))
    x = torch.randn(2, arguments.get("in_channels", 1), *size, dtype=F64)
    eps = network(x, torch.tensor([0, 999]))
    assert eps.shape == x.shape and bool(eps.isfinite().all())
    alone = network(x[1:], torch.tensor([999]))
    assert torch.allclose(eps[1:], alone, atol=1e-10)
    assert not torch.allclose(alone, network(x[1:], torch.tensor([500])))


def test_memory_format_and_autocast_change_nothing_but_rounding() -> None:
    network = drawn(small()).float()
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([3, 700])
    wanted = network(x, t)
    last = network.to(memory_format=torch.channels_last)
    assert torch.allclose(last(x.to(memory_format=torch.channels_last), t), wanted, atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        rough = network(x, t).float()
    assert float(((rough - wanted).std() / wanted.std()).detach()) < 0.05


def test_it_learns_one_batch() -> None:
    """A few steps of Adam: the loss on fixed noise falls to less than a half."""
    network, diffusion = small(dropout=0.0), GaussianDiffusion()
    x_0, noise = torch.rand(4, 1, 8, 8) * 2 - 1, torch.randn(4, 1, 8, 8)
    t = torch.tensor([100, 300, 600, 900])
    optimizer, losses = torch.optim.Adam(network.parameters(), 2e-3), []
    for _ in range(20):
        loss = diffusion.loss_simple(network, x_0, t, noise).mean()
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0] / 2


# what is refused


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"in_channels": 0}, "in_channels must be at least 1, not 0"),
        ({"base_channels": 33}, "base_channels must be an even number of at least 4, not 33"),
        ({"base_channels": 0}, "base_channels must be an even number of at least 4, not 0"),
        ({"groups": 12}, "groups must divide base_channels, 32, not be 12"),
        ({"groups": 0}, "groups must divide base_channels, 32, not be 0"),
        ({"channel_mult": ()}, r"channel_mult must be 1 and then a number of at least 1 per level, not \[\]"),
        (
            {"channel_mult": (1, 0)},
            r"channel_mult must be 1 and then a number of at least 1 per level, not \[1, 0\]",
        ),
        ({"channel_mult": (2, 2)}, r"channel_mult must be 1 and then .*, not \[2, 2\]"),
        ({"num_res_blocks": 0}, "num_res_blocks must be at least 1, not 0"),
        ({"dropout": 1.0}, r"dropout must lie in \[0, 1\), not 1.0"),
        ({"image_size": 9}, "image_size must be divisible by 2, for 2 levels, not 9"),
        ({"image_size": 0}, "image_size must be divisible by 2, for 2 levels, not 0"),
        (
            {"attention_resolutions": (4, 16)},
            r"attention_resolutions must be among \[8, 4\], the levels' heights, not \[4, 16\]",
        ),
    ],
    ids=str,
)
def test_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        small(**arguments)


@pytest.mark.parametrize(
    ("shape", "times", "message"),
    [
        ((2, 3, 8, 8), 2, r"x must be \(B, 1, H, W\), not \(2, 3, 8, 8\)"),
        ((1, 8, 8), 1, r"x must be \(B, 1, H, W\), not \(1, 8, 8\)"),
        ((2, 1, 8, 7), 2, r"x must have a height and width divisible by 2, not \(8, 7\)"),
        ((2, 1, 8, 8), 1, r"t must have one entry per image, \(2,\), not \(1,\)"),
    ],
    ids=str,
)
def test_inputs_that_do_not_fit(shape: tuple[int, ...], times: int, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        small()(torch.zeros(shape), torch.zeros(times, dtype=torch.int64))


# weights in diffusers' layout, without diffusers


def test_weights_go_out_and_come_back() -> None:
    """The arguments are read off the shapes; where attention is, off the names."""
    network = UNet(3, 32, (1, 2, 1), 2, (8,), 16, dropout=0.0)
    drawn(network).float()
    state, config = network.to_diffusers()
    x, t = torch.randn(1, 3, 16, 16), torch.tensor([40])
    for found in (
        UNet.from_diffusers(state, config),
        UNet.from_diffusers(state, {**config, "sample_size": None}, 16),
    ):
        assert found.to_diffusers()[1] == config
        assert torch.equal(found.eval()(x, t), network(x, t))


def test_without_a_config_all_is_as_in_ddpm() -> None:
    """32 groups, as its networks and diffusers' default have; no dropout; attention where its weights are."""
    network = UNet(3, 64, (1, 1, 1), 1, (16, 4), 16, dropout=0.0, groups=32)
    state, config = network.to_diffusers()
    assert UNet.from_diffusers(state, image_size=16).to_diffusers()[1] == config


def test_the_dropout_of_a_config_is_taken() -> None:
    state, config = small(dropout=0.3).to_diffusers()
    network = UNet.from_diffusers(state, config)
    assert {module.p for module in network.modules() if isinstance(module, Dropout)} == {0.3}


def test_names_of_old_checkpoints_are_understood() -> None:
    network = small()
    drawn(network).float()
    state, config = network.to_diffusers()
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = {}
    for name, value in state.items():
        for new, former in old.items():
            name = name.replace(f".{new}.", f".{former}.")
        renamed[name] = value
    assert any(".query." in name for name in renamed) and not any("to_out" in name for name in renamed)
    x, t = torch.randn(1, 1, 8, 8), torch.tensor([40])
    assert torch.equal(UNet.from_diffusers(renamed, config).eval()(x, t), network(x, t))


def test_exported_weights_are_copies_on_the_cpu() -> None:
    network = small()
    state, _ = network.to_diffusers()
    with torch.no_grad():
        network.conv_in.weight.zero_()
    assert bool(state["conv_in.weight"].any())


def without(state: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key: value for key, value in state.items() if key != name}


def test_foreign_weights_are_refused() -> None:
    state, config = small().to_diffusers()
    with pytest.raises(
        ValueError, match=r"state_dict must be that of a UNet2DModel: it has no conv_in.weight"
    ):
        UNet.from_diffusers({"fc.weight": torch.zeros(2, 2)})
    with pytest.raises(ValueError, match=r"state_dict has no conv_out.bias, \(1,\)"):
        UNet.from_diffusers(without(state, "conv_out.bias"), config)
    with pytest.raises(ValueError, match=r"state_dict has a class_embedding.weight for which"):
        UNet.from_diffusers({**state, "class_embedding.weight": torch.zeros(2, 2)}, config)
    learned_sigma = {**state, "conv_out.weight": torch.zeros(2, 32, 3, 3), "conv_out.bias": torch.zeros(2)}
    with pytest.raises(ValueError, match=r"state_dict: conv_out.bias must be \(1,\), not \(2,\)"):
        UNet.from_diffusers(learned_sigma, config)
    with pytest.raises(ValueError, match=r"state_dict has no down_blocks.0"):
        UNet.from_diffusers(without(state, "down_blocks.0.resnets.0.conv1.weight"), config)


@pytest.mark.parametrize(
    ("name", "value"),
    [("norm_eps", 1e-5), ("freq_shift", 0), ("downsample_padding", 1), ("attention_head_dim", 8)],
)
def test_settings_that_no_shape_shows_are_refused_by_name(name: str, value: Any) -> None:
    state, config = small().to_diffusers()
    with pytest.raises(ValueError, match=f"config: {name} must be .*, as in DDPM, not {value}"):
        UNet.from_diffusers(state, {**config, name: value})
