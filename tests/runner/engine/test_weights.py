"""Training that starts from the weights of another run, and parameters that it leaves alone."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn

from runner.engine.weights import freeze, start_from
from runner.errors import UserError
from tests.conftest import TOYS
from tests.runner.engine.helpers import assert_equal, parts, weights

PACED = ("experiment=toy_paced", "loop.steps=4", "loop.eval_every=2")
FIRST, LAST = "layers.0.*", "layers.3.*"


@pytest.fixture
def trained(cli, last_run):
    """`trained(*overrides)`: the folder of a toy's run; `.out` of the last one in `trained.out`."""

    def call(*overrides, status=0):
        done = cli(*PACED, *overrides, config_dir=TOYS)
        assert done.status == status, done.out + done.err
        call.out = " ".join((done.out + done.err).split())
        return last_run() if status == 0 else None

    return call


def network(**sizes: int) -> nn.Module:
    layers = {"encoder": nn.Linear(2, sizes.get("width", 3)), "norm": nn.BatchNorm1d(sizes.get("width", 3))}
    return nn.ModuleDict(layers | {"head": nn.Linear(3, sizes.get("classes", 4))})


def test_weights_are_taken_where_names_and_shapes_agree(trained):
    source = trained("seed=1")
    path = source / "checkpoints" / "last.pt"
    whole = trained(f"init={path}", "loop.steps=0")
    assert "4 of 4 tensors: layers.*" in trained.out
    assert_equal(weights(whole), weights(source))

    # another hidden layer: its output bias alone fits
    plain = weights(trained("model.hidden=9", "loop.steps=0"))
    wider = weights(trained("model.hidden=9", "loop.steps=0", f"init={path}"))
    assert (
        "1 of 4 tensors: layers.3.bias; as initialised: layers.0.weight (9, 2) (there (8, 2))" in trained.out
    )
    assert torch.equal(wider["layers.3.bias"], weights(source)["layers.3.bias"])
    others = [name for name in wider if name != "layers.3.bias"]
    assert_equal({name: wider[name] for name in others}, {name: plain[name] for name in others})


def save(tmp_path: Path, content: object) -> Path:
    torch.save(content, tmp_path / "weights.pt")
    return tmp_path / "weights.pt"


def checkpoint_of(models: dict[str, nn.Module], ema: bool = False) -> dict[str, object]:
    rest = dict.fromkeys(("optimizer", "step", "progress", "task", "config"))
    states = {name: model.state_dict() for name, model in models.items()}
    averages = {name: [t + 1 for t in state.values()] for name, state in states.items()} if ema else {}
    return rest | {"model": states, "ema": averages}


@pytest.mark.parametrize("variant", ["", "wide"])
def test_one_network_serves_every_variant_and_others_that_of_their_name(tmp_path, variant):
    source = {variant: nn.Linear(2, 2)} | ({"narrow": nn.Linear(2, 2)} if variant else {})
    targets = {"narrow": nn.Linear(2, 2), "wide": nn.Linear(2, 2)}
    start_from(save(tmp_path, checkpoint_of(source)), targets)
    for name, target in targets.items():
        assert_equal(dict(target.state_dict()), dict(source[name if variant else ""].state_dict()))


def test_averaged_weights_are_preferred_and_a_plain_state_dict_is_read(tmp_path):
    source, target = nn.Linear(2, 2), nn.Linear(2, 2)
    said = start_from(save(tmp_path, checkpoint_of({"": source}, ema=True)), {"": target})
    assert said.startswith("averaged weights of") and torch.equal(target.weight, source.weight + 1)
    assert start_from(save(tmp_path, source.state_dict()), {"": target}).startswith("weights of")
    assert torch.equal(target.weight, source.weight)


