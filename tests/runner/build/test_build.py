"""From config to objects: types held against annotations, values against constructors, classes against trust."""

from __future__ import annotations

import functools
import inspect
import math
import re
import sys
import typing
from collections import abc
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from runner.app import make_job
from runner.build.builder import Builder
from runner.build.schema import INVALID, coerce, describe, signature
from runner.build.trust import Trust
from runner.config.command import Command
from runner.config.compose import Composed
from runner.engine.job import Job
from runner.errors import UserError
from tests.tables import table

TYPES, NODES = (Path(__file__).with_name(name) for name in ("types.txt", "nodes.txt"))
NAMES = {**vars(typing), **vars(abc), **vars(math), "Path": Path, "Tensor": torch.Tensor, "Module": nn.Module}


@table(TYPES, "types", "annotation", "fits", "misfits", "words")
def test_a_value_comes_in_the_annotated_type_or_does_not_fit(
    annotation: str, fits: str, misfits: str, words: str
) -> None:
    cls = eval(annotation, NAMES)
    for pair in filter(None, fits.split("; ")):
        value, expected = (eval(text, NAMES) for text in pair.split(" -> "))
        found = coerce(value, cls)
        assert (found, type(found)) == (expected, type(expected))
    assert all(coerce(eval(text, NAMES), cls) is INVALID for text in filter(None, misfits.split("; ")))
    assert describe(cls).startswith(words)


@dataclass
class Layer:
    """A stand-in for a user's class."""

    width: int
    depth: int = 1
    rate: float = 0.1

    def __post_init__(self) -> None:
        if self.width * self.depth > 100:
            raise ValueError("width and depth are too large together")
        if self.rate > 1:
            raise ValueError(f"Invalid value: {self.rate}")


def layer_builder(node: dict[str, Any], *typed: str) -> Any:
    """Return the builder of a config whose model is a `Layer` with these arguments, and of what was typed."""
    config = {"model": {"_target_": "layers.Layer", **node}}
    base = {"model": {"width": 2, "depth": 1, "rate": 0.1}}
    composed = Composed(config, list(typed), base, base, {t.partition("=")[0]: t for t in typed})
    builder: Any = Builder(composed, Trust(None, None))
    builder.resolve = lambda path, target: Layer
    return builder


def build_layer(node: dict[str, Any], *typed: str) -> Any:
    builder = layer_builder(node, *typed)
    return builder.node("model", builder.composed.config["model"])


def test_a_node_is_built_with_its_arguments_and_a_factory_gives_a_fresh_object_each_time() -> None:
    assert build_layer({"width": 3, "rate": 1}) == Layer(3, 1, 1.0)
    make = layer_builder({}).factory("model", Layer, {"depth": 3})
    first, second = make(width=2), make(width=4, depth=5)
    assert (first, second) == (Layer(2, 3), Layer(4, 5)) and first is not second


@pytest.mark.parametrize(
    ("node", "typed", "message", "right"),
    [
        ({"widht": 3}, "model.widht=3", "Did you mean width?", "model.width=3"),
        ({"width": 1.5}, "model.width=1.5", "a whole number", "model.width=2"),
        ({"width": 1.5}, None, "model.width: expected a whole number, got 1.5", None),
        ({"width": 2, "rate": 3}, "model.rate=3", "model.rate=3: Invalid", "model.rate=0.1"),
        # two are named; the typed one is meant
        ({"width": 60, "depth": 2}, "model.depth=2", "model.depth=2: width", "model.depth=1"),
        ({}, None, "Layer needs width", None),
    ],
)
def test_what_is_blamed_and_proposed(
    node: dict[str, Any], typed: str | None, message: str, right: str | None
) -> None:
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        build_layer(node, *filter(None, [typed]))
    assert (caught.value.wrong, caught.value.right) == (typed, right)


def test_a_constructor_that_takes_anything_has_only_its_named_parameters() -> None:
    class Open:
        def __init__(self, a: int, *rest: int, b: int = 1, **more: int):
            pass

    assert list(signature(Open)) == ["a", "b"]


def job_of(toys: Path, *overrides: str) -> Job:
    job = make_job(Command.parse(["experiment=toy_variants", *overrides], toys))
    assert job is not None
    return job


@pytest.mark.parametrize(
    ("overrides", "cls", "expected"),
    [
        ([], torch.optim.SGD, {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 0.0}),
        (["optimizer=adamw", "optimizer.lr=1"], torch.optim.AdamW, {"lr": 1.0, "weight_decay": 0.01}),
        (
            ["optimizer=adam", "optimizer._target_=torch.optim.NAdam", "+optimizer.momentum_decay=0.1"],
            torch.optim.NAdam,
            {"lr": 0.001, "betas": (0.9, 0.999), "weight_decay": 0.0, "momentum_decay": 0.1},
        ),
    ],
)
def test_the_optimizer_is_torchs_with_the_arguments_of_the_config(
    clean_process: None, toys: Path, overrides: list[str], cls: type, expected: dict[str, Any]
) -> None:
    optimizer = job_of(toys, *overrides).optimizer([nn.Parameter(torch.zeros(2))])
    assert type(optimizer) is cls
    assert {key: optimizer.defaults[key] for key in expected} == expected

    # what no file says is as torch has it; the YAML files set these beside those that a row asserts
    reference = inspect.signature(cls).parameters
    unsaid = set(optimizer.defaults) & set(reference) - {"lr", "betas", "eps", "weight_decay", *expected}
    assert all(optimizer.defaults[key] == reference[key].default for key in unsaid)


