"""Clipping and its replay against torch's own SGD and gradient clipping."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from experiments.rnn_fashion.clipping import Replay, clip_factor, loss_along, replay

LR = 0.3


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(3, 2).double()


def batches(count: int = 6) -> list[tuple[Tensor, Tensor]]:
    """Six at most, of eight samples; the third is a spike."""
    random = torch.Generator().manual_seed(1)
    scales = torch.tensor([1.0, 1.0, 20.0, 1.0, 5.0, 1.0], dtype=torch.float64)[:, None, None]
    inputs = scales * torch.randn(6, 8, 3, generator=random, dtype=torch.float64)
    return list(zip(inputs, torch.randint(2, (6, 8), generator=random), strict=True))[:count]


def replayed(
    limit: float | None, given: list[tuple[Tensor, Tensor]], settle: int = 0
) -> tuple[nn.Module, Replay]:
    ours = network()
    return ours, replay(ours, given, cross_entropy, LR, limit, settle)


@pytest.mark.parametrize("limit", [None, 0.5])
def test_replay_equals_torch(limit: float | None) -> None:
    theirs = network()
    optimizer, losses, norms = torch.optim.SGD(theirs.parameters(), lr=LR), [], []
    for inputs, targets in batches():
        loss = cross_entropy(theirs(inputs), targets)
        optimizer.zero_grad()
        loss.backward()
        losses.append(loss.item())
        norms.append(nn.utils.clip_grad_norm_(theirs.parameters(), limit or math.inf).item())
        optimizer.step()
    ours, result = replayed(limit, batches())
    assert result.losses == pytest.approx(losses, rel=1e-4)  # torch adds 1e-6 to the norm that it divides by
    assert result.norms == pytest.approx(norms, rel=1e-4)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_clip_factor() -> None:
    assert clip_factor(4.0, 1.0) == 0.25
    assert clip_factor(0.5, 1.0) == clip_factor(9.0, None) == 1.0


def test_the_spike_is_the_largest_gradient_after_settling() -> None:
    norms = replayed(0.5, batches())[1].norms
    for settle in (0, 3):
        result = replayed(0.5, batches(), settle)[1]
        assert result.norms == norms
        assert result.spike == settle + norms[settle:].index(max(norms[settle:]))


def test_loss_along_lands_where_the_steps_land() -> None:
    """At length η min(‖g‖, c) the loss is that of the weights after the clipped step; at 0 that before it."""
    inputs, targets = batches()[2]
    stopped, result = replayed(0.5, batches(3))
    assert result.spike == 2  # so `stopped` is where the clipped step from the spike ends
    lengths = [0.0, LR * min(result.norms[2], 0.5)]
    found = loss_along(network(), result, lengths, inputs, targets, cross_entropy)
    landed = cross_entropy(stopped(inputs), targets).item()
    assert found == pytest.approx([result.losses[2], landed], rel=1e-12)


def test_stops_at_a_gradient_that_is_no_number() -> None:
    given = batches()
    given[3][0].fill_(math.nan)
    result = replayed(None, given)[1]
    assert len(result.norms) == len(result.losses) == 3 and all(map(math.isfinite, result.norms))
