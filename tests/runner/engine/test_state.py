"""What a checkpoint holds: averages, gradient norms, progress towards the objective, and the loop's settings."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from runner.engine.state import Ema, GradientStats, LoopConfig, NonFinite, Objective, Progress
from runner.errors import UserError
from tests.runner.engine.test_loop import make_trainer
from tests.runner.test_task import CPU, Reads

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize("warmup", [True, False])
def test_ema_is_the_weighted_sum_of_its_past(warmup):
    """θ̄_n = Σ_k (1 − d_k) Π_{j>k} d_j θ_k + Π_j d_j θ_0, and it swaps with θ_n there and back."""
    network = nn.Linear(1, 1, bias=False).double().requires_grad_(False)
    values = [float(network.weight), 1.0, -2.0, 5.0, 0.5, 3.0, 3.0]
    ema = Ema(network, 0.6, warmup)
    decays = [0.0] + [min(0.6, (1 + n) / (10 + n)) if warmup else 0.6 for n in range(6)]
    for number, value in enumerate(values[1:]):
        nn.init.constant_(network.weight, value)
        ema.update(number)
    expected = sum((1 - decays[k]) * math.prod(decays[k + 1 :]) * value for k, value in enumerate(values))
    for averaged, trained in [(expected, 3.0), (3.0, expected), (expected, 3.0)]:
        assert (float(ema.average[0]), float(network.weight)) == pytest.approx((averaged, trained), rel=1e-12)
        ema.swap()


def test_first_bad_step_is_remembered_without_reading():
    gradients = GradientStats(["a", "b"], CPU)
    one, bad = torch.ones(()), torch.tensor(INF)
    with Reads() as reads:
        gradients.update("a", 3, one, one, one)
        gradients.update("a", 4, one, bad, one)  # a gradient, with a finite loss
        gradients.update("b", 5, bad - bad, one, one)
    assert not reads.operations
    with pytest.raises(NonFinite, match="at step 5"):
        gradients.require_finite()


def test_gradient_norms_are_means():
    gradients = GradientStats([""], CPU)
    for number, norm in enumerate((1.0, 3.0)):
        gradients.update("", number, torch.zeros(()), torch.tensor(norm), torch.tensor(norm).clamp(max=2))
        gradients.steps += 1
    assert gradients.compute() == {"grad_norm": 2.0, "grad_norm_clipped": 1.5}
    gradients.reset()
    assert gradients.steps == 0 and gradients.compute()["grad_norm"] == 0


@pytest.mark.parametrize(
    ("direction", "values", "best"),
    [
        ("maximize", [0.5, 0.5, 0.7, 0.6], [1, 0, 1, 0]),
        ("minimize", [0.5, 0.5, 0.7, 0.4], [1, 0, 0, 1]),
        ("maximize", [NAN, 0.5, NAN, 0.6], [0, 1, 0, 1]),
        ("minimize", [INF, 3.0, NAN, 2.0], [1, 1, 0, 1]),
    ],
)
def test_the_best_is_the_first_of_equals_in_the_direction_asked(direction, values, best):
    progress, objective = Progress(), Objective("loss/val", direction)
    for progress.step, value in enumerate(values):
        assert objective.improved({"loss": value, "f1": 0.0}, progress) == best[progress.step]
    last_best = max(step for step, is_best in enumerate(best) if is_best)
    assert (progress.best_step, progress.best_value) == (last_best, values[last_best])
    assert progress.stale == len(values) - 1 - last_best


def test_an_objective_that_is_not_measured_names_those_that_are():
    with pytest.raises(UserError, match=r"unknown objective 'f2/val'.*: loss/val, f1/val") as caught:
        Objective("f2/val").improved({"f1": 0.1, "loss": 1.0}, Progress())
    assert (caught.value.wrong, caught.value.right) == ("objective=f2/val", "objective=f1/val")
    assert not Objective().improved({"loss": 1.0}, Progress())


def test_epochs_are_converted_to_steps():
    per_epoch = [LoopConfig().steps_per_epoch(16, 120), LoopConfig().steps_per_epoch(500, 120)]
    assert [*per_epoch, LoopConfig(accumulate=2).steps_per_epoch(16, 128)] == [8, 1, 4]  # 7.5, rounded
    configs = [LoopConfig(epochs=2.5), LoopConfig(epochs=2.5, steps=3), LoopConfig(epochs=0)]
    assert [config.total_steps(8) for config in configs] == [20, 3, 0]


COUNTS = ["accumulate", "patience", *(f"{name}_every" for name in ("eval", "save", "log"))]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, 0) for name in (*COUNTS, "eval_batches", "repeat_batches")),
        *[("epochs", -0.5), ("steps", -1), ("clip_norm", 0.0), ("ema", 1.0), ("ema", -0.1)],
    ],
)
def test_loop_config_out_of_range(name, value):
    with pytest.raises(ValueError, match=f"^{name} must"):
        LoopConfig(**{name: value})


@pytest.mark.parametrize("place", ["model..weight", "ema..0", "state.0.momentum_buffer", "model..mask"])
def test_no_non_finite_state_is_saved(tmp_path, place):
    trainer = make_trainer(8, ema=0.9)
    state, network = trainer.state, trainer.run.networks[""]
    network.register_buffer("mask", torch.tensor([0.0, -INF]))  # as attention has it: no accident
    state.optimizers = {"": torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)}
    trainer.train_step(9)
    path = tmp_path / "last.pt"
    state.save(path, {})
    good = path.read_bytes()
    tensors = {
        "model..weight": network.weight.data,
        "ema..0": state.emas[""].average[0],
        "state.0.momentum_buffer": state.optimizers[""].state[network.weight]["momentum_buffer"],
        "model..mask": network.mask,
    }
    tensors[place].view(-1)[0] = NAN if place == "model..mask" else INF
    with pytest.raises(NonFinite, match=f"{place} is no longer finite after step 1"):
        state.save(path, {})
    assert path.read_bytes() == good


@pytest.mark.parametrize("value", [np.float64(1.5), np.zeros(2), Path("x"), {1, 2}, np.int64(3), object()])
def test_a_tasks_state_that_could_not_be_loaded_is_not_saved(tmp_path, monkeypatch, value):
    trainer = make_trainer(8)
    monkeypatch.setattr(trainer.task, "state_dict", lambda: {"seen": [1, {"deep": value}]})
    place = rf"Regression.state_dict\(\) holds a .*{type(value).__name__} at seen.1.deep, "
    with pytest.raises(TypeError, match=place):
        trainer.state.save(tmp_path / "last.pt", {})
    assert not list(tmp_path.iterdir())


def test_evaluation_returns_plain_floats(monkeypatch):
    trainer = make_trainer(8)
    values = {"a": torch.ones(()), "b": np.float32(1), "c": 1}
    monkeypatch.setattr(trainer.task, "eval", lambda split: values)
    assert [type(value) for value in trainer.state.evaluate("val").values()] == [float] * 3
