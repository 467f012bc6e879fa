"""A hook of one's own that returns the wrong thing: one message with the class, the file, and what was expected."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

YAML = """# @package _global_
name: mine
description: d
task: {_target_: mine.Mine}
data: {_target_: mine.Points, batch_size: 2}
loop: {steps: 1}
figures: false
"""
BODIES = {
    "Points.load": "return {'train': Split(torch.ones(4, 2), torch.tensor([0, 1, 0, 1]))}",
    "Net.__init__": "super().__init__(); self.layer = nn.Linear(2, 2)",
    "Mine.build": "self.network = Net(); return self.network",
    "Mine.train": "z, y = self.network(batch.inputs), batch.targets; return Output(cross_entropy(z, y), z, y)",
    "Mine.eval": "return super().eval(split)",
}
MODULE = """import torch
from torch import nn
from torch.nn.functional import cross_entropy
from runner.data import Data, Split
from runner.task import Output, Task
class Points(Data):
    def load(self, seed): {Points.load}
class Net(nn.Module):
    def __init__(self): {Net.__init__}
    def forward(self, x): return self.layer(x)
class Mine(Task):
    def __init__(self, data): self.data = data
    def build(self, run): {Mine.build}
    def train(self, batch): {Mine.train}
    def eval(self, split): {Mine.eval}
"""
Try = Callable[..., tuple[int, str]]


@pytest.fixture
def attempt(cli: Callable, tmp_path: Path) -> Try:
    """`attempt("Mine.train", "return 1")`: run an experiment with another body of a method; status and output."""

    def call(hook: str, body: str, *overrides: str) -> tuple[int, str]:
        (tmp_path / "own" / "experiment").mkdir(parents=True)
        (tmp_path / "own" / "experiment" / "mine.yaml").write_text(YAML)
        text = MODULE
        for name, usual in BODIES.items():
            text = text.replace(f"{{{name}}}", body if name == hook else usual)
        (tmp_path / "own" / "mine.py").write_text(text)
        done = cli("experiment=mine", *overrides, config_dir=tmp_path / "own")
        assert "Traceback" not in done.out + done.err
        return done.status, done.out + done.err

    return call


LOSS = "z, y = self.network(batch.inputs), batch.targets; loss = cross_entropy(z, y); "


@pytest.mark.parametrize(
    ("hook", "body", "expected"),
    [
        ("Points.load", "pass", "a dict of splits, .* got None"),
        (
            "Points.load",
            "return torch.ones(4)",
            r"a dict of splits, .* got a tensor of \(4,\), torch.float32",
        ),
        ("Points.load", "return {'train': (1, 2)}", r"a Split\(inputs, targets\) as train, got a tuple"),
        ("Points.load", "return {'train': Split([[1.0]])}", "a tensor as the inputs of train, got a list"),
        ("Points.load", "return {'train': Split(torch.ones(2), torch.ones(3))}", "got 3 for 2 inputs"),
        ("Points.load", "return {'test': Split(torch.ones(2))}", "a split called train, got test"),
        ("Mine.build", "self.network = Net()", "the network that train uses, .* got None"),
        ("Mine.build", "return Net", "the network that train uses, .* got the class Net"),
        ("Mine.build", "return [Net()]", "the network that train uses, .* got a list"),
        ("Mine.build", "return {'a b': Net()}", "identifiers as the names of variants, .* got 'a b'"),
        ("Net.__init__", "pass", r"super\(\).__init__\(\) first"),
        ("Mine.train", "self.network(batch.inputs)", r"an Output\(loss, logits, targets\), .* got None"),
        ("Mine.train", f"{LOSS}return loss", r"an Output\(.* got a tensor of \(\), torch.float32"),
        ("Mine.train", f"{LOSS}return Output(z)", r"one number, \(\), as loss, got a tensor of \(2, 2\)"),
        ("Mine.train", f"{LOSS}return Output(float(loss))", "as loss, got a float"),
        ("Mine.train", f"{LOSS}return Output(loss, scalars={{'x': 0.5}})", "as x, got a float"),
        ("Mine.train", f"{LOSS}return Output(loss, z, y.float())", r"whole targets .* \(2,\), torch.float32"),
        (
            *("Mine.train", f"{LOSS}return Output(loss, torch.ones(2, 5, 3), torch.ones(2, 3).long())"),
            r"logits \(2, 5, 3\) and targets \(2, 3\), torch.int64; logits.movedim\(1, -1\) has them",
        ),
        (
            *("Mine.train", "return Output(self.network(torch.ones(2, 2, device='meta')).sum())"),
            r"every layer and tensor on cpu: .* nn.ModuleList\), .* got Tensor on device",
        ),
        ("Mine.train", "return Output(torch.ones((), device='meta'))", "every layer .* got a loss on meta"),
    ],
)
def test_what_a_hook_returns_is_checked_before_there_is_a_folder(
    attempt: Try, hook: str, body: str, expected: str
) -> None:
    status, out = attempt(hook, body, "device=cpu")
    assert status == 2 and not Path("outputs").exists()
    assert re.search(rf"^error: {hook} \(own/mine.py, line \d+\): expected .*{expected}", out), out


def test_a_network_made_in_build_that_forgot_its_super_is_named(attempt: Try) -> None:
    status, out = attempt("Net.__init__", "self.layer = nn.Linear(2, 2)")
    assert status == 2 and re.search(r"Mine.build \(own/mine.py, .* begin with super\(\).__init__\(\)", out)


@pytest.mark.parametrize(
    ("hook", "body", "expected"),
    [
        ("Mine.train", f"{LOSS}return Output(loss.detach())", "depends on the network, without detach"),
        (
            "Mine.train",
            "w = torch.ones((), requires_grad=True); return Output(2 * w)",
            "no parameter has a grad",
        ),
        ("Mine.train", f"{LOSS}return {{'other': Output(loss)}}", r"per network of build \(one\), got other"),
        ("Mine.eval", "pass", "a dict of numbers by metric, got None"),
        ("Mine.eval", "return {'loss': [1, 2]}", "a number as loss, got a list"),
        ("Mine.eval", "return {'loss': torch.ones(2)}", r"a number as loss, got a tensor of \(2,\)"),
    ],
)
def test_what_shows_only_in_the_run_ends_it_as_failed(
    attempt: Try, hook: str, body: str, expected: str
) -> None:
    load = "Points.load"
    BODIES_WITH_TEST = BODIES[load].replace("}", ", 'test': Split(torch.ones(2, 2), torch.ones(2).long())}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(BODIES, load, BODIES_WITH_TEST)
        status, out = attempt(hook, body)
    assert status == 1
    assert re.search(
        rf"^FAILED: {hook} \(own/mine.py, line \d+\): expected .*{expected}", out, re.MULTILINE
    ), out


def test_an_experiment_of_a_few_lines_is_in_order(attempt: Try) -> None:
    status, out = attempt("Mine.eval", BODIES["Mine.eval"])
    assert status == 0, out
