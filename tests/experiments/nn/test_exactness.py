"""What a dtype's numbers can be off, and the worst of several."""

from __future__ import annotations

import math

import pytest
import torch

from experiments.nn.exactness import largest, rounding, unit_roundoff


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_unit_roundoff_is_the_distance_of_the_nearest_number(dtype: torch.dtype) -> None:
    u = unit_roundoff(dtype)
    one = torch.ones((), dtype=dtype)
    assert one + one * (2 * u) > one and torch.nextafter(one, 2 * one) == 1 + 2 * u


def test_rounding_counts_terms() -> None:
    assert rounding(3, 5) == 8 * 2**-52
    assert rounding(2, dtype=torch.float32) == 2 * 2**-23


def test_the_largest_is_none_where_one_is_no_number() -> None:
    assert largest([1.0, 3.0, 0.5]) == 3.0
    for values in ([math.nan, 1.0], [1.0, math.nan, 0.5]):
        assert math.isnan(largest(values))
