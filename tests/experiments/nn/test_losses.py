"""Cross-entropy against torch's own, and against numbers that can be worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from experiments.nn.losses import CrossEntropy

SMOOTHINGS = [0.0, 0.1, 0.9]


def value_and_gradient(loss: object, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    logits = logits.detach().clone().requires_grad_()
    value = loss(logits, targets)  # type: ignore[operator]
    value.backward()
    assert logits.grad is not None
    return value.detach(), logits.grad


def reference(label_smoothing: float) -> object:
    return lambda x, y: functional.cross_entropy(x, y, label_smoothing=label_smoothing)


@pytest.mark.parametrize("label_smoothing", SMOOTHINGS)
@pytest.mark.parametrize("shape", [(7, 10), (1, 2), (3, 1)])
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_value_and_gradient_are_those_of_torch(
    label_smoothing: float, shape: tuple[int, int], scale: float
) -> None:
    random = torch.Generator().manual_seed(0)
    logits = scale * torch.randn(shape, generator=random, dtype=torch.float64)
    targets = torch.randint(shape[1], shape[:1], generator=random)
    found = value_and_gradient(CrossEntropy(label_smoothing), logits, targets)
    wanted = value_and_gradient(reference(label_smoothing), logits, targets)
    for ours, theirs in zip(found, wanted, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("label_smoothing", SMOOTHINGS)
def test_smoothed_target_by_its_formula(label_smoothing: float) -> None:
    """−Σ_c q_c log p_c with q_c = (1 − ε) δ_{c,y} + ε / C, summed out in plain Python."""
    logits, target = [0.3, -1.2, 2.0], 1
    total = sum(math.exp(z) for z in logits)
    q = [(1 - label_smoothing) * (c == target) + label_smoothing / 3 for c in range(3)]
    wanted = -sum(q_c * math.log(math.exp(z) / total) for q_c, z in zip(q, logits, strict=True))
    found = CrossEntropy(label_smoothing)(torch.tensor([logits], dtype=torch.float64), torch.tensor([target]))
    assert float(found) == pytest.approx(wanted, rel=1e-14)


@pytest.mark.parametrize("offset", [1e4, -1e4])
def test_extreme_logits_do_not_overflow(offset: float) -> None:
    logits = torch.tensor([[offset, 0.0], [0.0, offset]])
    targets = torch.tensor([0, 0])
    value, gradient = value_and_gradient(CrossEntropy(), logits, targets)
    assert float(value) == 5000.0  # one sample is certain and right, the other certain and wrong by 10,000
    wrong = 1 if offset > 0 else 0
    wanted = torch.zeros(2, 2)
    wanted[wrong] = torch.tensor([-0.5, 0.5])
    assert torch.equal(gradient, wanted)


def test_gradient_by_finite_differences() -> None:
    logits = torch.randn(4, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    targets = torch.tensor([0, 4, 2, 2])
    assert torch.autograd.gradcheck(lambda x: CrossEntropy(0.2)(x, targets), logits.requires_grad_())


def test_uniform_prediction_costs_log_c_whatever_the_smoothing() -> None:
    for label_smoothing in SMOOTHINGS:
        value = CrossEntropy(label_smoothing)(torch.full((3, 10), 7.0), torch.tensor([0, 5, 9]))
        assert float(value) == pytest.approx(math.log(10), rel=1e-6)


def test_bfloat16_logits_are_summed_in_float32() -> None:
    logits = torch.randn(64, 10, generator=torch.Generator().manual_seed(2)).bfloat16()
    targets = torch.arange(64) % 10
    value = CrossEntropy()(logits, targets)
    assert value.dtype == torch.float32
    wanted = functional.cross_entropy(logits.double(), targets)
    assert float(value) == pytest.approx(float(wanted), rel=1e-6)


def test_float64_stays_float64() -> None:
    assert CrossEntropy()(torch.zeros(1, 3, dtype=torch.float64), torch.tensor([0])).dtype == torch.float64


@pytest.mark.parametrize("label_smoothing", [-0.1, 1.0, 1.5, math.nan])
def test_smoothing_out_of_range_is_named(label_smoothing: float) -> None:
    with pytest.raises(ValueError, match=r"^label_smoothing must lie in"):
        CrossEntropy(label_smoothing)
