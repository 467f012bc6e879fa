"""What a dtype's numbers can be off, and the worst of several."""

from __future__ import annotations

import math

import pytest
import torch

from experiments.nn.exactness import exact_float32, largest, rounding, unit_roundoff


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_unit_roundoff_is_the_distance_of_the_nearest_number(dtype: torch.dtype) -> None:
    u = unit_roundoff(dtype)
    one = torch.ones((), dtype=dtype)
    assert one + one * (2 * u) > one and torch.nextafter(one, 2 * one) == 1 + 2 * u


def test_rounding_counts_terms_and_the_largest_is_none_where_one_is_no_number() -> None:
    assert rounding(3, 5) == 8 * 2**-52 and rounding(2, dtype=torch.float32) == 2 * 2**-23
    assert largest([1.0, 3.0, 0.5]) == 3.0
    assert math.isnan(largest([math.nan, 1.0])) and math.isnan(largest([1.0, math.nan, 0.5]))


def test_the_bound_is_computed_without_bfloat16_and_tf32() -> None:
    matrix, allowed = torch.ones(2, 2), torch.backends.cudnn.allow_tf32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with exact_float32(torch.device("cpu")):
            assert (matrix @ matrix).dtype == torch.float32 and not torch.backends.cudnn.allow_tf32
        assert (matrix @ matrix).dtype == torch.bfloat16
    assert torch.backends.cudnn.allow_tf32 == allowed
