"""The training loop: one step against the update written out, and when it evaluates, records, saves and stops."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from runner.data import Batch, Data, Split, train_batch
from runner.device import Compute
from runner.engine import loop, monitor
from runner.engine.loop import Trainer, clip
from runner.engine.state import LoopConfig, NonFinite, Objective, Pruned, TrainingState
from runner.errors import UserError
from runner.schedule import Constant, Cosine
from runner.streams import reseed, seed_of
from runner.task import Output, Run, Task
from tests.runner.test_task import CPU, Reads


class Regression(Task):
    """One linear layer on fixed samples; the mean of squares, so that half batches average to a whole one."""

    def __init__(self, data: Data):
        self.data = data
        self.random: list[Tensor] = []  # the first number of each step's random stream

    def build(self, run: Run) -> nn.Module:
        self.network = nn.Linear(3, 1).double()
        return self.network

    def train(self, batch: Batch) -> Output:
        if torch.is_grad_enabled():
            self.random.append(torch.rand(()))
        return Output((self.network(batch.inputs).squeeze(1) - batch.targets).square().mean())


def make_trainer(
    batch_size: int = 8, lr: float = 0.1, *, schedule: Any = None, objective: str | None = None, **config: Any
) -> Trainer:
    """A trainer as a session would prepare it; the names that it saves are in `trainer.saved`."""
    random = torch.Generator().manual_seed(0)
    inputs = torch.randn(32, 3, generator=random, dtype=torch.float64)
    train = Split(inputs, inputs.sum(1) + 1)
    task = Regression(Data(batch_size))
    run = Run("regression", 0, Compute(CPU, "float32", 1), task.data, {"train": train, "val": train})
    task.run = run
    torch.manual_seed(0)
    run.networks = {"": task.build(run)}
    loop_config, saved = LoopConfig(**config), []
    state = TrainingState(task, run, lambda p: torch.optim.SGD(p, lr=lr), loop_config)
    lowest = Objective(objective, "minimize")
    trainer = Trainer(task, run, state, schedule or Constant(), loop_config, lowest, saved.append)
    trainer.saved = saved
    return trainer


def weights(trainer: Trainer) -> Tensor:
    return nn.utils.parameters_to_vector(trainer.run.networks[""].parameters()).detach().clone()


def rows(trainer: Trainer, split: str = "train") -> list[dict[str, Any]]:
    return [row for row in trainer.run.tracker.history if row["split"] == split]


def raising(error: Exception) -> Any:
    def call(*_: object, **__: object) -> None:
        raise error

    return call


# the step


def test_fit_is_gradient_descent():
    """Against the update written out, with a schedule, clipping and the batches of the data module."""
    trainer = make_trainer(8, lr=0.2, steps=10, clip_norm=0.7, schedule=Cosine(warmup=3))
    w = weights(trainer)
    trainer.fit()
    for step in range(10):
        batch = train_batch(trainer.task.data, trainer.run.splits["train"], 0, step)
        x = torch.cat([batch.inputs, torch.ones(8, 1, dtype=torch.float64)], 1)
        gradient = 2 * x.T @ (x @ w - batch.targets) / 8
        gradient *= min(1.0, 0.7 / (float(gradient.norm()) + 1e-6))
        rate = 0.2 * min(1, (step + 1) / 3) * 0.5 * (1 + math.cos(math.pi * step / 10))
        w = w - rate * gradient
    assert torch.allclose(weights(trainer), w, rtol=1e-5)  # the norms are float32


def test_every_step_has_a_random_stream_of_its_own():
    """A function of the seed, the step and the process."""
    trainer = make_trainer(steps=3, eval_every=1, accumulate=2)
    trainer.run.rank, trainer.run.world_size = 1, 2
    trainer.fit()
    expected = []
    for step in range(3):
        reseed(seed_of(0, "step", step, 1), CPU)
        expected += torch.rand(2).tolist()
    assert torch.stack(trainer.task.random).tolist() == expected and len(set(expected)) == 6


@pytest.mark.parametrize("limit", [0.1, 1.0, 100.0, None])
def test_clip_is_torchs(limit):
    torch.manual_seed(0)
    ours = nn.Linear(5, 4)
    theirs = copy.deepcopy(ours)
    for network in (ours, theirs):
        (3 * network(torch.ones(2, 5)).square().sum()).backward()
    norm, clipped = clip(ours.parameters(), limit)
    expected = nn.utils.clip_grad_norm_(theirs.parameters(), math.inf if limit is None else limit)
    assert norm == expected
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)
    after = torch.cat([p.grad.flatten() for p in ours.parameters()]).norm()
    assert float(clipped) == pytest.approx(float(after), rel=1e-5)
    assert float(clip(nn.Linear(2, 1).parameters(), limit)[0]) == 0, "without gradients"


def test_accumulated_half_batches_are_one_batch():
    whole = make_trainer(8, steps=12, clip_norm=0.5)
    halves = make_trainer(4, steps=12, clip_norm=0.5, accumulate=2)
    for trainer in (whole, halves):
        trainer.fit()
    assert torch.allclose(weights(whole), weights(halves), rtol=1e-12)
    for key, split in (("loss", "train"), ("grad_norm", "train"), ("loss", "val")):
        values = [[row[key] for row in rows(trainer, split)] for trainer in (whole, halves)]
        assert values[0] == pytest.approx(values[1])


@pytest.mark.parametrize("ema", [None, 0.9])
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_a_step_reads_nothing_from_the_device(ema, optimizer):
    trainer = make_trainer(8, ema=ema, accumulate=2, schedule=Cosine(warmup=2))
    parameters = list(trainer.run.networks[""].parameters())
    trainer.state.optimizers = {"": optimizer(parameters, lr=0.1)}
    trainer.train_step(100)  # the optimizer's state is made
    with Reads() as reads:
        trainer.train_step(100)
    # Adam counts its steps in tensors that stay on the CPU, and reads those
    allowed = 0 if optimizer is torch.optim.SGD else 2 * len(parameters)
    assert len(reads.operations) <= allowed, reads.operations


def test_a_gradient_that_is_not_finite_stops_the_run_at_a_finite_loss(monkeypatch):
    """√x at 0 is 0, its slope is not."""
    trainer = make_trainer(steps=3)
    monkeypatch.setattr(
        trainer.task, "train", lambda batch: Output((0 * trainer.task.network.bias).abs().sqrt().sum())
    )
    with pytest.raises(NonFinite, match="at step 1"):
        trainer.fit()


def test_outputs_must_be_the_networks():
    trainer = make_trainer(steps=1)
    trainer.task.train = lambda batch: {"other": Output(weights(trainer).sum())}
    with pytest.raises(TypeError, match=r"train\(\).*build\(\): expected \[''\], got \['other'\]"):
        trainer.fit()


def test_averaged_weights_are_evaluated_and_become_the_networks(monkeypatch):
    trainer = make_trainer(8, steps=6, ema=0.9, ema_warmup=False)
    evaluated, evaluate = [], trainer.task.eval
    spy = lambda split: evaluated.append(weights(trainer)) or evaluate(split)  # noqa: E731
    monkeypatch.setattr(trainer.task, "eval", spy)
    trainer.fit()
    average = torch.cat([a.flatten() for a in trainer.state.emas[""].average])
    assert torch.equal(evaluated[-1], average)
    assert not torch.equal(weights(trainer), average)
    trainer.state.apply_ema()
    assert torch.equal(weights(trainer), average)


def test_networks_train_in_training_mode(monkeypatch):
    """However the task built them, and after every evaluation."""
    trainer = make_trainer(8, steps=4, eval_every=1)
    trainer.run.networks[""].eval()
    modes, train, network = [], trainer.task.train, trainer.task.network
    spy = lambda batch: modes.append(network.training == torch.is_grad_enabled()) or train(batch)  # noqa: E731
    monkeypatch.setattr(trainer.task, "train", spy)
    trainer.fit()
    assert len(modes) > 4 and all(modes)


# when it evaluates, records, saves and stops


def test_evaluations_records_and_checkpoints_come_at_their_steps():
    trainer = make_trainer(8, steps=10, eval_every=4, save_every=3, log_every=5)
    trainer.fit()
    assert trainer.saved == ["last"] * 7  # 0, 3, 4, 6, 8, 9, 10
    assert [row["step"] for row in rows(trainer)] == [4, 5, 8, 10]
    assert [row["step"] for row in rows(trainer, "val")] == [0, 4, 8, 10]


@pytest.mark.parametrize(("val", "drawn"), [(True, [0, 2, 4]), (False, [2, 4])])
def test_curves_are_drawn_also_without_val(monkeypatch, val, drawn):
    trainer = make_trainer(steps=4, eval_every=2, log_every=1)
    if not val:
        del trainer.run.splits["val"]
    steps = []
    monkeypatch.setattr(trainer.run.tracker, "curves", lambda title: steps.append(trainer.run.step))
    trainer.fit()
    assert steps == drawn and rows(trainer)


def test_no_steps_evaluate_once():
    trainer = make_trainer(8, steps=0)
    before = weights(trainer)
    trainer.fit()
    assert trainer.saved == ["last"] and torch.equal(weights(trainer), before)
    assert len(rows(trainer, "val")) == 1 and not rows(trainer)


def test_patience():
    """The loss of a network that does not move is best at once and never better."""
    trainer = make_trainer(8, lr=1e-30, steps=100, eval_every=2, patience=3, objective="loss/val")
    trainer.fit()
    assert trainer.state.progress.step == 6, "three evaluations without a better one"
    assert trainer.saved == ["best"] + ["last"] * 4


def test_the_pruner_hears_every_evaluation_and_stops_the_run():
    trainer = make_trainer(8, steps=9, eval_every=2, objective="loss/val")
    reports: list[tuple[int, float]] = []
    trainer.should_prune = lambda *report: reports.append(report) or report[0] == 3
    with pytest.raises(Pruned):
        trainer.fit()
    values = [row["loss"] for row in rows(trainer, "val")]
    assert reports == list(zip((1, 2, 3), values[1:], strict=True)), "not the untrained network"

    # a kill may have prevented the verdict; the last evaluation prunes nothing
    with pytest.raises(Pruned):
        trainer.fit()
    trainer.should_prune = lambda *report: reports.append(report) or report[0] == 5
    trainer.fit()
    assert [number for number, _ in reports] == [1, 2, 3, 3, 3, 4, 5] and trainer.run.step == 9


def test_repeated_batches():
    """The first two batches again and again, in double precision: the same losses as two fixed batches."""
    trainer = make_trainer(8, lr=1e-30, steps=6, repeat_batches=2, log_every=1, eval_every=100)
    trainer.fit()
    losses = [row["loss"] for row in rows(trainer)]
    assert losses == pytest.approx(losses[:2] * 3) and losses[0] != pytest.approx(losses[1])


def test_only_training_steps_are_timed(monkeypatch):
    trainer, now = make_trainer(steps=4, eval_every=2, log_every=1), [0.0]
    train = trainer.task.train

    def timed(batch: Batch) -> Output:
        now[0] += 0.5 if torch.is_grad_enabled() else 100
        return train(batch)

    monkeypatch.setattr(monitor.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(trainer.task, "train", timed)
    trainer.fit()
    assert trainer.state.progress.seconds == 4 * 0.5
    assert [row["samples_per_second"] for row in rows(trainer)] == [8 / 0.5] * 4


@pytest.mark.parametrize("world_size", [1, 2])
def test_decay_and_utilisation_are_recorded_where_there_are_any(monkeypatch, world_size):
    monkeypatch.setattr(Compute, "matmul_rate", lambda self: 5e9)
    trainer = make_trainer(steps=8, log_every=4, ema=0.5)
    trainer.run.world_size, trainer.task.flops_per_sample = world_size, 2e6
    trainer.fit()
    assert [row["ema_decay"] for row in rows(trainer)] == [(1 + 3) / (10 + 3), (1 + 7) / (10 + 7)]
    for row in rows(trainer):
        assert row["utilisation"] == pytest.approx(row["samples_per_second"] * 2e6 / (5e9 * world_size))

    plain = make_trainer(steps=4, log_every=4)
    plain.fit()
    [row] = rows(plain)
    assert not {"ema_decay", "utilisation"} & set(row)


# what goes wrong


@pytest.mark.parametrize("place", ["forward", "backward", "clip", "optimizer"])
def test_a_step_that_does_not_fit_into_memory_names_the_batch_size_to_try(monkeypatch, place):
    trainer = make_trainer(batch_size=8, steps=3)
    del trainer.run.splits["val"]
    target = {
        "forward": (trainer.task, "train"),
        "backward": (torch.autograd, "backward"),
        "clip": (loop, "clip"),
        "optimizer": (trainer.state.optimizers[""], "step"),
    }
    monkeypatch.setattr(*target[place], raising(MemoryError()))
    with pytest.raises(UserError, match=r"at data\.batch_size=8; try data\.batch_size=4$"):
        trainer.fit()


@pytest.mark.parametrize(
    ("error", "expected", "message"),
    [
        (MemoryError(), UserError, r"try data\.eval_batch_size=500$"),
        (RuntimeError("a bug"), RuntimeError, "^a bug$"),
    ],
)
def test_errors_of_an_evaluation(monkeypatch, error, expected, message):
    trainer = make_trainer(steps=3)
    monkeypatch.setattr(trainer.task, "train", raising(error))
    with pytest.raises(expected, match=message):
        trainer.fit()
