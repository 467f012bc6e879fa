"""The loop by its parts: clipping, averaging, accumulating, choosing the best, stopping; and one step's reads."""

from __future__ import annotations

import copy
import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from runner.data import Batch, Data, Split
from runner.device import Compute
from runner.engine import loop, state
from runner.engine.loop import clip
from runner.engine.state import (
    Ema,
    GradientStats,
    LoopConfig,
    NonFinite,
    Objective,
    Progress,
    TrainingState,
    epoch_steps,
    total_steps,
)
from runner.errors import UserError
from runner.schedule import Constant, Cosine
from runner.streams import generator
from runner.task import Output, Run, Task
from tests.runner.test_task import Reads

CPU = torch.device("cpu")


class Regression(Task):
    """One linear layer on fixed samples; the mean of squares, so that half batches average to a whole one."""

    def __init__(self, data: Data):
        self.data = data

    def build(self, run: Run) -> nn.Module:
        self.network = nn.Linear(3, 1).double()
        return self.network

    def train(self, batch: Batch) -> Output:
        return Output((self.network(batch.inputs).squeeze(1) - batch.targets).square().mean())


def training_of(batch_size: int = 8, lr: float = 0.1, samples: int = 32, **settings) -> SimpleNamespace:
    """Everything that a step needs, as the engine would prepare it."""
    random = torch.Generator().manual_seed(0)
    inputs = torch.randn(samples, 3, generator=random, dtype=torch.float64)
    train = Split(inputs, inputs.sum(1) + 1)
    task = Regression(Data(batch_size))
    run = Run("regression", 0, Compute(CPU, "float32", 1), task.data, {"train": train, "val": train})
    task.run = run
    torch.manual_seed(0)
    run.networks = {"": task.build(run)}
    found = LoopConfig(**settings)
    training = TrainingState(task, run, lambda p: torch.optim.SGD(p, lr=lr), found)
    return SimpleNamespace(task=task, run=run, training=training, settings=found)


def fit(its: SimpleNamespace, schedule=None, objective=None) -> list[str]:
    """Train; gives the names that were saved."""
    saved: list[str] = []
    arguments = (schedule or Constant(), its.settings, objective or Objective(), saved.append)
    loop.fit(its.task, its.run, its.training, *arguments)
    return saved


def weights(its: SimpleNamespace) -> Tensor:
    return nn.utils.parameters_to_vector(its.run.networks[""].parameters()).detach().clone()


@pytest.mark.parametrize("place", ["forward", "backward", "clip", "optimizer"])
@pytest.mark.parametrize(
    "said",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        MemoryError(),
    ],
    ids=["cuda", "cpu", "cublas", "python"],
)
def test_too_little_memory_names_the_batch_to_try(monkeypatch, place, said):
    def full(*_, **__):
        raise said

    its = training_of(batch_size=8, steps=3)
    del its.run.splits["val"]
    target = {
        "forward": (its.task, "train"),
        "backward": (torch.autograd, "backward"),
        "clip": (loop, "clip"),
        "optimizer": (its.training.optimizers[""], "step"),
    }
    monkeypatch.setattr(*target[place], full)
    with pytest.raises(UserError, match=r"does not hold 8 samples at once: try data\.batch_size=4") as caught:
        fit(its)
    assert (caught.value.wrong, caught.value.right) == ("data.batch_size=8", "data.batch_size=4")


def test_too_little_memory_for_an_evaluation_names_its_batch(monkeypatch):
    its = training_of(steps=3)
    monkeypatch.setattr(its.task, "train", lambda *_: torch.empty(10**16))
    with pytest.raises(UserError, match=r"hold 1,000 samples at once: try data\.eval_batch_size=500\."):
        fit(its)


def test_too_little_memory_for_one_sample_names_no_smaller_batch(monkeypatch):
    its = training_of(batch_size=1, steps=3)
    del its.run.splits["val"]
    monkeypatch.setattr(its.task, "train", lambda *_: torch.empty(10**16))
    with pytest.raises(UserError, match=r"does not hold this network and data\.batch_size=1\."):
        fit(its)


