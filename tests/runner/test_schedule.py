"""Schedules against torch's own, which keep state where ours are functions of the step."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from torch.optim import lr_scheduler

from runner.schedule import Constant, Cosine, Linear

STEPS, RATE = 40, 0.3


def rates_of(make: Callable[[torch.optim.Optimizer], lr_scheduler.LRScheduler]) -> list[float]:
    """The learning rates that torch's scheduler gives, step by step."""
    optimizer = torch.optim.SGD([torch.zeros((), requires_grad=True)], lr=RATE)
    scheduler = make(optimizer)
    rates = []
    for _ in range(STEPS):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def in_any_order(schedule: Callable[[int, int], float]) -> list[float]:
    """The same schedule asked in a random order: it has no state."""
    order = random.Random(0).sample(range(STEPS), STEPS)
    found = {step: RATE * schedule(step, STEPS) for step in order}
    return [found[step] for step in range(STEPS)]


@pytest.mark.parametrize("final", [0.0, 0.1])
def test_cosine(final):
    expected = rates_of(lambda o: lr_scheduler.CosineAnnealingLR(o, STEPS, eta_min=final * RATE))
    assert in_any_order(Cosine(final=final)) == pytest.approx(expected, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("final", [0.0, 0.1])
def test_linear(final):
    expected = rates_of(lambda o: lr_scheduler.LinearLR(o, 1.0, final, total_iters=STEPS))
    assert in_any_order(Linear(final=final)) == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_warmup():
    expected = rates_of(lambda o: lr_scheduler.LinearLR(o, 1 / 8, 1.0, total_iters=7))
    assert in_any_order(Constant(warmup=8)) == pytest.approx(expected, rel=1e-9)
    assert in_any_order(Constant()) == [RATE] * STEPS


@pytest.mark.parametrize("schedule", [Cosine, Linear])
def test_warmup_scales_the_schedule(schedule):
    warm, plain = in_any_order(schedule(warmup=8, final=0.1)), in_any_order(schedule(final=0.1))
    factors = [found / without for found, without in zip(warm, plain, strict=True)]
    assert factors == pytest.approx([min(1, (step + 1) / 8) for step in range(STEPS)])


@pytest.mark.parametrize("schedule", [Constant, Cosine, Linear])
def test_never_zero_at_the_first_step(schedule):
    assert all(schedule(warmup=warmup)(0, STEPS) > 0 for warmup in (0, 1, 100))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Constant(warmup=-1), "warmup"),
        (lambda: Cosine(warmup=-1), "warmup"),
        (lambda: Cosine(final=1.1), "final"),
        (lambda: Linear(final=-0.1), "final"),
    ],
)
def test_out_of_range(make, message):
    with pytest.raises(ValueError, match=f"^{message} must"):
        make()
