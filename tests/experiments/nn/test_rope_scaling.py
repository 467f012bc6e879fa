"""Scaled rotary frequencies against closed forms in plain float64, and what a checkpoint may say of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from experiments.nn.positions import RotaryPosEncoding
from experiments.nn.rotation import LAYOUTS, Layout

F64 = torch.float64
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
SCALINGS: dict[str, dict[str, Any]] = {
    "linear": {"type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 8},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    "llama3": LLAMA3,
}


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def error(found: Tensor, wanted: Tensor) -> float:
    assert found.shape == wanted.shape
    return float((found.detach().double() - wanted.detach().double()).abs().max())


def scaled(name: str, length: int = 0, dim: int = 64, **more: Any) -> tuple[list[float], float]:
    theta, factor = RotaryPosEncoding(dim, scaling={**SCALINGS[name], **more}).frequencies(length)
    assert theta.dtype == F64
    return theta.tolist(), factor


def plain(dim: int = 64, base: float = 10000.0) -> list[float]:
    return [base ** (-2 * i / dim) for i in range(dim // 2)]


def close(found: list[float], wanted: list[float]) -> bool:
    return len(found) == len(wanted) and all(
        math.isclose(a, b, rel_tol=1e-12) for a, b in zip(found, wanted, strict=True)
    )


def test_linear_divides_positions() -> None:
    theta, factor = scaled("linear")
    assert factor == 1 and close(theta, [t / 4 for t in plain()])
    x = torch.randn(1, 1, 3, 8, dtype=F64)
    stretched = RotaryPosEncoding(8, scaling=SCALINGS["linear"])(x, torch.tensor([0, 4, 400]))
    assert error(stretched, RotaryPosEncoding(8)(x, torch.tensor([0, 1, 100]))) < 1e-12


@pytest.mark.parametrize("length", [1, 8, 9, 40])
def test_dynamic_raises_the_base_past_the_original_length(length: int) -> None:
    base = 10000 * (2 * max(length, 8) / 8 - 1) ** (64 / 62)
    theta, factor = scaled("dynamic", length)
    assert factor == 1 and close(theta, plain(base=base))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_dynamic_depends_on_the_present_length_and_on_no_earlier_call(layout: Layout) -> None:
    rotary = RotaryPosEncoding(8, layout=layout, scaling=SCALINGS["dynamic"])
    plain_rotary = RotaryPosEncoding(8, layout=layout)
    x = torch.randn(1, 1, 40, 8, dtype=F64)
    for length in (40, 8, 20, 3, 40):
        y = x[:, :, :length]
        base = 10000 * (2 * max(length, 8) / 8 - 1) ** (8 / 6)
        wanted = RotaryPosEncoding(8, base, layout)(y)
        assert error(rotary(y), wanted) < 1e-12
        assert error(rotary(y, torch.arange(length)), wanted) < 1e-12
        assert error(rotary(y[:, :, -1:], torch.tensor([length - 1])), wanted[:, :, -1:]) < 1e-12
    assert error(rotary(x), plain_rotary(x)) > 0.01
    without = RotaryPosEncoding(8, layout=layout, scaling={"type": "dynamic", "factor": 2.0}, max_len=8)
    assert torch.equal(without(x), rotary(x))  # max_len is the original length unless it is given
    far = torch.tensor([9000])
    base = 10000 * (2 * 9001 / 8 - 1) ** (8 / 6)
    assert error(rotary(x[:, :, :1], far), RotaryPosEncoding(8, base, layout)(x[:, :, :1], far)) < 1e-9


def test_llama3_keeps_short_waves_and_stretches_long_ones() -> None:
    theta, factor = scaled("llama3")
    assert factor == 1
    for found, before in zip(theta, plain(), strict=True):
        wave = 2 * math.pi / before
        if wave < 64 / 4:
            assert math.isclose(found, before)
        elif wave > 64 / 1:
            assert math.isclose(found, before / 8)
        else:
            smooth = (64 / wave - 1) / (4 - 1)
            assert math.isclose(found, (1 - smooth) * before / 8 + smooth * before)
    assert sum(a == b for a, b in zip(theta, plain(), strict=True)) in range(1, 31)


def test_yarn_ramps_between_pairs_that_turn_often_and_those_that_never_do() -> None:
    theta, factor = scaled("yarn")
    assert math.isclose(factor, 0.1 * math.log(4) + 1)

    def pair(turns: float) -> float:
        return 64 * math.log(64 / (turns * 2 * math.pi)) / (2 * math.log(10000))

    low, high = max(math.floor(pair(32)), 0), min(math.ceil(pair(1)), 63)
    for i, (found, before) in enumerate(zip(theta, plain(), strict=True)):
        stretched = min(max((i - low) / (high - low), 0), 1)
        assert math.isclose(found, before * (1 - stretched) + before / 4 * stretched)
    assert theta[0] == 1 and math.isclose(theta[-1], plain()[-1] / 4)
    assert scaled("yarn", attention_factor=1.5)[1] == 1.5
    mscale = scaled("yarn", mscale=0.7, mscale_all_dim=1.1)[1]
    assert math.isclose(mscale, (0.07 * math.log(4) + 1) / (0.11 * math.log(4) + 1))
    assert scaled("yarn", truncate=False)[0] != theta and scaled("yarn", beta_fast=8)[0] == theta
    assert scaled("yarn", beta_slow=2)[0] != theta


@pytest.mark.parametrize("layout", LAYOUTS)
def test_yarn_scales_cos_and_sin(layout: Layout) -> None:
    rotary = RotaryPosEncoding(8, layout=layout, scaling={**SCALINGS["yarn"], "attention_factor": 1.5})
    x = torch.randn(1, 2, 9, 8, dtype=F64)
    assert error(rotary(x).norm(dim=-1), 1.5 * x.norm(dim=-1)) < 1e-12
    cos, sin = rotary.tables(9)
    assert error(cos.square() + sin.square(), torch.full((9, 4), 2.25)) < 1e-12


@pytest.mark.parametrize("name", SCALINGS)
def test_what_a_checkpoint_says_is_taken_as_it_is(name: str) -> None:
    given = {**SCALINGS[name], "rope_theta": 10000.0, "attention_factor": None}
    before = dict(given)
    theta, factor = RotaryPosEncoding(16, scaling=given).frequencies(20)
    assert given == before
    again, same = RotaryPosEncoding(16, scaling=SCALINGS[name]).frequencies(20)
    assert torch.equal(theta, again) and factor == same
    assert f"scaling={name}" in repr(RotaryPosEncoding(16, scaling=given))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["linear", "yarn", "llama3"])
def test_another_device_gets_the_plain_formula_and_is_never_waited_for(layout: Layout, kind: str) -> None:
    """The meta device has no values to read: what read one would raise."""
    rotary = RotaryPosEncoding(8, layout=layout, rotary_dim=6, scaling=SCALINGS[kind])
    x = torch.empty(2, 3, 4, 8, device="meta")
    for where in (
        None,
        torch.arange(4),
        torch.arange(4, device="meta"),
        torch.empty(2, 4, device="meta").long(),
    ):
        y = rotary(x, where)
        assert y.device.type == "meta" and y.shape == x.shape


# what users get wrong


def scaling(**keys: Any) -> Callable[[], Any]:
    return lambda: RotaryPosEncoding(4, scaling=keys)


WRONG: dict[str, tuple[Callable[[], Any], str]] = {
    "no type": (
        scaling(factor=2.0),
        "rope_type must be one of default, linear, dynamic, yarn, llama3, not None",
    ),
    "type": (scaling(rope_type="longrope"), "rope_type must be one of default, .*, not 'longrope'"),
    "missing": (scaling(type="linear"), "scaling of type linear lacks factor"),
    "missing two": (
        scaling(type="yarn"),
        "scaling of type yarn lacks factor, original_max_position_embeddings",
    ),
    "unknown": (
        scaling(type="linear", factor=2, beta_fast=3),
        "scaling of type linear knows no beta_fast; it takes rope_type, factor",
    ),
    "misspelt": (
        scaling(**{**LLAMA3, "lo_freq_factor": 1}),
        "llama3 knows no lo_freq_factor; it takes rope_type, factor, high_freq_factor, low_freq_factor, original",
    ),
    "factor": (scaling(type="linear", factor=0.5), "factor must be a number of at least 1, not 0.5"),
    "factor text": (scaling(type="linear", factor="2"), "factor must be a number of at least 1, not '2'"),
    "factor bool": (scaling(type="linear", factor=True), "factor must be a number of at least 1, not True"),
    "factor infinite": (
        scaling(type="linear", factor=math.inf),
        "factor must be a number of at least 1, not inf",
    ),
    "beta": (
        scaling(**{**SCALINGS["yarn"], "beta_fast": -1}),
        "beta_fast must be a number of at least 0, not -1",
    ),
    "truncate": (
        scaling(**{**SCALINGS["yarn"], "truncate": "no"}),
        "truncate must be true or false, not 'no'",
    ),
    "high and low": (
        scaling(**{**LLAMA3, "high_freq_factor": 1.0}),
        r"high_freq_factor \(1.0\) must be above low_freq_factor \(1.0\)",
    ),
    "theta": (
        scaling(type="linear", factor=2, rope_theta=5e5),
        "rope_theta is 500000.0, but base is 10000.0",
    ),
    "dynamic on one pair": (
        lambda: RotaryPosEncoding(2, scaling=SCALINGS["dynamic"]),
        "dynamic needs a rotary_dim above 2",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_wrong_is_named(wrong: str) -> None:
    call, message = WRONG[wrong]
    with pytest.raises(ValueError, match=message):
        call()
