"""The training loop: one step against the update written out, and when it evaluates, records, saves and stops."""

from __future__ import annotations

import copy
import math
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor, nn

from runner.data import Batch, Data, Split, train_batch
from runner.device import Compute
from runner.engine import loop, monitor
from runner.engine.loop import Trainer, clip
from runner.engine.state import LoopConfig, Objective, Pruned, TrainingState
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
        self.training_mode: list[bool] = []  # of the network, at each step

    def build(self, run: Run) -> nn.Module:
        self.network = nn.Linear(3, 1).double()
        return self.network

    def train(self, batch: Batch) -> Output:
        if torch.is_grad_enabled():
            self.random.append(torch.rand(()))
            self.training_mode.append(self.network.training)
        return Output((self.network(batch.inputs).squeeze(1) - batch.targets).square().mean())


def make_trainer(
    batch_size: int = 8, lr: float = 0.1, *, schedule: Any = None, objective: str | None = None, **config: Any
) -> Trainer:
    """A trainer as a session would prepare it, with its task, its run and the names that it saves."""
    random = torch.Generator().manual_seed(0)
    inputs = torch.randn(32, 3, generator=random, dtype=torch.float64)
    train = Split(inputs, inputs.sum(1) + 1)
    task = Regression(Data(batch_size))
    run = Run("regression", 0, Compute(CPU, "float32", 1), task.data, {"train": train, "val": train})
    task.run = run
    torch.manual_seed(0)
    run.networks = {"": task.build(run)}
    state, saved = TrainingState(task, run, lambda p: torch.optim.SGD(p, lr=lr), LoopConfig(**config)), []
    trainer = Trainer(state, schedule or Constant(), Objective(objective, "minimize"), saved.append)
    trainer.task, trainer.run, trainer.saved = task, run, saved
    return trainer


def weights(trainer: Trainer) -> Tensor:
    return nn.utils.parameters_to_vector(trainer.run.networks[""].parameters()).detach().clone()


def column(trainer: Trainer, name: str, split: str = "train") -> list[Any]:
    """Return what the rows of a split hold of a metric, or their steps."""
    return [row.get(name) for row in trainer.run.tracker.history if row["split"] == split]


# the step


def test_fit_is_gradient_descent():
    """Against the update written out, with a schedule, clipping and the batches of the data module."""
    trainer = make_trainer(8, lr=0.2, steps=10, clip_norm=0.7, schedule=Cosine(warmup=3), log_every=1)
    w, norms = weights(trainer), []
    trainer.fit()
    for step in range(10):
        batch = train_batch(trainer.task.data, trainer.run.splits["train"], 0, step)
        x = torch.cat([batch.inputs, torch.ones(8, 1, dtype=torch.float64)], 1)
        gradient = 2 * x.T @ (x @ w - batch.targets) / 8
        norms.append(float(gradient.norm()))
        gradient *= min(1.0, 0.7 / (norms[-1] + 1e-6))
        w = w - 0.2 * min(1, (step + 1) / 3) * 0.5 * (1 + math.cos(math.pi * step / 10)) * gradient
    torch.testing.assert_close(weights(trainer), w, rtol=1e-5, atol=1e-8)  # the norms are float32
    assert column(trainer, "grad_norm") == pytest.approx(norms, rel=1e-5)
    assert column(trainer, "grad_norm_clipped") == pytest.approx([min(n, 0.7) for n in norms], rel=1e-5)


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
    assert norm == nn.utils.clip_grad_norm_(theirs.parameters(), math.inf if limit is None else limit)
    after, expected = (torch.cat([p.grad.flatten() for p in net.parameters()]) for net in (ours, theirs))
    assert torch.equal(after, expected) and float(clipped) == pytest.approx(float(after.norm()), rel=1e-5)
    assert float(clip(nn.Linear(2, 1).parameters(), limit)[0]) == 0, "without gradients"


def test_accumulated_half_batches_are_one_batch():
    whole = make_trainer(8, steps=12, clip_norm=0.5)
    halves = make_trainer(4, steps=12, clip_norm=0.5, accumulate=2)
    for trainer in (whole, halves):
        trainer.fit()
    torch.testing.assert_close(weights(whole), weights(halves), rtol=1e-12, atol=1e-12)
    for key, split in (("loss", "train"), ("grad_norm", "train"), ("loss", "val")):
        assert column(whole, key, split) == pytest.approx(column(halves, key, split))


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


def test_outputs_must_be_the_networks():
    trainer = make_trainer(steps=1)
    trainer.task.train = lambda batch: {
        "other": Output(sum(p.sum() for p in trainer.run.networks[""].parameters()))
    }
    with pytest.raises(
        UserError, match=r"test_loop.py, line \d+\): .*per network of build \(one\), got other"
    ):
        trainer.fit()


def test_averaged_weights_are_evaluated_and_become_the_networks(monkeypatch):
    trainer = make_trainer(8, steps=6, ema=0.9, ema_warmup=False)
    spy = Mock(side_effect=lambda split: {"seen": weights(trainer).sum()})
    monkeypatch.setattr(trainer.task, "eval", spy)
    trainer.fit()
    average = torch.cat([a.flatten() for a in trainer.state.emas[""].average])
    assert column(trainer, "seen", "val")[-1] == float(average.sum())
    assert not torch.equal(weights(trainer), average)
    trainer.state.apply_ema()
    assert torch.equal(weights(trainer), average)
    assert trainer.state.evaluate("val")["seen"] == float(average.sum())