def test_other_errors_of_a_step_stay_what_they_are(monkeypatch):
    def broken(*_):
        raise RuntimeError("a bug")

    its = training_of(steps=3)
    monkeypatch.setattr(its.task, "train", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        fit(its)


@pytest.mark.parametrize("limit", [0.1, 1.0, 100.0])
def test_clip_is_torch_s(limit):
    torch.manual_seed(0)
    ours = nn.Linear(5, 4)
    theirs = copy.deepcopy(ours)
    for network in (ours, theirs):
        (3 * network(torch.ones(2, 5)).square().sum()).backward()
    norm, clipped = clip(ours.parameters(), limit)
    expected = nn.utils.clip_grad_norm_(theirs.parameters(), limit)
    assert norm == expected
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)
    after = torch.cat([p.grad.flatten() for p in ours.parameters()]).norm()
    assert float(clipped) == pytest.approx(float(after), rel=1e-5)


def test_clip_without_a_limit_or_without_gradients():
    network = nn.Linear(2, 1, bias=False)
    network(torch.full((1, 2), 100.0)).backward()
    before = network.weight.grad.clone()
    norm, clipped = clip(network.parameters(), None)
    assert torch.equal(network.weight.grad, before)
    assert float(norm) == float(clipped) == pytest.approx(100 * math.sqrt(2))
    assert float(clip(nn.Linear(2, 1).parameters(), 1.0)[0]) == 0


def test_accumulated_half_batches_are_one_batch():
    whole = training_of(8, steps=12, clip_norm=0.5)
    halves = training_of(4, steps=12, clip_norm=0.5, accumulate=2)
    fit(whole)
    fit(halves)
    assert torch.allclose(weights(whole), weights(halves), rtol=1e-12)
    assert [row["loss"] for row in whole.run.tracker.history] == pytest.approx(
        [row["loss"] for row in halves.run.tracker.history]
    )
    norms = [
        [row["grad_norm"] for row in its.run.tracker.history if row["split"] == "train"]
        for its in (whole, halves)
    ]
    assert norms[0] == pytest.approx(norms[1])


def test_fit_is_gradient_descent():
    """Against the update written out, with a schedule, clipping and the batches of the data module."""
    its = training_of(8, lr=0.2, steps=10, clip_norm=0.7)
    w = weights(its)
    fit(its, Cosine(warmup=3))
    split = its.run.splits["train"]
    for step in range(10):
        batch = loop.train_batch(its.task.data, split, 0, step)
        x = torch.cat([batch.inputs, torch.ones(8, 1, dtype=torch.float64)], 1)
        gradient = 2 * x.T @ (x @ w - batch.targets) / 8
        gradient *= min(1.0, 0.7 / (float(gradient.norm()) + 1e-6))
        rate = 0.2 * min(1, (step + 1) / 3) * 0.5 * (1 + math.cos(math.pi * step / 10))
        w = w - rate * gradient
    assert torch.allclose(weights(its), w, rtol=1e-5)  # the norms are float32


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


def test_averaged_weights_are_evaluated_and_become_the_network_s():
    its = training_of(8, steps=6, ema=0.9, ema_warmup=False)
    trained: dict[str, Tensor] = {}
    evaluate = its.task.eval

    def spy(split: str) -> dict[str, float]:
        trained["evaluated"] = weights(its)
        return evaluate(split)

    its.task.eval = spy
    fit(its)
    average = torch.cat([a.flatten() for a in its.training.emas[""].average])
    assert torch.equal(trained["evaluated"], average)
    assert not torch.equal(weights(its), average)
    its.training.settle()
    assert torch.equal(weights(its), average)


def test_networks_train_in_training_mode():
    """However the task built them, and after every look."""
    its = training_of(8, steps=4, eval_every=1)
    its.run.networks[""].eval()
    modes: list[bool] = []
    train = its.task.train

    def spy(batch: Batch) -> Output:
        modes.append(its.task.network.training == torch.is_grad_enabled())
        return train(batch)

    its.task.train = spy
    fit(its)
    assert len(modes) > 4 and all(modes)


def test_every_step_draws_from_a_stream_of_its_own():
    """Of the run's seed, the step's number and the process, whatever was drawn before."""
    its, drawn = training_of(steps=3), []

    def train(batch: Batch) -> Output:
        if its.task.network.training:  # not in an evaluation
            drawn.append(torch.rand(4))
        return Regression.train(its.task, batch)

    its.task.train = train
    fit(its)
    expected = [torch.rand(4, generator=generator(0, "step", number, 0)) for number in range(3)]
    assert len(drawn) == 3 and all(map(torch.equal, drawn, expected))


def test_epochs_are_sugar_for_steps():
    assert epoch_steps(16, 120, LoopConfig()) == 8  # 7.5, rounded
    assert epoch_steps(16, 128, LoopConfig(accumulate=2)) == 4
    assert epoch_steps(500, 120, LoopConfig()) == 1
    assert total_steps(LoopConfig(epochs=2.5), 8) == 20
    assert total_steps(LoopConfig(epochs=2.5, steps=3), 8) == 3
    assert total_steps(LoopConfig(epochs=0), 8) == 0


