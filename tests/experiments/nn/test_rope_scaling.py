"""Scaled rotary frequencies against closed forms in plain float64, and what a checkpoint may say of them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from experiments.nn.positions import RotaryPosEncoding
from experiments.nn.rotation import LAYOUTS, Layout
from tests.experiments.nn.helpers import F64, near, randn, refusals, refused

LINEAR = {"type": "linear", "factor": 4.0}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 8}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {**YARN, "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
SCALINGS: dict[str, dict[str, Any]] = {"linear": LINEAR, "dynamic": DYNAMIC, "yarn": YARN, "llama3": LLAMA3}


def scaled(scaling: dict[str, Any], length: int = 0, **more: Any) -> tuple[Tensor, float]:
    return RotaryPosEncoding(64, scaling={**scaling, **more}).frequencies(length)


def plain(base: float = 10000.0) -> Tensor:
    return torch.tensor([base ** (-2 * i / 64) for i in range(32)], dtype=F64)


def grown(length: int, dim: int) -> float:
    """The base of `dynamic`."""
    return 10000 * (2 * max(length, 8) / 8 - 1) ** (dim / (dim - 2))


def expect(found: tuple[Tensor, float], theta: Tensor, factor: float = 1.0) -> None:
    assert found[0].dtype == F64 and found[1] == pytest.approx(factor, rel=1e-12)
    near(found[0], theta, 0, rtol=1e-12)


def test_linear_divides_positions() -> None:
    expect(scaled(LINEAR), plain() / 4)
    x = randn(1, 1, 3, 8)
    stretched = RotaryPosEncoding(8, scaling=LINEAR)(x, torch.tensor([0, 4, 400]))
    near(stretched, RotaryPosEncoding(8)(x, torch.tensor([0, 1, 100])), 1e-12)


@pytest.mark.parametrize("length", [1, 8, 9, 40])
def test_dynamic_raises_the_base_past_the_original_length(length: int) -> None:
    expect(scaled(DYNAMIC, length), plain(grown(length, 64)))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_dynamic_depends_on_the_present_length_and_on_no_earlier_call(layout: Layout) -> None:
    rotary, x = RotaryPosEncoding(8, layout=layout, scaling=DYNAMIC), randn(1, 1, 40, 8)
    for length in (40, 8, 20, 3, 40):
        y = x[:, :, :length]
        expected = RotaryPosEncoding(8, grown(length, 8), layout)(y)
        near(rotary(y), expected, 1e-12)
        near(rotary(y, torch.arange(length)), expected, 1e-12)
        near(rotary(y[:, :, -1:], torch.tensor([length - 1])), expected[:, :, -1:], 1e-12)
    without = RotaryPosEncoding(8, layout=layout, scaling={"type": "dynamic", "factor": 2.0}, max_len=8)
    assert torch.equal(without(x), rotary(x))  # max_len is the original length unless it is given
    far, y = torch.tensor([9000]), x[:, :, :1]
    near(rotary(y, far), RotaryPosEncoding(8, grown(9001, 8), layout)(y, far), 1e-9)


def test_llama3_keeps_short_waves_and_stretches_long_ones() -> None:
    shares = ((64 / (2 * math.pi / plain()) - 1) / (4 - 1)).clamp(0, 1)
    expect(scaled(LLAMA3), (1 - shares) * plain() / 8 + shares * plain())
    assert 0 < int((shares == 1).sum()) < 31 and 0 < int((shares == 0).sum()) < 31


def test_yarn_ramps_between_pairs_that_turn_often_and_those_that_never_do() -> None:
    def pair(turns: float, length: int) -> float:
        return 64 * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(10000))

    for length in (64, 4096):
        low, high = max(math.floor(pair(32, length)), 0), min(math.ceil(pair(1, length)), 63)
        ramp = ((torch.arange(32, dtype=F64) - low) / (high - low)).clamp(0, 1)
        found = scaled(YARN, original_max_position_embeddings=length)
        expect(found, plain() * (1 - ramp) + plain() / 4 * ramp, 0.1 * math.log(4) + 1)
    theta, _ = scaled(YARN)
    near(theta[[0, -1]], plain()[[0, -1]] / torch.tensor([1, 4]), 1e-12)
    assert scaled(YARN, attention_factor=1.5)[1] == 1.5
    mscale = (0.07 * math.log(4) + 1) / (0.11 * math.log(4) + 1)
    expect(scaled(YARN, mscale=0.7, mscale_all_dim=1.1), theta, mscale)
    assert torch.equal(scaled(YARN, beta_fast=8)[0], theta)
    for other in ({"truncate": False}, {"beta_slow": 2}):
        assert not torch.equal(scaled(YARN, **other)[0], theta)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_yarn_scales_cos_and_sin(layout: Layout) -> None:
    rotary = RotaryPosEncoding(8, layout=layout, scaling={**YARN, "attention_factor": 1.5})
    x, (cos, sin) = randn(1, 2, 9, 8), rotary.tables(9)
    near(rotary(x).norm(dim=-1), 1.5 * x.norm(dim=-1), 1e-12)
    near(cos.square() + sin.square(), torch.full((9, 4), 2.25), 1e-12)


@pytest.mark.parametrize("name", SCALINGS)
def test_what_a_checkpoint_says_is_taken_as_it_is(name: str) -> None:
    given = {**SCALINGS[name], "rope_theta": 10000.0, "attention_factor": None}
    before = dict(given)
    expect(scaled(given, 20), *scaled(SCALINGS[name], 20))
    assert given == before
    assert f"scaling={name}" in repr(RotaryPosEncoding(16, scaling=given))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["linear", "yarn", "llama3"])
def test_another_device_gets_the_plain_formula_and_is_never_waited_for(layout: Layout, name: str) -> None:
    """The meta device has no values to read: what read one would raise."""
    rotary = RotaryPosEncoding(8, layout=layout, rotary_dim=6, scaling=SCALINGS[name])
    x, line = torch.empty(2, 3, 4, 8, device="meta"), torch.arange(4)
    for positions in (None, line, line.to("meta"), line.expand(2, 4).to("meta")):
        y = rotary(x, positions)
        assert y.device.type == "meta" and y.shape == x.shape


@refusals("scaling")
def test_a_scaling_that_is_wrong_is_named(call: str, message: str) -> None:
    with refused(message):
        eval(call)