def test_an_optimizer_that_evaluates_the_loss_itself_is_refused(clean_process: None, tmp_path: Path) -> None:
    own = tmp_path / "own"
    (own / "optimizer").mkdir(parents=True)
    (own / "optimizer" / "lbfgs.yaml").write_text("_target_: torch.optim.LBFGS\nlr: 0.1\n")
    with pytest.raises(UserError, match="needs no closure, got LBFGS"):
        make_job(Command.parse(["experiment=rnn_fashion", "optimizer=lbfgs"], own))


def test_the_job_has_what_the_config_says(clean_process: None, toys: Path) -> None:
    job = job_of(toys, "seed=5", "loop.epochs=2", "schedule=cosine", "schedule.final=0.5", "data.samples=30")
    assert (job.name, job.seed, job.loop.epochs, job.mode) == ("toy_variants", 5, 2.0, "train")
    assert job.schedule(10, 10) == 0.5
    assert job.data is not None and len(job.data.load(0)["train"]) == 30
    assert job.config["seed"] == 5 and "seed=5 (0)" in job.changes
    assert type(job.task).__name__ == "Variants"


OWN = """
import subprocess
from collections.abc import Callable
from enum import Enum
from subprocess import run
from torch import nn

class Colour(Enum):
    RED = 1

class Net(nn.Module):
    def __init__(self, width: int = 1, colour: Colour | None = None, inner: nn.Module | None = None,
                 layers: list[nn.Module] | None = None, call: Callable[..., float] | None = None, extra=None):
        super().__init__()
        names = ("width", "colour", "inner", "layers", "call", "extra")
        self.given = {name: value for name, value in locals().items() if name in names}

def net(width: int, **more) -> Net:
    return Net(width, **more)

def passes(**more) -> nn.Module:
    return Net(**more)

def scale(x: float, by: float = 2.0) -> float:
    return x * by

def silent(width: int):
    subprocess.run("false", check=True)

def named(text: str) -> str:
    subprocess.run("false", check=True)

def other(width: int) -> Net:
    return nn.Linear(1, 1)

def _hidden() -> Net: ...
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """`own("{_target_: @net}")`: build a model of a module that the caller trusts, which @ stands for."""
    (tmp_path / "own_nets.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own_nets", raising=False)

    def build(text: str) -> Any:
        node = yaml.safe_load(text.replace("@", "own_nets."))
        return Builder(Composed({"model": node}, []), Trust("torch", tmp_path)).node("model", node, nn.Module)

    return build


def in_words(value: Any) -> Any:
    """Return what a class or function of the tests was given, as plain values."""
    if isinstance(value, functools.partial):
        return [value.func.__name__, *value.args, value.keywords]
    if isinstance(value, list):
        return [in_words(item) for item in value]
    value = getattr(value, "given", value)
    if isinstance(value, dict):
        return {key: in_words(item) for key, item in value.items() if item is not None}
    return value.name if isinstance(value, Enum) else value


@table(NODES, "built", "node", "expected")
def test_a_node_is_built_as_its_settings_say(own: Callable[[str], Any], node: str, expected: str) -> None:
    assert in_words(own(node)) == yaml.safe_load(expected)


@table(NODES, "refused", "node", "words")
def test_a_node_that_does_not_fit_is_refused(own: Callable[[str], Any], node: str, words: str) -> None:
    with pytest.raises(UserError, match=re.escape(words.replace("@", "own_nets."))):
        own(node)


def test_the_layers_of_a_sequence_are_positional(own: Callable[[str], Any]) -> None:
    layers = "{_target_: torch.nn.Linear, _args_: [2, 3]}, {_target_: torch.nn.Tanh}"
    built = own(f"{{_target_: torch.nn.Sequential, _args_: [{layers}]}}")
    assert str(built) == str(nn.Sequential(nn.Linear(2, 3), nn.Tanh()))


def test_a_function_makes_the_parts_of_a_run(clean_process: None, tmp_path: Path) -> None:
    (tmp_path / "own_parts.py").write_text(
        "import torch\nfrom torch.optim import Adam\n"
        "def warm(step: int, steps: int, final: float) -> float:\n    return final\n"
        "def adam(params, lr: float) -> Adam:\n    return Adam(params, lr)\n"
    )
    for name, node in (("schedule", "_target_: own_parts.warm\n_partial_: true\nfinal: 0.5"),
                       ("optimizer", "_target_: own_parts.adam\nlr: 0.25")):  # fmt: skip
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine.yaml").write_text(node)
    job = make_job(Command.parse(["experiment=rnn_fashion", "schedule=mine", "optimizer=mine"], tmp_path))
    assert job is not None and job.schedule(1, 9) == 0.5
    optimizer = job.optimizer([nn.Parameter(torch.zeros(2))])
    assert type(optimizer) is torch.optim.Adam and optimizer.defaults["lr"] == 0.25
