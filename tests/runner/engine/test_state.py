"""What a checkpoint holds: averages, gradient norms, progress towards the objective, and the loop's settings."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from runner.engine.state import Ema, GradientStats, LoopConfig, NonFinite, Objective, Progress
from runner.errors import UserError
from tests.runner.engine.test_loop import make_trainer, weights
from tests.runner.test_task import CPU, Reads

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize("warmup", [True, False])
def test_ema_is_the_weighted_sum_of_its_past(warmup):
    """θ̄_n = Σ_k (1 − d_k) Π_{j>k} d_j θ_k + Π_j d_j θ_0."""
    network = nn.Linear(1, 1, bias=False).double()
    start = float(network.weight.detach())
    ema = Ema(network, 0.6, warmup)
    values = [1.0, -2.0, 5.0, 0.5, 3.0, 3.0, 3.0]
    decays = [min(0.6, (1 + n) / (10 + n)) if warmup else 0.6 for n in range(len(values))]
    for number, value in enumerate(values):
        nn.init.constant_(network.weight, value)
        ema.update(number)
    expected = math.prod(decays) * start
    for k, value in enumerate(values):
        expected += (1 - decays[k]) * math.prod(decays[k + 1 :]) * value
    assert float(ema.average[0]) == pytest.approx(expected, rel=1e-12)


def test_ema_swaps_there_and_back():
    network = nn.Linear(2, 2)
    ema = Ema(network, 0.5, False)
    nn.init.zeros_(network.weight)
    averaged = ema.average[0].clone()
    ema.swap()
    assert torch.equal(network.weight, averaged) and not ema.average[0].any()
    ema.swap()
    assert not network.weight.any() and torch.equal(ema.average[0], averaged)


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
    gradients.require_finite()
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
def test_objective(direction, values, best):
    progress = Progress()
    for step, (value, expected) in enumerate(zip(values, best, strict=True)):
        progress.step = step
        metrics = {"loss": value, "f1": 0.0}
        assert Objective("loss/val", direction).improved(metrics, progress) == bool(expected)
    last_best = max(step for step, is_best in enumerate(best) if is_best)
    assert (progress.best_step, progress.best_value) == (last_best, values[last_best])
    assert progress.stale == len(values) - 1 - last_best


def test_objective_that_is_not_measured():
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


@pytest.mark.parametrize("place", ["weight", "ema", "momentum", "buffer"])
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
        "weight": network.weight.data,
        "ema": state.emas[""].average[0],
        "momentum": state.optimizers[""].state[network.weight]["momentum_buffer"],
        "buffer": network.mask,
    }
    tensors[place].view(-1)[0] = NAN if place == "buffer" else INF
    with pytest.raises(NonFinite, match="no longer finite after step 1"):
        state.save(path, {})
    assert path.read_bytes() == good


def test_a_tasks_state_that_could_not_be_loaded_is_not_saved(tmp_path, monkeypatch):
    trainer = make_trainer(8)
    monkeypatch.setattr(trainer.task, "state_dict", lambda: {"seen": weights(trainer).numpy()})
    with pytest.raises(TypeError, match=r"Regression.state_dict\(\) holds a numpy.ndarray at seen"):
        trainer.state.save(tmp_path / "last.pt", {})
    assert not list(tmp_path.iterdir())


def test_evaluation_returns_plain_floats(monkeypatch):
    trainer = make_trainer(8)
    values = {"a": weights(trainer).mean(), "b": weights(trainer).numpy()[0], "c": 1}
    monkeypatch.setattr(trainer.task, "eval", lambda split: values)
    assert [type(value) for value in trainer.state.evaluate("val").values()] == [float] * 3