def test_what_was_taken_and_what_was_not_is_said(tmp_path):
    said = start_from(save(tmp_path, network().state_dict()), {"": network(classes=5)})
    assert "7 of 9 tensors: encoder.*, norm.*; as initialised: " in said
    assert "head.weight (5, 3) (there (4, 3))" in said and "head.bias (5,) (there (4,))" in said


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"other.weight": torch.ones(2)}, r"nothing in it fits this network. There: other.weight. Here: "),
        ({"step": 3}, "is not a checkpoint of this runner: no model"),
        (b"text", "init=.*weights.pt is not a checkpoint"),
        (None, "no such file"),
    ],
)
def test_weights_that_fit_nothing_are_refused(tmp_path, content, message):
    path = tmp_path / "weights.pt" if content is None else save(tmp_path, content)
    with pytest.raises(UserError, match=message):
        start_from(path, {"": network()})


@pytest.mark.parametrize(
    ("patterns", "frozen"),
    [
        ([FIRST], {"layers.0.weight", "layers.0.bias"}),
        (["*.bias"], {"layers.0.bias", "layers.3.bias"}),
        (["layers.0.weight", LAST], {"layers.0.weight", "layers.3.weight", "layers.3.bias"}),
    ],
)
def test_frozen_parameters_stay_bit_equal_and_have_no_state(trained, patterns, frozen):
    """Under weight decay and averaging, whatever the optimiser; the others are trained."""
    setting = f"freeze=[{','.join(patterns)}]" if len(patterns) > 1 else f"freeze={patterns[0]}"
    common = ("optimizer=adamw", "optimizer.weight_decay=0.5", "loop.ema=0.5", "loop.ema_warmup=false")
    start, run = weights(trained("loop.steps=0")), trained(setting, *common)
    assert "frozen layers.0." in trained.out
    saved = parts(run)
    assert {name for name, value in saved["model"][""].items() if torch.equal(value, start[name])} == frozen
    names = list(start)
    averages = dict(zip(names, saved["ema"][""], strict=True))
    assert all(torch.equal(averages[name], start[name]) for name in frozen)
    assert {names[number] for number in saved["optimizer"][""]["state"]} == set(names) - frozen


def test_a_resume_keeps_parameters_frozen_and_needs_no_initial_weights(trained, cli, last_run):
    source = trained("seed=1") / "checkpoints" / "last.pt"
    setting = (f"freeze={FIRST}", f"init={source}", "optimizer=adam")
    whole, half = trained(*setting, "loop.steps=8"), trained(*setting)
    source.unlink()
    assert cli(f"resume={half}", "loop.steps=8", config_dir=TOYS).status == 0
    for part in ("model", "optimizer"):
        assert_equal(parts(half)[part], parts(whole)[part])
    assert cli("mode=eval", f"checkpoint={half}/checkpoints/best.pt", config_dir=TOYS).status == 0
    refused = cli(f"resume={half}", "freeze=null", config_dir=TOYS)
    assert refused.status == 2 and "a resume may only change" in refused.err


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("layer.*", "freeze=layer.* matches no parameter. Did you mean layers.*? Available: layers.*."),
        ("layers", "Did you mean layers.*?"),
        ("layers.0.wieght", "Did you mean layers.0.weight?"),
        ("[layers.0.bias,layers.0.wieght]", "try: python -m runner --config-dir"),
        ("[layers.0.bias,layers.0.wieght]", "'freeze=[layers.0.bias,layers.0.weight]'"),
        ("xyz", "freeze=xyz matches no parameter. Available: layers.*."),
        ("'*'", "leaves no parameter to train"),
    ],
)
def test_a_pattern_that_matches_nothing_or_everything_is_refused(trained, tmp_path, pattern, message):
    trained(f"freeze={pattern}", status=2)
    assert message in trained.out and not (tmp_path / "outputs").exists()


def test_patterns_name_a_variants_parameters_too():
    networks = {"small": nn.Linear(2, 2), "large": nn.Linear(2, 2)}
    assert freeze(["large.bias"], networks) == "large.bias (2 parameters)"
    assert [p.requires_grad for net in networks.values() for p in net.parameters()] == [
        True,
        True,
        True,
        False,
    ]
    with pytest.raises(UserError, match=re.escape("leaves no parameter of small to train")):
        freeze(["small.*"], networks)
