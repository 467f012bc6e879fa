"""What a task is handed, and what is made of its outputs."""

from __future__ import annotations

import warnings

import pytest
import torch
from sklearn.metrics import accuracy_score, f1_score
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from runner.data import Data, Split
from runner.device import Compute
from runner.task import Check, Interrupted, Meters, Output, Run, Task, by_variant, metric_name

CPU = torch.device("cpu")


def make_run(**changes) -> Run:
    split = Split(torch.arange(10.0).reshape(10, 1))
    fields = {"name": "t", "seed": 3, "data": Data(4, 4), "splits": {"val": split}}
    return Run(compute=Compute(CPU, "float32", 1), **{**fields, **changes})


def outputs(seed: int = 0, sizes: tuple[int, ...] = (8, 8, 3)) -> list[tuple[Output, int]]:
    """Batches of a classifier with a scalar of its own, the last one smaller."""
    random = torch.Generator().manual_seed(seed)
    found = []
    for size in sizes:
        logits = torch.randn(size, 4, generator=random)
        targets = torch.randint(4, (size,), generator=random)
        loss = nn.functional.cross_entropy(logits, targets)
        found.append((Output(loss, logits, targets, {"top": logits.amax(1).mean()}), size))
    return found


def test_meters_are_sums_over_samples():
    meters = Meters()
    for output, size in outputs():
        meters.update({"": output}, size)
    values = meters.compute()
    logits = torch.cat([output.logits for output, _ in outputs()])
    targets = torch.cat([output.targets for output, _ in outputs()])
    assert values["loss"] == pytest.approx(float(nn.functional.cross_entropy(logits, targets)), rel=1e-6)
    assert values["accuracy"] == pytest.approx(accuracy_score(targets, logits.argmax(1)))
    assert values["f1"] == pytest.approx(f1_score(targets, logits.argmax(1), average="macro"))
    assert values["top"] == pytest.approx(float(logits.amax(1).mean()), rel=1e-6)


def test_meters_of_variants_and_of_a_loss_alone():
    meters = Meters()
    for value, size in ((1.0, 2), (4.0, 1)):
        meters.update({"a": Output(torch.tensor(value)), "b": Output(torch.tensor(2 * value))}, size)
    assert meters.compute() == {"loss.a": 2.0, "loss.b": 4.0}


@pytest.mark.parametrize("cut", [0, 1, 2, 3])
def test_meters_go_on_from_their_state(tmp_path, cut):
    whole, first, second = Meters(), Meters(), Meters()
    batches = outputs()
    for output, size in batches:
        whole.update({"": output, "plain": Output(output.loss)}, size)
    for output, size in batches[:cut]:
        first.update({"": output, "plain": Output(output.loss)}, size)
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True), CPU)
    for output, size in batches[cut:]:
        second.update({"": output, "plain": Output(output.loss)}, size)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert second.compute() == whole.compute()


def test_meters_forget():
    meters = Meters()
    for output, size in outputs(1):
        meters.update({"": output}, size)
    meters.reset()
    for output, size in outputs(2):
        meters.update({"": output}, size)
    fresh = Meters()
    for output, size in outputs(2):
        fresh.update({"": output}, size)
    assert meters.compute() == fresh.compute()


def test_meters_keep_a_nan():
    """One bad batch must show, not be left out of a mean."""
    meters = Meters()
    for value in (1.0, float("nan")):
        meters.update({"": Output(torch.tensor(value))}, 4)
    assert meters.compute()["loss"] != meters.compute()["loss"]


def test_meters_take_bfloat16():
    meters = Meters()
    for _ in range(1000):  # in bfloat16 the sum would stall at 256
        meters.update({"": Output(torch.ones((), dtype=torch.bfloat16))}, 1)
    assert meters.compute() == {"loss": 1.0}


class Reads(TorchDispatchMode):
    """Lists the operations that wait for a device."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in (
            "_local_scalar_dense",
            "nonzero",
            "equal",
            "bincount",
            "_unique2",
        ):
            self.operations.append(str(func))
        return func(*args, **(kwargs or {}))


def test_meters_read_nothing():
    meters = Meters()
    with Reads() as reads:
        for output, size in outputs():
            meters.update({"": output, "plain": Output(output.loss)}, size)
    assert not reads.operations
    with Reads() as reads:
        meters.compute()
    assert reads.operations, "the test would see it"


def test_looking_puts_the_modes_back_and_has_its_own_stream():
    networks = {"a": nn.Dropout(), "b": nn.Dropout().eval()}
    run = make_run(networks=networks)
    with run.evaluation("x"):
        assert not networks["a"].training and not networks["b"].training
        first = torch.rand(3)
    assert networks["a"].training and not networks["b"].training
    torch.rand(5)
    with run.evaluation("x"):
        assert torch.equal(torch.rand(3), first)
    with run.evaluation("y"):
        assert not torch.equal(torch.rand(3), first)


def test_inference_has_no_gradients_and_the_run_s_precision():
    weight = torch.ones(2, 2, requires_grad=True)
    run = make_run()
    run.compute = Compute(CPU, "bfloat16", 1)
    with run.inference("x"):
        product = weight @ weight
    assert not product.requires_grad and product.dtype == torch.bfloat16


def test_batches_stop_when_asked():
    run = make_run()
    found = run.batches("val")
    assert len(next(found).inputs) == 4
    run.stop = lambda: True
    with pytest.raises(Interrupted):
        next(found)


def test_batches_are_limited():
    assert len(list(make_run(eval_limit=2).batches("val"))) == 2
    assert len(list(make_run().batches("val"))) == 3


@pytest.mark.parametrize(
    ("measured", "at_least", "passed"),
    [
        (0.5, False, True),
        (1.0, False, True),
        (1.1, False, False),
        (float("nan"), False, False),
        (0.5, True, False),
        (1.0, True, True),
        (1.1, True, True),
        (float("nan"), True, False),
    ],
)
def test_check(measured, at_least, passed):
    run = make_run()
    assert run.check("name", "x and 1", torch.tensor(measured), 1, at_least) == passed
    assert run.checks[0].passed == passed
    assert type(run.checks[0].measured) is float and isinstance(run.checks[0], Check)


def test_named():
    module = nn.Linear(1, 1)
    assert by_variant(None, "build") == {}
    assert by_variant(module, "build") == {"": module}
    assert by_variant({"rotary": module}, "build") == {"rotary": module}
    for bad in ("two words", "a.b", "", 3):
        with pytest.raises(TypeError, match="identifier"):
            by_variant({bad: module}, "build")
    assert metric_name("loss", "") == "loss" and metric_name("loss", "rotary") == "loss.rotary"


def test_hooks_that_a_task_may_leave_out():
    task = Task()
    assert task.build(make_run()) is None and task.state_dict() == {}
    # the one hook that may be left out only where nothing is built
    with pytest.raises(NotImplementedError, match="Task builds a network, so it must define train"):
        task.train(None)
