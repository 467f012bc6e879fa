"""Clipping a gradient by its norm, and what that does to plain SGD.

    θ ← θ − η g · min(1, c / ‖g‖)        Pascanu, Mikolov & Bengio 2013, algorithm 1                       (1)

with the norm over all parameters together. Without a limit c, the step is as long as the gradient: η ‖g‖.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

_Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass
class Replay:
    """Plain SGD: ‖g‖ before clipping and the loss of each step, and the state at the spike."""

    norms: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    spike: int = -1  # the step with the largest gradient; -1: none
    weights: list[Tensor] = field(default_factory=list)  # before that step
    gradient: list[Tensor] = field(default_factory=list)  # of that step, not clipped


def clip_factor(norm: float, limit: float | None) -> float:
    """Return min(1, c / ‖g‖), equation (1)."""
    return 1.0 if limit is None or norm <= limit else limit / norm


def replay(
    network: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    loss: _Loss,
    lr: float,
    limit: float | None,
    settle: int = 0,
) -> Replay:
    """Train `network` in place by equation (1) on (inputs, targets); stop where the gradient is not finite.

    The first `settle` steps, in which the untrained network's gradients are large, count as no spike.
    """
    result, parameters = Replay(), list(network.parameters())
    for inputs, targets in batches:
        # gradient
        with torch.enable_grad():
            value = loss(network(inputs), targets)
            gradient = torch.autograd.grad(value, parameters)
        norm = float(torch.stack([g.norm() for g in gradient]).norm())
        if not math.isfinite(norm):
            break

        # record
        result.losses.append(float(value.detach()))
        result.norms.append(norm)
        if len(result.norms) > settle and (result.spike < 0 or norm > result.norms[result.spike]):
            result.spike = len(result.norms) - 1
            result.weights = [p.detach().clone() for p in parameters]
            result.gradient = list(gradient)

        # step
        with torch.no_grad():
            for parameter, g in zip(parameters, gradient, strict=True):
                parameter.sub_(g, alpha=lr * clip_factor(norm, limit))
    return result


@torch.no_grad()
def loss_along(
    network: nn.Module, at: Replay, lengths: Iterable[float], inputs: Tensor, targets: Tensor, loss: _Loss
) -> list[float]:
    """Return the loss after a step of each length ‖Δθ‖ against the gradient at the spike; changes the network."""
    norm, values = at.norms[at.spike], []
    for length in lengths:
        for parameter, weight, g in zip(network.parameters(), at.weights, at.gradient, strict=True):
            parameter.copy_(weight - length / norm * g)
        values.append(float(loss(network(inputs), targets)))
    return values
