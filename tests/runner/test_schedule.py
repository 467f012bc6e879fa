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
    """Return the learning rates of torch's scheduler, step by step."""
    optimizer = torch.optim.SGD([torch.zeros(())], lr=RATE)
    scheduler, rates = make(optimizer), []
    for _ in range(STEPS):
        rates += scheduler.get_last_lr()
        optimizer.step()
        scheduler.step()
    return rates


def in_any_order(schedule: Callable[[int, int], float]) -> list[float]:
    """Return the rates of our schedule, asked in a random order: it has no state."""
    rates = {step: RATE * schedule(step, STEPS) for step in random.Random(0).sample(range(STEPS), STEPS)}
    return [rates[step] for step in range(STEPS)]


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (Cosine(), lambda o: lr_scheduler.CosineAnnealingLR(o, STEPS)),
        (Cosine(final=0.1), lambda o: lr_scheduler.CosineAnnealingLR(o, STEPS, eta_min=0.1 * RATE)),
        (Linear(), lambda o: lr_scheduler.LinearLR(o, 1.0, 0.0, total_iters=STEPS)),
        (Linear(final=0.1), lambda o: lr_scheduler.LinearLR(o, 1.0, 0.1, total_iters=STEPS)),
        (Constant(warmup=8), lambda o: lr_scheduler.LinearLR(o, 1 / 8, 1.0, total_iters=7)),
        (Constant(), lambda o: lr_scheduler.ConstantLR(o, factor=1.0)),
    ],
)
def test_schedules_are_torchs(ours, theirs):
    assert in_any_order(ours) == pytest.approx(rates_of(theirs), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("schedule", [Cosine, Linear])
def test_warmup_scales_the_schedule(schedule):
    plain = in_any_order(schedule(final=0.1))
    for warmup in (1, 8, 100):
        expected = [rate * min(1, (step + 1) / warmup) for step, rate in enumerate(plain)]
        assert in_any_order(schedule(warmup=warmup, final=0.1)) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    ("schedule", "key", "value"),
    [(Constant, "warmup", -1), (Cosine, "warmup", -1), (Cosine, "final", 1.1), (Linear, "final", -0.1)],
)
def test_out_of_range(schedule, key, value):
    with pytest.raises(ValueError, match=f"^{key} must"):
        schedule(**{key: value})
