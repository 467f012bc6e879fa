"""Swept values and their combinations, held against Hydra's own expansion of the same overrides."""

from __future__ import annotations

import itertools

import pytest

from runner.config.command import Command, parse_override, text
from runner.errors import UserError
from runner.sweep.grid import as_typed, combinations, swept_overrides, texts, without_sweep


def expanded(*overrides: str, space: dict[str, str] | None = None) -> list[dict[str, str]]:
    command = Command.parse(overrides, multirun=True)
    return [texts(swept) for swept in combinations(swept_overrides(command, space or {}))]


def test_the_last_key_varies_fastest() -> None:
    swept = expanded("a=1,2", "b=fixed", "c=x,y,z")
    assert swept == [{"a": a, "c": c} for a, c in itertools.product("12", "xyz")]
    assert expanded("b=fixed") == [{}]
    with pytest.raises(UserError, match=r"a=interval\(0,1\).*a=range\(start,stop,step\).*sweep=optuna"):
        expanded("a=interval(0,1)")


@pytest.mark.parametrize(
    ("override", "values"),
    [
        ("k=range(0,6,2)", ["0", "2", "4"]),
        ("k=true,false,null", ["true", "false", "null"]),
        ("k=choice(true,1e-3,x)", ["true", "0.001", "x"]),
        ("k=[1,2],[3]", ["[1,2]", "[3]"]),
        ("k='a,b','c'", ["'a,b'", "'c'"]),
        ("k=shuffle(1,1)", ["1"]),
        ("k=3,1,3,2", ["3", "1", "2"]),
        ("+k=1,2", ["1", "2"]),
    ],
)
def test_values_are_as_typed(override: str, values: list[str]) -> None:
    key = override.partition("=")[0]
    assert expanded(override) == [{key: value} for value in values]
    assert not any(parse_override(f"{key}={value}").is_sweep_override() for value in values)  # can be typed


def test_the_command_line_has_the_last_word_on_a_space() -> None:
    space = {"a": "1,2", "b": "3,4"}
    assert expanded(space=space) == [{"a": a, "b": b} for a in "12" for b in "34"]
    assert expanded("a=7", space=space) == [{"b": "3"}, {"b": "4"}]
    assert expanded("a=7,8", "b=9", space=space) == [{"a": "7"}, {"a": "8"}]


def test_what_every_job_has() -> None:
    typed = ["a=1", "b=1,2", "sweep.dir=x", "hydra/launcher=joblib", "on_error=stop", "dry_run=true"]
    assert list(map(text, without_sweep(map(parse_override, typed)))) == ["a=1"]


@pytest.mark.parametrize(
    ("wrong", "right", "typed", "corrected"),
    [
        ("optimizer=adan", "optimizer=adam", "optimizer=sgd,adan", "optimizer=sgd,adam"),
        ("model=rn", "model=rnn", "model=rnn,rn", "model=rnn,rnn"),
        ("modle.width=1", "model.width=1", "modle.width=1,2", "model.width=1,2"),
    ],
)
def test_a_jobs_error_corrects_what_was_typed(wrong: str, right: str, typed: str, corrected: str) -> None:
    call = Command.parse(["seed=1", typed], multirun=True)
    swept = as_typed(UserError("no", wrong, right), call)
    assert (swept.wrong, swept.right) == (typed, corrected)
    assert as_typed(UserError("no", "elsewhere=1", "else=1"), call).wrong is None
