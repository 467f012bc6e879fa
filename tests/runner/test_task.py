"""What a task is given, and how the outputs of many batches become metrics."""

from __future__ import annotations

import math
import re
import warnings

import pytest
import torch
from sklearn.metrics import accuracy_score, f1_score
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from runner.data import Data, Split
from runner.device import Compute
from runner.errors import UserError
from runner.outputs import by_variant, metric_name
from runner.task import Check, Interrupted, Meters, Output, Run, Task

CPU = torch.device("cpu")
WAITS = ("_local_scalar_dense", "nonzero", "equal", "bincount", "_unique2")


class Reads(TorchDispatchMode):
    """Lists the operations that wait for a device."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in WAITS:
            self.operations.append(str(func))
        return func(*args, **(kwargs or {}))


def make_run(**changes) -> Run:
    split = Split(torch.arange(10.0).reshape(10, 1))
    fields = {"name": "t", "seed": 3, "data": Data(4, 4), "splits": {"val": split}}
    return Run(compute=Compute(CPU, changes.pop("precision", "float32"), 1), **{**fields, **changes})


def outputs(seed: int = 0) -> list[Output]:
    """Return three batches of a classifier with a scalar of its own, the last one smaller."""
    random = torch.Generator().manual_seed(seed)
    batches = []
    for size in (8, 8, 3):
        logits = torch.randn(size, 4, generator=random)
        targets = torch.randint(4, (size,), generator=random)
        loss = nn.functional.cross_entropy(logits, targets)
        batches.append(Output(loss, logits, targets, {"top": logits.amax(1).mean()}))
    return batches


def update(meters: Meters, batches: list[Output]) -> Meters:
    """Add batches as a classifier's, and as those of a variant of which only the loss is known."""
    for output in batches:
        meters.update({"": output, "plain": Output(output.loss)}, len(output.logits))
    return meters


def test_meters_are_sums_over_samples():
    values = update(Meters(), outputs()).compute()
    logits, targets = (torch.cat([getattr(o, name) for o in outputs()]) for name in ("logits", "targets"))
    loss = float(nn.functional.cross_entropy(logits, targets))
    expected = {
        "accuracy": accuracy_score(targets, logits.argmax(1)),
        "f1": f1_score(targets, logits.argmax(1), average="macro"),
        "top": float(logits.amax(1).mean()),
    } | {"loss": loss, "loss.plain": loss}
    assert {name: values[name] for name in expected} == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("cut", [0, 1, 2, 3])
def test_meters_continue_from_their_state_and_start_anew_after_reset(tmp_path, cut):
    batches, restored = outputs(), Meters()
    expected = update(Meters(), batches).compute()
    torch.save(update(Meters(), batches[:cut]).state_dict(), tmp_path / "state.pt")
    restored.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True), CPU)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert update(restored, batches[cut:]).compute() == expected
    restored.reset()
    assert update(restored, outputs(1)).compute() == update(Meters(), outputs(1)).compute()


def test_meters_keep_a_nan_and_sum_bfloat16_exactly():
    meters = Meters()
    for _ in range(1000):  # in bfloat16 the sum would stall at 256
        meters.update({"": Output(torch.ones((), dtype=torch.bfloat16))}, 1)
    assert meters.compute() == {"loss": 1.0}
    meters.update({"": Output(torch.tensor(math.nan))}, 4)
    assert math.isnan(meters.compute()["loss"]), "one bad batch must show, not be left out of a mean"


def test_meters_read_nothing_until_they_compute():
    with Reads() as reads:
        meters = update(Meters(), outputs())
    assert not reads.operations
    with Reads() as reads:
        meters.compute()
    assert reads.operations, "the test would see it"


def test_evaluation_restores_the_modes_and_has_its_own_stream():
    networks = {"a": nn.Dropout(), "b": nn.Dropout().eval()}
    run = make_run(networks=networks)
    drawn = []
    for purpose in ("x", "x", "y"):
        with run.evaluation(purpose):
            assert not networks["a"].training and not networks["b"].training
            drawn.append(torch.rand(3))
        assert networks["a"].training and not networks["b"].training
        torch.rand(5)
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_inference_has_no_gradients_and_the_runs_precision(precision):
    weight = torch.ones(2, 2, requires_grad=True)
    with make_run(precision=precision).inference("x"):
        product = weight @ weight
    assert not product.requires_grad and product.dtype == getattr(torch, precision)


def test_batches_are_limited_and_stop_when_asked():
    assert [len(list(make_run(eval_limit=limit).batches("val"))) for limit in (2, None)] == [2, 3]
    run = make_run()
    batches = run.batches("val")
    assert len(next(batches).inputs) == 4
    run.stop = lambda: True
    with pytest.raises(Interrupted):
        next(batches)


@pytest.mark.parametrize("at_least", [False, True])
@pytest.mark.parametrize("measured", [0.5, 1.0, 1.1, math.nan])
def test_a_check_passes_on_its_side_of_the_bound(measured, at_least):
    run, passed = make_run(), measured == 1 or (measured > 1 if at_least else measured < 1)
    assert run.check("name", "x and 1", torch.tensor(measured), 1, at_least) == passed
    [check] = run.checks
    assert isinstance(check, Check) and check.passed == passed and type(check.measured) is float


def test_variants_are_named_by_identifiers():
    module = nn.Linear(1, 1)
    results = [
        by_variant(Task.build, result, nn.Module, "a network") for result in (module, {"rotary": module})
    ]
    assert results == [{"": module}, {"rotary": module}]
    for bad in ("two words", "a.b", "", 3):
        with pytest.raises(UserError, match=r"Task.build .*identifiers .*got " + re.escape(repr(bad))):
            by_variant(Task.build, {bad: module}, nn.Module, "a network")
    assert metric_name("loss", "") == "loss" and metric_name("loss", "rotary") == "loss.rotary"


def test_hooks_that_a_task_may_leave_out():
    task = Task()
    assert task.build(make_run()) is None and task.state_dict() == {}
    # the one hook that may be left out only where nothing is built
    with pytest.raises(UserError, match=r"^Task .*train\(batch\), got none"):
        task.train(None)
