"""From config to objects: types held against annotations, values against constructors, classes against trust."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import nn

from runner.app import make_job
from runner.build.builder import Builder
from runner.build.schema import INVALID, coerce, describe, signature
from runner.build.trust import Trust
from runner.config.command import Command
from runner.config.compose import Composed
from runner.engine.job import Job
from runner.errors import UserError

MISFITS: dict[Any, list[Any]] = {
    int: [1.0, True, "1", None],
    float: [True, math.nan, -math.inf, "fast"],
    bool: [1, "true"],
    str: [1, None],
    Path: [3],
    Literal["a", "b"]: ["c"],
    Literal[1, 2]: [True, 1.0],  # True == 1, and is not meant
    int | None: ["x"],
    list[int]: [[1, "x"], 1],
    tuple[int, int]: [[1], [1, 2, 3]],
    tuple[int, ...]: [["x"]],
    Sequence[int]: [["x"]],
    Sequence[str]: ["12"],
    Mapping[str, int]: [[1]],
    dict: [[]],
    dict[str, int]: [1],
    nn.Module: [1],
}
FITS: list[tuple[Any, Any, Any]] = [
    (1, int, 1),
    (1, float, 1.0),
    (1e-3, float, 1e-3),
    (False, bool, False),
    ("", str, ""),
    ("a/b", Path, Path("a/b")),
    ("a", Literal["a", "b"], "a"),
    (None, int | None, None),
    (2, int | None, 2),
    (2, float | torch.Tensor, 2.0),
    ([1, 2], list[float], [1.0, 2.0]),
    ([1, 2], tuple[float, float], (1.0, 2.0)),
    ([1, 2, 3], tuple[int, ...], (1, 2, 3)),
    ([1, 2, 3], Sequence[float], (1.0, 2.0, 3.0)),
    ({"factor": 2}, Mapping[str, Any] | None, {"factor": 2}),
    ([], list[int], []),
    ([[1], [2]], list[list[int]], [[1], [2]]),
    ({"a": 1}, dict[str, int], {"a": 1}),
    (object, Any, object),
]
WORDS: dict[Any, str] = {
    int: "a whole number",
    float | None: "a number or null",
    float | torch.Tensor: "a number",
    Literal["a", "b"]: "one of a, b",
    Mapping[str, Any]: "a mapping such as {a: 1}",
    tuple[float, float]: "a list of 2 numbers",
    list[int]: "a list of whole numbers",
    bool: "true or false",
}


@pytest.mark.parametrize("annotation", MISFITS, ids=str)
def test_what_does_not_fit(annotation: Any) -> None:
    assert all(coerce(value, annotation) is INVALID for value in MISFITS[annotation])


@pytest.mark.parametrize(("value", "annotation", "fitted"), FITS, ids=str)
def test_what_fits_comes_in_the_annotated_type(value: Any, annotation: Any, fitted: Any) -> None:
    found = coerce(value, annotation)
    assert found == fitted and type(found) is type(fitted)


@pytest.mark.parametrize("annotation", WORDS, ids=str)
def test_types_in_words(annotation: Any) -> None:
    assert describe(annotation).startswith(WORDS[annotation])


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


@pytest.fixture
def builder(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Builder]:
    """`builder({"width": 3}, "model.width=3")`: for a model node of `Layer`, and what was typed."""

    def make(node: dict[str, Any], *typed: str) -> Builder:
        config = {"model": {"_target_": "layers.Layer", **node}}
        base = {"model": {"width": 2, "depth": 1, "rate": 0.1}}
        composed = Composed(config, list(typed), base, base, {t.partition("=")[0]: t for t in typed})
        builder = Builder(composed, Trust(None, None))
        monkeypatch.setattr(builder, "resolve", lambda path, target: Layer)
        return builder

    return make


def build_layer(made: Builder) -> Any:
    return made.node("model", made.composed.config["model"])


def test_a_node_is_built_with_its_arguments_and_a_factory_gives_a_fresh_object_each_time(
    builder: Callable[..., Builder],
) -> None:
    assert build_layer(builder({"width": 3, "rate": 1})) == Layer(3, 1, 1.0)
    make: Any = builder({}).factory("model", Layer, {"depth": 3})
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
    builder: Callable[..., Builder], node: dict[str, Any], typed: str | None, message: str, right: str | None
) -> None:
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        build_layer(builder(node, *filter(None, [typed])))
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