def test_what_is_evaluated_and_saved_when():
    its = training_of(8, steps=10, eval_every=4, save_every=3, log_every=5)
    assert fit(its) == ["last"] * 7  # 0, 3, 4, 6, 8, 9, 10
    steps = {split: [] for split in ("train", "val")}
    for row in its.run.tracker.history:
        steps[row["split"]].append(row["step"])
    assert steps == {"train": [4, 5, 8, 10], "val": [0, 4, 8, 10]}


@pytest.mark.parametrize(("val", "drawn"), [(True, [0, 2, 4]), (False, [2, 4])])
def test_curves_are_drawn_also_where_there_is_no_val(monkeypatch, val, drawn):
    its = training_of(steps=4, eval_every=2, log_every=1)
    if not val:
        del its.run.splits["val"]
    seen = []
    monkeypatch.setattr(its.run.tracker, "curves", lambda title: seen.append(its.run.step))
    fit(its)
    assert seen == drawn and any(row["split"] == "train" for row in its.run.tracker.history)


def test_no_steps_evaluate_once():
    its = training_of(8, steps=0)
    before = weights(its)
    assert fit(its) == ["last"]
    assert torch.equal(weights(its), before)
    assert [row["split"] for row in its.run.tracker.history] == ["val"]


def test_patience():
    """The loss of a network that does not move is best at once and never better."""
    its = training_of(8, lr=1e-30, steps=100, eval_every=2, patience=3)
    saved = fit(its, objective=Objective("loss/val", "minimize"))
    assert its.training.progress.step == 6, "three evaluations without a better one"
    assert saved == ["best"] + ["last"] * 4


def test_repeated_batches():
    """The first two batches again and again, in double precision: the same losses as two fixed batches."""
    its = training_of(8, lr=1e-30, steps=6, repeat_batches=2, log_every=1, eval_every=100)
    fit(its)
    losses = [row["loss"] for row in its.run.tracker.history if row["split"] == "train"]
    assert losses == pytest.approx(losses[:2] * 3) and losses[0] != pytest.approx(losses[1])


@pytest.mark.parametrize(
    ("direction", "values", "best"),
    [
        ("maximize", [0.5, 0.5, 0.7, 0.6], [1, 0, 1, 0]),
        ("minimize", [0.5, 0.5, 0.7, 0.4], [1, 0, 0, 1]),
        ("maximize", [math.nan, 0.5, math.nan, 0.6], [0, 1, 0, 1]),
        ("minimize", [math.inf, 3.0, math.nan, 2.0], [1, 1, 0, 1]),
    ],
)
def test_objective(direction, values, best):
    progress = Progress()
    found = []
    for step, value in enumerate(values):
        progress.step = step
        found.append(Objective("loss/val", direction).improved({"loss": value, "f1": 0.0}, progress))
    assert found == [bool(b) for b in best]
    last_best = max(step for step, is_best in enumerate(best) if is_best)
    assert (progress.best_step, progress.best_value) == (last_best, values[last_best])
    assert progress.stale == len(values) - 1 - last_best


def test_objective_that_is_not_measured():
    with pytest.raises(
        UserError, match=r"f2/val is not measured\. Did you mean f1/val\? Measured: loss/val, f1/val"
    ):
        Objective("f2/val").improved({"f1": 0.1, "loss": 1.0}, Progress())
    assert not Objective().improved({"loss": 1.0}, Progress())


def test_first_bad_step_is_remembered_without_reading():
    readings = GradientStats(["a", "b"], CPU)
    one, bad = torch.ones(()), torch.tensor(float("inf"))
    with Reads() as reads:
        readings.update("a", 3, one, one, one)
        readings.update("a", 4, one, bad, one)  # a gradient, with a finite loss
        readings.update("b", 5, bad - bad, one, one)
    assert not reads.found
    with pytest.raises(NonFinite, match="at step 5"):
        readings.require_finite()


def test_readings_are_means_of_norms():
    readings = GradientStats([""], CPU)
    for number, norm in enumerate((1.0, 3.0)):
        readings.update("", number, torch.zeros(()), torch.tensor(norm), torch.tensor(norm).clamp(max=2))
        readings.steps += 1
    assert readings.compute() == {"grad_norm": 2.0, "grad_norm_clipped": 1.5}
    readings.reset()
    readings.require_finite()
    assert readings.steps == 0 and readings.compute()["grad_norm"] == 0


