"""Clipping and its replay against torch's own SGD and gradient clipping."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from experiments.rnn_fashion.clipping import clip_factor, loss_along, replay

LR = 0.3


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(3, 2).double()


def batches(count: int) -> list[tuple[Tensor, Tensor]]:
    random = torch.Generator().manual_seed(1)
    scales = [1.0, 1.0, 20.0, 1.0, 5.0, 1.0][:count]  # the third batch is a spike
    return [
        (
            s * torch.randn(8, 3, generator=random, dtype=torch.float64),
            torch.randint(2, (8,), generator=random),
        )
        for s in scales
    ]


def by_torch(limit: float | None) -> tuple[nn.Module, list[float], list[float]]:
    net = network()
    optimizer, losses, norms = torch.optim.SGD(net.parameters(), lr=LR), [], []
    for inputs, targets in batches(6):
        loss = nn.functional.cross_entropy(net(inputs), targets)
        optimizer.zero_grad()
        loss.backward()
        losses.append(loss.item())
        norms.append(nn.utils.clip_grad_norm_(net.parameters(), math.inf if limit is None else limit).item())
        optimizer.step()
    return net, losses, norms


@pytest.mark.parametrize("limit", [None, 0.5])
def test_replay_equals_torch(limit: float | None) -> None:
    theirs, losses, norms = by_torch(limit)
    ours = network()
    result = replay(ours, batches(6), nn.functional.cross_entropy, LR, limit)
    assert result.losses == pytest.approx(losses, rel=1e-4)  # torch adds 1e-6 to the norm that it divides by
    assert result.norms == pytest.approx(norms, rel=1e-4)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_clip_factor() -> None:
    assert clip_factor(4.0, 1.0) == 0.25
    assert clip_factor(0.5, 1.0) == clip_factor(9.0, None) == 1.0


def test_the_spike_is_the_largest_gradient_after_settling() -> None:
    result = replay(network(), batches(6), nn.functional.cross_entropy, LR, 0.5)
    assert result.spike == result.norms.index(max(result.norms))
    later = replay(network(), batches(6), nn.functional.cross_entropy, LR, 0.5, settle=3)
    assert later.norms == result.norms
    assert later.spike == 3 + result.norms[3:].index(max(result.norms[3:]))


def test_loss_along_lands_where_the_steps_land() -> None:
    """At length η min(‖g‖, c) the loss is that of the weights after the clipped step; at 0 that before it."""
    inputs, targets = batches(3)[2]
    stopped = network()
    result = replay(stopped, batches(3), nn.functional.cross_entropy, LR, 0.5)
    assert result.spike == 2  # so `stopped` is where the clipped step from the spike ends
    at = result.norms[2]
    scratch = copy.deepcopy(stopped)
    lengths = [0.0, LR * min(at, 0.5)]
    before, after = loss_along(scratch, result, lengths, inputs, targets, nn.functional.cross_entropy)
    assert before == pytest.approx(result.losses[2], rel=1e-12)
    landed = nn.functional.cross_entropy(stopped(inputs), targets).item()
    assert after == pytest.approx(landed, rel=1e-12)


def test_stops_at_a_gradient_that_is_no_number() -> None:
    bad = batches(6)
    bad[3] = (bad[3][0] * math.nan, bad[3][1])
    result = replay(network(), bad, nn.functional.cross_entropy, LR, None)
    assert len(result.norms) == len(result.losses) == 3 and all(map(math.isfinite, result.norms))
