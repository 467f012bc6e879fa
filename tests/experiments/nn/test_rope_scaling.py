"""Scaled rotary frequencies against closed forms in plain float64, and what a checkpoint may say of them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from experiments.nn.positions import RotaryPosEncoding
from experiments.nn.rotation import LAYOUTS, Layout
from tests.experiments.nn.helpers import F64, near, randn, refused

LINEAR = {"type": "linear", "factor": 4.0}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 8}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {**YARN, "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
SCALINGS: dict[str, dict[str, Any]] = {"linear": LINEAR, "dynamic": DYNAMIC, "yarn": YARN, "llama3": LLAMA3}


def scaled(scaling: dict[str, Any], length: int = 0, **more: Any) -> tuple[list[float], float]:
    theta, factor = RotaryPosEncoding(64, scaling={**scaling, **more}).frequencies(length)
    assert theta.dtype == F64
    return theta.tolist(), factor


def plain(base: float = 10000.0) -> list[float]:
    return [base ** (-2 * i / 64) for i in range(32)]


def grown(length: int, dim: int) -> float:
    """The base of `dynamic`."""
    return 10000 * (2 * max(length, 8) / 8 - 1) ** (dim / (dim - 2))


def test_linear_divides_positions() -> None:
    theta, factor = scaled(LINEAR)
    assert factor == 1 and theta == pytest.approx([t / 4 for t in plain()], rel=1e-12)
    x = randn(1, 1, 3, 8)
    stretched = RotaryPosEncoding(8, scaling=LINEAR)(x, torch.tensor([0, 4, 400]))
    near(stretched, RotaryPosEncoding(8)(x, torch.tensor([0, 1, 100])), 1e-12)


@pytest.mark.parametrize("length", [1, 8, 9, 40])
def test_dynamic_raises_the_base_past_the_original_length(length: int) -> None:
    theta, factor = scaled(DYNAMIC, length)
    assert factor == 1 and theta == pytest.approx(plain(grown(length, 64)), rel=1e-12)


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
    theta, factor = scaled(LLAMA3)
    assert factor == 1
    shares = [min(max((64 / (2 * math.pi / before) - 1) / (4 - 1), 0), 1) for before in plain()]
    expected = [(1 - s) * before / 8 + s * before for s, before in zip(shares, plain(), strict=True)]
    assert theta == pytest.approx(expected, rel=1e-12)
    assert 0 < shares.count(1) < 31 and 0 < shares.count(0) < 31


def test_yarn_ramps_between_pairs_that_turn_often_and_those_that_never_do() -> None:
    def pair(turns: float, length: int) -> float:
        return 64 * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(10000))

    for length in (64, 4096):
        theta, factor = scaled(YARN, original_max_position_embeddings=length)
        assert math.isclose(factor, 0.1 * math.log(4) + 1)
        low, high = max(math.floor(pair(32, length)), 0), min(math.ceil(pair(1, length)), 63)
        ramp = [min(max((i - low) / (high - low), 0), 1) for i in range(32)]
        expected = [t * (1 - r) + t / 4 * r for r, t in zip(ramp, plain(), strict=True)]
        assert theta == pytest.approx(expected, rel=1e-12)
    theta, _ = scaled(YARN)
    assert theta[0] == 1 and math.isclose(theta[-1], plain()[-1] / 4)
    assert scaled(YARN, attention_factor=1.5)[1] == 1.5
    mscale = scaled(YARN, mscale=0.7, mscale_all_dim=1.1)[1]
    assert math.isclose(mscale, (0.07 * math.log(4) + 1) / (0.11 * math.log(4) + 1))
    assert scaled(YARN, beta_fast=8)[0] == theta
    for other in ({"truncate": False}, {"beta_slow": 2}):
        assert scaled(YARN, **other)[0] != theta


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
    assert scaled(given, 20) == scaled(SCALINGS[name], 20) and given == before
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


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        (DYNAMIC, "dynamic.*rotary_dim above 2"),
        ({"factor": 2.0}, "rope_type.*default, linear, dynamic, yarn, llama3.*None"),
        ({"rope_type": "longrope"}, "rope_type.*default.*'longrope'"),
        ({"type": "linear"}, "linear.*factor"),
        ({"type": "yarn"}, "yarn.*factor, original_max_position_embeddings"),
        ({"type": "linear", "factor": 2, "beta_fast": 3}, "linear.*beta_fast.*rope_type, factor"),
        ({**LLAMA3, "lo_freq_factor": 1}, "llama3.*lo_freq_factor.*rope_type, factor, high_freq_factor, l"),
        ({"type": "linear", "factor": 0.5}, "factor.*1.*0.5"),
        ({"type": "linear", "factor": "2"}, "factor.*1.*'2'"),
        ({"type": "linear", "factor": True}, "factor.*1.*True"),
        ({"type": "linear", "factor": math.inf}, "factor.*1.*inf"),
        ({**YARN, "beta_fast": -1}, "beta_fast.*0.*-1"),
        ({**YARN, "truncate": "no"}, "truncate.*true or false.*'no'"),
        ({**LLAMA3, "high_freq_factor": 1.0}, r"high_freq_factor.*1\.0.*low_freq_factor.*1\.0"),
        ({"type": "linear", "factor": 2, "rope_theta": 5e5}, r"rope_theta.*500000\.0.*10000\.0"),
    ],
    ids=str,
)
def test_a_scaling_that_is_wrong_is_named(scaling: dict[str, Any], message: str) -> None:
    with refused(message):
        RotaryPosEncoding(2 if scaling is DYNAMIC else 4, scaling=scaling)