@pytest.mark.parametrize("ema", [None, 0.9])
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_a_step_reads_nothing_from_the_device(ema, optimizer):
    its = training_of(8, ema=ema, accumulate=2)
    its.training.optimizers = {"": optimizer(its.run.networks[""].parameters(), lr=0.1)}
    arguments = (its.task, its.run, its.training, Cosine(warmup=2), its.settings, 100)
    loop.step(*arguments)  # state is made
    with Reads() as reads:
        loop.step(*arguments)
    # Adam counts its steps in tensors that stay on the CPU, and reads those
    allowed = 0 if optimizer is torch.optim.SGD else 2 * len(list(its.run.networks[""].parameters()))
    assert len(reads.found) <= allowed, reads.found


def test_outputs_must_be_the_networks():
    its = training_of(8, steps=1)
    its.task.train = lambda batch: {"other": Output(weights(its).sum())}
    with pytest.raises(TypeError, match=r"build\(\) gave the variants \[''\], train\(\) the outputs of"):
        fit(its)


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("place", ["weight", "ema", "momentum", "buffer"])
def test_no_non_finite_state_is_saved(tmp_path, place):
    its = training_of(8, ema=0.9)
    network = its.run.networks[""]
    network.register_buffer("mask", torch.tensor([0.0, -INF]))  # as attention has it: no accident
    its.training.optimizers = {"": torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)}
    loop.step(its.task, its.run, its.training, Constant(), its.settings, 9)
    path = tmp_path / "last.pt"
    its.training.save(path, {})
    good = path.read_bytes()
    state = its.training.optimizers[""].state[network.weight]
    place_of = {
        "weight": network.weight.data,
        "ema": its.training.emas[""].average[0],
        "momentum": state["momentum_buffer"],
        "buffer": network.mask,
    }
    place_of[place].view(-1)[0] = NAN if place == "buffer" else INF
    with pytest.raises(NonFinite, match="no longer finite after step 1"):
        its.training.save(path, {})
    assert path.read_bytes() == good


def test_a_task_s_state_that_could_not_be_loaded_is_told_at_the_first_save(tmp_path):
    its = training_of(8)
    its.task.state_dict = lambda: {"seen": weights(its).numpy()}
    with pytest.raises(TypeError, match=r"Regression.state_dict\(\) holds a numpy.ndarray at seen"):
        its.training.save(tmp_path / "last.pt", {})
    assert not list(tmp_path.iterdir())


def test_evaluation_gives_plain_floats():
    its = training_of(8)
    its.task.eval = lambda split: {"a": weights(its).mean(), "b": weights(its).numpy()[0], "c": 1}
    values = state.evaluate(its.task, its.run, its.training, "val")
    assert [type(value) for value in values.values()] == [float] * 3


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *itertools.product(("eval_every", "save_every", "log_every", "accumulate", "patience"), (0, -1)),
        ("eval_batches", 0),
        ("repeat_batches", 0),
        ("epochs", -0.5),
        ("steps", -1),
        ("clip_norm", 0.0),
        ("ema", 1.0),
        ("ema", -0.1),
    ],
)
def test_settings_out_of_range(name, value):
    with pytest.raises(ValueError, match=f"^{name} must"):
        LoopConfig(**{name: value})


@pytest.mark.parametrize("world_size", [1, 2])
def test_records_hold_the_decay_of_the_average_and_the_share_of_the_ceiling(monkeypatch, world_size):
    """The ceiling is that of all processes, as the speed is."""
    monkeypatch.setattr(Compute, "matmul_rate", lambda self: 5e9)
    its = training_of(steps=8, log_every=4, ema=0.5, ema_warmup=True)
    its.run.world_size = world_size
    its.task.flops_per_sample = 2e6
    fit(its)
    rows = [row for row in its.run.tracker.history if row["split"] == "train"]
    assert [row["ema_decay"] for row in rows] == [(1 + 3) / (10 + 3), (1 + 7) / (10 + 7)]
    for row in rows:
        assert row["utilisation"] == pytest.approx(row["samples_per_second"] * 2e6 / (5e9 * world_size))


def test_records_of_a_run_without_an_average_say_nothing_of_it():
    its = training_of(steps=4, log_every=4)
    fit(its)
    [row] = [row for row in its.run.tracker.history if row["split"] == "train"]
    assert not {"ema_decay", "utilisation"} & set(row)
