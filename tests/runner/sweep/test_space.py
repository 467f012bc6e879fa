"""Search spaces: what an override text becomes, and that drawn values are read back as what was drawn."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from runner.config.command import parse_override
from runner.errors import UserError
from runner.sweep import space as spaces
from runner.sweep.grid import parse_texts
from runner.sweep.space import corners, points, texts
from tests.runner.sweep.helpers import cases, missing

optuna = pytest.importorskip("optuna")
Float, Int = optuna.distributions.FloatDistribution, optuna.distributions.IntDistribution  # of the table
Choice = optuna.distributions.CategoricalDistribution


def read_space(texts: dict[str, str]) -> dict[str, Any]:
    return spaces.read_space(parse_texts(texts))


@cases("distribution", "text", "distribution")
def test_distributions(text: str, distribution: str) -> None:
    assert read_space({"some.key": text}) == {"some.key": eval(distribution)}


@pytest.mark.parametrize(
    "text", ["range(64,257,64)", "range(10,0,-3)", "range(0.1,0.5,0.1)", "range(5)", "range(0,1,0.25)"]
)
def test_range_holds_the_values_that_hydra_counts(text: str) -> None:
    theirs = sorted(parse_override(f"k={text}").sweep_iterator())
    assert [point["k"] for point in points(read_space({"k": text}))] == pytest.approx(theirs, abs=1e-12)


@cases("space", "text", "names")
def test_what_is_no_space_is_refused(text: str, names: str) -> None:
    with pytest.raises(UserError) as caught:
        read_space({"some.key": text})
    assert missing(f"some.key={text}; {names}", caught.value) == []


DRAWN = ["tag(log,interval(1e-12,1e12))", "interval(-1e-5,1e-5)", "range(0,1,0.1)", "int(interval(-9,9))"]
DRAWN += ["tag(log,int(interval(1,1000000)))", "0.5,null,true,[1,2],'a b',1e-05,text"]


@pytest.mark.parametrize("text", DRAWN)
def test_drawn_value_is_parsed_to_itself(text: str) -> None:
    space = read_space({"k": text})
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    choices = {c: parse_override(f"k={c}").value() for c in getattr(space["k"], "choices", ())}
    for _ in range(20):
        drawn = study.ask(space).params["k"]
        read = parse_override(f"k={texts({'k': drawn}, space)['k']}").value()
        expected = choices.get(drawn, drawn)
        assert (read, type(read)) == (expected, type(expected))


def test_corners_change_one_key_at_a_time() -> None:
    space = read_space({"a": "interval(0,1)", "b": "x,y,z", "c": "range(1,9,3)", "d": "int(interval(5,5))"})
    first, last = {"a": "0.0", "b": "x", "c": "1", "d": "5"}, {"a": "1.0", "b": "z", "c": "7", "d": "5"}
    others = [first | {key: value} for key, value in (("a", "1.0"), ("b", "y"), ("b", "z"), ("c", "7"))]
    assert corners(space) == [first, *others, last]
    for keys, count in ((20, 22), (1, 2)):
        assert len(corners(read_space({f"k{i}": "interval(0,1)" for i in range(keys)}))) == count


def test_points_are_discrete_and_not_too_many() -> None:
    found = points(read_space({"a": "x,y", "b": "range(1,4)", "c": "range(0.1,0.4,0.1)"}))
    assert [tuple(point.values()) for point in found] == list(
        itertools.product("xy", (1, 2, 3), (0.1, 0.2, 0.3))
    )
    with pytest.raises(UserError, match=r"lr: .* lr=range\(start,stop,step\)"):
        points(read_space({"lr": "interval(0,1)"}))
    with pytest.raises(UserError, match="1,000,000 points"):
        points(read_space({f"k{i}": "range(10)" for i in range(6)}))


def test_without_optuna_the_error_is_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "optuna", None)
    with pytest.raises(UserError, match=r"pip install 'formula-runner\[optuna\]'"):
        spaces.import_optuna()
