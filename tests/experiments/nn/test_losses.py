"""Cross-entropy against torch's own, and against numbers that can be worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

from experiments.nn.losses import CrossEntropy
from tests.experiments.nn.helpers import all_near, randn, refused


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.9])
@pytest.mark.parametrize("shape", [(7, 10), (1, 2), (3, 1)])
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_value_and_gradient_are_those_of_torch(
    smoothing: float, shape: tuple[int, int], scale: float
) -> None:
    logits, targets = (scale * randn(*shape)).requires_grad_(), torch.randint(shape[1], shape[:1])
    ours = CrossEntropy(smoothing)(logits, targets)
    theirs = functional.cross_entropy(logits, targets, label_smoothing=smoothing)
    assert ours.dtype == torch.float64
    all_near(*([x, *torch.autograd.grad(x, logits)] for x in (ours, theirs)), 1e-12, 1e-12)


@pytest.mark.parametrize("offset", [1e4, -1e4])
def test_extreme_logits_do_not_overflow(offset: float) -> None:
    """One sample is certain and right, the other certain and wrong by 10,000."""
    logits = torch.tensor([[offset, 0.0], [0.0, offset]], requires_grad=True)
    value = CrossEntropy()(logits, torch.tensor([0, 0]))
    expected = torch.zeros(2, 2)
    expected[int(offset > 0)] = torch.tensor([-0.5, 0.5])
    assert float(value.detach()) == 5000.0
    assert torch.equal(*torch.autograd.grad(value, logits), expected)


def test_bfloat16_logits_are_summed_in_float32() -> None:
    logits, targets = torch.randn(64, 10).bfloat16(), torch.arange(64) % 10
    value = CrossEntropy()(logits, targets)
    assert value.dtype == torch.float32
    assert float(value) == pytest.approx(float(functional.cross_entropy(logits.double(), targets)), rel=1e-6)


@pytest.mark.parametrize("smoothing", [-0.1, 1.0, 1.5, math.nan])
def test_smoothing_out_of_range_is_named(smoothing: float) -> None:
    with refused("label_smoothing"):
        CrossEntropy(smoothing)