def test_networks_train_in_training_mode():
    """However the task built them, and after every evaluation."""
    trainer = make_trainer(8, steps=4, eval_every=1)
    trainer.run.networks[""].eval()
    trainer.fit()
    assert trainer.task.training_mode == [True] * 4


# when it evaluates, records, saves and stops


@pytest.mark.parametrize("val", [True, False])
def test_evaluations_records_curves_and_checkpoints_come_at_their_steps(monkeypatch, val):
    trainer, drawn = make_trainer(8, steps=10, eval_every=4, save_every=3, log_every=5), []
    if not val:
        del trainer.run.splits["val"]
    monkeypatch.setattr(trainer.run.tracker, "curves", lambda title: drawn.append(trainer.run.step))
    trainer.fit()
    assert trainer.saved == ["last"] * 7  # 0, 3, 4, 6, 8, 9, 10
    assert column(trainer, "step") == [4, 5, 8, 10]
    assert column(trainer, "step", "val") == [0, 4, 8, 10] * val
    assert drawn == ([0, 4, 8, 10] if val else [4, 8, 10])


def test_no_steps_evaluate_once():
    trainer = make_trainer(8, steps=0)
    before = weights(trainer)
    trainer.fit()
    assert trainer.saved == ["last"] and torch.equal(weights(trainer), before)
    assert column(trainer, "step", "val") == [0] and not column(trainer, "step")


def test_it_stops_after_evaluations_that_bring_nothing_better():
    """The loss of a network that does not move is best at once and never better."""
    trainer = make_trainer(8, lr=1e-30, steps=100, eval_every=2, patience=3, objective="loss/val")
    trainer.fit()
    assert trainer.state.progress.step == 6, "three evaluations without a better one"
    assert trainer.saved == ["best"] + ["last"] * 4


def test_the_pruner_gets_every_evaluation_and_stops_the_run():
    trainer = make_trainer(8, steps=9, eval_every=2, objective="loss/val")
    reports: list[tuple[int, float]] = []
    trainer.should_prune = lambda *report: reports.append(report) or report[0] == 3
    with pytest.raises(Pruned):
        trainer.fit()
    losses = column(trainer, "loss", "val")
    assert reports == list(zip((1, 2, 3), losses[1:], strict=True)), "not the untrained network"

    # a kill may have prevented the verdict; the last evaluation prunes nothing
    with pytest.raises(Pruned):
        trainer.fit()
    trainer.should_prune = lambda *report: reports.append(report) or report[0] == 5
    trainer.fit()
    assert [number for number, _ in reports] == [1, 2, 3, 3, 3, 4, 5] and trainer.run.step == 9


def test_the_first_batches_come_again_and_again():
    """The first two batches again and again, in double precision: the same losses as two fixed batches."""
    trainer = make_trainer(8, lr=1e-30, steps=6, repeat_batches=2, log_every=1, eval_every=100)
    trainer.fit()
    losses = column(trainer, "loss")
    assert losses == pytest.approx(losses[:2] * 3) and losses[0] != pytest.approx(losses[1])


@pytest.mark.parametrize("world_size", [1, 2])
def test_speed_decay_and_utilisation_are_recorded(monkeypatch, world_size):
    """Only training steps are timed."""
    trainer, now = make_trainer(steps=8, eval_every=4, log_every=4, ema=0.5), [0.0]
    train = trainer.task.train

    def timed(batch: Batch) -> Output:
        now[0] += 0.5 if torch.is_grad_enabled() else 100
        return train(batch)

    monkeypatch.setattr(monitor.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(trainer.task, "train", timed)
    monkeypatch.setattr(Compute, "matmul_rate", lambda self: 5e9)
    trainer.run.world_size, trainer.task.flops_per_sample = world_size, 2e6
    trainer.fit()
    assert trainer.state.progress.seconds == 8 * 0.5
    assert column(trainer, "samples_per_second") == [8 / 0.5] * 2
    assert column(trainer, "utilisation") == pytest.approx([8 / 0.5 * 2e6 / (5e9 * world_size)] * 2)
    assert column(trainer, "ema_decay") == [(1 + 3) / (10 + 3), (1 + 7) / (10 + 7)]

    plain = make_trainer(steps=4, log_every=4)
    plain.fit()
    assert column(plain, "ema_decay") == column(plain, "utilisation") == [None]


@pytest.mark.parametrize("place", ["forward", "backward", "clip", "optimizer", "evaluation"])
def test_what_does_not_fit_into_memory_names_the_batch_size_to_try(monkeypatch, place):
    trainer = make_trainer(batch_size=8, steps=3)
    if place != "evaluation":
        del trainer.run.splits["val"]
    target = {
        "backward": (torch.autograd, "backward"),
        "clip": (loop, "clip"),
        "optimizer": (trainer.state.optimizers[""], "step"),
    }
    monkeypatch.setattr(*target.get(place, (trainer.task, "train")), Mock(side_effect=MemoryError))
    smaller = r"data\.eval_batch_size=500$" if place == "evaluation" else r"data\.batch_size=4$"
    with pytest.raises(UserError, match=f"; try {smaller}"):
        trainer.fit()
