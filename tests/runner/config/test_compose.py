"""Composing: what Hydra would compose, in plain values, and the words for what does not fit."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from runner.config import compose as composing
from runner.config.command import CONF, SWEEP_KEYS, Command, parse_override, quote, show
from runner.config.compose import RESUMABLE, Composed, compose_command, on_top
from runner.config.options import declared_groups, groups
from runner.errors import UserError
from tests import conftest
from tests.conftest import Outcome

QUOTED = ["seed=1", "a=1,2", "a='1,2'", 'a="x"', "a='b$c'", "a=`x`", "a='it''s'", "a=[1,2]"]
QUOTED += ["a b", "!x'", "a\\'b", "é'", "", "it's a $HOME; (run)"]


@pytest.mark.parametrize("argument", QUOTED)
def test_a_quoted_argument_is_read_back_by_the_shell(argument: str) -> None:
    assert subprocess.check_output(f"printf %s {quote(argument)}", shell=True, text=True) == argument


@pytest.mark.parametrize(
    "overrides",
    [
        ["optimizer=adam", "schedule=linear", "schedule.final=0.5", "seed=1", "seed=2"],
        ["debug=fast", "seed=7", "data.batch_size=3"],
        ["model.hidden_size=${data.batch_size}", "+optimizer.maximize=true", "++loop.epochs=1"],
        ["outputs='a, b: c'", "threads=2", "device=cpu", "optimizer.lr=1e-3", "debug=null", "preset=null"],
    ],
    ids=" ".join,
)
def test_it_composes_what_hydra_composes(overrides: list[str]) -> None:
    ours = compose_command(Command.parse(["experiment=rnn_fashion", *overrides]))
    for_hydra = [o for o in overrides if not o.endswith("=null")]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("config", ["experiment=rnn_fashion", *for_hydra])
    expected = OmegaConf.to_container(config, resolve=True)
    assert isinstance(expected, dict)
    sweep = {key: expected.pop(key) for key in (*SWEEP_KEYS, "runs")}  # which no run records
    assert (ours.config, ours.sweep) == (expected, sweep)
    assert ours.overrides == ["experiment=rnn_fashion", *overrides]


OWN = {
    "experiment/mine.yaml": """# @package _global_
defaults:
  - rnn_fashion
  - /head: small
  - /optimizer@task.second: adam
  - optional /nothing: here
  - /note: for_${head}
  - override /optimizer: adamw
  - _self_
