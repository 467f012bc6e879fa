"""Dropout on a CPU: what share is zero, that nothing but chance decides which, and what is left of the mean."""

from __future__ import annotations

import math

import pytest
import torch

from experiments.nn.dropout import Dropout, _random_levels
from tests.experiments.nn.helpers import near, refused


@pytest.mark.parametrize("p", [0.001, 0.1, 0.25, 0.5, 0.9])
def test_the_share_of_zeros_is_p_and_the_rest_keeps_the_mean(p: float) -> None:
    y = Dropout(p)(torch.ones(400_000, dtype=torch.float64))
    kept = y[y != 0]
    assert abs(len(kept) - (1 - p) * len(y)) < 5 * math.sqrt(p * (1 - p) * len(y))  # of a binomial count
    near(kept, torch.full_like(kept, 1 / (1 - p)), 0, 2**-17 / (1 - p))


def test_every_level_is_as_likely() -> None:
    levels = _random_levels(torch.Size((1 << 18,)))
    assert levels.dtype == torch.int16
    counts = torch.bincount((levels.int() + 2**15) >> 8, minlength=256).double()
    chi_squared = float(((counts - counts.mean()) ** 2 / counts.mean()).sum())
    assert abs(chi_squared - 255) < 5 * math.sqrt(2 * 255)


def test_entries_are_independent_of_those_beside_them_also_of_one_word() -> None:
    zero = (Dropout(0.5)(torch.ones(400_000)) == 0).double() - 0.5
    for distance in (1, 2, 3, 4, 8, 1024):
        together = float((zero[:-distance] * zero[distance:]).sum()) / 0.25
        assert abs(together) < 5 * math.sqrt(len(zero)), distance


def test_two_calls_differ_and_a_seed_repeats_them() -> None:
    x, dropout = torch.ones(3, 5, 7), Dropout(0.5)  # 105 entries: the last word is not used up
    first, second = dropout(x), dropout(x)
    torch.manual_seed(0)  # as every test here begins
    assert torch.equal(first, dropout(x)) and not torch.equal(first, second)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_the_gradient_passes_where_the_entry_did(dtype: torch.dtype) -> None:
    x = torch.randn(1000, dtype=dtype, requires_grad=True)
    y = Dropout(0.3)(x)
    y.sum().backward()
    assert y.dtype == dtype and torch.equal(x.grad == 0, y == 0)
    torch.testing.assert_close(x.grad * x, y)


def test_the_mean_of_bfloat16_is_kept_as_torchs_own_does_not() -> None:
    x = torch.full((1_000_000,), 0.9, dtype=torch.bfloat16)
    y = Dropout(0.1)(x).double()
    # 0.9 / 0.9: one rounding, where a factor that is itself rounded to eight bits would be off by another
    assert torch.equal(y[y != 0].unique(), (x[:1].double() / 0.9).bfloat16().double())


def test_it_leaves_alone_what_is_evaluated_empty_or_not_to_be_dropped() -> None:
    x = torch.randn(100)
    assert torch.equal(Dropout(0.5).eval()(x), x) and torch.equal(Dropout(0.0)(x), x)
    assert Dropout(0.5)(torch.empty(0, 3)).shape == (0, 3)
    for p in (-0.1, 1.0, math.nan):
        with refused(r"p .*0.*1"):
            Dropout(p)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_it_drops_the_same_share(backend: str) -> None:
    y = torch.compile(Dropout(0.25), fullgraph=True, backend=backend)(torch.ones(100_000))
    assert abs(int((y == 0).sum()) - 25_000) < 5 * math.sqrt(0.1875 * 100_000)
