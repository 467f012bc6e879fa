"""Rotary frequencies stretched for contexts that are longer than those of training.

    linear    θ_i / s                                                               Chen et al. 2023
    dynamic   θ_i of a base that grows with the length                              bloc97 and emozilla, both 2023
    yarn      between θ_i and θ_i / s, by how often the pair turns in the context   Peng et al. 2023, §3.2
    llama3    between θ_i and θ_i / s, by its wavelength                            Dubey et al. 2024

s is the scaling's `factor`. Keys are those of a transformers checkpoint's `rope_scaling`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from experiments.nn.checks import one_of

Scaling = Mapping[str, Any]

REQUIRED = {
    "default": set(),
    "linear": {"factor"},
    "dynamic": {"factor"},
    "yarn": {"factor", "original_max_position_embeddings"},
    "llama3": {"factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"},
}
OPTIONAL = {
    "dynamic": {"original_max_position_embeddings"},
    "yarn": {"attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"},
}


def checked_scaling(scaling: Scaling, base: float, dim: int) -> dict[str, Any]:
    """Return the keys that have a value, with the type as `rope_type`; raise ValueError for what is wrong."""
    # type and base
    given = {key: value for key, value in scaling.items() if key != "type" and value is not None}
    kind: Any = given.setdefault("rope_type", scaling.get("type"))
    one_of(REQUIRED, **{"scaling's rope_type": kind})
    if given.setdefault("rope_theta", base) != base:
        raise ValueError(f"scaling's rope_theta must be base = {base}, got {given['rope_theta']}")

    # keys of this type
    values = {key: value for key, value in given.items() if key not in ("rope_type", "rope_theta")}
    required, optional = REQUIRED[kind], OPTIONAL.get(kind, set())
    if required - values.keys() or values.keys() - required - optional:
        needs, takes, got = (", ".join(sorted(keys)) or "nothing" for keys in (required, optional, values))
        raise ValueError(f"scaling of type {kind} needs {needs} and may have {takes}, got {got}")

    # their ranges
    truncate = values.pop("truncate", True)
    if not isinstance(truncate, bool):
        raise ValueError(f"scaling's truncate must be true or false, got {truncate!r}")
    for key, value in values.items():
        least = 1.0 if key in ("factor", "original_max_position_embeddings") else 0.0
        if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value < math.inf:
            raise ValueError(f"scaling's {key} must be a number of at least {least:g}, got {value!r}")
    if kind == "llama3" and given["high_freq_factor"] <= given["low_freq_factor"]:
        low, high = given["low_freq_factor"], given["high_freq_factor"]
        raise ValueError(f"scaling's high_freq_factor ({high}) must be above low_freq_factor ({low})")
    if kind == "dynamic" and dim == 2:
        raise ValueError("scaling of type dynamic needs rotary_dim above 2, got 2")  # it divides by dim − 2
    return given


def scaled_base(dim: int, base: float, scaling: Scaling, original: float, length: int) -> float:
    """Return the base for a length L (the highest position + 1): `dynamic` alone has another one.

    That is base · (s·L/L₀ − (s − 1))^(D/(D−2)) once L exceeds L₀: "dynamic NTK" (bloc97, emozilla 2023).
    """
    if scaling["rope_type"] != "dynamic":
        return base
    factor = scaling["factor"]
    stretch = factor * max(length, original) / original - (factor - 1)
    value: float = base * stretch ** (dim / (dim - 2))
    return value


def scaled_frequencies(theta: Tensor, base: float, scaling: Scaling) -> tuple[Tensor, float]:
    """θ_i (n,) float64, of that base, under checked `scaling`; and the factor on cos and sin, 1 but for YaRN."""
    kind = scaling["rope_type"]
    if kind == "linear":
        return theta / scaling["factor"], 1.0
    if kind == "llama3":
        return _llama3_frequencies(theta, scaling), 1.0
    if kind == "yarn":
        factor = scaling.get("attention_factor", _yarn_attention_factor(scaling))
        return _yarn_frequencies(theta, base, scaling), factor
    return theta, 1.0


def _llama3_frequencies(theta: Tensor, scaling: Scaling) -> Tensor:
    """Llama 3.1 (Dubey et al. 2024): waves longer than the context are stretched, short ones kept, a ramp between."""
    low_freq_factor, high_freq_factor = scaling["low_freq_factor"], scaling["high_freq_factor"]
    original, factor = scaling["original_max_position_embeddings"], float(scaling["factor"])
    turns = original * theta / (2 * math.pi)  # within the context that the model was trained on
    keep: Tensor = ((turns - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0, 1)
    return keep * theta + (1 - keep) * theta / factor


def _yarn_frequencies(theta: Tensor, base: float, scaling: Scaling) -> Tensor:
    """YaRN's "NTK by parts" (Peng et al. 2023, §3.2), its ramp over i as in the authors' code."""
    dim, factor = 2 * len(theta), float(scaling["factor"])
    original = scaling["original_max_position_embeddings"]

    def pair_that_turns(times: float) -> float:  # within the context that the model was trained on
        return dim * math.log(original / (times * 2 * math.pi)) / (2 * math.log(base))

    beta_fast, beta_slow = scaling.get("beta_fast") or 32, scaling.get("beta_slow") or 1
    low, high = pair_that_turns(beta_fast), pair_that_turns(beta_slow)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    i = torch.arange(len(theta), dtype=torch.float64, device=theta.device)
    keep = 1 - ((i - low) / (high - low if high != low else 0.001)).clamp(0, 1)
    return keep * theta + (1 - keep) * theta / factor


def _yarn_attention_factor(scaling: Scaling) -> float:
    """√(1/t) = 0.1 ln s + 1 (Peng et al. 2023, eq. 22); the two weights of the logarithm are DeepSeek's."""

    def temperature(weight: float) -> float:
        return 0.1 * weight * math.log(scaling["factor"]) + 1

    mscale, mscale_all_dim = scaling.get("mscale"), scaling.get("mscale_all_dim")
    if mscale and mscale_all_dim:
        return temperature(mscale) / temperature(mscale_all_dim)
    return temperature(1.0)