name: mine
vars: {lr: 0.02}
optimizer: {lr: "${vars.lr}"}
model: {hidden_size: "${head.width}"}
""",
    "experiment/extended.yaml": "# @package _global_\ndefaults: [mine, override /head: wide]\nname: extended\n",
    "head/small.yaml": "width: 5\nfirst: 1\n",
    "head/wide.yaml": "width: 50\n",
    "head/very/wide.yaml": "defaults: [/head/wide@_here_, _self_]\nlayers: 2\n",
    "note/for_small.yaml": "# @package task\nnote: small\n",
    "note/for_wide.yaml": "# @package task\nnote: wide\n",
    "optimizer/rms.yaml": "_target_: torch.optim.RMSprop\nlr: 0.1\n",
}


@pytest.mark.parametrize(
    "overrides",
    [
        ["experiment=mine"],
        ["experiment=extended", "vars.lr=3", "optimizer@task.second=rms"],
        ["experiment=mine", "note=for_wide", "+head@model.head=[small,wide]", "~model.dropout"],
        [
            "experiment=rnn_fashion",
            "+head=very/wide",
            "+head/very@task=wide",
            "optimizer={lr:0.3,momentum:0}",
        ],
        ["experiment=rnn_fashion", "+nodes={a:[1]}", "optimizer.lr=${nodes.a[0]}", "+optimizer.foreach=true"],
        ["experiment=rnn_fashion", "+a.b=2", "seed=${oc.select:a.b}", "~task.loss.label_smoothing=0.0"],
    ],
    ids=" ".join,
)
def test_ones_own_configs_compose_as_hydra_composes_them(tmp_path: Path, overrides: list[str]) -> None:
    for name, content in OWN.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("config", [f"hydra.searchpath=['file://{tmp_path}']", *overrides])
    expected = OmegaConf.to_container(config, resolve=True)
    assert isinstance(expected, dict)
    ours = compose_command(Command.parse(overrides, tmp_path))
    assert ours.config == {key: value for key, value in expected.items() if key not in (*SWEEP_KEYS, "runs")}


def test_a_group_can_be_left_empty_and_what_is_not_chosen_leaves_no_trace(toys: Path) -> None:
    command = ["experiment=toy_variants", "model=null", "optimizer=adam"]
    found = compose_command(Command.parse(command, toys)).config
    assert found["model"] is None and found["data"]["_target_"] == "toys.Blobs"
    assert found["optimizer"] == yaml.safe_load((CONF / "optimizer" / "adam.yaml").read_text())


def test_what_differs_from_the_experiments_defaults() -> None:
    overrides = ["optimizer.lr=0.01", "loop.clip_norm=null", "compile=true", "outputs=x", "seed=0"]
    changes = compose_command(Command.parse(["experiment=rnn_fashion", *overrides])).changes()
    expected = {"compile=true (false)", "loop.clip_norm=null (1.0)", "optimizer.lr=0.01 (0.05)"}
    assert set(changes) == expected and len(changes) == 3
    assert compose_command(Command.parse(["experiment=rnn_fashion"])).changes() == []


def test_where_a_key_was_last_written(toys: Path) -> None:
    found = compose_command(Command.parse(["experiment=toy_variants", "debug=fast", "seed=3"], toys)).written
    assert found["seed"] == "seed=3"
    assert found["loop.steps"] == "in conf/debug/fast.yaml"
    assert found["loop.epochs"] == f"in {toys}/experiment/toy_variants.yaml"  # after conf/loop/default.yaml
    assert found["optimizer.lr"] == "in conf/optimizer/sgd.yaml"
    assert found["model.hidden"] == f"in {toys}/model/mlp.yaml"


def test_the_commands_that_are_proposed_keep_what_finds_the_experiment_and_its_runs() -> None:
    call = Command.parse(["experiment=x", "trust=my_tasks", "outputs=big disk", "seed=1"], Path("own"))
    assert call.prefix == "python -m runner --config-dir own trust=my_tasks 'outputs=big disk'"


LOOP = {"epochs": 2, "steps": None}
LATER = {"init": None, "freeze": None, "figures": True}  # keys that an earlier version did not store
STORED = {"name": "x", "seed": 0, "optimizer": {"lr": 0.1}, "loop": LOOP, "device": "auto", "threads": None}


def put_on_top(*overrides: str, allowed: tuple[str, ...] | None = None) -> Composed:
    return on_top(STORED, Command.parse(overrides), allowed)


def test_values_on_top_of_a_stored_config() -> None:
    found = put_on_top("optimizer.lr=0.5", "loop.steps=7", "mode=eval", "checkpoint=x", "experiment=x")
    assert found.config == STORED | LATER | {"optimizer": {"lr": 0.5}, "loop": {"epochs": 2, "steps": 7}}
    assert found.overrides == ["optimizer.lr=0.5", "loop.steps=7"]
    assert STORED["optimizer"] == {"lr": 0.1}  # what was handed in stays as it was
    assert found.changes() == ["optimizer.lr=0.5 (0.1)", "loop.steps=7 (null)"]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("optimizer.rl=1", "did you mean 'optimizer.lr'?"),
        ("optimizer=adam", "the stored run decides"),
        ("experiment=y", "the stored run decides"),
        ("~seed", "cannot be removed"),
        ("seed=1,2", "add -m"),
        ("hydra.run.dir=x", "use outputs="),
    ],
)
def test_what_may_not_be_put_on_top(override: str, words: str) -> None:
    with pytest.raises(UserError, match=re.escape(words)):
        put_on_top(override)


def test_a_resume_may_change_how_long_and_where_alone() -> None:
    changed = put_on_top("loop.epochs=3", "loop.steps=3", "device=cpu", "threads=1", allowed=RESUMABLE).config
    assert changed == STORED | LATER | {"loop": {"epochs": 3, "steps": 3}, "device": "cpu", "threads": 1}
    assert put_on_top("figures=false", allowed=RESUMABLE).changes() == ["figures=false (true)"]
    with pytest.raises(UserError, match="a resume may only change"):
        put_on_top("seed=1", allowed=RESUMABLE)


@pytest.mark.parametrize(
    ("overrides", "values"),
    [
        (["resume=a/b", "seed=1"], {"resume": "a/b"}),
        (["checkpoint=12", "mode=eval"], {"checkpoint": "12", "mode": "eval"}),
        (["trust=null"], {"trust": None}),
        (["outputs='a b'"], {"outputs": "a b"}),
        (["mode=eval", "mode=train"], {"mode": "train"}),
    ],
)
def test_the_keys_that_say_what_to_do(overrides: list[str], values: dict[str, Any]) -> None:
    assert Command.parse(overrides).options == values


@pytest.mark.parametrize("value", [True, 0.1, None, "x", [1, [2.5, None]], {"a": True, "b": {"c": []}}])
def test_a_value_is_shown_as_it_is_typed(value: Any) -> None:
    assert parse_override(f"key={show(value)}").value() == value


def test_ones_own_options_stand_beside_ours(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.yaml").write_text("_target_: mine.Net\n")
    found = groups(Command.parse([], tmp_path))
    assert {"rnn", "mine"} <= set(found["model"])
    assert found["model"]["mine"] == tmp_path / "model" / "mine.yaml"
    assert set(declared_groups()) <= set(found)
    assert "mine" not in groups(Command.parse([]))["model"]


def test_every_override_is_parsed_once_and_a_sweep_is_composed_twice(
    cli: Callable[..., Outcome], toys: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parse, compose_yaml = OverridesParser.parse_override, composing.compose
    parsed: list[str] = []
    composed: list[list[str]] = []
    monkeypatch.setattr(OverridesParser, "parse_override", lambda *a: parsed.append(a[1]) or parse(*a))
    monkeypatch.setattr(composing, "compose", lambda *a, **k: composed.append(a[1]) or compose_yaml(*a, **k))
    words = ["experiment=toy_variants", "seed=1,2", "optimizer.lr=0.1", "threads=1", "dry_run=true"]
    monkeypatch.setattr(conftest, "_COMPOSED", {})
    assert cli("-m", *words, config_dir=toys).status == 0
    assert sorted(parsed) == sorted(words)
    assert len(composed) == 2  # the experiment, and the launcher


def test_a_job_of_an_older_sweep_is_named_as_it_is(tmp_path: Path) -> None:
    job = tmp_path / "0_seed=0,lr=0.1"
    job.mkdir()
    assert Command.parse([f"resume={job}"]).options == {"resume": str(job)}
    (job / "best.pt").touch()
    assert Command.parse([f"checkpoint={job}/best.pt"]).options == {"checkpoint": f"{job}/best.pt"}


@pytest.mark.parametrize(("folder", "name"), [(Path("toys"), "toy_checks"), (CONF, "rnn_fashion")])
def test_the_folder_of_ones_own_may_be_relative_or_the_runners(
    toys: Path, monkeypatch: pytest.MonkeyPatch, folder: Path, name: str
) -> None:
    monkeypatch.chdir(toys.parent)
    assert compose_command(Command.parse([f"experiment={name}"], folder)).config["name"] == name
